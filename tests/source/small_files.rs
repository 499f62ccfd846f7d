//! Files that are none: pipes, devices, directories and endless ones under every name that a model has.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use decdec::open::Opened;
use decdec::tuned::Tuned;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use super::fixtures::directory::Directory;
use super::{directory, hugging_face};

/// What a name stands for instead of a file, and what is said of it.
const NO_FILES: [(&str, &str); 4] = [
    ("directory", "it is a directory, a regular file is expected"),
    ("pipe", "it is a pipe, a regular file is expected"),
    ("device", "it is a device, a regular file is expected"),
    ("link to a pipe", "it is a pipe, a regular file is expected"),
];

fn make(what: &str, path: &Path) {
    let pipe = |path: &Path| assert!(Command::new("mkfifo").arg(path).status().expect("mkfifo").success());
    match what {
        "directory" => fs::create_dir(path).expect("made"),
        "pipe" => pipe(path),
        "device" => symlink("/dev/zero", path).expect("made"),
        _ => {
            let target = std::path::PathBuf::from(format!("{}.pipe", path.display()));
            pipe(&target);
            symlink(target, path).expect("made");
        }
    }
}

/// Opens what is at `path`, which must end within seconds.
fn open(path: &Path) -> anyhow::Result<()> {
    let (sender, receiver) = mpsc::channel();
    let path = path.to_owned();
    thread::spawn(move || sender.send(Opened::open(&path, None, false).map(drop)));
    receiver.recv_timeout(Duration::from_secs(20)).expect("it ends")
}

/// Checks what is said when `name` in a directory that `fill` fills is no file, or too long for what it is.
fn refused(name: &str, too_long: Option<u64>, fill: impl Fn(&Path)) {
    for (what, says) in NO_FILES {
        let dir = directory();
        fill(dir.path());
        let path = dir.path().join(name);
        if path.exists() {
            open(dir.path()).unwrap_or_else(|e| panic!("{name}: {e:#}"));
            fs::remove_file(&path).expect("removable");
        }
        make(what, &path);
        let message = format!("{:#}", open(dir.path()).expect_err(name));
        assert!(message.contains(name) && message.contains(says) && !message.contains('\n'), "{what}: {message}");
    }
    if let Some(max) = too_long {
        let dir = directory();
        fill(dir.path());
        // Takes no room: nothing is written.
        File::create(dir.path().join(name)).and_then(|file| file.set_len(1 << 40)).expect("made");
        let message = format!("{:#}", open(dir.path()).expect_err(name));
        assert!(
            message.ends_with(&format!("{name}: it has 1099511627776 bytes, at most {max} are expected")),
            "{message}"
        );
    }
}

/// Copies a small directory.
fn source(dir: &Path) {
    let model = hugging_face(Dtype::F16);
    model.open().expect("it opens");
    for entry in model.path().read_dir().expect("readable") {
        let path = entry.expect("readable").path();
        fs::copy(&path, dir.join(path.file_name().expect("a name"))).expect("copied");
    }
}

#[test]
fn of_a_hugging_face_directory() {
    refused("config.json", Some(1 << 20), source);
    refused("tokenizer.json", Some(64 << 20), source);
    refused("generation_config.json", None, source);
    refused("tokenizer_config.json", None, source);
    refused("chat_template.jinja", None, source);
    refused("model.safetensors", None, source);
    refused("model.safetensors.index.json", Some(1 << 20), |dir| {
        source(dir);
        fs::remove_file(dir.join("model.safetensors")).expect("removable");
    });
    let shards = |dir: &Path| {
        source(dir);
        fs::rename(dir.join("model.safetensors"), dir.join("a.safetensors")).expect("movable");
        let map = json!({ "weight_map": { "model.norm.weight": "a.safetensors" } });
        fs::write(dir.join("model.safetensors.index.json"), map.to_string()).expect("writable");
    };
    refused("a.safetensors", None, shards);
}

#[test]
fn of_quantized_models() {
    for name in ["quantize_config.json", "quant_config.json"] {
        refused(name, Some(1 << 20), source);
    }
    for name in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
        refused(name, (name != "pytorch_model.bin").then_some(1 << 20), |dir| {
            source(dir);
            fs::remove_file(dir.join("model.safetensors")).expect("removable");
        });
    }
    let mixed = |dir: &Path| {
        let mut config: Value = Directory::config();
        config["decdec"] = json!({
            "version": 1, "backend": "ap", "bits": 3.5, "group_size": null, "residual_bits": 4, "source": "",
            "calibration": "",
        });
        fs::write(dir.join("config.json"), config.to_string()).expect("writable");
    };
    refused("bitwidth_map.json", Some(1 << 20), mixed);
    let uniform = |dir: &Path| {
        mixed(dir);
        let path = dir.join("config.json");
        let config = fs::read_to_string(&path).expect("readable").replace("3.5", "3.0");
        fs::write(path, config).expect("writable");
    };
    refused("model.safetensors", None, uniform);
}

#[test]
fn of_tuned_results_and_single_files() {
    for (what, says) in NO_FILES {
        let dir = directory();
        for name in ["tuned.json", "m.gguf", "m.whl"] {
            make(what, &dir.path().join(name));
        }
        let tuned = format!("{:#}", Tuned::read(&dir.path().join("tuned.json")).expect_err("no file"));
        assert!(
            tuned.contains("tuned.json is no tuned result: decdec tune writes such files") && tuned.ends_with(says),
            "{tuned}"
        );
        if what != "directory" {
            for name in ["m.gguf", "m.whl"] {
                let message = format!("{:#}", open(&dir.path().join(name)).expect_err("no file"));
                assert!(message.contains(name) && message.ends_with(says), "{message}");
            }
        }
    }
    let dir = directory();
    let path = dir.path().join("tuned.json");
    File::create(&path).and_then(|file| file.set_len(1 << 40)).expect("made");
    let message = format!("{:#}", Tuned::read(&path).expect_err("too long"));
    assert!(message.ends_with("it has 1099511627776 bytes, at most 1048576 are expected"), "{message}");
}
