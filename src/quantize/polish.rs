//! The closing step: codebooks of all layers together, so that the compensated model says what full precision does.
//!
//! Layer by layer, every error counts alike; what it does to the predictions does not. So, with codes as they are,
//! codebooks follow the gradient of the Kullback-Leibler divergence from the full-precision model's predictions over
//! the calibration text (EfficientQAT trains steps end to end, Chen et al. 2024, §3.3), a few windows a step, by Adam
//! (Kingma and Ba, 2015). What a compensated channel is multiplied by, codes and residual together, stays as it is while
//! they move. Towards the end the forward pass takes codebooks as they are stored, bytes of a row's range, so that what is
//! learned last makes up for the rounding. Then residuals are made anew.
//!
//! One layer is in memory at a time, or all of them where they are small, beside what a step's windows leave in each of
//! them on the way up.
//! Only AnyPrec: of LUT-GEMM's layers the originals that AWQ scaled are not kept.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use half::f16;
use rayon::prelude::*;

use super::backward::{Compensated, trace_bytes};
use super::calibrate::Activations;
use super::compute::{Coded, Compute, Tensor};
use super::fit;
use super::forward::{Affine, Layer, Placed, Ropes};
use super::head::LmHead;
use super::host::{Host, stand_for};
use super::job::Job;
use super::sample::layers_stay;
use crate::config::{ModelConfig, Projection};
use crate::format::{AnyPrec, Residual, Storage, bytes};
use crate::progress::Silent;
use crate::sampling;
use crate::weights::{Linear, Weight};

/// File of what was learned: the codebooks of every layer, f32, little-endian.
const LEARNED: &str = "codebooks.bin";
/// A step moves centroids by about this share of the codebook's root mean square, divided by how many there are:
/// the more there are, the less lies between them.
const RATE: f32 = 0.0288;
/// The rate grows over so many steps, and then falls to 0.
const WARMUP: f32 = 3.0;
/// Adam's memory for the gradient and its square.
const MEMORY: [f32; 2] = [0.9, 0.95];
/// Slopes well below this move nothing: their squares vanish in f32, they themselves do not.
const SILENT: f32 = 1e-20;
/// Longest derivative of a token, in medians of its window.
const LONGEST: f64 = 3.0;
/// Seed of the order in which windows are read.
const SHUFFLE: u64 = 1;
/// A token and a layer take about as long as so many that only pass: up, and twice that down.
pub(super) const STEP_PASSES: u64 = 3;
/// The share of steps that take codebooks as they are stored: the last ones.
const STORED: f32 = 1.0 / 3.0;

/// Steps that are enough: of more text a step reads several windows.
const STEPS: usize = 160;
/// Bytes that the windows of a step leave for the way back, unless one alone leaves more.
pub(super) const TRACES: usize = 4 << 30;

/// How many windows are read: all of the text, and half of it again.
pub(super) fn steps(windows: usize) -> usize {
    (windows * 3).div_ceil(2)
}

/// Codebooks of a layer's projections, each `[out_features, 2^bits]`.
type Codebooks = [Vec<f32>; 4];

/// What was read of a layer's projections.
type Kept = [OnceCell<Coded>; 4];

/// Adam's means of a codebook's gradient and of its square.
#[derive(Debug, Clone, Default)]
struct Means(Vec<f32>, Vec<f32>);

/// Learns the codebooks of all layers, of these `bits`, and writes the layers anew.
///
/// # Errors
/// [`super::Interrupted`]; the next attempt learns from the beginning, or, if only writing was left, goes on with that.
pub(super) fn polish(job: &Job<'_>, ids: &[u32], bits: &[u32]) -> Result<()> {
    job.progress.set_message("learning codebooks");
    let work = job.learning_work();
    let mut learned = bits.iter().enumerate().map(|(i, &bits)| begin(job, i, bits)).collect::<Result<Vec<_>>>()?;
    if restore(job, &mut learned) {
        job.progress.inc(work);
    } else {
        learn(job, ids, bits, &mut learned)?;
        let numbers = learned.iter().flatten().flatten();
        let bytes: Vec<u8> = numbers.flat_map(|x| x.to_le_bytes()).collect();
        job.writer.write_file(LEARNED, &bytes)?;
    }
    write(job, ids, bits, &learned)
}

