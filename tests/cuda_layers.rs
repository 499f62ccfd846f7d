//! Whole layers in one launch: against the CPU backend, against themselves, and what they do where they may not.
//!
//! Runs where `DECDEC_TEST_DEVICES` names `cuda`; then a missing device fails.

mod changed;
mod cuda_common;

use anyhow::Result;
use changed::{Change, Changed};
use cuda_common::{cuda, distance, options, small};
use decdec::backend::cpu::Cpu;
use decdec::backend::cuda::{Card, Cuda, Dtype, Options, Tuning};
use decdec::backend::{DecodeBackend, GemvBackend};
use decdec::config::{Attention, LayerNorm, ModelConfig};
use decdec::dec::Selection;
use decdec::format::Storage;
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::random::RandomWeights;
use decdec::sampling::Sampling;
use decdec::weights::ModelWeights;
use serde_json::{Value, json};

/// A model compensated by at most `n_tb` blocks.
fn compensated<'b, B: DecodeBackend>(
    backend: &'b B,
    weights: &RandomWeights,
    k_chunks: [usize; 4],
    n_tb: usize,
    selection: Selection,
) -> Model<'b, B> {
    let mut model = Model::load(backend, weights, |_| ()).unwrap();
    let by_bits = vec![LayerCompensation { n_tb: backend.device().max_n_tb.min(n_tb), k_chunks }];
    model.compensate(Some(&Compensation { by_bits, selection })).unwrap();
    model
}

/// Logits behind each of `tokens` that are read one at a time, as when decoding.
fn logits_behind<B: DecodeBackend>(backend: &B, model: &Model<'_, B>, tokens: impl Iterator<Item = u32>) -> Vec<f32> {
    let tokens: Vec<u32> = tokens.collect();
    let mut state = model.state(1, tokens.len()).unwrap();
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
    let mut logits = backend.vector(1000).unwrap();
    let mut all = Vec::new();
    for token in tokens {
        model.logits(&mut state, 0, &[token], true, &mut logits).unwrap();
        let mut values = vec![0f32; 1000];
        backend.read(&logits, &mut values).unwrap();
        all.extend(values);
    }
    all
}

/// The same of a new model and `count` tokens.
fn step_logits<B: DecodeBackend>(backend: &B, weights: &RandomWeights, k_chunks: [usize; 4], count: u32) -> Vec<f32> {
    let model = compensated(backend, weights, k_chunks, 5, Selection::Bucket);
    logits_behind(backend, &model, (0..count).map(|i| i * 37 % 1000))
}

/// Shapes, bits and format of a model whose layers go in one launch.
type LayersCase = (ModelConfig, usize, Storage);

/// Fails if logits are `most` or more from those wanted, or if those without compensation, where there are any, are not
/// clearly farther.
fn close(what: &str, got: &[f32], want: &[f32], most: f64, plain: Option<&[f32]>) {
    let far = distance(got, want);
    eprintln!("{what}: {far:.2e}");
    assert!(far < most, "{what}: logits {far} apart, {most} allowed");
    if let Some(plain) = plain.map(|plain| distance(plain, want)) {
        assert!(plain > 2.0 * far, "{what}: compensation changes nothing: {plain} against {far}");
    }
}

/// What `layers_against_cpu` allows in float16: without compensation, and with, where rounded activations now and then select
/// another channel, which moves a row by a whole residual. bfloat16 rounds eight times as coarsely.
const FLOAT16: [f64; 2] = [5e-3, 2e-2];
const BFLOAT16: [f64; 2] = [8.0 * FLOAT16[0], 8.0 * FLOAT16[1]];

/// The same configuration with other fields.
fn changed(config: ModelConfig, fields: Value) -> ModelConfig {
    config.with(fields).unwrap()
}

