//! Where a token's time goes on the CPU and in WGSL: the projections of all layers and the head apart, then
//! whole tokens.
//!
//! `cargo bench --features reference-wgpu --bench token -- CHECKPOINT [--device cpu|wgpu] [--k-chunk 0,8]
//! [--n-tb 8] [--tokens 64] [--repeat 15]`

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use decdec::backend::DecodeBackend;
use decdec::backend::cpu::Cpu;
use decdec::config::Projection;
use decdec::dec::{DecPlan, Selection};
use decdec::engine::{Engine, Settings};
use decdec::model::{Compensation, Model};
use decdec::open::Opened;
use decdec::weights::{Linear, Weight};

#[derive(Parser)]
struct Args {
    checkpoint: PathBuf,
    #[arg(long, default_value = "cpu")]
    device: String,
    #[arg(long, value_delimiter = ',', default_value = "0,8")]
    k_chunk: Vec<usize>,
    #[arg(long, default_value_t = 8)]
    n_tb: usize,
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    #[arg(long, default_value_t = 15)]
    repeat: usize,
    /// Cargo passes this.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.device.as_str() {
        "cpu" => run(&Cpu::new(), &args),
        #[cfg(feature = "reference-wgpu")]
        "wgpu" => run(&decdec::backend::wgsl::Wgpu::open(None)?, &args),
        other => bail!("no device {other} in this build"),
    }
}

fn run<B: DecodeBackend>(backend: &B, args: &Args) -> Result<()> {
    let opened = Opened::open(&args.checkpoint, None, false)?;
    let device = backend.device();
    println!("# {} ({}) {}, {}", device.id, device.name, device.driver, args.checkpoint.display());
    println!("{:<10} {:>8} {:>12} {:>10} {:>8}", "part", "k_chunk", "µs a token", "MB", "GB/s");
    for p in Projection::ALL {
        projection(backend, args, &opened, p)?;
    }
    head(backend, args, &opened)?;
    tokens(backend, args, &opened)
}

/// The median of `repeat` timings of `work`.
fn median<B: DecodeBackend>(backend: &B, repeat: usize, mut work: impl FnMut() -> Result<()>) -> Result<Duration> {
    work()?;
    let mut times = (0..repeat).map(|_| backend.time(&mut work)).collect::<Result<Vec<_>>>()?;
    times.sort();
    Ok(times[times.len() / 2])
}

fn row(part: &str, k_chunk: &str, time: Duration, bytes: usize) {
    let (us, mb) = (time.as_secs_f64() * 1e6, bytes as f64 / 1e6);
    println!("{part:<10} {k_chunk:>8} {us:>12.1} {mb:>10.2} {:>8.2}", mb * 1e3 / us);
}

fn projection<B: DecodeBackend>(backend: &B, args: &Args, opened: &Opened, p: Projection) -> Result<()> {
    let weights = opened.weights();
    let (inputs, outputs) = weights.config().shape(0, p);
    let mut bytes = 0;
    let mut layers = Vec::new();
    for layer in 0..weights.config().layers.len() {
        let linear = weights.projection(layer, p)?;
        bytes += linear.weight.bytes();
        let matrix = backend.matrix(&linear)?;
        let mut plans = Vec::new();
        for &k in args.k_chunk.iter().filter(|&&k| k > 0) {
            let thresholds = linear.thresholds.as_deref().context("the checkpoint has no residuals")?;
            let plan = DecPlan::new(inputs, outputs, thresholds, k, args.n_tb, Selection::Bucket)?;
            plans.push(backend.plan(&matrix, &plan)?);
        }
        layers.push((matrix, plans));
    }
    let mut x = backend.vector(inputs)?;
    backend.write(&decdec::sampling::draws(1, inputs), &mut x)?;
    let mut y = backend.vector(outputs)?;
    let mut plan_of = 0;
    for &k in &args.k_chunk {
        let time = median(backend, args.repeat, || {
            layers.iter().try_for_each(|(matrix, plans)| match k {
                0 => backend.gemv(matrix, &x, &mut y),
                _ => backend.dec_gemv(matrix, &plans[plan_of], &x, &mut y),
            })
        })?;
        plan_of += usize::from(k > 0);
        row(p.name(), &k.to_string(), time, bytes);
    }
    Ok(())
}

fn head<B: DecodeBackend>(backend: &B, args: &Args, opened: &Opened) -> Result<()> {
    let weights = opened.weights();
    let table = weights.head()?.map_or_else(|| weights.embedding(), Ok)?;
    let (hidden, vocab, bytes) = (table.in_features, table.out_features, table.values.bytes());
    let matrix = backend.matrix(&Linear::plain(Weight::Dense(table)))?;
    let (x, mut y) = (backend.vector(hidden)?, backend.vector(vocab)?);
    let time = median(backend, args.repeat, || backend.gemv(&matrix, &x, &mut y))?;
    row("head", "", time, bytes);
    Ok(())
}

fn tokens<B: DecodeBackend>(backend: &B, args: &Args, opened: &Opened) -> Result<()> {
    let engine = Engine::of(Model::load(backend, opened.weights(), |_| ())?, args.tokens + 1);
    let mut session = engine.session(Settings { max_new_tokens: args.tokens, ..Settings::default() })?;
    for &k in &args.k_chunk {
        engine.compensate(Some(&Compensation::uniform(args.n_tb, k, Selection::Bucket)))?;
        session.clear();
        session.prompt(&[opened.weights().config().bos_token_id.unwrap_or(0)])?;
        let made = session.rest()?;
        let us = made.decode_time.as_secs_f64() * 1e6 / made.decoded as f64;
        println!("{:<10} {k:>8} {us:>12.1} {:>10} tokens/s {:.2}", "token", "", made.decode_per_second());
    }
    Ok(())
}