/// The codebooks as they are.
fn begin(job: &Job<'_>, index: usize, bits: u32) -> Result<Codebooks> {
    let (config, file) = (job.source.config(), job.writer.layer(index, bits)?);
    Projection::each(|projection| {
        let linear = file.projection(projection, config, Storage::ANYPREC)?;
        Ok(anyprec(&linear)?.lut().to_f32().into_owned())
    })
}

fn anyprec<'a, 'b>(linear: &'a Linear<'b>) -> Result<&'a AnyPrec<'b>> {
    match &linear.weight {
        Weight::AnyPrec(weight) => Ok(weight),
        _ => bail!("codebooks are learned of AnyPrec only"),
    }
}

/// Takes what an interrupted run has learned; false if it has not come that far.
fn restore(job: &Job<'_>, learned: &mut [Codebooks]) -> bool {
    let mut lists: Vec<&mut Vec<f32>> = learned.iter_mut().flatten().collect();
    let len: usize = lists.iter().map(|list| 4 * list.len()).sum();
    let Some(bytes) = job.writer.read_file(LEARNED).filter(|bytes| bytes.len() == len) else { return false };
    let numbers = bytes.as_chunks::<4>().0;
    lists.iter_mut().flat_map(|list| list.iter_mut()).zip(numbers).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
    true
}

fn learn(job: &Job<'_>, ids: &[u32], bits: &[u32], learned: &mut [Codebooks]) -> Result<()> {
    let (config, seq_len) = (job.source.config(), job.options.calibration.seq_len);
    let ropes = Ropes::new(config, seq_len);
    // Half precision, as they are stored in the end.
    let (embedding, head) = (super::halved(job.source.embedding()?), job.source.head()?.map(super::halved));
    let lm_head = LmHead::new(job.source, head.as_ref().unwrap_or(&embedding))?;
    let lm_head = job.on.head(&lm_head)?;
    let truth = truth(job, ids)?;
    let kept = if layers_stay(config) { bits.len() } else { 0 };
    let kept: Vec<Kept> = std::iter::repeat_with(Kept::default).take(kept).collect();
    let mut means: Vec<[Means; 4]> =
        learned.iter().map(|l| l.each_ref().map(|l| Means(vec![0.0; l.len()], vec![0.0; l.len()]))).collect();
    let (order, hidden) = (order(ids.len() / seq_len), config.hidden_size);
    let groups: Vec<&[usize]> = order.chunks(at_once(config, order.len(), seq_len)).collect();
    let start = Instant::now();
    for (step, windows) in groups.iter().enumerate() {
        let stored = (groups.len() - step) as f32 <= STORED * groups.len() as f32;
        let (texts, tokens) = ((windows.len(), seq_len), windows.len() * seq_len);
        let of_windows = windows.iter().map(|&window| &ids[window * seq_len..][..seq_len]);
        let ids = of_windows.collect::<Vec<_>>().concat();
        let of_windows = windows.iter().map(|&window| &truth[window * seq_len * hidden..][..seq_len * hidden]);
        let truth = of_windows.collect::<Vec<_>>().concat();
        let mut h = job.on.put(Activations::embed(config, &embedding, &ids, seq_len)?.h)?;
        let mut traces = Vec::with_capacity(bits.len());
        for (index, (learned, &bits)) in learned.iter().zip(bits).enumerate() {
            super::ensure_running(job.stop)?;
            let layer = read(job, (index, bits), learned, stored, kept.get(index))?;
            let (trace, _) = layer.forward(job.on, config, &ropes, texts, &mut h)?;
            traces.push(trace);
            job.progress.inc(tokens as u64);
        }
        let up = start.elapsed();
        let (loss, mut d) = lm_head.divergence(&truth, &h)?;
        drop(h);
        tracing::debug!("step {step}, windows {windows:?}: divergence {loss:.5}; {up:.1?}, {:.1?}", start.elapsed());
        d.chunks_exact_mut(seq_len * hidden).for_each(|d| even_out(d, hidden));
        let mut d = job.on.put(d)?;
        let rate = RATE * ((step + 1) as f32 / WARMUP).min(1.0) * (1.0 - step as f32 / groups.len() as f32);
        while let Some(trace) = traces.pop() {
            super::ensure_running(job.stop)?;
            let index = traces.len();
            let layer = read(job, (index, bits[index]), &learned[index], stored, kept.get(index))?;
            let gradients = layer.backward(job.on, config, &ropes, texts, trace, &mut d)?;
            let each = learned[index].iter_mut().zip(&mut means[index]).zip(layer.projections.iter().zip(&gradients));
            for ((l, means), (projection, gradient)) in each {
                let slopes = job.on.slopes(projection, 1 << bits[index], gradient)?;
                follow(1 << bits[index], l, means, &slopes, rate, step);
            }
            job.progress.inc(2 * tokens as u64);
        }
    }
    Ok(())
}

