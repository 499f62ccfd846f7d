//! From a profile to `n_tb` and `k_chunk` (spec §4.2): read, search, report.
//!
//! - [`search`]: the two phases and the true optimum, pure;
//! - `weighted`: the best choice where whole tokens were measured, or channels are not worth the same everywhere;
//! - [`Table`]: medians of a profile's kernel times;
//! - [`Outcome`]: its `Display` is the report, [`Outcome::write`] leaves CSV, plots and the tuned files;
//! - [`verify`]: real tokens at the chosen values, and another search where they are too slow;
//! - [`Tuned`]: the file that `generate --tuned` takes, and where it is read.

pub mod search;

mod plot;
mod report;
mod table;
mod verify;
mod weighted;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::config::Projection;
use crate::files;
use crate::nsys::{self, Capture, Identity, Kind, Profile};
use crate::tuned::{self, Device, Tuned};

use search::{Choice, Found, Timings};

pub use table::{Sample, Table};
pub use verify::{Measure, Verification, Verified, search_until_within, settle, verify};

/// What to tune.
#[derive(Debug, Clone)]
pub struct Options {
    /// What the profile is called.
    pub identity: Identity,
    /// Where the profile lies.
    pub dir: PathBuf,
    /// `(in_features, out_features)` of qkv, o, gu and d; filled in from the profile where absent.
    pub shapes: [Option<(usize, usize)>; 4],
    /// Slowdowns to aim for, per cent.
    pub targets: Vec<f64>,
    /// Also find the true optimum; of whole tokens, the best choice that was measured as it is.
    pub exhaustive: bool,
    /// What the search makes the most of.
    pub objective: Objective,
}

/// What the search makes the most of.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Objective {
    /// Channels: of single products Σ `k_chunk` as the reference does, of whole tokens Σ `k_chunk` · bytes.
    #[default]
    Channels,
    /// What compensation gives back of the Kullback-Leibler divergence from the source: nats for each unit of `k_chunk`
    /// of qkv, o, gu and d, as [`KlWeights`](crate::tuned::KlWeights) has them.
    Divergence([f64; 4]),
}

impl Objective {
    /// `k` or `kl`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Channels => "k",
            Self::Divergence(_) => "kl",
        }
    }

    /// What a unit of each module's `k_chunk` is worth; `None` where the two phases of spec §4.2 decide.
    fn weights(self, timings: &Timings) -> Option<[f64; 4]> {
        match self {
            Self::Divergence(weights) => Some(weights),
            Self::Channels if timings.token.is_none() => None,
            // Bytes for each channel of a chunk, and chunks.
            Self::Channels => Some(timings.modules.each_ref().map(|m| m.shape.0 as f64 * m.shape.1 as f64)),
        }
    }
}

/// Where results go; directories are made if missing.
#[derive(Debug, Clone)]
pub struct Directories {
    /// For `….csv`.
    pub csv: PathBuf,
    /// For `…_MODULE.png` and `…_overview.png`.
    pub plots: PathBuf,
    /// For `…_TARGET.json`.
    pub tuned: PathBuf,
}

/// The result for one target.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuning {
    /// Slowdown asked for, per cent.
    pub target: f64,
    /// What the two phases found.
    pub found: Found,
    /// The true optimum, if asked for.
    pub exhaustive: Option<Choice>,
    /// What real tokens took, if they were measured.
    pub verified: Option<Verified>,
}

/// The result for all targets.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What the profile is of.
    pub identity: Identity,
    /// What the search made the most of.
    pub objective: Objective,
    /// How it was taken, if we took it.
    pub capture: Option<Capture>,
    /// The card's name, if the profile tells.
    pub device_name: Option<String>,
    /// `(in_features, out_features)` of the four projections.
    pub shapes: [(usize, usize); 4],
    /// Medians.
    pub table: Table,
    /// The same, smoothed.
    pub timings: Timings,
    /// One entry per target, as asked.
    pub tunings: Vec<Tuning>,
    /// What the reader of the report should know.
    pub notices: Vec<String>,
}

