//! Dynamic error compensation: which channels to compensate for a token, and the plan that says how.
//!
//! Pure arithmetic (spec §3.1; DecDEC §4 and §5). Every backend computes the same selection from the same
//! plan: a list of channels, ascending, bit for bit what [`DecPlan::select`] returns.

use std::ops::Range;

use anyhow::{Result, ensure};

use crate::format::threshold;

/// Channels of a chunk; the last one of a matrix may be shorter.
pub const CHUNK: usize = 1024;

/// Channels that are looked at together for one to take.
const RUN: usize = 32;

/// Intervals of `|x|` that bucket selection tells apart.
pub const BUCKETS: usize = 32;

/// How salient channels are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// The paper's: by calibrated buckets of `|x|`, lowest channel first inside the last one.
    #[default]
    Bucket,
    /// The largest `|x|` of each chunk, lowest channel first among equals.
    Exact,
}

/// Channels taken of `in_features` where `k_chunk` are taken of each full chunk, and as large a share of the last one.
pub(crate) fn selected(in_features: usize, k_chunk: usize) -> usize {
    in_features / CHUNK * k_chunk + in_features % CHUNK * k_chunk / CHUNK
}

/// A validated way to compensate one matrix: what is selected, and over how many thread blocks it is spread.
#[derive(Debug, Clone, PartialEq)]
pub struct DecPlan {
    in_features: usize,
    out_features: usize,
    k_chunk: usize,
    n_tb: usize,
    selection: Selection,
    edges: [f32; BUCKETS],
}

impl DecPlan {
    /// Plans `k_chunk` channels of each chunk of 1024, spread over `n_tb` thread blocks.
    ///
    /// # Errors
    /// No input channels, output rows that are no multiple of 8, `k_chunk` above 1024, `n_tb` of 0, thresholds that are
    /// not `in_features` non-increasing numbers.
    pub fn new(
        in_features: usize,
        out_features: usize,
        thresholds: &[f32],
        k_chunk: usize,
        n_tb: usize,
        selection: Selection,
    ) -> Result<Self> {
        ensure!(
            in_features > 0 && out_features > 0 && out_features.is_multiple_of(8),
            "a matrix of {out_features} x {in_features}, rows in eights and at least one channel are needed to compensate"
        );
        ensure!(k_chunk <= CHUNK, "k_chunk is {k_chunk}, 0 to {CHUNK} are allowed");
        ensure!(
            n_tb > 0,
            "n_tb is 0, at least 1 thread block is needed to compensate; to switch compensation off use k_chunk 0"
        );
        threshold::validate(thresholds, in_features)?;
        let edges = bucket_edges(thresholds, k_chunk * in_features / CHUNK);
        Ok(Self { in_features, out_features, k_chunk, n_tb, selection, edges })
    }

    /// Input channels of the matrix.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Output rows of the matrix.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Channels taken from each full chunk.
    pub fn k_chunk(&self) -> usize {
        self.k_chunk
    }

    /// Thread blocks that compensate; fewer do where there are not rows for all of them.
    pub fn n_tb(&self) -> usize {
        self.n_tb
    }

    /// How channels are found.
    pub fn selection(&self) -> Selection {
        self.selection
    }

    /// Lower edges of the buckets, non-increasing; the last is 0.
    pub fn edges(&self) -> &[f32; BUCKETS] {
        &self.edges
    }

