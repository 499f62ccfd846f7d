//! Which devices are under test.

/// Whether `device` is among those that `DECDEC_TEST_DEVICES` (default `cpu`) names; says so if not.
pub(crate) fn is_under_test(device: &str) -> bool {
    let named = named_devices().iter().any(|name| name == device);
    if !named {
        eprintln!("skipped: {device} not in DECDEC_TEST_DEVICES");
    }
    named
}

/// The devices that `DECDEC_TEST_DEVICES` names.
pub(crate) fn named_devices() -> Vec<String> {
    let names = std::env::var("DECDEC_TEST_DEVICES").unwrap_or_else(|_| "cpu".into());
    names.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
}
