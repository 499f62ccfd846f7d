//! Reference directories made here.

use crate::pt::{Array, Node, save};
use half::f16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::fs;

/// A directory made here: a Llama of one layer with random codes.
pub(crate) struct Made {
    pub(crate) weights: BTreeMap<String, Array>,
    pub(crate) residuals: BTreeMap<String, [Array; 2]>, // cheatsheet, reordered_scales
    pub(crate) thresholds: BTreeMap<String, Array>,
    pub(crate) config: serde_json::Value,
    pub(crate) rng: ChaCha8Rng,
}

/// Name, rows and channels of every module.
pub(crate) const MODULES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 32, 32),
    ("self_attn.k_proj", 16, 32),
    ("self_attn.v_proj", 16, 32),
    ("self_attn.o_proj", 32, 32),
    ("mlp.gate_proj", 64, 32),
    ("mlp.up_proj", 64, 32),
    ("mlp.down_proj", 32, 64),
];

impl Made {
    /// Everything but the matrices.
    pub(crate) fn new() -> Self {
        let config = serde_json::json!({
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
        });
        let (weights, residuals, thresholds) = Default::default();
        let mut made = Self { weights, residuals, thresholds, config, rng: ChaCha8Rng::seed_from_u64(7) };
        for name in ["model.embed_tokens", "lm_head"] {
            let table = made.halves(&[8, 32]);
            made.weights.insert(format!("{name}.weight"), table);
        }
        for name in ["norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"] {
            let gamma = made.halves(&[32]);
            made.weights.insert(format!("model.{name}.weight"), gamma);
        }
        for (module, rows, channels) in MODULES {
            let parts = [made.words(&[channels, rows / 8]), made.halves(&[rows])];
            made.residuals.insert(module.to_owned(), parts);
            let falling = (0..channels).flat_map(|i| (9.0 - i as f32 / 8.0).to_le_bytes()).collect();
            let thresholds = Array { storage: "FloatStorage", shape: vec![channels], bytes: falling };
            made.thresholds.insert(module.to_owned(), thresholds);
        }
        made
    }

    pub(crate) fn any_prec(planes: usize, luts: &[usize]) -> Self {
        let mut made = Self::new();
        for (module, rows, channels) in MODULES {
            let codes = made.words(&[planes, rows, channels / 32]);
            made.weights.insert(format!("model.layers.0.{module}.qweight"), codes);
            for &bits in luts {
                let lut = made.halves(&[rows, 1 << bits]);
                made.weights.insert(format!("model.layers.0.{module}.lut{bits}"), lut);
            }
        }
        made
    }

    pub(crate) fn lut_gemm(bits: usize) -> Self {
        let mut made = Self::new();
        for (module, rows, channels) in MODULES {
            let name = |tensor| format!("model.layers.0.{module}.{tensor}");
            let binary = made.words(&[channels / 32, bits, rows]);
            made.weights.insert(name("binary"), binary);
            let (alpha, q_bias) = (made.singles(&[channels / 32, bits, rows]), made.singles(&[channels / 32, rows]));
            made.weights.insert(name("alpha"), alpha);
            made.weights.insert(name("q_bias"), q_bias);
        }
        made
    }

    pub(crate) fn words(&mut self, shape: &[usize]) -> Array {
        let bytes = (0..shape.iter().product()).flat_map(|_| self.rng.next_u32().to_le_bytes()).collect();
        Array { storage: "IntStorage", shape: shape.to_vec(), bytes }
    }

    pub(crate) fn number(&mut self) -> f32 {
        self.rng.next_u32() as f32 / u32::MAX as f32 - 0.5
    }

    pub(crate) fn halves(&mut self, shape: &[usize]) -> Array {
        let bytes = (0..shape.iter().product()).flat_map(|_| f16::from_f32(self.number()).to_le_bytes()).collect();
        Array { storage: "HalfStorage", shape: shape.to_vec(), bytes }
    }

    pub(crate) fn singles(&mut self, shape: &[usize]) -> Array {
        let bytes = (0..shape.iter().product()).flat_map(|_| self.number().to_le_bytes()).collect();
        Array { storage: "FloatStorage", shape: shape.to_vec(), bytes }
    }

    pub(crate) fn dict(&self, keep: impl Fn(&str) -> bool) -> Node {
        let kept = self.weights.iter().filter(|(name, _)| keep(name));
        Node::Dict(kept.map(|(name, array)| (name.clone(), Node::Tensor(array.clone()))).collect())
    }

    pub(crate) fn write(&self) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: Vec<u8>| fs::write(dir.path().join(name), bytes).unwrap();
        write("config.json", self.config.to_string().into_bytes());
        write("tokenizer.json", b"{}".to_vec());
        write("pytorch_model.bin", save(&self.dict(|_| true)));
        let residuals = self.residuals.iter().map(|(module, [words, scales])| {
            let parts = [("cheatsheet", words), ("reordered_scales", scales)];
            let parts = parts.map(|(name, array)| (name.to_owned(), Node::Tensor(array.clone())));
            (module.clone(), Node::Dict(parts.into()))
        });
        write("cheatsheet.pt", save(&Node::List(vec![Node::Dict(residuals.collect())])));
        let thresholds = self.thresholds.iter().map(|(module, array)| (module.clone(), Node::Tensor(array.clone())));
        write("thresholds.pt", save(&Node::List(vec![Node::Dict(thresholds.collect())])));
        dir
    }

    pub(crate) fn array(&self, module: &str, tensor: &str) -> &Array {
        &self.weights[&format!("model.layers.0.{module}.{tensor}")]
    }
}

impl Array {
    pub(crate) fn word(&self, i: usize) -> u32 {
        u32::from_le_bytes(self.bytes[4 * i..][..4].try_into().unwrap())
    }

    pub(crate) fn float(&self, i: usize) -> f32 {
        match self.storage {
            "HalfStorage" => f16::from_le_bytes(self.bytes[2 * i..][..2].try_into().unwrap()).to_f32(),
            _ => f32::from_le_bytes(self.bytes[4 * i..][..4].try_into().unwrap()),
        }
    }
}
