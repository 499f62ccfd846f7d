//! The documents: what they point to is there.

use std::path::{Path, PathBuf};

/// Every Markdown file of the repository that people read.
fn documents(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        let name = entry.file_name().expect("a name").to_string_lossy().into_owned();
        if entry.is_dir() && !name.starts_with('.') && name != "target" {
            documents(&entry, found);
        } else if name.ends_with(".md") {
            found.push(entry);
        }
    }
}

/// The places in this repository that a document points to.
fn places(text: &str) -> impl Iterator<Item = &str> {
    let code = |i: usize| i % 2 == 1;
    let prose = text.split("```").enumerate().filter(move |(i, _)| !code(*i)).map(|(_, part)| part);
    let links = prose.flat_map(|part| part.split("](").skip(1)).filter_map(|rest| rest.split_once(')'));
    let places = links.map(|(place, _)| place.split('#').next().unwrap_or_default());
    places.filter(|place| !place.is_empty() && !place.contains("://") && !place.contains(' '))
}

/// Links of a document at `from` that lead nowhere.
fn broken<'t>(from: &Path, text: &'t str) -> Vec<&'t str> {
    places(text).filter(|place| !from.parent().expect("a folder").join(place).exists()).collect()
}

#[test]
fn links_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    documents(root, &mut found);
    let mut links = 0;
    for path in found {
        let text = std::fs::read_to_string(&path).expect("text");
        links += places(&text).count();
        assert_eq!(broken(&path, &text), Vec::<&str>::new(), "{}", path.display());
    }
    assert!(links > 20, "{links} links");
    // Negative control: one that does, one that does not, one elsewhere, one in code.
    let text = "[a](src/lib.rs) [b](src/not.rs#x) [c](https://example.org/x) ```\n[d](no)\n```";
    assert_eq!(broken(&root.join("README.md"), text), ["src/not.rs"]);
}
