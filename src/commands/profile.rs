//! `decdec profile`

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use decdec::backend::DecodeBackend;
use decdec::checkpoint::BitWidth;
use decdec::config::ModelConfig;
use decdec::device::{self, Device, Dtype, Job};
use decdec::nsys::{self, Identity, Kind, Precision};
use decdec::open::Opened;
use decdec::profile::{self, Clock, Options, Outcome};
use decdec::tune;
use decdec::tuned::Tuned;
use decdec::weights::ModelWeights;

use crate::cli::{ProfileArgs, ProfileName};
use crate::output;

/// Runs the command.
pub(crate) fn run(args: &ProfileArgs) -> Result<()> {
    let named = Named::resolve(&args.name)?;
    let options = Options {
        identity: named.identity,
        weights: args.name.named.checkpoint_path.display().to_string(),
        dir: args.name.nsys_dir.clone(),
        tokens: args.tokens,
        overwrite: args.overwrite,
        halve_layers: args.halve_layers,
        min_n_tb: args.min_n_tb,
        max_n_tb: args.max_n_tb,
        max_k_chunk: args.max_k_chunk,
        k_chunks: None,
        selection: args.on.selection.into(),
        // A profiler from outside sees kernels, not parts of one.
        kind: args.measure.or((args.nsys_path.is_some() || args.clock == Clock::Once).then_some(Kind::Products)),
        dearest: args.max_slowdown / 100.0,
        choices: args.mixes.as_deref().map(profile::every_mix).unwrap_or_default(),
    };
    let tuned = args.tuned.as_deref().map(|file| tuned_for(file, &options.identity)).transpose()?;
    if let Some(nsys) = &args.nsys_path {
        let (trace, sqlite) = profile::under_nsight(nsys, &options, own_command_line)?;
        output::line(format_args!("wrote {}\nwrote {}", trace.display(), sqlite.display()))?;
    } else {
        let weights = named.opened.weights();
        let sweep = Sweep { weights, options: &options, clock: args.clock, tuned: tuned.as_deref() };
        output::text(device(&args.on.device, args.name.fp_dtype, true)?.run(sweep)?.to_string())?;
    }
    if let Some(tuned) = &tuned {
        output::line(now(tuned, &options)?)?;
    }
    Ok(())
}

/// The device of `--device` with the type of `--fp-dtype`; backends that compute in one type only are not asked
/// for another. `watch`: fused launches note when they pass from one part of a layer to the next.
pub(crate) fn device(name: &str, precision: Precision, watch: bool) -> Result<Device> {
    let dtype = match precision {
        Precision::Fp16 => Dtype::Float16,
        Precision::Bf16 => Dtype::Bfloat16,
        Precision::Fp32 => Dtype::Float32,
    };
    let asked = name.starts_with("cuda") || name == "auto" && precision != Precision::Fp16;
    let interrupt = Some(super::interrupt::heard());
    Device::open_with(name, &device::Options { dtype: asked.then_some(dtype), interrupt, watch, ..Default::default() })
}

/// The results in `file` for this model's algorithm and width, of whatever device.
fn tuned_for(file: &Path, identity: &Identity) -> Result<Vec<Tuned>> {
    let mut all = Tuned::read(file)?;
    let (algo, bits) = (identity.format.algo(), identity.bits);
    let first = format!("{} {}-bit", all[0].algo, all[0].bits);
    all.retain(|tuned| tuned.algo == algo && tuned.bits == bits);
    ensure!(!all.is_empty(), "{} is for {first}, not for {algo} {bits}-bit", file.display());
    ensure!(
        all.iter().all(|tuned| tuned.k_chunks != [0; 4]),
        "{} compensates nothing: there is nothing to measure",
        file.display()
    );
    Ok(all)
}

/// Each `k_chunk` of a tuned result once, ascending, without 0.
fn measured_k_chunks(tuned: &Tuned) -> Vec<usize> {
    let compensated: BTreeSet<usize> = tuned.k_chunks.into_iter().filter(|&k_chunk| k_chunk > 0).collect();
    compensated.into_iter().collect()
}

/// What the tuned result of the profile's device costs by the profile of `options`.
fn now(tuned: &[Tuned], options: &Options) -> Result<String> {
    let identity = &options.identity;
    let profile = nsys::read(&identity.trace(&options.dir), &identity.sqlite(&options.dir), identity)?;
    let device = profile.capture.as_ref().map_or("", |capture| &capture.device_name);
    let of_device = |tuned: &&Tuned| tuned.device.name.is_empty() || tuned.device.name == device;
    let tuned = tuned.iter().find(of_device).with_context(|| format!("nothing was tuned on {device}"))?;
    let timings = tune::timings(&tune::Table::new(&profile)?, &profile, tuned.shapes)?;
    let (n_tb, k_chunks) = (tuned.n_tb, tuned.k_chunks);
    let missing = || format!("the profile that is there lacks n_tb {n_tb}, k_chunk {k_chunks:?}: use --overwrite");
    let (base, layer) = (timings.base_us(), timings.layer_us(n_tb, k_chunks).with_context(missing)?);
    Ok(format!(
        "tuned            : n_tb {n_tb}, k_chunk {k_chunks:?}: layer {layer:.2} us, base {base:.2} us, slowdown {:.2} % \
         (when tuned {:.2} us, {:.2} us, {:.2} %)",
        (layer / base - 1.0) * 100.0,
        tuned.layer_us,
        tuned.base_layer_us,
        tuned.slowdown
    ))
}

