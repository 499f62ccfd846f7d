//! Selection and compensation on random activations, thresholds, plans and shapes, against the oracle.
//!
//! The base matrix is zero, so that the residual product is judged on its own scale.

use decdec::dec::{DecPlan, Selection};
use decdec::format::{AnyPrec, Floats};
use decdec::weights::{Linear, Weight};

use crate::UnderTest;
use crate::common::{self, Stored, oracle};
use crate::noise::Noise;

/// Cases that share a shape.
const PER_SHAPE: usize = 200;

pub(crate) fn random_cases<B: UnderTest>(backend: &B) {
    random_cases_on(backend, |_| ());
}

/// The same; `prepare` sees all matrices before the first product.
pub(crate) fn random_cases_on<B: UnderTest>(backend: &B, prepare: impl FnOnce(&[B::Matrix])) {
    let wanted = std::env::var("DECDEC_TEST_CASES").map_or(B::CASES, |n| n.parse().expect("a number of cases"));
    let mut noise = Noise::new(2026);
    let linears: Vec<_> = (0..wanted.div_ceil(PER_SHAPE).max(6)).map(|i| linear(i, &mut noise)).collect();
    let matrices: Vec<_> = linears.iter().map(|linear| backend.matrix(linear).unwrap()).collect();
    prepare(&matrices);
    let mut seen = Seen::default();
    for case in 0..wanted {
        let i = case % linears.len();
        check(backend, &linears[i], &matrices[i], case, &mut noise, &mut seen);
    }
    println!("{}: {wanted} cases of {} shapes, {seen:?}", backend.device().id, linears.len());
    assert!(seen.unnoticed * 20 <= seen.products, "a channel left out went unnoticed: {seen:?}");
    assert!(wanted < 200 || (seen.products > wanted / 3 && seen.not_finite > wanted / 20), "{seen:?}");
}

/// What the cases were.
#[derive(Debug, Default)]
struct Seen {
    /// Sums of finite numbers that were compared.
    products: usize,
    /// Among them those where the largest channel left out would not have shown.
    unnoticed: usize,
    /// Activations with NaN or infinity.
    not_finite: usize,
}

/// The `i`-th shape: first the edges of both sizes, then anything.
fn linear(i: usize, noise: &mut Noise) -> Linear<'static> {
    const INNER: [usize; 10] = [32, 1056, 14_336, 992, 576, 1024, 2080, 28_672, 4096, 64];
    const OUTER: [usize; 7] = [8, 136, 24, 1032, 16, 328, 72];
    let anything = if noise.below(3) == 0 { noise.below(400) } else { noise.below(70) };
    let inner = INNER.get(i).copied().unwrap_or(32 * (1 + anything));
    let outer = OUTER.get(i).copied().unwrap_or(8 * (1 + noise.below(if inner > 5000 { 12 } else { 100 })));
    let planes = vec![0; 3 * outer * inner / 32];
    let lut = Floats::F32(vec![0.0; outer << 3].into());
    let weight = AnyPrec::new(inner, outer, 3, planes.into(), lut).unwrap();
    let stored = [Stored::F16, Stored::F32][i % 2];
    Linear {
        residual: Some(common::residual(i as u64, inner, outer, stored)),
        ..Linear::plain(Weight::AnyPrec(weight))
    }
}

/// Calibrated ones, and ones that make buckets empty, or all channels one bucket.
fn thresholds(len: usize, noise: &mut Noise) -> Vec<f32> {
    let mut values = noise.thresholds(len);
    match noise.below(8) {
        0 => values.fill(0.0),
        1 => values.iter_mut().for_each(|t| *t *= 100.0),
        2 => values.iter_mut().for_each(|t| *t *= 0.01),
        3 => values.iter_mut().for_each(|t| *t *= 1e-40),
        4 => values.iter_mut().for_each(|t| *t = t.round()),
        _ => {}
    }
    values
}

