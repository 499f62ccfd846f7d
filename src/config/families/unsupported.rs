//! Families that people run and the decoder does not: what each asks for that is missing.

const EXPERTS: &str = "mixture of experts";
const HYBRID: &str = "gated DeltaNet layers, gated attention";
const HYBRID_EXPERTS: &str = "gated DeltaNet layers, gated attention, mixture of experts";
const LATENT: &str = "latent attention, mixture of experts";
const GEMMA_4: &str =
    "a head_dim for each type of layer, shared keys and values, norms of values, per-layer embeddings";
const MAMBA: &str = "state space layers";

/// What `config.json` calls them, letters and digits only (a GGUF's name is the same or stands beside it), and what
/// they ask for.
const UNSUPPORTED: [(&str, &str); 48] = [
    ("bamba", MAMBA),
    ("bitnet", "ternary weights, norms inside attention and feed-forward"),
    ("cohere", "attention and feed-forward side by side, LayerNorm"),
    ("cohere2", "attention and feed-forward side by side, LayerNorm"),
    ("commandr", "attention and feed-forward side by side, LayerNorm"),
    ("deepseek2", LATENT),
    ("deepseekv2", LATENT),
    ("deepseekv3", LATENT),
    ("deepseekv32", "latent attention, sparse attention, mixture of experts"),
    ("deepseekv4", "latent attention, sparse attention, hyper-connections, mixture of experts"),
    ("falconh1", MAMBA),
    ("gemma3n", "per-layer embeddings, alternating updates, shared keys and values"),
    ("gemma3ntext", "per-layer embeddings, alternating updates, shared keys and values"),
    ("gemma4", GEMMA_4),
    ("gemma4text", GEMMA_4),
    ("glm4moe", EXPERTS),
    ("glm4moelite", LATENT),
    ("glm4v", "rotation by three positions"),
    ("gptoss", "mixture of experts, attention sinks"),
    ("granitehybrid", "state space layers, mixture of experts"),
    ("granitemoe", EXPERTS),
    ("granitemoehybrid", "state space layers, mixture of experts"),
    ("granitemoeshared", EXPERTS),
    ("jamba", "state space layers, mixture of experts"),
    ("kimik2", LATENT),
    ("kimilinear", "gated delta layers, latent attention, mixture of experts"),
    ("lfm2", "short convolutions"),
    ("lfm2moe", "short convolutions, mixture of experts"),
    ("llama4", "mixture of experts, chunked attention"),
    ("llama4text", "mixture of experts, chunked attention"),
    ("minimax", "linear attention, mixture of experts"),
    ("minimaxm2", EXPERTS),
    ("mistral4", LATENT),
    ("mixtral", EXPERTS),
    ("nemotronh", MAMBA),
    ("olmoe", EXPERTS),
    ("phimoe", "mixture of experts, LayerNorm"),
    ("qwen2moe", EXPERTS),
    ("qwen3moe", EXPERTS),
    ("qwen3next", HYBRID_EXPERTS),
    ("qwen3vl", "rotation by three positions, vision features in several layers"),
    ("qwen3vlmoe", "rotation by three positions, vision features in several layers, mixture of experts"),
    ("qwen35", HYBRID),
    ("qwen35moe", HYBRID_EXPERTS),
    ("qwen35moetext", HYBRID_EXPERTS),
    ("qwen35text", HYBRID),
    ("qwen4exp", "hyper-connections, per-layer embeddings, sparse attention"),
    ("rwkv7", "recurrent layers"),
];

/// What the decoder lacks for a family, by what `config.json` or a GGUF calls it; `None` of those that it does not know.
pub(crate) fn lacking(name: &str) -> Option<&'static str> {
    let plain: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
    UNSUPPORTED.iter().find(|(own, _)| *own == plain).map(|(_, lacks)| *lacks)
}

/// The families that are refused by name, letters and digits of it only, with what each lacks.
pub fn unsupported() -> &'static [(&'static str, &'static str)] {
    &UNSUPPORTED
}
