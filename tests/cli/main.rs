//! The program as a user meets it: bad input gets one clear line, and nothing is lost.

#[path = "../answers/mod.rs"]
mod answers;
#[path = "../devices/mod.rs"]
mod devices;
#[path = "../fixtures/mod.rs"]
mod fixtures;

mod calibration;
#[cfg(unix)]
mod chat;
mod convert;
mod door;
mod flags;
#[cfg(unix)]
mod interrupt;
mod messages;
mod numbers;
mod output;
mod tuning;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;

fn decdec() -> Command {
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("decdec"));
    settle(&mut command);
    Command::from_std(command)
}

/// Leaves out of a command's environment what changes its words: notes that are asked for, the width of a terminal, what
/// Mesa says where there is no session, and a hub that could be asked.
fn settle(command: &mut std::process::Command) {
    command.env_remove("RUST_LOG").env_remove("COLUMNS").env_remove("RUST_BACKTRACE").env("XDG_RUNTIME_DIR", "/tmp");
    command.env("HF_HUB_OFFLINE", "1");
    for name in ["DECDEC_CHECKPOINT_PATH", "DECDEC_DEVICE", "DECDEC_API_KEY_FILE"] {
        command.env_remove(name);
    }
}

/// A small source, and a directory to work in.
struct Workshop {
    dir: tempfile::TempDir,
}

impl Workshop {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (gguf, _) = fixtures::byte_level(fixtures::small_config("llama"), "gpt-2", &["a b"]);
        let bytes = fixtures::small_tensors(gguf, 300).bytes();
        std::fs::write(dir.path().join("small.gguf"), bytes).expect("written");
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn quantize(&self, out: &str, more: &[&str]) -> Command {
        let mut command = decdec();
        command.arg("quantize").arg(self.path("small.gguf")).arg("--out").arg(self.path(out));
        command.args(["--backend", "ap", "--seq-len", "16"]).args(more);
        for (flag, value) in [("--samples", "4"), ("--bitwidth", "3")] {
            if !more.contains(&flag) {
                command.args([flag, value]);
            }
        }
        command
    }

    fn checkpoint(&self) -> PathBuf {
        self.quantize("checkpoint", &[]).assert().success();
        self.path("checkpoint")
    }

    /// The same, every weight by itself: nothing of it depends on what is measured of the calibration text.
    fn plain_checkpoint(&self) -> PathBuf {
        // With this seed, what it says without compensation is not so far off that its perplexity overflows.
        self.quantize("plain", &["--refine", "none", "--seed", "1"]).assert().success();
        self.path("plain")
    }

    fn generate(&self, checkpoint: &Path, more: &[&str]) -> Command {
        let mut command = decdec();
        command.arg("generate").arg("--checkpoint-path").arg(checkpoint).args(["--max-new-tokens", "4"]).args(more);
        command
    }
}

/// Fails with one line that contains all of `parts`, and without a panic.
fn refuses(mut command: Command, parts: &[&str]) {
    let output = command.assert().failure().get_output().clone();
    let stderr = String::from_utf8(output.stderr).expect("text");
    let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "one line of error: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for part in parts {
        assert!(errors[0].contains(part), "'{part}' is not in: {}", errors[0]);
    }
}

#[test]
fn quantize_then_generate_in_both_spellings() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let run = |flags: &[&str]| {
        let mut command = shop.generate(&checkpoint, &["--prompt", "ab", "--ignore-eos", "--json"]);
        let output = command.args(flags).assert().success().get_output().stdout.clone();
        let line: serde_json::Value = serde_json::from_slice(&output).expect("one object");
        line["tokens"].clone()
    };
    let dashes = run(&["--k-chunks", "64", "64", "64", "64", "--n-tbs", "2"]);
    assert_eq!(dashes.as_array().expect("ids").len(), 4);
    let underscores = run(&["--k_chunks", "64", "64", "64", "64", "--n_tbs", "2"]);
    assert_eq!(dashes, underscores);
    let seeded = |seed| run(&["--temperature", "5", "--seed", seed]);
    assert_eq!(seeded("7"), seeded("7"), "same seed, same text");
    assert_ne!(seeded("7"), seeded("8"), "another seed, another text");
}

