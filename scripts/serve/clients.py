"""The official Python clients against a running server: clients.py URL [KEY].

Needs the packages openai and anthropic. Prints a line for each check; ends with 1 at the first that fails."""

import json
import sys

import anthropic
import openai

url, key = sys.argv[1].rstrip("/"), (sys.argv[2:] or ["none"])[0]
ours = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
theirs = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
model = ours.models.list().data[0].id
ask = {"model": model, "messages": [{"role": "user", "content": "Name three colours."}], "temperature": 0, "max_tokens": 24}
weather = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
           "additionalProperties": False}
checks = []


def check(function):
    checks.append(function)
    return function


def fails(kind, call, *parts):
    try:
        call()
    except kind as error:
        assert all(part in str(error) for part in parts), error
        return error
    raise AssertionError(f"{kind.__name__} was expected")


@check
def a_chat_as_a_whole_and_in_parts():
    whole = ours.chat.completions.create(**ask)
    parts, usage, reasons = "", None, []
    for chunk in ours.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert parts == whole.choices[0].message.content != ""
    assert usage.completion_tokens == whole.usage.completion_tokens and reasons == [whole.choices[0].finish_reason]


@check
def choices_seeds_and_probabilities():
    warm = {**ask, "temperature": 1.0, "seed": 5}
    three = ours.chat.completions.create(**warm, n=3, logprobs=True, top_logprobs=3)
    texts = [choice.message.content for choice in three.choices]
    assert len(set(texts)) > 1 and texts[0] == ours.chat.completions.create(**warm).choices[0].message.content
    for choice in three.choices:
        for token in choice.logprobs.content:
            assert token.logprob <= 0 and len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob >= token.top_logprobs[2].logprob
    assert three.usage.completion_tokens == sum(len(c.logprobs.content) + (c.finish_reason == "stop") for c in three.choices)


@check
def completions_with_echo():
    told = ours.completions.create(model=model, prompt="The sky is blue", echo=True, logprobs=1, max_tokens=1, temperature=0)
    logprobs = told.choices[0].logprobs
    assert told.choices[0].text.startswith("The sky is blue") and logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
    many = ours.completions.create(model=model, prompt=["a", "b"], n=2, max_tokens=3, temperature=0)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]


@check
def stop_texts():
    full = ours.chat.completions.create(**ask).choices[0].message.content
    stop = full[5:8]
    cut = ours.chat.completions.create(**ask, stop=stop).choices[0].message.content
    assert cut == full[: full.index(stop)], (full, stop, cut)


@check
def a_forced_call():
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": weather}}
    choice = ours.chat.completions.create(**{**ask, "max_tokens": 80}, tools=[tool], tool_choice="required").choices[0]
    call = choice.message.tool_calls[0].function
    assert call.name == "get_weather" and isinstance(json.loads(call.arguments)["city"], str)
    assert choice.finish_reason == "tool_calls"


@check
def a_schema():
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": weather}}
    said = ours.chat.completions.create(**{**ask, "max_tokens": 80}, response_format=form).choices[0].message.content
    assert set(json.loads(said)) == {"city"}, said


@check
def errors_have_their_kinds():
    fails(openai.NotFoundError, lambda: ours.chat.completions.create(**{**ask, "model": "gpt-4"}), "gpt-4")
    fails(openai.BadRequestError, lambda: ours.chat.completions.create(**ask, extra_body={"odd": 1}), "odd")
    long = {**ask, "messages": [{"role": "user", "content": "word " * 20000}]}
    error = fails(openai.BadRequestError, lambda: ours.chat.completions.create(**long))
    assert error.code == "context_length_exceeded" and "maximum context length" in error.message
    fails(openai.NotFoundError, lambda: ours.embeddings.create(model=model, input="x"))
    slow = ours.with_options(timeout=0.05)
    fails(openai.APITimeoutError, lambda: slow.chat.completions.create(**{**ask, "max_tokens": 500}, extra_body={"ignore_eos": True}))
    assert ours.chat.completions.create(**ask).choices


@check
def responses():
    said = ours.responses.create(model=model, input="Name three colours.", temperature=0, max_output_tokens=24)
    assert said.output_text == ours.chat.completions.create(**ask).choices[0].message.content
    with ours.responses.stream(model=model, input="Name three colours.", temperature=0, max_output_tokens=24) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == said.output_text == events[-1].response.output_text
    assert events[-1].type == f"response.{said.status}", events[-1].type


@check
def anthropics_messages():
    own = {"model": model, "max_tokens": 24, "messages": ask["messages"], "extra_body": {"temperature": 0}}
    whole = theirs.messages.create(**own)
    assert whole.content[0].text == ours.chat.completions.create(**ask).choices[0].message.content
    with theirs.messages.stream(**own) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    counted = theirs.messages.count_tokens(model=model, messages=ask["messages"]).input_tokens
    assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    tool = {"name": "get_weather", "input_schema": weather}
    called = theirs.messages.create(**{**own, "max_tokens": 80}, tools=[tool], tool_choice={"type": "any"})
    assert called.stop_reason == "tool_use" and isinstance(called.content[0].input["city"], str)
    fails(anthropic.NotFoundError, lambda: theirs.messages.create(**{**own, "model": "claude"}), "claude")
    long = [{"role": "user", "content": "word " * 20000}]
    fails(anthropic.BadRequestError, lambda: theirs.messages.create(**{**own, "messages": long}), "context_length_exceeded")


for function in checks:
    function()
    print(f"ok {function.__name__}", flush=True)
print(f"{len(checks)} passed with openai {openai.__version__} and anthropic {anthropic.__version__}")