/// Reads the profile and searches for every target.
///
/// # Errors
/// A target below 0, shapes that are nowhere to be found or not those of the profile, and what
/// [`nsys::read`] refuses.
pub fn run(options: &Options) -> Result<Outcome> {
    options.identity.validate()?;
    ensure!(!options.targets.is_empty(), "no target: give --target-slowdown in per cent, such as 2.5");
    for &target in &options.targets {
        ensure!(target.is_finite() && target >= 0.0, "--target-slowdown is {target} %, at least 0 is allowed");
    }
    let identity = &options.identity;
    let profile = nsys::read(&identity.trace(&options.dir), &identity.sqlite(&options.dir), identity)?;
    let shapes = shapes(&options.shapes, profile.capture.as_ref())?;
    let table = Table::new(&profile)?;
    let timings = timings(&table, &profile, shapes)?;
    let weights = options.objective.weights(&timings);
    let base = timings.base_us();
    let tunings: Vec<_> = options
        .targets
        .iter()
        .map(|&target| {
            let budget = base * (1.0 + target / 100.0);
            let exhaustive = options.exhaustive.then(|| timings.optimum(budget, weights));
            let found = match weights {
                Some(weights) => timings.search_weighted(&|_| budget, weights),
                None => timings.search(budget),
            };
            Tuning { target, found, exhaustive, verified: None }
        })
        .collect();
    Ok(Outcome {
        identity: identity.clone(),
        objective: options.objective,
        capture: profile.capture,
        device_name: profile.device_name,
        shapes,
        notices: notices(&timings, &tunings),
        table,
        timings,
        tunings,
    })
}

/// What the search works on, whatever the profile is of.
///
/// # Errors
/// A profile of whole tokens that has none.
pub fn timings(table: &Table, profile: &Profile, shapes: [(usize, usize); 4]) -> Result<Timings> {
    match &profile.capture {
        Some(capture) if capture.kind == Kind::Tokens => {
            table.token_timings(shapes, &profile.tokens, (capture.layers, capture.layers_ns))
        }
        _ => Ok(table.timings(shapes)),
    }
}

/// The projections' shapes: given, or the profile's; never two different ones.
fn shapes(given: &[Option<(usize, usize)>; 4], capture: Option<&Capture>) -> Result<[(usize, usize); 4]> {
    let mut shapes = [(0, 0); 4];
    for projection in Projection::ALL {
        let i = projection.index();
        let profiled = capture.map(|c| c.shapes[i]);
        let shape = given[i].or(profiled).with_context(|| {
            format!("the profile does not say how large {projection} is: give --{projection} IN OUT, or a --model-name that is known")
        })?;
        if let Some(profiled) = profiled.filter(|&profiled| profiled != shape) {
            anyhow::bail!(
                "{projection} is {} x {}, but the profile is of {} x {}: it belongs to another model",
                shape.0,
                shape.1,
                profiled.0,
                profiled.1
            );
        }
        ensure!(shape.0 > 0 && shape.1 > 0, "--{projection} is {} {}, sizes above 0 are expected", shape.0, shape.1);
        shapes[i] = shape;
    }
    Ok(shapes)
}

