//! Names on the Hub.

use std::fmt::{self, Display};

/// Characters that an organization's or a model's name may have.
const LONGEST: usize = 96;

/// Ends of paths to files, which no model's name has.
const FILES: [&str; 5] = [".gguf", ".safetensors", ".whl", ".zip", ".git"];

/// A model by its name, `ORG/MODEL`, at a revision: `main`, or what follows in `ORG/MODEL@REVISION` (a branch, a tag or
/// a commit).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName {
    repository: String,
    revision: String,
}

impl ModelName {
    /// Reads a name; none where the text cannot be one and must be a path.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (organization, model) = repository.split_once('/')?;
        let is_name = |part: &str| is_plain(part) && part.len() <= LONGEST && !part.contains("--");
        let is_revision = revision.split('/').all(is_plain);
        let is_file = FILES.iter().any(|end| model.ends_with(end));
        (is_name(organization) && is_name(model) && is_revision && !is_file)
            .then(|| Self { repository: repository.to_owned(), revision: revision.to_owned() })
    }

    /// `ORG/MODEL`
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

impl Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.repository),
            revision => write!(f, "{}@{revision}", self.repository),
        }
    }
}

/// True for a name that a file may have in any directory, and that leads nowhere else.
pub(super) fn is_plain(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edge = |c: Option<char>| c.is_some_and(|c| !matches!(c, '-' | '.'));
    name.chars().all(allowed) && !name.contains("..") && edge(name.chars().next()) && edge(name.chars().last())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        for (text, repository, revision) in [
            ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", "main"),
            ("a/b.c_d@v1.0", "a/b.c_d", "v1.0"),
            ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
        ] {
            let name = ModelName::parse(text).unwrap();
            assert_eq!((name.repository(), name.revision(), name.to_string()), (repository, revision, text.to_owned()));
        }
        let long = format!("a/{}", "b".repeat(LONGEST + 1));
        for path in [
            "model",
            "/a/b",
            "a/b/c",
            "./a",
            "../a",
            "a/..",
            "a/.b",
            "a/b-",
            "-a/b",
            "a//b",
            "a/",
            "/",
            "",
            "a/b c",
            "a/b--c",
            "models/small.gguf",
            "a/b.whl",
            "a/b@",
            "a/b@../c",
            "a/b@/c",
            "a/é",
            r"a\b",
            &long,
        ] {
            assert_eq!(ModelName::parse(path), None, "{path}");
        }
    }
}
