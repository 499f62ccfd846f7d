"""The configurations of the tiny models, each as the `config.json` of the family's published models spells it, with
small sizes; lengths are small too, so that a text of 48 tokens passes every window and every original context.
"""

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

# These have one text, of 20 tokens, and a vocabulary that no tokenizer goes with.
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
        LLAMA, rope_theta=100000.0, hidden_size=24, num_attention_heads=3, num_key_value_heads=1,
        tie_word_embeddings=True, max_position_embeddings=128, rope_interleaved=False, is_llama_config=True,
    ),
}
SHORT_ONLY = list(MODELS)

# The other models have a long text too. Every in_features is a multiple of 32 and every out_features of 8, so that
# each can be quantized.
ORIGINAL = 24
FULL, SLIDING = "full_attention", "sliding_attention"


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def yarn(**more):
    return dict(factor=4.0, original_max_position_embeddings=ORIGINAL, **more)


COMMON = dict(
    COMMON, intermediate_size=64, vocab_size=320, attention_dropout=0.0, initializer_range=0.02, use_cache=True
)
QWEN3 = dict(
    COMMON, model_type="qwen3", architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=16,
    rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None, use_sliding_window=False,
    max_window_layers=2, max_position_embeddings=96, bos_token_id=296, eos_token_id=297,
)
PIXTRAL = dict(
    attention_dropout=0.0, head_dim=16, hidden_act="gelu", hidden_size=16, image_size=8, initializer_range=0.02,
    intermediate_size=16, model_type="pixtral", num_attention_heads=1, num_channels=3, num_hidden_layers=1,
    patch_size=4, rope_theta=10000.0,
)
MISTRAL3 = dict(
    architectures=["Mistral3ForConditionalGeneration"], model_type="mistral3", image_token_index=10,
    multimodal_projector_bias=False, projector_hidden_act="gelu", spatial_merge_size=2, vision_feature_layer=-1,
    torch_dtype="float16", vision_config=PIXTRAL,
)
MISTRAL_TEXT = dict(
    without(COMMON, "bos_token_id", "eos_token_id", "tie_word_embeddings", "torch_dtype"), head_dim=16,
    max_position_embeddings=96, model_type="mistral", rope_theta=1000000000.0, sliding_window=None,
)
# Its betas are published as 32 and 1; these ones put a ramp of three pairs on a head of 16.
MINISTRAL3_ROPE = dict(
    beta_fast=0.2, beta_slow=0.05, factor=8.0, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0,
    original_max_position_embeddings=16, rope_theta=1000000.0, rope_type="yarn", type="yarn",
)
PHI4 = dict(
    COMMON, model_type="phi3", architectures=["Phi3ForCausalLM"], attention_bias=False, embd_pdrop=0.0,
    resid_pdrop=0.0, num_attention_heads=2, num_key_value_heads=1, rope_theta=250000, rope_scaling=None,
    sliding_window=None, max_position_embeddings=64, original_max_position_embeddings=64, bos_token_id=296,
    eos_token_id=298, pad_token_id=297,
)
SMOLLM3 = dict(
    without(COMMON, "tie_word_embeddings"), model_type="smollm3", architectures=["SmolLM3ForCausalLM"],
    attention_bias=False, mlp_bias=False, intermediate_size=32, num_hidden_layers=4, layer_types=[FULL] * 4,
    max_position_embeddings=96, max_window_layers=28, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0],
    pretraining_tp=2, rms_norm_eps=1e-6,
    rope_scaling=None, rope_theta=5000000.0, sliding_window=None, use_sliding_window=False, bos_token_id=None,
    eos_token_id=298, pad_token_id=297,
)
GEMMA = dict(
    without(COMMON, "hidden_act", "tie_word_embeddings"), attention_bias=False, bos_token_id=2, eos_token_id=1,
    pad_token_id=0, cache_implementation="hybrid", hidden_activation="gelu_pytorch_tanh", head_dim=16,
    query_pre_attn_scalar=16, rms_norm_eps=1e-6, sliding_window=6, max_position_embeddings=96,
)
GEMMA2 = dict(
    GEMMA, model_type="gemma2", architectures=["Gemma2ForCausalLM"], hidden_act="gelu_pytorch_tanh",
    attn_logit_softcapping=4.0, final_logit_softcapping=6.0, rope_theta=10000.0, sliding_window_size=6,
)
GEMMA3 = dict(
    GEMMA, model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], attn_logit_softcapping=None,
    final_logit_softcapping=None, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
    num_hidden_layers=6, eos_token_id=[1, 5], rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000,
    sliding_window_pattern=6,
)
SIGLIP = dict(
    hidden_size=16, image_size=8, intermediate_size=16, model_type="siglip_vision_model", num_attention_heads=1,
    num_hidden_layers=1, patch_size=4, vision_use_head=False,
)
OLMO2 = dict(
    without(COMMON, "bos_token_id"), model_type="olmo2", architectures=["Olmo2ForCausalLM"], attention_bias=False,
    max_position_embeddings=96, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000, eos_token_id=296,
    pad_token_id=297,
)
GLM4 = dict(
    without(COMMON, "bos_token_id"), model_type="glm4", architectures=["Glm4ForCausalLM"], attention_bias=True,
    head_dim=16, max_position_embeddings=96, partial_rotary_factor=0.5, rope_theta=10000.0,
    eos_token_id=[296, 298, 299], pad_token_id=296,
)
MODELS |= {
    "qwen3": QWEN3,
    "qwen3-yarn": dict(
        QWEN3, rope_scaling=yarn(rope_type="yarn"), max_position_embeddings=ORIGINAL, tie_word_embeddings=True,
        vocab_size=64, bos_token_id=0, eos_token_id=1,
    ),
    "qwen3-window": dict(
        QWEN3, vocab_size=64, num_hidden_layers=3, use_sliding_window=True, sliding_window=6, max_window_layers=1,
        bos_token_id=0, eos_token_id=1,
    ),
    "qwen2.5-yarn": dict(
        QWEN2, intermediate_size=64, vocab_size=320, rope_scaling=yarn(type="yarn"), max_position_embeddings=ORIGINAL,
        bos_token_id=296, eos_token_id=297,
    ),
    "llama-3-yarn": dict(
        LLAMA, intermediate_size=64, vocab_size=320, rope_scaling=yarn(rope_type="yarn"),
        max_position_embeddings=96, bos_token_id=296, eos_token_id=[297, 300],
    ),
    "mistral-small-3.1": dict(MISTRAL3, text_config=MISTRAL_TEXT),
    "ministral-3": dict(
        MISTRAL3, dtype="float16", tie_word_embeddings=False, text_config=dict(
            without(MISTRAL_TEXT, "rope_theta"), model_type="ministral3", max_position_embeddings=128,
            rope_parameters=MINISTRAL3_ROPE,
        ),
    ),
    "phi-4": PHI4,
    "phi-4-mini": dict(
        PHI4, rope_theta=10000.0, partial_rotary_factor=0.75, tie_word_embeddings=True, full_attn_mod=1,
        bos_token_id=296, eos_token_id=296, pad_token_id=296,
        interpolate_factor=1, lm_head_bias=False, mlp_bias=False, sliding_window=262144, max_position_embeddings=128,
        original_max_position_embeddings=ORIGINAL, rope_scaling=dict(
            type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 2.0], long_factor=[1.0, 1.25, 1.75, 2.5, 4.0, 5.0],
        ),
    ),
    "phi-3-mini-128k": dict(
        PHI4, rope_theta=10000.0, num_key_value_heads=2, sliding_window=262144, max_position_embeddings=128,
        original_max_position_embeddings=ORIGINAL, bos_token_id=1, eos_token_id=300, pad_token_id=300,
        rope_scaling=dict(
            type="su", short_factor=[1.05, 1.1, 1.15, 1.25, 1.5, 1.75, 2.0, 2.25],
            long_factor=[1.1, 1.4, 1.9, 2.6, 3.5, 4.2, 5.0, 5.5],
        ),
    ),
    "smollm3": SMOLLM3,
    "smollm3-uneven": dict(
        SMOLLM3, vocab_size=64, num_hidden_layers=3, layer_types=[FULL] * 3, no_rope_layers=[1, 0, 1],
        tie_word_embeddings=False, eos_token_id=1, pad_token_id=0,
    ),
    "gemma-2": GEMMA2,
    "gemma-2-27b": dict(GEMMA2, vocab_size=64, query_pre_attn_scalar=8),
    "gemma-3-1b": GEMMA3,
    "gemma-3-4b": dict(
        architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", boi_token_index=310, eoi_token_index=311,
        eos_token_id=[1, 5], image_token_index=312, initializer_range=0.02, mm_tokens_per_image=4,
        torch_dtype="bfloat16", vision_config=SIGLIP, text_config=dict(
            hidden_size=32, intermediate_size=32, model_type="gemma3_text", num_hidden_layers=6, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, vocab_size=320, sliding_window=6,
            rope_scaling=dict(factor=8.0, rope_type="linear"), max_position_embeddings=96,
        ),
    ),
    "gemma-3-27b": dict(
        GEMMA3, vocab_size=64, num_hidden_layers=3, sliding_window_pattern=2, query_pre_attn_scalar=32,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
    ),
    "olmo-2": OLMO2,
    "olmo-3": dict(
        OLMO2, model_type="olmo3", architectures=["Olmo3ForCausalLM"], dtype="float16", intermediate_size=32,
        num_hidden_layers=4, num_key_value_heads=4, layer_types=[SLIDING] * 3 + [FULL], sliding_window=6,
        rope_scaling=yarn(rope_type="yarn", attention_factor=1.138629436111989, beta_fast=32.0, beta_slow=1.0),
    ),
    "granite-3.3": dict(
        COMMON, model_type="granite", architectures=["GraniteForCausalLM"], attention_bias=False, mlp_bias=False,
        attention_multiplier=0.25, embedding_multiplier=12.0, logits_scaling=16.0, residual_multiplier=0.22,
        max_position_embeddings=96, rope_scaling=None, rope_theta=10000000.0, tie_word_embeddings=True,
        bos_token_id=296, eos_token_id=296, pad_token_id=296,
    ),
    "glm-4-9b": GLM4,
    "glm-4-32b": dict(
        GLM4, vocab_size=64, attention_bias=False, num_attention_heads=6, num_key_value_heads=2, eos_token_id=[1, 2, 3],
        pad_token_id=1,
    ),
}