/// Layers in one launch against the CPU, with each of `k_chunks`; again, and without compensation.
fn layers_against_cpu(
    cuda: &Cuda,
    (config, bits, format): LayersCase,
    k_chunks: &[[usize; 4]],
    count: u32,
    [most, most_compensated]: [f64; 2],
) {
    let (layer, hidden) = (&config.layers[0], config.hidden_size);
    let Attention { window, num_kv_heads, .. } = layer.attention();
    let shapes = format!("{hidden} × {}, window {window:?}, {num_kv_heads} kv heads", layer.intermediate_size());
    let weights = RandomWeights::new(config, format, bits, 5).unwrap();
    for &k_chunks in k_chunks {
        let want = step_logits(&Cpu::new(), &weights, k_chunks, count);
        let got = step_logits(cuda, &weights, k_chunks, count);
        let what = format!("{format:?} {bits} bits, {shapes}, {k_chunks:?}");
        assert_eq!(got, step_logits(cuda, &weights, k_chunks, count), "{what}: another time, other logits");
        let compensated = k_chunks != [0; 4];
        let plain = compensated.then(|| step_logits(cuda, &weights, [0; 4], count));
        close(&what, &got, &want, if compensated { most_compensated } else { most }, plain.as_deref());
    }
}

/// Layers in one launch, with every combination of compensated projections, against the CPU and against the
/// operations one by one.
#[test]
fn layers_in_one_launch_are_close_to_the_cpu() {
    let tuning = Tuning { one_launch: Some(true), ..Tuning::default() };
    let Some(cuda) = cuda(Options { tuning, ..options(Dtype::Float16, 2) }) else { return };
    for case in [
        (small(None, 2), 3, Storage::ANYPREC),
        (small(Some(20), 3), 4, Storage::ANYPREC),
        (small(None, 6), 3, Storage::lutgemm(32)),
        (small(None, 1), 4, Storage::lutgemm(32)),
    ] {
        layers_against_cpu(&cuda, case, &[[0; 4], [32; 4], [0, 0, 24, 0], [0, 40, 0, 16], [16, 0, 0, 0]], 70, FLOAT16);
    }
}

/// bfloat16.
#[test]
fn layers_in_one_launch_in_bfloat16_are_close_to_the_cpu() {
    let tuning = Tuning { one_launch: Some(true), ..Tuning::default() };
    let Some(mut cuda) = cuda(Options { tuning, ..options(Dtype::Bfloat16, 2) }) else { return };
    cuda.watch_layers().unwrap();
    let heads = changed(small(None, 2), json!({ "num_attention_heads": 8, "head_dim": 128 }));
    for case in [
        (small(Some(20), 2), 3, Storage::ANYPREC),
        (small(None, 3), 4, Storage::ANYPREC),
        (small(None, 6), 3, Storage::lutgemm(32)),
        (heads, 4, Storage::lutgemm(32)),
    ] {
        layers_against_cpu(&cuda, case, &[[0; 4], [64; 4], [0, 0, 128, 0]], 70, BFLOAT16);
    }
    assert!(!cuda.timeline().unwrap().is_empty(), "the layers went operation by operation");
}

/// More compensating blocks than a product has rows for: those that would have none are not there.
#[test]
fn blocks_without_rows_do_not_compensate() {
    let tuning = Tuning { one_launch: Some(true), ..Tuning::default() };
    let Some(mut cuda) = cuda(Options { tuning, ..options(Dtype::Float16, 2) }) else { return };
    cuda.watch_layers().unwrap();
    let weights = RandomWeights::new(small(None, 2), Storage::ANYPREC, 3, 5).unwrap();
    let text = || (0..150).map(|i| i * 37 % 1000);
    for k_chunks in [[32; 4], [0, 0, 24, 0], [0, 40, 0, 0]] {
        let want =
            logits_behind(&Cpu::new(), &compensated(&Cpu::new(), &weights, k_chunks, 5, Selection::Bucket), text());
        let plain = logits_behind(&cuda, &compensated(&cuda, &weights, [0; 4], 1, Selection::Bucket), text());
        // o and down have 576 rows, which are enough for 18 blocks.
        for n_tb in [18, 19, 40, 100] {
            let model = compensated(&cuda, &weights, k_chunks, n_tb, Selection::Bucket);
            let got = logits_behind(&cuda, &model, text());
            let what = format!("{k_chunks:?}, n_tb {n_tb}");
            close(&what, &got, &want, FLOAT16[1], Some(&plain));
            assert_eq!(got, logits_behind(&cuda, &model, text()), "{what}: another time, other logits");
        }
    }
    assert!(!cuda.timeline().unwrap().is_empty(), "the layers went operation by operation");
}