/// Windows that a step reads together, of so many that are read in all: one, until there are [`STEPS`]; as many as leave no
/// more for the way back than [`TRACES`] bytes.
pub(super) fn at_once(config: &ModelConfig, windows: usize, seq_len: usize) -> usize {
    let window = seq_len * (0..config.layers.len()).map(|layer| trace_bytes(config, layer)).sum::<usize>();
    windows.div_ceil(STEPS).min(TRACES / window.max(1)).max(1)
}

/// The windows in the order in which they are read: all, then half of them again, each time shuffled, as what comes last
/// counts most.
fn order(windows: usize) -> Vec<usize> {
    let shuffled = |round: u64| {
        let draws = sampling::draws(SHUFFLE + round, windows);
        let mut order: Vec<usize> = (0..windows).collect();
        order.sort_by(|&a, &b| draws[a].total_cmp(&draws[b]));
        order
    };
    let mut order = [shuffled(0), shuffled(1)].concat();
    order.truncate(steps(windows));
    order
}

/// Evens out a derivative, `[tokens, hidden_size]`: no token's is longer than [`LONGEST`] times the median, and all of it
/// has length 1. A text that is unlike the rest, and the few tokens in it that went most wrong, count no more than others.
fn even_out(d: &mut [f32], hidden_size: usize) {
    let length = |d: &[f32]| d.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let lengths: Vec<f64> = d.par_chunks_exact(hidden_size).map(length).collect();
    let mut sorted = lengths.clone();
    sorted.sort_unstable_by(f64::total_cmp);
    let most = LONGEST * sorted[sorted.len() / 2];
    let whole = lengths.iter().map(|l| l.min(most).powi(2)).sum::<f64>().sqrt();
    if whole == 0.0 {
        return;
    }
    d.par_chunks_exact_mut(hidden_size).zip(lengths).for_each(|(d, length)| {
        let by = if length > most { most / length / whole } else { 1.0 / whole };
        d.iter_mut().for_each(|x| *x = (f64::from(*x) * by) as f32);
    });
}

/// What leaves the last layer in full precision, `[ids, hidden_size]`: as it was kept when the last layer was made.
fn truth(job: &Job<'_>, ids: &[u32]) -> Result<Vec<f32>> {
    let config = job.source.config();
    let (first, mut truth) = job.activations(ids)?;
    let ropes = Ropes::new(config, truth.tokens);
    for index in first..config.layers.len() {
        let layer = Layer::read(job.source, index)?;
        let layer = Placed::new(job.on, &layer)?;
        truth.advance(job.on, config, &layer, &ropes, &mut [], job.stop, &Silent)?;
    }
    Ok(truth.h)
}

