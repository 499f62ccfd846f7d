//! Every operation against the same on this machine's cores, with a control that differs; the same bits twice.

use std::sync::Arc;

use super::*;
use crate::backend::cuda;
use crate::config::Projection;
use crate::format::Dense;
use crate::quantize::Host;
use crate::quantize::backward::Compensated;
use crate::quantize::fixture::{self, numbers};
use crate::quantize::forward::{Layer, Placed};
use crate::quantize::refine::{AnyGrid, Codebook, Effort, Groups};

const TEXTS: usize = 3;
const TOKENS: usize = 70;

/// Runs `work` on the first GPU, if that is under test.
fn on_gpu(work: impl FnOnce(&Quantizer<'_>)) {
    if crate::devices::is_under_test("cuda") {
        let cuda = Cuda::new(0, cuda::Options::default()).unwrap();
        work(&cuda.quantizer(&fixture::config(), None).unwrap());
    }
}

/// The largest difference over the largest number.
fn difference(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().all(|x| x.is_finite()), "not all are numbers");
    let most = want.iter().fold(0f64, |most, &x| most.max(f64::from(x).abs()));
    let off = got.iter().zip(want).fold(0f64, |off, (&g, &w)| off.max((f64::from(g) - f64::from(w)).abs()));
    off / most
}

/// The length of the difference over that of what is wanted: a few numbers may be far off.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let squares = |all: &mut dyn Iterator<Item = f64>| all.map(|x| x * x).sum::<f64>();
    let off = squares(&mut got.iter().zip(want).map(|(&g, &w)| f64::from(g) - f64::from(w)));
    (off / squares(&mut want.iter().map(|&w| f64::from(w)))).sqrt()
}

fn values(on: &dyn Compute, tensor: &Tensor) -> Vec<f32> {
    on.take(on.copy(tensor).unwrap()).unwrap()
}

/// What leaves a layer, and what entered its projections, read in two parts.
fn forward(on: &dyn Compute, config: &ModelConfig, layer: &Layer, parts: &[usize]) -> Vec<Vec<f32>> {
    let placed = Placed::new(on, layer).unwrap();
    let ropes = Ropes::new(config, TOKENS);
    let mut cache = on.cache(&layer.config, TEXTS, TOKENS).unwrap();
    let hidden = config.hidden_size;
    let start = numbers(11, TEXTS * TOKENS * hidden, 1.0);
    let (mut first, mut out) = (0, Vec::new());
    for &tokens in parts {
        let part: Vec<f32> = start
            .chunks(TOKENS * hidden)
            .flat_map(|text| &text[first * hidden..][..tokens * hidden])
            .copied()
            .collect();
        let mut h = on.put(part).unwrap();
        let inputs = placed.forward(on, config, &ropes, &mut cache, TEXTS, &mut h).unwrap();
        out.push(values(on, &h));
        out.extend(inputs.iter().map(|x| values(on, x)));
        first += tokens;
    }
    out
}

#[test]
fn layers_of_all_families_are_the_host_s() {
    on_gpu(|gpu| {
        let plain = fixture::config();
        let base = forward(&Host, &plain, &fixture::layer(&plain, 0.4), &[TOKENS]);
        for (name, config) in fixture::variants(&plain) {
            let layer = fixture::layer(&config, 0.4);
            for parts in [&[TOKENS][..], &[50, 1, 19]] {
                let want = forward(&Host, &config, &layer, parts);
                let got = forward(gpu, &config, &layer, parts);
                // Sums of up to 96 terms follow each other, in other orders: a few 2^-24 each, grown by norms.
                for (got, want) in got.iter().zip(&want) {
                    let off = difference(got, want);
                    assert!(off < 2e-5, "{name}, {parts:?}: off by {off}");
                }
                assert_eq!(got, forward(gpu, &config, &layer, parts), "{name}: not the same bits twice");
            }
            let off = difference(&forward(gpu, &config, &layer, &[TOKENS])[0], &base[0]);
            assert_eq!(off > 1e-4, name != "plain", "{name} is off by {off} from another layer");
        }
    });
}

/// Codes and codebooks of a random projection: 8 levels a row.
fn coded(original: &Affine) -> (Vec<f32>, Vec<u8>) {
    let levels: Vec<f32> = (0..8).map(|i| (i as f32 - 3.5) * 0.14).collect();
    let code = |w: &f32| (0..8u8).min_by_key(|&c| ((levels[usize::from(c)] - w).abs() * 1e6) as u64).unwrap();
    let scaled = (0..original.out_features).flat_map(|row| levels.iter().map(move |l| l * (1.0 + row as f32 * 1e-3)));
    (scaled.collect(), original.weight.iter().map(code).collect())
}

