"""`model.gguf` of a model of every family, by the PyPI package `gguf`: the weights of `model.safetensors`, with the
architecture's name, tensors' names and keys that llama.cpp's converter writes, and a tokenizer of `../tokenizers`.

    python tests/data/models/make_gguf.py [NAME...]        # gguf 0.19, torch 2.15, safetensors

Matrices are F16, vectors F32. README.md says what llama.cpp makes of the files (`check_gguf.mjs`).
"""

import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from published import MODELS
from safetensors.torch import load_file

HERE = Path(__file__).parent
DATA = HERE.parent
TOKEN, SCALING = gguf.TokenType, gguf.RopeScalingType

# For each model: the architecture's name, the tokenizer, its `tokenizer.ggml.pre`, the chat template.
FILES = {
    "qwen3": ("qwen3", "qwen", "qwen2", "qwen3"),
    "qwen2.5-yarn": ("qwen2", "qwen", "qwen2", "qwen2.5"),
    "llama-3-yarn": ("llama", "llama-3", "llama-bpe", "llama-3"),
    "mistral-small-3.1": ("mistral3", "tekken", "tekken", "mistral-small-3.1"),
    "ministral-3": ("mistral3", "tekken", "tekken", "mistral-small-3.1"),
    "phi-4": ("phi3", "phi-4", "dbrx", "phi-4"),
    "phi-4-mini": ("phi3", "phi-4-mini", "gpt-4o", "phi-4-mini"),
    "phi-3-mini-128k": ("phi3", "phi-3", "default", "phi-3-mini-4k"),
    "smollm3": ("smollm3", "smollm3", "smaug-bpe", "smollm3"),
    "gemma-2": ("gemma2", "gemma", "default", "gemma-2"),
    "gemma-3-1b": ("gemma3", "gemma", "default", "gemma-3"),
    "gemma-3-4b": ("gemma3", "gemma", "default", "gemma-3"),
    "olmo-2": ("olmo2", "olmo", "dbrx", "olmo-2"),
    "olmo-3": ("olmo2", "olmo", "dbrx", "olmo-3"),
    "granite-3.3": ("granite", "granite", "refact", "granite-3.3"),
    "glm-4-9b": ("glm4", "glm-4", "glm4", "glm-4"),
}
# BOS, EOS and end of turn, by the tokenizer; what the file says of BOS before a text.
SPECIAL = {
    "qwen": ("<|endoftext|>", "<|im_end|>", None, False),
    "llama-3": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", None),
    "tekken": ("<s>", "</s>", None, True), "phi-4": ("<|endoftext|>", "<|im_end|>", None, None),
    "phi-4-mini": ("<|endoftext|>", "<|endoftext|>", None, None), "phi-3": ("<s>", "<|endoftext|>", None, False),
    "smollm3": (None, "<|im_end|>", None, False), "gemma": ("<bos>", "<eos>", "<end_of_turn>", True),
    "olmo": ("<|endoftext|>", "<|endoftext|>", None, None),
    "granite": ("<|end_of_text|>", "<|end_of_text|>", None, False),
    "glm-4": ("<|endoftext|>", "<|endoftext|>", "<|user|>", None),
}
# Rotated in pairs of neighbours by llama.cpp, so that rows are reordered; GLM-4's pairs are neighbours as published.
NEIGHBOURS = ("llama", "mistral3", "smollm3", "granite")
NAMES = [
    ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
    ("self_attn.qkv_proj", "attn_qkv"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"), ("mlp.gate_up_proj", "ffn_up"), ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"),
    ("post_self_attn_layernorm", "post_attention_norm"), ("post_mlp_layernorm", "post_ffw_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"), ("post_feedforward_layernorm", "post_ffw_norm"),
    ("post_attention_layernorm", "ffn_norm"),
]
# Where the norm of that name is after attention, not before the feed-forward part.
AFTER_ATTENTION = ("gemma2", "gemma3", "olmo2")


def tensor_name(key, arch):
    key = key.replace("model.language_model.", "model.").replace("language_model.", "")
    module, kind = key.rsplit(".", 1)
    layer = module.split(".")[2] if ".layers." in module else None
    name = next(name for found, name in NAMES if module.endswith(found))
    if arch in AFTER_ATTENTION and module.endswith(".post_attention_layernorm"):
        name = "post_attention_norm"
    return f"blk.{layer}.{name}.{kind}" if layer else f"{name}.{kind}"


