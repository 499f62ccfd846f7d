//! GGUF: weights, configuration, tokenizer and chat template in one file.

mod blocks;
mod file;
mod tokenizer;

use std::borrow::Cow;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::archive::Bytes;
use crate::config::{Architecture, ModelConfig};
use crate::format::Floats;
use crate::tokenizer::TextFiles;
use file::File;

/// A model in a GGUF file, its tensors found by their Hugging Face names.
#[derive(Debug)]
pub(super) struct Model {
    file: File,
    architecture: String,
}

/// A tensor and the name it goes by.
pub(super) struct Tensor<'a> {
    name: &'a str,
    stored: &'a file::Tensor,
}

impl Model {
    pub(super) fn open(bytes: Bytes) -> Result<Self> {
        let file = File::parse(bytes)?;
        let architecture = file.text("general.architecture")?.context("general.architecture is missing")?.to_owned();
        ensure!(
            matches!(architecture.as_str(), "llama" | "phi3" | "qwen2"),
            "general.architecture is {architecture:?}, llama, phi3 or qwen2 is expected"
        );
        Ok(Self { file, architecture })
    }

    pub(super) fn find<'a>(&'a self, name: &'a str) -> Result<Tensor<'a>> {
        let own = self.own_name(name);
        let stored = own.as_deref().and_then(|own| self.file.tensor(own));
        let stored = stored.with_context(|| format!("tensor {} is missing", own.as_deref().unwrap_or(name)))?;
        Ok(Tensor { name, stored })
    }

