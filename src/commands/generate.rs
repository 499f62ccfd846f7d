//! `decdec generate`

use std::fmt::{self, Display};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use decdec::backend::DecodeBackend;
use decdec::generate::{Finish, Generated, Request, generate, per_second};
use decdec::model::{Compensation, Model, State};
use decdec::open::Opened;
use decdec::sampling::Sampling;
use decdec::tokenizer::{Message, TextStream, Tokenizer};
use decdec::weights::ModelWeights;

use super::devices::{Job, Target, on_device};
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
    let tokenizer = tokenizer.as_ref();
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, min_p: args.min_p };
    let job = Generation { args, opened: &opened, tokenizer, prompt: &prompt, limit, sampling, started };
    on_device(&Target { compile: args.compile, ..Target::of(&args.run) }, job)
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

struct Generation<'a> {
    args: &'a GenerateArgs,
    opened: &'a Opened,
    tokenizer: Option<&'a Tokenizer>,
    prompt: &'a [u32],
    limit: usize,
    sampling: Sampling,
    started: Instant,
}

impl Job for Generation<'_> {
    type Output = ();

    fn needs(&self) -> Option<(&dyn ModelWeights, usize)> {
        Some((self.opened.weights(), self.max_seq_len()))
    }

    fn run<B: DecodeBackend>(self, backend: &B) -> Result<()> {
        let args = self.args;
        let opened = Instant::now();
        let mut model = super::load(backend, self.opened.weights(), args.run.head_bits)?;
        let compensation = super::compensation(&model, &args.model.named.checkpoint_path, &args.run)?;
        model.compensate(compensation.as_ref())?;
        let mut state = model.state(self.max_seq_len())?;
        let loaded = Instant::now();
        model.prepare(&mut state, self.prompt.len(), args.compensate_prompt)?;
        let ready = Instant::now();
        let seed = args.seed.unwrap_or_else(fresh_seed);
        if args.seed.is_none() && self.sampling.temperature > 0.0 {
            tracing::info!("--seed {seed}");
        }
        let samples = args.num_samples.unwrap_or(if args.prompt.is_some() { 1 } else { 5 });
        let mut means = Means::default();
        for i in 0..samples {
            let sample = self.sample(&model, &mut state, i, seed.wrapping_add(i as u64), compensation.as_ref())?;
            if i == 0 {
                tracing::info!(
                    "opened in {:.2} s, loaded in {:.2} s, kernels ready in {:.2} s, first token after {:.2} s",
                    (opened - self.started).as_secs_f64(),
                    (loaded - opened).as_secs_f64(),
                    (ready - loaded).as_secs_f64(),
                    sample.prompt_time.as_secs_f64()
                );
            }
            means.add(&sample, self.prompt.len());
        }
        self.report(means)
    }
}

