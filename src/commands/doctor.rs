//! `decdec doctor`

use anyhow::Result;
use decdec::backend::cuda::doctor::{self, Device, Report};
use decdec::host;
use serde_json::{Value, json};

use crate::cli::JsonArg;
use crate::output;

/// Prints what this machine can do. What is missing is a finding, not a failure.
pub(crate) fn run(args: &JsonArg) -> Result<()> {
    let (host, cuda, vulkan) = (Host::look(), doctor::examine(), decdec::device::vulkan());
    if args.json {
        let vulkan =
            found(&vulkan, |devices| devices.iter().map(|d| json!({"device": d.id, "name": d.name})).collect());
        let all = json!({
            "version": env!("CARGO_PKG_VERSION"), "cpu": host.cpu(), "memory": host.memory(), "cuda": in_json(&cuda),
            "vulkan": vulkan,
        });
        return output::line(serde_json::to_string_pretty(&all)?);
    }
    let mut lines = vec![
        ("cpu".to_owned(), format!("{}, {} cores, {}", host.name, host.cores, host.simd.join(" "))),
        ("memory".into(), host.memory_in_words()),
        ("pinned memory".into(), host.locked_in_words()),
    ];
    let driver = cuda.driver.as_ref().map(|version| match &cuda.driver_release {
        Ok(release) => format!("{release}, for CUDA up to {version}"),
        Err(_) => format!("for CUDA up to {version}"),
    });
    lines.push(("NVIDIA driver".into(), in_words(&driver)));
    for (name, version) in [("NVRTC", &cuda.nvrtc), ("cuBLAS", &cuda.cublas), ("CUPTI", &cuda.cupti)] {
        lines.push((name.into(), in_words(&version.as_ref())));
    }
    let cache = cuda.kernel_cache.as_ref().map_or("nowhere".into(), |path| path.display().to_string());
    lines.push(("compiled kernels".into(), format!("kept in {cache}")));
    for (i, device) in cuda.devices.iter().enumerate() {
        match device {
            Ok(device) => {
                lines.extend(device_in_words(device).map(|(what, finding)| (format!("cuda:{i}{what}"), finding)));
            }
            Err(error) => lines.push((format!("cuda:{i}"), format!("not usable: {error:#}"))),
        }
    }
    let vulkan = vulkan.as_ref().map(|devices| {
        let names: Vec<_> = devices.iter().map(|d| format!("{} {}", d.id, d.name)).collect();
        names.join(", ")
    });
    lines.push(("Vulkan".into(), in_words(&vulkan)));
    lines.iter().try_for_each(|(what, finding)| output::line(format_args!("{what:<18} {finding}")))?;
    output::line(format_args!("hint: {}", next(&cuda)))
}

/// What to do next.
fn next(cuda: &Report) -> String {
    const TRY: &str = "decdec run HuggingFaceTB/SmolLM2-135M-Instruct tries one of 135 million weights";
    let Some(card) = cuda.devices.iter().position(Result::is_ok) else {
        return match cuda.devices.first() {
            Some(_) => format!("no GPU is usable for the reasons above; models run on the CPU: {TRY}"),
            None => format!("models run on the CPU: {TRY}"),
        };
    };
    let missing: Vec<_> = [("NVRTC", &cuda.nvrtc), ("cuBLAS, to quantize", &cuda.cublas)]
        .into_iter()
        .filter_map(|(name, found)| found.is_err().then_some(name))
        .collect();
    if missing.is_empty() {
        return format!("models run on cuda:{card}: {TRY}");
    }
    format!(
        "cuda:{card} lacks {}: install decdec[cuda] where pip has installed decdec, or the CUDA toolkit, and ask decdec \
         doctor again",
        missing.join(" and ")
    )
}

/// A finding, or what is missing and how to get it.
fn in_words<T: std::fmt::Display>(finding: &Result<T, &anyhow::Error>) -> String {
    match finding {
        Ok(finding) => finding.to_string(),
        Err(error) => format!("not here: {error:#}"),
    }
}

/// `{"found": …}` or `{"missing": "why, and the way out"}`
fn found<T>(finding: &Result<T>, value: impl FnOnce(&T) -> Value) -> Value {
    match finding {
        Ok(finding) => json!({ "found": value(finding) }),
        Err(error) => json!({ "missing": format!("{error:#}") }),
    }
}