    /// The numbers of a tensor, q and k rows of Llama in their original order.
    pub(super) fn read(&self, name: &str, config: &ModelConfig) -> Result<Floats<'_>> {
        let tensor = self.find(name)?;
        let kind = tensor.stored.kind().with_context(|| format!("tensor {name}"))?;
        let values = kind.read(self.file.data(tensor.stored));
        let permuted = self.architecture == "llama" && (name.contains(".q_proj.") || name.contains(".k_proj."));
        if !permuted {
            return Ok(values);
        }
        let rows = tensor.stored.shape()[0];
        ensure!(rows.is_multiple_of(config.head_dim), "tensor {name} has {rows} rows, whole heads are expected");
        let columns = values.len() / rows;
        Ok(match values {
            Floats::F16(v) => Floats::F16(original_order(&v, columns, config.head_dim)),
            Floats::Bf16(v) => Floats::Bf16(original_order(&v, columns, config.head_dim)),
            Floats::F32(v) => Floats::F32(original_order(&v, columns, config.head_dim)),
        })
    }

    /// The name that a tensor has in this file.
    fn own_name(&self, name: &str) -> Option<String> {
        Some(match name {
            super::EMBEDDING => "token_embd.weight".to_owned(),
            super::FINAL_NORM => "output_norm.weight".to_owned(),
            super::HEAD => "output.weight".to_owned(),
            _ => {
                let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
                let (module, kind) = rest.rsplit_once('.')?;
                let own = match module {
                    "input_layernorm" => "attn_norm",
                    "post_attention_layernorm" => "ffn_norm",
                    "self_attn.qkv_proj" => "attn_qkv",
                    "self_attn.q_proj" => "attn_q",
                    "self_attn.k_proj" => "attn_k",
                    "self_attn.v_proj" => "attn_v",
                    "self_attn.o_proj" => "attn_output",
                    "mlp.gate_proj" => "ffn_gate",
                    "mlp.up_proj" => "ffn_up",
                    // Phi-3 keeps gate and up in one matrix, under the name of up.
                    "mlp.gate_up_proj" if self.architecture == "phi3" => "ffn_up",
                    "mlp.down_proj" => "ffn_down",
                    _ => return None,
                };
                format!("blk.{layer}.{own}.{kind}")
            }
        })
    }

    /// The metadata as a Hugging Face `config.json`.
    pub(super) fn config_json(&self) -> Result<Value> {
        let key = |name: &str| format!("{}.{name}", self.architecture);
        let integer = |name: &str| self.file.integer(&key(name))?.with_context(|| format!("{} is missing", key(name)));
        let hidden = integer("embedding_length")?;
        let heads = integer("attention.head_count")?;
        let head_dim = match self.file.integer(&key("attention.key_length"))? {
            Some(head_dim) => head_dim,
            None => hidden.checked_div(heads).context("attention.head_count is 0, 1 or more is expected")?,
        };
        for part in [key("attention.value_length"), key("rope.dimension_count")] {
            let found = self.file.integer(&part)?.unwrap_or(head_dim);
            ensure!(found == head_dim, "{part} is {found}, the width of a head, {head_dim}, is expected");
        }
        let window = self.file.integer(&key("attention.sliding_window"))?.filter(|&window| window > 0);
        let embedding = self.find(super::EMBEDDING)?.shape()?;
        let theta = self.file.float(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        let eps = self.file.float(&key("attention.layer_norm_rms_epsilon"))?;
        let (model_type, class) = match self.architecture.as_str() {
            "llama" if window.is_some() => Architecture::Mistral,
            "phi3" => Architecture::Phi3,
            "qwen2" => Architecture::Qwen2,
            _ => Architecture::Llama,
        }
        .names();
        Ok(json!({
            "architectures": [class],
            "model_type": model_type,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": integer("feed_forward_length")?,
            "num_hidden_layers": integer("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.file.integer(&key("attention.head_count_kv"))?.unwrap_or(heads),
            "head_dim": head_dim,
            "vocab_size": embedding.first(),
            "rms_norm_eps": eps.map(shortest),
            "rope_theta": shortest(theta),
            "rope_scaling": self.rope_scaling(theta, head_dim)?,
            "sliding_window": window,
            "max_position_embeddings": integer("context_length")?,
            "tie_word_embeddings": self.find(super::HEAD).is_err(),
            "bos_token_id": self.file.integer("tokenizer.ggml.bos_token_id")?,
            "eos_token_id": self.file.integer("tokenizer.ggml.eos_token_id")?,
            "torch_dtype": "float16",
        }))
    }

    fn rope_scaling(&self, theta: f64, head_dim: u64) -> Result<Value> {
        if self.file.tensor("rope_factors_long.weight").is_some() {
            bail!("RoPE type \"longrope\" is unknown, default, linear or llama3 is expected");
        }
        if let Some(tensor) = self.file.tensor("rope_freqs.weight") {
            let divisors = tensor.kind()?.read(self.file.data(tensor));
            return llama3_scaling(&divisors.to_f32(), theta, head_dim);
        }
        let factor = self.file.float(&format!("{}.rope.scaling.factor", self.architecture))?;
        match (self.file.text(&format!("{}.rope.scaling.type", self.architecture))?, factor) {
            (None | Some("none"), _) => Ok(Value::Null),
            (Some("linear"), Some(factor)) => Ok(json!({ "rope_type": "linear", "factor": shortest(factor) })),
            (Some(other), _) => Ok(json!({ "rope_type": other })),
        }
    }

    /// Tokenizer, chat template and special tokens.
    pub(super) fn texts(&self) -> Result<TextFiles> {
        tokenizer::texts(&self.file)
    }
}

impl Tensor<'_> {
    /// The shape of a tensor that can be read.
    pub(super) fn shape(&self) -> Result<Vec<usize>> {
        self.stored.kind().with_context(|| format!("tensor {}", self.name))?;
        Ok(self.stored.shape().to_vec())
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
    ensure!(same, "the RoPE divisors in rope_freqs.weight are not those of Llama 3.1, no other is supported");
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }))
}

/// Undoes the order in which llama.cpp's converter stores the rows of a head: `(head_dim / 2, 2)` becomes
/// `(2, head_dim / 2)` again, so that channel `i` is rotated with channel `i + head_dim / 2`.
fn original_order<'a, T: Copy>(values: &[T], columns: usize, head_dim: usize) -> Cow<'a, [T]> {
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * columns) {
        for row in 0..head_dim {
            let stored = 2 * (row % half) + row / half;
            out.extend_from_slice(&head[stored * columns..(stored + 1) * columns]);
        }
    }
    Cow::Owned(out)
}