#[test]
fn what_a_checkpoint_says_need_not_be_repeated_but_must_agree() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    shop.generate(&checkpoint, &["--prompt", "ab", "--backend", "ap", "--bitwidth", "3"]).assert().success();
    refuses(shop.generate(&checkpoint, &["--backend", "lutgemm"]), &["lutgemm", "ap"]);
    refuses(shop.generate(&checkpoint, &["--bitwidth", "4"]), &["4", "3"]);
    shop.generate(&checkpoint, &["--prompt", "ab", "--model-name", "small"]).assert().success();
    refuses(shop.generate(&checkpoint, &["--model-name", "large"]), &["large", "small.gguf"]);
    let preset = "Meta-Llama-3-8B-Instruct";
    refuses(shop.generate(&checkpoint, &["--model_name", preset]), &[preset, "32 layers", "2 layers"]);
}

#[test]
fn measurements_in_the_users_words() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let line =
        predicate::str::is_match(r"Time for inference 2: \d+\.\d\d sec total, \d+\.\d\d tokens/sec").expect("valid");
    shop.generate(&checkpoint, &["--num-samples", "2"]).assert().success().stdout(line.and(contains("Average")));
}

#[test]
fn bad_numbers_are_refused() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let cases: [(&[&str], &[&str]); 9] = [
        (&["--k-chunks", "1025", "0", "0", "0"], &["1025", "1024"]),
        (&["--k-chunks", "8", "8"], &["2 numbers", "4 are expected"]),
        (&["--n-tbs", "0"], &["--n-tbs is 0"]),
        (&["--n-tbs", "5000"], &["5000", "allowed on cpu"]),
        (&["--n-tbs", "2", "2"], &["2 numbers", "1"]),
        (&["--temperature", "-1"], &["-1"]),
        (&["--top-p", "1.5"], &["1.5", "0 to 1"]),
        (&["--prompt", ""], &["prompt is empty"]),
        (&["--device", "tpu"], &["tpu", "cpu"]),
    ];
    for (flags, parts) in cases {
        let mut command = shop.generate(&checkpoint, &[]);
        command.args(flags.iter().map(|flag| flag.to_string()));
        if flags[0] == "--temperature" {
            // Clap takes "-1" for a flag unless it is attached.
            command = shop.generate(&checkpoint, &["--temperature=-1"]);
        }
        refuses(command, parts);
    }
    let long = "a ".repeat(4000);
    refuses(shop.generate(&checkpoint, &["--prompt", &long]), &["the prompt has", "shorten"]);
}

#[test]
fn damaged_checkpoints_are_refused_by_name() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    refuses(shop.generate(Path::new("/nowhere"), &[]), &["/nowhere"]);
    for name in
        ["config.json", "tokenizer.json", "model.safetensors", "residuals.safetensors", "thresholds.safetensors"]
    {
        let path = checkpoint.join(name);
        let whole = std::fs::read(&path).expect("there");
        std::fs::write(&path, &whole[..whole.len() / 2]).expect("written");
        refuses(shop.generate(&checkpoint, &[]), &[]);
        std::fs::remove_file(&path).expect("removed");
        refuses(shop.generate(&checkpoint, &[]), &[]);
        std::fs::write(&path, &whole).expect("written");
    }
    shop.generate(&checkpoint, &["--prompt", "ab"]).assert().success();
    let config = checkpoint.join("config.json");
    let text = std::fs::read_to_string(&config).expect("text").replace("\"llama\"", "\"rwkv\"");
    std::fs::write(&config, text).expect("written");
    refuses(shop.generate(&checkpoint, &[]), &["rwkv"]);
}

