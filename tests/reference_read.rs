//! The reference's directories, read by this crate and computed by nothing of it but `Weight::row`: a decoder in
//! f64, as plain as it can be, against the logits of transformers. Then directories made here, sound and broken.

mod pt;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use decdec::checkpoint::WeightFormat;
use decdec::config::{ModelConfig, Projection};
use decdec::format::anyprec;
use decdec::source::reference::Reference;
use decdec::source::torch::TorchFile;
use decdec::weights::{Linear, ModelWeights, Weight};
use half::f16;
use pt::{Array, Node, save};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::SafeTensors;

/// A dense matrix, `[out_features, in_features]`, and its bias.
struct Matrix {
    in_features: usize,
    values: Vec<f64>,
    bias: Vec<f64>,
}

/// A dequantized model.
struct Model {
    config: ModelConfig,
    embedding: Matrix,
    head: Matrix,
    final_norm: Vec<f32>,
    layers: Vec<Layer>,
}

struct Layer {
    norms: (Vec<f32>, Vec<f32>),
    projections: [Matrix; 4], // as in `Projection::ALL`
}

impl Matrix {
    fn new(linear: &Linear<'_>, with_residual: bool) -> Self {
        let (in_features, out_features) = (linear.weight.in_features(), linear.weight.out_features());
        let mut values = Vec::with_capacity(in_features * out_features);
        let (mut weight, mut residual) = (vec![0.0; in_features], vec![0.0; in_features]);
        for row in 0..out_features {
            linear.weight.row(row, &mut weight);
            if with_residual {
                linear.residual.as_ref().expect("a residual").row(row, &mut residual);
            }
            // The oracle held its matrices in half precision: exact for codebooks, a rounding for sums of alphas.
            values.extend(weight.iter().zip(&residual).map(|(&w, &r)| f16::from_f32(w).to_f64() + f64::from(r)));
        }
        let bias = linear.bias.as_ref().map_or(vec![0.0; out_features], |b| b.iter().map(|&b| b.into()).collect());
        Self { in_features, values, bias }
    }

    fn times(&self, x: &[f64]) -> Vec<f64> {
        let rows = self.values.chunks_exact(self.in_features).zip(&self.bias);
        rows.map(|(row, bias)| bias + row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect()
    }
}

impl Model {
    fn read(weights: &dyn ModelWeights, with_residuals: bool) -> Self {
        let config = weights.config().clone();
        let table = |dense| Matrix::new(&Linear::plain(Weight::Dense(dense)), false);
        let embedding = table(weights.embedding().unwrap());
        let head = table(weights.head().unwrap().unwrap_or_else(|| weights.embedding().unwrap()));
        let layer = |layer| Layer {
            norms: weights.layer_norms(layer).unwrap(),
            projections: Projection::ALL.map(|p| Matrix::new(&weights.projection(layer, p).unwrap(), with_residuals)),
        };
        let layers = (0..config.num_layers).map(layer).collect();
        Self { embedding, head, final_norm: weights.final_norm().unwrap(), layers, config }
    }

    /// Logits of every position, `[tokens, vocab_size]`.
    fn logits(&self, tokens: &[usize]) -> Vec<f64> {
        let hidden = self.config.hidden_size;
        let mut stream: Vec<Vec<f64>> =
            tokens.iter().map(|&t| self.embedding.values[t * hidden..][..hidden].to_vec()).collect();
        for layer in &self.layers {
            let [qkv, o, gate_up, down] = &layer.projections;
            let fused: Vec<_> = stream.iter().map(|h| qkv.times(&self.norm(h, &layer.norms.0))).collect();
            for (position, h) in stream.iter_mut().enumerate() {
                add(h, &o.times(&self.attend(&fused, position)));
                let gu = gate_up.times(&self.norm(h, &layer.norms.1));
                let (gate, up) = gu.split_at(gu.len() / 2);
                let product: Vec<_> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                add(h, &down.times(&product));
            }
        }
        stream.iter().flat_map(|h| self.head.times(&self.norm(h, &self.final_norm))).collect()
    }

