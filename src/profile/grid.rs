//! What a sweep visits: the knee that bandwidths promise, and the thread blocks that make a difference.

use anyhow::{Result, ensure};

use crate::backend::record::Bandwidths;
use crate::config::{ModelConfig, Projection};
use crate::dec::{CHUNK, DecPlan, Selection};

/// Most values of `k_chunk` that a sweep visits when its range follows from the knee.
const MAX_STEPS: usize = 64;

impl Bandwidths {
    /// `R_bw`, how many times faster device memory is than the host link.
    pub fn ratio(&self) -> f64 {
        self.device_memory / self.host_link
    }

    /// `k*`: the largest `k_chunk` whose residuals cross the host link while `bits`-bit weights are read
    /// (DecDEC §5).
    pub fn knee(&self, bits: u32) -> f64 {
        f64::from(bits) / 4.0 * CHUNK as f64 / self.ratio()
    }
}

/// The values of `k_chunk` that a sweep visits: 1 to `max`, or to twice the knee; without 0, which is the base.
///
/// Where memory and host link are so close that this would be hundreds, every second, third … value is left
/// out, the last one never.
///
/// # Errors
/// `max` outside 1..=1024.
pub fn k_chunks(knee: f64, max: Option<usize>) -> Result<Vec<usize>> {
    if let Some(max) = max {
        ensure!((1..=CHUNK).contains(&max), "--max-k-chunk is {max}, 1 to {CHUNK} are allowed");
    }
    let last = max.unwrap_or((2.0 * knee.ceil()).clamp(1.0, CHUNK as f64) as usize);
    let step = if max.is_some() { 1 } else { last.div_ceil(MAX_STEPS) };
    let mut values: Vec<_> = (step..=last).step_by(step).collect();
    if values.last() != Some(&last) {
        values.push(last);
    }
    Ok(values)
}

/// For each projection, the numbers of thread blocks in `min..=max` that divide its output differently, as
/// [`DecPlan::stripes`] says: the smallest of each kind, ascending. Above as many blocks as there is work for, all are of
/// one kind.
///
/// # Errors
/// An empty range, or one that reaches 0.
pub fn useful_n_tbs(config: &ModelConfig, min: usize, max: usize) -> Result<[Vec<usize>; 4]> {
    ensure!(
        (1..=max).contains(&min),
        "--min-n-tb {min} and --max-n-tb {max}: at least 1 thread block, and no more than the maximum, is needed"
    );
    let mut useful: [Vec<usize>; 4] = Default::default();
    for projection in Projection::ALL {
        let (inputs, outputs) = config.shape(0, projection);
        let thresholds = vec![0.0; inputs];
        let mut before = Vec::new();
        for n_tb in min..=max {
            let plan = DecPlan::new(inputs, outputs, &thresholds, 0, n_tb, Selection::Bucket)?;
            let stripes: Vec<_> = plan.stripes().collect();
            if stripes != before {
                useful[projection.index()].push(n_tb);
                before = stripes;
            }
        }
    }
    Ok(useful)
}