fn in_json(cuda: &Report) -> Value {
    let text = |finding: &Result<String>| found(finding, |text| json!(text));
    let rate = |finding: &Result<f64>| found(finding, |rate| json!(rate.round()));
    let device = |device: &Device| {
        let link = found(&device.link, |link| {
            json!({
                "generation": link.generation.0, "max_generation": link.generation.1,
                "width": link.width.0, "max_width": link.width.1,
            })
        });
        json!({
            "name": device.name, "compute_capability": format!("{}.{}", device.capability.0, device.capability.1),
            "multiprocessors": device.multiprocessors, "free_bytes": device.memory.0, "total_bytes": device.memory.1,
            "memory_bytes_per_second": rate(&device.memory_bandwidth),
            "host_link_bytes_per_second": rate(&device.host_bandwidth), "pcie": link,
        })
    };
    json!({
        "driver": text(&cuda.driver), "driver_release": text(&cuda.driver_release), "nvrtc": text(&cuda.nvrtc),
        "cublas": text(&cuda.cublas), "cupti": text(&cuda.cupti), "kernel_cache": cuda.kernel_cache,
        "devices": cuda.devices.iter().map(|found_device| found(found_device, device)).collect::<Vec<_>>(),
    })
}

fn device_in_words(device: &Device) -> [(&'static str, String); 3] {
    let gigabytes = |bytes: usize| bytes as f64 / 1e9;
    let rate = |rate: &Result<f64>| match rate {
        Ok(rate) => format!("{:.1} GB/s measured", rate / 1e9),
        Err(error) => format!("not measured: {error:#}"),
    };
    let link = match &device.link {
        Ok(link) => format!(
            "PCIe generation {} x{} (at most {} x{})",
            link.generation.0, link.width.0, link.generation.1, link.width.1
        ),
        Err(error) => format!("PCIe unknown: {error:#}"),
    };
    [
        (
            "",
            format!(
                "{}, compute capability {}.{}, {} multiprocessors",
                device.name, device.capability.0, device.capability.1, device.multiprocessors
            ),
        ),
        (
            " memory",
            format!(
                "{:.1} of {:.1} GB free, {}",
                gigabytes(device.memory.0),
                gigabytes(device.memory.1),
                rate(&device.memory_bandwidth)
            ),
        ),
        (" host link", format!("{link}, {}", rate(&device.host_bandwidth))),
    ]
}

/// The machine without its GPUs, as far as the system tells.
struct Host {
    name: String,
    cores: usize,
    simd: Vec<&'static str>,
    total: Option<u64>,
    available: Option<u64>,
    /// Bytes that this process may lock: soft and hard limit, `None` without one.
    locked: Option<[Option<u64>; 2]>,
}

impl Host {
    fn look() -> Self {
        let locked = host::line("/proc/self/limits", "Max locked memory").map(|limits| {
            let mut limits = limits.split_whitespace().map(|limit| limit.parse().ok());
            [limits.next().flatten(), limits.next().flatten()]
        });
        Self {
            name: host::line("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            simd: simd(),
            total: host::total_memory(),
            available: host::available_memory(),
            locked,
        }
    }

    fn cpu(&self) -> Value {
        json!({"name": self.name, "cores": self.cores, "simd": self.simd})
    }

    fn memory(&self) -> Value {
        let limit = |i: usize| self.locked.map(|limits| limits[i].map_or(json!("unlimited"), |bytes| json!(bytes)));
        json!({
            "total_bytes": self.total, "available_bytes": self.available, "locked_limit_bytes": limit(0),
            "locked_hard_limit_bytes": limit(1),
        })
    }

    fn memory_in_words(&self) -> String {
        match (self.total, self.available) {
            (Some(total), Some(available)) => {
                format!("{:.1} GB, {:.1} of them available", total as f64 / 1e9, available as f64 / 1e9)
            }
            _ => "the system does not tell".into(),
        }
    }

    fn locked_in_words(&self) -> String {
        let Some(limits) = self.locked else { return "the system does not tell how much may be locked".into() };
        let [soft, hard] = limits.map(|limit| match limit {
            Some(bytes) => format!("{:.1} MB", bytes as f64 / 1e6),
            None => "unlimited".into(),
        });
        format!("ulimit -l {soft}, at most {hard}; residuals wait there, raise it where pinning fails")
    }
}

/// Vector instructions that the CPU's products can use.
fn simd() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let all = [
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
    ];
    #[cfg(target_arch = "aarch64")]
    let all = [("neon", std::arch::is_aarch64_feature_detected!("neon"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let all: [(&str, bool); 0] = [];
    all.into_iter().filter(|(_, here)| *here).map(|(name, _)| name).collect()
}
