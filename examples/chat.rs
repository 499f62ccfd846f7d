//! A chat: `cargo run --release --example chat -- MODEL`, one question a line. What was said before is not read again.

use std::io::{self, BufRead, Write};

use decdec::device::Device;
use decdec::engine::{Engine, Options, Settings};
use decdec::tokenizer::Message;

fn main() -> anyhow::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "my-model".into());
    let device = Device::open("auto")?;
    let engine = Engine::open(&device, model.as_ref(), &Options::default())?;
    let mut session = engine.session(Settings { max_new_tokens: 300, ..Settings::default() })?;
    let mut messages = Vec::new();
    for line in io::stdin().lock().lines() {
        messages.push(Message::new("user", &line?));
        session.prompt_chat(&messages)?;
        while let Some(piece) = session.next()? {
            print!("{}", piece.text);
            io::stdout().flush()?;
        }
        println!();
        messages.push(Message::new("assistant", &session.made().text));
    }
    Ok(())
}
