//! The reference's own directories, `tiny-*` of the known answers, through the whole program.

use std::path::Path;

use decdec::checkpoint::BitWidth;
use decdec::dec::Selection;
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::open::Opened;
use decdec::sampling::Sampling;
use decdec::weights::ModelWeights;
use safetensors::SafeTensors;

use crate::UnderTest;
use crate::answers::tiny_directories;
use crate::decoder::{Model as Oracle, Rounded};
use crate::made::made;

/// What the oracle says of a directory.
struct Expected {
    input: Vec<u32>,
    base: Vec<f32>,          // [tokens, vocab_size]
    all_residuals: Vec<f32>, // likewise
    greedy: Vec<u32>,
}

fn expected(dir: &Path) -> Expected {
    let bytes = std::fs::read(dir.join("expected.safetensors")).expect("readable");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let ids = |name: &str| -> Vec<u32> {
        let data = tensors.tensor(name).expect(name).data();
        data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes")) as u32).collect()
    };
    let floats = |name: &str| -> Vec<f32> {
        let data = tensors.tensor(name).expect(name).data();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
    };
    Expected {
        input: ids("input_ids"),
        base: floats("logits.base"),
        all_residuals: floats("logits.all_residuals"),
        greedy: ids("greedy.base"),
    }
}

fn logits<B: UnderTest>(model: &Model<'_, B>, tokens: &[u32], compensated: bool) -> Vec<f32> {
    let mut state = model.state(1, tokens.len()).expect("room");
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).expect("begins");
    let vocab = model.config().vocab_size;
    let step = state.max_tokens();
    let mut on_device = model.backend().vector(step * vocab).expect("room");
    let mut all = Vec::new();
    for tokens in tokens.chunks(step) {
        model.logits(&mut state, 0, tokens, compensated, &mut on_device).expect("runs");
        let mut host = vec![0.0; tokens.len() * vocab];
        model.backend().read(&on_device, &mut host).expect("reads");
        all.extend(host);
    }
    all
}

fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    difference(a, &b.iter().map(|&b| b.into()).collect::<Vec<f64>>())
}

/// The directory in the precision that the oracle computed it in: the only one, unless it stores several and has no
/// map; then the one whose logits come nearest.
fn open(dir: &Path, want: &Expected) -> Opened {
    let error = match Opened::open(dir, None, false) {
        Ok(opened) => return opened,
        Err(error) => format!("{error:#}"),
    };
    assert!(error.contains("choose with --bitwidth"), "{}: {error}", dir.display());
    let widths = (2..=8).map(|bits| BitWidth::try_from(f64::from(bits)).expect("a width"));
    let all = widths.filter_map(|bits| Opened::open(dir, Some(bits), false).ok());
    let off = |opened: &Opened| {
        let logits = Oracle::read(opened.weights(), false, Rounded::ALL).logits(&ids(&want.input));
        difference(&want.base, &logits)
    };
    all.map(|opened| (off(&opened), opened)).min_by(|a, b| a.0.total_cmp(&b.0)).expect("a precision").1
}

fn ids(tokens: &[u32]) -> Vec<usize> {
    tokens.iter().map(|&id| id as usize).collect()
}

/// Largest `|a − b|`.
fn difference(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max)
}

/// A directory's logits in f64, and how far from them an oracle may be that rounded as a half-precision model, or a
/// backend that computes in f32.
struct Exact {
    base: Oracle,
    all_residuals: Oracle,
    tolerance: f64,
}

impl Exact {
    /// `tokens` are the longest text that is compared: rotary frequencies err more the longer it is.
    fn new(weights: &dyn ModelWeights, tokens: &[usize]) -> Self {
        let [base, all_residuals] = [false, true].map(|with| Oracle::read(weights, with, Rounded::NOTHING));
        let rounding = |exact: &Oracle, with| {
            let rounded = Oracle::read(weights, with, Rounded::ALL).logits(tokens);
            exact.logits(tokens).iter().zip(rounded).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
        };
        let rounding = rounding(&base, false).max(rounding(&all_residuals, true));
        let tolerance = 1.25 * rounding + base.head_tolerance();
        Self { base, all_residuals, tolerance }
    }