/// A trained layer forwards and backwards: what leaves it, the derivative by what enters, and those by weights and codebooks.
fn trained(on: &dyn Compute, config: &ModelConfig, k_chunk: usize) -> Vec<Vec<f32>> {
    let Layer { norms, linears, .. } = fixture::layer(config, 0.5);
    let in_features = linears.each_ref().map(|linear| linear.in_features);
    let mut place = (0, Projection::ALL.into_iter());
    let projections = linears.map(|original| {
        let (codebook, codes) = coded(&original);
        let at = (place.0, place.1.next().unwrap());
        let coded = Coded { original: Arc::new(original), codes: Arc::new(codes) };
        let mut read = || Ok(coded.clone());
        on.trained(at, &codebook, &mut read).unwrap()
    });
    let layer = Compensated { config: &config.layers[0], norms, projections, in_features, k_chunks: [k_chunk; 4] };
    let (ropes, texts) = (Ropes::new(config, TOKENS), (TEXTS, TOKENS));
    let mut h = on.put(numbers(20, TEXTS * TOKENS * config.hidden_size, 1.0)).unwrap();
    let (trace, inputs) = layer.forward(on, config, &ropes, texts, &mut h).unwrap();
    let mut out = vec![values(on, &h)];
    out.extend(inputs.iter().map(|x| values(on, x)));
    let mut d = on.put(numbers(21, TEXTS * TOKENS * config.hidden_size, 1.0)).unwrap();
    let gradients = layer.backward(on, config, &ropes, texts, trace, &mut d).unwrap();
    out.push(values(on, &d));
    for (projection, gradient) in layer.projections.iter().zip(&gradients) {
        out.push(values(on, gradient));
        out.push(on.slopes(projection, 8, gradient).unwrap());
    }
    out
}

#[test]
fn derivatives_of_all_families_are_the_host_s() {
    on_gpu(|gpu| {
        let plain = fixture::config();
        let base = trained(&Host, &plain, 32);
        for (name, config) in fixture::variants(&plain) {
            // What the device kept is another layer's.
            gpu.projections.borrow_mut().clear();
            let (want, got) = (trained(&Host, &config, 32), trained(gpu, &config, 32));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                // TF32 has 2^-11, of which up to eight products follow each other, and bfloat16 keeps what waits. Where
                // that lets another channel be taken, a token's numbers jump.
                let off = distance(got, want);
                assert!(off < 2e-2, "{name}, {i}: off by {off}");
            }
            gpu.projections.borrow_mut().clear();
            assert_eq!(got, trained(gpu, &config, 32), "{name}: not the same bits twice");
            let off = distance(&got[5], &base[5]);
            assert_eq!(off > 3e-2, name != "plain", "{name}: derivatives are off by {off} from another layer's");
        }
        gpu.projections.borrow_mut().clear();
        assert!(distance(&trained(gpu, &plain, 0)[5], &base[5]) > 3e-2, "compensation would not show");
    });
}

/// Inputs with much in common, of which some channels are large now and then; some alike in size, some silent.
fn inputs(tokens: usize, n: usize) -> Vec<f32> {
    let draws = numbers(5, tokens * n, 1.0);
    let common = numbers(6, tokens, 1.0);
    let each = draws.iter().enumerate().map(|(i, &x)| match (i % n) % 8 {
        0 => 0.0,
        1 => (x * 4.0).round() / 2.0,
        2 => x * 9.0,
        _ => x + common[i / n],
    });
    each.collect()
}

