//! `decdec generate`

use std::fmt::{self, Display};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use decdec::device;
use decdec::engine::{
    self, Compensate, Drafting, Engine, ErrorKind, Finish, Generated, Session, Settings, Speculate, per_second,
};
use decdec::open::Opened;
use decdec::tokenizer::{Message, Tokenizer};

use super::interrupt::{Interrupted, stop_flag};
use crate::cli::GenerateArgs;
use crate::output;

/// Runs the command.
pub(crate) fn run(args: &GenerateArgs) -> Result<()> {
    let started = Instant::now();
    let opened = super::open(&args.model, args.run.compat_scale_order)?;
    let named = args.model.named.model_name.as_deref();
    opened.expect(args.model.backend, args.model.width.bitwidth, named)?;
    let tokenizer = opened.texts().map(|_| opened.tokenizer()).transpose()?;
    let prompt = match &tokenizer {
        Some(tokenizer) => prompt(args, tokenizer)?,
        None => {
            ensure!(args.prompt.is_none(), "random weights have no tokenizer, leave --prompt out");
            vec![opened.weights().config().bos_token_id.unwrap_or(0)]
        }
    };
    let max = opened.weights().config().max_position_embeddings;
    let limit = args.max_seq_len.unwrap_or(max);
    ensure!(limit <= max, "--max-seq-len is {limit}, 1 to {max} (the model's context) are allowed");
    ensure!(
        prompt.len() <= limit,
        "the prompt has {} tokens, the context has room for {limit}, shorten the prompt",
        prompt.len()
    );
    let device =
        super::devices::open(&args.run, device::Options { compile: args.compile, ..device::Options::default() })?;
    let loading = Instant::now();
    let max_seq_len = limit.min(prompt.len().saturating_add(args.max_new_tokens));
    let engine = super::engine(&device, &opened, &args.run, max_seq_len, true, Compensate::Tuned)?;
    let draft = args.draft.as_deref().map(|path| draft(&device, &opened, path, args, max_seq_len)).transpose()?;
    let mut session = engine.session(settings(args))?;
    if let Some(draft) = &draft {
        session.guess_with(Drafting::new(draft)?);
    }
    let loaded = Instant::now();
    session.prepare(prompt.len())?;
    let ready = Instant::now();
    let seed = args.sampling.seed();
    stop_flag("");
    let samples = args.num_samples.unwrap_or(if args.prompt.is_some() { 1 } else { 5 });
    let (out, mut means) = (Out { args, engine: &engine, limit }, Means::default());
    for i in 0..samples {
        session.settings.seed = seed.wrapping_add(i as u64);
        let sample = out.sample(&mut session, i, &prompt)?;
        if i == 0 {
            tracing::info!(
                "opened in {:.2} s, loaded in {:.2} s, kernels ready in {:.2} s, first token after {:.2} s",
                (loading - started).as_secs_f64(),
                (loaded - loading).as_secs_f64(),
                (ready - loaded).as_secs_f64(),
                sample.prompt_time.as_secs_f64()
            );
        }
        means.add(&sample, prompt.len());
    }
    out.report(means)
}

/// How the flags say that a text is made.
fn settings(args: &GenerateArgs) -> Settings {
    Settings {
        sampling: args.sampling.rules(),
        seed: 0,
        max_new_tokens: args.max_new_tokens,
        stop: args.stop.clone(),
        stop_ids: Vec::new(),
        ignore_eos: args.ignore_eos,
        compensate_prompt: args.compensate_prompt,
        // A draft that nobody asked is there for nothing.
        speculate: match args.speculate {
            Speculate::Off if args.draft.is_some() => Speculate::Auto,
            speculate => speculate,
        },
    }
}

/// The engine that guesses, for a model with the same tokens.
fn draft<'d>(
    device: &'d device::Device,
    opened: &Opened,
    path: &Path,
    args: &GenerateArgs,
    max_seq_len: usize,
) -> Result<Engine<'d>> {
    let said = || format!("--draft {}", path.display());
    let draft = super::locate::open(path, None, args.run.compat_scale_order).with_context(said)?;
    let tokenizer = |opened: &Opened| opened.texts().map(|texts| texts.tokenizer_json.clone());
    ensure!(
        tokenizer(&draft) == tokenizer(opened),
        "{}: it has another tokenizer than the model, give a model of the same family",
        said()
    );
    let context = draft.weights().config().max_position_embeddings;
    let options = engine::Options { max_seq_len: Some(max_seq_len.min(context)), ..engine::Options::default() };
    super::load(device, &draft, &options).with_context(said)
}

