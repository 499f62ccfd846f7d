"""Random requests for a running server, with nothing but Python: fuzz.py URL SECONDS [SEED].

Requests that are right (conversations, tools, schemas, grammars, prompts of every form, all three protocols) are changed
in their JSON and in their bytes. Whatever comes, the server answers with a status that fits and, where it refuses, with
one line of OpenAI's or Anthropic's form; none is its own failure, none takes long, and at the end it answers as it did at
the beginning. Prints JSON; what it stumbles over is printed before."""

import collections
import copy
import http.client
import json
import random
import sys
import threading
import time
from urllib.parse import urlparse

url, seconds, seed = urlparse(sys.argv[1]), float(sys.argv[2]), int((sys.argv[3:] or [0])[0])
CLIENTS = 8
# Short answers: what is tried is how requests are read.
SHORT = {"max_tokens": 2, "temperature": 0}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}, "b": {"enum": [1, None, "x"]},
          "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 2}, "e": {"anyOf": [{"type": "null"}, {"const": 1}]}},
          "$defs": {"d": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"], "additionalProperties": False}
SMALL = {"type": "object", "properties": {"a": {}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SMALL}}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": \"b\"}"}}]}
USER = {"role": "user", "content": "hello"}
CHAT = {**SHORT, "messages": [USER]}
SEEDS = [
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "stop": ["a", "b"], "n": 2}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1.5}, "seed": 1, "top_k": 3,
                              "min_p": 0.1, "presence_penalty": 0.5, "chat_template_kwargs": {"enable_thinking": False}}),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "system", "content": [{"type": "text", "text": "s"}]}, USER, CALL,
                              {"role": "tool", "tool_call_id": "1", "content": "2"}], "tools": [TOOL], "tool_choice": "auto"}),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}),
    ("/v1/completions", {**SHORT, "prompt": ["a", "b"], "echo": True, "logprobs": 1, "n": 2, "best_of": 2}),
    ("/v1/completions", {**SHORT, "prompt": [[1, 2], [3]], "stop_token_ids": [4], "ignore_eos": True, "min_tokens": 1}),
    ("/v1/completions", {**SHORT, "prompt": "a", "structured_outputs": {"regex": "[ab]{1,3}(c|d)*"}}),
    ("/v1/completions", {**SHORT, "prompt": "a", "guided_choice": ["x", "yy"], "repetition_penalty": 1.1}),
    ("/v1/completions", {**SHORT, "prompt": "a", "grammar": "start: \"a\" b+\nb: /[0-9]/"}),
    ("/tokenize", {"messages": [USER, CALL], "tools": [TOOL]}),
    ("/tokenize", {"prompt": "a", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/v1/messages", {"max_tokens": 2, "system": "s", "messages": [USER, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "1", "name": "f", "input": {"a": "b"}}]}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": "2"}]}],
        "tools": [{"name": "f", "input_schema": SMALL}], "tool_choice": {"type": "auto"}, "stream": True}),
    ("/v1/messages/count_tokens", {"messages": [USER], "thinking": {"type": "disabled"}}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}], "max_output_tokens": 2,
                       "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, "store": False}),
]
WORDS = ["", "a", "user", "\u0000", "\ud83d\ude00", "é" * 40, "<|im_start|>", "</s>", "{{ 1 / 0 }}", "[TOOL_CALLS]", "*" * 300,
         "(" * 60, "(a*)*" * 9, "[^", "start: start", "$ref", "#/$defs/d", "pattern", "type", "object", "\\", "\"", "\n"]
NUMBERS = [0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -2**63, 10**30]


def anything(dice, depth=0):
    kind = dice.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return dice.choice(WORDS)
    if kind < 4:
        return dice.choice(NUMBERS)
    if kind < 6:
        return dice.choice([None, True, False])
    if kind == 6:
        return [anything(dice, depth + 1) for _ in range(dice.randrange(4))]
    if kind == 7:
        return {dice.choice(WORDS): anything(dice, depth + 1) for _ in range(dice.randrange(4))}
    deep = anything(dice, 3)
    for _ in range(dice.choice([5, 60, 200])):
        deep = {"items": deep} if dice.random() < 0.5 else [deep]
    return deep


