//! The sweep (spec §4.1): what `n_tb` and the `k_chunk` of every projection cost.
//!
//! Where a device runs layers as one launch, whole tokens are measured, and each projection's `k_chunk` is raised by
//! itself (`tokens`); elsewhere single products, kernel by kernel (`sweep`).
//!
//! - [`grid`]: which configurations are worth a measurement;
//! - [`Recorder`]: what a backend's clock delivers; its times are what a launch adds to a token;
//! - [`under_nsight`]: the same sweep, timed by a real Nsight Systems.
//!
//! Of single products, layers take turns, so that no cache serves the weights, and so do inputs, so that none serves the
//! residuals. The base product is timed anew beside every `n_tb`, so that a clock that drifts moves both.

pub mod grid;

mod bandwidth;
mod nsight;
mod sweep;
mod tokens;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::backend::{DecodeBackend, DeviceInfo, GemvBackend};
use crate::config::Projection;
use crate::dec::Selection;
use crate::nsys::{self, Capture, Identity, Kind, TokenTime, Writer};
use crate::weights::ModelWeights;

pub use crate::backend::record::{Bandwidths, ByClock, Clock, Launch, Recorder};
pub use bandwidth::{Queued, by_products};
pub use nsight::under_nsight;
pub use tokens::every_mix;

use sweep::Sweep;
use tokens::Tokens;

/// What to sweep.
#[derive(Debug, Clone)]
pub struct Options {
    /// What the files are called.
    pub identity: Identity,
    /// Where the weights come from, for the files.
    pub weights: String,
    /// Where the two files go; made if missing.
    pub dir: PathBuf,
    /// Tokens per configuration.
    pub tokens: usize,
    /// Measure again even if there is a profile.
    pub overwrite: bool,
    /// Keep only half as many layers on the device.
    pub halve_layers: bool,
    /// Fewest thread blocks; 4, or the most if that is less.
    pub min_n_tb: Option<usize>,
    /// Most thread blocks; half of what the device holds at once.
    pub max_n_tb: Option<usize>,
    /// Largest `k_chunk`; twice the knee.
    pub max_k_chunk: Option<usize>,
    /// Just these `k_chunk`, ascending, above 0, in place of a range.
    pub k_chunks: Option<Vec<usize>>,
    /// How channels are selected.
    pub selection: Selection,
    /// What is measured; `None` is whole tokens where layers fuse, and single products elsewhere.
    pub kind: Option<Kind>,
    /// Of whole tokens: `k_chunk` is raised no further where a token is slower by this share already.
    pub dearest: f64,
    /// Of whole tokens: these `k_chunk` of qkv, o, gu and d as well, together, at every `n_tb`.
    pub choices: Vec<[usize; 4]>,
}

impl Options {
    /// The usual [`Options::dearest`].
    pub const DEAREST: f64 = 0.6;
}

/// What a sweep left behind.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The trace.
    pub trace: PathBuf,
    /// The kernel times.
    pub sqlite: PathBuf,
    /// What was measured; `None` if there was a profile, which was kept.
    pub measured: Option<Measured>,
}