/// This very command line, without `--nsys-path`, writing to `staging`.
fn own_command_line(staging: &Path) -> Vec<std::ffi::OsString> {
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("decdec"));
    let mut line = vec![program.into_os_string()];
    let mut skip = false;
    for argument in std::env::args_os().skip(1) {
        let text = argument.to_string_lossy().replace('_', "-");
        let mine = ["--nsys-path", "--nsys-dir", "--clock"].iter().find(|flag| text.starts_with(**flag));
        match mine {
            _ if std::mem::take(&mut skip) => {}
            Some(flag) => skip = text == **flag,
            None => line.push(argument),
        }
    }
    line.extend(["--clock".into(), "once".into(), "--nsys-dir".into(), staging.into()]);
    line
}

struct Sweep<'a> {
    weights: &'a dyn ModelWeights,
    options: &'a Options,
    clock: Clock,
    tuned: Option<&'a [Tuned]>,
}

impl<'d> Job<'d> for Sweep<'_> {
    type Output = Result<Outcome>;

    fn run<B: DecodeBackend + 'd>(self, backend: &'d B) -> Self::Output {
        let mut options = self.options.clone();
        if let Some(tuned) = self.tuned {
            let (shapes, width) = (self.weights.config().shapes(0), [options.identity.bits]);
            let tuned = &Tuned::choose(tuned, backend.device(), shapes, &width)?[0];
            (options.min_n_tb, options.max_n_tb) = (Some(tuned.n_tb), Some(tuned.n_tb));
            options.k_chunks = Some(measured_k_chunks(tuned));
            options.choices = vec![tuned.k_chunks];
        }
        profile::run(backend, &mut backend.recorder(self.clock)?, self.weights, &options)
    }
}

/// The width that is asked for; a profile is of one.
pub(crate) fn one_width(name: &ProfileName) -> Result<Option<BitWidth>> {
    let asked = name.width.bitwidth;
    if let Some(width) = asked.filter(|width| width.is_mixed()) {
        bail!("--bitwidth is {width}, a profile is of one width, use {} or {}", width.low(), width.high());
    }
    Ok(asked)
}

/// A profile's name and its model, with what the flags leave out filled in.
pub(crate) struct Named {
    pub(crate) identity: Identity,
    pub(crate) opened: Opened,
}

impl Named {
    /// Fills in from the checkpoint what was not given; holds what was given against it.
    pub(crate) fn resolve(name: &ProfileName) -> Result<Self> {
        let identity = |model: String, format, bits| Identity {
            prefix: name.prefix.clone(),
            model,
            precision: name.fp_dtype,
            format,
            bits,
        };
        let asked = one_width(name)?;
        let path = name.named.checkpoint_path.as_path();
        if let Some(seed) = super::random_seed(path)? {
            let model = name.named.model_name.clone().context("random weights need the --model-name of a preset")?;
            let config = ModelConfig::preset(&model).with_context(|| {
                format!(
                    "--model-name {model} is no preset, {} are, or give a --checkpoint-path",
                    ModelConfig::PRESETS.join(", ")
                )
            })?;
            let format = name.algo.context("random weights need --algo sqllm or awq")?;
            let width = asked.context("random weights need a --bitwidth, such as 3 or 4")?;
            let bits = width.low();
            let weights = super::random(config, format, bits as usize, seed)?;
            let opened = Opened::random(weights, format, width, &model);
            return Ok(Self { identity: identity(model, format, bits), opened });
        }
        let opened = super::locate::open(path, asked, false)?;
        let Some((format, width)) = opened.quantization() else {
            bail!("{} is full precision: quantize it first, or profile random:SEED", path.display());
        };
        if let Some(asked) = name.algo {
            ensure!(asked == format, "--algo is {}, but {} is {}", asked.algo(), path.display(), format.algo());
        }
        ensure!(
            asked.is_some() || !width.is_mixed(),
            "{} mixes {} and {} bits: profile and tune them one after the other with --bitwidth",
            path.display(),
            width.low(),
            width.high()
        );
        let file_name = path.canonicalize()?.file_name().map(|name| name.to_string_lossy().into_owned());
        let model = name.named.model_name.clone().or(file_name).context("give a --model-name")?;
        let bits = asked.unwrap_or(width).low();
        Ok(Self { identity: identity(model, format, bits), opened })
    }
}
