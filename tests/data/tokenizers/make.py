"""Small tokenizers of every family's kind, trained on `botchan.txt`, and what transformers makes of texts and chats.

    python tests/data/tokenizers/make.py        # transformers 5.24, tokenizers 0.23

`NAME.json` is a `tokenizer.json` with the steps, special tokens and order of ids of the family's published one, of 296
tokens and some special ones. `known.json` has for each the ids of `TEXTS`, and for each chat template of the family
(`../chat`) the ids of every conversation of `../chat/renderings.json` as `apply_chat_template` gives them.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
CHAT = HERE.parent / "chat"
LEARNED = 40

# How words are cut: tiktoken's cl100k with so many digits together, its o200k, and Mistral's.
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
CL100K += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CAMEL = rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+ENDS|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*ENDS|\p{{N}}DIGITS"
CAMEL += r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = CAMEL.replace("ENDS", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", "{1,3}")
TEKKEN = CAMEL.replace("ENDS", "").replace("DIGITS", "")


def byte_level(words, specials, normalizer=None, ignore_merges=False, bos=None, first=False):
    """Byte-level BPE. `words`: a regex, or the digits of GPT-2's way; `first`: special tokens have the lowest ids."""
    cut = [pre_tokenizers.Split(Regex(words), "isolated")] if words else [pre_tokenizers.Digits(individual_digits=True)]
    steps = pre_tokenizers.Sequence([*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)])
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = steps
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + LEARNED, initial_alphabet=alphabet, show_progress=False)
    learned.train([str(HERE.parent / "botchan.txt")], trainer)
    model = json.loads(learned.to_str())["model"]
    before = len(specials) if first else 0
    vocab = {token: id + before for token, id in model["vocab"].items()}
    vocab |= {text.removeprefix("!"): at + (0 if first else 256 + LEARNED) for at, text in enumerate(specials)}
    model = models.BPE(vocab, [tuple(merge) for merge in model["merges"]], ignore_merges=ignore_merges)
    return finish(model, specials, normalizer, steps, decoders.ByteLevel(), bos)


