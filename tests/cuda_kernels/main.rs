//! The CUDA backend's products, selection and compensation against an f64 oracle.
//!
//! Runs where `DECDEC_TEST_DEVICES` names `cuda`; then a missing device fails.

#[path = "../cuda_common/mod.rs"]
mod cuda_common;
mod oracle;

use cuda_common::{Noise, cuda, options};
use decdec::backend::cuda::{Cuda, Dtype, Residuals};
use decdec::backend::{DecodeBackend, GemvBackend, Rows};
use decdec::dec::{DecPlan, Selection};
use decdec::format::{AnyPrec, Dense, LutGemm, Residual, Storage};
use decdec::random::RandomWeights;
use decdec::weights::{Linear, Weight};
use half::f16;
use oracle::{Computes, any_codebooks, check, computes, linears};

const SHAPES: [(usize, usize); 9] =
    [(32, 8), (576, 576), (576, 1536), (1536, 72), (992, 24), (1056, 40), (1024, 16), (2080, 136), (4096, 1024)];

fn products_on(dtype: Dtype, compile: u8) {
    let Some(cuda) = cuda(options(dtype, compile)) else { return };
    let mut noise = Noise::new(1);
    for (k, rows) in SHAPES {
        for (what, linear) in linears(k, rows, &mut noise) {
            let types = computes(&linear, dtype, compile);
            check(&cuda, &linear, &noise.activations(k), types, &what);
        }
    }
}

#[test]
fn products_in_float16() {
    products_on(Dtype::Float16, 2);
}

#[test]
fn products_in_bfloat16() {
    products_on(Dtype::Bfloat16, 2);
}

#[test]
fn products_in_float32() {
    products_on(Dtype::Float32, 2);
}

#[test]
fn products_of_generic_kernels() {
    products_on(Dtype::Float16, 0);
}

#[test]
fn projections_of_real_models() {
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    let mut noise = Noise::new(2);
    let shapes = [
        (4096, 6144),
        (4096, 4096),
        (4096, 28672),
        (14336, 4096),
        (5120, 7680),
        (5120, 5120),
        (5120, 35840),
        (17920, 5120),
        (8192, 10240),
        (8192, 8192),
        (8192, 57344),
        (28672, 8192),
    ];
    // Llama-3-8B's head in 8 bits.
    let head = RandomWeights::single(4096, 128_256, Storage::lutgemm(128), 8, noise.next()).unwrap();
    check(&cuda, &head, &noise.activations(4096), computes(&head, Dtype::Float16, 2), "head of 8 bits");
    for (k, rows) in shapes {
        for bits in [3, 4] {
            for format in [Storage::ANYPREC, Storage::lutgemm(128)] {
                let linear = RandomWeights::single(k, rows, format, bits, noise.next()).unwrap();
                let types = computes(&linear, Dtype::Float16, 2);
                check(&cuda, &linear, &noise.activations(k), types, &format!("{format:?} {bits} {k}x{rows}"));
            }
        }
    }
}

/// `W · e_k` is column `k`, bit for bit where a weight is one number, and a flipped code shows.
#[test]
fn one_hot_gives_a_column() {
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    let mut noise = Noise::new(3);
    for (k, rows, bits) in [(576, 72, 3), (576, 72, 4), (288, 24, 3), (1024, 16, 4), (576, 72, 8)] {
        let linear = RandomWeights::single(k, rows, Storage::ANYPREC, bits, noise.next()).unwrap();
        let Weight::AnyPrec(w) = &linear.weight else { unreachable!() };
        let uniform = RandomWeights::single(k, rows, Storage::lutgemm(32), bits, noise.next()).unwrap();
        columns(&cuda, &linear, 0.0);
        if matches!(bits, 3 | 4) {
            // Half a step of two bytes, of which a row's range has 32766 at least.
            columns(&cuda, &any_codebooks(&linear, &mut noise), 1.0 / 32_700.0);
        }
        // step·code + centre·1: two roundings of numbers up to 2^bits as large as a step.
        columns(&cuda, &uniform, 2f32.powi(-22));
        let mut codes = vec![0u8; k * rows];
        for (r, codes) in codes.chunks_exact_mut(k).enumerate() {
            w.codes(r, codes);
        }
        let (row, channel) = (rows - 1, k - 1);
        codes[row * k + channel] ^= 1;
        let flipped = AnyPrec::pack(k, rows, bits, &codes, w.lut().clone()).unwrap();
        let mut x = vec![0f32; k];
        x[channel] = 1.0;
        let got = column(&cuda, &Linear::plain(Weight::AnyPrec(flipped)), &x);
        let mut want = vec![0f32; k];
        w.row(row, &mut want);
        assert_ne!(got[row], want[channel], "a flipped code went unseen");
    }
}

