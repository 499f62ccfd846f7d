//! CUDA in its 16-bit types against transformers in float32. What the logits may be off by is told by transformers
//! itself, run in the same type (`tests/data/models/rounding.json`).

use decdec::backend::DecodeBackend;
use decdec::backend::cpu::Cpu;
use decdec::config::families;
use decdec::model::Model;
use decdec::source::Source;
use serde_json::Value;

use crate::logits::{Known, known, logits, overlooked};
use crate::models::{config, of, open, read_json};

/// How many times what transformers is off by: it rounds at other places.
const MOST: f32 = 2.0;

/// The root mean square of differences over that of the logits, in units of what transformers is off by itself
/// (`rounding`, a number for each text): the farther of the texts.
fn off_in_units<B: DecodeBackend>(backend: &B, name: &str, source: &Source, rounding: &Value) -> f32 {
    let model = Model::load(backend, source, |_| ()).unwrap_or_else(|e| panic!("{name}: {e:#}"));
    let squares = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|number| number * number).sum::<f32>();
    let of_text = |(known, rounding): (&Known, &Value)| {
        let rounding = rounding.as_f64().expect("a number") as f32;
        let off = |at_once: usize| {
            let got = logits(&model, &known.ids, at_once);
            let pairs = got[got.len() - known.logits.len()..].iter().zip(&known.logits);
            let off = squares(&mut pairs.map(|(got, want)| got - want)) / squares(&mut known.logits.iter().copied());
            off.sqrt() / rounding
        };
        off(known.ids.len()).max(off(1))
    };
    known(name).iter().zip(rounding.as_array().expect("a list")).map(of_text).fold(0.0, f32::max)
}

/// The logits of every model of a family, read whole and token by token, are as close in this type as transformers'
/// own; those of a model that overlooks something are not.
pub(crate) fn within_rounding<B: DecodeBackend>(backend: &B, family: &str, dtype: &str) {
    let rounding = read_json("models/rounding.json");
    for name in of(family) {
        let off = |source: &Source| off_in_units(backend, &name, source, &rounding[&name][dtype]);
        let itself = off(&open(&name, &config(&name, "published.json")).unwrap_or_else(|e| panic!("{name}: {e:#}")));
        assert!(itself <= MOST, "{name} in {dtype} is off by {itself} times what transformers is");
        for (what, source) in overlooked(&name) {
            let by = off(&source);
            assert!(by > MOST, "{what} in {dtype} is off by no more than {by} times what transformers is");
        }
    }
}

/// What is asked of 16 bits tells every feature of every family, as the CPU has it.
#[test]
fn what_is_overlooked_shows_in_16_bits() {
    if crate::devices::is_under_test("cpu") {
        for family in families::ALL {
            for dtype in ["float16", "bfloat16"] {
                within_rounding(&Cpu::new(), family.model_types[0].0, dtype);
            }
        }
    }
}
