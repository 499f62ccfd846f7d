//! The base product: every weight by itself, sums, special values.

use decdec::backend::{Feed, GemvBackend};
use decdec::weights::{Linear, Weight};

use crate::UnderTest;
use crate::common::{self, Stored, oracle};

/// Inputs around tiles of 1024 channels and last ones of every kind.
const INPUTS: [usize; 7] = [32, 576, 992, 1024, 1056, 1536, 2080];

/// `y` of one token.
pub(crate) fn product<B: GemvBackend>(backend: &B, linear: &Linear<'_>, x: &[f32]) -> Vec<f32> {
    let matrix = backend.matrix(linear).unwrap();
    let mut out = vec![0.0; linear.weight.out_features()];
    let mut vector = backend.vector(x.len()).unwrap();
    let mut y = backend.vector(out.len()).unwrap();
    backend.write(x, &mut vector).unwrap();
    backend.gemv(&matrix, &vector, &mut y).unwrap();
    backend.read(&y, &mut out).unwrap();
    out
}

/// `y` of many tokens, `[tokens, out_features]`, as many at once as the device takes.
pub(crate) fn products<B: UnderTest>(backend: &B, linear: &Linear<'_>, x: &[f32]) -> Vec<f32> {
    let matrix = backend.matrix(linear).unwrap();
    let (inner, outer) = (linear.weight.in_features(), linear.weight.out_features());
    let mut all = Vec::new();
    for x in x.chunks(backend.device().max_tokens * inner) {
        let tokens = x.len() / inner;
        let mut out = vec![0.0; tokens * outer];
        let mut vector = backend.vector(x.len()).unwrap();
        let mut h = backend.vector(out.len()).unwrap();
        backend.write(x, &mut vector).unwrap();
        backend.project(&crate::decode::added(&matrix, Feed::Plain), &vector, &mut h, tokens).unwrap();
        backend.read(&h, &mut out).unwrap();
        all.extend(out);
    }
    all
}

/// One token for every channel, in which it alone is 1: the output is the matrix, exactly.
fn one_hot<B: UnderTest>(backend: &B, weight: Weight<'static>) {
    let (inner, outer) = (weight.in_features(), weight.out_features());
    let what = format!("{inner} x {outer}");
    let mut x = vec![0.0; inner * inner];
    for k in 0..inner {
        x[k * inner + k] = 1.0;
    }
    let linear = Linear::plain(weight);
    let got = products(backend, &linear, &x);
    // A single token may take another path through a backend than many.
    let single = product(backend, &linear, &x[(inner - 1) * inner..]);
    let mut row = vec![0.0; inner];
    for i in 0..outer {
        linear.weight.row(i, &mut row);
        assert_eq!(single[i], row[inner - 1], "{what}: row {i}, last channel, one token");
        for k in 0..inner {
            assert_eq!(got[k * outer + i], row[k], "{what}: row {i}, channel {k}");
        }
    }
}

pub(crate) fn anyprec_one_hot<B: UnderTest>(backend: &B) {
    for inner in INPUTS {
        one_hot(backend, common::anyprec(1, inner, 8, 3, Stored::F16));
    }
    for bits in 2..=8 {
        one_hot(backend, common::anyprec(2, 96, 24, bits, Stored::F16));
    }
    for stored in Stored::ALL {
        one_hot(backend, common::anyprec(3, 96, 24, 4, stored));
    }
}

pub(crate) fn lutgemm_one_hot<B: UnderTest>(backend: &B) {
    for (inner, group) in [(32, 32), (576, 64), (1056, 96), (1536, 128), (1056, 1056)] {
        one_hot(backend, common::lutgemm(1, inner, 8, 3, group, Stored::F16));
    }
    for bits in 2..=8 {
        one_hot(backend, common::lutgemm(2, 96, 24, bits, 32, Stored::F16));
    }
    for stored in Stored::ALL {
        one_hot(backend, common::lutgemm(3, 96, 24, 4, 32, stored));
    }
}

pub(crate) fn dense_one_hot<B: UnderTest>(backend: &B) {
    for stored in Stored::ALL {
        one_hot(backend, common::dense(1, 96, 25, stored));
        one_hot(backend, common::dense(2, 1056, 8, stored));
    }
}

/// Holds `got` against the oracle, and the oracle of a matrix with one weight changed against `got`.
fn check<B: UnderTest>(linear: &Linear<'_>, x: &[f32], got: &[f32]) {
    let inner = x.len();
    let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let (want, magnitude) = oracle::gemv(linear, &exact);
    // Zeros add nothing; a binary-coded group passes through its planes as well.
    let depth = x.iter().filter(|&&x| x != 0.0).count() + 16;
    let allowed = |i: usize| common::tolerance(B::ROUNDING, want[i], depth, magnitude[i]);
    assert_eq!(common::misfit(got, &want, allowed), None, "{inner} channels");

    // Negative control: the weight of the largest input, off by an eighth, must show.
    let k = (0..inner).max_by(|&a, &b| x[a].abs().total_cmp(&x[b].abs())).unwrap();
    let mut changed = want.clone();
    changed[got.len() / 2] += 0.125 * exact[k];
    assert!(common::misfit(got, &changed, allowed).is_some(), "{inner} channels: a wrong weight goes unseen");
}