/// A device that will not hold all blocks of a launch at once, from the first token on or from the first recorded one on:
/// layers go operation by operation then, and the text is the one that they give.
#[test]
fn a_refused_launch_is_done_without() {
    let weights = RandomWeights::new(small(None, 2), Storage::ANYPREC, 3, 5).unwrap();
    let text = |cuda: &Cuda, refused_from: Option<usize>| {
        let model = compensated(cuda, &weights, [32; 4], 5, Selection::Bucket);
        let mut state = model.state(1, 40).unwrap();
        cuda.overfill(refused_from == Some(0));
        model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
        model.prompt(&mut state, 0, &[5], true).unwrap();
        for i in 1..20 {
            cuda.overfill(refused_from.is_some_and(|from| i >= from));
            model.step(&mut state, &[0]).unwrap();
        }
        (0..20).map(|i| model.sampled(&state, 0, i).unwrap()).collect::<Vec<_>>()
    };
    let device = |one_launch| {
        let tuning = Tuning { one_launch: Some(one_launch), ..Tuning::default() };
        let mut cuda = cuda(Options { tuning, ..options(Dtype::Float16, 2) })?;
        cuda.watch_layers().unwrap();
        Some(cuda)
    };
    let Some(single) = device(false) else { return };
    let want = text(&single, None);
    assert!(single.timeline().unwrap().is_empty(), "the layers went in one launch");
    // 1: when the first token is queued as it is; 2: when the operations of one are recorded; 3: when they are replayed,
    // which is not refused any more.
    for refused_from in 0..4 {
        let cuda = device(true).unwrap();
        assert_eq!(text(&cuda, Some(refused_from)), want, "refused from token {refused_from} on");
        assert_eq!(cuda.timeline().unwrap().is_empty(), refused_from == 0, "from token {refused_from} on");
    }
}

/// A model whose γ before the feed-forward part are `factor` times as large.
struct Louder<'a>(&'a RandomWeights, f32);

impl Change for Louder<'_> {
    fn of(&self) -> &dyn ModelWeights {
        self.0
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        let by = if norm == LayerNorm::FeedForwardInput { self.1 } else { 1.0 };
        Ok(self.0.norm(layer, norm)?.into_iter().map(|gamma| gamma * by).collect())
    }
}

/// Activations that float16 does not hold, where they are float16: between gate-up and down in one launch, and in products of
/// many tokens. Its largest number is taken for them, and that is said.
#[test]
fn activations_beyond_float16_do_not_become_nan() {
    let weights = RandomWeights::new(small(None, 2), Storage::ANYPREC, 3, 5).unwrap();
    for (dtype, one_launch, factor, alone, many) in [
        (Dtype::Float16, true, 1e3, true, true),
        (Dtype::Float16, false, 1e3, false, true),
        // What is normalized is beyond itself.
        (Dtype::Float16, true, 1e5, true, true),
        (Dtype::Float16, false, 1e5, false, true),
        (Dtype::Float16, true, 1.0, false, false),
        (Dtype::Float16, false, 1.0, false, false),
        (Dtype::Bfloat16, true, 1e5, false, false),
        (Dtype::Float32, false, 1e5, false, false),
    ] {
        let what = format!("{dtype:?}, in one launch: {one_launch}, γ times {factor}");
        let tuning = Tuning { one_launch: Some(one_launch), ..Tuning::default() };
        let Some(cuda) = cuda(Options { tuning, ..options(dtype, 2) }) else { return };
        let model = Model::load(&cuda, &Changed(Louder(&weights, factor)), |_| ()).unwrap();
        let one_by_one = logits_behind(&cuda, &model, (0..5).map(|i| i * 37 % 1000));
        assert!(one_by_one.iter().all(|logit| logit.is_finite()), "{what}");
        assert_eq!(cuda.went_beyond(), alone, "{what}");
        // Many at once go through other kernels.
        let mut state = model.state(1, 64).unwrap();
        model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
        let mut logits = cuda.vector(40 * 1000).unwrap();
        model.logits(&mut state, 0, &[7; 40], true, &mut logits).unwrap();
        let mut values = vec![0f32; 40 * 1000];
        cuda.read(&logits, &mut values).unwrap();
        assert!(values.iter().all(|logit| logit.is_finite()), "{what}, 40 tokens at once");
        assert_eq!(cuda.went_beyond(), many, "{what}, 40 tokens at once");
    }
}