fn column(cuda: &Cuda, linear: &Linear<'_>, x: &[f32]) -> Vec<f32> {
    let matrix = cuda.matrix(linear).unwrap();
    let (mut from, mut to) = (cuda.vector(x.len()).unwrap(), cuda.vector(linear.weight.out_features()).unwrap());
    cuda.write(x, &mut from).unwrap();
    cuda.gemv(&matrix, &from, &mut to).unwrap();
    let mut got = vec![0f32; linear.weight.out_features()];
    cuda.read(&to, &mut got).unwrap();
    got
}

fn columns(cuda: &Cuda, linear: &Linear<'_>, relative: f32) {
    let (k, rows) = (linear.weight.in_features(), linear.weight.out_features());
    let mut weights = vec![0f32; k * rows];
    for (r, row) in weights.chunks_exact_mut(k).enumerate() {
        linear.weight.row(r, row);
    }
    let largest = weights.iter().fold(0f32, |m, w| m.max(w.abs()));
    let matrix = cuda.matrix(linear).unwrap();
    let (mut from, mut to) = (cuda.vector(k).unwrap(), cuda.vector(rows).unwrap());
    let mut got = vec![0f32; rows];
    for channel in 0..k {
        let mut x = vec![0f32; k];
        x[channel] = 1.0;
        cuda.write(&x, &mut from).unwrap();
        cuda.gemv(&matrix, &from, &mut to).unwrap();
        cuda.read(&to, &mut got).unwrap();
        for (r, &got) in got.iter().enumerate() {
            let want = weights[r * k + channel];
            assert!((got - want).abs() <= relative * largest, "row {r}, channel {channel}: {got}, {want} expected");
        }
    }
}

fn selections() -> [Selection; 2] {
    [Selection::Bucket, Selection::Exact]
}

/// Lists equal the plan's own, on activations made to tie, to overflow, and to be no numbers at all.
#[test]
fn selection_equals_the_plan() {
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    let mut noise = Noise::new(4);
    let mut cases = 0;
    for k in [32, 576, 992, 1024, 1056, 1536, 4096, 14336] {
        let linear = RandomWeights::single(k, 32, Storage::ANYPREC, 3, noise.next()).unwrap();
        let matrix = cuda.matrix(&linear).unwrap();
        let mut x = cuda.vector(k).unwrap();
        for k_chunk in [1, 3, 8, 33, 64, 500, 1023, 1024] {
            for selection in selections() {
                let thresholds = noise.thresholds(k);
                let plan = DecPlan::new(k, 32, &thresholds, k_chunk, 1, selection).unwrap();
                if plan.selected() == 0 {
                    continue;
                }
                let on_device = cuda.plan(&matrix, &plan).unwrap();
                for kind in 0..Noise::KINDS {
                    let values = noise.awkward(k, kind, &thresholds);
                    cuda.write(&values, &mut x).unwrap();
                    let mut want = Vec::new();
                    plan.select(&values, &mut want);
                    let got = cuda.select(&on_device, &x).unwrap();
                    assert_eq!(got, want, "{k} channels, k_chunk {k_chunk}, {selection:?}, kind {kind}");
                    cases += 1;
                }
            }
        }
    }
    assert!(cases > 600, "{cases} cases");
}