    /// `2·depth·2^-24·Σ|w·x|` of the head's largest row, for an `x` whose mean square is 1 before γ.
    fn head_tolerance(&self) -> f64 {
        let hidden = self.config.hidden_size;
        let gamma = self.final_norm.iter().map(|&g| f64::from(g));
        // By Cauchy and Schwarz, Σ|w·γ·x| ≤ |w·γ|·√hidden.
        let rows = self.head.values.chunks_exact(hidden);
        let norms = rows.map(|row| row.iter().zip(gamma.clone()).map(|(w, g)| (w * g).powi(2)).sum::<f64>().sqrt());
        2.0 * hidden as f64 * 2f64.powi(-24) * norms.fold(0.0, f64::max) * (hidden as f64).sqrt()
    }

    fn norm(&self, h: &[f64], gamma: &[f32]) -> Vec<f64> {
        let mean = h.iter().map(|x| x * x).sum::<f64>() / h.len() as f64;
        let scale = 1.0 / (mean + f64::from(self.config.rms_norm_eps)).sqrt();
        h.iter().zip(gamma).map(|(x, &g)| x * scale * f64::from(g)).collect()
    }

    /// Head `head` (queries first, then keys) at `position`, rotated: dimension `i` pairs with `i + half`.
    fn rotated(&self, qkv: &[f64], head: usize, position: usize) -> Vec<f64> {
        let dim = self.config.head_dim;
        let (first, second) = qkv[head * dim..][..dim].split_at(dim / 2);
        // The oracle was a half-precision model turned to f32: its rotary frequencies are rounded to f16.
        let frequency = |i: usize| f16::from_f64(self.config.rope_theta.powf(-(2.0 * i as f64) / dim as f64)).to_f64();
        let angle = |i| position as f64 * frequency(i);
        let pairs = first.iter().zip(second).enumerate();
        let low = pairs.clone().map(|(i, (a, b))| a * angle(i).cos() - b * angle(i).sin());
        let high = pairs.map(|(i, (a, b))| b * angle(i).cos() + a * angle(i).sin());
        low.chain(high).collect()
    }

    fn attend(&self, qkv: &[Vec<f64>], position: usize) -> Vec<f64> {
        let ModelConfig { num_heads, num_kv_heads, head_dim, .. } = self.config;
        let mut out = Vec::new();
        for head in 0..num_heads {
            let kv_head = head * num_kv_heads / num_heads;
            let query = self.rotated(&qkv[position], head, position);
            let scores = qkv[..=position].iter().enumerate().map(|(p, qkv)| {
                let key = self.rotated(qkv, num_heads + kv_head, p);
                query.iter().zip(&key).map(|(q, k)| q * k).sum::<f64>() / (head_dim as f64).sqrt()
            });
            let scores: Vec<_> = scores.collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<_> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut mixed = vec![0.0; head_dim];
            for (weight, qkv) in weights.iter().zip(qkv) {
                let value = &qkv[(num_heads + num_kv_heads + kv_head) * head_dim..][..head_dim];
                mixed.iter_mut().zip(value).for_each(|(m, v)| *m += weight / sum * v);
            }
            out.extend(mixed);
        }
        out
    }
}

fn add(h: &mut [f64], delta: &[f64]) {
    h.iter_mut().zip(delta).for_each(|(h, d)| *h += d);
}

/// The `tiny-*` directories, or none, said aloud.
fn tiny_directories() -> Vec<PathBuf> {
    let default = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data"));
    let root = std::env::var_os("DECDEC_REFERENCE_DIR").map_or_else(default, PathBuf::from);
    let entries = fs::read_dir(&root).into_iter().flatten().map(|entry| entry.unwrap().path());
    let mut tiny: Vec<_> = entries
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("tiny-")))
        .collect();
    tiny.sort();
    if tiny.is_empty() {
        eprintln!("skipped: no golden data in {}", root.display());
    }
    tiny
}

/// Token ids, logits without compensation, logits with every residual.
fn expected(dir: &Path) -> (Vec<usize>, Vec<f32>, Vec<f32>) {
    let bytes = fs::read(dir.join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name| bytemuck::pod_collect_to_vec::<u8, f32>(tensors.tensor(name).unwrap().data());
    let ids = bytemuck::pod_collect_to_vec::<u8, i64>(tensors.tensor("input_ids").unwrap().data());
    (ids.into_iter().map(|id| id as usize).collect(), floats("logits.base"), floats("logits.all_residuals"))
}

/// Largest `|got − want|`.
fn distance(got: &[f64], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(g, &w)| (g - f64::from(w)).abs()).fold(0.0, f64::max)
}

