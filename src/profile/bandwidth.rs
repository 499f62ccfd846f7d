//! Bandwidths where a backend has no way of its own to measure them.

use anyhow::{Result, ensure};

use crate::backend::GemvBackend;
use crate::backend::record::Bandwidths;

/// Something to time: what queues it, and how many bytes that reads.
pub type Queued<'a> = (&'a mut dyn FnMut() -> Result<()>, usize);

/// Bandwidths as products themselves reach them: bytes of weights per time of the `base` products, bytes of residuals per
/// time that heavy compensation of the same adds. The least of five times each.
///
/// Where compensation adds nothing that can be measured, the host link counts as fast as device memory.
///
/// # Errors
/// What the device says.
pub fn by_products<B: GemvBackend>(
    backend: &B,
    (base, base_bytes): Queued<'_>,
    (compensated, residual_bytes): Queued<'_>,
) -> Result<Bandwidths> {
    let mut best = [f64::INFINITY; 2];
    for _ in 0..5 {
        best[0] = best[0].min(backend.time(base)?.as_secs_f64());
        best[1] = best[1].min(backend.time(compensated)?.as_secs_f64());
    }
    ensure!(best[0] > 0.0, "the clock of {} stands still: base products took no time", backend.device().id);
    let device_memory = base_bytes as f64 / best[0];
    let added = best[1] - best[0];
    let host_link = if added > 0.0 { (residual_bytes as f64 / added).min(device_memory) } else { device_memory };
    Ok(Bandwidths { device_memory, host_link })
}