/// One step of Adam: codebooks of `levels` against the derivatives by them, `slopes`.
fn follow(levels: usize, codebooks: &mut [f32], means: &mut Means, slopes: &[f32], rate: f32, step: usize) {
    // Means that begin at 0 are too small at first.
    let [first, second] = MEMORY.map(|memory| (memory, 1.0 - memory.powi(step as i32 + 1)));
    let rows = codebooks.par_chunks_exact_mut(levels).zip(slopes.par_chunks_exact(levels));
    let means = means.0.par_chunks_exact_mut(levels).zip(means.1.par_chunks_exact_mut(levels));
    rows.zip(means).for_each(|((codebook, slopes), (mean, square))| {
        let size = (codebook.iter().map(|c| c * c).sum::<f32>() / levels as f32).sqrt();
        for (((c, slope), mean), square) in codebook.iter_mut().zip(slopes).zip(mean).zip(square) {
            *mean = first.0 * *mean + (1.0 - first.0) * slope;
            *square = second.0 * *square + (1.0 - second.0) * slope * slope;
            *c -= rate / levels as f32 * size * (*mean / first.1) / ((*square / second.1).sqrt() + SILENT);
        }
    });
}

/// A layer of so many bits with these codebooks, rounded if `stored`, where it is trained. What was read of it before is
/// in `kept`, if it is kept.
fn read<'a>(
    job: &'a Job<'_>,
    (index, bits): (usize, u32),
    learned: &Codebooks,
    stored: bool,
    kept: Option<&Kept>,
) -> Result<Compensated<'a>> {
    let (config, file) = (job.source.config(), job.writer.layer(index, bits)?);
    let projections = Projection::each(|projection| {
        let codebook = &learned[projection.index()];
        let codebook = if stored { Cow::Owned(rounded(codebook, 1 << bits)) } else { Cow::Borrowed(codebook) };
        let known = kept.map(|kept| &kept[projection.index()]);
        job.on.trained((index, projection), &codebook, &mut || {
            if let Some(coded) = known.and_then(OnceCell::get) {
                return Ok(coded.clone());
            }
            let linear = file.projection(projection, config, Storage::ANYPREC)?;
            let residual = linear.residual.as_ref().context("a layer without residuals")?;
            let coded = coded(anyprec(&linear)?, residual, linear.bias.as_deref())?;
            if let Some(known) = known {
                known.get_or_init(|| coded.clone());
            }
            Ok(coded)
        })
    })?;
    Ok(Compensated {
        config: &config.layers[index],
        norms: file.norms(config)?,
        projections,
        in_features: config.shapes(index).map(|(inputs, _)| inputs),
        k_chunks: job.options.refine.k_chunks(bits, job.manifest.bits),
    })
}

/// A projection's codes, and what its compensated channels are multiplied by: what they stand for and the residual.
fn coded(weight: &AnyPrec<'_>, residual: &Residual<'_>, bias: Option<&[f32]>) -> Result<Coded> {
    let (n, m) = (weight.in_features(), weight.out_features());
    let codes = codes(weight);
    let mut whole = stand_for(&weight.lut().to_f32(), &codes, n, m);
    let scales: Vec<f32> = (0..m).map(|row| residual.scales().get(row)).collect();
    // Eight rows share the words of a residual.
    let rows = whole.par_chunks_exact_mut(8 * n).zip(scales.par_chunks_exact(8)).enumerate();
    rows.for_each(|(block, (rows, scales))| {
        for (k, &word) in residual.words().iter().skip(block).step_by(m / 8).enumerate() {
            for (i, scale) in scales.iter().enumerate() {
                rows[i * n + k] += scale * ((word >> (4 * i) & 15) as f32 - 8.0);
            }
        }
    });
    let original = Affine { in_features: n, out_features: m, weight: whole, bias: bias.map(<[f32]>::to_vec) };
    Ok(Coded { original: Arc::new(original), codes: Arc::new(codes) })
}

