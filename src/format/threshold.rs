//! Thresholds: calibrated boundaries of `|x|` for bucket selection (spec §2.4; DecDEC §5).

use anyhow::{Result, ensure};

/// Checks thresholds as they are read: `[in_features]`, finite, not negative, never increasing.
///
/// # Errors
/// Names the first value that breaks the rule.
pub fn validate(thresholds: &[f32], in_features: usize) -> Result<()> {
    ensure!(thresholds.len() == in_features, "{} thresholds, {in_features} expected", thresholds.len());
    for (r, &t) in thresholds.iter().enumerate() {
        ensure!(t.is_finite() && t >= 0.0, "threshold {r} is {t}, a finite value of at least 0 is expected");
        let before = if r == 0 { f32::INFINITY } else { thresholds[r - 1] };
        ensure!(t <= before, "threshold {r} is {t}, above its predecessor {before}: thresholds never increase");
    }
    Ok(())
}

/// Widens `thresholds` to one more token: entry `r` becomes the maximum of itself and the (r+1)-th largest `|x|`.
///
/// `scratch` is overwritten; all three are `in_features` long.
pub fn update(thresholds: &mut [f32], x: &[f32], scratch: &mut [f32]) {
    for (s, x) in scratch.iter_mut().zip(x) {
        *s = x.abs();
    }
    scratch.sort_unstable_by(|a, b| b.total_cmp(a));
    for (t, s) in thresholds.iter_mut().zip(scratch) {
        *t = t.max(*s);
    }
}