    /// Each chunk's channels and how many of them are taken.
    pub fn chunks(&self) -> impl Iterator<Item = (Range<usize>, usize)> + '_ {
        (0..self.in_features).step_by(CHUNK).map(|start| {
            let end = (start + CHUNK).min(self.in_features);
            (start..end, self.k_chunk * (end - start) / CHUNK)
        })
    }

    /// Channels taken in all, the same for every token.
    pub fn selected(&self) -> usize {
        selected(self.in_features, self.k_chunk)
    }

    /// The output words (eight rows each) of every compensating thread block that has any: how every device divides the
    /// rows, so that a sweep knows which `n_tb` differ.
    ///
    /// Blocks get whole lines of 32 words (128 bytes, as the host link carries them), as evenly as that goes; where there
    /// are fewer lines than blocks, halves of lines and so on, down to pairs of words, or single ones where those are odd.
    pub fn stripes(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (words, line, n_tb) = (self.out_features / 8, self.line(), self.n_tb);
        let lines = words.div_ceil(line);
        let bound = move |block: usize| (lines * block / n_tb * line).min(words);
        (0..n_tb).map(move |block| bound(block)..bound(block + 1)).filter(|stripe| !stripe.is_empty())
    }

    /// Words that stay together when rows are divided.
    pub fn line(&self) -> usize {
        let words = self.out_features / 8;
        let least = if words.is_multiple_of(2) { 2 } else { 1 };
        let mut line = 32;
        while line > least && words < line * self.n_tb {
            line /= 2;
        }
        line
    }

    /// The salient channels of `x`, ascending, written over `out`. A caller's instructions make vectors of its loops.
    #[inline(always)]
    pub fn select(&self, x: &[f32], out: &mut Vec<u32>) {
        out.clear();
        for (channels, k) in self.chunks().filter(|&(_, k)| k > 0) {
            let (start, x) = (channels.start, &x[channels]);
            match self.selection {
                Selection::Exact => {
                    let least = largest(x, k);
                    take(x, k, start, out, |x| magnitude(x) >= least, |x| magnitude(x) > least);
                }
                Selection::Bucket => match self.last_bucket(x, k) {
                    0 => take(x, k, start, out, |x| reaches(self.edges[0], x), |_| false),
                    last => {
                        let (edge, above) = (self.edges[last], self.edges[last - 1]);
                        take(x, k, start, out, |x| reaches(edge, x), |x| reaches(above, x));
                    }
                },
            }
        }
    }

    /// The first bucket, counted from the topmost, with which there are `k` channels.
    #[inline(always)]
    fn last_bucket(&self, x: &[f32], k: usize) -> usize {
        // Edges do not increase, so that counts do not decrease; the last edge is 0, which every channel reaches.
        let (mut low, mut high) = (0, BUCKETS - 1);
        while low < high {
            let middle = (low + high) / 2;
            if count(x, |x| reaches(self.edges[middle], x)) >= k {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        low
    }
}

/// Whether a channel is in the bucket of this lower edge or in one above; NaN is in the topmost.
#[inline(always)]
#[allow(clippy::neg_cmp_op_on_partial_ord, reason = "NaN reaches every edge")]
fn reaches(edge: f32, x: f32) -> bool {
    !(edge > x.abs())
}

/// The bits of `|x|`. As bits, NaN > ∞ > every finite magnitude, so neither is ever passed over.
#[inline(always)]
fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// How many are so.
#[inline(always)]
fn count(x: &[f32], is: impl Fn(f32) -> bool) -> usize {
    x.iter().map(|&x| u32::from(is(x))).sum::<u32>() as usize
}

/// The `k`-th largest magnitude.
fn largest(x: &[f32], k: usize) -> u32 {
    let mut sorted = [0u32; CHUNK];
    let sorted = &mut sorted[..x.len()];
    sorted.iter_mut().zip(x).for_each(|(sorted, x)| *sorted = magnitude(*x));
    *sorted.select_nth_unstable_by(k - 1, |a, b| b.cmp(a)).1
}

/// Appends the indices (plus `start`) of the `k` channels that are taken: those `above`, and of the others that suffice the
/// lowest; ascending.
#[inline(always)]
fn take(
    x: &[f32],
    k: usize,
    start: usize,
    out: &mut Vec<u32>,
    suffices: impl Fn(f32) -> bool,
    above: impl Fn(f32) -> bool,
) {
    let mut ties = k - count(x, &above);
    for (run, x) in x.chunks(RUN).enumerate() {
        // Few runs have one to take, and that none has is seen at once.
        if !x.iter().fold(false, |any, &x| any | suffices(x)) {
            continue;
        }
        for (i, &x) in x.iter().enumerate() {
            if above(x) || ties > 0 && suffices(x) {
                ties -= usize::from(!above(x));
                out.push((start + RUN * run + i) as u32);
            }
        }
    }
}

/// The 32 lower edges for `k` channels in all (spec §3.1): 16 between the largest threshold and the one that
/// `k` channels reached, 16 from there to zero; in f32, made non-increasing.
fn bucket_edges(thresholds: &[f32], k: usize) -> [f32; BUCKETS] {
    let a = thresholds[0];
    let b = thresholds[k.max(1) - 1];
    let mut edges = [0.0; BUCKETS];
    let mut below = f32::INFINITY;
    for (i, edge) in edges.iter_mut().enumerate() {
        let value = if i < 16 { a + (b - a) * i as f32 / 15.0 } else { b * (31 - i) as f32 / 16.0 };
        below = below.min(value);
        *edge = below;
    }
    edges
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever `n_tb`, every row is in one stripe, and no stripe is empty.
    #[test]
    fn no_stripe_is_without_rows() {
        for out_features in [8, 24, 32, 40, 64, 576, 1000, 4096] {
            for n_tb in [1, 2, 3, 5, 18, 31, 66, 128, 132, 1000] {
                let plan = DecPlan::new(64, out_features, &[1.0; 64], 8, n_tb, Selection::Bucket).unwrap();
                let what = format!("{out_features} rows, n_tb {n_tb}");
                let stripes: Vec<_> = plan.stripes().collect();
                assert!(stripes.len() <= n_tb && stripes.iter().all(|s| !s.is_empty()), "{what}: {stripes:?}");
                assert_eq!(
                    stripes.into_iter().flatten().collect::<Vec<_>>(),
                    (0..out_features / 8).collect::<Vec<_>>()
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_compensated_is_refused() {
        for (inputs, outputs, k_chunk, n_tb, message) in [
            (64, 0, 8, 2, "0 x 64"),
            (64, 12, 8, 2, "12 x 64"),
            (0, 8, 8, 2, "8 x 0"),
            (64, 8, 1025, 2, "k_chunk is 1025"),
            (64, 8, 8, 0, "n_tb is 0"),
        ] {
            let error =
                DecPlan::new(inputs, outputs, &vec![1.0; inputs], k_chunk, n_tb, Selection::Bucket).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }
}
