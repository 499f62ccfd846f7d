//! What the environment says of the Hub, in the words of Python's `huggingface_hub`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::files;

/// Bytes of a file with a token.
const MAX_TOKEN: u64 = 4096;

/// Which hub is asked, as whom, and where what it gives is kept.
#[derive(Clone)]
pub struct Settings {
    /// Where the hub answers, without a slash at the end (`HF_ENDPOINT`).
    pub endpoint: String,
    /// What private and gated models ask for (`HF_TOKEN`, or what `hf auth login` has left).
    pub token: Option<String>,
    /// The directory of all models (`HF_HUB_CACHE`, or `hub` in `HF_HOME`).
    pub cache: PathBuf,
    /// Nothing is asked: what is in the cache has to do (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// Certificates to trust in place of the usual ones (`SSL_CERT_FILE`).
    pub certificates: Option<PathBuf>,
    /// The first wait before a request that failed is made again; each one after it is twice as long.
    pub pause: Duration,
    /// How long nothing may come before a connection counts as cut.
    pub patience: Duration,
}

impl Settings {
    /// The settings of an environment: [`std::env::var_os`] asks that of this process.
    ///
    /// # Errors
    /// No directory to keep models in; a token that is not text.
    pub fn from_env(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let home = set("HOME").map(PathBuf::from);
        let path = |name: &str| {
            let path = PathBuf::from(set(name)?);
            Some(match (path.strip_prefix("~"), &home) {
                (Ok(below), Some(home)) => home.join(below),
                _ => path,
            })
        };
        let own = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| home.as_ref().map(|home| home.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| own.as_ref().map(|own| own.join("hub")));
        let given =
            set("HF_TOKEN").map(|token| token.into_string().ok().context("HF_TOKEN is not text")).transpose()?;
        let token = match (given, path("HF_TOKEN_PATH").or_else(|| own.map(|own| own.join("token")))) {
            (Some(token), _) => Some(token),
            (None, Some(file)) => files::read_if_there(&file, MAX_TOKEN)
                .with_context(|| format!("cannot read the token in {}", file.display()))?
                .map(|token| String::from_utf8(token).with_context(|| format!("{} is not text", file.display())))
                .transpose()?,
            (None, None) => None,
        };
        let yes = |name: &str| {
            let value = set(name).map(|value| value.to_string_lossy().to_uppercase());
            value.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.as_str()))
        };
        let endpoint = set("HF_ENDPOINT").map(|endpoint| endpoint.to_string_lossy().trim_end_matches('/').to_owned());
        Ok(Self {
            endpoint: endpoint.unwrap_or_else(|| "https://huggingface.co".into()),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            cache: cache.context("there is no directory to keep models in, set HF_HOME")?,
            offline: yes("HF_HUB_OFFLINE") || yes("TRANSFORMERS_OFFLINE"),
            certificates: path("SSL_CERT_FILE").or_else(|| path("REQUESTS_CA_BUNDLE")),
            pause: Duration::from_millis(500),
            patience: Duration::from_secs(30),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_env(|name| {
            variables.iter().find(|(set, _)| *set == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn the_environment_is_read_as_python_does() {
        let plain = of(&[("HOME", "/nowhere")]).unwrap();
        assert_eq!((plain.endpoint.as_str(), plain.token, plain.offline), ("https://huggingface.co", None, false));
        for (variables, cache) in [
            (&[][..], "/nowhere/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")], "/h/hub"),
            (&[("HF_HOME", "~/h")], "/nowhere/h/hub"),
            (&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c"),
            (&[("HF_HOME", ""), ("HF_HUB_CACHE", "")], "/nowhere/.cache/huggingface/hub"),
        ] {
            let settings = of(&[&[("HOME", "/nowhere")], variables].concat()).unwrap();
            assert_eq!(settings.cache, PathBuf::from(cache), "{variables:?}");
        }
        assert!(of(&[]).err().unwrap().to_string().contains("set HF_HOME"));
        for (value, offline) in [("1", true), ("true", true), ("Yes", true), ("0", false), ("", false), ("no", false)] {
            assert_eq!(of(&[("HOME", "/"), ("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value}");
        }
        assert_eq!(of(&[("HOME", "/"), ("HF_ENDPOINT", "http://h:1//")]).unwrap().endpoint, "http://h:1");
    }

    #[test]
    fn a_token_is_given_or_lies_where_a_login_left_it() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        let token = |more: &[(&str, &str)]| of(&[&[("HF_HOME", home)], more].concat()).unwrap().token;
        assert_eq!(token(&[]), None);
        std::fs::write(dir.path().join("token"), "of-a-login\n").unwrap();
        std::fs::write(dir.path().join("other"), "of-a-path").unwrap();
        let other = dir.path().join("other");
        assert_eq!(token(&[]).as_deref(), Some("of-a-login"));
        assert_eq!(token(&[("HF_TOKEN_PATH", other.to_str().unwrap())]).as_deref(), Some("of-a-path"));
        assert_eq!(token(&[("HF_TOKEN", " given \n")]).as_deref(), Some("given"));
    }
}
