//! libFuzzer's entry: runs the target that `DECDEC_FUZZ_TARGET` names, and dies of what it finds.
#![no_main]

mod allocation;
#[path = "../pt/mod.rs"]
#[allow(dead_code, reason = "the tests of the reader use the rest")]
mod pt;
mod targets;

use std::sync::LazyLock;

use allocation::{CAP, Counting, peak};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static TARGET: LazyLock<targets::Target> = LazyLock::new(|| {
    let name = std::env::var("DECDEC_FUZZ_TARGET").expect("DECDEC_FUZZ_TARGET names a target");
    targets::find(&name).unwrap_or_else(|| panic!("{name} is no target"))
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let run = TARGET.run;
    let peak = peak(|| _ = run(data));
    assert!(peak <= CAP, "{peak} bytes were held, {CAP} are allowed");
});