impl Generation<'_> {
    fn max_seq_len(&self) -> usize {
        self.limit.min(self.prompt.len().saturating_add(self.args.max_new_tokens))
    }

    /// Text goes to stdout when there is a prompt or it was asked for.
    fn prints_text(&self) -> bool {
        !self.args.output.json && self.tokenizer.is_some() && (self.args.print_result || self.args.prompt.is_some())
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

    fn sample<B: DecodeBackend>(
        &self,
        model: &Model<'_, B>,
        state: &mut State<B>,
        index: usize,
        seed: u64,
        compensation: Option<&Compensation>,
    ) -> Result<Generated> {
        let stop_ids = self.tokenizer.filter(|_| !self.args.ignore_eos).map_or(&[][..], Tokenizer::stop_ids);
        let request = Request {
            prompt: self.prompt,
            max_new_tokens: self.args.max_new_tokens,
            sampling: self.sampling,
            seed,
            stop_ids,
            compensate_prompt: self.args.compensate_prompt,
        };
        let interrupted = stop_flag("");
        let stream = self.tokenizer.map(|tokenizer| tokenizer.stream_after(self.prompt));
        let mut writer = Writer::new(stream, &self.args.stop, self.prints_text());
        let made = generate(model, state, &request, |id| writer.push(id, interrupted))?;
        let text = writer.finish()?;
        if self.args.output.json {
            let run = model.backend().device();
            let line = serde_json::json!({
                "sample": index + 1,
                "text": text,
                "tokens": made.tokens,
                "finish": made.finish,
                "prompt_tokens": self.prompt.len(),
                "new_tokens": made.tokens.len(),
                "prompt_seconds": made.prompt_time.as_secs_f64(),
                "decode_seconds": made.decode_time.as_secs_f64(),
                "tokens_per_second": made.tokens_per_second(),
                "decode_tokens_per_second": made.decode_per_second(),
                "seed": seed,
                "temperature": self.sampling.temperature,
                "device": run.id,
                "n_tbs": compensation.map(|c| c.by_bits.iter().map(|l| l.n_tb).collect::<Vec<_>>()),
                "k_chunks": compensation.map(|c| c.by_bits.iter().flat_map(|l| l.k_chunks).collect::<Vec<_>>()),
                "selection": compensation.map(|c| c.selection),
            });
            output::line(line)?;
        }
        if interrupted.load(Ordering::SeqCst) {
            bail!(Interrupted);
        }
        let total = (made.prompt_time + made.decode_time).as_secs_f64();
        self.report(format_args!(
            "Time for inference {}: {total:.2} sec total, {:.2} tokens/sec",
            index + 1,
            made.tokens_per_second()
        ))?;
        if made.finish == Finish::Context {
            tracing::warn!("the context of {} tokens is full", self.limit);
        }
        Ok(made)
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

/// A seed that differs from run to run.
fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // Short enough to be typed back.
    u64::from(now.subsec_nanos()) ^ (now.as_secs() & 0xffff_ffff)
}

/// Text as it is made: whole characters only, ending before a stop text.
struct Writer<'a> {
    stream: Option<TextStream<'a>>, // none where there is no tokenizer: nothing is written then
    stops: &'a [String],
    print: bool,
    text: String,
    printed: usize,
    stopped: bool,
}

impl<'a> Writer<'a> {
    fn new(stream: Option<TextStream<'a>>, stops: &'a [String], print: bool) -> Self {
        Self { stream, stops, print, text: String::new(), printed: 0, stopped: false }
    }

    fn push(&mut self, id: u32, interrupted: &AtomicBool) -> Result<ControlFlow<()>> {
        let piece = self.stream.as_mut().map(|stream| stream.push(id)).transpose()?.flatten();
        if let Some(piece) = piece {
            self.append(&piece)?;
        }
        let end = self.stopped || interrupted.load(Ordering::SeqCst);
        Ok(if end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    fn append(&mut self, piece: &str) -> Result<()> {
        // A stop text may have begun in what is there already.
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut from = self.text.len().saturating_sub(longest);
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        self.text.push_str(piece);
        let found = self.stops.iter().filter(|s| !s.is_empty()).filter_map(|s| self.text[from..].find(s.as_str()));
        if let Some(at) = found.min() {
            self.text.truncate(from + at);
            self.stopped = true;
        }
        let held = if self.stopped { 0 } else { self.may_become_stop() };
        self.print_to(self.text.len() - held)
    }

    /// Bytes at the end of the text with which a stop text may begin.
    fn may_become_stop(&self) -> usize {
        let begins = |stop: &String| {
            (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && self.text.ends_with(&stop[..n])).unwrap_or(0)
        };
        self.stops.iter().map(begins).max().unwrap_or(0)
    }

    fn print_to(&mut self, end: usize) -> Result<()> {
        if self.print && end > self.printed {
            output::text(&self.text.as_bytes()[self.printed..end])?;
        }
        self.printed = self.printed.max(end);
        Ok(())
    }

    fn finish(mut self) -> Result<String> {
        let rest = self.stream.as_mut().map(|stream| stream.flush()).transpose()?.flatten();
        if let Some(rest) = rest.filter(|_| !self.stopped) {
            self.append(&rest)?;
        }
        self.print_to(self.text.len())?;
        if self.print {
            output::line("")?;
        }
        Ok(self.text)
    }
}
