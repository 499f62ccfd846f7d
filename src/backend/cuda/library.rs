//! NVIDIA's libraries besides the driver, found and opened at run time.

use anyhow::{Result, bail};
use cudarc::driver::sys;

/// A library in the latest version that is installed and that the driver can follow, and those of `parts` that lie
/// beside it: libraries that it opens by name later, from a directory that the loader may not search.
///
/// # Errors
/// Names what was looked for and how to get it.
pub(super) fn open(name: &str, parts: &str, package: &str) -> Result<Vec<libloading::Library>> {
    let named = std::env::var("DECDEC_CUDA_LIBRARIES").ok();
    let usual = [
        "",
        "/usr/local/cuda/lib64",
        "/usr/local/cuda/extras/CUPTI/lib64",
        "/opt/cuda/lib64",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
    ];
    let versions = versions(driver_version());
    // A folder that the user names goes before all others, whatever version is in it.
    let places = named.iter().flat_map(|folder| versions.map(|version| (folder.as_str(), version)));
    let places = places.chain(versions.into_iter().flat_map(|version| usual.map(|folder| (folder, version))));
    for (directory, version) in places {
        let file = std::path::Path::new(directory).join(format!("{name}.so{version}"));
        let mut libraries = beside(directory, parts);
        // SAFETY: NVIDIA's libraries run nothing of consequence when they are opened.
        if let Ok(library) = unsafe { libloading::Library::new(&file) } {
            libraries.insert(0, library);
            return Ok(libraries);
        }
    }
    bail!(
        "cuda: {name}.so of CUDA 12 or 13 not found, install the CUDA toolkit or the Python package {package}, and \
         name its directory in DECDEC_CUDA_LIBRARIES"
    )
}

/// As the driver counts them: 12080 is CUDA 12.8; 0 where there is none.
fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: the library is there; the call writes one integer.
    if unsafe { sys::is_culib_present() } && unsafe { sys::cuDriverGetVersion(&mut version) }.result().is_ok() {
        return version;
    }
    0
}

/// Endings of libraries, the preferred one first. A driver of CUDA 12 cannot load what libraries of CUDA 13 make.
fn versions(driver: i32) -> [&'static str; 3] {
    if (1..13000).contains(&driver) { [".12", "", ".13"] } else { [".13", ".12", ""] }
}

fn beside(directory: &str, parts: &str) -> Vec<libloading::Library> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| !parts.is_empty() && entry.file_name().to_string_lossy().starts_with(parts))
        // SAFETY: as above.
        .filter_map(|entry| unsafe { libloading::Library::new(entry.path()) }.ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_the_way_to_get_it() {
        let error = open("libnowhere", "", "nvidia-nowhere").err().unwrap().to_string();
        for part in ["libnowhere.so", "CUDA 12 or 13", "nvidia-nowhere", "DECDEC_CUDA_LIBRARIES"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn libraries_follow_the_driver() {
        assert_eq!(versions(13000)[0], ".13");
        assert_eq!(versions(12080)[0], ".12");
        assert_eq!(versions(0)[0], ".13");
    }
}
