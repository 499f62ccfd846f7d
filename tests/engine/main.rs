//! Engines and sessions: what goes on is what it would be from the beginning, and what goes wrong is told apart.

#[path = "../devices/mod.rs"]
mod devices;

mod batches;
mod conversations;
mod edges;
mod speculate;
mod texts;

use decdec::checkpoint::BitWidth;
use decdec::config::ModelConfig;
use decdec::format::{Format, Storage};
use decdec::open::Opened;
use decdec::random::RandomWeights;
use serde_json::json;

/// Ids of the small model.
const VOCAB: u32 = 96;

/// Tokens of its longest text.
const CONTEXT: usize = 120;

/// A small model of random numbers in 3 bits, with residuals; every layer sees `window` tokens if it has one.
fn weights(window: Option<usize>) -> RandomWeights {
    let config = ModelConfig::from_json(&json!({
        "model_type": "mistral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": window,
        "max_position_embeddings": 2 * CONTEXT,
        "tie_word_embeddings": false,
    }));
    RandomWeights::new(config.expect("a small configuration"), Storage::ANYPREC, 3, 11).expect("random numbers")
}

/// The same, as a model that was opened.
fn opened(window: Option<usize>) -> Opened {
    Opened::random(weights(window), Format::AnyPrec, BitWidth::of_layers(&[3]).expect("one width"), "small")
}
