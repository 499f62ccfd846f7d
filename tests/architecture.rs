//! Each outside crate has one door (the picture of the house in `src/lib.rs`).

use std::path::{Path, PathBuf};

/// Crate, and the only files of `src` that may name it.
const DOORS: [(&str, &[&str]); 14] = [
    ("cudarc", &["backend/cuda", "cupti"]),
    ("wgpu", &["backend/wgsl"]),
    ("pollster", &["backend/wgsl"]),
    ("rusqlite", &["nsys"]),
    ("tokenizers", &["tokenizer"]),
    ("minijinja", &["tokenizer"]),
    ("clap", &["cli", "main.rs"]),
    ("clap_complete", &["cli"]),
    ("ctrlc", &["commands/interrupt.rs"]),
    ("tracing_subscriber", &["main.rs"]),
    ("blake3", &["fingerprint.rs", "backend/cuda/compiler.rs"]),
    ("libc", &["mapped.rs"]),
    ("memmap2", &["mapped.rs", "backend/cuda/host.rs"]),
    ("plotters", &["tune", "timeline/plot.rs"]),
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in dir.read_dir().expect("readable").map(|entry| entry.expect("readable").path()) {
        if entry.is_dir() {
            sources(&entry, found);
        } else if entry.extension().is_some_and(|e| e == "rs") {
            found.push(entry);
        }
    }
}

#[test]
fn each_outside_crate_has_one_door() {
    let src = Path::new("src");
    let mut files = Vec::new();
    sources(src, &mut files);
    assert!(files.len() > 20, "the sources are there");
    for (name, doors) in DOORS {
        for file in &files {
            let relative = file.strip_prefix(src).expect("inside").to_string_lossy().into_owned();
            let text = std::fs::read_to_string(file).expect("text");
            let names_it = [format!("use {name}::"), format!("{name}::")].iter().any(|needle| {
                text.lines().any(|l| {
                    !l.trim_start().starts_with("//")
                        && l.split(needle.as_str()).count() > 1
                        && !l.contains(&format!("backend::{name}"))
                })
            });
            let allowed = doors.iter().any(|door| relative.starts_with(door));
            assert!(!names_it || allowed, "{relative} names {name}, whose door is {doors:?}");
        }
    }
}

/// Who writes to stdout or stderr by other ways than `output.rs` panics, or says nothing, where nobody reads.
#[test]
fn the_program_has_one_way_out() {
    let mut files = Vec::new();
    sources(Path::new("src/commands"), &mut files);
    sources(Path::new("src/cli"), &mut files);
    files.extend(["src/cli.rs", "src/output.rs"].map(PathBuf::from));
    let writes = |file: &Path| {
        let text = std::fs::read_to_string(file).expect("text");
        ["io::stdout", "io::stderr", "println!", "print!("].iter().any(|way| text.contains(way))
    };
    let ways: Vec<_> = files.into_iter().filter(|file| writes(file)).collect();
    assert_eq!(ways, [Path::new("src/output.rs")]);
}