fn plan(linear: &Linear<'_>, most_n_tb: usize, thresholds: &[f32], noise: &mut Noise) -> DecPlan {
    let k_chunk = match noise.below(8) {
        0 => noise.below(2) * 1024,
        1 | 2 => noise.below(1025),
        3 | 4 => noise.below(129),
        _ => 1 + noise.below(16),
    };
    let n_tb = 1 + if noise.below(2) == 0 { noise.below(most_n_tb.min(8)) } else { noise.below(most_n_tb) };
    let selection = [Selection::Bucket, Selection::Exact][noise.below(2)];
    let (inner, outer) = (linear.weight.in_features(), linear.weight.out_features());
    DecPlan::new(inner, outer, thresholds, k_chunk, n_tb, selection).unwrap()
}

fn check<B: UnderTest>(
    backend: &B,
    linear: &Linear<'_>,
    matrix: &B::Matrix,
    case: usize,
    noise: &mut Noise,
    seen: &mut Seen,
) {
    let (inner, outer) = (linear.weight.in_features(), linear.weight.out_features());
    let thresholds = thresholds(inner, noise);
    let plan = plan(linear, backend.device().max_n_tb, &thresholds, noise);
    let kind = noise.below(Noise::KINDS);
    let x = noise.awkward(inner, kind, &thresholds);
    let what = format!(
        "case {case}: {inner} x {outer}, k_chunk {}, n_tb {}, {:?}, activations of kind {kind}",
        plan.k_chunk(),
        plan.n_tb(),
        plan.selection()
    );
    let want = oracle::select(&x, &thresholds, plan.k_chunk(), plan.selection());
    assert_eq!(want.len(), plan.selected(), "{what}");
    let on_device = backend.plan(matrix, &plan).unwrap();
    let mut vector = backend.vector(inner).unwrap();
    backend.write(&x, &mut vector).unwrap();
    assert_eq!(backend.select(&on_device, &vector).unwrap(), want, "{what}");

    let mut y = backend.vector(outer).unwrap();
    backend.write(&vec![f32::NAN; outer], &mut y).unwrap();
    let mut product = || {
        let mut got = vec![0.0; outer];
        backend.dec_gemv(matrix, &on_device, &vector, &mut y).unwrap();
        backend.read(&y, &mut got).unwrap();
        got
    };
    let got = product();
    let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&product()), "{what}: the same input gave other bits");
    if x.iter().any(|x| !x.is_finite()) {
        seen.not_finite += 1;
        if x.iter().any(|x| x.is_nan()) {
            assert!(got.iter().all(|y| y.is_nan()), "{what}: NaN went in, {got:?} came out");
        }
        return;
    }
    compare::<B>(linear, &want, &x, &got, &what, seen);
}

/// The sums, and that they would not pass with one channel left out.
fn compare<B: UnderTest>(linear: &Linear<'_>, channels: &[u32], x: &[f32], got: &[f32], what: &str, seen: &mut Seen) {
    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let (want, magnitude) = oracle::correction(linear, channels, &x);
    // Near zero a term is off by up to 7 steps of q·x, scaled, and the sum by another.
    let largest_scale = linear.residual.as_ref().unwrap().scales().to_f32().iter().fold(1f32, |m, &s| m.max(s));
    let tiny = (8.0 * channels.len() as f64 * f64::from(largest_scale) + 2.0) * B::SMALLEST;
    let allowed = |i: usize| tiny + common::tolerance(B::ROUNDING, want[i], channels.len() + 2, magnitude[i]);
    assert_eq!(common::misfit(got, &want, allowed), None, "{what}");

    let size = |c: &u32| x[*c as usize].abs();
    let Some(largest) = channels.iter().copied().max_by(|a, b| size(a).total_cmp(&size(b))) else { return };
    if size(&largest) < 1e-20 {
        return;
    }
    seen.products += 1;
    let fewer: Vec<u32> = channels.iter().copied().filter(|&c| c != largest).collect();
    let (without, _) = oracle::correction(linear, &fewer, &x);
    seen.unnoticed += usize::from(common::misfit(got, &without, allowed).is_none());
}
