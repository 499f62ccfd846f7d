//! A random model of two layers, small enough for tests that quantize it.

use std::borrow::Cow;

use anyhow::Result;
use decdec::config::{LayerNorm, ModelConfig, Projection};
use decdec::format::Dense;
use decdec::tokenizer::TextFiles;
use decdec::weights::{Linear, ModelWeights, Weight};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::json;

/// Dense weights in memory.
pub(crate) struct SmallModel {
    pub(crate) config: ModelConfig,
    pub(crate) embedding: Vec<f32>,
    pub(crate) head: Option<Vec<f32>>, // where it is not the embedding
    pub(crate) final_norm: Vec<f32>,
    pub(crate) norms: Vec<(Vec<f32>, Vec<f32>)>,
    pub(crate) linears: Vec<[Vec<f32>; 4]>,
    pub(crate) qkv_bias: Option<Vec<f32>>, // the same in every layer
}

/// γ before attention and γ before the feed-forward part.
#[allow(dead_code, reason = "not every test compares norms")]
pub(crate) fn norms(weights: &dyn ModelWeights, layer: usize) -> (Vec<f32>, Vec<f32>) {
    let norm = |norm| weights.norm(layer, norm).unwrap();
    (norm(LayerNorm::AttentionInput), norm(LayerNorm::FeedForwardInput))
}

/// Text files that nobody reads.
pub(crate) fn texts() -> TextFiles {
    TextFiles {
        tokenizer_json: b"{}".to_vec(),
        chat_template: Some("{{ messages }}".into()),
        special_tokens: [("bos_token".into(), Some("<s>".into()))].into(),
        eos_token_ids: vec![2],
    }
}

/// Roughly normal numbers: sums of four uniform ones.
pub(crate) fn random(rng: &mut ChaCha8Rng, len: usize, amplitude: f32) -> Vec<f32> {
    let uniform = |rng: &mut ChaCha8Rng| rng.next_u32() as f32 / u32::MAX as f32 - 0.5;
    (0..len).map(|_| amplitude * (0..4).map(|_| uniform(rng)).sum::<f32>()).collect()
}

impl SmallModel {
    /// Two layers, grouped queries (4 heads on 2), heavy-tailed embedding; Qwen2 with biases if `bias`.
    pub(crate) fn new(seed: u64, layers: usize, bias: bool) -> Self {
        let config = ModelConfig::from_json(&json!({
            "model_type": if bias { "qwen2" } else { "llama" },
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 96,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128,
            "tie_word_embeddings": true,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }))
        .expect("a small configuration");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut embedding = random(&mut rng, config.vocab_size * config.hidden_size, 1.0);
        for (i, x) in embedding.iter_mut().enumerate() {
            if i % config.hidden_size % 17 == 3 {
                *x *= 8.0;
            }
        }
        let gamma = |rng: &mut ChaCha8Rng| random(rng, 64, 0.2).iter().map(|x| 1.0 + x).collect::<Vec<_>>();
        let norms = (0..layers).map(|_| (gamma(&mut rng), gamma(&mut rng))).collect();
        let linears = (0..layers)
            .map(|_| {
                Projection::ALL.map(|p| {
                    let (inputs, outputs) = config.shape(0, p);
                    random(&mut rng, inputs * outputs, 2.0 / (inputs as f32).sqrt())
                })
            })
            .collect();
        let qkv_bias = bias.then(|| random(&mut rng, config.shape(0, Projection::Qkv).1, 0.5));
        let (head, final_norm) = (None, vec![1.0; config.hidden_size]);
        Self { config, embedding, head, final_norm, norms, linears, qkv_bias }
    }

    fn table<'a>(&self, values: &'a [f32]) -> Dense<'a> {
        let values = decdec::format::Floats::F32(Cow::Borrowed(values));
        Dense { in_features: self.config.hidden_size, out_features: self.config.vocab_size, values }
    }
}

impl ModelWeights for SmallModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        Ok(self.table(&self.embedding))
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        Ok(self.head.as_ref().map(|head| self.table(head)))
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        Ok(self.final_norm.clone())
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        let (attention, feed_forward) = &self.norms[layer];
        Ok(if norm == LayerNorm::AttentionInput { attention.clone() } else { feed_forward.clone() })
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let (in_features, out_features) = self.config.shape(layer, projection);
        let values = decdec::format::Floats::F32(Cow::Borrowed(&self.linears[layer][projection.index()]));
        let mut linear = Linear::plain(Weight::Dense(Dense { in_features, out_features, values }));
        if projection == Projection::Qkv {
            linear.bias = self.qkv_bias.as_deref().map(Cow::Borrowed);
        }
        Ok(linear)
    }

    fn bits(&self, _layer: usize) -> Option<u32> {
        None
    }
}
