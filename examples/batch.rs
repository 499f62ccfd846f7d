//! Many prompts, one a line of stdin, made together: `cargo run --release --example batch -- MODEL < prompts.txt`.
//!
//! Each text is what it would be alone. A prompt that does not fit gets its error, and the others go on.

use std::collections::HashMap;
use std::io::{self, BufRead};

use decdec::device::Device;
use decdec::engine::{Engine, ErrorKind, Event, Options, Settings};
use decdec::sampling::Sampling;

fn main() -> anyhow::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "my-model".into());
    let device = Device::open("auto")?;
    let engine = Engine::open(&device, model.as_ref(), &Options { slots: 8, ..Options::default() })?;
    let sampling = Sampling { temperature: 0.7, top_k: 40, ..Sampling::GREEDY };
    let settings = Settings { sampling, max_new_tokens: 40, stop: vec!["\n\n".into()], ..Settings::default() };
    let (mut batch, mut lines) = (engine.batch(), HashMap::new());
    let mut prompts = io::stdin().lock().lines().enumerate().peekable();
    while prompts.peek().is_some() || !batch.is_empty() {
        // As many texts as there are slots; the next one joins when one has left.
        while batch.len() < 8
            && let Some((i, prompt)) = prompts.next()
        {
            match batch.join_text(&prompt?, Settings { seed: i as u64, ..settings.clone() }) {
                Ok(id) => drop(lines.insert(id, i)),
                Err(error) => println!("{i}: {error}"),
            }
        }
        for event in batch.step()? {
            match event {
                Event::Piece(..) => {}
                Event::End(id, made) => {
                    println!("{}: {:?} ({:.1} tokens/s)", lines[&id], made.text, made.tokens_per_second())
                }
                Event::Failed(_, error) if error.kind() == ErrorKind::DeviceLost => return Err(error.into()),
                Event::Failed(id, error) => println!("{}: {error}", lines[&id]),
            }
        }
    }
    Ok(())
}