/// A finished sweep.
#[derive(Debug, Clone)]
pub struct Measured {
    /// How it was taken.
    pub capture: Capture,
    /// Configurations of `n_tb` and `k_chunk`.
    pub configurations: usize,
    /// Of these, the ones that an interrupted sweep had left.
    pub resumed: usize,
    /// Of single products, per projection: values of `n_tb` measured, and values skipped because they change nothing.
    pub n_tbs: Option<[(usize, usize); 4]>,
    /// Of whole tokens: what being ready to compensate costs where it costs least, nothing being selected.
    pub ready: Option<TokenTime>,
    /// How long it took.
    pub elapsed: Duration,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(measured) = &self.measured else {
            writeln!(f, "kept {} (measure again with --overwrite)", self.trace.display())?;
            return writeln!(f, "kept {}", self.sqlite.display());
        };
        let c = &measured.capture;
        let bandwidths = Bandwidths { device_memory: c.device_memory, host_link: c.host_link };
        writeln!(f, "device           : {} ({}), times from {}", c.device_name, c.device, c.clock)?;
        writeln!(f, "device memory    : {:.1} GB/s", c.device_memory / 1e9)?;
        writeln!(f, "host link        : {:.1} GB/s", c.host_link / 1e9)?;
        let (ratio, knee) = (bandwidths.ratio(), bandwidths.knee(c.identity.bits));
        writeln!(f, "R_bw             : {ratio:.1}, estimated knee at k_chunk {knee:.1}")?;
        writeln!(f, "measured         : whole {}", c.kind.name())?;
        let first = c.k_chunks.first().unwrap_or(&0);
        writeln!(f, "k_chunk          : {first} to {}", c.k_chunks.last().unwrap_or(&0))?;
        for (projection, (useful, skipped)) in
            measured.n_tbs.into_iter().flat_map(|n| Projection::ALL.into_iter().zip(n))
        {
            writeln!(f, "n_tb of {projection:<9}: {useful} measured, {skipped} skipped (same partition)")?;
        }
        if let Some(TokenTime { n_tb, token_ns, base_ns, .. }) = measured.ready {
            let (base, slower) = (base_ns as f64 / 1e3, (token_ns as f64 / base_ns as f64 - 1.0) * 100.0);
            let n_tbs = c.n_tbs.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
            writeln!(f, "n_tb             : {n_tbs}")?;
            writeln!(
                f,
                "a token          : {base:.1} us; ready to compensate, nothing selected: {slower:+.2} % at n_tb {n_tb}"
            )?;
        }
        let seconds = measured.elapsed.as_secs_f64();
        write!(f, "configurations   : {} in {seconds:.1} s", measured.configurations)?;
        if measured.resumed > 0 {
            write!(f, ", {} of them from an interrupted sweep", measured.resumed)?;
        }
        writeln!(f, "\nwrote {}", self.trace.display())?;
        writeln!(f, "wrote {}", self.sqlite.display())
    }
}

