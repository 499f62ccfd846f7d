//! Known answers: every golden file, made by the reference's own kernels and scripts.

mod answers;
mod common;

use common::{devices, half_tolerance, misfit, oracle, tolerance};
use decdec::backend::GemvBackend;
use decdec::backend::cpu::Cpu;
use decdec::dec::{DecPlan, Selection};
use decdec::format::{AnyPrec, Floats, LutGemm, Residual};
use decdec::weights::{Linear, Weight};
use half::f16;
use safetensors::{Dtype, SafeTensors};

/// Runs `check` on the bytes of every golden whose name starts with `prefix`; at least one must be there.
fn each_golden(prefix: &str, check: impl Fn(&Golden<'_>)) {
    let dir = answers::golden();
    let mut seen = 0;
    for entry in dir.read_dir().expect("readable").map(|entry| entry.expect("readable").path()) {
        let name = entry.file_name().expect("a file").to_string_lossy().into_owned();
        if name.starts_with(prefix) && name.ends_with(".safetensors") {
            let bytes = std::fs::read(&entry).expect("readable");
            let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("safetensors");
            let metadata = metadata.metadata().clone().unwrap_or_default();
            check(&Golden { name, tensors: SafeTensors::deserialize(&bytes).expect("safetensors"), metadata });
            seen += 1;
        }
    }
    assert!(seen > 0, "no golden named {prefix}* in {}", dir.display());
}

struct Golden<'a> {
    name: String,
    tensors: SafeTensors<'a>,
    metadata: std::collections::HashMap<String, String>,
}

impl Golden<'_> {
    fn number(&self, key: &str) -> usize {
        self.metadata[key].parse().expect("a number")
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors.tensor(name).expect(name).shape().to_vec()
    }

    fn words(&self, name: &str) -> Vec<u32> {
        let tensor = self.tensors.tensor(name).expect(name);
        assert_eq!(tensor.dtype(), Dtype::I32, "{name}");
        tensor.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
    }

    fn floats(&self, name: &str) -> Floats<'static> {
        let tensor = self.tensors.tensor(name).expect(name);
        match tensor.dtype() {
            Dtype::F16 => {
                let two = |b: &[u8]| f16::from_le_bytes(b.try_into().expect("two bytes"));
                tensor.data().chunks_exact(2).map(two).collect::<Vec<_>>().into()
            }
            Dtype::F32 => {
                let four = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("four bytes"));
                tensor.data().chunks_exact(4).map(four).collect::<Vec<_>>().into()
            }
            other => panic!("{name} is {other:?}"),
        }
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.floats(name).to_f32().into_owned()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.tensors.tensor(name).expect(name).data().to_vec()
    }

    /// Names of the cases in a file of several, `case.what`.
    fn cases(&self, what: &str) -> Vec<String> {
        let suffix = format!(".{what}");
        self.tensors.names().iter().filter_map(|name| name.strip_suffix(&suffix)).map(String::from).collect()
    }

    fn anyprec(&self) -> AnyPrec<'static> {
        let [bits, out_features, words] = self.shape("ap.qweight")[..] else { panic!("three sides") };
        let planes = self.words("ap.qweight").into();
        AnyPrec::new(words * 32, out_features, bits, planes, self.floats("ap.lut")).expect("valid")
    }

    fn lutgemm(&self) -> LutGemm<'static> {
        let [words, bits, out_features] = self.shape("lutgemm.qweight")[..] else { panic!("three sides") };
        let (alpha, q_bias) = (self.floats("lutgemm.alpha"), self.floats("lutgemm.q_bias"));
        let binary = self.words("lutgemm.qweight").into();
        LutGemm::new(words * 32, out_features, bits, self.number("group_size"), binary, alpha, q_bias).expect("valid")
    }

    fn residual(&self) -> Residual<'static> {
        let [in_features, words] = self.shape("dec.q_residual")[..] else { panic!("two sides") };
        let scales = row_order(&self.f32s("dec.reordered_scales"));
        Residual::new(in_features, words * 8, self.words("dec.q_residual").into(), scales.into()).expect("valid")
    }
}

/// The reference's scales are nibble-major (spec §2.3).
fn row_order(reordered: &[f32]) -> Vec<f32> {
    let words = reordered.len() / 8;
    (0..reordered.len()).map(|row| reordered[row % 8 * words + row / 8]).collect()
}

/// The largest difference, relative to the largest number expected.
fn relative_error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(0f32, |m, w| m.max(w.abs()));
    got.iter().zip(want).fold(0f32, |m, (g, w)| m.max((g - w).abs())) / scale
}

