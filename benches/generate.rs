//! Whole tokens: a model of random numbers, greedy, from an empty context.
//!
//! `cargo bench --bench generate -- [--model NAME] [--bits 3] [--format ap|lutgemm] [--k-chunk 0,4,8] [--n-tb 8,16]
//! [--tokens 300] [--prompt 1] [--residuals host|device] [--compile 2] [--dtype float16]`

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use decdec::backend::cuda::{Cuda, Dtype, Options, Residuals, Tuning};
use decdec::backend::{DecodeBackend, GemvBackend, Input, Norm};
use decdec::config::{ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::format::Storage;
use decdec::generate::{Request, generate};
use decdec::model::{Compensation, LayerCompensation, Model};
use decdec::random::RandomWeights;
use decdec::sampling::Sampling;
use decdec::weights::{Linear, ModelWeights, Weight};

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
    /// Warps of a block of the layers' launch.
    #[arg(long, default_value_t = Tuning::default().layers)]
    warps: usize,
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
    config.num_layers = args.layers.unwrap_or(config.num_layers);
    let start = Instant::now();
    let tuning = Tuning {
        layers: args.warps,
        layers_always: args.layers_always,
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
    if let Some(position) = args.ops {
        return operations(&cuda, &weights, position);
    }
    let start = Instant::now();
    let mut model = Model::load(&cuda, &weights, |_| ())?;
    println!(
        "# opened in {:.2} s, drawn in {:.2} s, loaded in {:.2} s",
        opened.as_secs_f64(),
        drawn.as_secs_f64(),
        start.elapsed().as_secs_f64()
    );
    println!("k_chunk,n_tb,prompt,prompt_ms,tokens,tokens/s,ms/token");
    for k_chunk in &args.k_chunk {
        let ks: Vec<usize> = k_chunk.split('/').map(|k| k.parse().context("--k-chunk")).collect::<Result<_>>()?;
        let k_chunks: [usize; 4] = if ks.len() == 4 { [ks[0], ks[1], ks[2], ks[3]] } else { [ks[0]; 4] };
        for &n_tb in if k_chunks == [0; 4] { &args.n_tb[..1] } else { &args.n_tb[..] } {
            let by_bits = vec![LayerCompensation { n_tb, k_chunks }];
            model.compensate(Some(&Compensation { by_bits, selection: Selection::Bucket }))?;
            for &prompt in &args.prompt {
                let prompt: Vec<u32> = (0..prompt as u32).map(|i| i * 7919 % 30_000).collect();
                let mut state = model.state(prompt.len() + args.tokens)?;
                let start = Instant::now();
                model.prepare(&mut state, prompt.len(), false)?;
                println!("# kernels ready in {:.2} s", start.elapsed().as_secs_f64());
                // The first run records, the second is measured.
                for warm in [true, false] {
                    let request = Request {
                        prompt: &prompt,
                        max_new_tokens: if warm { 8.min(args.tokens) } else { args.tokens },
                        sampling: Sampling { temperature: args.temperature, ..Sampling::GREEDY },
                        seed: 1,
                        stop_ids: &[],
                        compensate_prompt: false,
                    };
                    let start = Instant::now();
                    let made = generate(&model, &mut state, &request, |_| Ok(ControlFlow::Continue(())))?;
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
                        timeline(&cuda, model.config().num_layers)?;
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

/// Each operation of a token by itself: many of it in a graph, its matrices rotated.
fn operations(cuda: &Cuda, weights: &RandomWeights, position: usize) -> Result<()> {
    const COUNT: usize = 8;
    let c = weights.config();
    let layer = |p| (0..COUNT).map(|l| cuda.matrix(&weights.projection(l, p)?)).collect::<Result<Vec<_>>>();
    let (qkv, o) = (layer(Projection::Qkv)?, layer(Projection::O)?);
    let (gu, d) = (layer(Projection::GateUp)?, layer(Projection::Down)?);
    let head = cuda.matrix(&Linear::plain(Weight::Dense(weights.head()?.context("a tied head")?)))?;
    let filled = |len: usize| -> Result<_> {
        let mut v = cuda.vector(len)?;
        cuda.write(&(0..len).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect::<Vec<_>>(), &mut v)?;
        Ok(v)
    };
    let norm = Norm { gamma: filled(c.hidden_size)?, eps: 1e-5 };
    let mut h = filled(c.hidden_size)?;
    let mut y = filled(c.shape(Projection::Qkv).1)?;
    let mut attended = filled(c.num_heads * c.head_dim)?;
    let mut g = filled(c.shape(Projection::GateUp).1)?;
    let mut logits = filled(c.vocab_size)?;
    let mut sequence = cuda.sequence(c, 8192)?;
    cuda.begin(&mut sequence, &Sampling::GREEDY, &[])?;
    cuda.advance(&mut sequence, position)?;
    println!("operation,us (position {position})");
    let time = |name: &str, count: usize, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let mut graph = None;
        for _ in 0..4 {
            cuda.replay(&mut graph, work)?;
        }
        let mut times: Vec<f64> = Vec::new();
        for _ in 0..9 {
            let t = cuda.time(&mut || (0..8).try_for_each(|_| cuda.replay(&mut graph, work)))?;
            times.push(t.as_secs_f64() * 1e6 / (8 * count) as f64);
        }
        times.sort_by(f64::total_cmp);
        println!("{name},{:.2}", times[4]);
        Ok(())
    };
    time("embed", 32, &mut || (0..32).try_for_each(|_| cuda.embed(&sequence, &head, Input::Sampled, &mut h)))?;
    time("qkv", COUNT, &mut || qkv.iter().try_for_each(|m| cuda.norm_gemv(&norm, m, None, &h, &mut y, 1)))?;
    time("attend", c.num_layers, &mut || {
        (0..c.num_layers).try_for_each(|l| cuda.attend(&mut sequence, l, &y, &mut attended, 1))
    })?;
    time("o", COUNT, &mut || o.iter().try_for_each(|m| cuda.gemv_add(m, None, &attended, &mut h, 1)))?;
    time("gu", COUNT, &mut || gu.iter().try_for_each(|m| cuda.norm_gemv(&norm, m, None, &h, &mut g, 1)))?;
    time("swiglu and d", COUNT, &mut || d.iter().try_for_each(|m| cuda.swiglu_gemv_add(m, None, &g, &mut h, 1)))?;
    time("head", 4, &mut || (0..4).try_for_each(|_| cuda.norm_gemv(&norm, &head, None, &h, &mut logits, 1)))?;
    time("sample", 8, &mut || (0..8).try_for_each(|_| cuda.sample(&mut sequence, &logits)))?;
    time("advance", 32, &mut || (0..32).try_for_each(|_| cuda.advance(&mut sequence, 0)))?;
    time("layer", COUNT, &mut || {
        (0..COUNT).try_for_each(|l| {
            cuda.norm_gemv(&norm, &qkv[l], None, &h, &mut y, 1)?;
            cuda.attend(&mut sequence, l, &y, &mut attended, 1)?;
            cuda.gemv_add(&o[l], None, &attended, &mut h, 1)?;
            cuda.norm_gemv(&norm, &gu[l], None, &h, &mut g, 1)?;
            cuda.swiglu_gemv_add(&d[l], None, &g, &mut h, 1)
        })
    })?;
    Ok(())
}
