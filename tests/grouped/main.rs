//! AWQ and GPTQ directories of Hugging Face: the weights that come out are the ones that went in, bit for bit; as
//! checkpoints too, and with residuals against the original.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use decdec::checkpoint::Checkpoint;
use decdec::config::{LayerNorm, Projection};
use decdec::convert::convert;
use decdec::open::Opened;
use decdec::progress::Silent;
use decdec::quantize::{Calibration, ResidualOptions, residuals};
use decdec::source::Source;
use decdec::source::grouped::Grouped;
use decdec::weights::ModelWeights;
use half::f16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

mod made;

use made::*;

#[test]
fn awq_weights_are_exact() {
    let dir = tempfile::tempdir().unwrap();
    let modules = modules();
    write(dir.path(), &modules, &config(), "");
    assert!(Grouped::detect(dir.path()));
    let model = Grouped::open(dir.path()).unwrap();
    assert_eq!((model.bits(0), model.group_size(), model.head().unwrap()), (Some(4), Some(GROUP), None));
    assert_exact(&model, &modules);
    // And as a checkpoint, converted once or twice.
    let mut from = dir.path().to_owned();
    for name in ["once", "twice"] {
        let out = dir.path().join(name);
        let opened = Opened::open(&from, None, false).unwrap();
        convert(&opened, &out, false, &AtomicBool::new(false), &Silent).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_exact(&checkpoint, &modules);
        assert!(
            !checkpoint.manifest().has_residuals()
                && checkpoint.projection(0, Projection::O).unwrap().residual.is_none()
        );
        from = out;
    }
    let read = |name: &str, file: &str| fs::read(dir.path().join(name).join(file)).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(read("once", file) == read("twice", file), "{file}");
    }
}

/// Every weight is what its module says.
fn assert_exact(model: &dyn ModelWeights, modules: &[Module]) {
    let parts = [&modules[..3], &modules[3..4], &modules[4..6], &modules[6..]];
    for (projection, parts) in Projection::ALL.into_iter().zip(parts) {
        let weight = model.projection(0, projection).unwrap().weight;
        let mut got = vec![0.0; weight.in_features()];
        let rows = parts.iter().flat_map(|module| (0..module.rows).map(move |row| (module, row)));
        for (fused_row, (module, row)) in rows.enumerate() {
            weight.row(fused_row, &mut got);
            for (k, &got) in got.iter().enumerate() {
                assert_eq!(got, module.weight(row, k), "{}, row {row}, channel {k}", module.name);
            }
        }
        assert_eq!(weight.out_features(), parts.iter().map(|module| module.rows).sum::<usize>());
    }
}

#[test]
fn awq_of_other_kinds_is_refused() {
    let modules = modules();
    let error = |config: &Value, leave_out: &str| {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &modules, config, leave_out);
        format!("{:#}", Grouped::open(dir.path()).unwrap_err())
    };
    for (key, value, says) in [
        ("quant_method", json!("hqq"), "quant_method is \"hqq\", \"awq\" or \"gptq\" is expected"),
        ("bits", json!(3), "bits is 3, 4 is expected"),
        ("version", json!("gemv"), "version is \"gemv\", \"gemm\" is expected"),
        ("zero_point", json!(false), "zero_point is false"),
        ("group_size", json!(-1), "group_size is -1"),
        ("lm_head", json!(true), "lm_head is true: a quantized head is not read"),
        ("group_size", json!(48), "group size 48 does not divide 64"),
        ("group_size", json!(64), "q_proj.qzeros has shape [2, 8], [1, 8] is expected"),
    ] {
        let mut config = config();
        config["quantization_config"][key] = value;
        let error = error(&config, "");
        assert!(error.contains(says), "{error:?} does not say {says:?}");
    }
    let missing = error(&config(), "model.layers.0.mlp.up_proj.qzeros");
    assert!(missing.ends_with("tensor model.layers.0.mlp.up_proj.qzeros is missing"), "{missing}");
    let plain = tempfile::tempdir().unwrap();
    assert!(!Grouped::detect(plain.path()));
}

fn gptq_config(bits: u32, format: &str) -> Value {
    let mut config = config();
    config["quantization_config"] = json!({
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": false, "sym": false,
        "checkpoint_format": format,
    });
    config
}

