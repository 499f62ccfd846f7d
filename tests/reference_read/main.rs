//! The reference's directories, read by this crate and computed by nothing of it but `Weight::row`: a decoder in
//! f64, as plain as it can be, against the logits of transformers. Then directories made here, sound and broken.

#[path = "../answers/mod.rs"]
mod answers;
mod convert;
mod decoder;
#[path = "../devices/mod.rs"]
mod devices;
mod made;
#[path = "../pt/mod.rs"]
mod pt;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use answers::tiny_directories;
use decdec::config::{LayerNorm, Projection};
use decdec::format::{Format, anyprec};
use decdec::source::reference::Reference;
use decdec::source::torch::TorchFile;
use decdec::weights::{ModelWeights, Weight};
use pt::save;
use safetensors::SafeTensors;

use decoder::*;
use made::*;

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

/// A directory in every precision that it may be meant in: one, unless it stores several and has no map.
fn readings(dir: &Path) -> Vec<Reference> {
    match Reference::open(dir, None, false) {
        Ok(reference) => vec![reference],
        Err(error) if format!("{error:#}").contains("choose with --bitwidth") => {
            (2..=8).filter_map(|bits| Reference::open(dir, Some(bits), false).ok()).collect()
        }
        Err(error) => panic!("{}: {error:#}", dir.display()),
    }
}

/// The reading and the roundings that come nearest to the logits `want`: an oracle says neither.
fn nearest(dir: &Path, ids: &[usize], want: &[f32]) -> (Reference, Rounded) {
    let mut all = Vec::new();
    for reference in readings(dir) {
        let off = |rounded| distance(&Model::read(&reference, false, rounded).logits(ids), want);
        let (off, rounded) = Rounded::EVERY
            .map(|rounded| (off(rounded), rounded))
            .into_iter()
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .unwrap();
        all.push((off, reference, rounded));
    }
    let (_, reference, rounded) = all.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("a reading");
    (reference, rounded)
}

#[test]
fn reference_logits() {
    for dir in tiny_directories() {
        let (ids, base, all) = expected(&dir);
        let (reference, rounded) = nearest(&dir, &ids, &base);
        for (want, with_residuals) in [(&base, false), (&all, true)] {
            let mut model = Model::read(&reference, with_residuals, rounded);
            // Two f32 sums of the head alone may differ by this much; in practice everything before stays below.
            let tolerance = model.head_tolerance();
            let worst = distance(&model.logits(&ids), want);
            assert!(worst < tolerance, "{}, residuals {with_residuals}: {worst} of {tolerance}", dir.display());
            // The comparison sees one flipped code: of the first channels of a row, one matters enough.
            let last = model.layers.len() - 1;
            let weight = reference.projection(last, Projection::Down).unwrap().weight;
            let seen = flipped(&weight).into_iter().enumerate().any(|(k, change)| {
                let values = &mut model.layers[last].projections[3].values;
                let right = values[k];
                values[k] += change;
                let seen = distance(&model.logits(&ids), want) > 4.0 * tolerance;
                model.layers[last].projections[3].values[k] = right;
                seen
            });
            assert!(seen, "{}: no flipped code moves logits by more than {}", dir.display(), 4.0 * tolerance);
        }
    }
}

#[test]
fn reference_greedy() {
    for dir in tiny_directories() {
        let (prompt, base, _) = expected(&dir);
        let (reference, rounded) = nearest(&dir, &prompt, &base);
        let model = Model::read(&reference, false, rounded);
        let bytes = fs::read(dir.join("expected.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut tokens = prompt;
        for want in bytemuck::pod_collect_to_vec::<u8, i64>(tensors.tensor("greedy.base").unwrap().data()) {
            let logits = model.logits(&tokens);
            let last = &logits[logits.len() - model.config.vocab_size..];
            let best = (0..last.len()).rev().max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            assert_eq!(best as i64, want, "{}, token {}", dir.display(), tokens.len());
            tokens.push(best);
        }
    }
}

/// By how much the first weights of row 0 change when the last bit of their codes is flipped.
fn flipped(weight: &Weight<'_>) -> Vec<f64> {
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
    // Within the first group, whose codebook this is.
    let change = |&code: &u8| f64::from(book[usize::from(code ^ 1)]) - f64::from(book[usize::from(code)]);
    codes[..32].iter().map(change).collect()
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
            (reference.format(), reference.layer_bits(), reference.bits(0)),
            (Some(Format::AnyPrec), &[bits][..], Some(bits))
        );
        assert_rows(&reference, |module, row, k| any_prec_weight(&made, bits as usize, module, row, k));
    }
    let error = |bits| format!("{:#}", Reference::open(dir.path(), bits, false).unwrap_err());
    assert!(error(None).ends_with("several bit widths, choose with --bitwidth 3 or 4"), "{}", error(None));
    assert!(error(Some(5)).ends_with("not stored with 5 bits, 3 or 4 can be had"), "{}", error(Some(5)));
    // In mixed precision, what is asked for is taken where it is stored.
    let mut mixed = Made::any_prec(4, &[3, 4]);
    mixed.weights.retain(|name, _| !name.ends_with(".lut3"));
    let four = mixed.write();
    assert_eq!(Reference::open(four.path(), Some(4), false).unwrap().layer_bits(), [4]);
    let refused = format!("{:#}", Reference::open(four.path(), Some(3), false).unwrap_err());
    assert!(refused.ends_with("not stored with 3 bits, 4 can be had"), "{refused}");
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
    assert_eq!((reference.format(), reference.layer_bits()), (Some(Format::LutGemm), &[3][..]));
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

/// Every tensor of floating-point numbers, of both kinds of weights, with one number that is none.
#[test]
fn reference_numbers_are_finite() {
    let read = |made: &Made| {
        let dir = made.write();
        let reference = Reference::open(dir.path(), None, false)?;
        reference.embedding()?;
        reference.head()?;
        reference.final_norm()?;
        reference.norm(0, LayerNorm::AttentionInput)?;
        reference.norm(0, LayerNorm::FeedForwardInput)?;
        Projection::ALL.into_iter().try_for_each(|projection| reference.projection(0, projection).map(drop))
    };
    for make in [|| Made::any_prec(3, &[3]), || Made::lut_gemm(3)] {
        read(&make()).unwrap();
        let floats = |made: &Made| -> Vec<String> {
            made.weights
                .iter()
                .filter(|(_, array)| array.storage != "IntStorage")
                .map(|(name, _)| name.clone())
                .collect()
        };
        for (t, name) in floats(&make()).into_iter().enumerate() {
            let mut made = make();
            let array = made.weights.get_mut(&name).unwrap();
            let size = if array.storage == "HalfStorage" { 2 } else { 4 };
            let i = t * 7919 % (array.bytes.len() / size);
            // Infinite in either type: the highest bytes are all that differ.
            array.bytes[size * i..][..size].fill(0);
            let high: &[u8] = if size == 2 { &[0, 0x7c] } else { &[0x80, 0x7f] };
            array.bytes[size * (i + 1) - 2..][..2].copy_from_slice(high);
            let says = format!("tensor {name}: number {i} is inf");
            let error = format!("{:#}", read(&made).unwrap_err());
            assert!(
                error.contains(&says) && error.contains("finite numbers are expected: get the file again"),
                "{error}"
            );
        }
    }
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
