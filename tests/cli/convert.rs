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

#[test]
fn residuals_are_made_for_a_pair() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let calibration = ["--seq-len", "16", "--samples", "4"];
    let mut command = decdec();
    command.arg("residuals").arg("--original").arg(shop.path("small.gguf")).arg("--quantized").arg(&checkpoint);
    command.arg("--out").arg(shop.path("pair")).args(calibration);
    command.assert().success().stderr(contains("64 calibration tokens"));
    // The same model, the same calibration: what quantizing had made.
    assert!(contents(&checkpoint) == contents(&shop.path("pair")));
    shop.generate(&shop.path("pair"), &["--prompt", "ab"]).assert().success();
    let mut through_convert = decdec();
    through_convert.arg("convert").arg(&checkpoint).arg("--out").arg(shop.path("again"));
    through_convert.arg("--original").arg(shop.path("small.gguf")).args(calibration).assert().success();
    assert!(contents(&checkpoint) == contents(&shop.path("again")));
    let mut swapped = decdec();
    swapped.arg("residuals").arg("--original").arg(&checkpoint).arg("--quantized").arg(shop.path("small.gguf"));
    swapped.arg("--out").arg(shop.path("none"));
    refuses(swapped, &["small.gguf is full precision"]);
    assert!(!shop.path("none").exists());
}
