//! A number that is not finite, anywhere in a model of any kind, is named with its tensor and its place, and so is one
//! that quantizing could not store.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use decdec::backend::cpu::Cpu;
use decdec::checkpoint::{BitWidth, Checkpoint};
use decdec::config::{LayerNorm, Projection};
use decdec::engine::Engine;
use decdec::eval;
use decdec::format::Format;
use decdec::model::Model;
use decdec::progress::Silent;
use decdec::quantize::{Calibration, Options, Refine, quantize};
use decdec::tokenizer::TextFiles;
use decdec::weights::ModelWeights;
use half::{bf16, f16};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::json;

use super::fixtures::directory::Directory;
use super::fixtures::{self, HIDDEN, LAYERS, VOCAB, values};
use super::{directory, hugging_face, open_gguf, small_gguf, wide_tensors};

/// What is not finite, as it is written.
const BROKEN: [(f32, &str); 3] = [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")];

/// Reads every tensor of a model.
fn read_all(model: &dyn ModelWeights) -> Result<()> {
    model.embedding()?;
    model.head()?;
    model.final_norm()?;
    for layer in 0..model.config().layers.len() {
        model.norm(layer, LayerNorm::AttentionInput)?;
        model.norm(layer, LayerNorm::FeedForwardInput)?;
        Projection::ALL.into_iter().try_for_each(|projection| model.projection(layer, projection).map(drop))?;
    }
    Ok(())
}

fn number(value: f32, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_le_bytes().into(),
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().into(),
        _ => value.to_le_bytes().into(),
    }
}

/// What is said of number `i` of tensor `name`.
fn wanted(name: &str, i: usize, shape: &[usize], shown: &str) -> String {
    let place = match shape {
        [_] => String::new(),
        [_, columns] => format!(" (at [{}, {}])", i / columns, i % columns),
        [_, rows, columns] => format!(" (at [{}, {}, {}])", i / columns / rows, i / columns % rows, i % columns),
        _ => panic!("{shape:?}"),
    };
    let rest = "finite numbers are expected: get the file again, or another version of the model";
    format!("tensor {name}: number {i} is {shown}{place}, {rest}")
}

/// The end of an error's message: what it comes of.
fn cause(result: Result<()>) -> String {
    let message = format!("{:#}", result.expect_err("it fails"));
    let at = message.find("tensor ").unwrap_or_else(|| panic!("{message}"));
    message[at..].to_owned()
}

/// Every tensor of a directory, in every type.
#[test]
fn hugging_face_tensors() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
        let mut model = biased(dtype);
        read_all(&model.open().expect("it opens")).expect("all of it is finite");
        assert_eq!(model.tensors.len(), 3 + LAYERS * 12);
        for t in 0..model.tensors.len() {
            let (name, _, shape, whole) = model.tensors[t].clone();
            let i = rng.next_u32() as usize % shape.iter().product::<usize>();
            let (value, shown) = BROKEN[t % 3];
            let bytes = number(value, dtype);
            model.tensors[t].3[i * bytes.len()..][..bytes.len()].copy_from_slice(&bytes);
            let source = model.open().expect("it opens: nothing is read before it is asked for");
            assert_eq!(cause(read_all(&source)), wanted(&name, i, &shape, shown));
            model.tensors[t].3 = whole;
        }
        read_all(&model.open().expect("it opens")).expect("all of it is finite again");
    }
}

/// A Qwen2 directory: every kind of tensor that a source has.
fn biased(dtype: Dtype) -> Directory {
    let mut model = hugging_face(dtype);
    let mut config = Directory::config();
    config["model_type"] = "qwen2".into();
    model.write_json("config.json", &config);
    for layer in 0..LAYERS {
        for (part, rows) in [("q", HIDDEN), ("k", fixtures::KV), ("v", fixtures::KV)] {
            model.add(&format!("model.layers.{layer}.self_attn.{part}_proj.bias"), dtype, &[rows]);
        }
    }
    model
}