/// What a step does with a projection besides products, to be timed; the result is discarded. The projection is read on
/// the way up and on the way down, and its codebook follows a derivative.
pub(super) fn time_step(weight: &Weight<'_>, original: &Affine) -> Result<()> {
    let Weight::AnyPrec(weight) = weight else { bail!("codebooks are learned of AnyPrec only") };
    let (codebook, levels) = (weight.lut().to_f32().into_owned(), 1 << weight.bits());
    let mut means = Means(vec![0.0; codebook.len()], vec![0.0; codebook.len()]);
    let mut learned = codebook;
    let gradient = Tensor::F32(original.weight.clone());
    let original = Arc::new(original.clone());
    let read = |learned: &[f32]| {
        let mut coded = || Ok(Coded { original: Arc::clone(&original), codes: Arc::new(codes(weight)) });
        Host.trained((0, Projection::Qkv), learned, &mut coded)
    };
    read(&learned)?;
    let slopes = Host.slopes(&read(&learned)?, levels, &gradient)?;
    follow(levels, &mut learned, &mut means, &slopes, RATE, 0);
    Ok(())
}

/// `[out_features, in_features]`
fn codes(weight: &AnyPrec<'_>) -> Vec<u8> {
    let mut codes = vec![0; weight.in_features() * weight.out_features()];
    let rows = codes.par_chunks_exact_mut(weight.in_features()).enumerate();
    rows.for_each(|(row, codes)| weight.codes(row, codes));
    codes
}

/// Codebooks `[out_features, levels]` as they are stored.
fn rounded(codebooks: &[f32], levels: usize) -> Vec<f32> {
    let mut codebooks = codebooks.to_vec();
    codebooks.par_chunks_exact_mut(levels).for_each(bytes::round);
    codebooks
}