#[test]
fn golden_anyprec_dequantizes_exactly() {
    each_golden("g_", |golden| {
        let w = golden.anyprec();
        let want = golden.f32s("ap.dequant");
        let mut row = vec![0.0; w.in_features()];
        for (r, want) in want.chunks_exact(w.in_features()).enumerate() {
            w.row(r, &mut row);
            assert_eq!(row, want, "{} row {r}", golden.name);
        }
        // Negative control: one flipped bit is one wrong weight.
        let mut planes = w.planes().to_vec();
        planes[3] ^= 1 << 7;
        let wrong =
            AnyPrec::new(w.in_features(), w.out_features(), w.bits(), planes.into(), w.lut().clone()).expect("valid");
        wrong.row(0, &mut row);
        assert_eq!(row.iter().zip(&want).filter(|(a, b)| a != b).count(), 1, "{}", golden.name);
    });
}

#[test]
fn golden_anyprec_packs_exactly() {
    each_golden("anyprec_pack", |golden| {
        let cases = golden.cases("codes");
        assert!(!cases.is_empty());
        for case in cases {
            let codes = golden.bytes(&format!("{case}.codes"));
            let want = golden.words(&format!("{case}.qweight"));
            let [bits, out_features, words] = golden.shape(&format!("{case}.qweight"))[..] else { panic!("three") };
            // Half of these have fewer than eight rows: check their packing through a padded copy.
            let rows = out_features.next_multiple_of(8);
            let mut padded = codes.clone();
            padded.resize(rows * words * 32, 0);
            let lut = Floats::from(vec![0f32; rows << bits]);
            let w = AnyPrec::pack(words * 32, rows, bits, &padded, lut).expect("valid");
            for plane in 0..bits {
                let got = &w.planes()[plane * rows * words..][..out_features * words];
                assert_eq!(got, &want[plane * out_features * words..][..out_features * words], "{case} plane {plane}");
            }
            let mut row = vec![0; words * 32];
            for (r, want) in codes.chunks_exact(words * 32).enumerate() {
                w.codes(r, &mut row);
                assert_eq!(row, want, "{case} row {r}");
            }
        }
    });
}

#[test]
fn golden_lutgemm_conversion_is_exact() {
    each_golden("bcq", |golden| {
        let cases = golden.cases("codes");
        assert!(!cases.is_empty());
        for case in cases {
            let name = |what: &str| format!("{case}.{what}");
            let [out_features, in_features] = golden.shape(&name("codes"))[..] else { panic!("two sides") };
            let [groups, bits, _] = golden.shape(&name("alpha"))[..] else { panic!("three sides") };
            let (codes, scale, zero) =
                (golden.bytes(&name("codes")), golden.f32s(&name("scale")), golden.f32s(&name("zero")));
            let group_size = in_features / groups;
            let w = LutGemm::from_uniform(in_features, out_features, bits, group_size, &codes, &scale, &zero)
                .expect("valid");
            assert_eq!(w.binary(), golden.words(&name("binary")), "{case}");
            assert_eq!(w.alpha().to_f32(), golden.f32s(&name("alpha")), "{case}");
            let (got, want) = (w.q_bias().to_f32(), golden.f32s(&name("q_bias")));
            assert!(relative_error(&got, &want) < 1e-6, "{case}: the biases differ in more than rounding");
            let mut row = vec![0; in_features];
            for (r, want) in codes.chunks_exact(in_features).enumerate() {
                w.codes(r, &mut row);
                assert_eq!(row, want, "{case} row {r}");
            }
        }
    });
}