#[test]
fn quantize_refuses_and_leaves_what_is_there() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let before = std::fs::read(checkpoint.join("model.safetensors")).expect("there");
    refuses(shop.quantize("checkpoint", &[]), &["--overwrite"]);
    let mut odd_groups = decdec();
    odd_groups.arg("quantize").arg(shop.path("small.gguf")).arg("--out").arg(shop.path("other"));
    odd_groups.args(["--backend", "lutgemm", "--bitwidth", "3", "--group-size", "48", "--seq-len", "16"]);
    refuses(odd_groups, &["48", "32"]);
    assert_eq!(before, std::fs::read(checkpoint.join("model.safetensors")).expect("still there"));
    assert!(!shop.path("other").exists(), "nothing half made");
    let mut missing = decdec();
    missing.args(["quantize", "/nowhere", "--backend", "ap", "--bitwidth", "3", "--out", "x"]);
    refuses(missing, &["/nowhere"]);
    let whole = std::fs::read(shop.path("small.gguf")).expect("there");
    std::fs::write(shop.path("small.gguf"), &whole[..whole.len() - 100]).expect("written");
    refuses(shop.quantize("other", &[]), &["small.gguf"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_up_leaves_no_checkpoint() {
    let shop = Workshop::new();
    let disk = shop.path("disk");
    std::fs::create_dir(&disk).expect("made");
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=32k", "tmpfs"])
        .arg(&disk)
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        devices::skip("a small file system cannot be mounted here");
        return;
    }
    let output = shop.quantize("disk/checkpoint", &[]).output().expect("runs");
    let left = disk.join("checkpoint").exists();
    std::process::Command::new("umount").arg(&disk).status().expect("unmounts");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !left, "{stderr}");
    assert!(stderr.contains("No space left") && !stderr.contains("panicked"), "{stderr}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_generation_with_130_and_keeps_the_text() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("decdec"));
    command.arg("generate").arg("--checkpoint-path").arg(&checkpoint);
    command.args(["--prompt", "ab", "--max-new-tokens", "100", "--num-samples", "1000000", "--ignore-eos"]);
    let mut child =
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null()).spawn().expect("starts");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    interrupt::interrupt(&child);
    // The pipe is read to its end so that the program is not held up by it.
    let mut text = Vec::new();
    std::io::Read::read_to_end(child.stdout.as_mut().expect("piped"), &mut text).expect("readable");
    assert_eq!(child.wait().expect("ends").code(), Some(130));
    assert_eq!(text.last(), Some(&b'\n'), "what was made is flushed, whole");
}

#[test]
fn more_samples_than_the_text_has_are_said() {
    let shop = Workshop::new();
    let text = shop.path("calib.txt");
    std::fs::write(&text, "ab ba abab bbaa ".repeat(20)).expect("written");
    let said = |out: &str, samples: &str| {
        let text = text.to_str().expect("text");
        let flags = ["--refine", "none", "--samples", samples, "--own-share", "0", "--calib", text];
        let mut command = shop.quantize(out, &flags);
        String::from_utf8(command.assert().success().get_output().stderr.clone()).expect("text")
    };
    assert!(said("more", "5000").contains("5000 calibration samples of the text wanted, it has "), "nothing is said");
    assert!(!said("fewer", "2").contains("calibration samples of the text wanted"), "said of text that is long enough");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_quantization_with_130_and_it_goes_on() {
    let shop = Workshop::new();
    // A text long enough that the first of the layers takes a while.
    std::fs::write(shop.path("calib.txt"), "ab ba abab bbaa ".repeat(60_000)).expect("written");
    let long = |shop: &Workshop| {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("decdec"));
        command.arg("quantize").arg(shop.path("small.gguf")).arg("--out").arg(shop.path("slow"));
        command.args([
            "--backend",
            "ap",
            "--bitwidth",
            "3",
            "--seq-len",
            "128",
            "--samples",
            "4000",
            "--own-share",
            "0",
            "--calib",
        ]);
        command.arg(shop.path("calib.txt"));
        command
    };
    let mut child = long(&shop).stderr(std::process::Stdio::null()).spawn().expect("starts");
    let partial = shop.path("slow.partial");
    let started = std::time::Instant::now();
    while !partial.exists() && started.elapsed().as_secs() < 20 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    interrupt::interrupt(&child);
    assert_eq!(child.wait().expect("ends").code(), Some(130));
    assert!(!shop.path("slow").exists(), "nothing half made");
    assert!(partial.exists(), "what was finished is kept");
    assert!(
        long(&shop).stderr(std::process::Stdio::null()).status().expect("runs").success(),
        "the same command goes on"
    );
    assert!(shop.path("slow/config.json").exists() && !partial.exists());
}

