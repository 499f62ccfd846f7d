//! A checkpoint directory: what is written is what is read, and nothing broken is opened or replaced.

mod small_model;

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use decdec::checkpoint::{BitWidth, Checkpoint, CheckpointWriter, Manifest, Unquantized};
use decdec::config::{LayerNorm, Projection};
use decdec::format::{AnyPrec, Format, LutGemm, Residual, Storage};
use decdec::weights::{Linear, ModelWeights, Weight};
use half::f16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use small_model::{SmallModel, random};

fn manifest(backend: Format, bits: f64) -> Manifest {
    Manifest {
        version: 1,
        backend,
        bits: BitWidth::try_from(bits).unwrap(),
        group_size: (backend == Format::LutGemm).then_some(32),
        residual_bits: 4,
        source: "random".into(),
        calibration: "none".into(),
    }
}

/// A random quantized projection: not a good one, but every number in it differs.
fn linear(model: &SmallModel, layer: usize, projection: Projection, backend: Format, bits: usize) -> Linear<'static> {
    let (inputs, outputs) = model.config.shape(0, projection);
    let mut rng = ChaCha8Rng::seed_from_u64((layer * 4 + projection.index()) as u64);
    let codes: Vec<u8> = (0..inputs * outputs).map(|_| (rng.next_u32() % (1 << bits)) as u8).collect();
    let halves =
        |rng: &mut ChaCha8Rng, len| random(rng, len, 1.0).iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>();
    let weight = match backend {
        Format::AnyPrec => {
            let lut = halves(&mut rng, outputs << bits);
            Weight::AnyPrec(AnyPrec::pack(inputs, outputs, bits, &codes, lut.into()).unwrap())
        }
        Format::LutGemm => {
            let binary = (0..inputs / 32 * bits * outputs).map(|_| rng.next_u32()).collect();
            let alpha = halves(&mut rng, inputs / 32 * bits * outputs);
            let q_bias = halves(&mut rng, inputs / 32 * outputs);
            let binary = Cow::Owned(binary);
            Weight::LutGemm(LutGemm::new(inputs, outputs, bits, 32, binary, alpha.into(), q_bias.into()).unwrap())
        }
    };
    let residual = Residual::quantize(inputs, outputs, &random(&mut rng, inputs * outputs, 0.1)).unwrap();
    let thresholds = (0..inputs).map(|i| (inputs - i) as f32 / 7.0).collect();
    let bias = model.projection(layer, projection).unwrap().bias.map(|b| Cow::Owned(b.into_owned()));
    Linear { weight, bias, residual: Some(residual), thresholds: Some(Cow::Owned(thresholds)) }
}

/// γ before attention and before the feed-forward part, in the order of `LayerNorm::ALL`.
fn by_place((attention, feed_forward): &(Vec<f32>, Vec<f32>)) -> [Vec<f32>; 6] {
    let mut norms = [const { Vec::new() }; 6];
    norms[LayerNorm::AttentionInput.index()].clone_from(attention);
    norms[LayerNorm::FeedForwardInput.index()].clone_from(feed_forward);
    norms
}

fn linears(model: &SmallModel, layer: usize, backend: Format, bits: usize) -> [Linear<'static>; 4] {
    Projection::ALL.map(|projection| linear(model, layer, projection, backend, bits))
}

fn assert_same(got: &Linear<'_>, want: &Linear<'_>) {
    assert_eq!(got.weight, want.weight);
    assert_eq!(got.bias, want.bias);
    assert_eq!(got.residual, want.residual);
    assert_eq!(got.thresholds, want.thresholds);
}