#[test]
fn reference_logits() {
    for dir in tiny_directories() {
        let reference = Reference::open(&dir, None, false).unwrap();
        let (ids, base, all) = expected(&dir);
        for (want, with_residuals) in [(&base, false), (&all, true)] {
            let mut model = Model::read(&reference, with_residuals);
            // Two f32 sums of the head alone may differ by this much; in practice everything before stays below.
            let tolerance = model.head_tolerance();
            let worst = distance(&model.logits(&ids), want);
            assert!(worst < tolerance, "{}, residuals {with_residuals}: {worst} of {tolerance}", dir.display());
            // The comparison sees one flipped code of one matrix.
            let weight = reference.projection(0, Projection::Qkv).unwrap().weight;
            model.layers[0].projections[0].values[0] += flipped(&weight);
            let worst = distance(&model.logits(&ids), want);
            assert!(worst > 4.0 * tolerance, "{}: a flipped code moves logits by {worst} only", dir.display());
        }
    }
}

#[test]
fn reference_greedy() {
    for dir in tiny_directories() {
        let model = Model::read(&Reference::open(&dir, None, false).unwrap(), false);
        let bytes = fs::read(dir.join("expected.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let ids = |name| bytemuck::pod_collect_to_vec::<u8, i64>(tensors.tensor(name).unwrap().data());
        let mut tokens: Vec<_> = ids("input_ids").into_iter().map(|id| id as usize).collect();
        for want in ids("greedy.base") {
            let logits = model.logits(&tokens);
            let last = &logits[logits.len() - model.config.vocab_size..];
            let best = (0..last.len()).rev().max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            assert_eq!(best as i64, want, "{}, token {}", dir.display(), tokens.len());
            tokens.push(best);
        }
    }
}

/// By how much weight (0, 0) changes when the last bit of its code is flipped.
fn flipped(weight: &Weight<'_>) -> f64 {
    let mut codes = vec![0; weight.in_features()];
    let mut book = [0.0; 256];
    match weight {
        Weight::AnyPrec(w) => {
            w.codes(0, &mut codes);
            w.lut().read_f32(0, &mut book[..1 << w.bits()]);
        }
        Weight::LutGemm(w) => {
            w.codes(0, &mut codes);
            w.codebook(0, 0, &mut book[..1 << w.bits()]);
        }
        Weight::Dense(_) => panic!("a quantized matrix is expected"),
    }
    let code = usize::from(codes[0]);
    f64::from(book[code ^ 1]) - f64::from(book[code])
}

/// A directory made here: a Llama of one layer with random codes.
struct Made {
    weights: BTreeMap<String, Array>,
    residuals: BTreeMap<String, [Array; 2]>, // cheatsheet, reordered_scales
    thresholds: BTreeMap<String, Array>,
    config: serde_json::Value,
    rng: ChaCha8Rng,
}

/// Name, rows and channels of every module.
const MODULES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 32, 32),
    ("self_attn.k_proj", 16, 32),
    ("self_attn.v_proj", 16, 32),
    ("self_attn.o_proj", 32, 32),
    ("mlp.gate_proj", 64, 32),
    ("mlp.up_proj", 64, 32),
    ("mlp.down_proj", 32, 64),
];

impl Made {
    /// Everything but the matrices.
    fn new() -> Self {
        let config = serde_json::json!({
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
        });
        let (weights, residuals, thresholds) = Default::default();
        let mut made = Self { weights, residuals, thresholds, config, rng: ChaCha8Rng::seed_from_u64(7) };
        for name in ["model.embed_tokens", "lm_head"] {
            let table = made.halves(&[8, 32]);
            made.weights.insert(format!("{name}.weight"), table);
        }
        for name in ["norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"] {
            let gamma = made.halves(&[32]);
            made.weights.insert(format!("model.{name}.weight"), gamma);
        }
        for (module, rows, channels) in MODULES {
            let parts = [made.words(&[channels, rows / 8]), made.halves(&[rows])];
            made.residuals.insert(module.to_owned(), parts);
            let falling = (0..channels).flat_map(|i| (9.0 - i as f32 / 8.0).to_le_bytes()).collect();
            let thresholds = Array { storage: "FloatStorage", shape: vec![channels], bytes: falling };
            made.thresholds.insert(module.to_owned(), thresholds);
        }
        made
    }