#[test]
fn gptq_weights_are_exact() {
    for (bits, format) in [(4, "gptq"), (4, "gptq_v2"), (3, "gptq"), (3, "gptq_v2")] {
        let dir = tempfile::tempdir().unwrap();
        let modules = modules_of(bits);
        write_gptq(dir.path(), &modules, &gptq_config(bits, format), Some(|k| k / GROUP));
        assert!(Grouped::detect(dir.path()));
        let model = Grouped::open(dir.path()).unwrap();
        assert_eq!(model.bits(0), Some(bits));
        assert_exact(&model, &modules);
        let opened = Opened::open(dir.path(), None, false).unwrap();
        assert_eq!(opened.quantization().unwrap().1.to_string(), bits.to_string());
        // Read as the other version, every zero is one off.
        let other = if format == "gptq" { "gptq_v2" } else { "gptq" };
        fs::write(dir.path().join("config.json"), gptq_config(bits, other).to_string()).unwrap();
        let other = Grouped::open(dir.path()).unwrap();
        assert_ne!(
            other.projection(0, Projection::O).unwrap().weight,
            model.projection(0, Projection::O).unwrap().weight
        );
    }
}

#[test]
fn gptq_of_other_kinds_is_refused() {
    let error = |config: &Value, order: Option<fn(usize) -> usize>| {
        let dir = tempfile::tempdir().unwrap();
        write_gptq(dir.path(), &modules(), config, order);
        format!("{:#}", Grouped::open(dir.path()).unwrap_err())
    };
    let with = |key: &str, value: Value| {
        let mut config = gptq_config(4, "gptq");
        config["quantization_config"][key] = value;
        config
    };
    let moved: fn(usize) -> usize = |k| (k / GROUP + usize::from(k == 5)) % 2;
    for (config, order, says) in [
        (with("bits", json!(2)), None, "bits is 2, 3 or 4 is expected"),
        (with("bits", json!(3)), None, "q_proj.qweight has shape [8, 64], [6, 64] is expected"),
        (with("checkpoint_format", json!("marlin")), None, "checkpoint_format is \"marlin\""),
        (with("group_size", json!(-1)), None, "group_size is -1"),
        (with("desc_act", json!(true)), None, "act-order (desc_act true) without g_idx"),
        (with("desc_act", json!(true)), Some(moved), "g_idx puts channel 5 into group 1, 0 is expected"),
        (with("desc_act", json!(false)), Some(moved), "act-order (desc_act) is not supported"),
    ] {
        let error = error(&config, order);
        assert!(error.contains(says), "{error:?} does not say {says:?}");
    }
    // Said to be out of order, and is not: nothing is lost.
    let dir = tempfile::tempdir().unwrap();
    write_gptq(dir.path(), &modules(), &with("desc_act", json!(true)), Some(|k| k / GROUP));
    assert_exact(&Grouped::open(dir.path()).unwrap(), &modules());
}