#[test]
fn what_enters_is_watched_as_on_the_host() {
    on_gpu(|gpu| {
        for n in [64, 576, 1024, 1056, 3072] {
            let x = inputs(200, n);
            let watch = Watch { k_chunks: vec![0, 32], alone: 0.6, all: true };
            let learn = |on: &dyn Compute, x: &[f32]| {
                let mut entered = on.entered(n, &watch).unwrap();
                for part in x.chunks(120 * n) {
                    entered.add(on.put(part.to_vec()).unwrap()).unwrap();
                }
                assert_eq!(entered.all(), x);
                let fits = [0, 32].map(|k| {
                    let metric = entered.fit(k).unwrap();
                    let mut lost = numbers(8, 16 * n, 1.0);
                    if k > 0 {
                        let predict =
                            |across: &[f32], triangle: &[f32], lost: &[f32]| entered.predicted(across, triangle, lost);
                        entered.together(k).unwrap().regress(predict, &mut lost).unwrap();
                    }
                    (metric.hessian.unwrap().diagonal().unwrap(), metric.taken, lost)
                });
                (entered.thresholds().unwrap(), entered.energy().unwrap(), fits)
            };
            let (want, got) = (learn(&Host, &x), learn(gpu, &x));
            assert_eq!(got.0, want.0, "{n}: thresholds");
            assert!(difference(&got.1, &want.1) < 1e-6, "{n}: energies");
            for (k, (got, want)) in got.2.iter().zip(&want.2).enumerate() {
                // Squares of numbers in TF32: 2^-11 twice, and less where many are added.
                assert!(difference(&got.0, &want.0) < 1e-3, "{n}, {k}: Hessians");
                let taken = want.1.iter().any(|&t| t > 0.0);
                assert_eq!(taken, k == 1 && n >= 64);
                assert!(!taken || difference(&got.1, &want.1) < 1e-6, "{n}, {k}: what is taken");
                // Sums in TF32, through a triangle that damping keeps within a condition of some hundreds.
                assert!(difference(&got.2, &want.2) < 2e-2, "{n}, {k}: residuals");
                let plain = numbers(8, 16 * n, 1.0);
                assert_eq!(difference(&want.2, &plain) > 3e-2, taken, "{n}, {k}: regression does not show");
            }
            let mut other = x.clone();
            other[3 * n + 5] = 50.0;
            let other = learn(gpu, &other);
            assert!(other.0 != want.0 && difference(&other.1, &want.1) > 1e-4, "{n}: another number does not show");
        }
    });
}

/// `Σ (w − q)·H·(w − q)ᵀ` over rows, for `H` of `x`, in f64.
fn loss(x: &[f32], w: &[f32], q: &[f32], n: usize) -> f64 {
    let rows = w.chunks(n).zip(q.chunks(n));
    let of_row = |(w, q): (&[f32], &[f32])| -> f64 {
        let error: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(w - q)).collect();
        x.chunks(n).map(|x| x.iter().zip(&error).map(|(x, e)| f64::from(*x) * e).sum::<f64>().powi(2)).sum()
    };
    rows.map(of_row).sum()
}

#[test]
fn codes_are_fitted_as_well_as_on_the_host() {
    on_gpu(|gpu| {
        for (n, rows) in [(96, 40), (640, 72)] {
            let x: Vec<f32> =
                inputs(3 * n, n).iter().enumerate().map(|(i, x)| x + 0.1 * ((i * 37 % 101) as f32 / 101.0)).collect();
            let w = numbers(1, rows * n, 1.0);
            let effort = Effort { rounds: 5, steps: 3 };
            let book: Vec<f32> = (0..8).map(|i| (i as f32 - 3.5) / 4.0).collect();
            let groups = Groups { bits: 3, group_size: 32, groups: n / 32 };
            let grids = [
                (AnyGrid::Codebook(Codebook { bits: 3 }), book.repeat(rows), 8),
                (AnyGrid::Groups(groups), [0.0f32, 0.13].repeat(rows * n / 32), 2 * n / 32),
            ];
            for (grid, start, p) in grids {
                let code = |w: &f32| ((w * 4.0 + 3.5).round().clamp(0.0, 7.0)) as u8;
                let fitted = |on: &dyn Compute| {
                    let mut entered = on.entered(n, &Watch { k_chunks: vec![0], alone: 1.0, all: false }).unwrap();
                    entered.add(on.put(x.clone()).unwrap()).unwrap();
                    let (mut codes, mut parameters) = (w.iter().map(code).collect::<Vec<u8>>(), start.clone());
                    let metric = entered.fit(0).unwrap();
                    metric.hessian.unwrap().refine(grid, &w, &mut codes, &mut parameters, effort).unwrap();
                    (codes, parameters)
                };
                let weights = |codes: &[u8], parameters: &[f32]| -> Vec<f32> {
                    let mut q = vec![0.0; w.len()];
                    let rows = q.chunks_mut(n).zip(codes.chunks(n)).zip(parameters.chunks(p));
                    rows.for_each(|((q, codes), parameters)| match grid {
                        AnyGrid::Codebook(grid) => crate::quantize::refine::Grid::weights(&grid, parameters, codes, q),
                        AnyGrid::Groups(grid) => crate::quantize::refine::Grid::weights(&grid, parameters, codes, q),
                    });
                    q
                };
                let begin = loss(&x, &w, &weights(&w.iter().map(code).collect::<Vec<_>>(), &start), n);
                let [host, own] = [fitted(&Host), fitted(gpu)].map(|(codes, parameters)| {
                    assert!(codes.iter().all(|&code| code < 8));
                    assert!(parameters.iter().all(|&p| half::f16::from_f32(p).to_f32() == p), "not as stored");
                    loss(&x, &w, &weights(&codes, &parameters), n)
                });
                assert!(own < 0.85 * begin, "{n}, {grid:?}: {own} after {begin}");
                assert!((own / host - 1.0).abs() < 0.03, "{n}, {grid:?}: {own}, {host} on the host");
                assert_eq!(fitted(gpu), fitted(gpu), "not the same bits twice");
            }
        }
    });
}