#[test]
fn golden_residuals_match_the_reference() {
    each_golden("cheatsheet", |golden| {
        let cases = golden.cases("cheatsheet");
        assert!(!cases.is_empty());
        for case in cases {
            let name = |what: &str| format!("{case}.{what}");
            let [out_features, in_features] = golden.shape(&name("original"))[..] else { panic!("two sides") };
            let (original, quantized) = (golden.f32s(&name("original")), golden.f32s(&name("quantized")));
            let lost: Vec<f32> = original.iter().zip(&quantized).map(|(o, q)| o - q).collect();
            let ours = Residual::quantize(in_features, out_features, &lost).expect("valid");
            let scales = row_order(&golden.f32s(&name("reordered_scales")));
            // The reference leaves NaN scales where a row has no residual.
            let finite: Vec<f32> = scales.iter().map(|&s| if s.is_finite() { s } else { 0.0 }).collect();
            let words = golden.words(&name("cheatsheet")).into();
            let theirs = Residual::new(in_features, out_features, words, finite.into()).expect("valid");
            let (mut a, mut b) = (vec![0.0; in_features], vec![0.0; in_features]);
            let (mut equal, mut comparable) = (0, 0);
            let (mut our_error, mut their_error) = (0.0, 0.0);
            for (r, lost) in lost.chunks_exact(in_features).enumerate() {
                ours.row(r, &mut a);
                if !scales[r].is_finite() || scales[r] == 0.0 {
                    assert!(a.iter().all(|&v| v == 0.0), "{case} row {r} has no residual");
                    continue;
                }
                theirs.row(r, &mut b);
                let error = |row: &[f32]| row.iter().zip(lost).map(|(q, l)| f64::from(q - l).powi(2)).sum::<f64>();
                our_error += error(&a);
                their_error += error(&b);
                if (ours.scales().get(r) / scales[r] - 1.0).abs() < 1e-3 {
                    comparable += in_features;
                    equal += (0..in_features).filter(|&k| ours.nibble(k, r) == theirs.nibble(k, r)).count();
                }
            }
            // Half-precision candidates are not quite ours: a single row may come out better by luck.
            assert!(our_error <= their_error * 1.0001, "{case}: {our_error} against {their_error}");
            assert!(
                comparable > in_features * out_features * 9 / 10,
                "{case}: only {comparable} nibbles share a scale"
            );
            assert!(equal as f64 >= 0.998 * comparable as f64, "{case}: {equal} of {comparable} nibbles agree");
        }
    });
}

/// A product of a golden: the terms of every row, their exact sums, and what f32 sums of them may be off.
struct Product {
    terms: Vec<Vec<f64>>,
    exact: Vec<f64>,
    allowed: Vec<f64>,
}

impl Product {
    /// `rounding` is that of the numbers a backend stores.
    fn new(terms: Vec<Vec<f64>>, (exact, magnitudes): (Vec<f64>, Vec<f64>), rounding: f64) -> Self {
        let of_row = |row: usize| tolerance(rounding, exact[row], terms[row].len() + 1, magnitudes[row]);
        let allowed = (0..exact.len()).map(of_row).collect();
        Self { terms, exact, allowed }
    }

    /// The base product `W·x`.
    fn base(linear: &Linear<'_>, x: &[f32], rounding: f64) -> Self {
        let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
        let mut row = vec![0.0; x.len()];
        let terms = (0..linear.weight.out_features()).map(|r| {
            linear.weight.row(r, &mut row);
            row.iter().zip(&x).map(|(&w, x)| f64::from(w) * x).collect()
        });
        Self::new(terms.collect(), oracle::gemv(linear, &x), rounding)
    }

    /// The residuals' product over `channels`.
    fn correction(linear: &Linear<'_>, channels: &[u32], x: &[f32], rounding: f64) -> Self {
        let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
        let one = |&channel: &u32| oracle::correction(linear, &[channel], &x).0;
        let by_channel: Vec<Vec<f64>> = channels.iter().map(one).collect();
        let rows = 0..linear.weight.out_features();
        let terms = rows.map(|row| by_channel.iter().map(|terms| terms[row]).collect()).collect();
        Self::new(terms, oracle::correction(linear, channels, &x), rounding)
    }

    /// Where `got` is not this product.
    fn misfit(&self, got: &[f32]) -> Option<String> {
        misfit(got, &self.exact, |row| self.allowed[row])
    }

    /// Where what the reference's half-precision sums gave is not this product.
    fn reference_misfit(&self, reference: &[f32]) -> Option<String> {
        let squares = |row: usize| self.terms[row].iter().map(|term| term * term).sum();
        misfit(reference, &self.exact, |row| half_tolerance(self.terms[row].len(), squares(row)))
    }

    /// The backend and the reference both computed this product, which is not that of other rows.
    fn assert(&self, got: &[f32], reference: &[f32], what: &str) {
        assert_eq!(self.misfit(got), None, "{what}");
        assert_eq!(self.reference_misfit(reference), None, "{what}: the reference");
        let mut turned = reference.to_vec();
        turned.rotate_left(1);
        assert!(self.reference_misfit(&turned).is_some(), "{what}: rows cannot be told apart");
    }
}

