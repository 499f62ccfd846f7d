//! Arrows go down, and each outside crate has one door (the picture of the house in `src/lib.rs`).

use std::path::{Path, PathBuf};

/// Crate, and the only files of `src` that may name it.
const DOORS: [(&str, &[&str]); 28] = [
    ("cudarc", &["backend/cuda", "cupti"]),
    ("wgpu", &["backend/wgsl"]),
    ("pollster", &["backend/wgsl"]),
    ("rusqlite", &["nsys"]),
    ("tokenizers", &["tokenizer"]),
    ("minijinja", &["tokenizer"]),
    ("chrono", &["tokenizer"]),
    ("clap", &["cli", "main.rs"]),
    ("clap_complete", &["cli"]),
    ("clap_mangen", &["cli"]),
    ("indicatif", &["commands/mod.rs", "profile/sweep.rs"]),
    ("comfy_table", &["commands/mod.rs", "tune"]),
    ("csv", &["tune"]),
    ("rustyline", &["commands/chat.rs"]),
    ("dejavu", &["fonts.rs"]),
    ("ctrlc", &["commands/interrupt.rs"]),
    ("tracing_subscriber", &["main.rs"]),
    ("axum", &["serve"]),
    ("hyper", &["serve/http.rs"]),
    ("hyper_util", &["serve/http.rs"]),
    ("llguidance", &["serve/guide.rs"]),
    ("tokio", &["serve"]),
    ("blake3", &["fingerprint.rs", "backend/cuda/compiler.rs", "serve/keys.rs"]),
    ("libc", &["mapped.rs"]),
    ("memmap2", &["mapped.rs", "backend/cuda/host.rs"]),
    ("ureq", &["hub"]),
    ("ring", &["hub"]),
    ("plotters", &["tune", "timeline/plot.rs", "eval/picture.rs", "fonts.rs"]),
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
            // Not in the end of another word: `String::` does not name `ring`.
            let part_of_a_word = |c: char| c.is_alphanumeric() || c == '_';
            let names_it = text.lines().any(|line| {
                !line.trim_start().starts_with("//")
                    && !line.contains(&format!("backend::{name}"))
                    && line.match_indices(&format!("{name}::")).any(|(at, _)| !line[..at].ends_with(part_of_a_word))
            });
            let allowed = doors.iter().any(|door| relative.starts_with(door));
            assert!(!names_it || allowed, "{relative} names {name}, whose door is {doors:?}");
        }
    }
}

/// The modules of `src`, lowest first: none names one that comes after it.
const FLOORS: [&str; 38] = [
    "interrupted",
    "processor",
    "files",
    "mapped",
    "host",
    "progress",
    "fonts",
    "format",
    "config",
    "weights",
    "tokenizer",
    "tensors",
    "checkpoint",
    "source",
    "random",
    "hub",
    "open",
    "fingerprint",
    "sampling",
    "dec",
    "quantize",
    "convert",
    "backend",
    "model",
    "tuned",
    "timeline",
    "device",
    "engine",
    "serve",
    "eval",
    "nsys",
    "profile",
    "tune",
    "output",
    "cli",
    "commands",
    "main",
    "lib",
];

/// The module of a file, and the modules that the program part of it names.
fn names(file: &Path) -> (String, Vec<String>) {
    let relative = file.strip_prefix("src").expect("inside").to_string_lossy().into_owned();
    let module = relative.split(['/', '.']).next().expect("a name").to_owned();
    let text = std::fs::read_to_string(file).expect("text");
    let program = text.split("#[cfg(test)]\nmod tests {").next().expect("a part");
    let lines = program.lines().filter(|line| !line.trim_start().starts_with("//"));
    let after = |line: &str, path: &str| -> Vec<String> {
        let parts = line.split(path).skip(1);
        let word = |part: &str| part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        parts.map(word).collect()
    };
    let named = lines.flat_map(|line| [after(line, "crate::"), after(line, "decdec::")].concat());
    (module.clone(), named.filter(|name| *name != module && !name.is_empty()).collect())
}

#[test]
fn arrows_go_down() {
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    let floor = |module: &str| {
        FLOORS.iter().position(|name| *name == module).unwrap_or_else(|| panic!("{module} has no floor in this test"))
    };
    let is_test = |file: &PathBuf| {
        let stem = file.file_stem().expect("a name");
        stem == "tests" || stem == "fixture" || file.components().any(|part| part.as_os_str() == "tests")
    };
    let mut arrows = 0;
    for file in files.iter().filter(|file| !is_test(file)) {
        let (module, named) = names(file);
        for other in named {
            assert!(floor(&other) < floor(&module), "{}: {module} names {other}, which is above it", file.display());
            arrows += 1;
        }
    }
    assert!(arrows > 100, "{arrows} arrows were seen");
}

