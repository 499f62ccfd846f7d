//! Whole tokens: a model of random numbers, greedy, from an empty context.
//!
//! `cargo bench --bench generate -- [--model NAME] [--bits 3] [--format ap|lutgemm] [--k-chunk 0,4,8] [--n-tb 8,16]
//! [--tokens 300] [--prompt 1] [--residuals host|device] [--compile 2] [--dtype float16]`

use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use decdec::backend::cuda::{Cuda, Dtype, Options, Residuals, Tuning};
use decdec::backend::{DecodeBackend, GemvBackend, Rows};
use decdec::config::ModelConfig;
use decdec::dec::Selection;
use decdec::engine::{Engine, Settings};
use decdec::format::Storage;
use decdec::model::{Compensation, LayerCompensation, Model, Operation, State};
use decdec::random::RandomWeights;
use decdec::sampling::Sampling;

/// Layers of a model whose operations are timed apart.
const OPERATIONS_OF: usize = 8;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "Meta-Llama-3-8B-Instruct")]
    model: String,
    #[arg(long, default_value_t = 3)]
    bits: usize,
    #[arg(long, default_value = "ap")]
    format: String,
    /// `k_chunk` of all four projections, or four numbers with slashes: 0/0/8/8.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    k_chunk: Vec<String>,
    #[arg(long, value_delimiter = ',', default_value = "16")]
    n_tb: Vec<usize>,
    #[arg(long, default_value_t = 300)]
    tokens: usize,
    /// Tokens of the prompt.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    prompt: Vec<usize>,
    #[arg(long, default_value = "host")]
    residuals: Residuals,
    #[arg(long, default_value_t = 2)]
    compile: u8,
    #[arg(long, default_value = "float16")]
    dtype: Dtype,
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Instead: what each operation of a token takes, at this position.
    #[arg(long)]
    ops: Option<usize>,
    /// Warps of a block of the layers' launch; left out, as many as go with the shape.
    #[arg(long)]
    warps: Option<usize>,
    /// One launch for the layers wherever there is room, not only where it was measured to pay.
    #[arg(long)]
    layers_always: bool,
    /// Warps of a block of a product that is a launch of its own.
    #[arg(long, default_value_t = Tuning::default().warps)]
    product_warps: usize,
    /// Only so many layers of the model, for work on kernels.
    #[arg(long)]
    layers: Option<usize>,
    /// Print what each part of a layer takes in the layers' launch, from one input's arrival to the next's.
    #[arg(long)]
    timeline: bool,
    /// Cargo passes this.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut config = ModelConfig::preset(&args.model).with_context(|| format!("no model {}", args.model))?;
    let most = if args.ops.is_some() { OPERATIONS_OF } else { usize::MAX };
    config.layers.truncate(args.layers.unwrap_or(most));
    let start = Instant::now();
    let tuning = Tuning {
        layers: args.warps,
        one_launch: args.layers_always.then_some(true),
        warps: args.product_warps,
        ..Tuning::default()
    };
    let mut cuda = Cuda::new(
        0,
        Options { residuals: args.residuals, compile: args.compile, dtype: args.dtype, tuning, ..Options::default() },
    )?;
    if args.timeline {
        cuda.watch_layers()?;
    }
    let cuda = cuda;
    println!("# {} {}, decdec {}", cuda.device().name, cuda.device().driver, env!("CARGO_PKG_VERSION"));
    println!("# {}", std::env::args().skip(1).collect::<Vec<_>>().join(" "));
    let opened = start.elapsed();
    let start = Instant::now();
    let format = if args.format == "ap" { Storage::ANYPREC } else { Storage::lutgemm(128) };
    let weights = RandomWeights::new(config, format, args.bits, 1)?;
    let drawn = start.elapsed();
    let start = Instant::now();
    let model = Model::load(&cuda, &weights, |_| ())?;
    if let Some(position) = args.ops {
        return operations(&model, position);
    }
    println!(
        "# opened in {:.2} s, drawn in {:.2} s, loaded in {:.2} s",
        opened.as_secs_f64(),
        drawn.as_secs_f64(),
        start.elapsed().as_secs_f64()
    );
    let layers = model.config().layers.len();
    let engine = Engine::of(model, args.prompt.iter().max().context("--prompt")? + args.tokens);
    println!("k_chunk,n_tb,prompt,prompt_ms,tokens,tokens/s,ms/token");
    for k_chunk in &args.k_chunk {
        let ks: Vec<usize> = k_chunk.split('/').map(|k| k.parse().context("--k-chunk")).collect::<Result<_>>()?;
        let k_chunks: [usize; 4] = if ks.len() == 4 { [ks[0], ks[1], ks[2], ks[3]] } else { [ks[0]; 4] };
        for &n_tb in if k_chunks == [0; 4] { &args.n_tb[..1] } else { &args.n_tb[..] } {
            let by_bits = vec![LayerCompensation { n_tb, k_chunks }];
            engine.compensate(Some(&Compensation { by_bits, selection: Selection::Bucket }))?;
            for &prompt in &args.prompt {
                let prompt: Vec<u32> = (0..prompt as u32).map(|i| i * 7919 % 30_000).collect();
                let sampling = Sampling { temperature: args.temperature, ..Sampling::GREEDY };
                let mut session = engine.session(Settings { sampling, seed: 1, ..Settings::default() })?;
                let start = Instant::now();
                session.prepare(prompt.len())?;
                println!("# kernels ready in {:.2} s", start.elapsed().as_secs_f64());
                // The first run records, the second is measured.
                for warm in [true, false] {
                    session.settings.max_new_tokens = if warm { 8.min(args.tokens) } else { args.tokens };
                    session.clear();
                    session.prompt(&prompt)?;
                    let start = Instant::now();
                    let made = session.rest()?;
                    if warm {
                        println!("# first run {:.2} s: {:?}", start.elapsed().as_secs_f64(), made.tokens);
                        continue;
                    }
                    println!(
                        "{k_chunk},{n_tb},{},{:.2},{},{:.1},{:.4}",
                        prompt.len(),
                        made.prompt_time.as_secs_f64() * 1e3,
                        made.tokens.len(),
                        made.decode_per_second(),
                        1e3 / made.decode_per_second()
                    );
                    if args.timeline {
                        timeline(&cuda, layers)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// What each part of a layer took in the last token, a mean over the layers.
fn timeline(cuda: &Cuda, layers: usize) -> Result<()> {
    let stamps = cuda.timeline()?;
    let parts = ["qkv", "attend", "o", "gu", "d"];
    let layers = (stamps.len().saturating_sub(1) / parts.len()).min(layers);
    for (i, part) in parts.iter().enumerate() {
        let took: u64 = (0..layers).map(|l| stamps[l * parts.len() + i + 1] - stamps[l * parts.len() + i]).sum();
        println!("#   {part:<8}{:7.2} us", took as f64 / 1e3 / layers as f64);
    }
    Ok(())
}

/// Each operation of a token by itself: that of every layer in a graph, and all of a layer's behind each other.
fn operations(model: &Model<'_, Cuda>, position: usize) -> Result<()> {
    let mut state = model.state(1, position + 1024)?;
    model.begin(&mut state, 0, &Sampling::GREEDY, &[])?;
    model.prompt(&mut state, 0, &vec![1; position.max(1)], false)?;
    let all = model.operations();
    let (end, layers) = (&all[all.len() - 3..], model.config().layers.len());
    let of_layer = |l: usize| all.iter().copied().filter(move |op| matches!(op, Operation::Layer(own, _) if *own == l));
    println!("operation,us (position {position})");
    // As many in a graph as there are layers: their matrices are others every time.
    let mut time = |name: &str, work: &[Operation]| -> Result<()> {
        let (mut graphs, rows) = (Default::default(), [Rows { slot: 0, position, count: 1 }]);
        let mut run = || model.backend().replay(&mut graphs, &rows, &mut || each(model, &mut state, work));
        for _ in 0..4 {
            run()?;
        }
        let mut times = Vec::new();
        for _ in 0..9 {
            times.push(model.backend().time(&mut || (0..8).try_for_each(|_| run()))?.as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        println!("{name},{:.2}", times[4] * 1e6 / (8 * layers) as f64);
        Ok(())
    };
    time("embed", &vec![Operation::Embed; layers])?;
    for (i, first) in of_layer(0).enumerate() {
        let same: Vec<_> = (0..layers).filter_map(|l| of_layer(l).nth(i)).collect();
        let Operation::Layer(_, op) = first else { continue };
        time(&format!("{op:?}").replace(',', ""), &same)?;
    }
    time("layer", &(0..layers).flat_map(of_layer).collect::<Vec<_>>())?;
    for (name, operation) in ["advance", "head", "sample"].into_iter().zip(end) {
        // A choice is made as often as it is queued, for which there is room.
        time(name, &vec![*operation; layers])?;
    }
    Ok(())
}

fn each(model: &Model<'_, Cuda>, state: &mut State<Cuda>, work: &[Operation]) -> Result<()> {
    work.iter().try_for_each(|&operation| model.operate(state, 0, operation))
}