/// What the same quantization is called by this version of a quantizer and by that one.
#[test]
fn every_spelling_of_a_quantization() {
    let gptq = |fields: Value| {
        let mut all = json!({ "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": false });
        fields.as_object().unwrap().iter().for_each(|(key, value)| all[key] = value.clone());
        all
    };
    let v2 = |key: &str| gptq(json!({ key: "gptq_v2" }));
    let modules = modules();
    let exact = |fields: Value| {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config();
        config["quantization_config"] = fields;
        write_gptq(dir.path(), &modules, &config, None);
        assert!(Grouped::detect(dir.path()), "{config}");
        assert_exact(&Grouped::open(dir.path()).unwrap(), &modules);
    };
    exact(gptq(json!({})));
    exact(v2("checkpoint_format"));
    exact(v2("format"));
    exact(gptq(json!({ "checkpoint_format": "gptq_v2", "format": "gptq_v2" })));
    exact(gptq(json!({ "checkpoint_format": null, "format": "gptq_v2" })));
    exact(gptq(json!({ "checkpoint_format": "GPTQ", "format": "gptq" })));
    exact(gptq(json!({ "format": "gptq" })));
    exact(gptq(json!({ "quant_method": "GPTQ", "bits": "4", "group_size": "32" })));
    exact(gptq(json!({ "bits": null, "w_bit": 4, "group_size": null, "q_group_size": GROUP })));

    let awq = |fields: Value| {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config();
        config["quantization_config"] = fields;
        write(dir.path(), &modules, &config, "");
        assert!(Grouped::detect(dir.path()), "{config}");
        assert_exact(&Grouped::open(dir.path()).unwrap(), &modules);
    };
    awq(json!({ "quant_method": "awq", "w_bit": 4, "q_group_size": GROUP, "version": "GEMM", "zero_point": true }));
    awq(json!({ "quant_method": "AWQ", "bits": 4, "group_size": GROUP, "checkpoint_format": "gemm" }));
    awq(json!({ "quant_method": "awq", "bits": 4, "w_bit": 4, "group_size": GROUP, "format": "gemm" }));

    // Before there was anything in config.json, in files of their own.
    let mut plain = config();
    plain.as_object_mut().unwrap().remove("quantization_config");
    let beside = |name: &str, fields: Value| {
        let dir = tempfile::tempdir().unwrap();
        match name {
            "quant_config.json" => write(dir.path(), &modules, &plain, ""),
            _ => write_gptq(dir.path(), &modules, &plain, None),
        }
        assert!(!Grouped::detect(dir.path()));
        fs::write(dir.path().join(name), fields.to_string()).unwrap();
        assert!(Grouped::detect(dir.path()), "{name}");
        fs::rename(dir.path().join("model.safetensors"), dir.path().join("gptq_model-4bit-32g.safetensors")).unwrap();
        assert_exact(&Grouped::open(dir.path()).unwrap(), &modules);
        let source = format!("{:#}", Source::open(dir.path()).unwrap_err());
        assert!(source.contains("is already quantized ("), "{source}");
    };
    beside("quantize_config.json", json!({ "bits": 4, "group_size": GROUP, "desc_act": false, "sym": false }));
    beside("quant_config.json", json!({ "zero_point": true, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM" }));

    // What two spellings say must be the same.
    for (fields, says) in [
        (
            gptq(json!({ "checkpoint_format": "gptq", "format": "gptq_v2" })),
            "in quantization_config: checkpoint_format is \"gptq\", but format is \"gptq_v2\": which of them is meant?",
        ),
        (gptq(json!({ "w_bit": 3 })), "in quantization_config: bits is 4, but w_bit is 3: which of them is meant?"),
        (
            gptq(json!({ "q_group_size": 64 })),
            "in quantization_config: group_size is 32, but q_group_size is 64: which of them is meant?",
        ),
        (
            gptq(json!({ "format": "marlin" })),
            "checkpoint_format is \"marlin\", \"gptq\" or \"gptq_v2\" is expected: save it as one of them",
        ),
        (gptq(json!({ "bits": "four" })), "in quantization_config: bits is \"four\", 3 or 4 is expected"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config();
        config["quantization_config"] = fields;
        write_gptq(dir.path(), &modules, &config, None);
        let error = format!("{:#}", Grouped::open(dir.path()).unwrap_err());
        assert!(error.ends_with(says), "{error:?} does not say {says:?}");
    }
}

/// The configuration says that the head is the embedding; one of other numbers counts all the same.
#[test]
fn a_head_of_other_numbers_counts() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &modules(), &config(), "");
    assert!(Grouped::open(dir.path()).unwrap().head().unwrap().is_none());
    let mut tensors = stored(dir.path());
    tensors.push(("lm_head.weight".into(), Dtype::F16, vec![8, 64], vec![0; 2 * 8 * 64]));
    save(dir.path(), &tensors, &config());
    let head =
        Grouped::open(dir.path()).unwrap().head().unwrap().expect("a head of its own").values.to_f32().into_owned();
    assert_eq!(head, [0.0; 8 * 64]);
}

/// What a family does to its numbers when they are read is done whatever they are packed in: rows of queries and keys in
/// the order in which they turn together, norms that multiply by `1 + w`.
#[test]
fn families_are_read_alike_from_every_directory() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let family = |fields: Value| {
        let mut all = config();
        fields.as_object().unwrap().iter().for_each(|(key, value)| all[key] = value.clone());
        all
    };
    let glm = family(json!({ "model_type": "glm4", "head_dim": 16, "attention_bias": false }));
    let gemma = family(json!({ "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16 }));
    let glm_norms = &["post_self_attn_layernorm", "post_mlp_layernorm"][..];
    let gemma_norms =
        &["self_attn.q_norm", "self_attn.k_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm"][..];
    for (config, norms, rows_move, norms_grow) in [(glm, glm_norms, true, false), (gemma, gemma_norms, false, true)] {
        let mut modules: Vec<Module> = modules().into();
        if rows_move {
            modules.splice(4..6, [Module::random("mlp.gate_up_proj", 192, 64, 4, &mut rng)]);
        }
        let dir = tempfile::tempdir().unwrap();
        let [packed, plain] = ["packed", "plain"].map(|name| dir.path().join(name));
        [&packed, &plain].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
        write(&packed, &modules, &config, "");
        let mut tensors = stored(&packed);
        for name in norms {
            let len = if name.starts_with("self_attn") { 16 } else { 64 };
            let gamma = (0..len).flat_map(|i| f16::from_f32(i as f32 / 64.0).to_le_bytes()).collect();
            tensors.push((format!("model.layers.0.{name}.weight"), Dtype::F16, vec![len], gamma));
        }
        save(&packed, &tensors, &config);
        tensors.retain(|(name, ..)| !["qweight", "qzeros", "scales"].iter().any(|suffix| name.ends_with(suffix)));
        for module in &modules {
            let weights = (0..module.rows).flat_map(|row| (0..module.channels).map(move |k| (row, k)));
            let bytes = weights.flat_map(|(row, k)| module.weight(row, k).to_le_bytes()).collect();
            let name = format!("model.layers.0.{}.weight", module.name);
            tensors.push((name, Dtype::F32, vec![module.rows, module.channels], bytes));
        }
        let mut full = config.clone();
        full.as_object_mut().unwrap().remove("quantization_config");
        save(&plain, &tensors, &full);
        let (packed, plain) = (Grouped::open(&packed).unwrap(), Source::open(&plain).unwrap());
        let rows = |model: &dyn ModelWeights, projection| {
            let weight = model.projection(0, projection).unwrap().weight;
            let mut values = vec![0.0; weight.in_features() * weight.out_features()];
            let rows = values.chunks_exact_mut(weight.in_features()).enumerate();
            rows.for_each(|(row, values)| weight.row(row, values));
            values
        };
        for projection in Projection::ALL {
            assert_eq!(rows(&packed, projection), rows(&plain, projection), "{projection}");
        }
        let second: Vec<f32> = (0..64).map(|k| modules[0].weight(1, k)).collect();
        let moved = rows(&packed, Projection::Qkv)[64..128] != second;
        assert_eq!(moved, rows_move, "row 1 of q stands elsewhere where neighbours turn together");
        for (norm, _) in packed.config().layers[0].norms(64) {
            assert_eq!(packed.norm(0, norm).unwrap(), plain.norm(0, norm).unwrap(), "{norm:?}");
        }
        assert_eq!(packed.final_norm().unwrap(), [if norms_grow { 2.0 } else { 1.0 }; 64]);
    }
}

/// What only some quantizers quantize, and what is no number.
#[test]
fn tensors_that_are_not_as_they_should_be_are_named() {
    let modules = modules();
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &modules, &config(), "");
    let whole: Vec<Stored> = stored(dir.path());
    let error = |tensors: &[Stored]| {
        save(dir.path(), tensors, &config());
        let read = Grouped::open(dir.path()).and_then(|model| {
            model.embedding()?;
            model.final_norm()?;
            model.norm(0, LayerNorm::AttentionInput)?;
            model.norm(0, LayerNorm::FeedForwardInput)?;
            Projection::ALL.into_iter().try_for_each(|projection| model.projection(0, projection).map(drop))
        });
        format!("{:#}", read.unwrap_err())
    };
    let with = |tensor: Stored| [&whole[..], &[tensor]].concat();
    let head = error(&with(("lm_head.qweight".into(), Dtype::I32, vec![1], vec![0; 4])));
    assert!(
        head.ends_with(
            "lm_head.qweight is there: embedding and head are expected in full precision, only projections quantized"
        ),
        "{head}"
    );
    let mut plain: Vec<Stored> = whole.iter().filter(|(name, ..)| !name.contains("down_proj")).cloned().collect();
    plain.push(("model.layers.0.mlp.down_proj.weight".into(), Dtype::F16, vec![64, 96], vec![0; 2 * 64 * 96]));
    let down = error(&plain);
    let says = "model.layers.0.mlp.down_proj is not quantized (modules_to_not_convert): every projection of every \
                layer is expected to be";
    assert!(down.ends_with(says), "{down}");
    // Every tensor of floating-point numbers.
    let floats = whole.iter().enumerate().filter(|(_, (_, dtype, ..))| *dtype == Dtype::F16);
    let mut found = 0;
    for (t, (name, _, shape, bytes)) in floats {
        let i = t * 7919 % (bytes.len() / 2);
        for (bits, shown) in [(0x7e00u16, "NaN"), (0x7c00, "inf"), (0xfc00, "-inf")] {
            let mut broken = whole.clone();
            broken[t].3[2 * i..][..2].copy_from_slice(&bits.to_le_bytes());
            let place = match shape[..] {
                [_, columns] => format!(" (at [{}, {}])", i / columns, i % columns),
                _ => String::new(),
            };
            let says = format!("tensor {name}: number {i} is {shown}{place}, finite numbers are expected");
            let error = error(&broken);
            assert!(error.contains(&says), "{error:?} does not say {says:?}");
        }
        found += 1;
    }
    assert_eq!(found, 4 + modules.len(), "embedding, norms, scales");
}

/// The tensors of a directory.
fn stored(dir: &Path) -> Vec<Stored> {
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = all.tensors().into_iter();
    tensors.map(|(name, t)| (name, t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect()
}

/// What AWQ would have multiplied channel `k` by.
fn channel_scale(k: usize) -> f32 {
    0.4 + (k * 37 % 64) as f32 / 32.0
}

#[test]
fn awq_residuals_are_against_the_scaled_original() {
    let dir = tempfile::tempdir().unwrap();
    let modules = modules();
    let [quantized, original] = ["quantized", "original"].map(|name| dir.path().join(name));
    [&quantized, &original].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
    write(&quantized, &modules, &config(), "");
    // The original: what rounding took is put back, scales are taken out of channels and put into what feeds them.
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut lost: Vec<Vec<f32>> = Vec::new(); // [module][rows, channels]
    let mut tensors = unquantized();
    for (name, _, _, bytes) in &mut tensors {
        if name.contains("layernorm") {
            *bytes = (0..64).flat_map(|k| f16::from_f32(channel_scale(k)).to_le_bytes()).collect();
        }
    }
    for module in &modules {
        let rows = (0..module.rows).flat_map(|row| (0..module.channels).map(move |k| (row, k)));
        let step = |row: usize, k: usize| module.scales[k / GROUP * module.rows + row].to_f32();
        let of_module: Vec<f32> =
            rows.clone().map(|(row, k)| step(row, k) * (rng.next_u32() as f32 / u32::MAX as f32 - 0.5)).collect();
        let weight = rows.zip(&of_module).flat_map(|((row, k), lost)| {
            let scaled = module.weight(row, k) + lost;
            let channel =
                if module.name == "self_attn.o_proj" { 1.0 } else { f16::from_f32(channel_scale(k)).to_f32() };
            let fed = if module.name == "mlp.up_proj" { f16::from_f32(channel_scale(row)).to_f32() } else { 1.0 };
            (scaled / channel * fed).to_le_bytes()
        });
        let name = format!("model.layers.0.{}.weight", module.name);
        tensors.push((name, Dtype::F32, vec![module.rows, module.channels], weight.collect()));
        lost.push(of_module);
    }
    let mut plain = config();
    plain.as_object_mut().unwrap().remove("quantization_config");
    save(&original, &tensors, &plain);

    let source = Source::open(&original).unwrap();
    let awq = Grouped::open(&quantized).unwrap();
    let out = dir.path().join("out");
    let tokens = (0..96).map(|i| i * 5 % 8).collect();
    let calibration = Calibration::of_text(tokens, 24, 4, "nonsense");
    let options = ResidualOptions { calibration, source: "awq".into(), overwrite: false };
    let (stop, bar) = (AtomicBool::new(false), Silent);
    residuals(&source, &awq, awq.texts(), &options, &out, &stop, &bar).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_exact(&checkpoint, &modules);
    let parts = [0..3, 3..4, 4..6, 6..7];
    for (projection, parts) in Projection::ALL.into_iter().zip(parts) {
        let linear = checkpoint.projection(0, projection).unwrap();
        let residual = linear.residual.unwrap();
        let mut row = vec![0.0; residual.in_features()];
        let wanted = lost[parts].iter().flat_map(|lost| lost.chunks_exact(residual.in_features()));
        let (mut off, mut all) = (0f64, 0f64);
        for (i, wanted) in wanted.enumerate() {
            residual.row(i, &mut row);
            off += row.iter().zip(wanted).map(|(got, want)| f64::from(got - want).powi(2)).sum::<f64>();
            all += wanted.iter().map(|want| f64::from(*want).powi(2)).sum::<f64>();
        }
        // 15 steps over what was lost leave 1/15 of it; scales that follow from rounded rows cost as much again.
        let left = (off / all).sqrt();
        assert!(left < 0.2, "{projection}: {left} of what was lost is not in the residual");
    }
}