/// The compensation by itself: a base matrix of zeros.
#[test]
fn the_residual_product_alone() {
    let Some(host) = cuda(options(Dtype::Float16, 2)) else { return };
    let mut generic = options(Dtype::Float32, 0);
    generic.residuals = Residuals::Device;
    let Some(generic) = cuda(generic) else { return };
    let mut noise = Noise::new(5);
    for (k, rows) in [(576, 72), (1056, 96), (1024, 256), (4096, 1024), (14336, 512)] {
        let mut linear = RandomWeights::single(k, rows, Storage::ANYPREC, 3, noise.next()).unwrap();
        let residual = linear.residual.clone().unwrap();
        let zeros = vec![f16::ZERO; rows * 8];
        linear.weight = Weight::AnyPrec(AnyPrec::pack(k, rows, 3, &vec![0; k * rows], zeros.into()).unwrap());
        for cuda in [&host, &generic] {
            let matrix = cuda.matrix(&linear).unwrap();
            for (k_chunk, n_tb) in [(2, 1), (8, 2), (8, 7), (32, 16), (100, 64), (1024, 3)] {
                for selection in selections() {
                    let plan = DecPlan::new(k, rows, &noise.thresholds(k), k_chunk, n_tb, selection).unwrap();
                    let values = noise.activations(k);
                    compare_residual(cuda, &matrix, &plan, &residual, &values);
                }
            }
        }
    }
}

fn compare_residual(
    cuda: &Cuda,
    matrix: &<Cuda as GemvBackend>::Matrix,
    plan: &DecPlan,
    residual: &Residual<'_>,
    values: &[f32],
) {
    let (k, rows) = (plan.in_features(), plan.out_features());
    let (mut x, mut y) = (cuda.vector(k).unwrap(), cuda.vector(rows).unwrap());
    cuda.write(values, &mut x).unwrap();
    let on_device = cuda.plan(matrix, plan).unwrap();
    let run = |y: &mut _| {
        cuda.dec_gemv(matrix, &on_device, &x, y).unwrap();
        let mut got = vec![0f32; rows];
        cuda.read(y, &mut got).unwrap();
        got
    };
    let got = run(&mut y);
    assert_eq!(got, run(&mut y), "the same input gave other bits");
    let mut selected = Vec::new();
    plan.select(values, &mut selected);
    for (row, &got) in got.iter().enumerate() {
        let scale = f64::from(residual.scales().get(row));
        let (want, size) = selected.iter().fold((0.0, 0.0), |(sum, size), &c| {
            let product = scale * f64::from(residual.nibble(c as usize, row)) * f64::from(values[c as usize]);
            (sum + product, size + product.abs())
        });
        let most = 2.0 * (selected.len() + 2) as f64 * 2f64.powi(-24) * size;
        let what = format!("{k}x{rows}, k_chunk {}, n_tb {}, row {row}", plan.k_chunk(), plan.n_tb());
        assert!((f64::from(got) - want).abs() <= most, "{what}: {got}, {want} ± {most} expected");
        assert!(
            selected.is_empty() || most < 0.1 * size / selected.len() as f64 || size == 0.0 || selected.len() > 200
        );
    }
}

/// `k_chunk` 0 is the base product, bit for bit; and base and compensation add up.
#[test]
fn compensated_products() {
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    let mut noise = Noise::new(6);
    for format in [Storage::ANYPREC, Storage::lutgemm(32)] {
        for (k, rows, bits) in [(576, 72, 3), (4096, 512, 3), (4096, 512, 4), (1536, 576, 5)] {
            let linear = RandomWeights::single(k, rows, format, bits, noise.next()).unwrap();
            let values = noise.activations(k);
            let base = check(&cuda, &linear, &values, computes(&linear, Dtype::Float16, 2), "base");
            let matrix = cuda.matrix(&linear).unwrap();
            let (mut x, mut y) = (cuda.vector(k).unwrap(), cuda.vector(rows).unwrap());
            cuda.write(&values, &mut x).unwrap();
            let mut got = vec![0f32; rows];
            for (k_chunk, n_tb) in [(0, 4), (16, 4), (1024, 9)] {
                let plan = DecPlan::new(k, rows, &noise.thresholds(k), k_chunk, n_tb, Selection::Bucket).unwrap();
                let on_device = cuda.plan(&matrix, &plan).unwrap();
                cuda.dec_gemv(&matrix, &on_device, &x, &mut y).unwrap();
                cuda.read(&y, &mut got).unwrap();
                if k_chunk == 0 {
                    assert_eq!(got, base);
                    continue;
                }
                let mut selected = Vec::new();
                plan.select(&values, &mut selected);
                let residual = linear.residual.as_ref().unwrap();
                for (row, (&got, &base)) in got.iter().zip(&base).enumerate() {
                    let scale = f64::from(residual.scales().get(row));
                    let (sum, size) = selected.iter().fold((0.0, 0.0), |(sum, size), &c| {
                        let p = scale * f64::from(residual.nibble(c as usize, row)) * f64::from(values[c as usize]);
                        (sum + p, size + p.abs())
                    });
                    let want = f64::from(base) + sum;
                    let most = 2.0 * (selected.len() + 2) as f64 * 2f64.powi(-24) * (size + f64::from(base.abs()));
                    assert!((f64::from(got) - want).abs() <= most, "row {row}: {got}, {want} ± {most} expected");
                }
            }
        }
    }
}