/// Writes all layers with what was learned, their codes as they are, and residuals for that: writing them twice changes
/// nothing.
fn write(job: &Job<'_>, ids: &[u32], bits: &[u32], learned: &[Codebooks]) -> Result<()> {
    let (config, seq_len) = (job.source.config(), job.options.calibration.seq_len);
    let ropes = Ropes::new(config, seq_len);
    let mut activations = Activations::embed(config, &job.source.embedding()?, ids, seq_len)?;
    for (index, (learned, &bits)) in learned.iter().zip(bits).enumerate() {
        let layer = Layer::read(job.source, index)?;
        let mut entered: Vec<_> =
            Projection::ALL.iter().map(|&p| job.entered(&layer, p, false)).collect::<Result<_>>()?;
        let placed = Placed::new(job.on, &layer)?;
        activations.advance(job.on, config, &placed, &ropes, &mut entered, job.stop, job.progress)?;
        drop(placed);
        let file = job.writer.layer(index, bits)?;
        let k_chunks = job.options.refine.k_chunks(bits, job.manifest.bits);
        let linears = Projection::each(|projection| {
            super::ensure_running(job.stop)?;
            let (linear, x) = (layer.linear(projection), &*entered[projection.index()]);
            let (n, m) = (linear.in_features, linear.out_features);
            let stored = file.projection(projection, config, Storage::ANYPREC)?;
            let codebook = rounded(&learned[projection.index()], 1 << bits);
            let codebook: Vec<f16> = codebook.into_iter().map(f16::from_f32).collect();
            let planes = anyprec(&stored)?.planes().to_vec();
            let weight = Weight::AnyPrec(AnyPrec::new(n, m, bits as usize, planes.into(), codebook.into())?);
            let k_chunk = k_chunks[projection.index()];
            let together = (k_chunk > 0).then(|| x.together(k_chunk)).transpose()?;
            let taken = together.as_ref().map_or_else(|| vec![0.0; n], |together| together.energy().to_vec());
            // What enters has not changed.
            let thresholds = stored.thresholds.as_deref().context("a layer without thresholds")?.to_vec();
            super::finish(linear, weight, thresholds, &fit::weigh(&taken, &x.energy()?), together.map(|t| (t, x)))
        });
        job.writer.write_layer(config, (index, bits), &file.norms(config)?, &linears?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compensated_weights_are_codes_and_residual_together() {
        let (n, m) = (32, 16);
        let lut: Vec<f16> = (0..4 * m).map(|i| f16::from_f32(i as f32 / 8.0)).collect();
        let codes: Vec<u8> = (0..n * m).map(|i| (i * 7 % 4) as u8).collect();
        let weight = AnyPrec::pack(n, m, 2, &codes, lut.into()).unwrap();
        let lost: Vec<f32> = sampling::draws(1, n * m).iter().map(|x| x - 0.5).collect();
        let residual = Residual::quantize(n, m, &lost).unwrap();
        let got = coded(&weight, &residual, None).unwrap();
        assert_eq!(*got.codes, codes);
        let (mut row, mut own) = (vec![0.0; n], vec![0.0; n]);
        for (r, got) in got.original.weight.chunks_exact(n).enumerate() {
            residual.row(r, &mut row);
            weight.row(r, &mut own);
            let want: Vec<f32> = own.iter().zip(&row).map(|(w, r)| w + r).collect();
            assert!(got == want && got != own, "row {r}");
        }
    }

    #[test]
    fn every_window_is_read_once_or_twice_and_not_in_order() {
        for windows in [1, 2, 7, 24] {
            let order = order(windows);
            assert_eq!(order.len(), windows + windows.div_ceil(2));
            let mut first = order[..windows].to_vec();
            assert!(windows < 7 || !first.is_sorted() && order[windows..] != order[..windows.div_ceil(2)]);
            first.sort_unstable();
            assert!(first.into_iter().eq(0..windows), "{order:?}");
        }
    }

    #[test]
    fn no_window_and_no_token_counts_much_more_than_others() {
        let mut d = vec![0.0; 5 * 2];
        even_out(&mut d, 2);
        assert!(d.iter().all(|&x| x == 0.0));
        // Tokens of lengths 1, 1, 1, 2 and 50, of which the last becomes 3: together 4.
        d.copy_from_slice(&[1.0, 0.0, 0.0, -1.0, 0.6, 0.8, 2.0, 0.0, -30.0, 40.0].map(|x: f32| x * 1e-20));
        even_out(&mut d, 2);
        let want = [1.0, 0.0, 0.0, -1.0, 0.6, 0.8, 2.0, 0.0, -1.8, 2.4].map(|x: f32| x / 4.0);
        assert!(d.iter().zip(want).all(|(d, want)| (d - want).abs() < 1e-6), "{d:?}");
    }

    #[test]
    fn a_codebook_goes_against_the_derivative_of_its_weights() {
        let codes = [0, 1, 2, 3, 0, 1, 2, 3].repeat(4);
        let mut gradient = vec![0.0; 32];
        (gradient[1], gradient[5], gradient[2]) = (3.0, -1.0, -0.5);
        let codebook = vec![-1.0, -0.25, 0.25, 1.0];
        let mut learned = codebook.clone();
        let mut means = Means(vec![0.0; 4], vec![0.0; 4]);
        let slopes = |gradient: &[f32]| {
            let original = Affine { in_features: 32, out_features: 1, weight: vec![0.0; 32], bias: None };
            let coded = Coded { original: Arc::new(original), codes: Arc::new(codes.clone()) };
            let mut coded = || Ok(coded.clone());
            let trained = Host.trained((0, Projection::Qkv), &codebook, &mut coded).unwrap();
            Host.slopes(&trained, 4, &Tensor::F32(gradient.to_vec())).unwrap()
        };
        follow(4, &mut learned, &mut means, &slopes(&gradient), RATE, 0);
        let moved: Vec<f32> = learned.iter().zip(&codebook).map(|(now, before)| now - before).collect();
        let step = RATE / 4.0 * (2.125f32 / 4.0).sqrt();
        assert!((moved[1] + step).abs() < 1e-3 * step && (moved[2] - step).abs() < 1e-3 * step, "{moved:?}, {step}");
        assert_eq!((moved[0], moved[3]), (0.0, 0.0), "nothing pulls at these");
        // A slope whose square is 0 in f32 is no reason to go anywhere.
        let mut learned = codebook.clone();
        let mut means = Means(vec![0.0; 4], vec![0.0; 4]);
        gradient.fill(1e-24);
        follow(4, &mut learned, &mut means, &slopes(&gradient), RATE, 0);
        let most = learned.iter().zip(&codebook).fold(0f32, |m, (now, before)| m.max((now - before).abs()));
        assert!(most < step / 10.0, "{most}, a step is {step}");
    }
}
