//! A rule of one's own for the next token: `cargo run --release --example sampler -- MODEL PROMPT`.
//!
//! Here it is the most probable token that is not among the latest 32.

use std::io::{self, Write};

use decdec::device::Device;
use decdec::engine::{Engine, Options, Settings};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (model, prompt) = (args.next().unwrap_or_else(|| "my-model".into()), args.next().unwrap_or("Once".into()));
    let device = Device::open("auto")?;
    let engine = Engine::open(&device, model.as_ref(), &Options::default())?;
    let tokenizer = engine.tokenizer()?;
    let mut session = engine.session(Settings::default())?;
    let mut text = tokenizer.encode(&prompt)?;
    let mut stream = tokenizer.stream_after(&text);
    for _ in 0..100 {
        // Of the whole text, one token is new and is read.
        let logits = session.logits(&text)?;
        let latest = &text[text.len().saturating_sub(32)..];
        let free = (0..logits.len() as u32).filter(|id| !latest.contains(id));
        let Some(next) = free.max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize])) else { break };
        if tokenizer.stop_ids().contains(&next) {
            break;
        }
        text.push(next);
        print!("{}", stream.push(next)?.unwrap_or_default());
        io::stdout().flush()?;
    }
    println!("{}", stream.flush()?.unwrap_or_default());
    Ok(())
}
