//! Calibration texts from files, and what they lead to on other processors.

use std::collections::BTreeMap;
use std::fs;

use super::*;

/// What all files of a checkpoint hold.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("a file").path());
    files
        .map(|path| (path.file_name().expect("a name").to_string_lossy().into_owned(), fs::read(path).expect("bytes")))
        .collect()
}

/// What a checkpoint says that it was calibrated with.
fn calibrated_with(dir: &Path) -> String {
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("config.json")).expect("bytes")).expect("JSON");
    config["decdec"]["calibration"].as_str().expect("text").to_owned()
}

#[test]
fn files_directories_and_json_lines_are_read_beside_own_text() {
    let shop = Workshop::new();
    let text = "ab ba abab bbaa ".repeat(20);
    fs::create_dir_all(shop.path("texts/deeper")).expect("made");
    fs::write(shop.path("texts/a.txt"), &text).expect("written");
    fs::write(shop.path("texts/deeper/b.md"), &text).expect("written");
    fs::write(shop.path("texts/picture.png"), [0x89, 0xff, 0xfe]).expect("written");
    fs::write(shop.path("texts/.hidden"), [0xff]).expect("written");
    fs::write(shop.path("lines.jsonl"), format!("{{\"text\": \"{text}\"}}\n\n{{\"text\": \"ab\"}}")).expect("written");
    let (texts, lines) = (shop.path("texts"), shop.path("lines.jsonl"));
    let [texts, lines] = [&texts, &lines].map(|path| path.to_str().expect("text"));
    let made = |out: &str, flags: &[&str]| {
        shop.quantize(out, &[&["--refine", "none", "--samples", "8"], flags].concat()).assert().success();
        shop.path(out)
    };
    let mixed = made("mixed", &["--calib", texts, lines]);
    let said = calibrated_with(&mixed);
    assert_eq!(said, "texts and 1 more, 4 x 16 tokens; the model's own text, 4 x 16 tokens, seed 0");
    let alone = made("alone", &["--own-share", "0", "--calib", texts, lines]);
    assert_eq!(calibrated_with(&alone), "texts and 1 more, 8 x 16 tokens");
    let other = made("other", &["--seed", "1", "--calib", texts, lines]);
    let thresholds = |dir: &Path| contents(dir)["thresholds.safetensors"].clone();
    assert_ne!(thresholds(&mixed), thresholds(&alone), "own text counts");
    assert_ne!(thresholds(&mixed), thresholds(&other), "its seed does");
}

#[test]
fn texts_that_cannot_be_read_are_named() {
    let shop = Workshop::new();
    let refused = |name: &str, content: &[u8], says: &[&str]| {
        fs::write(shop.path(name), content).expect("written");
        let path = shop.path(name);
        refuses(shop.quantize("no", &["--calib", path.to_str().expect("text")]), &[&[name], says].concat());
    };
    refused("a.jsonl", b"{\"text\": \"ab\"}\n{\"words\": 1}\n", &["line 2", "\"text\"", "\"messages\""]);
    refused("b.jsonl", b"{\"text\": ", &["line 1", "not JSON"]);
    refused("c.jsonl", b"{\"messages\": [{\"role\": \"user\"}]}", &["line 1", "\"content\""]);
    refused("d.txt", &[0xff, 0xfe, 0xfd], &["UTF-8"]);
    fs::create_dir(shop.path("empty")).expect("made");
    let empty = shop.path("empty");
    refuses(shop.quantize("no", &["--calib", empty.to_str().expect("text")]), &["no files"]);
    refuses(shop.quantize("no", &["--own-share", "1"]), &["0 to 0.95"]);
    fs::write(shop.path("short.txt"), "ab").expect("written");
    let short = shop.path("short.txt");
    refuses(shop.quantize("no", &["--calib", short.to_str().expect("text")]), &["tokens", "16", "give more text"]);
}

/// Own text, codes, residuals and training: whatever instructions the processor has.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_same_seed_makes_the_same_bytes_on_every_path() {
    let shop = Workshop::new();
    let made = |path: &str, seed: &str| {
        let out = format!("{path}-{seed}");
        let mut command = shop.quantize(&out, &["--seed", seed]);
        command.env("DECDEC_CPU", path).assert().success();
        contents(&shop.path(&out))
    };
    let want = made("scalar", "3");
    let has = [
        ("avx2", is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")),
        ("avx512", is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512dq")),
    ];
    for (path, _) in has.into_iter().filter(|(_, has)| *has) {
        let got = made(path, "3");
        let other: Vec<_> =
            got.iter().filter(|(name, bytes)| want.get(*name) != Some(*bytes)).map(|(name, _)| name).collect();
        assert!(other.is_empty(), "{path} makes other bytes of {other:?}");
    }
    assert!(made("scalar", "4") != want, "another seed makes the same bytes");
}
