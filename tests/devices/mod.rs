//! Which devices are under test, and how a test says that it does not run.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::Write;

/// Whether `device` is among those that `DECDEC_TEST_DEVICES` (default `cpu`) names; a skipped test if not.
pub(crate) fn is_under_test(device: &str) -> bool {
    let named = named_devices().iter().any(|name| name == device);
    if !named {
        skip(&format!("{device} not in DECDEC_TEST_DEVICES"));
    }
    named
}

/// The devices that `DECDEC_TEST_DEVICES` names.
pub(crate) fn named_devices() -> Vec<String> {
    let names = std::env::var("DECDEC_TEST_DEVICES").unwrap_or_else(|_| "cpu".into());
    names.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
}

/// Says that the test that calls this does not run, or not all of it, and why: to whoever reads its output, and to
/// the file that `DECDEC_SKIPS` names, `PROGRAM TEST: REASON`. libtest knows no skipped tests; `scripts/tally.sh`
/// takes those of the file from the ones that passed.
pub(crate) fn skip(reason: &str) {
    eprintln!("skipped: {reason}");
    let Some(list) = std::env::var_os("DECDEC_SKIPS") else { return };
    let program = std::env::current_exe().expect("a path");
    let program = program.file_stem().expect("a name").to_string_lossy().into_owned();
    // Cargo appends a hash.
    let program = program.rsplit_once('-').map_or(program.as_str(), |(name, _)| name);
    let thread = std::thread::current();
    let line = format!("{program} {}: {reason}\n", thread.name().unwrap_or("?"));
    let list = std::fs::OpenOptions::new().create(true).append(true).open(list);
    // At once, or lines of several threads would mix.
    list.and_then(|mut list| list.write_all(line.as_bytes())).expect("DECDEC_SKIPS names a file that can be written");
}