/// Sweeps `weights` on `backend` and writes the two files, or keeps those that are there.
///
/// # Errors
/// Options out of range, only one of the two files, a model without residuals or without layers of the asked
/// width, what the device or the file system says.
pub fn run<B: DecodeBackend>(
    backend: &B,
    recorder: &mut dyn Recorder<B>,
    weights: &dyn ModelWeights,
    options: &Options,
) -> Result<Outcome> {
    options.identity.validate()?;
    ensure!(options.tokens > 0, "--tokens is 0, at least 1 is needed");
    let (trace, sqlite) = (options.identity.trace(&options.dir), options.identity.sqlite(&options.dir));
    let resumed = if options.overwrite { None } else { Writer::resume(&sqlite)? };
    if !options.overwrite {
        let finished = if sqlite.exists() { nsys::capture(&sqlite)? } else { None };
        let there = [finished.as_ref(), resumed.as_ref().map(Writer::capture)];
        there.into_iter().flatten().try_for_each(|there| ensure_same_device(there, backend.device(), &sqlite))?;
    }
    if !options.overwrite && resumed.is_none() {
        match (trace.exists(), sqlite.exists()) {
            (true, true) => return Ok(Outcome { trace, sqlite, measured: None }),
            (false, false) => {}
            (there, _) => {
                let (a, b) = if there { (&trace, &sqlite) } else { (&sqlite, &trace) };
                anyhow::bail!("{} is there, but not {}: use --overwrite to measure both", a.display(), b.display());
            }
        }
    }
    let started = Instant::now();
    let (min, max) = n_tb_range(backend, options)?;
    // Where layers may fuse, only a token shows whether these do.
    if options.kind != Some(Kind::Products) && (options.kind.is_some() || backend.fuses_layers()) {
        let mut tokens = Tokens::new(backend, recorder, weights, options, grid::token_n_tbs(min, max)?)?;
        if options.kind.is_some() || tokens.fused()? {
            let mut writer = match resumed.filter(|writer| may_resume(writer.capture(), tokens.describe(), options)) {
                Some(writer) => writer,
                None => Writer::create(&sqlite, &tokens.capture()?)?,
            };
            let before = writer.tokens()?.len();
            tokens.run(&mut writer)?;
            let measured = writer.tokens()?;
            let nothing = measured.iter().filter(|token| token.k_chunks == [0; 4]);
            let price = |token: &&TokenTime| token.token_ns as f64 / token.base_ns as f64;
            let measured = Measured {
                capture: writer.capture().clone(),
                configurations: measured.len(),
                resumed: before,
                n_tbs: None,
                ready: nothing.min_by(|a, b| price(a).total_cmp(&price(b))).copied(),
                elapsed: started.elapsed(),
            };
            writer.finish(&trace, &sqlite)?;
            return Ok(Outcome { trace, sqlite, measured: Some(measured) });
        }
    }
    let useful = grid::useful_n_tbs(weights.config(), min, max)?;
    let mut sweep = Sweep::new(backend, recorder, weights, options)?;
    let mut writer = match resumed.filter(|writer| may_resume(writer.capture(), sweep.describe(&useful), options)) {
        Some(writer) => writer,
        None => Writer::create(&sqlite, &sweep.capture(&useful)?)?,
    };
    let before = writer.configurations();
    sweep.run(&mut writer, &useful)?;
    let configurations = writer.configurations() - 1;
    let measured = Measured {
        capture: writer.capture().clone(),
        configurations,
        resumed: before.saturating_sub(1),
        n_tbs: Some(useful.map(|n_tbs| (n_tbs.len(), max - min + 1 - n_tbs.len()))),
        ready: None,
        elapsed: started.elapsed(),
    };
    writer.finish(&trace, &sqlite)?;
    Ok(Outcome { trace, sqlite, measured: Some(measured) })
}

/// Two devices may not take turns with one name: what the first measured would be lost, or taken for the second's.
fn ensure_same_device(there: &Capture, device: &DeviceInfo, sqlite: &Path) -> Result<()> {
    ensure!(
        there.device_name == device.name,
        "{} is of {} ({}), this is {} ({}): choose another prefix or --nsys-dir, or replace it with --overwrite",
        sqlite.display(),
        there.device_name,
        there.device,
        device.name,
        device.id
    );
    Ok(())
}

fn n_tb_range<B: GemvBackend>(backend: &B, options: &Options) -> Result<(usize, usize)> {
    let device = backend.device();
    let max = options.max_n_tb.unwrap_or((device.max_n_tb / 2).max(1));
    ensure!(max <= device.max_n_tb, "--max-n-tb is {max}, at most {} are allowed on {}", device.max_n_tb, device.id);
    Ok((options.min_n_tb.unwrap_or(4.min(max)), max))
}

/// Whether an interrupted sweep was going to measure what is asked for now.
fn may_resume(before: &Capture, now: Capture, options: &Options) -> bool {
    let same_k = match &options.k_chunks {
        Some(k_chunks) => before.k_chunks == *k_chunks,
        None => options.max_k_chunk.is_none_or(|max| match before.kind {
            Kind::Products => before.k_chunks == (1..=max).collect::<Vec<_>>(),
            Kind::Tokens => before.k_chunks.last() == Some(&max),
        }),
    };
    // Bandwidths, and the range that follows from them, stay as the first run measured them.
    let (device_memory, host_link, k_chunks) = (before.device_memory, before.host_link, before.k_chunks.clone());
    let layers_ns = before.layers_ns;
    let same = same_k && *before == Capture { device_memory, host_link, k_chunks, layers_ns, ..now };
    if !same {
        tracing::warn!("an interrupted sweep was taken with other options, it starts over");
    }
    same
}