    fn any_prec(planes: usize, luts: &[usize]) -> Self {
        let mut made = Self::new();
        for (module, rows, channels) in MODULES {
            let codes = made.words(&[planes, rows, channels / 32]);
            made.weights.insert(format!("model.layers.0.{module}.qweight"), codes);
            for &bits in luts {
                let lut = made.halves(&[rows, 1 << bits]);
                made.weights.insert(format!("model.layers.0.{module}.lut{bits}"), lut);
            }
        }
        made
    }

    fn lut_gemm(bits: usize) -> Self {
        let mut made = Self::new();
        for (module, rows, channels) in MODULES {
            let name = |tensor| format!("model.layers.0.{module}.{tensor}");
            let binary = made.words(&[channels / 32, bits, rows]);
            made.weights.insert(name("binary"), binary);
            let (alpha, q_bias) = (made.singles(&[channels / 32, bits, rows]), made.singles(&[channels / 32, rows]));
            made.weights.insert(name("alpha"), alpha);
            made.weights.insert(name("q_bias"), q_bias);
        }
        made
    }

    fn words(&mut self, shape: &[usize]) -> Array {
        let bytes = (0..shape.iter().product()).flat_map(|_| self.rng.next_u32().to_le_bytes()).collect();
        Array { storage: "IntStorage", shape: shape.to_vec(), bytes }
    }

    fn number(&mut self) -> f32 {
        self.rng.next_u32() as f32 / u32::MAX as f32 - 0.5
    }

    fn halves(&mut self, shape: &[usize]) -> Array {
        let bytes = (0..shape.iter().product()).flat_map(|_| f16::from_f32(self.number()).to_le_bytes()).collect();
        Array { storage: "HalfStorage", shape: shape.to_vec(), bytes }
    }

    fn singles(&mut self, shape: &[usize]) -> Array {
        let bytes = (0..shape.iter().product()).flat_map(|_| self.number().to_le_bytes()).collect();
        Array { storage: "FloatStorage", shape: shape.to_vec(), bytes }
    }

    fn dict(&self, keep: impl Fn(&str) -> bool) -> Node {
        let kept = self.weights.iter().filter(|(name, _)| keep(name));
        Node::Dict(kept.map(|(name, array)| (name.clone(), Node::Tensor(array.clone()))).collect())
    }

    fn write(&self) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: Vec<u8>| fs::write(dir.path().join(name), bytes).unwrap();
        write("config.json", self.config.to_string().into_bytes());
        write("tokenizer.json", b"{}".to_vec());
        write("pytorch_model.bin", save(&self.dict(|_| true)));
        let residuals = self.residuals.iter().map(|(module, [words, scales])| {
            let parts = [("cheatsheet", words), ("reordered_scales", scales)];
            let parts = parts.map(|(name, array)| (name.to_owned(), Node::Tensor(array.clone())));
            (module.clone(), Node::Dict(parts.into()))
        });
        write("cheatsheet.pt", save(&Node::List(vec![Node::Dict(residuals.collect())])));
        let thresholds = self.thresholds.iter().map(|(module, array)| (module.clone(), Node::Tensor(array.clone())));
        write("thresholds.pt", save(&Node::List(vec![Node::Dict(thresholds.collect())])));
        dir
    }

    fn array(&self, module: &str, tensor: &str) -> &Array {
        &self.weights[&format!("model.layers.0.{module}.{tensor}")]
    }
}

impl Array {
    fn word(&self, i: usize) -> u32 {
        u32::from_le_bytes(self.bytes[4 * i..][..4].try_into().unwrap())
    }

    fn float(&self, i: usize) -> f32 {
        match self.storage {
            "HalfStorage" => f16::from_le_bytes(self.bytes[2 * i..][..2].try_into().unwrap()).to_f32(),
            _ => f32::from_le_bytes(self.bytes[4 * i..][..4].try_into().unwrap()),
        }
    }
}

/// The modules of a projection, in the order of their rows.
fn modules(projection: Projection) -> &'static [(&'static str, usize, usize)] {
    match projection {
        Projection::Qkv => &MODULES[..3],
        Projection::O => &MODULES[3..4],
        Projection::GateUp => &MODULES[4..6],
        Projection::Down => &MODULES[6..],
    }
}

