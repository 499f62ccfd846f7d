//! `decdec chat`: a conversation in the terminal.
//!
//! A line is a message, or a command if it begins with a slash. What was said before stays with the session and is not
//! read again. Ctrl-C ends the answer in the making; between answers the line editor has it.

use std::fs::OpenOptions;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use decdec::device;
use decdec::engine::{Compensate, Engine, ErrorKind, Finish, Session, Settings};
use decdec::model::{Compensation, LayerCompensation};
use decdec::open::Opened;
use decdec::tokenizer::Message;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::interrupt::{self, Answering};
use crate::cli::{ChatArgs, TalkArgs};
use crate::output;

/// What there is besides messages.
const HELP: &str = "\
/system TEXT   what the model is told before the conversation; without a text, nothing
/reset         forget the conversation
/save FILE     write the conversation to a new file, as JSON
/k 0 0 8 8     compensate so many of 1024 channels of qkv, o, gu and d from now on; without numbers, say how many
/help          these lines
/quit          end, as Ctrl-D does";

/// Runs the command.
pub(crate) fn run(args: &ChatArgs) -> Result<()> {
    let opened = super::open(&args.model, args.talk.run.compat_scale_order)?;
    opened.expect(args.model.backend, args.model.width.bitwidth, args.model.named.model_name.as_deref())?;
    talk(&opened, &args.talk)
}

/// Talks with a model until there is nothing more to say.
///
/// # Errors
/// A model without a tokenizer, flags that do not fit it, a device that fails.
pub(crate) fn talk(opened: &Opened, args: &TalkArgs) -> Result<()> {
    ensure!(opened.texts().is_some(), "random weights have no tokenizer, chat with a checkpoint");
    let max = opened.weights().config().max_position_embeddings;
    let limit = args.max_seq_len.unwrap_or(max.min(8192));
    ensure!(limit <= max, "--max-seq-len is {limit}, 1 to {max} (the model's context) are allowed");
    let device = super::devices::open(&args.run, device::Options::default())?;
    let engine = super::engine(&device, opened, &args.run, limit, true, Compensate::Tuned)?;
    let settings = Settings {
        sampling: args.sampling.rules(),
        seed: args.sampling.seed(),
        max_new_tokens: args.max_new_tokens,
        ..Settings::default()
    };
    let mut chat = Chat {
        engine: &engine,
        session: engine.session(settings)?,
        args,
        system: args.system.clone(),
        turns: Vec::new(),
    };
    if let Some(prompt) = &args.prompt {
        chat.answer(prompt)?;
        // Why there is none has been told.
        ensure!(!chat.turns.is_empty(), "the prompt was not answered: shorten it, or give more --max-seq-len");
        return Ok(());
    }
    if io::stdin().is_terminal() { chat.with_editor() } else { chat.with_lines(io::stdin().lock()) }
}

/// A conversation.
struct Chat<'e, 'd> {
    engine: &'e Engine<'d>,
    session: Session<'e, 'd>,
    args: &'e TalkArgs,
    system: Option<String>,
    turns: Vec<Message>,
}

/// What comes after a line.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Line,
    End,
}

