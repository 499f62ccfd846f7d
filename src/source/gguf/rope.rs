//! How a GGUF says that heads are rotated, in the words of a Hugging Face `config.json`.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Model;
use super::configuration::shortest;

/// The tensors with what each of RoPE's frequencies is divided by: once for all, or by how long a text may become.
pub(super) const TENSORS: [&str; 3] = [DIVISORS, SHORT, LONG];
const DIVISORS: &str = "rope_freqs.weight";
const SHORT: &str = "rope_factors_short.weight";
const LONG: &str = "rope_factors_long.weight";

impl Model {
    /// What stands in `rope_scaling`, null for plain RoPE: linear where only a factor is there, under its older name or
    /// its newer one.
    pub(super) fn rope_scaling(&self, theta: f64, rotary_dim: u64) -> Result<Value> {
        let file = self.metadata();
        let key = |name: &str| self.key(&format!("rope.scaling.{name}"));
        let float = |name: &str| anyhow::Ok(file.float(&key(name))?.map(shortest));
        let kind = file.text(&key("type"))?;
        let factor = match file.float(&key("factor"))? {
            None => file.float(&self.key("rope.scale_linear"))?,
            factor => factor,
        };
        // A factor of 0 is none.
        let factor = factor.filter(|&factor| factor != 0.0).map_or(1.0, shortest);
        if self.stored(SHORT).is_some() || self.stored(LONG).is_some() {
            return Ok(json!({
                "rope_type": "longrope",
                "short_factor": self.divisors(SHORT)?,
                "long_factor": self.divisors(LONG)?,
                "attention_factor": float("attn_factor")?,
            }));
        }
        let scaling = match kind.unwrap_or("linear") {
            "none" => Value::Null,
            "linear" | "yarn" if factor == 1.0 => Value::Null,
            "linear" => json!({ "rope_type": "linear", "factor": factor }),
            "yarn" => json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": self.original_context()?,
                "beta_fast": float("yarn_beta_fast")?,
                "beta_slow": float("yarn_beta_slow")?,
                "mscale": float("yarn_log_multiplier")?.map(|_| 1.0),
                "mscale_all_dim": float("yarn_log_multiplier")?,
            }),
            other => bail!("{}: RoPE type {other:?} is unknown, none, linear or yarn is expected", key("type")),
        };
        // What it stands for differs: llama.cpp multiplies by it, its converter writes the whole factor.
        let grown = if scaling["rope_type"] == "yarn" { 1.0 + 0.1 * factor.ln() } else { 1.0 };
        for name in ["attn_factor", "yarn_attn_factor"] {
            let found = float(name)?.unwrap_or(1.0);
            let known = found == 1.0 || (found - grown).abs() < 1e-5;
            let or = if grown == 1.0 { String::new() } else { format!(" or {}", grown as f32) };
            ensure!(known, "{} is {found}, only 1{or} is supported", key(name));
        }
        if self.stored(DIVISORS).is_none() {
            return Ok(scaling);
        }
        ensure!(scaling.is_null(), "{DIVISORS} and a RoPE factor of {factor} are both there, one of them is expected");
        llama3_scaling(&self.divisors(DIVISORS)?, theta, rotary_dim)
    }

    /// The context of the first training, in tokens.
    pub(super) fn original_context(&self) -> Result<Option<u64>> {
        let file = self.metadata();
        Ok(match file.integer(&self.key("rope.scaling.original_context_length"))? {
            Some(original) => Some(original),
            None => file.integer(&self.key("context_length"))?,
        })
    }

    /// The numbers in a tensor of divisors.
    fn divisors(&self, name: &str) -> Result<Vec<f64>> {
        let (file, tensor) = self.stored(name).with_context(|| format!("tensor {name} is missing"))?;
        let divisors = tensor.kind().with_context(|| format!("tensor {name}"))?.read(file.data(tensor));
        divisors.ensure_tensor_is_finite(name, tensor.shape())?;
        Ok(divisors.to_f32().iter().map(|&divisor| shortest(divisor.into())).collect())
    }
}

/// Llama-3.1's RoPE is stored as the divisor of each frequency. Its factor is the largest of them; the other
/// constants are the same in all models of the family, which is checked.
fn llama3_scaling(divisors: &[f64], theta: f64, rotary_dim: u64) -> Result<Value> {
    let factor = divisors.iter().copied().fold(1.0, f64::max);
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let same = divisors.len() as u64 * 2 == rotary_dim
        && divisors.iter().enumerate().all(|(i, &divisor)| {
            let frequency = theta.powf(-((2 * i) as f64) / rotary_dim as f64);
            let turns = original * frequency / std::f64::consts::TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            let expected = 1.0 / ((1.0 - kept) / factor + kept);
            (divisor - expected).abs() < 1e-3 * expected
        });
    ensure!(same, "the RoPE divisors in {DIVISORS} are not those of Llama 3.1, no other is supported");
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }))
}
