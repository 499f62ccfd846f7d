//! The promise: whatever tokens really take, what is kept is not above the target.

use anyhow::Result;
use decdec::backend::cpu::Cpu;
use decdec::config::{ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::format::Storage;
use decdec::nsys::Identity;
use decdec::profile::{self, ByClock};
use decdec::random::RandomWeights;
use decdec::tune::search::Choice;
use decdec::tune::{self, Tuning, search_until_within};
use decdec::weights::{Linear, ModelWeights};
use proptest::prelude::*;
use serde_json::json;

use crate::Synthetic;
use crate::changed::{Change, Changed};

/// Tunes the manual's example at `target` per cent and holds it against tokens that `real` (from a layer's slowdown
/// to a token's, in per cent) makes slower.
fn held(target: f64, real: impl Fn(f64) -> f64) -> Tuning {
    let timings = Synthetic::manual().timings();
    let base = timings.base_us();
    let found = timings.search(base * (1.0 + target / 100.0));
    let mut tuning = Tuning { target, found, exhaustive: None, verified: None };
    let mut measure = |choice: &Choice| {
        let layer = (choice.us() / base - 1.0) * 100.0;
        Ok((2.0, 2.0 * (1.0 + real(layer) / 100.0)))
    };
    search_until_within(&timings, &mut tuning, &mut measure).unwrap();
    tuning
}

#[test]
fn what_holds_is_kept_as_it_was_found() {
    let tuning = held(10.0, |layer| 0.7 * layer);
    assert_eq!(tuning.found.fine.k_chunks(), [4, 4, 5, 5]);
    let verified = tuning.verified.unwrap();
    assert!(verified.missed.is_empty());
    assert!(verified.slowdown > 6.0 && verified.slowdown < 7.0, "{verified:?}");
    assert_eq!(verified.base_ms, 2.0);
}

#[test]
fn what_is_too_slow_is_searched_again_with_less() {
    let tuning = held(10.0, |layer| 1.4 * layer);
    let verified = tuning.verified.unwrap();
    assert_eq!(verified.missed[0].0, [4, 4, 5, 5]);
    assert!(verified.missed[0].1 > 13.0, "{verified:?}");
    let sum = tuning.found.fine.sum_k();
    assert!((8..18).contains(&sum), "less than before, but no less than it takes: {sum}");
    assert!(verified.slowdown > 7.0 && verified.slowdown <= 10.0, "{verified:?}");
}

#[test]
fn what_never_holds_is_given_up() {
    let tuning = held(10.0, |_| 50.0);
    assert_eq!(tuning.found.fine.k_chunks(), [0; 4]);
    let verified = tuning.verified.unwrap();
    assert_eq!(verified.slowdown, 0.0, "nothing is compensated, so nothing is slower");
    assert!(!verified.missed.is_empty());
}

proptest! {
    #[test]
    fn nothing_above_the_target_is_ever_kept(target in 0.0..30.0f64, share in 0.0..4.0f64, fixed in 0.0..10.0f64) {
        let tuning = held(target, |layer| if layer > 0.0 { fixed + share * layer } else { 0.0 });
        let verified = tuning.verified.unwrap();
        prop_assert!(verified.slowdown <= target);
        prop_assert!(verified.missed.iter().all(|&(_, slowdown)| slowdown > target));
        // Every further search chose less.
        let mut sums: Vec<_> = verified.missed.iter().map(|(k_chunks, _)| k_chunks.iter().sum()).collect();
        sums.push(tuning.found.fine.sum_k());
        prop_assert!(sums.is_sorted_by(|a: &usize, b| a >= b), "{sums:?}");
    }
}

/// Two layers of 3 bits and two of 4.
struct Mixed([RandomWeights; 2]);

impl Mixed {
    fn new() -> Self {
        let config = ModelConfig::from_json(&json!({
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "vocab_size": 32,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
            "eos_token_id": 1,
        }))
        .expect("a small configuration");
        Self([3, 4].map(|bits| RandomWeights::new(config.clone(), Storage::ANYPREC, bits, 7).unwrap()))
    }
}

impl Change for Mixed {
    fn of(&self) -> &dyn ModelWeights {
        &self.0[0]
    }
    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        self.0[layer / 2].projection(layer, projection)
    }
    fn bits(&self, layer: usize) -> Option<u32> {
        self.0[layer / 2].bits(layer)
    }
}

/// Of a model with two widths, either may be tuned and verified; its own layers are compensated, the others are not.
#[test]
fn each_width_of_a_mixed_model_is_verified() {
    let dir = tempfile::tempdir().unwrap();
    let (weights, cpu) = (Changed(Mixed::new()), Cpu::new());
    let model = decdec::model::Model::load(&cpu, &weights, |_| {}).unwrap();
    let engine = decdec::engine::Engine::of(model, 64);
    let how = tune::Verification { tokens: 20, rounds: 1, selection: Selection::Bucket };
    for bits in [3, 4] {
        let identity = Identity { bits, ..crate::identity() };
        let options = profile::Options {
            identity: identity.clone(),
            weights: "mixed".into(),
            dir: dir.path().to_path_buf(),
            tokens: 1,
            overwrite: false,
            halve_layers: false,
            min_n_tb: Some(1),
            max_n_tb: Some(1),
            max_k_chunk: None,
            k_chunks: Some(vec![1024]),
            selection: Selection::Bucket,
            kind: None,
            dearest: profile::Options::DEAREST,
            choices: Vec::new(),
        };
        profile::run(&cpu, &mut ByClock::default(), &weights, &options).unwrap();
        let (dir, targets) = (options.dir, vec![1e6]);
        let tuning = tune::Options {
            identity,
            dir,
            shapes: [None; 4],
            targets,
            exhaustive: false,
            objective: tune::Objective::Channels,
        };
        let mut outcome = tune::run(&tuning).unwrap();
        tune::verify(&mut outcome, &engine, &how).unwrap();
        assert_eq!(outcome.tunings[0].found.fine.k_chunks(), [1024; 4]);
        assert!(outcome.tunings[0].verified.is_some());
        outcome.identity.bits = 5;
        let error = tune::verify(&mut outcome, &engine, &how).unwrap_err().to_string();
        assert!(error.contains("of 5-bit layers, the model has 3- and 4-bit ones"), "{error}");
    }
}
