"""Renders conversations with each family's chat template by transformers (Jinja2) into `renderings.json`.

    python tests/data/chat/make.py [ORIGINALS]      # transformers 5.24

The templates here are our own writing of each family's format. `ORIGINALS` is a directory with the published
templates under the same names: each must render every conversation as ours does, or refuse it where ours does.
"""

import datetime
import json
import sys
from pathlib import Path

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent

CONVERSATIONS = [
    [("user", "  What is the capital of France? ")],
    [
        ("system", "You answer in one word.\n"), ("user", "2 + 2?"), ("assistant", " Four. "), ("user", "And <b>\"3 + 3\"</b>?"),
    ],
    [
        ("user", "Grüße, 東京 & 🙂\n\n- {{ one }}\n- {% two %}\n"), ("assistant", "\tIt's 'fine'.\n"), ("user", "Why?"),
        ("assistant", "Because."),
    ],
]

# Texts that start and end, as the family's tokenizer_config.json names them.
TOKENS = {
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>"), "llama-3.1": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.2": ("<|begin_of_text|>", "<|eot_id|>"), "mistral-7b-v0.2": ("<s>", "</s>"),
    "mistral-7b-v0.3": ("<s>", "</s>"), "phi-3-mini-4k": ("<s>", "<|endoftext|>"),
    "phi-3-medium-4k": ("<s>", "<|endoftext|>"), "qwen2.5": ("", "<|im_end|>"), "smollm2": ("<|im_start|>", "<|im_end|>"),
}


def render(template, conversation, tokens, prompt):
    """The text, today's date written as {date}; None where the template refuses the conversation."""
    messages = [{"role": role, "content": content} for role, content in conversation]
    try:
        (text,), _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=prompt, bos_token=tokens[0], eos_token=tokens[1]
        )
    except jinja2.exceptions.TemplateError:
        return None
    return text.replace(datetime.datetime.now().strftime("%d %b %Y"), "{date}")


def main():
    families = {}
    for name, tokens in TOKENS.items():
        def all_of(directory):
            template = (directory / f"{name}.jinja").read_text()
            return [[render(template, c, tokens, prompt) for prompt in (True, False)] for c in CONVERSATIONS]

        renderings = all_of(HERE)
        if len(sys.argv) > 1:
            assert all_of(Path(sys.argv[1])) == renderings, (name, all_of(Path(sys.argv[1])), renderings)
            print(name, "renders as the original does")
        families[name] = {"bos_token": tokens[0], "eos_token": tokens[1], "renderings": renderings}
    out = {"conversations": CONVERSATIONS, "families": families}
    (HERE / "renderings.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")


main()
