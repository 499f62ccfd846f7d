//! Reference directories become checkpoints number for number.

use std::sync::atomic::AtomicBool;

use decdec::backend::GemvBackend;
use decdec::backend::cpu::Cpu;
use decdec::checkpoint::{BitWidth, Checkpoint};
use decdec::convert::convert;
use decdec::format::Floats;
use decdec::model::Model;
use decdec::open::Opened;
use decdec::progress::Silent;
use decdec::sampling::Sampling;
use decdec::weights::Linear;

use super::*;

fn to(opened: &Opened, out: &Path) -> anyhow::Result<()> {
    convert(opened, out, false, &AtomicBool::new(false), &Silent).map(drop)
}

/// What all files of a directory hold.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap())).collect()
}

/// The bits of numbers, and their type.
fn bits(floats: &Floats<'_>) -> (&'static str, Vec<u32>) {
    match floats {
        Floats::F16(v) => ("f16", v.iter().map(|x| x.to_bits().into()).collect()),
        Floats::Bf16(v) => ("bf16", v.iter().map(|x| x.to_bits().into()).collect()),
        Floats::F32(v) => ("f32", v.iter().map(|x| x.to_bits()).collect()),
    }
}

/// Everything that a projection stores, bit by bit.
fn stored(linear: &Linear<'_>) -> Vec<(&'static str, Vec<u32>)> {
    let singles = |values: &[f32]| ("f32", values.iter().map(|x| x.to_bits()).collect());
    let mut all = match &linear.weight {
        Weight::Dense(w) => vec![bits(&w.values)],
        Weight::AnyPrec(w) => vec![("words", w.planes().to_vec()), bits(w.lut())],
        Weight::LutGemm(w) => vec![("words", w.binary().to_vec()), bits(w.alpha()), bits(w.q_bias())],
    };
    all.extend(linear.bias.as_deref().map(singles));
    all.extend(linear.residual.iter().flat_map(|r| [("words", r.words().to_vec()), bits(r.scales())]));
    all.extend(linear.thresholds.as_deref().map(singles));
    all
}

/// Two models hold the same, down to the last bit.
fn assert_same(a: &dyn ModelWeights, b: &dyn ModelWeights, name: &str) {
    assert_eq!(a.config(), b.config(), "{name}");
    assert_eq!(bits(&a.embedding().unwrap().values), bits(&b.embedding().unwrap().values), "{name}");
    let head = |weights: &dyn ModelWeights| weights.head().unwrap().map(|head| bits(&head.values));
    assert_eq!(head(a), head(b), "{name}");
    assert_eq!(a.final_norm().unwrap(), b.final_norm().unwrap(), "{name}");
    for layer in 0..a.config().layers.len() {
        assert_eq!(a.bits(layer), b.bits(layer), "{name}, layer {layer}");
        assert_eq!(norms(a, layer), norms(b, layer), "{name}, layer {layer}");
        for projection in Projection::ALL {
            let [a, b] = [a, b].map(|weights| stored(&weights.projection(layer, projection).unwrap()));
            assert!(a == b, "{name}: layer {layer}, {projection} differs");
        }
    }
    let [first, second] = [(0, Projection::Qkv), (0, Projection::O)].map(|(l, p)| stored(&a.projection(l, p).unwrap()));
    assert!(first != second, "{name}: the comparison sees nothing");
}

fn logits(weights: &dyn ModelWeights, tokens: &[usize]) -> Vec<u32> {
    let backend = Cpu::new();
    let model = Model::load(&backend, weights, |_| ()).unwrap();
    let tokens: Vec<u32> = tokens.iter().map(|&id| id as u32).collect();
    let len = tokens.len() * weights.config().vocab_size;
    let (mut state, mut all) = (model.state(1, tokens.len()).unwrap(), backend.vector(len).unwrap());
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
    model.logits(&mut state, 0, &tokens, false, &mut all).unwrap();
    let mut host = vec![0.0; len];
    backend.read(&all, &mut host).unwrap();
    host.into_iter().map(f32::to_bits).collect()
}

#[test]
fn reference_directories_convert_number_for_number() {
    for dir in tiny_directories() {
        let name = dir.display().to_string();
        let place = tempfile::tempdir().unwrap();
        let [once, twice] = ["once", "twice"].map(|name| place.path().join(name));
        let reference = Opened::open(&dir, None, false).unwrap();
        to(&reference, &once).unwrap();
        let converted = Opened::open(&once, None, false).unwrap();
        assert_eq!(converted.quantization(), reference.quantization(), "{name}");
        assert_same(reference.weights(), converted.weights(), &name);
        let (ids, ..) = expected(&dir);
        assert!(logits(reference.weights(), &ids) == logits(converted.weights(), &ids), "{name}: other logits");
        // Text becomes the same tokens, too.
        let text = "a converted model reads as before";
        let encode = |opened: &Opened| opened.tokenizer().unwrap().encode(text).unwrap();
        assert_eq!(encode(&reference), encode(&converted), "{name}");

        to(&converted, &twice).unwrap();
        let (first, second) = (contents(&once), contents(&twice));
        assert!(first == second, "{name}: a second conversion changes {:?} to {:?}", first.keys(), second.keys());
        let error = to(&reference, &twice).unwrap_err().to_string();
        assert!(error.contains("--overwrite"), "{error}");
        assert!(second == contents(&twice), "{name}: what was there is left alone");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2, "{name}: nothing else is left behind");
    }
}

#[test]
fn reference_precisions_convert_one_at_a_time() {
    let dir = Made::any_prec(4, &[3, 4]).write();
    let place = tempfile::tempdir().unwrap();
    for bits in [3u32, 4] {
        let width = Some(BitWidth::try_from(f64::from(bits)).unwrap());
        let opened = Opened::open(dir.path(), width, false).unwrap();
        let out = place.path().join(bits.to_string());
        to(&opened, &out).unwrap();
        let reference = Reference::open(dir.path(), Some(bits), false).unwrap();
        assert_same(&reference, &Checkpoint::open(&out).unwrap(), "two precisions");
    }
}

#[test]
fn reference_directories_without_residuals_convert_without() {
    for made in [Made::any_prec(3, &[3]), Made::lut_gemm(4)] {
        let dir = made.write();
        for name in ["cheatsheet.pt", "thresholds.pt"] {
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        let out = dir.path().join("out");
        to(&Opened::open(dir.path(), None, false).unwrap(), &out).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert!(!checkpoint.manifest().has_residuals() && !out.join("residuals.safetensors").exists());
        assert_same(&Reference::open(dir.path(), None, false).unwrap(), &checkpoint, "no residuals");
        let twice = dir.path().join("twice");
        to(&Opened::open(&out, None, false).unwrap(), &twice).unwrap();
        assert!(contents(&out) == contents(&twice));
    }
}