/// Heads of 64 and 128 dimensions, whose scores and results are the tensor cores' (`attend_tensor.cuh`): three queries to a
/// key, four, and eight; in one launch and operation by operation.
#[test]
fn attention_on_tensor_cores_is_close_to_the_cpu() {
    let heads = |window, heads, kv_heads, head_dim| {
        changed(small(window, kv_heads), json!({ "num_attention_heads": heads, "head_dim": head_dim }))
    };
    for one_launch in [true, false] {
        let tuning = Tuning { one_launch: Some(one_launch), ..Tuning::default() };
        let Some(cuda) = cuda(Options { tuning, ..options(Dtype::Float16, 2) }) else { return };
        for config in [heads(None, 6, 2, 64), heads(Some(40), 8, 2, 128), heads(None, 8, 1, 128)] {
            layers_against_cpu(&cuda, (config, 3, Storage::ANYPREC), &[[0; 4], [16, 0, 0, 0]], 150, FLOAT16);
        }
    }
}

/// A text that goes round a window's cache, which has room for the window (in tiles of 16): in one launch and operation by
/// operation.
#[test]
fn texts_go_round_a_window_s_cache() {
    let of = |window| ModelConfig { max_position_embeddings: 640, ..small(Some(window), 2) };
    let text = || (0..640).map(|i| i * 37 % 1000);
    let ends = |logits: Vec<f32>| logits[560 * 1000..].to_vec();
    let on_cpu = |window| {
        let weights = RandomWeights::new(of(window), Storage::ANYPREC, 3, 5).unwrap();
        let cpu = Cpu::new();
        ends(logits_behind(&cpu, &compensated(&cpu, &weights, [0; 4], 1, Selection::Bucket), text()))
    };
    let mut wanted = None;
    for one_launch in [true, false] {
        let tuning = Tuning { one_launch: Some(one_launch), ..Tuning::default() };
        let Some(mut cuda) = cuda(Options { tuning, ..options(Dtype::Float16, 2) }) else { return };
        cuda.watch_layers().unwrap();
        let (want, wider) = wanted.get_or_insert_with(|| (on_cpu(20), on_cpu(40)));
        let weights = RandomWeights::new(of(20), Storage::ANYPREC, 3, 5).unwrap();
        let got = ends(logits_behind(&cuda, &compensated(&cuda, &weights, [0; 4], 1, Selection::Bucket), text()));
        close(&format!("a ring, in one launch: {one_launch}"), &got, want, FLOAT16[0], None);
        assert!(distance(wider, want) > 4.0 * FLOAT16[0], "a wider window changes nothing");
        assert_eq!(!cuda.timeline().unwrap().is_empty(), one_launch, "the layers in one launch");
    }
}

