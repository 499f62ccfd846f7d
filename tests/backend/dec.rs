//! Selection and compensation.

use decdec::backend::GemvBackend;
use decdec::dec::{DecPlan, Selection};
use decdec::format::Floats;
use decdec::weights::{Linear, Weight};

use crate::UnderTest;
use crate::common::{self, Stored, oracle};
use crate::gemv::product;

const KINDS: [Selection; 2] = [Selection::Bucket, Selection::Exact];

fn plan(linear: &Linear<'_>, k_chunk: usize, n_tb: usize, selection: Selection) -> DecPlan {
    let (inner, outer) = (linear.weight.in_features(), linear.weight.out_features());
    DecPlan::new(inner, outer, linear.thresholds.as_ref().unwrap(), k_chunk, n_tb, selection).unwrap()
}

/// `y` of one token, compensated.
fn compensated<B: GemvBackend>(backend: &B, linear: &Linear<'_>, plan: &DecPlan, x: &[f32]) -> Vec<f32> {
    let matrix = backend.matrix(linear).unwrap();
    let plan = backend.plan(&matrix, plan).unwrap();
    let mut out = vec![0.0; linear.weight.out_features()];
    let mut vector = backend.vector(x.len()).unwrap();
    let mut y = backend.vector(out.len()).unwrap();
    backend.write(x, &mut vector).unwrap();
    backend.dec_gemv(&matrix, &plan, &vector, &mut y).unwrap();
    backend.read(&y, &mut out).unwrap();
    out
}

/// A matrix of zeros, `outer` rows: what is left is the compensation alone.
fn nothing(inner: usize, outer: usize) -> Weight<'static> {
    let lut = Floats::F32(vec![0.0; outer << 2].into());
    let codes = vec![0; inner * outer];
    Weight::AnyPrec(decdec::format::AnyPrec::pack(inner, outer, 2, &codes, lut).unwrap())
}

fn check_selection<B: GemvBackend>(backend: &B, linear: &Linear<'_>, matrix: &B::Matrix, k_chunk: usize, x: &[f32]) {
    let mut vector = backend.vector(x.len()).unwrap();
    backend.write(x, &mut vector).unwrap();
    for kind in KINDS {
        let plan = plan(linear, k_chunk, 8, kind);
        let want = oracle::select(x, linear.thresholds.as_ref().unwrap(), k_chunk, kind);
        let what = format!("{} channels, k_chunk {k_chunk}, {kind:?}", x.len());
        let mut host = Vec::new();
        plan.select(x, &mut host);
        assert_eq!(host, want, "{what}, host");
        let on_device = backend.plan(matrix, &plan).unwrap();
        assert_eq!(backend.select(&on_device, &vector).unwrap(), want, "{what}");
    }
}

pub(crate) fn selection<B: UnderTest>(backend: &B) {
    for inner in [32, 576, 992, 1024, 1056, 1536, 4096] {
        let linear = common::compensable(1, nothing(inner, 8));
        let matrix = backend.matrix(&linear).unwrap();
        let x = common::heavy_tailed(30, inner);
        // Few distinct magnitudes: ties everywhere, inside buckets and between them.
        let ties: Vec<f32> = common::uniform(31, inner).iter().map(|x| (x * 4.0).round() / 2.0).collect();
        for k_chunk in [0, 1, 8, 33, 512, 1023, 1024] {
            check_selection(backend, &linear, &matrix, k_chunk, &x);
            check_selection(backend, &linear, &matrix, k_chunk, &ties);
        }
        // Negative control: the list depends on every input.
        let mut changed = x.clone();
        changed[inner / 2] = 1e6;
        let (t, k) = (linear.thresholds.as_ref().unwrap(), 64);
        let without = oracle::select(&x, t, k, Selection::Exact);
        assert!(without.contains(&((inner / 2) as u32)) || without != oracle::select(&changed, t, k, Selection::Exact));
    }
}

