"""Tiny random checkpoints of every supported family and their logits, made by transformers (PyTorch on a CPU).

    python tests/data/models/make.py        # transformers 5.24, torch 2.15

Each directory holds `model.safetensors` (f16) and `config.json` as `save_pretrained` writes them, `published.json`,
the same configuration in the older spelling that the family's real `config.json` has, and `expected.safetensors`:
`ids` and, computed in f32 on the stored weights, `logits` of every position.

"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent

COMMON = dict(
    hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, hidden_act="silu", rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    torch_dtype="float16",
)
LLAMA = dict(
    COMMON, model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, mlp_bias=False,
    pretraining_tp=1, rope_theta=500000.0, rope_scaling=None, max_position_embeddings=400,
)


def llama3(factor):
    # Of the four frequencies of a head of 8, one is kept, one lies on the ramp, two are divided.
    return dict(
        rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=400,
    )


MISTRAL = dict(
    COMMON, model_type="mistral", architectures=["MistralForCausalLM"], rope_theta=10000.0, sliding_window=6,
    max_position_embeddings=128,
)
PHI3 = dict(
    COMMON, model_type="phi3", architectures=["Phi3ForCausalLM"], rope_theta=10000.0, rope_scaling=None,
    sliding_window=7, max_position_embeddings=128, original_max_position_embeddings=128, attention_bias=False,
    embd_pdrop=0.0, resid_pdrop=0.0, attention_dropout=0.0, pad_token_id=1,
)
QWEN2 = dict(
    COMMON, model_type="qwen2", architectures=["Qwen2ForCausalLM"], rope_theta=1000000.0, rms_norm_eps=1e-6,
    sliding_window=6, use_sliding_window=False, max_window_layers=2, max_position_embeddings=128,
    attention_dropout=0.0,
)

MODELS = {
    "llama-3": LLAMA,
    "llama-3.1": dict(LLAMA, rope_scaling=llama3(8.0), max_position_embeddings=3200, eos_token_id=[1, 2, 3]),
    "llama-3.2": dict(
        LLAMA, rope_scaling=llama3(32.0), max_position_embeddings=12800, tie_word_embeddings=True, head_dim=8
    ),
    "llama-biased": dict(LLAMA, attention_bias=True, mlp_bias=True),
    "mistral-7b-v0.1": MISTRAL,
    "mistral-7b-v0.3": dict(MISTRAL, sliding_window=None, rope_theta=1000000.0, head_dim=16),
    "phi-3-mini-4k": dict(PHI3, num_key_value_heads=4),
    "phi-3-medium-4k": PHI3,
    "qwen2.5": QWEN2,
    "qwen2.5-tied-window": dict(QWEN2, use_sliding_window=True, max_window_layers=0, tie_word_embeddings=True),
    "smollm2": dict(
        LLAMA, rope_theta=100000.0, hidden_size=24, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
        max_position_embeddings=128, rope_interleaved=False, is_llama_config=True,
    ),
}


def main():
    for seed, (name, published) in enumerate(MODELS.items()):
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(published))
        config = AutoConfig.from_pretrained(directory)
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").half()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                random = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * random if "norm" in key else 0.3 * random)
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        (directory / "published.json").write_text(json.dumps(published, indent=1) + "\n")

        stored = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        ids = torch.randint(0, config.vocab_size, (1, 20), generator=generator)
        with torch.no_grad():
            logits = stored(ids).logits[0].contiguous()
        save_file({"ids": ids[0].int(), "logits": logits}, directory / "expected.safetensors")
        print(name, sum(f.stat().st_size for f in directory.iterdir()), "bytes, largest logit", logits.abs().max().item())


main()