def pieces(specials, prefix, bos=None, behind=(), keep_space=None):
    """SentencePiece's BPE with bytes to fall back on: special tokens, bytes, pieces by rank, the tokens `behind`.
    `prefix`: a text gets a space before it. Special tokens that are not in `keep_space` take white space along."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bytes_at = len(specials)
    size = (300 if behind else 320) - bytes_at - 256
    text = (HERE.parent / "botchan.txt").read_text()
    text = "".join(c for c in text if c in "▁ \n" or "a" <= c <= "z")
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    learned.train_from_iterator([text.replace("\n", " ")], trainer)
    ranked = sorted(learned.get_vocab().items(), key=lambda item: (len(item[0]) == 1, item[1]))
    vocab = {token: id for id, token in enumerate(specials)}
    vocab |= {f"<0x{byte:02X}>": bytes_at + byte for byte in range(256)}
    rank = {token: bytes_at + 256 + at for at, (token, _) in enumerate(ranked)}
    vocab |= rank
    merges = []
    for token in rank:
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        found = [half for half in halves if half[0] in rank and half[1] in rank]
        merges += sorted(found, key=lambda half: (rank[half[0]], rank[half[1]]))
    spaces = [normalizers.Replace(" ", "▁")]
    texts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
        texts.append(decoders.Strip(" ", 1, 0))
    vocab |= {text: 300 + at for at, text in enumerate(behind)}
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    strips = set() if keep_space is None else {*specials, *behind} - keep_space
    return finish(
        model, [*specials, *behind], normalizer=normalizers.Sequence(spaces), steps=None,
        decoder=decoders.Sequence(texts), bos=bos, strips=strips,
    )


def finish(model, specials, normalizer, steps, decoder, bos, strips=frozenset()):
    """`specials`: their texts; `!` before one that is found in a text as special tokens are, but is not one.
    `strips`: those that take the white space behind them along."""
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    if normalizer:
        tokenizer.normalizer = normalizer
    if steps:
        tokenizer.pre_tokenizer = steps
    parsed = json.loads(tokenizer.to_str())
    parsed["added_tokens"] = [
        dict(
            id=tokenizer.token_to_id(text.removeprefix("!")), content=text.removeprefix("!"), single_word=False,
            lstrip=False, rstrip=text in strips, normalized=False, special=not text.startswith("!"),
        )
        for text in specials
    ]
    tokenizer = Tokenizer.from_str(json.dumps(parsed))
    if bos:
        id = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, id)]
        )
    return tokenizer


def tokenizers():
    three, one = CL100K.replace("DIGITS", "{1,3}"), CL100K.replace("DIGITS", "")
    thoughts = ["!<think>", "!</think>"]
    return {
        "qwen": byte_level(
            one, ["<|endoftext|>", "<|im_end|>", "<|im_start|>", *thoughts], normalizer=normalizers.NFC()
        ),
        "llama-3": byte_level(
            three, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            ignore_merges=True, bos="<|begin_of_text|>",
        ),
        "tekken": byte_level(
            TEKKEN, [
                "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[SYSTEM_PROMPT]",
                "[/SYSTEM_PROMPT]",
            ],
            ignore_merges=True, bos="<s>", first=True,
        ),
        "phi-4": byte_level(three, ["<|endoftext|>", "<|dummy_85|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"]),
        "phi-4-mini": byte_level(O200K, ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]),
        "phi-3": pieces(
            ["<unk>", "<s>", "</s>"], True, keep_space={"<unk>", "<s>", "<|endoftext|>"},
            behind=["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
        ),
        "smollm3": byte_level(
            three, ["<|begin_of_text|>", "<|end_of_text|>", "<|im_end|>", "<|im_start|>", *thoughts], ignore_merges=True
        ),
        "gemma": pieces(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], False, "<bos>"),
        "olmo": byte_level(three, ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]),
        "granite": byte_level(None, ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"]),
        "glm-4": byte_level(
            three, ["<|endoftext|>", "<|assistant|>", "<|user|>", "<|observation|>", "[gMASK]", "<sop>", "<|system|>"]
        ),
    }


TEMPLATES = {
    "qwen": ["qwen2.5", "qwen3"], "llama-3": ["llama-3"], "tekken": ["mistral-small-3.1"], "phi-4": ["phi-4"],
    "phi-4-mini": ["phi-4-mini"], "phi-3": ["phi-3-mini-4k"], "smollm3": ["smollm3"], "gemma": ["gemma-2", "gemma-3"],
    "olmo": ["olmo-2", "olmo-3"], "granite": ["granite-3.3"], "glm-4": ["glm-4"],
}
TEXTS = [
    "the thing that he said", "a 1234567 12", "it's, IT'S and We'LL", "x !\n\n  y\t\r\n ", "HelloWorld HELLOWorld",
    "e\u0301é \U0001F600 日本", " !/\n/ a", "", " spaces  before and   behind ",
]


def main():
    renderings = json.loads((CHAT / "renderings.json").read_text())
    known = {"texts": TEXTS, "tokenizers": {}}
    for name, tokenizer in tokenizers().items():
        tokenizer.save(str(HERE / f"{name}.json"), pretty=False)
        chats = {}
        for template in TEMPLATES[name]:
            family = renderings["families"][template]
            fast = PreTrainedTokenizerFast(
                tokenizer_file=str(HERE / f"{name}.json"), bos_token=family["bos_token"] or None,
                eos_token=family["eos_token"], chat_template=(CHAT / f"{template}.jinja").read_text(),
            )
            chats[template] = []
            for conversation, texts in zip(renderings["conversations"], family["renderings"]):
                messages = [{"role": role, "content": content} for role, content in conversation]
                if texts[0] is None:
                    chats[template].append(None)
                    continue
                rendered = fast.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                assert rendered == texts[0], (template, rendered)
                ids = fast.apply_chat_template(messages, add_generation_prompt=True)
                chats[template].append(ids["input_ids"])
        ids = [tokenizer.encode(text).ids for text in TEXTS]
        known["tokenizers"][name] = {"ids": ids, "chats": chats}
        print(name, tokenizer.get_vocab_size(), [len(i) for i in ids])
    (HERE / "known.json").write_text(json.dumps(known, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
