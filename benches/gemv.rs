//! Products of one token: microseconds, bytes, fraction of the memory's floor; with compensation, what it adds.
//!
//! `cargo bench --bench gemv -- [--model NAME] [--bits 3,4] [--format ap,lutgemm] [--k-chunk 0,4,8] [--n-tb 8,16]
//! [--sweep] [--residuals host|device] [--multiprocessors 20]`
//!
//! Weights are rotated past the second-level cache, the products of one rotation are one graph, and the median of
//! many replays is taken by the device's clock.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use decdec::backend::cuda::{Card, Cuda, Matrix, Occupied, Options, Residuals, Tuning};
use decdec::backend::{DecodeBackend, Feed, GemvBackend, Norm, Product, Rows};
use decdec::config::{ModelConfig, Projection};
use decdec::dec::{DecPlan, Selection};
use decdec::format::Storage;
use decdec::random::RandomWeights;

/// Bytes of matrices to rotate through: well past the largest cache of the cards at hand.
const ROTATION: usize = 160 << 20;

#[derive(Parser)]
struct Args {
    /// Shapes of this model.
    #[arg(long, default_value = "Meta-Llama-3-8B-Instruct")]
    model: String,
    #[arg(long, value_delimiter = ',', default_value = "3,4")]
    bits: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "ap,lutgemm")]
    format: Vec<String>,
    #[arg(long, value_delimiter = ',', default_value = "0")]
    k_chunk: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "8,16")]
    n_tb: Vec<usize>,
    /// Try many launch parameters, and print the best of them.
    #[arg(long)]
    sweep: bool,
    #[arg(long, default_value = "host")]
    residuals: Residuals,
    /// Select exactly instead of by buckets.
    #[arg(long)]
    exact: bool,
    /// Device memory bandwidth that the floor is counted with, TB/s.
    #[arg(long, default_value_t = 3.07)]
    bandwidth: f64,
    /// As a card with so many multiprocessors would: launches are made for them, and the others are held.
    #[arg(long)]
    multiprocessors: Option<usize>,
    /// Cargo passes this.
    #[arg(long, hide = true)]
    bench: bool,
}

