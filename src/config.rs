//! What a model is: shapes and constants, read from a Hugging Face `config.json`.

pub(crate) use json::{is_biased, read_json, token_ids};

mod json;
mod preset;
mod rope;

use std::fmt;

/// One of the four projections of a decoder layer, as the tuner and the command line name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// Query, key and value, fused: rows of q, then k, then v.
    Qkv,
    /// Attention output.
    O,
    /// Gate and up, fused: rows of gate, then up.
    GateUp,
    /// Down.
    Down,
}

impl Projection {
    /// All four, in the order in which the command line and the reports give them.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// `qkv`, `o`, `gu` or `d`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::O => "o",
            Self::GateUp => "gu",
            Self::Down => "d",
        }
    }

    /// Position in [`Projection::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the rotary frequencies are stretched for contexts longer than the model was first trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama-3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` count as low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context of the first training, in tokens.
        original_max_position_embeddings: f64,
    },
}

/// The model family: what `config.json` calls `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Mistral 7B.
    Mistral,
    /// Phi-3 mini and medium (4k).
    Phi3,
    /// Qwen2 and Qwen2.5.
    Qwen2,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Phi3, Self::Qwen2];

    /// What `config.json` calls it: `model_type`, and the only class in `architectures` that is understood.
    pub const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Llama => ("llama", "LlamaForCausalLM"),
            Self::Mistral => ("mistral", "MistralForCausalLM"),
            Self::Phi3 => ("phi3", "Phi3ForCausalLM"),
            Self::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
        }
    }
}

/// The shapes and constants of one decoder-only model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The model family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between gate-up and down.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// ε of RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How they are stretched.
    pub rope_scaling: RopeScaling,
    /// Attention sees at most this many of the latest tokens, itself included.
    pub sliding_window: Option<usize>,
    /// The longest context the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// The token a text starts with, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// `(in_features, out_features)` of a projection.
    pub fn shape(&self, projection: Projection) -> (usize, usize) {
        let q = self.num_heads * self.head_dim;
        let kv = self.num_kv_heads * self.head_dim;
        match projection {
            Projection::Qkv => (self.hidden_size, q + 2 * kv),
            Projection::O => (q, self.hidden_size),
            Projection::GateUp => (self.hidden_size, 2 * self.intermediate_size),
            Projection::Down => (self.intermediate_size, self.hidden_size),
        }
    }
}

impl RopeScaling {
    fn apply(&self, frequency: f64) -> f64 {
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: original } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength > original / low_freq_factor {
                    frequency / factor
                } else if wavelength < original / high_freq_factor {
                    frequency
                } else {
                    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}