/// The outputs of one backend on one golden: both base products, and the residual product alone.
fn check_products<B: GemvBackend>(backend: &B, rounding: f64, golden: &Golden<'_>) {
    let x = golden.f32s("x");
    let run = |linear: &Linear<'_>, plan: Option<&DecPlan>, x: &[f32]| {
        let matrix = backend.matrix(linear).expect("uploaded");
        let mut input = backend.vector(x.len()).expect("room");
        backend.write(x, &mut input).expect("written");
        let mut output = backend.vector(linear.weight.out_features()).expect("room");
        match plan {
            None => backend.gemv(&matrix, &input, &mut output).expect("run"),
            Some(plan) => {
                let plan = backend.plan(&matrix, plan).expect("planned");
                backend.dec_gemv(&matrix, &plan, &input, &mut output).expect("run");
            }
        }
        let mut y = vec![0.0; linear.weight.out_features()];
        backend.read(&output, &mut y).expect("read");
        y
    };
    let name = &golden.name;
    let anyprec = Linear::plain(Weight::AnyPrec(golden.anyprec()));
    let product = Product::base(&anyprec, &x, rounding);
    product.assert(&run(&anyprec, None, &x), &golden.f32s("ap.output"), &format!("{name}, anyprec"));
    let wrong = Linear::plain(Weight::AnyPrec(one_code_flipped(&golden.anyprec(), &x)));
    assert!(product.misfit(&run(&wrong, None, &x)).is_some(), "{name}: a flipped code goes unseen");

    let lutgemm = Linear::plain(Weight::LutGemm(golden.lutgemm()));
    let product = Product::base(&lutgemm, &x, rounding);
    product.assert(&run(&lutgemm, None, &x), &golden.f32s("lutgemm.output"), &format!("{name}, lutgemm"));
    assert!(product.misfit(&run(&anyprec, None, &x)).is_some(), "{name}: the formats cannot be told apart");

    // The residual alone: a base of zeros. Its selection is the reference's, forced by an `x` without the rest.
    let base = golden.anyprec();
    let zeros = Floats::from(vec![0f32; base.lut().len()]);
    let base = AnyPrec::new(x.len(), base.out_features(), base.bits(), base.planes().to_vec().into(), zeros);
    let thresholds = golden.f32s("dec.thresholds");
    let linear = Linear {
        weight: Weight::AnyPrec(base.expect("valid")),
        bias: None,
        residual: Some(golden.residual()),
        thresholds: Some(thresholds.clone().into()),
    };
    let selected: Vec<u32> = reference_selection(golden).into_iter().map(|k| k as u32).collect();
    let masked = |kept: &[u32]| {
        let mut masked = vec![0.0; x.len()];
        kept.iter().for_each(|&k| masked[k as usize] = x[k as usize]);
        masked
    };
    let rows = linear.weight.out_features();
    // More thread blocks than words of eight rows have nothing to do.
    let (k_chunk, n_tb) = (golden.number("k_chunk"), golden.number("n_tb").min(rows / 8));
    let plan = DecPlan::new(x.len(), rows, &thresholds, k_chunk, n_tb, Selection::Exact).expect("valid");
    let product = Product::correction(&linear, &selected, &x, rounding);
    let y = run(&linear, Some(&plan), &masked(&selected));
    product.assert(&y, &golden.f32s("dec.output"), &format!("{name}, the residual product"));
    let fewer = &selected[..selected.len() - 1];
    let y = run(&linear, Some(&plan), &masked(fewer));
    assert!(product.misfit(&y).is_some(), "{name}: one channel fewer goes unseen");
    let without = Product::correction(&linear, fewer, &x, rounding);
    assert!(without.reference_misfit(&golden.f32s("dec.output")).is_some(), "{name}: nor does the reference say so");
}