/// What is above backends names none of them, and they do not know each other.
#[test]
fn backends_meet_nowhere() {
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    for file in files {
        let relative = file.strip_prefix("src").expect("inside").to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&file).expect("text");
        let program = text.split("#[cfg(test)]\nmod tests {").next().expect("a part");
        for backend in ["cpu", "cuda", "wgsl"] {
            let of_it = [format!("backend::{backend}::"), format!("backend::{backend};")];
            let names_it = program
                .lines()
                .any(|line| !line.trim_start().starts_with("//") && of_it.iter().any(|name| line.contains(name)));
            let may = relative.starts_with(&format!("backend/{backend}"))
                || ["commands/doctor.rs", "device.rs"].iter().any(|door| relative.starts_with(door));
            assert!(!names_it || may, "{relative} names the backend {backend}");
        }
    }
}

/// The crates that only the program needs, and the modules that only it has, come with the feature `cli`; a library
/// without it has none of them, nor has what they need.
#[test]
fn a_library_needs_no_command_line() {
    let manifest = std::fs::read_to_string("Cargo.toml").expect("text");
    let library = std::fs::read_to_string("src/lib.rs").expect("text");
    let timeline = std::fs::read_to_string("src/timeline.rs").expect("text");
    for module in ["mod fonts;", "pub mod nsys;", "pub mod profile;", "pub mod tune;"] {
        assert!(library.contains(&format!("\n#[cfg(feature = \"cli\")]\n{module}\n")), "{module}");
    }
    assert!(timeline.contains("\n#[cfg(feature = \"cli\")]\nmod plot;\n"));
    let inside = [
        "cli",
        "commands",
        "main.rs",
        "output.rs",
        "fonts.rs",
        "nsys",
        "profile",
        "tune/",
        "timeline/plot.rs",
        "eval/picture.rs",
    ];
    let feature = manifest.split("\ncli = [").nth(1).and_then(|rest| rest.split(']').next()).expect("the feature");
    let crates: Vec<_> = feature.split('"').filter_map(|part| part.strip_prefix("dep:")).collect();
    assert!(crates.len() >= 10, "{crates:?}");
    for (name, doors) in
        DOORS.iter().filter(|(name, _)| crates.contains(&name.replace('_', "-").as_str()) || crates.contains(name))
    {
        for door in *doors {
            assert!(inside.iter().any(|place| place.starts_with(door) || door.starts_with(place)), "{name}: {door}");
        }
    }
    let tree = |features: &[&str]| {
        let mut cargo = std::process::Command::new(env!("CARGO"));
        cargo.args(["tree", "--offline", "--locked", "--edges", "normal,build", "--prefix", "none"]).args(features);
        let output = cargo.output().expect("cargo");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("text");
        text.lines()
            .filter_map(|line| line.split(' ').next().map(str::to_owned))
            .collect::<std::collections::BTreeSet<_>>()
    };
    let (without, with) = (tree(&["--no-default-features"]), tree(&[]));
    let of = |name: &str, least: usize| -> Vec<&str> {
        let part = manifest.split(&format!("\n{name} = [")).nth(1).and_then(|rest| rest.split(']').next());
        let crates = part.expect("the feature").split('"').filter_map(|part| part.strip_prefix("dep:"));
        let crates: Vec<_> = crates.collect();
        let module = format!("\n#[cfg(feature = \"{name}\")]\npub mod {name};\n");
        assert!(crates.len() >= least && library.contains(&module), "{name}: {crates:?}");
        crates
    };
    let others = [of("serve", 5), of("hub", 2)].concat();
    let found: Vec<_> = crates.iter().chain(&others).filter(|name| without.contains(**name)).collect();
    assert!(found.is_empty(), "a library has {found:?}");
    assert!(crates.iter().all(|name| with.contains(*name)), "the program lacks some of {crates:?}");
    assert!(with.len() > without.len() + crates.len(), "{} crates with, {} without", with.len(), without.len());
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

/// A test that does not run is counted, since it says so through `devices::skip`; and none looks beside the checkout.
#[test]
fn skipped_tests_say_so_in_one_way() {
    let mut files = Vec::new();
    ["src", "tests"].into_iter().for_each(|dir| sources(Path::new(dir), &mut files));
    // In pieces, or this file would hold what it looks for.
    let printed = ["print", "ln!(\"skip", "ped: "].concat();
    let beside = ["..", "/shared"].concat();
    let holds = |needle: &str| -> Vec<String> {
        let text = |file: &PathBuf| std::fs::read_to_string(file).expect("text");
        files.iter().filter(|file| text(file).contains(needle)).map(|file| file.display().to_string()).collect()
    };
    assert_eq!(holds(&printed), ["tests/devices/mod.rs"]);
    assert_eq!(holds(&beside), [""; 0]);
}