fn write(model: &SmallModel, out: &Path, backend: Format, bits: f64, overwrite: bool) -> anyhow::Result<()> {
    let manifest = manifest(backend, bits);
    let writer = CheckpointWriter::create(out, "key", overwrite)?;
    let widths: Vec<u32> = (0..model.config.layers.len())
        .map(|layer| if layer % 2 == 0 { manifest.bits.low() } else { manifest.bits.high() })
        .collect();
    for (layer, &bits) in widths.iter().enumerate() {
        writer.write_layer(
            &model.config,
            (layer, bits),
            &by_place(&model.norms[layer]),
            &linears(model, layer, backend, bits as usize),
        )?;
    }
    let rest = Unquantized { embedding: model.embedding()?, head: None, final_norm: model.final_norm()? };
    writer.finish(&model.config, &manifest, &widths, &rest, &small_model::texts())
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for (backend, bits, bias) in [
        (Format::AnyPrec, 3.0, false),
        (Format::AnyPrec, 3.5, true),
        (Format::LutGemm, 4.0, true),
        (Format::LutGemm, 3.5, false),
    ] {
        let model = SmallModel::new(1, 3, bias);
        let out = dir.path().join(format!("{backend}-{bits}"));
        write(&model, &out, backend, bits, false).unwrap();
        let read = Checkpoint::open(&out).unwrap();
        assert_eq!(read.config(), &model.config);
        assert_eq!(read.manifest(), &manifest(backend, bits));
        assert_eq!(read.embedding().unwrap(), model.embedding().unwrap());
        assert_eq!(read.head().unwrap(), None);
        assert_eq!(read.final_norm().unwrap(), model.final_norm().unwrap());
        assert_eq!(read.texts(), &small_model::texts());
        for layer in 0..3 {
            let width = bits.floor() as u32 + u32::from(layer % 2 == 1 && bits.fract() > 0.0);
            assert_eq!(read.bits(layer), Some(width));
            assert_eq!(small_model::norms(&read, layer), model.norms[layer]);
            for (projection, want) in Projection::ALL.into_iter().zip(linears(&model, layer, backend, width as usize)) {
                assert_same(&read.projection(layer, projection).unwrap(), &want);
            }
        }
        // Negative control: the comparison sees another layer's weights.
        let other = linear(&model, 1, Projection::O, backend, bits as usize);
        assert_ne!(read.projection(0, Projection::O).unwrap().weight, other.weight);
        assert!(!out.with_file_name(format!("{backend}-{bits}.partial")).exists());
    }
}

#[test]
fn only_a_checkpoint_is_replaced_and_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    write(&SmallModel::new(1, 2, false), &out, Format::AnyPrec, 3.0, false).unwrap();
    let before = fs::read(out.join("model.safetensors")).unwrap();
    let other = SmallModel::new(2, 2, false);
    let message = write(&other, &out, Format::AnyPrec, 3.0, false).unwrap_err().to_string();
    assert!(message.contains("--overwrite"), "{message}");
    assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), before);
    write(&other, &out, Format::AnyPrec, 3.0, true).unwrap();
    assert_eq!(Checkpoint::open(&out).unwrap().embedding().unwrap(), other.embedding().unwrap());

    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("precious"), "kept").unwrap();
    let message = write(&other, &home, Format::AnyPrec, 3.0, true).unwrap_err().to_string();
    assert!(message.contains("not a decdec checkpoint"), "{message}");
    assert_eq!(fs::read(home.join("precious")).unwrap(), b"kept");
    // Nor is the place of unfinished work, if it is something else.
    fs::rename(&home, dir.path().join("new.partial")).unwrap();
    let message = write(&other, &dir.path().join("new"), Format::AnyPrec, 3.0, true).unwrap_err().to_string();
    assert!(message.contains("something else"), "{message}");
    assert_eq!(fs::read(dir.path().join("new.partial/precious")).unwrap(), b"kept");
}

/// What a program leaves that is killed in the middle of its last steps.
#[test]
fn killed_while_replacing_or_cleaning_up() {
    let dir = tempfile::tempdir().unwrap();
    let (out, partial) = (dir.path().join("out"), dir.path().join("out.partial"));
    let (one, other) = (SmallModel::new(1, 2, false), SmallModel::new(2, 2, false));
    write(&one, &out, Format::AnyPrec, 3.5, false).unwrap();

    // The old checkpoint is moved away, the new one is not there yet: the old one comes back.
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("job.txt"), "key").unwrap();
    fs::rename(&out, partial.join("replaced")).unwrap();
    let message = write(&other, &out, Format::AnyPrec, 3.0, false).unwrap_err().to_string();
    assert!(message.contains("--overwrite"), "{message}");
    assert_eq!(Checkpoint::open(&out).unwrap().embedding().unwrap(), one.embedding().unwrap());

    // Old and new have changed places, the old one is still where the new one was made: none of its files stays.
    fs::create_dir_all(partial.join("checkpoint")).unwrap();
    fs::copy(out.join("bitwidth_map.json"), partial.join("checkpoint/bitwidth_map.json")).unwrap();
    write(&other, &out, Format::AnyPrec, 3.0, true).unwrap();
    assert!(!out.join("bitwidth_map.json").exists() && !partial.exists());
    assert_eq!(Checkpoint::open(&out).unwrap().embedding().unwrap(), other.embedding().unwrap());

    // Half of a finished job is cleaned up: what is left of it is not taken for unfinished work.
    let writer = CheckpointWriter::create(&out, "key", true).unwrap();
    writer.write_file("tokens", b"abc").unwrap();
    drop(writer);
    fs::write(partial.join("job.txt"), "finished").unwrap();
    assert!(CheckpointWriter::create(&out, "key", true).unwrap().read_file("tokens").is_none());
}

