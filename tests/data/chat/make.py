"""Renders conversations with each family's chat template by transformers (Jinja2) into `renderings.json`, and what
templates may use of Python and of transformers, one feature each, into `features.json`.

    python tests/data/chat/make.py [ORIGINALS]      # transformers 5.24

The templates here are our own writing of each family's format, those of Mistral Small, SmolLM3, OLMo 3 and Granite
without the published default system messages and dates. `ORIGINALS` is a directory with published templates under the
same names: each must render every conversation as ours does, or refuse it where ours does.
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
    "qwen3": ("", "<|im_end|>"), "mistral-small-3.1": ("<s>", "</s>"), "phi-4": ("<|endoftext|>", "<|im_end|>"),
    "phi-4-mini": ("<|endoftext|>", "<|endoftext|>"), "smollm3": ("", "<|im_end|>"), "gemma-2": ("<bos>", "<eos>"),
    "gemma-3": ("<bos>", "<eos>"), "olmo-2": ("<|endoftext|>", "<|endoftext|>"), "olmo-3": ("", "<|endoftext|>"),
    "granite-3.3": ("<|end_of_text|>", "<|end_of_text|>"), "glm-4": ("", "<|endoftext|>"),
}

# What a template may use. The conversation is the one below.
FEATURES = [
    # line endings
    "a\r\nb\rc\n{{ 'd\r\ne' }}\r\n", "{% if true %}\r\n  a\r\n  {% endif %}\r\nb\r\n\r\n", "{%- if true -%}\r  a\r{%- endif -%}\rb\r",
    # generation
    "{% for m in messages %}{% generation %}{{ m.role }}{{ loop.index }}{% endgeneration %}{% endfor %}",
    "a \n{%- generation -%}\n b \n{%- endgeneration -%}\n c", "a\n  {% generation %}\n  b\n  {% endgeneration %}\nc",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% raw %}{% generation %}{{ a ~ b % c }}{% endraw %}{# {% generation %} #}{{ '{% generation %}' }}",
    # tojson
    "{{ messages[0].content | tojson }}", "{{ messages[0] | tojson }}", "{{ messages | tojson(indent=2) }}",
    "{{ messages[0].content | tojson(ensure_ascii=True) }}", "{{ messages[0].content | tojson(ensure_ascii=False) }}",
    "{{ {'b': [1, 2.5, 1e20, 1e-7, true, none], 'a': {}, 'c': []} | tojson }}",
    "{{ {'b': [1, {}], 'a': {'x': 'y'}} | tojson(sort_keys=true, indent=4) }}", "{{ [1, 'a'] | tojson(separators=(',', ':')) }}",
    "{{ {'a': 1, 'b': 2} | tojson(separators=(',', ':'), indent=1) }}", "{{ {1: 2, none: 4, 1.5: 5, false: 6} | tojson }}",
    "{{ '\x08\x0c\x01\x7f\t\\\\/\"' | tojson }}", "{{ '\x7f\u00e9\U0001f600' | tojson(ensure_ascii=true) }}", "{{ [[], [[1]]] | tojson(indent='\t') }}",
    # methods of strings
    "{{ 'a.b.c'.rsplit('.', 1)[0] }}", "{{ 'a.b.c'.rsplit('.') }}", "{{ ' a  b c '.rsplit() }}", "{{ ' a  b c '.rsplit(None, 1) }}",
    "{{ 'a.b.c'.rsplit('.', maxsplit=1) }}", "{{ 'a.b.c'.split('.', maxsplit=1) }}", "{{ ' a  b c '.split(None, 1) }}", "{{ ''.split() }}{{ ''.split('x') }}",
    "{{ 'a-b-c'.partition('-') }}{{ 'a-b-c'.rpartition('-') }}{{ 'abc'.partition('-') }}{{ 'abc'.rpartition('-') }}",
    "{{ 'abc'.removeprefix('a').removesuffix('c') }}{{ 'abc'.removeprefix('x') }}", "{{ 'aBc'.swapcase() }}{{ 'ABC'.casefold() }}",
    "[{{ 'ab'.ljust(5) }}][{{ 'ab'.rjust(5, '.') }}][{{ 'ab'.center(5) }}][{{ 'abc'.center(6, '*') }}][{{ 'a'.center(4) }}][{{ '-7'.zfill(4) }}][{{ '7'.zfill(3) }}][{{ 'abcd'.zfill(3) }}][{{ ''.zfill(2) }}]",
    "{{ 'hello'.index('l') }}{{ 'hello'.rindex('l') }}{{ ['a', 'b'].index('b') }}",
    "{{ 'a,b'.split(',') | join('+') }}{{ '-'.join(['x', 'y']) }}{{ 'abc'.find('c') }}{{ 'x'.startswith(('x', 'y')) }}",
    "{{ messages[0].content.strip().split('<b>')[-1].lstrip('&').upper() }}",
    # % on strings and on numbers
    "{{ '%s-%d' % ('a', 3) }}", "{{ '%s' % 'x' }}|{{ '%d%%' % 7 }}|{{ '%5.2f' % 3.14159 }}|{{ '%-4s|' % 'a' }}|{{ '%04d' % 42 }}|{{ '%x' % 255 }}",
    "{{ '%(a)s %(b)d' % {'a': 'x', 'b': 2} }}", "{% set f = '%s:%s' %}{{ f % ('a', 'b') }}", "{{ ('%s' ~ '%s') % ('a', 'b') }}",
    "{% for i in range(5) %}{% if i % 2 == 0 %}{{ i }}{% endif %}{% endfor %}", "{{ 7 % 3 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 7.5 % 2 }} {{ 2 * 7 % 5 }} {{ 17 % 10 % 4 }} {{ 1 + 7 % 4 }} {{ 2 ** 3 % 5 }}",
    "{{ (loop is defined) != (3 % 2 == 1) }}", "{{ 'a' if 4 % 2 == 0 and 5 % 2 else 'b' }}", "{{ [1 % 2, 4 % 3] }}{{ {'a': 5 % 3}['a'] }}{{ 'abcdef'[5 % 4:] }}",
    # operators
    "{{ 'a' + 'b' * 3 ~ 1 ~ 'c' + 'd' }}", "{{ ('a' ~ none ~ true ~ 1.0) }}", "{{ [1] + [2, 3] }}{{ (1, 2) + (3,) }}{{ [0] * 3 }}", "{{ ('a' + 'b').upper() }}{{ ['x', 'y'][1] }}{{ {'k': 'v'}.k }}{{ (1, 2)[0] }}",
    "{{ 'ab' * 2 }}{{ 2 * 'ab' }}{{ 'ab' * 0 }}{{ 'a' * -1 }}{{ [1, 2] * 2 }}{{ (1,) * 2 }}{{ 3 * [0] * 2 }}{{ true * 3 }}{{ 2 * 1.5 }}{{ -2 * 3 + 1 }}{{ 2 * 3 ** 2 }}",
    "{{ 2 * 3 / 4 * 2 }}{{ 7 // 2 * 2 }}{{ ('a' * 3).upper() }}{{ 'a' * 3 | int }}{{ [2 * 2, 3 * loop_start | default(1)] }}",
    "{{ 1 + 2 - 3 * 4 / 5 // 1 ** 2 }}", "{{ -1 + 2 }}{{ 3 - -1 }}", "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.role ~ loop.index %}{% endfor %}{{ ns.x }}",
    "{% macro f(a, b='y' ~ 'z') %}[{{ a + b }}]{% endmacro %}{{ f('x') }}{{ f('x', b='w') }}{{ f(*['p', 'q']) }}{{ f(**{'a': 'r'}) }}",
    "{% for (k, v) in {'a': 1, 'b': 2}.items() %}{{ k ~ v }}{% endfor %}{% set (p, q) = (1, 2) %}{{ p + q }}{% set p, q = q, p %}{{ p }}",
    "{% macro m() %}<{{ caller('c') }}>{% endmacro %}{% call(x) m() %}{{ x + 'd' }}{% endcall %}",
    "{% set x = ['a', {'b': ['c']}, ('d', 'e')] %}{{ x }}{{ x[1].b[0] }}", "{{ 'x' in 'xy' ~ 'z' }}{{ not 1 + 1 == 3 }}{{ 1 + 1 is number }}",
    # functions
    "{% set j = joiner(', ') %}{% for m in messages %}{{ j() }}{{ m.role }}{% endfor %}", "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}",
    "{{ dict(a=1, b='x') }}{{ dict({'a': 1}, c=2) }}{{ range(3) | list }}", "{{ messages[0] }}",
    # special tokens
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token is defined }}{{ bos_token is defined }}{{ tools is none }}{{ documents is none }}",
    # filters and tests
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a b' | replace(' ', '_') | title }}",
    "{{ 'x\ny' | indent(2) }}{{ 'x\ny' | indent(2, true) }}{{ 'x\ny' | indent(width=3, first=true) }}", "{{ [3, 1, 2] | sort | first }}{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}",
    "{{ '%s %s' | format('a', 'b') }}{{ '{} {x}'.format('a', x='b') }}{{ [1, 1, 2] | unique | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1} | items | list }}",
    "{{ none | default('d') }}{{ missing | default('d') }}{{ '' | default('d', true) }}{{ 'abc' | last }}{{ 'a' | string }}{{ 3.7 | int }}{{ 'ab' | reverse }}{{ 2.5 | round }}",
]
FEATURES_CONVERSATION = [("system", "H\u00e9 <b>&\"it's\" \u65e5\u672c\nx "), ("user", "Why?")]


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


def feature(template):
    """What transformers makes of the conversation for a tokenizer that has BOS, EOS and unknown tokens."""
    messages = [{"role": role, "content": content} for role, content in FEATURES_CONVERSATION]
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (text,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **tokens)
    return text


def main():
    families = {}
    for name, tokens in TOKENS.items():
        def all_of(directory):
            template = (directory / f"{name}.jinja").read_text()
            return [[render(template, c, tokens, prompt) for prompt in (True, False)] for c in CONVERSATIONS]

        renderings = all_of(HERE)
        if len(sys.argv) > 1 and (Path(sys.argv[1]) / f"{name}.jinja").exists():
            assert all_of(Path(sys.argv[1])) == renderings, (name, all_of(Path(sys.argv[1])), renderings)
            print(name, "renders as the original does")
        families[name] = {"bos_token": tokens[0], "eos_token": tokens[1], "renderings": renderings}
    out = {"conversations": CONVERSATIONS, "families": families}
    (HERE / "renderings.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    features = [[template, feature(template)] for template in FEATURES]
    out = {"conversation": FEATURES_CONVERSATION, "features": features}
    (HERE / "features.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")


main()