/// NaN, infinity, zeros of both signs, subnormal numbers, values on the buckets' edges and beside them.
pub(crate) fn selection_of_edges<B: UnderTest>(backend: &B) {
    let inner = 1056;
    let linear = common::compensable(1, nothing(inner, 8));
    let matrix = backend.matrix(&linear).unwrap();
    let plan = plan(&linear, 64, 8, Selection::Bucket);
    let mut on_edges: Vec<f32> = vec![0.0; inner];
    for (i, x) in on_edges.iter_mut().enumerate() {
        let edge = plan.edges()[i % 32];
        let beside = [edge, edge.next_down(), edge.next_up(), -edge][i / 32 % 4];
        *x = beside;
    }
    let mut special = common::heavy_tailed(30, inner);
    for (i, x) in special.iter_mut().enumerate() {
        match i % 29 {
            3 => *x = f32::NAN,
            5 => *x = f32::INFINITY,
            7 => *x = f32::NEG_INFINITY,
            11 => *x = -f32::NAN,
            13 => *x = f32::MAX,
            _ => {}
        }
    }
    // Subnormal and zero: whoever flushes to zero mixes them up.
    let tiny: Vec<f32> =
        (0..inner).map(|i| f32::from_bits((i as u32 * 7919 % 64) | if i % 3 == 0 { 1 << 31 } else { 0 })).collect();
    for k_chunk in [1, 8, 64, 200, 1000] {
        for x in [&on_edges, &special, &tiny, &vec![0.0; inner], &vec![-0.0; inner], &vec![f32::NAN; inner]] {
            check_selection(backend, &linear, &matrix, k_chunk, x);
        }
    }
    let mut flat = linear.clone();
    for thresholds in [vec![0.0; inner], vec![1e-40; inner], vec![3e38; inner]] {
        flat.thresholds = Some(thresholds.into());
        check_selection(backend, &flat, &matrix, 64, &special);
        check_selection(backend, &flat, &matrix, 64, &tiny);
    }
}

/// Every channel is taken, one is 1: the output is the residual, exactly.
pub(crate) fn correction_one_hot<B: UnderTest>(backend: &B) {
    for (inner, outer, stored) in [(576, 24, Stored::F16), (1056, 8, Stored::F32), (96, 520, Stored::F16)] {
        let linear = Linear {
            residual: Some(common::residual(3, inner, outer, stored)),
            ..common::compensable(1, nothing(inner, outer))
        };
        let plan = plan(&linear, 1024, 3, Selection::Bucket);
        let residual = linear.residual.as_ref().unwrap();
        let mut row = vec![0.0; inner];
        for k in [0, 1, 31, 32, 63, inner / 2, inner - 1] {
            let mut x = vec![0.0; inner];
            x[k] = 1.0;
            let got = compensated(backend, &linear, &plan, &x);
            for (i, got) in got.iter().enumerate() {
                residual.row(i, &mut row);
                // 0 + −0 is 0, so the sign of a zero may differ.
                assert_eq!(*got, row[k], "{inner} x {outer}: row {i}, channel {k}");
            }
        }
    }
}

/// The compensation on its own scale: next to a base product its errors would drown.
pub(crate) fn correction_alone<B: UnderTest>(backend: &B) {
    for inner in [576, 992, 1056, 4096] {
        let linear = common::compensable(1, nothing(inner, 136));
        let x = common::heavy_tailed(30, inner);
        let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for (k_chunk, kind) in [(8, Selection::Bucket), (64, Selection::Exact), (1024, Selection::Bucket)] {
            let plan = plan(&linear, k_chunk, 5, kind);
            let channels = oracle::select(&x, linear.thresholds.as_ref().unwrap(), k_chunk, kind);
            let got = compensated(backend, &linear, &plan, &x);
            let (want, magnitude) = oracle::correction(&linear, &channels, &exact);
            let allowed = |i: usize| common::tolerance(B::ROUNDING, want[i], channels.len() + 1, magnitude[i]);
            assert_eq!(common::misfit(&got, &want, allowed), None, "{inner} channels, k_chunk {k_chunk}");

            // Negative control: one nibble off by one.
            let mut changed = want.clone();
            let scale = f64::from(linear.residual.as_ref().unwrap().scales().get(70));
            let largest = channels.iter().map(|&c| exact[c as usize]).fold(0.0, |m: f64, x| m.max(x.abs()));
            changed[70] += scale * largest;
            assert!(common::misfit(&got, &changed, allowed).is_some(), "a wrong nibble goes unseen");
        }
    }
}

