//! The table of kernels and their twins against the two folders.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use decdec::backend::kernels::TWINS;

/// Every file of a folder and of those in it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let inside = folder.read_dir().expect("a folder of kernels").map(|file| file.unwrap().path());
    // Quantization has none in WGSL.
    let inside = inside.filter(|path| !path.ends_with("quantize"));
    inside.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// What `entry` finds in every file of `folder` that ends in one of `endings`: `(stem, entry point)`.
fn entry_points(folder: &str, endings: &[&str], entry: impl Fn(&str) -> Vec<String>) -> BTreeSet<(String, String)> {
    let files = files(Path::new(folder)).into_iter();
    let files = files.filter(|file| file.extension().is_some_and(|e| endings.iter().any(|ending| e == *ending)));
    let points = files.flat_map(|file| {
        let stem = file.file_stem().unwrap().to_str().unwrap().to_owned();
        entry(&std::fs::read_to_string(&file).unwrap()).into_iter().map(move |name| (stem.clone(), name))
    });
    points.collect()
}

/// The identifier at the start of `text`.
fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn wgsl_entries(text: &str) -> Vec<String> {
    text.split("@compute").skip(1).map(|rest| identifier(rest.split_once("fn ").unwrap().1)).collect()
}

fn cuda_entries(text: &str) -> Vec<String> {
    let after_void = |rest: &str| {
        let rest = rest.split_once("void ").unwrap().1.trim_start();
        let bounded = rest.strip_prefix("__launch_bounds__(").map(|rest| rest.split_once(')').unwrap().1);
        identifier(bounded.unwrap_or(rest).trim_start())
    };
    text.split("extern \"C\" __global__").skip(1).map(after_void).collect()
}

/// Compares the entry points that were found with those of the table.
fn check(folder: &str, found: &BTreeSet<(String, String)>, table: impl Iterator<Item = &'static str>) {
    let found: BTreeSet<&str> = found.iter().map(|(_, name)| name.as_str()).collect();
    let table: BTreeSet<&str> = table.collect();
    let undeclared: Vec<_> = found.difference(&table).collect();
    let gone: Vec<_> = table.difference(&found).collect();
    assert!(
        undeclared.is_empty() && gone.is_empty(),
        "src/backend/kernels.rs: {folder} has {undeclared:?}, which the table lacks; the table has {gone:?}, which \
         {folder} lacks"
    );
}

#[test]
fn every_kernel_has_its_twin_or_a_reason() {
    let wgsl = entry_points("kernels-wgsl", &["wgsl"], wgsl_entries);
    assert!(wgsl.iter().all(|(stem, name)| stem == name), "a WGSL entry point is not named as its file: {wgsl:?}");
    check("kernels-wgsl", &wgsl, TWINS.iter().filter_map(|twin| twin.wgsl));
    let cuda = entry_points("kernels-cuda", &["cu"], cuda_entries);
    check("kernels-cuda", &cuda, TWINS.iter().filter_map(|twin| twin.cuda));
    for twin in TWINS {
        assert!(twin.wgsl == twin.cuda || !twin.why.is_empty(), "{twin:?} needs a reason");
    }
}

/// The search itself, on texts where it must find something.
#[test]
fn entry_points_are_found() {
    assert_eq!(wgsl_entries("// fn a\n@compute @workgroup_size(64)\nfn b(x: u32) {}"), ["b"]);
    let cuda = "extern \"C\" __global__ void __launch_bounds__(256, 2) a(int x) {}\n\
                extern \"C\" __global__ void b(\n int y) {}\n__global__ void c() {}";
    assert_eq!(cuda_entries(cuda), ["a", "b"]);
}
