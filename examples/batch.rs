//! Many prompts, one a line of stdin: `cargo run --release --example batch -- MODEL < prompts.txt`.
//!
//! A prompt that does not fit gets its error, and the others go on.

use std::io::{self, BufRead};

use decdec::device::Device;
use decdec::engine::{Engine, ErrorKind, Options, Settings};
use decdec::sampling::Sampling;

fn main() -> anyhow::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "my-model".into());
    let device = Device::open("auto")?;
    let engine = Engine::open(&device, model.as_ref(), &Options::default())?;
    let sampling = Sampling { temperature: 0.7, top_k: 40, ..Sampling::GREEDY };
    let settings = Settings { sampling, max_new_tokens: 40, stop: vec!["\n\n".into()], ..Settings::default() };
    // What prompts begin with in common is read once.
    let mut session = engine.session(settings)?;
    for (i, prompt) in io::stdin().lock().lines().enumerate() {
        session.settings.seed = i as u64;
        let made = session.prompt_text(&prompt?).and_then(|()| session.rest());
        match made {
            Ok(made) => println!("{i}: {:?} ({:.1} tokens/s)", made.text, made.tokens_per_second()),
            Err(error) if error.kind() == ErrorKind::DeviceLost => return Err(error.into()),
            Err(error) => println!("{i}: {error}"),
        }
    }
    Ok(())
}
