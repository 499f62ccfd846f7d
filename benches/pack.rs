//! Packing weights for CUDA, on the CPU alone: what a load does besides copying.
//!
//! `cargo bench --bench pack -- [--model NAME] [--bits 3,4] [--format ap,lutgemm] [--threads 16]`
//!
//! One layer's four projections and the embedding, best of five; `model_s` is what all layers, the embedding and the
//! head would take.

use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use decdec::backend::cuda::{Dtype, packed};
use decdec::config::{ModelConfig, Projection};
use decdec::format::{Dense, Floats, Storage};
use decdec::random::RandomWeights;
use decdec::weights::Weight;

#[derive(Parser)]
struct Args {
    /// Shapes of this model.
    #[arg(long, default_value = "Meta-Llama-3-8B-Instruct")]
    model: String,
    #[arg(long, value_delimiter = ',', default_value = "3,4")]
    bits: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "ap,lutgemm")]
    format: Vec<String>,
    /// Threads [default: one per core]
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Cargo passes this.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    let config = ModelConfig::preset(&args.model).with_context(|| format!("no model {}", args.model))?;
    println!("# {} threads, decdec {}", rayon::current_num_threads(), env!("CARGO_PKG_VERSION"));
    println!("format,bits,matrix,ms,GB/s,model_s");
    let (width, rows) = (config.hidden_size, config.vocab_size);
    let values = vec![half::f16::ONE; width * rows];
    let table = Weight::Dense(Dense { in_features: width, out_features: rows, values: Floats::F16(values.into()) });
    let dense = time(&table)?;
    println!("dense,16,embedding,{:.2},{:.2},{:.3}", dense.0 * 1e3, dense.1 / dense.0 / 1e9, 2.0 * dense.0);
    for format in &args.format {
        for &bits in &args.bits {
            let (mut layer, mut bytes) = (0.0, 0.0);
            for projection in Projection::ALL {
                let (inner, outer) = config.shape(0, projection);
                let kind = if format == "ap" { Storage::ANYPREC } else { Storage::lutgemm(128) };
                let (seconds, size) = time(&RandomWeights::single(inner, outer, kind, bits, 1)?.weight)?;
                println!("{format},{bits},{projection},{:.2},{:.2},", seconds * 1e3, size / seconds / 1e9);
                layer += seconds;
                bytes += size;
            }
            let model = layer * config.layers.len() as f64 + 2.0 * dense.0;
            println!("{format},{bits},layer,{:.2},{:.2},{model:.3}", layer * 1e3, bytes / layer / 1e9);
        }
    }
    Ok(())
}

/// Seconds and packed bytes.
fn time(weight: &Weight<'_>) -> Result<(f64, f64)> {
    let mut best = (f64::INFINITY, 0.0);
    for _ in 0..5 {
        let start = Instant::now();
        let words = packed(weight, Dtype::Float16)?;
        best = (best.0.min(start.elapsed().as_secs_f64()), (4 * words.len()) as f64);
    }
    Ok(best)
}