# What must not be overlooked: with these fields of the configuration changed, logits are others.
OVERLOOKED = [
    ("llama-3", dict(rope_theta=10000.0)), ("llama-3.1", dict(rope_scaling=None)),
    ("llama-3.2", dict(rope_scaling=None)), ("llama-biased", dict(rms_norm_eps=0.1)),
    ("mistral-7b-v0.1", dict(sliding_window=None)), ("mistral-7b-v0.3", dict(sliding_window=6)),
    ("phi-3-mini-4k", dict(sliding_window=None)), ("phi-3-medium-4k", dict(sliding_window=6)),
    ("qwen2.5", dict(use_sliding_window=True, max_window_layers=0)),
    ("qwen2.5-tied-window", dict(use_sliding_window=False)), ("smollm2", dict(rope_theta=10000.0)),
    ("qwen3", dict(rope_theta=10000.0)),
    ("qwen3-yarn", dict(rope_scaling=None, max_position_embeddings=96)),
    ("qwen3-window", dict(use_sliding_window=False)), ("qwen3-window", dict(max_window_layers=0)),
    ("qwen2.5-yarn", dict(rope_scaling=None, max_position_embeddings=96)),
    ("llama-3-yarn", dict(rope_scaling=None)),
    ("llama-3-yarn", dict(rope_scaling=yarn(rope_type="yarn", attention_factor=1.0))),
    ("mistral-small-3.1", dict(rope_theta=10000.0)),
    ("ministral-3", dict(rope_parameters=dict(MINISTRAL3_ROPE, llama_4_scaling_beta=0.0))),
    ("ministral-3", dict(rope_parameters=without(MINISTRAL3_ROPE, "mscale"))),
    ("ministral-3", dict(rope_parameters=without(MINISTRAL3_ROPE, "beta_fast"))),
    ("ministral-3", dict(rope_parameters=without(MINISTRAL3_ROPE, "beta_slow"))),
    ("phi-4", dict(rope_theta=10000.0)), ("phi-4-mini", dict(rope_scaling=None)),
    ("phi-4-mini", dict(max_position_embeddings=48)),
    ("phi-3-mini-128k", dict(rope_scaling=None)), ("phi-3-mini-128k", dict(max_position_embeddings=48)),
    ("smollm3", dict(no_rope_layers=[1, 1, 1, 1])), ("smollm3-uneven", dict(no_rope_layers=None)),
    ("gemma-2", dict(attn_logit_softcapping=None)), ("gemma-2", dict(final_logit_softcapping=None)),
    ("gemma-2", dict(layer_types=[FULL] * 2)), ("gemma-2", dict(layer_types=[SLIDING] * 2)),
    ("gemma-2", dict(layer_types=[FULL, SLIDING])), ("gemma-2", dict(hidden_activation="silu")),
    ("gemma-2-27b", dict(query_pre_attn_scalar=16)),
    ("gemma-3-1b", dict(rope_local_base_freq=1000000)), ("gemma-3-1b", dict(rope_theta=10000)),
    ("gemma-3-1b", dict(layer_types=[FULL] * 6)), ("gemma-3-1b", dict(sliding_window_pattern=7)),
    ("gemma-3-1b", dict(sliding_window=7)), ("gemma-3-4b", dict(rope_scaling=None)),
    ("gemma-3-4b", dict(layer_types=[FULL] * 6)), ("gemma-3-27b", dict(query_pre_attn_scalar=16)),
    ("gemma-3-27b", dict(sliding_window_pattern=6)),
    ("olmo-2", dict(rope_theta=10000.0)), ("olmo-3", dict(rope_scaling=None)), ("olmo-3", dict(sliding_window=7)),
    ("olmo-3", dict(layer_types=[FULL] * 4)), ("granite-3.3", dict(attention_multiplier=0.125)),
    ("granite-3.3", dict(embedding_multiplier=1.0)), ("granite-3.3", dict(residual_multiplier=1.0)),
    ("granite-3.3", dict(logits_scaling=1.0)), ("glm-4-9b", dict(partial_rotary_factor=1.0)),
    ("glm-4-32b", dict(partial_rotary_factor=1.0)),
]

# What no field turns off: with the tensors of this name all set to this number, logits are others.
FLATTENED = [
    ("qwen3", "q_norm", 1), ("qwen3", "k_norm", 1), ("qwen2.5-yarn", "q_proj.bias", 0),
    ("qwen2.5-yarn", "k_proj.bias", 0),
    ("gemma-2", "pre_feedforward_layernorm", 0),
    ("gemma-2", "post_feedforward_layernorm", 0), ("gemma-2", "post_attention_layernorm", 0),
    ("gemma-3-1b", "q_norm", 0), ("gemma-3-1b", "k_norm", 0), ("gemma-3-1b", "post_feedforward_layernorm", 0),
    ("gemma-3-1b", "input_layernorm", 0),
    ("olmo-2", "q_norm", 1), ("olmo-2", "k_norm", 1), ("olmo-2", "post_attention_layernorm", 1),
    ("olmo-2", "post_feedforward_layernorm", 1), ("olmo-3", "k_norm", 1), ("glm-4-9b", "post_self_attn_layernorm", 1),
    ("glm-4-9b", "post_mlp_layernorm", 1), ("glm-4-9b", "q_proj.bias", 0), ("glm-4-9b", "v_proj.bias", 0),
]