/// What all files of a directory hold; empty where there is none.
#[cfg(unix)]
fn contents(dir: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.expect("readable").path());
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    files.map(|path| (name(&path), std::fs::read(&path).expect("readable"))).collect()
}

/// Kills `make(out)`, which replaces one checkpoint by another, at `times` moments of its run, and finds the one or
/// the other, whole, each time. In between it goes on with what the killed runs have left.
#[cfg(unix)]
fn survives_kills(times: u32, old: &Path, make: &dyn Fn(&Path) -> std::process::Command) {
    let dir = tempfile::tempdir().expect("a directory");
    let (out, whole) = (dir.path().join("out"), dir.path().join("whole"));
    let started = std::time::Instant::now();
    assert!(make(&whole).status().expect("runs").success());
    let span = started.elapsed();
    let (before, after) = (contents(old), contents(&whole));
    assert!(before != after && before.len() > 4 && after.len() > 4);
    let (mut kept, mut replaced) = (0, 0);
    for time in 0..times {
        if contents(&out) != before {
            let _ = std::fs::remove_dir_all(&out);
            std::fs::create_dir(&out).expect("made");
            before.iter().for_each(|(name, bytes)| std::fs::write(out.join(name), bytes).expect("written"));
        }
        // A multiplicative sequence spreads the moments evenly over the run, in no order.
        let part = (f64::from(time) * 0.618_034).fract() * 1.2;
        let mut child = make(&out).spawn().expect("starts");
        std::thread::sleep(span.mul_f64(part));
        let _ = child.kill();
        child.wait().expect("ends");
        let found = contents(&out);
        assert!(found == before || found == after, "killed at {part:.2} of the run: {:?} are there", found.keys());
        if found == before { kept += 1 } else { replaced += 1 }
    }
    assert!(kept > 0 && replaced > 0, "{kept} times the old one, {replaced} times the new one: kill at other moments");
    let output = make(&out).stderr(std::process::Stdio::piped()).output().expect("runs");
    assert!(output.status.success(), "it goes on: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(contents(&out), after);
    assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 2, "nothing else is left");
}

#[cfg(unix)]
#[test]
fn a_killed_quantize_or_convert_leaves_the_old_or_the_new() {
    let shop = Workshop::new();
    let old = shop.checkpoint();
    let command = |name: &str, from: &Path, out: &Path| {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("decdec"));
        command.arg(name).arg(from).arg("--out").arg(out).arg("--overwrite").stderr(std::process::Stdio::null());
        command
    };
    let quantize = |out: &Path| {
        let mut command = command("quantize", &shop.path("small.gguf"), out);
        command.args(["--backend", "lutgemm", "--bitwidth", "3.5", "--seq-len", "16", "--samples", "4"]);
        command
    };
    survives_kills(24, &old, &quantize);
    let other = shop.path("other");
    assert!(quantize(&other).status().expect("runs").success());
    survives_kills(24, &old, &|out| command("convert", &other, out));
}