struct Io {
    norm: Norm<<Cuda as GemvBackend>::Vector>,
    x: <Cuda as GemvBackend>::Vector,
    y: <Cuda as GemvBackend>::Vector,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let config = ModelConfig::preset(&args.model).with_context(|| format!("no model {}", args.model))?;
    let selection = if args.exact { Selection::Exact } else { Selection::Bucket };
    let mut cuda = Cuda::new(
        0,
        Options {
            residuals: args.residuals,
            card: args.multiprocessors.map(Card::of_multiprocessors),
            ..Options::default()
        },
    )?;
    println!("# {} {}, decdec {}", cuda.device().name, cuda.device().driver, env!("CARGO_PKG_VERSION"));
    println!("# {}", std::env::args().skip(1).collect::<Vec<_>>().join(" "));
    println!("format,bits,module,in,out,n_tb,k_chunk,us,GB/s,floor,slowdown,tuning");
    let tunings = if args.sweep { sweep(args.k_chunk.iter().any(|&k| k > 0)) } else { vec![Tuning::default()] };
    for format in &args.format {
        for &bits in &args.bits {
            for projection in Projection::ALL {
                let (k, rows) = config.shape(0, projection);
                let kind = if format == "ap" { Storage::ANYPREC } else { Storage::lutgemm(128) };
                let linear = RandomWeights::single(k, rows, kind, bits, 1)?;
                let bytes = match format.as_str() {
                    "ap" => k * rows * bits / 8 + rows * (2 << bits),
                    _ => k * rows * bits / 8 + k / 128 * rows * 8,
                };
                let fits = if args.k_chunk.iter().any(|&k| k > 0) { 24 } else { usize::MAX };
                let count = ROTATION.div_ceil(bytes).max(3).min(fits);
                let values: Vec<f32> =
                    (0..k).map(|i| ((i * 7919 % 4001) as f32 / 2000.0 - 1.0).powi(3) * 3.0).collect();
                let mut gamma = cuda.vector(k)?;
                cuda.write(&vec![1.0; k], &mut gamma)?;
                let mut x = cuda.vector(k)?;
                cuda.write(&values, &mut x)?;
                let y = cuda.vector(rows)?;
                let matrices: Vec<Matrix> = (0..count).map(|_| cuda.matrix(&linear)).collect::<Result<_>>()?;
                let mut io = Io { norm: Norm { gamma, len: k, eps: 1e-5 }, x, y };
                let norm = matches!(projection, Projection::Qkv | Projection::GateUp);
                let one = [&matrices[0]];
                cuda.compile_ahead(&one, &tunings, norm, false)?;
                if args.k_chunk.iter().any(|&k| k > 0) {
                    cuda.compile_ahead(&one, &tunings, norm, true)?;
                }
                let thresholds = linear.thresholds.as_deref().context("thresholds")?.to_vec();
                for &tuning in &tunings {
                    cuda.retune(tuning);
                    let mut base = f64::NAN;
                    for &k_chunk in &args.k_chunk {
                        for &n_tb in if k_chunk == 0 { &args.n_tb[..1] } else { &args.n_tb[..] } {
                            let plan = DecPlan::new(k, rows, &thresholds, k_chunk, n_tb, selection)?;
                            let us = match io.run(&cuda, &matrices, norm, &plan) {
                                Ok(us) => us,
                                Err(e) => {
                                    println!("{format},{bits},{projection}: {e:#} {tuning:?}");
                                    continue;
                                }
                            };
                            if k_chunk == 0 {
                                base = us;
                            }
                            println!(
                                "{format},{bits},{projection},{k},{rows},{n_tb},{k_chunk},{us:.2},{:.0},{:.2},{:.3},{}",
                                bytes as f64 / us / 1e3,
                                bytes as f64 / (args.bandwidth * 1e6) / us,
                                us / base,
                                brief(tuning)
                            );
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

fn brief(t: Tuning) -> String {
    format!("w{} s{} d{} t{} f{}", t.warps, t.stages, t.dec_warps, t.trigger, t.dec_flight)
}

fn sweep(compensates: bool) -> Vec<Tuning> {
    let mut all = Vec::new();
    for (warps, stages) in [(12, 3), (14, 3), (16, 2), (16, 3), (20, 2), (24, 2), (28, 2), (32, 2)] {
        for &(dec_warps, dec_flight) in if compensates { &[(8, 4), (8, 8), (4, 8), (12, 4)][..] } else { &[(8, 4)] } {
            all.push(Tuning {
                warps,
                stages,
                beside_dec: (warps.min(16), stages),
                dec_warps,
                dec_flight,
                ..Tuning::default()
            });
        }
    }
    all
}

impl Io {
    /// Median time of one product, microseconds.
    fn run(&mut self, cuda: &Cuda, matrices: &[Matrix], norm: bool, plan: &DecPlan) -> Result<f64> {
        let Self { norm: gamma, x, y } = self;
        let plans = (plan.k_chunk() > 0)
            .then(|| matrices.iter().map(|m| cuda.plan(m, plan)).collect::<Result<Vec<_>>>())
            .transpose()?;
        let mut rotation = || -> Result<()> {
            for (i, matrix) in matrices.iter().enumerate() {
                let plan = plans.as_ref().map(|p| &p[i]);
                match (norm, plan) {
                    (true, plan) => {
                        let product = Product { feed: Feed::Norm(gamma), matrix, plan, compensated: 1, add: false };
                        cuda.project(&product, x, y, 1)?
                    }
                    (false, Some(plan)) => cuda.dec_gemv(matrix, plan, x, y)?,
                    (false, None) => cuda.gemv(matrix, x, y)?,
                }
            }
            Ok(())
        };
        let (mut graphs, rows) = (Default::default(), [Rows { slot: 0, position: 0, count: 1 }]);
        for _ in 0..5 {
            cuda.replay(&mut graphs, &rows, &mut rotation)?;
        }
        // From here on nothing is allocated: that would wait for the blocks that hold the rest.
        let occupied = cuda.occupy_rest(Duration::from_secs(5))?;
        let repeats = (2000 / matrices.len()).clamp(3, 40);
        let mut times = Vec::new();
        for _ in 0..9 {
            let time: Duration = cuda.time(&mut || {
                for _ in 0..repeats {
                    cuda.replay(&mut graphs, &rows, &mut rotation)?;
                }
                Ok(())
            })?;
            times.push(time.as_secs_f64() * 1e6 / (repeats * matrices.len()) as f64);
        }
        occupied.iter().try_for_each(Occupied::check)?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}
