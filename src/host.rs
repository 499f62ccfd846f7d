//! How much memory this machine has, and how much of it this process may take. What the system does not tell is
//! `None`: then nothing is refused for its sake.

use anyhow::{Result, ensure};

/// Bytes of memory.
pub fn total_memory() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemTotal:")
}

/// Bytes of memory that nothing needs at the moment.
pub fn available_memory() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemAvailable:")
}

/// Bytes of memory that this process has had at once, at most.
pub fn peak_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// Bytes that this process can have at once whatever happens: memory and swap space, or less where it is limited by
/// itself (`ulimit -v`) or together with others (a container).
pub fn most_memory() -> Option<u64> {
    let swap = kilobytes("/proc/meminfo", "SwapTotal:").unwrap_or(0);
    let addresses = field("/proc/self/limits", "Max address space").and_then(|limit| limit.parse().ok());
    let container = read("/sys/fs/cgroup/memory.max").and_then(|limit| limit.trim().parse().ok());
    let machine = total_memory().map(|total| total.saturating_add(swap));
    [machine, addresses, container].into_iter().flatten().min()
}

/// Refuses what cannot be: an allocation that fails ends the process.
///
/// # Errors
/// `what` takes more `bytes` than [`most_memory`]; `instead` is the way out.
pub fn ensure_memory(bytes: u64, what: &str, instead: &str) -> Result<()> {
    let Some(most) = most_memory() else { return Ok(()) };
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    ensure!(
        bytes <= most,
        "{what} would take {:.1} GB of memory, there are {:.1} GB: {instead}",
        gigabytes(bytes),
        gigabytes(most)
    );
    Ok(())
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// What follows `name` at the beginning of a line of the file, a colon and white space aside.
///
/// A file or line that is not there is none.
pub fn line(path: &str, name: &str) -> Option<String> {
    let text = read(path)?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(rest.trim_start_matches([':', ' ', '\t']).trim().to_owned())
}

/// The first word of that.
fn field(path: &str, name: &str) -> Option<String> {
    line(path, name)?.split_whitespace().next().map(str::to_owned)
}

fn kilobytes(path: &str, name: &str) -> Option<u64> {
    field(path, name)?.parse::<u64>().ok().map(|kilobytes| kilobytes.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(ensure_memory(1 << 20, "a little", "take it").is_ok());
        if let Some(most) = most_memory() {
            let error = ensure_memory(most + 1, "all and more", "take less").unwrap_err().to_string();
            assert!(error.starts_with("all and more would take ") && error.ends_with("take less"), "{error}");
            assert!(ensure_memory(most, "all", "take less").is_ok());
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_has_less_than_the_machine() {
        let (total, available, peak) = (total_memory(), available_memory(), peak_memory());
        assert!(peak > Some(1 << 20) && peak < total && available < total, "{total:?} {available:?} {peak:?}");
    }
}
