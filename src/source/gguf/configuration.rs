//! The metadata of a GGUF as a Hugging Face `config.json`.
//!
//! What is not said has the meaning that llama.cpp gives it. Every key of the architecture (`llama.block_count`) is
//! read here, or known to change nothing of what the model computes, or refused by name: a key that is passed over
//! may be one that makes another model of the same weights.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Model;
use super::tokenizer::special_id;
use crate::source::{EMBEDDING, HEAD};

/// The tensor with what each of RoPE's frequencies is divided by.
pub(super) const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// Keys that are read, without the name of the architecture.
const READ: [&str; 17] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
    "vocab_size",
];

/// Keys that say something about a model and change nothing of what it computes.
const SILENT: [&str; 4] = [
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
];

/// Keys of what is not computed here, and the value at which it changes nothing.
const NEUTRAL: [(&str, f64); 10] = [
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("embedding_scale", 1.0),
    ("expert_used_count", 0.0),
    ("logit_scale", 1.0),
    ("pooling_type", 0.0),
    ("residual_scale", 1.0),
    ("rope.scaling.attn_factor", 1.0),
    ("use_parallel_residual", 0.0),
];

impl Model {
    /// The metadata as a Hugging Face `config.json`.
    pub(in crate::source) fn config_json(&self) -> Result<Value> {
        self.ensure_keys_are_known()?;
        let file = self.metadata();
        let integer = |name: &str| file.integer(&self.key(name))?.with_context(|| self.missing(name));
        let layers = integer("block_count")?;
        let of_layers = |name: &str| file.integer_of_layers(&self.key(name), layers);
        let hidden = integer("embedding_length")?;
        let heads = of_layers("attention.head_count")?.with_context(|| self.missing("attention.head_count"))?;
        let head_dim = match file.integer(&self.key("attention.key_length"))? {
            Some(head_dim) => head_dim,
            None => hidden.checked_div(heads).context("attention.head_count is 0, 1 or more is expected")?,
        };
        for part in ["attention.value_length", "rope.dimension_count"] {
            let key = self.key(part);
            let found = file.integer(&key)?.unwrap_or(head_dim);
            ensure!(found == head_dim, "{key} is {found}, the width of a head, {head_dim}, is expected");
        }
        let window = file.integer(&self.key("attention.sliding_window"))?.filter(|&window| window > 0);
        let embedding = self.find(EMBEDDING)?.shape()?;
        let theta = file.float(&self.key("rope.freq_base"))?.unwrap_or(10_000.0);
        let eps = file.float(&self.key("attention.layer_norm_rms_epsilon"))?;
        let eps = eps.with_context(|| self.missing("attention.layer_norm_rms_epsilon"))?;
        let (model_type, class) = match self.architecture.as_str() {
            "llama" if window.is_some() => ("mistral", "MistralForCausalLM"),
            "phi3" => ("phi3", "Phi3ForCausalLM"),
            "qwen2" => ("qwen2", "Qwen2ForCausalLM"),
            _ => ("llama", "LlamaForCausalLM"),
        };
        Ok(json!({
            "architectures": [class],
            "model_type": model_type,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size":
                of_layers("feed_forward_length")?.with_context(|| self.missing("feed_forward_length"))?,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": of_layers("attention.head_count_kv")?.unwrap_or(heads),
            "head_dim": head_dim,
            "vocab_size": embedding.first(),
            "rms_norm_eps": shortest(eps),
            "rope_theta": shortest(theta),
            "rope_scaling": self.rope_scaling(theta, head_dim)?,
            "sliding_window": window,
            "max_position_embeddings": integer("context_length")?,
            "tie_word_embeddings": self.find(HEAD).is_err(),
            "bos_token_id": special_id(self.metadata(), "bos")?,
            "eos_token_id": special_id(self.metadata(), "eos")?,
            "torch_dtype": "float16",
        }))
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn missing(&self, name: &str) -> String {
        format!("{} is missing", self.key(name))
    }

    fn ensure_keys_are_known(&self) -> Result<()> {
        let file = self.metadata();
        let own = self.key("");
        let mut keys: Vec<&str> = file.keys().filter_map(|key| key.strip_prefix(&own)).collect();
        keys.sort_unstable();
        for name in keys.into_iter().filter(|name| !READ.contains(name) && !SILENT.contains(name)) {
            let (key, value) = (self.key(name), file.described(&self.key(name)));
            match NEUTRAL.iter().find(|(neutral, _)| *neutral == name) {
                Some(&(_, neutral)) if file.number(&key) == Some(neutral) => {}
                Some((_, neutral)) => bail!("{key} is {value}, only {neutral} is supported"),
                None => bail!(
                    "the metadata {key} ({value}) is not known, what it would change is not computed: quantize from \
                     the Hugging Face directory instead"
                ),
            }
        }
        Ok(())
    }

    /// How frequencies are scaled: linearly where only a factor is there, under its older name or its newer one.
    fn rope_scaling(&self, theta: f64, head_dim: u64) -> Result<Value> {
        let file = self.metadata();
        if self.files.iter().any(|file| file.names().any(|name| name.starts_with("rope_factors_"))) {
            bail!("RoPE type \"longrope\" is unknown, none or linear is expected");
        }
        let kind = self.key("rope.scaling.type");
        let factor = match file.float(&self.key("rope.scaling.factor"))? {
            None => file.float(&self.key("rope.scale_linear"))?,
            factor => factor,
        };
        // A factor of 0 is none.
        let factor = match file.text(&kind)?.unwrap_or("linear") {
            "none" => 1.0,
            "linear" => factor.filter(|&factor| factor != 0.0).map_or(1.0, shortest),
            other => bail!("{kind}: RoPE type {other:?} is unknown, none or linear is expected"),
        };
        let Some((file, tensor)) = self.stored(ROPE_DIVISORS) else {
            let linear = json!({ "rope_type": "linear", "factor": factor });
            return Ok(if factor == 1.0 { Value::Null } else { linear });
        };
        ensure!(factor == 1.0, "{ROPE_DIVISORS} and a RoPE factor of {factor} are both there, one of them is expected");
        let divisors = tensor.kind().with_context(|| format!("tensor {ROPE_DIVISORS}"))?.read(file.data(tensor));
        divisors.ensure_tensor_is_finite(ROPE_DIVISORS, tensor.shape())?;
        llama3_scaling(&divisors.to_f32(), theta, head_dim)
    }
}

/// An f32 as the f64 that prints alike: 1e-5, not 9.999999747378752e-6.
fn shortest(n: f64) -> f64 {
    (n as f32).to_string().parse().unwrap_or(n)
}

/// Llama-3.1's RoPE is stored as the divisor of each frequency. Its factor is the largest of them; the other
/// constants are the same in all models of the family, which is checked.
fn llama3_scaling(divisors: &[f32], theta: f64, head_dim: u64) -> Result<Value> {
    let factor = divisors.iter().copied().fold(1.0, f32::max);
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let same = divisors.len() as u64 * 2 == head_dim
        && divisors.iter().enumerate().all(|(i, &divisor)| {
            let frequency = theta.powf(-((2 * i) as f64) / head_dim as f64);
            let turns = original * frequency / std::f64::consts::TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            let expected = 1.0 / ((1.0 - kept) / f64::from(factor) + kept);
            (f64::from(divisor) - expected).abs() < 1e-3 * expected
        });
    ensure!(same, "the RoPE divisors in {ROPE_DIVISORS} are not those of Llama 3.1, no other is supported");
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }))
}