def places(value, found):
    """Every object and list in a value."""
    if isinstance(value, (dict, list)):
        found.append(value)
        for child in value.values() if isinstance(value, dict) else value:
            places(child, found)
    return found


def changed(dice, body):
    body = copy.deepcopy(body)
    for _ in range(dice.choice([1, 1, 2, 4])):
        place = dice.choice(places(body, []))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        act = dice.randrange(6)
        if not keys or act == 0:
            if isinstance(place, dict):
                _, other = dice.choice(SEEDS)
                name = dice.choice(list(other) + WORDS)
                place[name] = copy.deepcopy(other.get(name, anything(dice)))
            else:
                place.append(anything(dice))
            continue
        key = dice.choice(keys)
        if act == 1:
            del place[key]
        elif act == 2 and isinstance(place, dict):
            place[dice.choice(WORDS + ["minimum", "maxItems", "allOf", "not", "patternProperties", "format"])] = place.pop(key)
        elif act == 3 and isinstance(place, list):
            place.extend(copy.deepcopy(place[key]) for _ in range(dice.choice([1, 20, 400])))
        elif act == 4:
            donor = dice.choice(places(dice.choice(SEEDS)[1], []))
            place[key] = copy.deepcopy(donor)
        else:
            place[key] = anything(dice)
    return body


def spoiled(dice, data):
    data = bytearray(data)
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(data) or 1)
        act = dice.randrange(4)
        if act == 0 and data:
            data[at] ^= 1 << dice.randrange(8)
        elif act == 1:
            del data[at:at + dice.randrange(1, 20)]
        elif act == 2:
            data[at:at] = data[:dice.randrange(1, 40)]
        else:
            data[at:at] = dice.choice([b"\x00", b"\xff", b"\\ud800", b"{", b"]", b"1e999", b"NaN", b"," * 9, b"[" * 500])
    return bytes(data)


def ask(path, data):
    """Status, type and body of the answer, and how long it took."""
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=120)
    started = time.monotonic()
    connection.request("POST", path, data, {"content-type": "application/json"})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.getheader("content-type", ""), body, time.monotonic() - started


def wrong(status, kind, body):
    """What is not as it should be of an answer."""
    if status == 200:
        if kind.startswith("text/event-stream"):
            # A text that fails in the making is an error that was not seen when the request was read.
            return b'"error"' in body and "a stream with an error"
        json.loads(body)
        return None
    if status not in (400, 404, 413, 415, 429):
        return f"status {status}"
    message = json.loads(body)["error"]["message"]
    if not message or "\n" in message or "panic" in message or len(message) > 2000:
        return f"the message {message!r}"
    return None


def client(number, ends, seen):
    """Asks until the time is over; what it sees goes into `seen`."""
    dice = random.Random(f"{seed} {number}")
    while time.monotonic() < ends and len(seen["found"]) < 20:
        path, body = dice.choice(SEEDS)
        data = json.dumps(changed(dice, body)).encode()
        if dice.random() < 0.25:
            data = spoiled(dice, data)
        if dice.random() < 0.05:
            path = dice.choice(SEEDS)[0]
        try:
            status, kind, answer, took = ask(path, data)
            fault = wrong(status, kind, answer) or (took > 60 and f"{took:.0f} s")
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            fault, status, answer, took = repr(error), None, b"", 0
        with seen["lock"]:
            seen["statuses"][status] += 1
            seen["slowest"] = max(seen["slowest"], took)
            if fault:
                seen["found"].append(fault)
                print("FOUND", fault, path, data[:3000], answer[:600], flush=True)


def right():
    """What right requests are answered with."""
    return [ask(path, json.dumps(body).encode())[0] for path, body in SEEDS]


first = right()
print("right requests are answered with", first, flush=True)
seen = {"statuses": collections.Counter(), "found": [], "slowest": 0.0, "lock": threading.Lock()}
ends = time.monotonic() + seconds
threads = [threading.Thread(target=client, args=(number, ends, seen)) for number in range(CLIENTS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
again = right()
print(json.dumps({"seconds": seconds, "seed": seed, "requests": sum(seen["statuses"].values()), "statuses": seen["statuses"],
                  "slowest_s": round(seen["slowest"], 2), "found": len(seen["found"]), "answers_as_before": again == first}))
sys.exit(bool(seen["found"]) or again != first)