/// Every weight and residual of every projection, against `want(module, row, channel)`, row by row of the modules.
fn assert_rows(reference: &Reference, want: impl Fn(&str, usize, usize) -> f32) {
    for projection in Projection::ALL {
        let weight = reference.projection(0, projection).unwrap().weight;
        let mut got = vec![0.0; weight.in_features()];
        let mut fused_row = 0;
        for &(module, rows, channels) in modules(projection) {
            for row in 0..rows {
                weight.row(fused_row, &mut got);
                assert_eq!(got.len(), channels);
                for (k, &got) in got.iter().enumerate() {
                    assert_eq!(got, want(module, row, k), "{module}, row {row}, channel {k}");
                }
                fused_row += 1;
            }
        }
        assert_eq!(fused_row, weight.out_features());
    }
}

/// A weight of [`Made::any_prec`] by the formula of the format, from its first `bits` planes.
fn any_prec_weight(made: &Made, bits: usize, module: &str, row: usize, k: usize) -> f32 {
    let codes = made.array(module, "qweight");
    let (rows, words) = (codes.shape[1], codes.shape[2]);
    let (word, bit) = anyprec::position(k, 32 * words);
    let code = (0..bits).fold(0, |code, b| code << 1 | codes.word((b * rows + row) * words + word) >> bit & 1);
    made.array(module, &format!("lut{bits}")).float((row << bits) + code as usize)
}

