//! The reference's own directories, `tiny-*` of `$DECDEC_REFERENCE_DIR`, through the whole program.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use decdec::dec::Selection;
use decdec::generate::{Request, generate};
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::open::Opened;
use decdec::sampling::Sampling;
use safetensors::SafeTensors;

use crate::UnderTest;

/// The oracle rounds rotary frequencies and LUT-GEMM weights to f16: exact arithmetic differs by up to 9e-3.
const ORACLE_ERROR: f32 = 1.5e-2;

fn directories() -> Vec<PathBuf> {
    let default = "../shared/data";
    let dir = PathBuf::from(std::env::var("DECDEC_REFERENCE_DIR").unwrap_or_else(|_| default.into()));
    let Ok(entries) = dir.read_dir() else {
        eprintln!("skipped: no golden data");
        return Vec::new();
    };
    let tiny = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("tiny-"));
    let found: Vec<_> = entries.map(|entry| entry.expect("readable").path()).filter(tiny).collect();
    assert!(!found.is_empty(), "no tiny-* in {}", dir.display());
    found
}

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
    let mut state = model.state(tokens.len()).expect("room");
    model.begin(&mut state, &Sampling::GREEDY, &[]).expect("begins");
    let vocab = model.config().vocab_size;
    let step = state.max_tokens();
    let mut on_device = model.backend().vector(step * vocab).expect("room");
    let mut all = Vec::new();
    for tokens in tokens.chunks(step) {
        model.logits(&mut state, tokens, compensated, &mut on_device).expect("runs");
        let mut host = vec![0.0; tokens.len() * vocab];
        model.backend().read(&on_device, &mut host).expect("reads");
        all.extend(host);
    }
    all
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()))
}

pub(crate) fn reference_directories<B: UnderTest>(backend: &B) {
    for dir in directories() {
        let name = dir.display();
        let want = expected(&dir);
        let opened = Opened::open(&dir, None, false).expect("opens");
        let mut model = Model::load(backend, opened.weights(), |_| ()).expect("loads");
        let off = largest_difference(&logits(&model, &want.input, true), &want.base);
        assert!(off <= ORACLE_ERROR, "{name}: base logits are off by {off}");

        // Mixed precision takes eight k_chunks and two n_tbs.
        let every = LayerCompensation { n_tb: 2, k_chunks: [1024; 4] };
        let by_bits = vec![every; model.bit_widths().len()];
        model.compensate(Some(&Compensation { by_bits, selection: Selection::Bucket })).expect("plans");
        let compensated = logits(&model, &want.input, true);
        let off = largest_difference(&compensated, &want.all_residuals);
        assert!(off <= ORACLE_ERROR, "{name}: compensated logits are off by {off}");
        let off = largest_difference(&compensated, &want.base);
        assert!(off > 2.0 * ORACLE_ERROR, "{name}: compensation changes logits by no more than {off}");

        model.compensate(None).expect("stops");
        let request = Request {
            prompt: &want.input,
            max_new_tokens: want.greedy.len(),
            sampling: Sampling::GREEDY,
            seed: 0,
            stop_ids: &[],
            compensate_prompt: false,
        };
        let mut state = model.state(want.input.len() + want.greedy.len()).expect("room");
        let made = generate(&model, &mut state, &request, |_| Ok(ControlFlow::Continue(()))).expect("runs");
        assert_eq!(made.tokens, want.greedy, "{name}");
    }
}