fn biased(seed: u64, weight: Weight<'static>) -> Linear<'static> {
    let bias = common::uniform(seed, weight.out_features());
    Linear { bias: Some(bias.into()), ..Linear::plain(weight) }
}

pub(crate) fn random_input<B: UnderTest>(backend: &B) {
    for inner in INPUTS {
        let x = common::heavy_tailed(7, inner);
        for weight in [
            common::anyprec(1, inner, 72, 3, Stored::F16),
            common::anyprec(2, inner, 40, 4, Stored::F16),
            common::lutgemm(3, inner, 72, 3, 32, Stored::F32),
            common::dense(4, inner, 72, Stored::F16),
        ] {
            let linear = biased(5, weight);
            check::<B>(&linear, &x, &product(backend, &linear, &x));
        }
    }
    let x = common::heavy_tailed(8, 1056);
    for bits in 2..=8 {
        let linear = biased(6, common::anyprec(9, 1056, 16, bits, Stored::F16));
        check::<B>(&linear, &x, &product(backend, &linear, &x));
        let linear = biased(6, common::lutgemm(9, 1056, 16, bits, 96, Stored::F16));
        check::<B>(&linear, &x, &product(backend, &linear, &x));
    }
}

/// Prompts: each token is a product of its own.
pub(crate) fn many_tokens<B: UnderTest>(backend: &B) {
    let tokens = 19;
    let x = common::heavy_tailed(7, tokens * 1056);
    for weight in [
        common::anyprec(1, 1056, 72, 3, Stored::F16),
        common::anyprec(2, 1056, 24, 6, Stored::F16),
        common::lutgemm(3, 1056, 72, 3, 96, Stored::F16),
        common::dense(4, 1056, 73, Stored::Bf16),
    ] {
        let linear = biased(5, weight);
        let got = products(backend, &linear, &x);
        for (x, got) in x.chunks_exact(1056).zip(got.chunks_exact(linear.weight.out_features())) {
            check::<B>(&linear, x, got);
        }
    }
}

/// As wide as the widest down projection: more than some memories of a device hold at once.
pub(crate) fn wide_input<B: UnderTest>(backend: &B) {
    let inner = 28_672;
    // Few are not zero, so that the tolerance stays small; some at the ends of what fits into 64 KiB.
    let mut x = vec![0.0; inner];
    let values = common::heavy_tailed(7, 80);
    for (i, value) in values.into_iter().enumerate() {
        let k = if i < 40 { 16_384 - 20 + i } else { i * 7919 % inner };
        x[k] = value;
    }
    for weight in [
        common::anyprec(1, inner, 8, 3, Stored::F16),
        common::lutgemm(3, inner, 8, 3, inner, Stored::F16),
        common::lutgemm(3, inner, 8, 2, 128, Stored::F16),
        common::dense(4, inner, 8, Stored::F16),
    ] {
        let linear = biased(5, weight);
        check::<B>(&linear, &x, &product(backend, &linear, &x));
        let two = [&x[..], &x[..]].concat();
        for got in products(backend, &linear, &two).chunks_exact(8) {
            check::<B>(&linear, &x, got);
        }
    }
}

pub(crate) fn nan_and_infinity<B: UnderTest>(backend: &B) {
    for weight in [
        common::anyprec(1, 64, 16, 3, Stored::F16),
        common::anyprec(1, 64, 16, 5, Stored::F16),
        common::lutgemm(3, 64, 16, 3, 32, Stored::F16),
        common::dense(4, 64, 16, Stored::F16),
    ] {
        let linear = Linear::plain(weight);
        let mut x = common::uniform(7, 64);
        assert!(product(backend, &linear, &x).iter().all(|y| y.is_finite()));
        x[37] = f32::INFINITY;
        assert!(product(backend, &linear, &x).iter().all(|y| !y.is_finite()));
        x[37] = f32::NAN;
        assert!(product(backend, &linear, &x).iter().all(|y| y.is_nan()));
    }
}

pub(crate) fn overwrites_its_rows_only<B: UnderTest>(backend: &B) {
    let linear = Linear::plain(common::anyprec(1, 64, 24, 3, Stored::F16));
    let matrix = backend.matrix(&linear).unwrap();
    let mut x = backend.vector(64).unwrap();
    let mut y = backend.vector(40).unwrap();
    backend.write(&common::uniform(2, 64), &mut x).unwrap();
    let mut fresh = vec![0.0; 24];
    backend.gemv(&matrix, &x, &mut y).unwrap();
    backend.read(&y, &mut fresh).unwrap();
    backend.write(&[5.0; 40], &mut y).unwrap();
    backend.gemv(&matrix, &x, &mut y).unwrap();
    let mut again = vec![0.0; 40];
    backend.read(&y, &mut again).unwrap();
    assert_eq!(again[..24], fresh);
    assert_eq!(again[24..], [5.0; 16]);
}
