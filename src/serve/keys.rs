//! Who may ask: keys in a file, compared in constant time.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use axum::http::{HeaderMap, header};

/// The keys that are let in. They are kept and compared as hashes, whose comparison takes the same time whatever they
/// have in common.
#[derive(Debug, Clone, Default)]
pub struct Keys(Vec<blake3::Hash>);

impl Keys {
    /// One key a line; lines that are empty or begin with `#` do not count.
    ///
    /// # Errors
    /// A file that cannot be read, that everybody may read, or that has no key.
    pub fn read(path: &Path) -> Result<Self> {
        let cannot = || format!("cannot read the keys in {}", path.display());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(path).with_context(cannot)?.permissions().mode();
            ensure!(
                mode & 0o007 == 0,
                "{} has the permissions {:03o}, everybody can read the keys in it: chmod 600 {}",
                path.display(),
                mode & 0o777,
                path.display()
            );
        }
        let text = std::fs::read_to_string(path).with_context(cannot)?;
        let keys: Vec<&str> =
            text.lines().map(str::trim).filter(|key| !key.is_empty() && !key.starts_with('#')).collect();
        ensure!(!keys.is_empty(), "{} has no key, write one a line", path.display());
        Ok(Self::new(&keys))
    }

    /// These keys.
    pub fn new(keys: &[&str]) -> Self {
        Self(keys.iter().map(|key| blake3::hash(key.as_bytes())).collect())
    }

    /// Everybody is let in.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a request has a key: `Authorization: Bearer KEY`, or `x-api-key: KEY`.
    pub(super) fn admit(&self, headers: &HeaderMap) -> bool {
        let text = |name| headers.get(name).and_then(|value: &axum::http::HeaderValue| value.to_str().ok());
        let bearer = text(header::AUTHORIZATION)
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, key)| key.trim());
        let own = text(header::HeaderName::from_static("x-api-key"));
        let given: Vec<_> = [bearer, own].into_iter().flatten().map(|key| blake3::hash(key.as_bytes())).collect();
        // Every pair is compared, whichever fits.
        self.is_empty()
            || given.iter().flat_map(|given| self.0.iter().map(move |key| key == given)).fold(false, |a, b| a | b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(keys: &Keys, name: &'static str, value: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().expect("a value"));
        keys.admit(&headers)
    }

    #[test]
    fn keys_let_in() {
        let keys = Keys::new(&["secret", "other"]);
        for (name, value, expected) in [
            ("authorization", "Bearer secret", true),
            ("authorization", "bearer other", true),
            ("x-api-key", "secret", true),
            ("authorization", "Bearer secre", false),
            ("authorization", "Bearer secrets", false),
            ("authorization", "secret", false),
            ("authorization", "Basic secret", false),
            ("x-api-key", "", false),
            ("cookie", "secret", false),
        ] {
            assert_eq!(admits(&keys, name, value), expected, "{name}: {value}");
        }
        assert!(!keys.admit(&HeaderMap::new()) && Keys::default().admit(&HeaderMap::new()));
    }

    #[cfg(unix)]
    #[test]
    fn files_of_keys() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("keys");
        let write = |text: &str, mode: u32| {
            std::fs::write(&path, text).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("set");
            Keys::read(&path).map_err(|error| format!("{error:#}"))
        };
        assert!(admits(&write("# mine\n\n secret \n", 0o600).expect("keys"), "x-api-key", "secret"));
        assert!(write("\n# none\n", 0o600).unwrap_err().contains("has no key"));
        assert!(write("secret", 0o644).unwrap_err().contains("644, everybody can read"));
        assert!(Keys::read(&dir.path().join("none")).unwrap_err().to_string().contains("cannot read the keys"));
    }
}