impl Chat<'_, '_> {
    /// Lines that are edited, with those before them at hand.
    fn with_editor(&mut self) -> Result<()> {
        output::aside("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends");
        let mut editor = DefaultEditor::new().context("cannot edit lines on this terminal")?;
        interrupt::prompts();
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line);
                    if self.take(&line)? == Next::End {
                        return Ok(());
                    }
                }
                Err(ReadlineError::Interrupted) => output::aside("Ctrl-D or /quit ends"),
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(error).context("cannot read from the terminal"),
            }
        }
    }

    /// Lines as they come, to the last one.
    fn with_lines(&mut self, lines: impl BufRead) -> Result<()> {
        for line in lines.lines() {
            if self.take(&line.context("cannot read from stdin")?)? == Next::End {
                break;
            }
        }
        Ok(())
    }

    /// Does what a line says. A mistake in a command, or a conversation that is too long, is told, and the chat goes on.
    fn take(&mut self, line: &str) -> Result<Next> {
        let line = line.trim();
        let done = match line.split_once(char::is_whitespace).unwrap_or((line, "")) {
            ("", _) => Ok(()),
            ("/quit" | "/exit", _) => return Ok(Next::End),
            ("/help", _) => output::line(HELP),
            ("/reset", _) => {
                self.turns.clear();
                Ok(())
            }
            ("/system", text) => {
                self.system = Some(text.trim().to_owned()).filter(|text| !text.is_empty());
                Ok(())
            }
            ("/save", file) => self.save(file.trim()),
            ("/k", numbers) => self.compensate(numbers),
            (command, _) if command.starts_with('/') => {
                output::aside(format_args!("no command {command}, /help lists those that there are"));
                Ok(())
            }
            _ => return self.answer(line).map(|()| Next::Line),
        };
        if let Err(error) = done {
            // What cannot be written to stdout has nobody to go on for.
            if error.is::<output::Unwritable>() {
                return Err(error);
            }
            output::aside(format_args!("{error:#}"));
        }
        Ok(Next::Line)
    }

    /// All that was said, what the model is told first.
    fn messages(&self) -> Vec<Message> {
        let system = self.system.as_deref().map(|system| Message::new("system", system));
        system.into_iter().chain(self.turns.iter().cloned()).collect()
    }

    /// Says the answer to a message as it is made.
    fn answer(&mut self, message: &str) -> Result<()> {
        self.turns.push(Message::new("user", message));
        if let Err(error) = self.session.prompt_chat(&self.messages()) {
            self.turns.pop();
            if error.kind() == ErrorKind::ContextFull {
                output::aside(format_args!(
                    "{error}: /reset forgets the conversation, --max-seq-len makes room for more"
                ));
                return Ok(());
            }
            return Err(error.into());
        }
        let answering = Answering::begin();
        loop {
            match self.session.next() {
                Ok(Some(piece)) => output::text(piece.text)?,
                Ok(None) => break,
                Err(error) if error.kind() == ErrorKind::Stopped => {
                    output::text(self.session.stop()?)?;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        drop(answering);
        output::line("")?;
        let made = self.session.made();
        self.turns.push(Message::new("assistant", &made.text));
        output::aside(format_args!(
            "({:.1} tokens/s, {} tokens, {} of the conversation read anew{})",
            made.decode_per_second(),
            made.tokens.len(),
            self.session.tokens().len().saturating_sub(made.kept + made.tokens.len()),
            match made.finish {
                Some(Finish::Caller) => ", stopped",
                Some(Finish::Context) => ", the context is full",
                Some(Finish::Length) => ", --max-new-tokens",
                _ => "",
            }
        ));
        Ok(())
    }

    /// Writes the conversation to a file that is not there yet.
    fn save(&self, file: &str) -> Result<()> {
        ensure!(!file.is_empty(), "/save needs the name of a file");
        let said: Vec<_> = self
            .messages()
            .iter()
            .map(|message| serde_json::json!({"role": message.role, "content": message.content}))
            .collect();
        let cannot = || format!("cannot write {file}");
        let mut to = OpenOptions::new().write(true).create_new(true).open(Path::new(file)).with_context(cannot)?;
        to.write_all(&serde_json::to_vec_pretty(&said)?).and_then(|()| to.write_all(b"\n")).with_context(cannot)?;
        output::aside(format_args!("wrote {file}"));
        Ok(())
    }

    /// Changes compensation from the next token on, or says what it is.
    fn compensate(&mut self, numbers: &str) -> Result<()> {
        let now = self.engine.compensation();
        let parsed: Result<Vec<usize>, _> = numbers.split_whitespace().map(str::parse).collect();
        match parsed.as_deref() {
            Ok([]) => {}
            Ok(&[qkv, o, gu, d]) => {
                let k_chunks = [qkv, o, gu, d];
                let default = LayerCompensation::by_default(self.engine.device()).n_tb;
                let n_tb = now.as_ref().and_then(|now| now.by_bits.first()).map_or(default, |own| own.n_tb);
                let by_bits = vec![LayerCompensation { n_tb, k_chunks }];
                let selection = self.args.run.on.selection.into();
                self.engine.compensate(Some(&Compensation { by_bits, selection }))?;
            }
            _ => bail!("/k is followed by {:?}, four numbers are expected, as in /k 0 0 8 8", numbers.trim()),
        }
        match self.engine.compensation() {
            Some(now) => output::aside(LayerCompensation::spelled(&now.by_bits)),
            None => output::aside("nothing is compensated"),
        }
        Ok(())
    }
}