def neighbours(rows, heads):
    """Channel i of each head and channel i + head_dim / 2 become neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def write_tensors(out, arch, directory, text):
    for key, tensor in sorted(load_file(directory / "model.safetensors").items()):
        if "vision_tower" in key or "multi_modal_projector" in key:
            continue
        name = tensor_name(key, arch)
        if arch in NEIGHBOURS and ".attn_q." in name:
            tensor = neighbours(tensor, text["num_attention_heads"])
        if arch in NEIGHBOURS and ".attn_k." in name:
            tensor = neighbours(tensor, text["num_key_value_heads"])
        if arch.startswith("gemma") and "norm" in name:
            tensor = tensor.float() + 1
        if tensor.ndim == 1:
            out.add_tensor(name, tensor.float().numpy())
        else:
            assert torch.equal(tensor.half().float(), tensor.float()), name
            out.add_tensor(name, tensor.half().numpy())
    rope = text.get("rope_scaling") or {}
    if "long_factor" in rope:
        out.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        out.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


def write_rope(out, arch, text, written):
    """`written`: the configuration as transformers 5 writes it, with every field."""
    rope = written["rope_parameters"]
    out.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch == "gemma3":
        out.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] == "linear":
        out.add_rope_scaling_type(SCALING.LINEAR)
        out.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        out.add_rope_scaling_type(SCALING.YARN)
        out.add_rope_scaling_factor(rope["factor"])
        out.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for field, add in [
            ("attention_factor", out.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", out.add_rope_scaling_yarn_beta_fast), ("beta_slow", out.add_rope_scaling_yarn_beta_slow),
            ("mscale_all_dim", out.add_rope_scaling_yarn_log_mul),
            ("llama_4_scaling_beta", out.add_attn_temperature_scale),
        ]:
            if rope.get(field) is not None:
                add(rope[field])
    if arch == "phi3":
        original = text["original_max_position_embeddings"]
        out.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            scale = text["max_position_embeddings"] / original
            out.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def write_configuration(out, arch, text, written):
    heads = text["num_attention_heads"]
    head_dim = written.get("head_dim") or text["hidden_size"] // heads
    out.add_vocab_size(text["vocab_size"])
    out.add_context_length(text["max_position_embeddings"])
    out.add_embedding_length(text["hidden_size"])
    out.add_block_count(text["num_hidden_layers"])
    out.add_feed_forward_length(text["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(text["num_key_value_heads"])
    out.add_layer_norm_rms_eps(written["rms_norm_eps"])
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if "head_dim" in written:
        out.add_key_length(head_dim)
        out.add_value_length(head_dim)
    if arch in (*NEIGHBOURS, "phi3", "glm4"):
        out.add_rope_dimension_count(int(head_dim * text.get("partial_rotary_factor", 1.0)))
    write_rope(out, arch, text, written)
    if arch == "phi3":
        out.add_sliding_window(text["sliding_window"] or 0)
    if arch.startswith("gemma") or written["model_type"] == "olmo3":
        out.add_sliding_window(written["sliding_window"])
    if written["model_type"] == "olmo3":
        out.add_sliding_window_pattern([kind == "sliding_attention" for kind in written["layer_types"]])
    if arch == "gemma2":
        out.add_attn_logit_softcapping(text["attn_logit_softcapping"])
        out.add_final_logit_softcapping(text["final_logit_softcapping"])
    if arch == "granite":
        out.add_attention_scale(text["attention_multiplier"])
        out.add_embedding_scale(text["embedding_multiplier"])
        out.add_residual_scale(text["residual_multiplier"])
        out.add_logit_scale(text["logits_scaling"])


def write_tokenizer(out, name, pre, template, vocab_size):
    parsed = json.loads((DATA / "tokenizers" / f"{name}.json").read_text())
    model, added = parsed["model"], {token["id"]: token for token in parsed["added_tokens"]}
    ids = {text: id for text, id in model["vocab"].items()}
    tokens = {id: text for text, id in ids.items()}
    kinds = [TOKEN.NORMAL] * vocab_size
    for id in range(vocab_size):
        if id in added:
            kinds[id] = TOKEN.CONTROL if added[id]["special"] else TOKEN.USER_DEFINED
            kinds[id] = TOKEN.UNKNOWN if tokens[id] == "<unk>" else kinds[id]
        elif id not in tokens:
            tokens[id], kinds[id] = f"[PAD{id}]", TOKEN.UNUSED
        elif model["byte_fallback"] and tokens[id].startswith("<0x"):
            kinds[id] = TOKEN.BYTE
    out.add_tokenizer_model("llama" if model["byte_fallback"] else "gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list([tokens[id] for id in range(vocab_size)])
    out.add_token_types(kinds)
    if model["byte_fallback"]:
        first = min(id for id in tokens if kinds[id] == TOKEN.NORMAL)
        out.add_token_scores([float(first - id) if kinds[id] == TOKEN.NORMAL else -1000.0 for id in range(vocab_size)])
    else:
        out.add_token_merges([" ".join(merge) for merge in model["merges"]])
    if name == "gemma":
        out.add_add_space_prefix(False)
    bos, eos, eot, adds = SPECIAL[name]
    for text, add in [(bos, out.add_bos_token_id), (eos, out.add_eos_token_id), (eot, out.add_eot_token_id)]:
        if text:
            add(ids[text])
    if "<unk>" in ids:
        out.add_unk_token_id(ids["<unk>"])
    if adds is not None:
        out.add_add_bos_token(adds)
    out.add_chat_template((DATA / "chat" / f"{template}.jinja").read_text())


def main():
    for name, (arch, tokenizer, pre, template) in FILES.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        published, directory = MODELS[name], HERE / name
        text = published.get("text_config", published)
        written = json.loads((directory / "config.json").read_text())
        out = gguf.GGUFWriter(directory / "model.gguf", arch)
        out.add_name(name)
        write_configuration(out, arch, text, written.get("text_config", written))
        write_tokenizer(out, tokenizer, pre, template, text["vocab_size"])
        write_tensors(out, arch, directory, text)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        print(name, arch, (directory / "model.gguf").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