/// What the search had to leave out, and where it ended at the edge of what was measured.
fn notices(timings: &Timings, tunings: &[Tuning]) -> Vec<String> {
    let mut notices = Vec::new();
    if let Some(token) = &timings.token {
        notices.push(format!(
            "whole tokens were measured: a layer's time is its part of a token but {:.2} us before and after all layers, \
             the slowdown is the token's",
            token.outside_us
        ));
        let least = token.measured.iter().min_by(|a, b| a.2.total_cmp(&b.2));
        if let Some((n_tb, k_chunks, us)) = least {
            let slower = (us / timings.base_us() - 1.0) * 100.0;
            notices.push(format!(
                "the least price of any compensation that was measured: {slower:+.2} % for k_chunk {k_chunks:?} at n_tb {n_tb}"
            ));
        }
    }
    for (projection, module) in Projection::ALL.into_iter().zip(&timings.modules) {
        if module.curves.is_empty() {
            notices.push(format!("{projection} was never measured with compensation, it stays without"));
        }
    }
    for Tuning { target, found, .. } in tunings {
        let target = report::per_cent(*target);
        if found.excluded.len() == 4 {
            notices.push(format!("at {target} % no common k_chunk fits, not even in the largest module alone"));
        } else if !found.excluded.is_empty() {
            let names: Vec<_> = found.excluded.iter().map(|p| p.name()).collect();
            notices.push(format!("at {target} % the common k_chunk fits only without {}", names.join(", ")));
        }
        if found.uneven {
            notices.push(format!("at {target} % a smaller common k_chunk leaves room for a larger sum, and is taken"));
        }
        for projection in &found.clamped {
            let k = found.fine.modules[projection.index()].k_chunk;
            let more = (2 * k).min(crate::dec::CHUNK);
            notices.push(format!(
                "at {target} % {projection} ends at k_chunk {k}, the largest measured: profile with --max-k-chunk {more} to look further"
            ));
        }
    }
    notices
}

impl Outcome {
    /// The tuned file's content for one target.
    pub fn tuned(&self, tuning: &Tuning) -> Tuned {
        let text = |f: fn(&Capture) -> &String| self.capture.as_ref().map(f).cloned().unwrap_or_default();
        let (fine, base) = (&tuning.found.fine, self.timings.base_us());
        let name = text(|c| &c.device_name);
        let name = if name.is_empty() { self.device_name.clone().unwrap_or_default() } else { name };
        Tuned {
            format: tuned::FORMAT,
            device: Device { id: text(|c| &c.device), name, driver: text(|c| &c.driver) },
            model: self.identity.model.clone(),
            algo: self.identity.format.algo().into(),
            bits: self.identity.bits,
            fp_dtype: self.identity.precision.name().into(),
            shapes: self.shapes,
            clock: if self.capture.is_some() { text(|c| &c.clock) } else { "Nsight Systems".into() },
            target_slowdown: tuning.target,
            slowdown: (fine.us() / base - 1.0) * 100.0,
            base_layer_us: base - self.outside_us(),
            layer_us: fine.us() - self.outside_us(),
            real_slowdown: tuning.verified.as_ref().map(|verified| verified.slowdown),
            objective: Some(self.objective.name().into()),
            n_tb: fine.n_tb,
            k_chunks: fine.k_chunks(),
        }
    }

    /// What a layer's time has in it that is not the layer's: its part of what comes before and after all layers, µs.
    fn outside_us(&self) -> f64 {
        self.timings.token.as_ref().map_or(0.0, |token| token.outside_us)
    }

    /// Writes the CSV, the plots and one tuned file per target; returns their paths.
    ///
    /// # Errors
    /// What the file system says. Files that were there are replaced as a whole or not at all.
    pub fn write(&self, to: &Directories) -> Result<Vec<PathBuf>> {
        let stem = self.identity.stem();
        for dir in [&to.csv, &to.plots, &to.tuned] {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let mut written = vec![to.csv.join(format!("{stem}.csv"))];
        files::replace(&written[0], |path| Ok(fs::write(path, report::csv(self)?)?))?;
        for projection in Projection::ALL {
            if !self.timings.modules[projection.index()].curves.is_empty() {
                let path = to.plots.join(format!("{stem}_{projection}.png"));
                files::replace(&path, |path| plot::module(self, projection, path))?;
                written.push(path);
            }
        }
        let overview = to.plots.join(format!("{stem}_overview.png"));
        files::replace(&overview, |path| plot::overview(self, path))?;
        written.push(overview);
        for tuning in &self.tunings {
            let path = to.tuned.join(format!("{stem}_{}.json", report::per_cent(tuning.target)));
            files::replace(&path, |path| Ok(fs::write(path, tuned::json(&self.tuned(tuning))?)?))?;
            written.push(path);
        }
        Ok(written)
    }
}