/// Every tensor of a GGUF, by its name there and its place there: rows of q and k are stored in another order.
#[test]
fn gguf_tensors() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let shapes = fixtures::small_tensor_shapes(VOCAB);
    for (t, (broken, shape)) in shapes.iter().enumerate() {
        let i = rng.next_u32() as usize % shape.iter().product::<usize>();
        let (value, shown) = BROKEN[t % 3];
        let gguf = shapes.iter().fold(small_gguf("llama"), |gguf, (name, shape)| {
            let mut values = values(name, shape.iter().product());
            if name == broken {
                values[i] = value;
            }
            gguf.floats(name, shape, &values)
        });
        let cause = cause(read_all(&open_gguf(&gguf.bytes()).expect("it opens")));
        let (own, rest) = cause.split_once(" (").expect("both names");
        let (_, rest) = rest.split_once(')').expect("both names");
        assert_eq!(format!("{own}{rest}"), wanted(broken, i, shape, shown));
    }
}

/// Every scale of every block format: `(name, type, bytes of a block, where its half-precision scales are)`.
#[test]
fn scales_of_gguf_blocks() {
    let bytes = fs::read("tests/data/gguf_blocks.safetensors").expect("readable");
    let known = SafeTensors::deserialize(&bytes).expect("safetensors");
    let kinds: [(&str, u32, usize, usize, &[usize]); 8] = [
        ("Q4_0", 2, 32, 18, &[0]),
        ("Q4_1", 3, 32, 20, &[0, 2]),
        ("Q5_0", 6, 32, 22, &[0]),
        ("Q5_1", 7, 32, 24, &[0, 2]),
        ("Q8_0", 8, 32, 34, &[0]),
        ("Q4_K", 12, 256, 144, &[0, 2]),
        ("Q5_K", 13, 256, 176, &[0, 2]),
        ("Q6_K", 14, 256, 210, &[208]),
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (name, kind, numbers, size, scales) in kinds {
        let blocks = known.tensor(&format!("{name}.blocks")).expect(name);
        let count = VOCAB * 256 / numbers;
        let sound: Vec<u8> = blocks.data().iter().copied().cycle().take(count * size).collect();
        let read = |blocks: &[u8]| {
            let gguf = small_gguf("llama").meta("llama.attention.key_length", fixtures::Meta::U32(8));
            let gguf = wide_tensors(gguf.tensor("token_embd.weight", kind, &[VOCAB, 256], blocks));
            read_all(&open_gguf(&gguf.bytes()).expect("it opens"))
        };
        read(&sound).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        for &scale in scales {
            let block = rng.next_u32() as usize % count;
            for bits in [0x7e00u16, 0x7c00, 0xfc00] {
                let mut broken = sound.clone();
                broken[block * size + scale..][..2].copy_from_slice(&bits.to_le_bytes());
                let cause = cause(read(&broken));
                let found = cause.strip_prefix("tensor token_embd.weight (model.embed_tokens.weight): number ");
                let found = found.unwrap_or_else(|| panic!("{name}: {cause}"));
                let found: usize = found.split(' ').next().expect("a number").parse().expect("a number");
                assert_eq!(found / numbers, block, "{name}, scale at {scale}: {cause}");
            }
        }
    }
}

fn options(backend: Format, refine: Refine) -> Options {
    let tokens = (0..200u32).map(|i| i * 37 % VOCAB as u32).collect();
    Options {
        backend,
        bits: BitWidth::try_from(3.0).expect("a width"),
        group_size: None,
        awq: true,
        refine,
        calibration: Calibration::of_text(tokens, 16, 4, "nonsense"),
        source: "small".into(),
        overwrite: true,
    }
}

fn quantized(source: &dyn ModelWeights, texts: &TextFiles, options: &Options, out: &Path) -> Result<()> {
    quantize(source, texts, options, out, &AtomicBool::new(false), &Silent).map(drop)
}

/// Every tensor of our own checkpoint but codes, which cannot be broken in this way.
#[test]
fn checkpoint_tensors() {
    let dir = directory();
    let source = biased(Dtype::F16);
    let source = source.open().expect("it opens");
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for backend in [Format::AnyPrec, Format::LutGemm] {
        let out = dir.path().join(backend.to_string());
        quantized(&source, source.texts(), &options(backend, Refine::None), &out).expect("quantized");
        read_all(&Checkpoint::open(&out).expect("it opens")).expect("all of it is finite");
        let mut kinds = BTreeMap::new();
        for file in ["model.safetensors", "residuals.safetensors"] {
            let path = out.join(file);
            let sound = fs::read(&path).expect("readable");
            let (len, header) = SafeTensors::read_metadata(&sound).expect("a header");
            let floats = header.tensors().into_iter().filter(|(_, info)| matches!(info.dtype, Dtype::F16 | Dtype::F32));
            for (t, (name, info)) in floats.enumerate() {
                let (value, shown) = BROKEN[t % 3];
                let i = rng.next_u32() as usize % info.shape.iter().product::<usize>();
                let (bytes, mut broken) = (number(value, info.dtype), sound.clone());
                broken[8 + len + info.data_offsets.0 + i * bytes.len()..][..bytes.len()].copy_from_slice(&bytes);
                fs::write(&path, broken).expect("writable");
                let read = Checkpoint::open(&out).and_then(|checkpoint| read_all(&checkpoint));
                assert_eq!(cause(read), wanted(&name, i, &info.shape, shown));
                *kinds.entry(name.rsplit('.').next().expect("a kind").to_owned()).or_insert(0) += 1;
            }
            fs::write(&path, sound).expect("writable");
        }
        let expected = match backend {
            Format::AnyPrec => vec!["bias", "lut", "scales", "weight"],
            Format::LutGemm => vec!["alpha", "bias", "q_bias", "scales", "weight"],
        };
        assert_eq!(kinds.into_keys().collect::<Vec<_>>(), expected);
    }
}

/// Quantizing stops with the same line, whatever it makes and wherever the number is, and leaves nothing.
#[test]
fn quantizing_what_is_not_finite() {
    let mut model = biased(Dtype::F32);
    let places = [
        ("model.embed_tokens.weight", VOCAB * HIDDEN - 1), // of a token that the text does not have
        ("lm_head.weight", 7),
        ("model.norm.weight", 3),
        ("model.layers.1.input_layernorm.weight", 5),
        ("model.layers.0.self_attn.k_proj.bias", 2),
        ("model.layers.1.mlp.up_proj.weight", 77),
    ];
    for (backend, refine) in [
        (Format::AnyPrec, Refine::None),
        (Format::AnyPrec, Refine::DEFAULT),
        (Format::LutGemm, Refine::None),
        (Format::LutGemm, Refine::DEFAULT),
    ] {
        for (t, (name, i)) in places.into_iter().enumerate() {
            let at = model.tensors.iter().position(|(own, ..)| own == name).expect(name);
            let whole = model.tensors[at].3.clone();
            let (value, shown) = BROKEN[t % 3];
            model.tensors[at].3[4 * i..][..4].copy_from_slice(&value.to_le_bytes());
            let source = model.open().expect("it opens");
            let dir = directory();
            let out = dir.path().join("out");
            let result = quantized(&source, source.texts(), &options(backend, refine), &out);
            let shape = model.tensors[at].2.clone();
            assert_eq!(cause(result), wanted(name, i, &shape, shown), "{backend}, {refine:?}");
            assert!(!out.exists(), "{backend}: {name}");
            model.tensors[at].3 = whole;
        }
        let source = model.open().expect("it opens");
        let dir = directory();
        let out = dir.path().join("out");
        quantized(&source, source.texts(), &options(backend, refine), &out).expect("all of it is finite");
    }
}

/// Weights that half precision does not hold: named like those that are no numbers.
#[test]
fn quantizing_what_is_too_large() {
    let dir = directory();
    let out = dir.path().join("out");
    let mut model = biased(Dtype::F32);
    for (backend, refine) in
        [(Format::AnyPrec, Refine::None), (Format::AnyPrec, Refine::DEFAULT), (Format::LutGemm, Refine::DEFAULT)]
    {
        for (part, value, shown) in [
            ("self_attn.q_proj", 1e5f32, "1e5"),
            ("self_attn.k_proj", 65505.0, "6.5505e4"),
            ("self_attn.v_proj", -1e30, "-1e30"),
            ("self_attn.o_proj", 1e30, "1e30"),
            ("mlp.gate_proj", f32::MAX, "3.4028235e38"),
            ("mlp.up_proj", -1e5, "-1e5"),
            ("mlp.down_proj", 1e30, "1e30"),
        ] {
            let name = format!("model.layers.0.{part}.weight");
            let at = model.tensors.iter().position(|(own, ..)| *own == name).expect("there");
            let (whole, columns) = (model.tensors[at].3.clone(), model.tensors[at].2[1]);
            let i = 3 * columns + 4;
            model.tensors[at].3[4 * i..][..4].copy_from_slice(&value.to_le_bytes());
            let source = model.open().expect("it opens");
            let result = quantized(&source, source.texts(), &options(backend, refine), &out);
            let wanted = format!(
                "tensor {name}: {shown} (at [3, 4]) is beyond half precision, in which quantized weights are stored: \
                 65504 at most is expected, a model with such a weight is hardly sound"
            );
            assert_eq!(cause(result), wanted, "{backend}, {refine:?}");
            assert!(!out.exists());
            model.tensors[at].3 = whole;
        }
    }
}

/// Activations that overflow though every weight is finite: quantizing and evaluating say so, neither gives a NaN.
#[test]
fn overflow_on_the_way() {
    let dir = directory();
    let mut model = hugging_face(Dtype::F32);
    let tokens: Vec<u32> = (0..16).map(|i| i * 37 % VOCAB as u32).collect();
    let windows = [&tokens[..]];
    let evaluate = |model: &Directory| {
        let source = model.open().expect("it opens");
        let backend = Cpu::new();
        let model = Model::load(&backend, &source, |_| ()).expect("loaded");
        eval::perplexity(&Engine::of(model, tokens.len()), None, &windows, |_| Ok(()))
    };
    assert!(evaluate(&model).expect("finite").perplexity.is_finite());
    // Norms of 1e20 in front of weights of up to 16, three times over: beyond 1e38.
    let (_, _, _, gamma) = model
        .tensors
        .iter_mut()
        .find(|(name, ..)| name == "model.layers.1.post_attention_layernorm.weight")
        .expect("it");
    *gamma = [1e20f32.to_le_bytes(); HIDDEN].concat();
    let error = format!("{:#}", evaluate(&model).expect_err("no numbers"));
    assert!(
        error.starts_with("window 0 of the text, tokens from 0 on: the logits are not finite numbers, try --dtype"),
        "{error}"
    );
    assert!(error.contains("--dtype bfloat16") && error.contains(": logit ") && !error.contains('\n'), "{error}");
    let source = model.open().expect("it opens");
    for backend in [Format::AnyPrec, Format::LutGemm] {
        let options = options(backend, Refine::DEFAULT);
        let result = quantized(&source, source.texts(), &options, &dir.path().join("out"));
        let error = format!("{:#}", result.expect_err("no numbers"));
        assert!(error.starts_with("layer 1: what leaves it is too large for single precision: number "), "{error}");
    }
}

/// Numbers that are roughly normal, times `scale`.
fn random(rng: &mut ChaCha8Rng, count: usize, scale: f32) -> Vec<u8> {
    let mut uniform = || rng.next_u32() as f32 / u32::MAX as f32 - 0.5;
    (0..count).flat_map(|_| (scale * (uniform() + uniform() + uniform())).to_le_bytes()).collect()
}

/// A model of zeros, one whose norms are, and ones whose norms nearly are, have nothing or little to calibrate by, and
/// are quantized all the same.
#[test]
fn nothing_but_zeros() {
    let dir = directory();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (what, value) in [("", 0f32), ("norm", 0.0), ("norm", 1e-9), ("norm", 1e-18), ("norm", 1e-25)] {
        let mut model = hugging_face(Dtype::F32);
        for (name, _, shape, bytes) in &mut model.tensors {
            let count = shape.iter().product();
            let fixed = name.contains(what);
            *bytes = if fixed { value.to_le_bytes().repeat(count) } else { random(&mut rng, count, 0.5) };
        }
        let source = model.open().expect("it opens");
        for (backend, refine) in [
            (Format::AnyPrec, Refine::None),
            (Format::AnyPrec, Refine::DEFAULT),
            (Format::LutGemm, Refine::None),
            (Format::LutGemm, Refine::DEFAULT),
        ] {
            let out = dir.path().join("out");
            let result = quantized(&source, source.texts(), &options(backend, refine), &out);
            result.unwrap_or_else(|e| panic!("{what:?} {value}, {backend}, {refine:?}: {e:#}"));
            let checkpoint = Checkpoint::open(&out).expect("it opens");
            read_all(&checkpoint).expect("all of it is finite");
            // Whatever comes in, what is stored is near the weights: 3 bits leave far less than a third of the energy.
            let linear = checkpoint.projection(1, Projection::O).expect("readable");
            let own = super::matrix(&source, 1, Projection::O);
            let (mut lost, mut all, mut row) = (0.0, 0.0, vec![0.0; HIDDEN]);
            for (r, own) in own.chunks_exact(HIDDEN).enumerate() {
                linear.weight.row(r, &mut row);
                lost += own.iter().zip(&row).map(|(w, q)| f64::from(w - q).powi(2)).sum::<f64>();
                all += own.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
            }
            // A step is at least the smallest number of half precision.
            let steps = own.len() as f64 * 2f64.powi(-24).powi(2);
            assert!(lost <= all / 3.0 + steps, "{what:?} {value}, {backend}, {refine:?}: {lost} of {all}");
        }
    }
}

/// The norm behind an embedding makes up for its scale: rows that half precision would take for zeros, or for
/// infinity, stay as they are.
#[test]
fn embeddings_that_half_precision_cannot_hold() {
    let dir = directory();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for (scale, row_scale, halves) in [
        (1.0, 1.0, true),
        (1e-3, 1.0, true),
        (1e4, 1.0, true),
        (1e-9, 1.0, false),
        (1e6, 1.0, false),
        (1.0, 1e-9, false),
        (1.0, 0.0, true),
    ] {
        let mut model = hugging_face(Dtype::F32);
        let table = &mut model.tensors.iter_mut().find(|(name, ..)| name == "model.embed_tokens.weight").expect("it").3;
        *table = random(&mut rng, VOCAB * HIDDEN, scale);
        // One row unlike all others.
        table[4 * HIDDEN * 7..][..4 * HIDDEN].copy_from_slice(&random(&mut rng, HIDDEN, scale * row_scale));
        let source = model.open().expect("it opens");
        let out = dir.path().join("out");
        quantized(&source, source.texts(), &options(Format::AnyPrec, Refine::None), &out).expect("quantized");
        let checkpoint = Checkpoint::open(&out).expect("it opens");
        let (own, stored) = (source.embedding().expect("there").values, checkpoint.embedding().expect("there").values);
        assert_eq!(stored.bytes() == own.bytes() / 2, halves, "{scale} {row_scale}");
        assert_eq!(stored == own, !halves, "{scale} {row_scale}");
    }
}

/// What no reader touches is not looked at: an extra tensor of a directory may hold anything.
#[test]
fn tensors_that_nobody_reads() {
    let mut model = hugging_face(Dtype::F32);
    model.add("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, &[4]);
    model.tensors.last_mut().expect("it").3 = [f32::NAN.to_le_bytes(); 4].concat();
    let source = model.open().expect("it opens");
    read_all(&source).expect("the rest is finite");
    assert_eq!(source.config_json()["eos_token_id"], json!([1, 5]));
}