pub(crate) fn whole_product<B: UnderTest>(backend: &B) {
    for weight in [
        common::anyprec(1, 1056, 72, 3, Stored::F16),
        common::lutgemm(2, 1056, 72, 3, 96, Stored::F32),
        common::dense(3, 1056, 72, Stored::F16),
    ] {
        let linear = Linear { bias: Some(common::uniform(9, 72).into()), ..common::compensable(1, weight) };
        let x = common::heavy_tailed(30, 1056);
        let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let plan = plan(&linear, 40, 4, Selection::Bucket);
        let channels = oracle::select(&x, linear.thresholds.as_ref().unwrap(), 40, Selection::Bucket);
        let (base, base_magnitude) = oracle::gemv(&linear, &exact);
        let (correction, magnitude) = oracle::correction(&linear, &channels, &exact);
        let want: Vec<f64> = base.iter().zip(&correction).map(|(b, c)| b + c).collect();
        let allowed = |i: usize| common::tolerance(B::ROUNDING, want[i], 1056, base_magnitude[i] + magnitude[i]);
        let got = compensated(backend, &linear, &plan, &x);
        assert_eq!(common::misfit(&got, &want, allowed), None);
        assert!(common::misfit(&got, &base, allowed).is_some(), "a missing compensation goes unseen");
    }
}

pub(crate) fn no_channels_is_the_base_product<B: UnderTest>(backend: &B) {
    let linear = common::compensable(1, common::anyprec(1, 1056, 72, 3, Stored::F16));
    let x = common::heavy_tailed(30, 1056);
    let base = product(backend, &linear, &x);
    let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&compensated(backend, &linear, &plan(&linear, 0, 8, Selection::Bucket), &x)), bits(&base));
    assert_ne!(bits(&compensated(backend, &linear, &plan(&linear, 1, 8, Selection::Bucket), &x)), bits(&base));
}

pub(crate) fn every_n_tb_agrees<B: UnderTest>(backend: &B) {
    let linear = common::compensable(1, common::anyprec(1, 576, 328, 3, Stored::F16));
    let x = common::heavy_tailed(30, 576);
    let one = compensated(backend, &linear, &plan(&linear, 64, 1, Selection::Bucket), &x);
    for n_tb in [2, 7, 40, 41, 64].into_iter().filter(|&n_tb| n_tb <= backend.device().max_n_tb) {
        assert_eq!(compensated(backend, &linear, &plan(&linear, 64, n_tb, Selection::Bucket), &x), one, "n_tb {n_tb}");
    }
}

pub(crate) fn too_large_n_tb<B: UnderTest>(backend: &B) {
    let linear = common::compensable(1, nothing(64, 8));
    let matrix = backend.matrix(&linear).unwrap();
    let max = backend.device().max_n_tb;
    assert!(backend.plan(&matrix, &plan(&linear, 8, max, Selection::Bucket)).is_ok());
    let message = backend.plan(&matrix, &plan(&linear, 8, max + 1, Selection::Bucket)).err().unwrap().to_string();
    assert!(message.contains(&max.to_string()) && message.contains(&(max + 1).to_string()), "{message}");
}

pub(crate) fn nan_comes_out<B: UnderTest>(backend: &B) {
    let linear = common::compensable(1, common::anyprec(1, 1056, 24, 3, Stored::F16));
    for kind in KINDS {
        for nans in [1, 900] {
            let mut x = common::heavy_tailed(30, 1056);
            x[1056 - nans..].fill(f32::NAN);
            let got = compensated(backend, &linear, &plan(&linear, 16, 8, kind), &x);
            assert!(got.iter().all(|y| y.is_nan()), "{kind:?}, {nans} NaN: {got:?}");
        }
    }
}