#[test]
fn reference_any_precision() {
    let made = Made::any_prec(4, &[3, 4]);
    let dir = made.write();
    for bits in [3, 4] {
        let reference = Reference::open(dir.path(), Some(bits), false).unwrap();
        assert_eq!(
            (reference.backend(), reference.layer_bits(), reference.bits(0)),
            (WeightFormat::AnyPrec, &[bits][..], Some(bits))
        );
        assert_rows(&reference, |module, row, k| any_prec_weight(&made, bits as usize, module, row, k));
    }
    let error = |bits| format!("{:#}", Reference::open(dir.path(), bits, false).unwrap_err());
    assert!(error(None).ends_with("several bit widths, choose with --bitwidth 3 or 4"), "{}", error(None));
    assert!(error(Some(5)).ends_with("not stored with 5 bits, 3 or 4 can be had"), "{}", error(Some(5)));
    // The map chooses where nothing is asked for.
    fs::write(dir.path().join("bitwidth_map.json"), r#"{"0": 3}"#).unwrap();
    assert_eq!(Reference::open(dir.path(), None, false).unwrap().layer_bits(), [3]);
    for (map, says) in [
        (r#"{"0": 2}"#, "not stored with 2 bits"),
        (r#"{"1": 3}"#, "bitwidth_map.json has 1 layers, 0 to 0 are expected"),
        (r#"{"0": 3, "1": 3}"#, "bitwidth_map.json has 2 layers"),
        (r#"[3]"#, "an object {layer: bits} is expected"),
        (r#"{"0": 3"#, "bitwidth_map.json"),
    ] {
        fs::write(dir.path().join("bitwidth_map.json"), map).unwrap();
        assert!(error(None).contains(says), "{}", error(None));
    }
}

#[test]
fn reference_lut_gemm_modules_are_fused() {
    let made = Made::lut_gemm(3);
    let reference = Reference::open(made.write().path(), None, false).unwrap();
    assert_eq!((reference.backend(), reference.layer_bits()), (WeightFormat::LutGemm, &[3][..]));
    assert_rows(&reference, |module, row, k| {
        let [binary, alpha, q_bias] = ["binary", "alpha", "q_bias"].map(|tensor| made.array(module, tensor));
        let rows = q_bias.shape[1];
        (0..3).fold(q_bias.float(k / 32 * rows + row), |sum, b| {
            let at = (k / 32 * 3 + b) * rows + row;
            sum + if binary.word(at) >> (k % 32) & 1 == 1 { alpha.float(at) } else { -alpha.float(at) }
        })
    });
}

#[test]
fn reference_scales_are_put_back_into_row_order() {
    let made = Made::any_prec(3, &[3]);
    let dir = made.write();
    let [right, wrong] = [false, true].map(|compat| Reference::open(dir.path(), None, compat).unwrap());
    let mut moved = 0;
    for projection in Projection::ALL {
        let [right, wrong] = [&right, &wrong].map(|r| r.projection(0, projection).unwrap().residual.unwrap());
        let all: Vec<f32> = modules(projection)
            .iter()
            .flat_map(|(module, rows, _)| (0..*rows).map(|i| made.residuals[*module][1].float(i)))
            .collect();
        let mut fused_row = 0;
        for &(module, rows, channels) in modules(projection) {
            let [words, scales] = &made.residuals[module];
            for row in 0..rows {
                let scale = scales.float(row % 8 * (rows / 8) + row / 8);
                assert_eq!(right.scales().get(fused_row), scale, "{module}, row {row}");
                // The reference unpacks the joined scales as if they were one matrix's.
                let taken = all[fused_row % 8 * (all.len() / 8) + fused_row / 8];
                assert_eq!(wrong.scales().get(fused_row), taken, "{module}, row {row}");
                moved += usize::from(taken != scale);
                for k in 0..channels {
                    let nibble = words.word(k * (rows / 8) + row / 8) >> (4 * (row % 8)) & 15;
                    assert_eq!(right.nibble(k, fused_row), nibble as i32 - 8, "{module}, row {row}, channel {k}");
                }
                fused_row += 1;
            }
        }
    }
    assert!(moved > 100, "{moved} scales differ");
}

#[test]
fn reference_shards_and_biases() {
    let mut made = Made::any_prec(3, &[3]);
    let bias = made.halves(&[16]);
    made.weights.insert("model.layers.0.self_attn.k_proj.bias".into(), bias.clone());
    let dir = made.write();
    let path = |name: &str| dir.path().join(name);
    fs::remove_file(path("pytorch_model.bin")).unwrap();
    assert!(!Reference::detect(dir.path()));
    fs::write(path("one.bin"), save(&made.dict(|name| name.contains("mlp")))).unwrap();
    fs::write(path("two.bin"), save(&made.dict(|name| !name.contains("mlp")))).unwrap();
    let index = |two: &str| {
        let map = made.weights.keys().map(|name| (name.clone(), if name.contains("mlp") { "one.bin" } else { two }));
        let map: BTreeMap<_, _> = map.collect();
        fs::write(path("pytorch_model.bin.index.json"), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    };
    index("two.bin");
    assert!(Reference::detect(dir.path()));
    let reference = Reference::open(dir.path(), None, false).unwrap();
    assert_rows(&reference, |module, row, k| any_prec_weight(&made, 3, module, row, k));
    let qkv = reference.projection(0, Projection::Qkv).unwrap();
    let want: Vec<_> = (0..64).map(|row| if (32..48).contains(&row) { bias.float(row - 32) } else { 0.0 }).collect();
    assert_eq!(*qkv.bias.unwrap(), want);
    assert_eq!(qkv.thresholds.unwrap()[1], 8.875);
    assert!(reference.projection(0, Projection::O).unwrap().bias.is_none());
    for (two, says) in
        [("../two.bin", "not a plain file name"), ("/two.bin", "not a plain"), ("three.bin", "three.bin")]
    {
        index(two);
        let error = format!("{:#}", Reference::open(dir.path(), None, false).unwrap_err());
        assert!(error.contains(says), "{error}");
    }
}

/// What breaks a directory, and what the error says.
type Break = (&'static str, fn(&mut Made), &'static str);

#[test]
fn reference_broken_directories_are_refused() {
    const Q: &str = "model.layers.0.self_attn.q_proj";
    let cases: [Break; 15] = [
        (
            "a missing codebook",
            |m| drop(m.weights.remove(&format!("{Q}.lut3"))),
            "missing in the directory: model.layers.0.self_attn.q_proj.lut3",
        ),
        (
            "a missing norm",
            |m| drop(m.weights.remove("model.norm.weight")),
            "missing in the directory: model.norm.weight",
        ),
        (
            "a missing residual",
            |m| drop(m.residuals.remove("mlp.down_proj")),
            "mlp.down_proj.cheatsheet, model.layers.0.mlp.down_proj.reordered_scales",
        ),
        (
            "missing thresholds",
            |m| drop(m.thresholds.remove("mlp.up_proj")),
            "missing in the directory: model.layers.0.mlp.up_proj.thresholds",
        ),
        (
            "an extra tensor",
            |m| drop(m.weights.insert("model.extra".into(), m.weights["model.norm.weight"].clone())),
            "not understood in the directory: model.extra",
        ),
        (
            "an extra layer",
            |m| drop(m.weights.insert("model.layers.1.x".into(), m.weights["model.norm.weight"].clone())),
            "2 layers are stored, config.json says 1",
        ),
        (
            "a wrong shape",
            |m| m.weights.get_mut(&format!("{Q}.lut3")).unwrap().shape = vec![16, 16],
            "q_proj.lut3 has shape [16, 16], [32, 8] is expected",
        ),
        (
            "too few planes",
            |m| m.weights.get_mut(&format!("{Q}.qweight")).unwrap().shape = vec![2, 48, 1],
            "has 2 bit planes, 3 to 8 are expected",
        ),
        (
            "a wrong type",
            |m| m.weights.get_mut(&format!("{Q}.qweight")).unwrap().storage = "FloatStorage",
            "q_proj.qweight is a tensor of f32, i32 are expected",
        ),
        (
            "words for a codebook",
            |m| {
                let lut = m.weights.get_mut(&format!("{Q}.lut3")).unwrap();
                (lut.storage, lut.bytes) = ("IntStorage", lut.bytes.repeat(2));
            },
            "q_proj.lut3 is a tensor of i32, floating-point numbers are expected",
        ),
        ("full precision", |m| m.weights.retain(|name, _| !name.ends_with("qweight")), "is it quantized?"),
        (
            "a NaN centroid",
            |m| m.weights.get_mut(&format!("{Q}.lut3")).unwrap().bytes[..2].copy_from_slice(&[0, 0x7e]),
            "q_proj.lut3: number 0 is NaN",
        ),
        (
            "a NaN scale",
            |m| m.residuals.get_mut("mlp.down_proj").unwrap()[1].bytes[2..4].copy_from_slice(&[0, 0x7e]),
            "down_proj.reordered_scales: number 1 is NaN",
        ),
        (
            "increasing thresholds",
            |m| m.thresholds.get_mut("self_attn.o_proj").unwrap().bytes[..4].fill(0),
            "o_proj.thresholds: threshold 1 is 8.875, above its predecessor 0",
        ),
        ("biases that Qwen2 needs", |m| m.config["model_type"] = "qwen2".into(), "self_attn.k_proj.bias"),
    ];
    for (what, break_it, says) in cases {
        let mut made = Made::any_prec(3, &[3]);
        break_it(&mut made);
        let dir = made.write();
        let load = || {
            let reference = Reference::open(dir.path(), None, false)?;
            Projection::ALL.into_iter().try_for_each(|projection| reference.projection(0, projection).map(drop))
        };
        let error = format!("{:#}", load().expect_err(what));
        assert!(error.contains(says), "{what}: {error:?} does not say {says:?}");
    }
    let dir = Made::any_prec(3, &[3]).write();
    fs::remove_file(dir.path().join("thresholds.pt")).unwrap();
    let error = format!("{:#}", Reference::open(dir.path(), None, false).unwrap_err());
    assert!(error.ends_with("thresholds.pt is not, both are needed to compensate"), "{error}");
    fs::remove_file(dir.path().join("cheatsheet.pt")).unwrap();
    let reference = Reference::open(dir.path(), None, false).unwrap();
    assert!(!reference.has_residuals() && reference.projection(0, Projection::O).unwrap().residual.is_none());
}

/// Files as PyTorch itself wrote them hold what their README says.
#[test]
fn reference_files_of_pytorch() {
    for dir in tiny_directories() {
        let thresholds = TorchFile::open(&dir.join("thresholds.pt")).unwrap();
        for layer in thresholds.root().items().unwrap() {
            // Fusing takes one module's thresholds for all: they see the same input.
            let modules = layer.entries().unwrap();
            let of = |name| modules.get(name).map(|value| value.tensor().unwrap().floats().unwrap());
            assert_eq!(of("self_attn.q_proj"), of("self_attn.k_proj"));
            assert_eq!(of("self_attn.q_proj"), of("self_attn.v_proj"));
            assert_eq!(of("mlp.gate_proj"), of("mlp.up_proj"));
        }
    }
}
