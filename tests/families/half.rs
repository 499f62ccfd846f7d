//! CUDA in its 16-bit types against transformers, which computes in float32.
//!
//! What the logits may be off by is not chosen: the CPU says how far they move where every number of every matrix is
//! off by as much as rounding it does. On the device a number of the text goes through as many roundings: matrices
//! (float16 keeps them, the models are stored so), what enters a product, queries, keys and values, what attention and
//! the gates put out. They are independent, so their squares add up.

use std::borrow::Cow;

use anyhow::Result;
use decdec::backend::DecodeBackend;
use decdec::backend::cpu::Cpu;
use decdec::config::{LayerNorm, ModelConfig, Projection, families};
use decdec::format::{Dense, Floats};
use decdec::model::Model;
use decdec::sampling::draws;
use decdec::source::Source;
use decdec::weights::{Linear, ModelWeights, Weight};

use crate::logits::{Known, known, logits, overlooked};
use crate::models::{config, of, open};

/// The largest relative error of a rounding.
pub(crate) const FLOAT16: f32 = 1.0 / 2048.0;
pub(crate) const BFLOAT16: f32 = 1.0 / 256.0;

/// For each number of a matrix that is off, four others are: what enters the product, the query or key, the value, the
/// probability or gate. Twice the root of their count leaves room for one text being less lucky than another.
const ROUNDINGS: f64 = 4.0;

/// A model whose matrices are off by this much, at random.
struct Rounded<'a> {
    source: &'a Source,
    by: f32,
}

impl Rounded<'_> {
    fn dense(&self, matrix: Dense<'_>, seed: usize) -> Dense<'static> {
        let Dense { in_features, out_features, values } = matrix;
        let mut numbers = vec![0.0; values.len()];
        values.read_f32(0, &mut numbers);
        let errors = draws(seed as u64, numbers.len());
        numbers.iter_mut().zip(errors).for_each(|(number, error)| *number *= 1.0 + self.by * (2.0 * error - 1.0));
        Dense { in_features, out_features, values: Floats::F32(Cow::Owned(numbers)) }
    }
}

impl ModelWeights for Rounded<'_> {
    fn config(&self) -> &ModelConfig {
        self.source.config()
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        Ok(self.dense(self.source.embedding()?, 0))
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        Ok(self.source.head()?.map(|head| self.dense(head, 1)))
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.source.final_norm()
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        self.source.norm(layer, norm)
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let linear = self.source.projection(layer, projection)?;
        let Weight::Dense(matrix) = linear.weight else { unreachable!("sources are full precision") };
        let weight = Weight::Dense(self.dense(matrix, 2 + 4 * layer + projection.index()));
        Ok(Linear { bias: linear.bias, ..Linear::plain(weight) })
    }

    fn bits(&self, _layer: usize) -> Option<u32> {
        None
    }
}

/// ‖logits − those of transformers‖ / ‖those of transformers‖, of one text.
fn distance<B: DecodeBackend>(model: &Model<'_, B>, known: &Known, at_once: usize) -> f64 {
    let got = logits(model, &known.ids, at_once);
    let pairs = got[got.len() - known.logits.len()..].iter().zip(&known.logits);
    let norm = |squares: f64| squares.sqrt();
    let off = norm(pairs.map(|(got, want)| f64::from(got - want).powi(2)).sum());
    off / norm(known.logits.iter().map(|&want| f64::from(want).powi(2)).sum())
}

/// The logits of every model of a family, whole and token by token, are as close as roundings of `by` allow; those of
/// a model that overlooks something are not.
pub(crate) fn within_rounding<B: DecodeBackend>(backend: &B, family: &str, by: f32) {
    let cpu = Cpu::new();
    for name in of(family) {
        let source = open(&name, &config(&name, "published.json")).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let rounded = Model::load(&cpu, &Rounded { source: &source, by }, |_| ()).expect("loads");
        let model = Model::load(backend, &source, |_| ()).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let texts = known(&name);
        let most: Vec<_> = texts.iter().map(|known| ROUNDINGS * distance(&rounded, known, known.ids.len())).collect();
        for (known, &most) in texts.iter().zip(&most) {
            let length = known.ids.len();
            for at_once in [length, 1] {
                let off = distance(&model, known, at_once);
                eprintln!("{name}, {length} tokens, {at_once} at once: off by {off:.2e}, {most:.2e} allowed");
                assert!(off <= most, "{name}, {length} tokens, {at_once} at once: off by {off}, {most} allowed");
            }
        }
        let mut shown = Vec::new();
        for (_, wrong) in overlooked(&name) {
            // What is refused is not overlooked.
            let Ok(wrong) = open(&name, &wrong) else { continue };
            let wrong = Model::load(backend, &wrong, |_| ()).expect("loads");
            let shows = |(known, &most): (&Known, &f64)| distance(&wrong, known, known.ids.len()) > most;
            shown.push(texts.iter().zip(&most).any(shows));
        }
        // bfloat16 is coarser than what some fields change.
        let told_apart = if by > FLOAT16 { shown.contains(&true) } else { !shown.contains(&false) };
        assert!(told_apart || shown.is_empty(), "{name}: what is overlooked does not show: {shown:?}");
    }
}

/// What the bounds allow is less than what overlooking something does, as the CPU has it.
#[test]
fn what_is_overlooked_shows_in_16_bits() {
    if crate::devices::is_under_test("cpu") {
        for family in families::ALL {
            for by in [FLOAT16, BFLOAT16] {
                within_rounding(&Cpu::new(), family.model_types[0].0, by);
            }
        }
    }
}