/// The matrix with another code in its last row, at the channel where `x` is largest.
fn one_code_flipped(w: &AnyPrec<'_>, x: &[f32]) -> AnyPrec<'static> {
    let (in_features, rows, bits) = (w.in_features(), w.out_features(), w.bits());
    let mut codes = vec![0; rows * in_features];
    codes.chunks_exact_mut(in_features).enumerate().for_each(|(row, codes)| w.codes(row, codes));
    let largest = (0..in_features).max_by(|&a, &b| x[a].abs().total_cmp(&x[b].abs())).expect("a channel");
    codes[(rows - 1) * in_features + largest] ^= 1;
    AnyPrec::pack(in_features, rows, bits, &codes, w.lut().to_f32().into_owned().into()).expect("valid")
}

/// The reference's selection: `k_chunk` slots a chunk, the last chunk's tail unused.
fn reference_selection(golden: &Golden<'_>) -> Vec<usize> {
    let tensor = golden.tensors.tensor("dec.n_rows_to_fetch").expect("there");
    let count = i64::from_le_bytes(tensor.data()[..8].try_into().expect("eight bytes")) as usize;
    golden.words("dec.selected_rows")[..count].iter().map(|&k| k as usize).collect()
}

#[test]
fn golden_products_on_cpu() {
    if devices::is_under_test("cpu") {
        each_golden("g_", |golden| check_products(&Cpu::new(), 0.0, golden));
    }
}

#[test]
fn golden_products_on_cuda() {
    use decdec::backend::cuda::{Cuda, Dtype, Options};
    // What is stored in half precision is rounded by that much.
    const HALF: f64 = 1.0 / 2048.0;
    if devices::is_under_test("cuda") {
        let options = Options { dtype: Dtype::Float16, ..Options::default() };
        let backend = Cuda::new(0, options).expect("a CUDA device");
        each_golden("g_", |golden| check_products(&backend, HALF, golden));
    }
}

#[cfg(feature = "reference-wgpu")]
#[test]
fn golden_products_on_wgpu() {
    if devices::is_under_test("wgpu") {
        let backend = decdec::backend::wgsl::Wgpu::open(None).expect("a Vulkan adapter");
        each_golden("g_", |golden| check_products(&backend, 0.0, golden));
    }
}

#[test]
fn golden_bucket_selection_agrees_but_for_the_last_bucket() {
    each_golden("g_", |golden| {
        let (x, thresholds) = (golden.f32s("x"), golden.f32s("dec.thresholds"));
        let plan =
            DecPlan::new(x.len(), 8, &thresholds, golden.number("k_chunk"), 1, Selection::Bucket).expect("valid");
        let bucket = |k: usize| plan.edges().partition_point(|&edge| edge > x[k].abs());
        let mut ours = Vec::new();
        plan.select(&x, &mut ours);
        let theirs = reference_selection(golden);
        assert_eq!(ours.len(), theirs.len(), "{}", golden.name);
        for (channels, count) in plan.chunks() {
            let of = |list: Vec<usize>| -> Vec<usize> { list.into_iter().filter(|k| channels.contains(k)).collect() };
            let mut ours: Vec<_> = of(ours.iter().map(|&k| k as usize).collect()).into_iter().map(bucket).collect();
            let mut theirs: Vec<_> = of(theirs.clone()).into_iter().map(bucket).collect();
            assert_eq!(ours.len(), count);
            ours.sort_unstable();
            theirs.sort_unstable();
            // The reference's edges are half precision: a value on an edge may change sides.
            let differ = ours.iter().zip(&theirs).filter(|(a, b)| a.abs_diff(**b) > 1).count();
            assert_eq!(differ, 0, "{}: buckets {ours:?} against {theirs:?}", golden.name);
        }
    });
}

/// The tolerance of half-precision sums against sums in half precision: one chain, the largest terms first.
#[test]
fn sums_in_half_precision_are_as_far_off_as_is_allowed() {
    for (depth, at_least) in [(8, 0.0), (128, 0.0), (1024, 1e-3), (5120, 4e-3)] {
        let x = common::heavy_tailed(depth as u64, depth);
        let (mut worst, mut relative) = (0f64, 0f64);
        for row in 0..64 {
            let w = common::uniform(1000 + row, depth);
            let mut terms: Vec<f64> = w.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x)).collect();
            terms.sort_by(|a, b| b.abs().total_cmp(&a.abs()));
            let half = |value: f64| f16::from_f64(value).to_f64();
            let chain = terms.iter().fold(0.0, |sum, &term| half(sum + half(term)));
            let squares: f64 = terms.iter().map(|term| term * term).sum();
            let (off, allowed) = ((chain - terms.iter().sum::<f64>()).abs(), half_tolerance(depth, squares));
            worst = worst.max(off / allowed);
            relative = relative.max(off / squares.sqrt());
            // The largest term alone is more than may be missing.
            assert!(terms[0].abs() > allowed, "{depth} terms: {} is lost in {allowed}", terms[0]);
        }
        assert!(worst <= 1.0, "{depth} terms are {worst} times as far off as is allowed");
        assert!(worst > 0.05, "{depth} terms are never more than {worst} of what is allowed off");
        assert!(relative >= at_least, "{depth} terms are {relative} off");
    }
}
