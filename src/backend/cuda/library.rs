//! NVIDIA's libraries besides the driver, found and opened at run time.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use cudarc::driver::sys;

/// Where the CUDA toolkit and distributions put libraries; the empty one stands for wherever the loader looks.
const USUAL: [&str; 6] = [
    "",
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/extras/CUPTI/lib64",
    "/opt/cuda/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
];

/// A library in the latest version that is installed and that the driver can follow, and those of `parts` that lie
/// beside it: libraries that it opens by name later, from a directory that the loader may not search.
///
/// # Errors
/// Names what was looked for and how to get it.
pub(super) fn open(name: &str, parts: &str, package: &str) -> Result<Vec<libloading::Library>> {
    let named = std::env::var("DECDEC_CUDA_LIBRARIES").ok();
    let mut usual = USUAL.map(PathBuf::from).to_vec();
    // Those that pip installed with this program are meant for it.
    usual.splice(0..0, std::env::current_exe().map(|program| of_python(&program)).unwrap_or_default());
    let versions = versions(driver_version());
    // A folder that the user names goes before all others, whatever version is in it.
    let places = named.iter().flat_map(|folder| versions.map(|version| (Path::new(folder), version)));
    let each = |version| usual.iter().map(move |folder| (folder.as_path(), version));
    let places = places.chain(versions.into_iter().flat_map(each));
    for (directory, version) in places {
        let file = directory.join(format!("{name}.so{version}"));
        let mut libraries = beside(directory, parts);
        // SAFETY: NVIDIA's libraries run nothing of consequence when they are opened.
        if let Ok(library) = unsafe { libloading::Library::new(&file) } {
            libraries.insert(0, library);
            return Ok(libraries);
        }
    }
    bail!(
        "cuda: {name}.so of CUDA 12 or 13 not found, install the CUDA toolkit or the Python package {package} (where pip \
         has installed decdec, decdec[cuda] brings it), or name its directory in DECDEC_CUDA_LIBRARIES"
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

/// The directories of NVIDIA's Python packages in the environment that a program was installed into: beside `bin`,
/// `lib/python3.N/site-packages/nvidia/*/lib`.
fn of_python(program: &Path) -> Vec<PathBuf> {
    let list = |directory: PathBuf| {
        let mut found: Vec<PathBuf> =
            std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        found.sort();
        found
    };
    let Some(root) = program.parent().and_then(Path::parent) else { return Vec::new() };
    let is_python = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"));
    let packages = list(root.join("lib")).into_iter().filter(is_python);
    let packages = packages.flat_map(|python| ["site-packages", "dist-packages"].map(|name| python.join(name)));
    let libraries = packages.flat_map(|packages| list(packages.join("nvidia"))).map(|package| package.join("lib"));
    libraries.filter(|directory| directory.is_dir()).collect()
}

fn beside(directory: &Path, parts: &str) -> Vec<libloading::Library> {
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
    fn libraries_of_the_environment_of_a_program_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let packages = dir.path().join("lib/python3.11/site-packages/nvidia");
        let wanted = ["cu13", "cuda_nvrtc"].map(|name| packages.join(name).join("lib"));
        for directory in
            wanted.iter().chain([&packages.join("no_libraries"), &dir.path().join("lib/other/nvidia/x/lib")])
        {
            std::fs::create_dir_all(directory).unwrap();
        }
        assert_eq!(of_python(&dir.path().join("bin/decdec")), wanted);
        assert!(of_python(Path::new("decdec")).is_empty() && of_python(Path::new("/")).is_empty());
    }

    #[test]
    fn libraries_follow_the_driver() {
        assert_eq!(versions(13000)[0], ".13");
        assert_eq!(versions(12080)[0], ".12");
        assert_eq!(versions(0)[0], ".13");
    }
}
