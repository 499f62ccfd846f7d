//! Where what can be made again is kept.

use std::env;
use std::path::PathBuf;

/// Where things of this `kind` are kept from run to run: in `DECDEC_CACHE_DIR`, or in `decdec` of the user's cache
/// directory; `None` where the environment names neither.
pub fn cache_directory(kind: &str) -> Option<PathBuf> {
    let path = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = path("DECDEC_CACHE_DIR")
        .or_else(|| path("XDG_CACHE_HOME").map(|p| p.join("decdec")))
        .or_else(|| path("HOME").map(|p| p.join(".cache/decdec")))?;
    Some(base.join(kind))
}