/// Layers in one launch in a few tokens on a few multiprocessors, where down's tiles begin in one block and end in the
/// next: what a sanitizer has the time for. The last two have more chunks than a block selects at once, of down and of what is
/// normalized: the blocks share them out.
#[test]
fn a_few_layers_in_one_launch() {
    let tuning = Tuning { one_launch: Some(true), ..Tuning::default() };
    let few = || cuda(Options { tuning, card: Some(Card::of_multiprocessors(24)), ..options(Dtype::Float16, 2) });
    let groups = Storage::lutgemm(32);
    for case in [
        (small(None, 2), 3, Storage::ANYPREC),
        (small(None, 6), 4, groups),
        (changed(small(None, 3), json!({ "intermediate_size": 5152, "num_hidden_layers": 2 })), 3, Storage::ANYPREC),
        (changed(small(None, 2), json!({ "hidden_size": 4640, "num_hidden_layers": 1 })), 3, groups),
    ] {
        let Some(mut cuda) = few() else { return };
        cuda.watch_layers().unwrap();
        layers_against_cpu(&cuda, case, &[[0; 4], [32; 4]], 4, FLOAT16);
        assert!(!cuda.timeline().unwrap().is_empty(), "the layers went operation by operation");
    }
}

/// Where a selection begins to look follows from selections before it (`stripe.cuh`); what it finds does not. The last takes
/// every channel with one block: more at once than shared memory has room for.
#[test]
fn texts_do_not_depend_on_those_before() {
    let tuning = Tuning { one_launch: Some(true), ..Tuning::default() };
    let Some(mut cuda) = cuda(Options { tuning, ..options(Dtype::Float16, 2) }) else { return };
    cuda.watch_layers().unwrap();
    let config =
        changed(small(None, 2), json!({ "hidden_size": 2080, "intermediate_size": 5152, "num_hidden_layers": 2 }));
    let weights = RandomWeights::new(config, Storage::ANYPREC, 3, 7).unwrap();
    for (selection, k_chunk, n_tb) in
        [(Selection::Bucket, 8, 5), (Selection::Exact, 8, 5), (Selection::Bucket, 28, 5), (Selection::Bucket, 1024, 1)]
    {
        let what = format!("{selection:?}, k_chunk {k_chunk}");
        let one = || (0..12).map(|i| i * 37 % 1000);
        let model = compensated(&cuda, &weights, [k_chunk; 4], n_tb, selection);
        let first = logits_behind(&cuda, &model, one());
        let other = logits_behind(&cuda, &model, (0..12).map(|i| (i * 53 + 400) % 1000));
        assert!(distance(&first, &other) > 0.1, "{what}: two texts, the same logits");
        assert_eq!(first, logits_behind(&cuda, &model, one()), "{what}: other logits after another text");
        let cpu = Cpu::new();
        let want = logits_behind(&cpu, &compensated(&cpu, &weights, [k_chunk; 4], n_tb, selection), one());
        let plain = logits_behind(&cuda, &compensated(&cuda, &weights, [0; 4], n_tb, selection), one());
        close(&what, &first, &want, 2e-2, Some(&plain));
    }
    assert!(!cuda.timeline().unwrap().is_empty(), "the layers went operation by operation");
}

/// Two tokens of a model of two layers, with blocks of `warps` warps: what a sanitizer that watches shared memory has the time
/// for.
fn two_tokens(warps: usize) {
    let tuning = Tuning { one_launch: Some(true), layers: Some(warps), ..Tuning::default() };
    let Some(mut cuda) =
        cuda(Options { tuning, card: Some(Card::of_multiprocessors(24)), ..options(Dtype::Float16, 2) })
    else {
        return;
    };
    cuda.watch_layers().unwrap();
    let config = changed(small(None, 2), json!({ "num_hidden_layers": 2 }));
    layers_against_cpu(&cuda, (config, 3, Storage::ANYPREC), &[[0; 4], [32; 4]], 2, FLOAT16);
    assert!(!cuda.timeline().unwrap().is_empty(), "the layers went operation by operation");
}

#[test]
fn two_tokens_by_sixteen_warps() {
    two_tokens(16);
}

#[test]
fn two_tokens_by_eight_warps() {
    two_tokens(8);
}
