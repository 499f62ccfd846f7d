//! What only the WGSL backend can get wrong: finding its device.
#![cfg(feature = "reference-wgpu")]

mod devices;

use decdec::backend::GemvBackend;
use decdec::backend::wgsl::{Wgpu, adapters};

#[test]
fn lists_what_it_opens() {
    if !devices::is_under_test("wgpu") {
        return;
    }
    let adapters = adapters().unwrap();
    assert_eq!(Wgpu::open(None).unwrap().device(), &adapters[0]);
    for (i, adapter) in adapters.iter().enumerate() {
        assert_eq!(adapter.id, format!("wgpu:{i}"));
        assert_eq!(Wgpu::open(Some(i)).unwrap().device(), adapter);
    }
    let message = Wgpu::open(Some(99)).err().unwrap().to_string();
    assert!(message.contains("wgpu:99") && message.contains(&format!("wgpu:{}", adapters.len() - 1)), "{message}");
}

/// Without a driver the program says what is missing and where to get it, and does not panic.
#[test]
fn says_that_there_is_no_adapter() {
    let mut command = assert_cmd::Command::cargo_bin("decdec").unwrap();
    let nowhere = "/nonexistent/icd.json";
    command.args(["devices", "--json"]).env("VK_DRIVER_FILES", nowhere).env("VK_ICD_FILENAMES", nowhere);
    let output = command.assert().success().get_output().stdout.clone();
    let output = String::from_utf8(output).unwrap();
    assert!(output.contains("no vulkan adapter found, install mesa-vulkan-drivers"), "{output}");
}