/// A NaN in `x` comes out, selected or not; an infinity too.
#[test]
fn not_a_number_comes_out() {
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    let linear = RandomWeights::single(1056, 32, Storage::ANYPREC, 3, 7).unwrap();
    let matrix = cuda.matrix(&linear).unwrap();
    let plan = DecPlan::new(1056, 32, &vec![1.0; 1056], 4, 2, Selection::Bucket).unwrap();
    let on_device = cuda.plan(&matrix, &plan).unwrap();
    let (mut x, mut y) = (cuda.vector(1056).unwrap(), cuda.vector(32).unwrap());
    let mut values = Noise::new(7).activations(1056);
    values[700] = f32::NAN;
    cuda.write(&values, &mut x).unwrap();
    let mut got = vec![0f32; 32];
    cuda.gemv(&matrix, &x, &mut y).unwrap();
    cuda.read(&y, &mut got).unwrap();
    assert!(got.iter().all(|v| v.is_nan()), "{got:?}");
    cuda.dec_gemv(&matrix, &on_device, &x, &mut y).unwrap();
    cuda.read(&y, &mut got).unwrap();
    assert!(got.iter().all(|v| v.is_nan()), "{got:?}");
}

/// Fixed-point activations have no largest number; what is not finite comes out.
#[test]
fn activations_beyond_float16_are_multiplied() {
    for (format, bits) in
        [(Storage::ANYPREC, 3), (Storage::ANYPREC, 4), (Storage::lutgemm(32), 3), (Storage::lutgemm(32), 8)]
    {
        for dtype in [Dtype::Float16, Dtype::Bfloat16] {
            let Some(cuda) = cuda(options(dtype, 2)) else { return };
            let linear = RandomWeights::single(1056, 32, format, bits, 7).unwrap();
            let mut values = Noise::new(7).activations(1056);
            for large in [1e6, -70_000.0, 3e30, 1e-30] {
                values.iter_mut().for_each(|x| *x *= large);
                check(&cuda, &linear, &values, computes(&linear, dtype, 2), &format!("{format:?} {bits}, {large}"));
                values = Noise::new(7).activations(1056);
                values[700] = large;
                check(&cuda, &linear, &values, computes(&linear, dtype, 2), &format!("{format:?} {bits}, one {large}"));
            }
            for lost in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
                values[700] = lost;
                let got = column(&cuda, &linear, &values);
                assert!(got.iter().all(|v| !v.is_finite()), "{format:?} {bits}, {lost}: {got:?}");
            }
            assert!(!cuda.went_beyond(), "{format:?} {bits}");
        }
    }
}

/// Beyond what float16 holds, its largest number is taken in a product of 16-bit numbers, and that is said; up to there
/// nothing is.
#[test]
fn activations_beyond_float16_are_its_largest() {
    let mut noise = Noise::new(9);
    let numbers: Vec<f16> = (0..1056 * 32).map(|_| f16::from_f32(0.01 * noise.normal())).collect();
    let linear = Linear::plain(Weight::Dense(Dense { in_features: 1056, out_features: 32, values: numbers.into() }));
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    let mut values = Noise::new(7).activations(1056);
    // Rounded to nearest, 65488 and more would be its last number.
    values[3] = 65472.0;
    let small = column(&cuda, &linear, &values);
    assert!(!cuda.went_beyond(), "up to float16's end nothing is beyond it");
    let large = |last: [f32; 4]| {
        let mut values = values.clone();
        values[1052..].copy_from_slice(&last);
        column(&cuda, &linear, &values)
    };
    let got = large([1e6, -70_000.0, f32::INFINITY, 3e38]);
    assert!(cuda.went_beyond());
    assert_eq!(got, large([65504.0, -65504.0, 65504.0, 65504.0]));
    assert_ne!(got, small);
    assert!(large([1e6, f32::NAN, 1.0, 1.0]).iter().all(|v| v.is_nan()), "NaN stays NaN");

    let Some(cuda) = self::cuda(options(Dtype::Bfloat16, 2)) else { return };
    let mut values = values.clone();
    values[1] = 1e30;
    assert!(column(&cuda, &linear, &values).iter().all(|v| v.is_finite() && v.abs() > 1e20));
    assert!(!cuda.went_beyond());
}

