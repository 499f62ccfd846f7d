//! What this program is, for `--version`.

use std::sync::LazyLock;

/// Features that a program can be built with, and whether this one was.
const FEATURES: [(&str, bool); 3] = [
    ("hub", cfg!(feature = "hub")),
    ("serve", cfg!(feature = "serve")),
    ("reference-wgpu", cfg!(feature = "reference-wgpu")),
];

/// Version, commit, features and platform, a line each. The commit is told by whoever builds, in `DECDEC_COMMIT`.
pub(super) static LONG: LazyLock<String> = LazyLock::new(|| {
    let features: Vec<_> = FEATURES.iter().filter(|(_, built)| *built).map(|(name, _)| *name).collect();
    format!(
        "{}\ncommit: {}\nfeatures: {}\nplatform: {} {}",
        env!("CARGO_PKG_VERSION"),
        option_env!("DECDEC_COMMIT").filter(|commit| !commit.is_empty()).unwrap_or("unknown"),
        if features.is_empty() { "none".to_owned() } else { features.join(", ") },
        std::env::consts::OS,
        std::env::consts::ARCH,
    )
});