#[test]
fn an_unfinished_job_goes_on_and_a_different_one_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let model = SmallModel::new(1, 2, false);
    let layer = linears(&model, 0, Format::AnyPrec, 3);
    let writer = CheckpointWriter::create(&out, "key", false).unwrap();
    writer.write_layer(&model.config, (0, 3), &by_place(&model.norms[0]), &layer).unwrap();
    writer.write_file("tokens", b"abc").unwrap();
    let message = CheckpointWriter::create(&out, "key", false).unwrap_err().to_string();
    assert!(message.contains("another process"), "{message}");
    drop(writer);

    let writer = CheckpointWriter::create(&out, "key", false).unwrap();
    assert!(writer.has_layer(0, 3) && !writer.has_layer(1, 3) && !writer.has_layer(0, 4));
    assert_eq!(writer.read_file("tokens").as_deref(), Some(&b"abc"[..]));
    let file = writer.layer(0, 3).unwrap();
    assert_same(&file.projection(Projection::Down, &model.config, Storage::ANYPREC).unwrap(), &layer[3]);
    let rest = Unquantized { embedding: model.embedding().unwrap(), head: None, final_norm: vec![1.0; 64] };
    let manifest = manifest(Format::AnyPrec, 3.0);
    assert!(
        writer.finish(&model.config, &manifest, &[3, 3], &rest, &small_model::texts()).is_err(),
        "layer 1 is not there"
    );
    assert!(!out.exists());

    let writer = CheckpointWriter::create(&out, "another key", false).unwrap();
    assert!(!writer.has_layer(0, 3) && writer.read_file("tokens").is_none());
}

#[test]
fn what_is_broken_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let model = SmallModel::new(1, 2, false);
    write(&model, &out, Format::AnyPrec, 3.5, false).unwrap();
    let refused = |what: &str| {
        let message = format!("{:#}", Checkpoint::open(&out).expect_err(what));
        assert!(message.contains(out.to_str().unwrap()), "{what}: {message}");
        message
    };
    for name in
        ["config.json", "model.safetensors", "residuals.safetensors", "thresholds.safetensors", "bitwidth_map.json"]
    {
        let path = out.join(name);
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(refused("missing").contains(name));
        fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        assert!(refused("cut short").contains(name));
        fs::write(&path, &whole).unwrap();
    }
    let edit = |name: &str, from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let path = out.join(name);
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, bytes).unwrap();
    };
    for (name, from, to) in [
        ("model.safetensors", "layers.1.mlp.down_proj.lut", "layers.1.mlp.down_proj.lot"),
        ("residuals.safetensors", "\"U32\"", "\"I32\""),
        ("config.json", "\"intermediate_size\": 128", "\"intermediate_size\": 160"),
        ("config.json", "\"backend\": \"ap\"", "\"backend\": \"aq\""),
        ("bitwidth_map.json", "\"1\": 4", "\"1\": 3"),
        ("bitwidth_map.json", "\"1\"", "\"2\""),
    ] {
        edit(name, from, to);
        refused(to);
        edit(name, to, from);
    }
    Checkpoint::open(&out).unwrap();
    // A threshold that grows is seen when the directory is opened, not in the middle of a text.
    let path = out.join("thresholds.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&1e9f32.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    assert!(refused("thresholds").contains("never increase"));
}