#[test]
fn the_head_says_what_the_host_s_says() {
    on_gpu(|gpu| {
        let (n, vocab, tokens) = (64, 5000, 33);
        for (softcap, halves) in [(None, true), (Some(2.0), false)] {
            let numbers_of = numbers(1, n * vocab, 1.0);
            let values = match halves {
                true => numbers_of.iter().map(|&x| half::f16::from_f32(x)).collect::<Vec<_>>().into(),
                false => numbers_of.into(),
            };
            let weight = Dense { in_features: n, out_features: vocab, values };
            let final_norm = numbers(2, n, 0.5).iter().map(|x| 1.0 + x).collect();
            let head = LmHead { weight: &weight, final_norm, eps: 1e-5, softcap };
            let (truth, h) = (numbers(3, tokens * n, 1.0), numbers(4, tokens * n, 1.0));
            let draws: Vec<f32> = numbers(5, tokens, 0.5).iter().map(|x| 0.5 + x).collect();
            let said = |on: &dyn Compute| {
                let (head, h) = (on.head(&head).unwrap(), on.put(h.clone()).unwrap());
                let (loss, d) = head.divergence(&truth, &h).unwrap();
                (head.logits(&h).unwrap(), loss, d, head.draw(&h, &draws).unwrap())
            };
            let (want, got) = (said(&Host), said(gpu));
            assert!(difference(&got.0, &want.0) < 1e-5);
            assert!((got.1 / want.1 - 1.0).abs() < 1e-4, "{}, {}", got.1, want.1);
            assert!(difference(&got.2, &want.2) < 5e-3 && difference(&got.2, &truth) > 0.1);
            let alike = got.3.iter().zip(&want.3).filter(|(got, want)| got == want).count();
            assert!(alike >= tokens - 1 && want.3.iter().any(|&id| id != want.3[0]), "{alike} of {tokens} drawn alike");
        }
        let weight = Dense { in_features: 32, out_features: 40, values: vec![f32::NAN; 32 * 40].into() };
        let head = LmHead { weight: &weight, final_norm: vec![1.0; 32], eps: 1e-5, softcap: None };
        let head = gpu.head(&head).unwrap();
        let error = head.draw(&gpu.put(vec![1.0; 64]).unwrap(), &[0.1, 0.9]).unwrap_err().to_string();
        assert!(error.contains("not a finite number"), "{error}");
    });
}

#[test]
fn memory_that_runs_out_names_the_way_out() {
    if !crate::devices::is_under_test("cuda") {
        return;
    }
    let cuda = Cuda::new(0, cuda::Options::default()).unwrap();
    let gpu = cuda.quantizer(&fixture::config(), Some(1 << 20)).unwrap();
    let kept = gpu.put(vec![1.0; 1 << 17]).unwrap();
    let error = gpu.put(vec![1.0; 1 << 18]).err().unwrap().to_string();
    for part in ["device memory ran out", "1 MiB wanted", "the same command goes on", "--device cpu"] {
        assert!(error.contains(part), "{error}");
    }
    // What is given back is used again.
    drop(kept);
    let again = gpu.put(vec![2.0; 1 << 17]).unwrap();
    assert_eq!(gpu.take(again).unwrap()[77], 2.0);
    assert!(gpu.peak() <= 1 << 20);
}
