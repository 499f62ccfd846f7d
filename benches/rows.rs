//! Steps of several rows, of one text and of several, beside those of one row in the same run; and prompts.
//!
//! `cargo bench --bench rows -- [--device auto] [--model NAME] [--bits 3] [--layers N] [--context 1024] [--k-chunk 0]
//! [--rows 1,2,4,8,16] [--steps 32] [--prompt 2048]`; a model of random numbers, greedy, each step waited for.

use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use decdec::backend::DecodeBackend;
use decdec::config::ModelConfig;
use decdec::dec::Selection;
use decdec::device::{Device, Job};
use decdec::format::Storage;
use decdec::model::{Compensation, Model, Part, State};
use decdec::random::RandomWeights;
use decdec::sampling::Sampling;
use serde_json::json;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "auto")]
    device: String,
    #[arg(long, default_value = "Meta-Llama-3-8B-Instruct")]
    model: String,
    /// So many of its layers only.
    #[arg(long)]
    layers: Option<usize>,
    #[arg(long, default_value_t = 3)]
    bits: usize,
    /// Tokens of each text before the steps.
    #[arg(long, default_value_t = 1024)]
    context: usize,
    #[arg(long, default_value_t = 0)]
    k_chunk: usize,
    #[arg(long, default_value_t = 16)]
    n_tb: usize,
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16")]
    rows: Vec<usize>,
    #[arg(long, default_value_t = 32)]
    steps: usize,
    /// Tokens of prompts that are timed.
    #[arg(long, value_delimiter = ',', default_value = "512")]
    prompt: Vec<usize>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = Device::open(&args.device)?;
    println!("# {} {}", device.info().id, std::env::args().skip(1).collect::<Vec<_>>().join(" "));
    device.run(Measure(&args))
}

struct Measure<'a>(&'a Args);

impl<'d> Job<'d> for Measure<'_> {
    type Output = Result<()>;

    fn run<B: DecodeBackend + 'd>(self, backend: &'d B) -> Result<()> {
        let args = self.0;
        let mut config = ModelConfig::preset(&args.model).with_context(|| format!("no model {}", args.model))?;
        if let Some(layers) = args.layers {
            config = config.with(json!({ "num_hidden_layers": layers }))?;
        }
        let weights = RandomWeights::new(config, Storage::ANYPREC, args.bits, 1)?;
        let mut model = Model::load(backend, &weights, |_| ())?;
        model.compensate(Some(&Compensation::uniform(args.n_tb, args.k_chunk, Selection::Bucket)))?;
        let most = args.rows.iter().copied().max().unwrap_or(1);
        let longest = args.prompt.iter().copied().max().unwrap_or(1).max(args.context + args.steps * 2 * most + 64);
        let mut state = model.state(most, longest)?;
        model.prepare(&mut state, 0, args.context, false)?;
        println!("what,rows,ms,relative,tokens_per_second");
        let one = texts(&model, &mut state, args, 1)?;
        for &rows in &args.rows {
            let several = if rows == 1 { one } else { texts(&model, &mut state, args, rows)? };
            say("texts", rows, several, one);
            say("one text", rows, one_text(&model, &mut state, args, rows)?, one);
        }
        for &tokens in &args.prompt {
            let mut times = Vec::new();
            for _ in 0..4 {
                model.begin(&mut state, 0, &Sampling::GREEDY, &[])?;
                let start = Instant::now();
                model.prompt(&mut state, 0, &vec![1; tokens], false)?;
                model.sampled(&state, 0, 0)?;
                times.push(start.elapsed().as_secs_f64());
            }
            say("prompt", tokens, median(times), one);
        }
        Ok(())
    }
}

fn say(what: &str, rows: usize, seconds: f64, one: f64) {
    println!("{what},{rows},{:.3},{:.2},{:.0}", seconds * 1e3, seconds / one, rows as f64 / seconds);
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn begin<B: DecodeBackend>(model: &Model<'_, B>, state: &mut State<B>, args: &Args, texts: usize) -> Result<()> {
    for slot in 0..texts {
        model.begin(state, slot, &Sampling::GREEDY, &[])?;
        model.prompt(state, slot, &vec![1 + slot as u32; args.context], false)?;
    }
    Ok(())
}

/// Seconds of a step of so many texts, a row of each.
fn texts<B: DecodeBackend>(model: &Model<'_, B>, state: &mut State<B>, args: &Args, texts: usize) -> Result<f64> {
    begin(model, state, args, texts)?;
    let slots: Vec<_> = (0..texts).collect();
    let mut times = Vec::new();
    for i in 0..args.steps {
        let start = Instant::now();
        model.step(state, &slots)?;
        // The last of them, so that all are there.
        model.sampled(state, texts - 1, i + 1)?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(median(times))
}

/// Seconds of a step of so many rows of one text, with a choice after each.
fn one_text<B: DecodeBackend>(model: &Model<'_, B>, state: &mut State<B>, args: &Args, rows: usize) -> Result<f64> {
    begin(model, state, args, 1)?;
    let mut times = Vec::new();
    for i in 0..args.steps {
        let tokens: Vec<_> = (0..rows).map(|row| (7 * i + row) as u32 % 100).collect();
        let start = Instant::now();
        model.pass(state, &[Part { slot: 0, tokens: Some(&tokens), choices: rows, compensated: true }])?;
        model.sampled(state, 0, (i + 1) * rows)?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(median(times))
}