#[test]
fn eval_and_inspect_and_completions() {
    let shop = Workshop::new();
    let checkpoint = shop.plain_checkpoint();
    std::fs::write(shop.path("text.txt"), "ab ba abab bbaa ".repeat(40)).expect("written");
    let eval = |path: &Path, more: &[&str]| {
        let mut command = decdec();
        command.args(["eval", "perplexity"]).arg(path).arg("--text").arg(shop.path("text.txt"));
        command.args(["--seq-len", "32", "--json"]).args(more);
        command
    };
    let read = |mut command: Command| -> serde_json::Value {
        serde_json::from_slice(&command.assert().success().get_output().stdout).expect("one object")
    };
    let source = shop.path("small.gguf");
    let full = read(eval(&source, &["--windows", "0..3"]));
    assert_eq!(full["predictions"], 3 * 31);
    assert!(full["perplexity"].as_f64().expect("a number") > 1.0);
    let source_text = source.to_str().expect("text");
    let itself = read(eval(&source, &["--windows", "0..3", "--compare", source_text]));
    assert_eq!((itself["kl_divergence"].as_f64(), itself["top1_agreement"].as_f64()), (Some(0.0), Some(1.0)));
    let kl = |k: &str| {
        let flags = ["--windows", "0..3", "--compare", source_text, "--k-chunks", k, k, k, k];
        read(eval(&checkpoint, &flags))["kl_divergence"].as_f64().expect("a number")
    };
    let gained = read(eval(
        &checkpoint,
        &["--windows", "0..3", "--compare", source_text, "--k-chunks", "1024", "1024", "1024", "1024"],
    ));
    let number = |name: &str| gained[name].as_f64().expect("a number").ln();
    let share =
        (number("base_perplexity") - number("perplexity")) / (number("base_perplexity") - number("source_perplexity"));
    assert!((gained["recovered"].as_f64().expect("a number") - share).abs() < 1e-9, "{gained}");
    assert_eq!(itself["recovered"], serde_json::Value::Null, "nothing was lost");
    assert!(kl("1024") < kl("0") && kl("0") > 0.0, "compensation brings the source closer: {} {}", kl("1024"), kl("0"));
    refuses(eval(&checkpoint, &["--windows", "90..99"]), &["90..99", "the text has"]);

    decdec().arg("inspect").arg(&checkpoint).assert().success().stdout(contains("bits per weight"));
    decdec().arg("inspect").arg(&checkpoint).arg("--json").assert().success().stdout(contains("\"host_bytes\""));
    decdec().arg("devices").assert().success().stdout(contains("cpu"));
    decdec().arg("doctor").assert().success().stdout(contains("pinned memory").and(contains("NVIDIA driver")));
    let doctor = read({
        let mut command = decdec();
        command.args(["doctor", "--json"]);
        command
    });
    assert!(doctor["cpu"]["cores"].as_u64() >= Some(1), "{doctor}");
    assert!(!cfg!(target_os = "linux") || doctor["memory"]["total_bytes"].as_u64() > Some(1 << 28), "{doctor}");
    // Whatever is there or not, each finding says which, and what is missing how to get it.
    let cuda = &doctor["cuda"];
    let findings = ["driver", "driver_release", "nvrtc", "cublas", "cupti"].map(|name| &cuda[name]);
    for finding in findings.into_iter().chain([&doctor["vulkan"]]) {
        let missing = finding["missing"].as_str();
        assert!(finding.get("found").is_some() || missing.is_some_and(|why| !why.is_empty()), "{doctor}");
    }
    assert_eq!(cuda["driver"].get("found").is_none(), cuda["devices"].as_array().expect("a list").is_empty());
    for shell in ["bash", "zsh", "fish"] {
        decdec().args(["completions", shell]).assert().success().stdout(contains("decdec"));
    }
}

/// On a machine without a GPU: asking for one says what is missing, leaving the choice open runs on the CPU.
#[test]
fn without_a_gpu_the_cpu_runs_and_says_why() {
    let listed = decdec().args(["devices", "--json"]).assert().success().get_output().stdout.clone();
    if String::from_utf8(listed).expect("text").contains("\"cuda:0\"") {
        devices::skip("there is a GPU");
        return;
    }
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    refuses(shop.generate(&checkpoint, &["--device", "cuda"]), &["cuda: ", "install", "--device cpu"]);
    let mut auto = shop.generate(&checkpoint, &["--device", "auto", "--prompt", "a"]);
    auto.assert().success().stderr(contains("running on cpu (cuda: ")).stderr(contains("install"));
    // Where the time went is told once, whatever the device.
    auto.assert().stderr(contains("opened in ").and(contains("first token after")));
}
