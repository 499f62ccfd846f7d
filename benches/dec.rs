//! Compensation: alone, and beside the base product; what it reads over the host link, and what it adds.
//!
//! `cargo bench --bench dec -- [--model NAME] [--bits 3] [--format ap|lutgemm] [--k-chunk 1,2,4,8,16,32,64,128]
//! [--n-tb 8,16,32] [--residuals host|device] [--exact]`
//!
//! Matrices are rotated past the second-level cache, one rotation is one graph, and the median of nine is taken by the
//! device's clock. `dec` is compensation by `n_tb` blocks that do nothing else, `pair` base and compensation in one
//! launch. `floor` is what the bytes of the selected lines take at the best rate that the link gave.

use anyhow::{Context, Result};
use clap::Parser;
use decdec::backend::cuda::{Cuda, Matrix, Options, Residuals};
use decdec::backend::{DecodeBackend, GemvBackend, Rows};
use decdec::config::{ModelConfig, Projection};
use decdec::dec::{DecPlan, Selection};
use decdec::format::Storage;
use decdec::random::RandomWeights;

/// Bytes of residuals to rotate through, at most, and how many matrices.
const ROTATION: (usize, usize) = (2 << 30, 12);

#[derive(Parser)]
struct Args {
    /// Shapes of this model.
    #[arg(long, default_value = "Meta-Llama-3-8B-Instruct")]
    model: String,
    #[arg(long, value_delimiter = ',', default_value = "3")]
    bits: Vec<usize>,
    #[arg(long, default_value = "ap")]
    format: String,
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128")]
    k_chunk: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "8,16,32")]
    n_tb: Vec<usize>,
    #[arg(long, default_value = "host")]
    residuals: Residuals,
    /// Select exactly instead of by buckets.
    #[arg(long)]
    exact: bool,
    /// Cargo passes this.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One projection, several times over, with its input and output.
struct Bench<'a> {
    cuda: &'a Cuda,
    matrices: Vec<Matrix>,
    thresholds: Vec<f32>,
    x: <Cuda as GemvBackend>::Vector,
    y: <Cuda as GemvBackend>::Vector,
}

/// Which products are timed.
#[derive(Clone, Copy)]
enum What {
    Base,
    Dec,
    Pair,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let config = ModelConfig::preset(&args.model).with_context(|| format!("no model {}", args.model))?;
    let cuda = Cuda::new(0, Options { residuals: args.residuals, ..Options::default() })?;
    println!("# {} {}, decdec {}", cuda.device().name, cuda.device().driver, env!("CARGO_PKG_VERSION"));
    println!("# {}", std::env::args().skip(1).collect::<Vec<_>>().join(" "));
    let kind = if args.format == "ap" { Storage::ANYPREC } else { Storage::lutgemm(128) };
    let link = link(&cuda, kind)?;
    println!("# residuals are read at {link:.1} GB/s at most");
    println!("format,bits,module,in,out,n_tb,k_chunk,base_us,dec_us,pair_us,added_us,slowdown,dec_GB/s,floor_us");
    for &bits in &args.bits {
        for projection in Projection::ALL {
            let (inner, outer) = config.shape(0, projection);
            let mut bench = Bench::new(&cuda, kind, bits, (inner, outer))?;
            let base = bench.time(What::Base, None)?;
            for &k_chunk in &args.k_chunk {
                for &n_tb in &args.n_tb {
                    let selection = if args.exact { Selection::Exact } else { Selection::Bucket };
                    let plan = DecPlan::new(inner, outer, &bench.thresholds, k_chunk, n_tb, selection)?;
                    let (dec, pair) = (bench.time(What::Dec, Some(&plan))?, bench.time(What::Pair, Some(&plan))?);
                    let bytes = (plan.selected() * outer / 2) as f64;
                    println!(
                        "{},{bits},{projection},{inner},{outer},{n_tb},{k_chunk},{base:.2},{dec:.2},{pair:.2},{:.2},\
                         {:.3},{:.1},{:.2}",
                        args.format,
                        pair - base,
                        pair / base,
                        bytes / dec / 1e3,
                        bytes / link / 1e3,
                    );
                }
            }
        }
    }
    Ok(())
}

/// The best rate at which residuals are read, GB/s: every line of a large matrix, by as many blocks as there may be.
fn link(cuda: &Cuda, kind: Storage) -> Result<f64> {
    let (inner, outer) = (4096, 28_672);
    let mut bench = Bench::new(cuda, kind, 3, (inner, outer))?;
    let plan = DecPlan::new(inner, outer, &bench.thresholds, 512, cuda.device().max_n_tb, Selection::Bucket)?;
    let us = bench.time(What::Dec, Some(&plan))?;
    Ok((plan.selected() * outer / 2) as f64 / us / 1e3)
}

impl<'a> Bench<'a> {
    fn new(cuda: &'a Cuda, kind: Storage, bits: usize, (inner, outer): (usize, usize)) -> Result<Self> {
        let linear = RandomWeights::single(inner, outer, kind, bits, 1)?;
        let count = (ROTATION.0 / (inner * outer / 2)).clamp(3, ROTATION.1);
        let matrices = (0..count).map(|_| cuda.matrix(&linear)).collect::<Result<_>>()?;
        let values: Vec<f32> = (0..inner).map(|i| ((i * 7919 % 4001) as f32 / 2000.0 - 1.0).powi(3) * 3.0).collect();
        let (mut x, y) = (cuda.vector(inner)?, cuda.vector(outer)?);
        cuda.write(&values, &mut x)?;
        let thresholds = linear.thresholds.as_deref().context("thresholds")?.to_vec();
        Ok(Self { cuda, matrices, thresholds, x, y })
    }

    /// Median time of one product, microseconds.
    fn time(&mut self, what: What, plan: Option<&DecPlan>) -> Result<f64> {
        let Self { cuda, matrices, x, y, .. } = self;
        let plans = plan.map(|p| matrices.iter().map(|m| cuda.plan(m, p)).collect::<Result<Vec<_>>>()).transpose()?;
        let mut rotation = || -> Result<()> {
            for (i, matrix) in matrices.iter().enumerate() {
                match (what, plans.as_ref().map(|plans| &plans[i])) {
                    (What::Dec, Some(plan)) => cuda.compensate_alone(matrix, plan, x, y)?,
                    (What::Pair, Some(plan)) => cuda.dec_gemv(matrix, plan, x, y)?,
                    _ => cuda.gemv(matrix, x, y)?,
                }
            }
            Ok(())
        };
        let (mut graphs, rows) = (Default::default(), [Rows { slot: 0, position: 0, count: 1 }]);
        for _ in 0..5 {
            cuda.replay(&mut graphs, &rows, &mut rotation)?;
        }
        let mut times = Vec::new();
        for _ in 0..9 {
            let repeats = 10;
            let time =
                cuda.time(&mut || (0..repeats).try_for_each(|_| cuda.replay(&mut graphs, &rows, &mut rotation)))?;
            times.push(time.as_secs_f64() * 1e6 / (repeats * matrices.len()) as f64);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}
