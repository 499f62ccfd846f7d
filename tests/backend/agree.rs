//! The devices under test among each other, on the same inputs.

use decdec::dec::{DecPlan, Selection};
use decdec::format::AnyPrec;
use decdec::weights::{Linear, Weight};

use crate::UnderTest;
use crate::common::{self, Stored, devices, misfit, oracle, tolerance};

const INNER: usize = 1056;
const OUTER: usize = 72;

fn linears() -> Vec<Linear<'static>> {
    let weights = [
        common::anyprec(1, INNER, OUTER, 3, Stored::F16),
        common::anyprec(2, INNER, OUTER, 4, Stored::Bf16),
        common::lutgemm(3, INNER, OUTER, 3, 32, Stored::F32),
        common::lutgemm(4, INNER, OUTER, 4, 96, Stored::F16),
        common::dense(5, INNER, OUTER, Stored::F16),
    ];
    weights.into_iter().enumerate().map(|(i, weight)| common::compensable(10 + i as u64, weight)).collect()
}

fn plan(linear: &Linear<'_>) -> DecPlan {
    DecPlan::new(INNER, OUTER, linear.thresholds.as_ref().unwrap(), 24, 3, Selection::Bucket).unwrap()
}

/// Of every linear layer: the base product, the compensated one, the selected channels.
type Outputs = Vec<(Vec<f32>, Vec<f32>, Vec<u32>)>;

fn outputs<B: UnderTest>(backend: &B, linears: &[Linear<'_>], x: &[f32]) -> Outputs {
    let one = |linear: &Linear<'_>| {
        let matrix = backend.matrix(linear).unwrap();
        let plan = backend.plan(&matrix, &plan(linear)).unwrap();
        let (mut vector, mut y) = (backend.vector(INNER).unwrap(), backend.vector(OUTER).unwrap());
        backend.write(x, &mut vector).unwrap();
        let (mut base, mut whole) = (vec![0.0; OUTER], vec![0.0; OUTER]);
        backend.gemv(&matrix, &vector, &mut y).unwrap();
        backend.read(&y, &mut base).unwrap();
        backend.dec_gemv(&matrix, &plan, &vector, &mut y).unwrap();
        backend.read(&y, &mut whole).unwrap();
        (base, whole, backend.select(&plan, &vector).unwrap())
    };
    linears.iter().map(one).collect()
}

fn on(device: &str, linears: &[Linear<'_>], x: &[f32]) -> Outputs {
    use decdec::backend::cuda::{Cuda, Dtype, Options};
    match device {
        "cpu" => outputs(&decdec::backend::cpu::Cpu::new(), linears, x),
        "cuda" => {
            let options = Options { dtype: Dtype::Float32, ..Options::default() };
            outputs(&Cuda::new(0, options).unwrap(), linears, x)
        }
        #[cfg(feature = "reference-wgpu")]
        "wgpu" => outputs(&decdec::backend::wgsl::Wgpu::open(None).unwrap(), linears, x),
        _ => panic!("{device} is not built in"),
    }
}

/// The first difference that rounding does not explain: either may be off by a bound of f32 sums.
fn difference(a: &Outputs, b: &Outputs, linears: &[Linear<'_>], x: &[f32]) -> Option<String> {
    let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    linears.iter().enumerate().find_map(|(i, linear)| {
        let (_, base) = oracle::gemv(linear, &exact);
        let (_, correction) = oracle::correction(linear, &a[i].2, &exact);
        let wide = |y: &[f32]| y.iter().map(|&y| f64::from(y)).collect::<Vec<_>>();
        let base_allowed = |r: usize| 2.0 * tolerance(0.0, 0.0, INNER, base[r]);
        let allowed = |r: usize| 2.0 * tolerance(0.0, 0.0, INNER, base[r] + correction[r]);
        misfit(&a[i].0, &wide(&b[i].0), base_allowed)
            .or_else(|| misfit(&a[i].1, &wide(&b[i].1), allowed))
            .or_else(|| (a[i].2 != b[i].2).then(|| format!("selections {:?} and {:?}", a[i].2, b[i].2)))
            .map(|what| format!("layer {i}: {what}"))
    })
}

#[test]
fn devices_agree() {
    let (linears, x) = (linears(), common::heavy_tailed(30, INNER));
    let named = devices::named_devices();
    let all: Vec<_> = named.iter().map(|device| on(device, &linears, &x)).collect();
    for (i, a) in all.iter().enumerate() {
        for (j, b) in all.iter().enumerate().skip(i + 1) {
            assert_eq!(difference(a, b, &linears, &x), None, "{} and {}", named[i], named[j]);
        }
    }
    if let [one] = &named[..] {
        devices::skip(&format!("{one} alone is under test, two devices can agree"));
    }

    // Negative control: one code of one layer flipped on one side.
    let Weight::AnyPrec(w) = &linears[0].weight else { unreachable!() };
    let mut codes = vec![0u8; OUTER * INNER];
    codes.chunks_exact_mut(INNER).enumerate().for_each(|(row, out)| w.codes(row, out));
    codes[40 * INNER + 1000] ^= 4;
    let flipped = AnyPrec::pack(INNER, OUTER, 3, &codes, w.lut().clone()).unwrap();
    let mut changed = linears.clone();
    changed[0].weight = Weight::AnyPrec(flipped);
    let other = on(&named[0], &changed, &x);
    assert!(difference(&all[0], &other, &linears, &x).is_some(), "a flipped code goes unseen");
}
