//! How well a model predicts a text: `cargo run --release --example perplexity -- MODEL FILE [TOKENS]`.

use anyhow::Context;
use decdec::device::Device;
use decdec::engine::{Engine, Options};
use decdec::eval;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (model, file) = (args.next().context("no MODEL")?, args.next().context("no FILE")?);
    let window = args.next().map_or(Ok(512), |tokens| tokens.parse())?;
    let device = Device::open("auto")?;
    let engine = Engine::open(&device, model.as_ref(), &Options { max_seq_len: Some(window), ..Options::default() })?;
    let tokens = engine.tokenizer()?.encode(&std::fs::read_to_string(file)?)?;
    let windows = eval::windows(&tokens, window, 0..tokens.len() / window)?;
    let evaluation = eval::perplexity(&engine, None, &windows, |done| {
        eprintln!("{done} of {} windows", windows.len());
        Ok(())
    })?;
    println!("perplexity {:.3} over {} tokens", evaluation.perplexity, evaluation.predictions);
    Ok(())
}