/// The tokens to go on from.
fn prompt(args: &GenerateArgs, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let Some(text) = &args.prompt else {
        ensure!(!args.chat, "--chat needs a --prompt");
        let bos = tokenizer.bos().context("the model has no BOS token to start from, give a --prompt")?;
        return Ok(vec![bos]);
    };
    ensure!(!text.is_empty(), "the prompt is empty, give some text, or leave --prompt out to start from BOS");
    if !args.chat {
        return tokenizer.encode(text);
    }
    let mut messages = Vec::new();
    messages.extend(args.system.as_deref().map(|system| Message::new("system", system)));
    messages.push(Message::new("user", text));
    tokenizer.chat_ids(&messages, true)
}

/// What is said of texts, and where.
struct Out<'a, 'd> {
    args: &'a GenerateArgs,
    engine: &'a Engine<'d>,
    limit: usize,
}

impl Out<'_, '_> {
    /// Text goes to stdout when there is a prompt or it was asked for.
    fn prints_text(&self) -> bool {
        !self.args.output.json
            && self.engine.tokenizer().is_ok()
            && (self.args.print_result || self.args.prompt.is_some())
    }

    /// Measurements go to stdout unless text or JSON is there.
    fn report(&self, line: impl Display) -> Result<()> {
        if self.args.output.json || self.prints_text() {
            output::aside(line);
            Ok(())
        } else {
            output::line(line)
        }
    }

    /// Makes one text, independent of those before it, and says it as it is made.
    fn sample(&self, session: &mut Session<'_, '_>, index: usize, prompt: &[u32]) -> Result<Generated> {
        session.clear();
        session.prompt(prompt)?;
        let prints = self.prints_text();
        let mut interrupted = false;
        loop {
            match session.next() {
                Ok(Some(piece)) if prints => output::text(piece.text)?,
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) if error.kind() == ErrorKind::Stopped => {
                    interrupted = true;
                    let rest = session.stop()?;
                    if prints {
                        output::text(rest)?;
                    }
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        if prints {
            output::line("")?;
        }
        let made = session.made().clone();
        if self.args.output.json {
            output::line(self.json(&made, index, prompt.len(), session.settings.seed))?;
        }
        if interrupted {
            bail!(Interrupted);
        }
        let total = (made.prompt_time + made.decode_time).as_secs_f64();
        self.report(format_args!(
            "Time for inference {}: {total:.2} sec total, {:.2} tokens/sec",
            index + 1,
            made.tokens_per_second()
        ))?;
        if session.settings.speculate != Speculate::Off {
            self.report(format_args!(
                "{:.2} tokens a pass: {} of {} guesses were right",
                made.tokens_per_pass(),
                made.right,
                made.guessed
            ))?;
        }
        if made.finish == Some(Finish::Context) {
            tracing::warn!("the context of {} tokens is full", self.limit);
        }
        Ok(made)
    }

    fn json(&self, made: &Generated, index: usize, prompt_tokens: usize, seed: u64) -> serde_json::Value {
        let compensation = self.engine.compensation();
        let compensation = compensation.as_ref();
        serde_json::json!({
            "sample": index + 1,
            "text": made.text,
            "tokens": made.tokens,
            "finish": made.finish,
            "prompt_tokens": prompt_tokens,
            "new_tokens": made.tokens.len(),
            "prompt_seconds": made.prompt_time.as_secs_f64(),
            "decode_seconds": made.decode_time.as_secs_f64(),
            "tokens_per_second": made.tokens_per_second(),
            "decode_tokens_per_second": made.decode_per_second(),
            "tokens_per_pass": made.tokens_per_pass(),
            "passes": made.passes,
            "guessed": made.guessed,
            "guessed_right": made.right,
            "seed": seed,
            "temperature": self.args.sampling.temperature,
            "device": self.engine.device().id,
            "n_tbs": compensation.map(|c| c.by_bits.iter().map(|l| l.n_tb).collect::<Vec<_>>()),
            "k_chunks": compensation.map(|c| c.by_bits.iter().flat_map(|l| l.k_chunks).collect::<Vec<_>>()),
            "selection": compensation.map(|c| c.selection),
        })
    }
}

/// Averages over all samples, prompt and decode apart.
#[derive(Default)]
struct Means {
    samples: usize,
    all: f64,
    prompt: f64,
    decode: f64,
}

impl Means {
    fn add(&mut self, made: &Generated, prompt_tokens: usize) {
        self.samples += 1;
        self.all += made.tokens_per_second();
        self.prompt += per_second(prompt_tokens, made.prompt_time);
        self.decode += made.decode_per_second();
    }
}

impl Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [all, prompt, decode] = [self.all, self.prompt, self.decode].map(|sum| sum / self.samples.max(1) as f64);
        write!(f, "Average tokens/sec: {all:.2} (prompt {prompt:.2} tokens/sec, decode {decode:.2} tokens/sec)")
    }
}