    /// The decoder whose layers are compensated where `compensated` says so.
    fn some_residuals(mut self, compensated: impl Fn(usize) -> bool) -> Oracle {
        for (layer, (base, all)) in self.base.layers.iter_mut().zip(self.all_residuals.layers).enumerate() {
            if compensated(layer) {
                *base = all;
            }
        }
        self.base
    }
}

/// Compensation of every channel, by bit width: `n_tb` and `k_chunk` of each.
fn by_width(sets: &[(usize, usize)]) -> Compensation {
    let set = |&(n_tb, k): &(usize, usize)| LayerCompensation { n_tb, k_chunks: [k; 4] };
    Compensation { by_bits: sets.iter().map(set).collect(), selection: Selection::Bucket }
}

pub(crate) fn reference_directories<B: UnderTest>(backend: &B) {
    for dir in tiny_directories() {
        let name = dir.display();
        let want = expected(&dir);
        let opened = open(&dir, &want);
        let whole = [ids(&want.input), ids(&want.greedy)].concat();
        let exact = Exact::new(opened.weights(), &whole);
        let tolerance = exact.tolerance;
        let mut model = Model::load(backend, opened.weights(), |_| ()).expect("loads");
        let off = largest_difference(&logits(&model, &want.input, true), &want.base);
        assert!(off <= tolerance, "{name}: base logits are off by {off}, {tolerance} is allowed");

        // Mixed precision takes eight k_chunks and two n_tbs.
        let widths = model.bit_widths();
        let every: Vec<_> = (0..widths.len()).map(|i| ((2 + i).min(backend.device().max_n_tb), 1024)).collect();
        model.compensate(Some(&by_width(&every))).expect("plans");
        let compensated = logits(&model, &want.input, true);
        let off = largest_difference(&compensated, &want.all_residuals);
        assert!(off <= tolerance, "{name}: compensated logits are off by {off}, {tolerance} is allowed");
        let off = largest_difference(&compensated, &want.base);
        assert!(off > 2.0 * tolerance, "{name}: compensation changes logits by no more than {off}");

        model.compensate(None).expect("stops");
        greedy(&model, &want, &exact, &name.to_string());

        if let [_, high] = widths[..] {
            // Each set is for the layers of its width: here those of the higher one alone.
            model.compensate(Some(&by_width(&[(1, 0), (1, 1024)]))).expect("plans");
            let got = logits(&model, &want.input, true);
            let raised = |layer| opened.weights().bits(layer) == Some(high);
            let off = difference(&got, &exact.some_residuals(raised).logits(&ids(&want.input)));
            assert!(off <= tolerance, "{name}: with {high}-bit layers compensated, logits are off by {off}");
            for other in [&want.base, &want.all_residuals] {
                assert!(largest_difference(&got, other) > 2.0 * tolerance, "{name}: eight k_chunks act as four");
            }
        }
    }
}

/// The text that the model makes is the oracle's, up to a choice between two tokens that roundings decide.
fn greedy<B: UnderTest>(model: &Model<'_, B>, want: &Expected, exact: &Exact, name: &str) {
    let mut state = model.state(1, want.input.len() + want.greedy.len()).expect("room");
    let made = made(model, &mut state, &want.input, want.greedy.len(), false);
    if let Some(i) = made.iter().zip(&want.greedy).position(|(made, want)| made != want) {
        let text = [&want.input[..], &want.greedy[..i]].concat();
        let logits = exact.base.logits(&ids(&text));
        let last = &logits[logits.len() - model.config().vocab_size..];
        let gap = (last[made[i] as usize] - last[want.greedy[i] as usize]).abs();
        let (made, want) = (made[i], want.greedy[i]);
        assert!(gap <= 2.0 * exact.tolerance, "{name}: token {i} is {made}, {want} is expected, {gap} apart");
        eprintln!("{name}: token {i} is {made}, not {want}: {gap} apart, which roundings decide");
    }
}
