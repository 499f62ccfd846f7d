//! The reference's directories, read by this crate and computed by nothing of it but `Weight::row`: a decoder in
//! f64, as plain as it can be, against the logits of transformers.

use std::path::PathBuf;

use decdec::config::{ModelConfig, Projection};
use decdec::source::reference::Reference;
use decdec::weights::{Linear, ModelWeights, Weight};
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
            values.extend(weight.iter().zip(&residual).map(|(&w, &r)| half::f16::from_f32(w).to_f64() + f64::from(r)));
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

    fn norm(&self, h: &[f64], gamma: &[f32]) -> Vec<f64> {
        let mean = h.iter().map(|x| x * x).sum::<f64>() / h.len() as f64;
        let scale = 1.0 / (mean + f64::from(self.config.rms_norm_eps)).sqrt();
        h.iter().zip(gamma).map(|(x, &g)| x * scale * f64::from(g)).collect()
    }

    /// Head `head` (queries first, then keys) at `position`, rotated: dimension `i` pairs with `i + half`.
    fn rotated(&self, qkv: &[f64], head: usize, position: usize) -> Vec<f64> {
        let dim = self.config.head_dim;
        let (first, second) = qkv[head * dim..][..dim].split_at(dim / 2);
        let angle = |i: usize| {
            position as f64 * half::f16::from_f64(self.config.rope_theta.powf(-(2.0 * i as f64) / dim as f64)).to_f64()
        };
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
    let entries = std::fs::read_dir(&root).into_iter().flatten().map(|entry| entry.unwrap().path());
    let mut tiny: Vec<_> = entries
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("tiny-")))
        .collect();
    tiny.sort();
    if tiny.is_empty() {
        eprintln!("skipped: no golden data in {}", root.display());
    }
    tiny
}

fn expected(dir: &std::path::Path) -> (Vec<usize>, Vec<f32>, Vec<f32>) {
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name| bytemuck::pod_collect_to_vec::<u8, f32>(tensors.tensor(name).unwrap().data());
    let ids = bytemuck::pod_collect_to_vec::<u8, i64>(tensors.tensor("input_ids").unwrap().data());
    (ids.into_iter().map(|id| id as usize).collect(), floats("logits.base"), floats("logits.all_residuals"))
}

/// Largest `|got − want|`, and the root mean square of `want`.
fn distance(got: &[f64], want: &[f32]) -> (f64, f64) {
    assert_eq!(got.len(), want.len());
    let worst = got.iter().zip(want).map(|(g, &w)| (g - f64::from(w)).abs()).fold(0.0, f64::max);
    let square: f64 = want.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
    (worst, (square / want.len() as f64).sqrt())
}

#[test]
fn reference_logits() {
    for dir in tiny_directories() {
        let reference = Reference::open(&dir, None, false).unwrap();
        let (ids, base, all) = expected(&dir);
        for (want, with_residuals) in [(&base, false), (&all, true)] {
            let mut model = Model::read(&reference, with_residuals);
            let (worst, rms) = distance(&model.logits(&ids), want);
            let l = model.logits(&ids);
            for p in 0..ids.len() {
                let v = model.config.vocab_size;
                eprintln!(
                    "   pos {p} {:.3e} {:?}",
                    distance(&l[p * v..][..v], &want[p * v..][..v]).0,
                    &want[p * v..][..3]
                );
            }
            eprintln!("{} residuals {with_residuals}: {worst:.3e} of {rms:.3e}", dir.display());
            let weight = reference.projection(0, Projection::Qkv).unwrap().weight;
            model.layers[0].projections[0].values[0] += flipped(&weight);
            let (worst, _) = distance(&model.logits(&ids), want);
            eprintln!("  flipped: {worst:.3e}");
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