/// Devices in one thread, each used after the other was, opened and dropped in any order: what they compute is the same.
#[test]
fn two_devices_take_turns_in_one_thread() {
    let Some(first) = cuda(options(Dtype::Float16, 2)) else { return };
    if decdec::backend::cuda::devices().unwrap().len() < 2 {
        cuda_common::devices::skip("one CUDA device, two are needed");
        return;
    }
    let second = || Cuda::new(1, options(Dtype::Float16, 2)).unwrap();
    let linear = RandomWeights::single(1056, 64, Storage::ANYPREC, 3, 7).unwrap();
    let x = Noise::new(7).activations(1056);
    let want = column(&first, &linear, &x);
    let on_both = |one: &Cuda, other: &Cuda| {
        let matrices = [one, other].map(|cuda| cuda.matrix(&linear).unwrap());
        let mut vectors =
            [one, other].map(|cuda| (cuda.vector(1056).unwrap(), cuda.vector(64).unwrap(), Default::default()));
        // Every operation of one between two of the other: what is written, multiplied, recorded, replayed and read.
        for _ in 0..4 {
            for (cuda, (from, _, _)) in [one, other].into_iter().zip(&mut vectors) {
                cuda.write(&x, from).unwrap();
            }
            for ((cuda, matrix), (from, to, graphs)) in [one, other].into_iter().zip(&matrices).zip(&mut vectors) {
                cuda.replay(graphs, &[Rows { slot: 0, position: 0, count: 1 }], &mut || cuda.gemv(matrix, from, to))
                    .unwrap();
            }
            for (cuda, (_, to, _)) in [one, other].into_iter().zip(&vectors) {
                let mut got = vec![0f32; 64];
                cuda.read(to, &mut got).unwrap();
                assert_eq!(got, want, "{}", cuda.device().id);
                assert!(cuda.time(&mut || Ok(())).is_ok() && cuda.memory().unwrap().0 > 0);
            }
        }
    };
    let other = second();
    on_both(&first, &other);
    on_both(&other, &first);
    drop(first);
    assert_eq!(column(&other, &linear, &x), want, "after the first was dropped");
    let first = cuda(options(Dtype::Float16, 2)).unwrap();
    drop(other);
    on_both(&first, &second());
    assert_eq!(column(&first, &linear, &x), want, "after the second was dropped");
}

/// Alphas that are not powers of two apart take the general kernel.
#[test]
fn binary_codes_of_any_steps() {
    for (dtype, compile) in [(Dtype::Float16, 2), (Dtype::Float32, 2)] {
        let Some(cuda) = cuda(options(dtype, compile)) else { return };
        let mut noise = Noise::new(8);
        let linear = RandomWeights::single(256, 24, Storage::lutgemm(64), 3, 9).unwrap();
        let Weight::LutGemm(w) = &linear.weight else { unreachable!() };
        let alpha: Vec<f32> = w.alpha().to_f32().iter().map(|a| a * (1.0 + 0.3 * noise.normal().abs())).collect();
        let w = LutGemm::new(256, 24, 3, 64, w.binary().to_vec().into(), alpha.into(), w.q_bias().clone()).unwrap();
        // The general kernel computes in f32 whatever the type.
        let types = Computes { x: Dtype::Float32, w: Dtype::Float32, fixed: false };
        check(&cuda, &Linear::plain(Weight::LutGemm(w)), &noise.activations(256), types, "any steps");
    }
}
