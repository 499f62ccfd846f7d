//! Loading: from a checkpoint in the page cache to the first token.
//!
//! `cargo bench --bench load -- [--model NAME] [--bits 3] [--format ap|lutgemm] [--residuals host|device] [--runs 3]
//! [--folder DIR]`
//!
//! Writes a checkpoint of random numbers into a temporary folder (in `--folder`; an 8B model takes 17 GB there while it
//! is made, 9 GB afterwards), then loads it several times. `weights_s` ends when the last byte is on the device;
//! `RUST_LOG=decdec=debug` tells what it was spent on.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use decdec::backend::GemvBackend;
use decdec::backend::cuda::{Cuda, Options, Residuals};
use decdec::checkpoint::{BitWidth, CheckpointWriter, FORMAT_VERSION, Manifest, Unquantized};
use decdec::config::{ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::engine::{Engine, Settings};
use decdec::format::{Format, Storage};
use decdec::model::{Compensation, Model};
use decdec::open::Opened;
use decdec::random::RandomWeights;
use decdec::tokenizer::TextFiles;
use decdec::weights::ModelWeights;
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// Shapes of this model.
    #[arg(long, default_value = "Meta-Llama-3-8B-Instruct")]
    model: String,
    #[arg(long, default_value_t = 3)]
    bits: u32,
    #[arg(long, default_value = "ap")]
    format: String,
    #[arg(long, default_value = "host")]
    residuals: Residuals,
    /// Fewer layers than the model has.
    #[arg(long)]
    layers: Option<usize>,
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Where the checkpoint is made [default: the system's temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Cargo passes this.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    let folder = match &args.folder {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let path = folder.path().join("checkpoint");
    let start = Instant::now();
    write(&args, &path)?;
    println!("# {}", std::env::args().skip(1).collect::<Vec<_>>().join(" "));
    println!("# checkpoint written in {:.1} s", start.elapsed().as_secs_f64());
    println!("run,device_s,open_s,weights_s,kernels_s,first_token_s,total_s");
    for run in 1..=args.runs {
        let mut times = vec![Instant::now()];
        let cuda = Cuda::new(0, Options { residuals: args.residuals, ..Options::default() })?;
        times.push(Instant::now());
        let opened = Opened::open(&path, None, false)?;
        times.push(Instant::now());
        let engine = Engine::of(Model::load(&cuda, opened.weights(), |_| ())?, 512);
        engine.compensate(Some(&Compensation::uniform(16, 8, Selection::Bucket)))?;
        let mut session = engine.session(Settings { max_new_tokens: 1, ..Settings::default() })?;
        // The device's own clock waits for everything before it.
        cuda.time(&mut || Ok(()))?;
        times.push(Instant::now());
        session.prepare(1)?;
        times.push(Instant::now());
        session.prompt(&[1])?;
        session.rest()?;
        times.push(Instant::now());
        let parts: Vec<_> = times.windows(2).map(|t| format!("{:.2}", (t[1] - t[0]).as_secs_f64())).collect();
        println!("{run},{},{:.2}", parts.join(","), (times[times.len() - 1] - times[0]).as_secs_f64());
    }
    Ok(())
}

/// A checkpoint of random numbers.
fn write(args: &Args, path: &Path) -> Result<()> {
    let mut config = ModelConfig::preset(&args.model).with_context(|| format!("no model {}", args.model))?;
    if let Some(layers) = args.layers {
        config = config.with(json!({ "num_hidden_layers": layers }))?;
    }
    let (format, backend, group_size) = match args.format.as_str() {
        "ap" => (Storage::ANYPREC, Format::AnyPrec, None),
        _ => (Storage::lutgemm(128), Format::LutGemm, Some(128)),
    };
    let weights = RandomWeights::new(config.clone(), format, args.bits as usize, 1)?;
    let manifest = Manifest {
        version: FORMAT_VERSION,
        backend,
        bits: BitWidth::try_from(f64::from(args.bits))?,
        group_size,
        residual_bits: 4,
        source: "random".into(),
        calibration: "none".into(),
    };
    let writer = CheckpointWriter::create(path, "load", false)?;
    for (layer, own) in config.layers.iter().enumerate() {
        let mut norms = [const { Vec::new() }; 6];
        for (norm, _) in own.norms(config.hidden_size) {
            norms[norm.index()] = weights.norm(layer, norm)?;
        }
        let [qkv, o, gu, d] = Projection::ALL.map(|p| weights.projection(layer, p));
        writer.write_layer(&config, (layer, args.bits), &norms, &[qkv?, o?, gu?, d?])?;
    }
    let rest =
        Unquantized { embedding: weights.embedding()?, head: weights.head()?, final_norm: weights.final_norm()? };
    let texts = TextFiles {
        tokenizer_json: b"{}".to_vec(),
        chat_template: None,
        special_tokens: Default::default(),
        eos_token_ids: Vec::new(),
    };
    writer.finish(&config, &manifest, &vec![args.bits; config.layers.len()], &rest, &texts)
}
