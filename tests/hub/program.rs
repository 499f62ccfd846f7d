//! The program with names in place of paths.

use std::path::Path;
use std::process::{Command, Output};

use super::{Fault, Place, fs};

impl Place {
    fn decdec(&self, words: &[&str]) -> Output {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin("decdec"));
        command.args(words).env("HF_ENDPOINT", &self.server.endpoint).env("HF_HUB_CACHE", self.dir.path().join("hub"));
        command
            .env("DECDEC_CACHE_DIR", self.dir.path().join("own"))
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_OFFLINE");
        command.env("HF_HOME", self.dir.path()).env_remove("RUST_LOG").current_dir(self.dir.path());
        command.stdin(std::process::Stdio::null()).output().expect("it runs")
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const ON_CPU: [&str; 4] = ["--device", "cpu", "--max-new-tokens", "3"];

#[test]
fn run_downloads_quantizes_keeps_and_answers() {
    let place = Place::new();
    // The shorter the context, the shorter the samples of calibration.
    let config = String::from_utf8(super::model().remove("config.json").expect("there")).expect("text");
    let short = config.replace("\"max_position_embeddings\":64", "\"max_position_embeddings\":24");
    assert_ne!(config, short);
    place.server.put("config.json", short.as_bytes());
    let run = |model: &str| place.decdec(&[&["run", model, "--prompt", "a b"], &ON_CPU[..]].concat());
    let first = run("small/model:3");
    assert!(first.status.success() && !first.stdout.is_empty(), "{}", text(&first.stderr));
    assert!(text(&first.stderr).contains("quantizing small/model to 3 bits, once"), "{}", text(&first.stderr));
    let kept = place.dir.path().join("own/models/small--model-ap-3");
    let manifest = fs::read_to_string(kept.join("config.json")).expect("kept");
    assert!(manifest.contains("\"source\": \"model\"") || manifest.contains("\"source\":\"model\""), "{manifest}");
    // The second time, nobody is asked for anything, and the answer is the same.
    place.server.asked();
    let second = run("small/model:3");
    assert!(second.status.success() && !text(&second.stderr).contains("quantizing"), "{}", text(&second.stderr));
    assert_eq!(text(&first.stdout), text(&second.stdout));
    assert!(place.server.asked().is_empty());
    // A path that exists wins over a name, and is run where it is quantized.
    let path = kept.to_str().expect("text");
    assert_eq!(text(&run(path).stdout), text(&first.stdout));
}

#[test]
fn a_name_stands_where_a_path_does() {
    let place = Place::new();
    let (out, book) = (place.dir.path().join("out"), place.dir.path().join("book.txt"));
    let (out, book) = (out.to_str().expect("text"), book.to_str().expect("text"));
    fs::write(book, "a b ab ba ".repeat(40)).expect("written");
    let line = |words: &[&str]| {
        let output = place.decdec(words);
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    line(&[
        "quantize",
        "small/model",
        "--backend",
        "ap",
        "--bitwidth",
        "4",
        "--samples",
        "4",
        "--seq-len",
        "16",
        "--out",
        out,
    ]);
    let generate = |model: &str| {
        let words = ["generate", "--checkpoint-path", model, "--prompt", "a b"];
        line(&[&words[..], &ON_CPU].concat())
    };
    let by_name = generate("small/model");
    assert!(!by_name.is_empty());
    let eval = |model: &str| line(&["eval", "perplexity", model, "--text", book, "--seq-len", "16", "--device", "cpu"]);
    let (full, quantized) = (eval("small/model"), eval(out));
    assert!(full.starts_with("perplexity ") && full != quantized, "{full} {quantized}");
    let compared = line(&[
        "eval",
        "perplexity",
        out,
        "--text",
        book,
        "--seq-len",
        "16",
        "--device",
        "cpu",
        "--compare",
        "small/model",
    ]);
    assert!(compared.contains("KL divergence"), "{compared}");
    assert!(line(&["inspect", "small/model"]).contains("full precision"));
    // In its own directory, a path of that name wins.
    fs::create_dir_all(place.dir.path().join("small")).expect("made");
    std::os::unix::fs::symlink(Path::new(out), place.dir.path().join("small/model")).expect("linked");
    assert!(line(&["inspect", "small/model"]).contains("ap 4"));
}

#[test]
fn what_a_name_is_not_is_told_in_one_line() {
    let place = Place::new();
    let refused = |words: &[&str]| {
        let output = place.decdec(words);
        let said = text(&output.stderr);
        let errors: Vec<_> = said.lines().filter(|line| line.starts_with("error: ")).map(str::to_owned).collect();
        assert!(output.status.code() == Some(1) && errors.len() == 1, "{words:?}: {said}");
        errors[0].clone()
    };
    assert!(refused(&["run", "no-such"]).contains("no-such is neither a directory nor ORG/MODEL"));
    assert!(refused(&["run", "small/model:99"]).contains("in small/model:99: "));
    assert!(refused(&["inspect", "no/model"]).contains("does not show no/model without a token (401)"));
    place.server.fail("/main", &[Fault::Status(429, "Retry-After", "3600")]);
    assert!(refused(&["run", "small/model"]).contains("asks to wait 3600 s"));
    // Of a path that is no name, nobody is asked.
    place.server.asked();
    assert!(refused(&["inspect", "models/none.gguf"]).contains("cannot open the model models/none.gguf"));
    assert!(place.server.asked().is_empty());
}
