//! What a sweep visits: the knee that bandwidths promise, and the thread blocks that make a difference.

use anyhow::{Result, ensure};

use crate::backend::record::Bandwidths;
use crate::config::{ModelConfig, Projection};
use crate::dec::{CHUNK, DecPlan, Selection};

/// Most values of `k_chunk` that a sweep visits when its range follows from the knee.
const MAX_STEPS: usize = 64;

/// `k_chunk` that whole tokens are measured up to at least: where residuals stay on the device, the knee that the host
/// link promises is not the end.
const LEAST_RANGE: usize = 32;

/// Values of `n_tb` that are few enough to measure tokens at all of them.
const FEW_N_TBS: usize = 6;

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

/// The values of `k_chunk` that whole tokens are measured at: every one up to 4, from then on two between a power of two
/// and the next, up to `max`, or to twice the knee and at least 32.
///
/// # Errors
/// `max` outside 1..=1024.
pub fn token_k_chunks(knee: f64, max: Option<usize>) -> Result<Vec<usize>> {
    let last = match max {
        Some(max) => *k_chunks(knee, Some(max))?.last().unwrap_or(&max),
        None => (2.0 * knee.ceil()).clamp(LEAST_RANGE as f64, CHUNK as f64) as usize,
    };
    Ok((1..=last).filter(|&k| is_step(k) || k == last).collect())
}

/// The values of `n_tb` that whole tokens are measured at: all of a short range, steps that grow of a long one.
///
/// # Errors
/// An empty range, or one that reaches 0.
pub fn token_n_tbs(min: usize, max: usize) -> Result<Vec<usize>> {
    ensure_range(min, max)?;
    if max - min < FEW_N_TBS {
        return Ok((min..=max).collect());
    }
    Ok((min..=max).filter(|&n_tb| is_step(n_tb) || n_tb == min || n_tb == max).collect())
}

/// 1, 2, 3, 4, 6, 8, 12, 16, …
fn is_step(n: usize) -> bool {
    n.is_power_of_two() || n.is_multiple_of(3) && (n / 3).is_power_of_two()
}

fn ensure_range(min: usize, max: usize) -> Result<()> {
    ensure!(
        (1..=max).contains(&min),
        "--min-n-tb {min} and --max-n-tb {max}: at least 1 thread block, and no more than the maximum, is needed"
    );
    Ok(())
}

/// For each projection, the numbers of thread blocks in `min..=max` that divide its output differently, as
/// [`DecPlan::stripes`] says: the smallest of each kind, ascending. Above as many blocks as there is work for, all are of
/// one kind.
///
/// # Errors
/// An empty range, or one that reaches 0.
pub fn useful_n_tbs(config: &ModelConfig, min: usize, max: usize) -> Result<[Vec<usize>; 4]> {
    ensure_range(min, max)?;
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
