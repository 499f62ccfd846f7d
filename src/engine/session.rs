//! One text that goes on.

use std::time::Instant;

use super::answer::Answer;
use super::made::{Finish, Generated, Piece, Settings};
use super::{Engine, Error, ErrorKind, Result};
use crate::sampling::{self, Sampling};
use crate::tokenizer::{Message, Tokenizer};

/// One text that goes on.
///
/// Each prompt is the whole text to go on from. What it begins with that the session holds is kept, the rest is read
/// with the first [`Session::next`]. So a conversation costs what is new of it. Layers with a window may have forgotten
/// what was kept: then all is read anew.
///
/// What is kept has the numbers that it was read with: tokens that were made are compensated as they were, and a
/// device may round a token otherwise when it is read among many. [`Session::clear`] makes a text independent of the
/// ones before.
pub struct Session<'e, 'd> {
    engine: &'e Engine<'d>,
    slot: usize,
    /// For the next prompt.
    pub settings: Settings,
    /// The text as far as it is known: what was read, then tokens that were made.
    text: Vec<u32>,
    /// Tokens that the slot has read, perhaps more than are known.
    rows: usize,
    /// What the first prompt needs is ready.
    prepared: bool,
    logits: Vec<f32>,
    making: Option<Making<'e>>,
    made: Generated,
}

/// A text that has not ended.
struct Making<'e> {
    prompt: Vec<u32>,
    sampling: Sampling,
    draws: Vec<f32>,
    compensate_prompt: bool,
    stop_ids: Vec<u32>,
    answer: Answer<'e>,
    /// The most tokens that are made, and why no more.
    most: usize,
    limit: Finish,
    /// Tokens asked for, and tokens that have come.
    queued: usize,
    taken: usize,
    since: Instant,
}

impl<'e, 'd> Session<'e, 'd> {
    pub(super) fn new(engine: &'e Engine<'d>, slot: usize, settings: Settings) -> Self {
        Self {
            engine,
            slot,
            settings,
            text: Vec::new(),
            rows: 0,
            prepared: false,
            logits: Vec::new(),
            making: None,
            made: Generated::default(),
        }
    }

    fn tokenizer(&self) -> Option<&'e Tokenizer> {
        self.engine.tokenizer.as_deref()
    }

    /// The text to go on from, as [`Tokenizer::encode`] reads it.
    ///
    /// # Errors
    /// Those of [`Session::prompt`], and a model without a tokenizer.
    pub fn prompt_text(&mut self, text: &str) -> Result<()> {
        let tokens = self.engine.tokenizer()?.encode(text).map_err(Error::input)?;
        self.prompt(&tokens)
    }

    /// The conversation to answer, all of it, in the model's chat template.
    ///
    /// # Errors
    /// Those of [`Session::prompt`], and a model without a chat template.
    pub fn prompt_chat(&mut self, messages: &[Message]) -> Result<()> {
        let tokens = self.engine.tokenizer()?.chat_ids(messages, true).map_err(Error::input)?;
        self.prompt(&tokens)
    }

    /// The text to go on from, as tokens. What was made before ends here.
    ///
    /// # Errors
    /// [`ErrorKind::Input`]: no tokens, one outside the vocabulary, rules that say nothing ([`Sampling::validate`]).
    /// [`ErrorKind::ContextFull`]: more tokens than there is room for. The text is as it was then.
    pub fn prompt(&mut self, tokens: &[u32]) -> Result<()> {
        self.ensure_fits(tokens)?;
        let Settings { sampling, seed, max_new_tokens, .. } = self.settings;
        sampling.validate().map_err(Error::input)?;
        // The last token needs no place in the context: nothing reads it.
        let most = max_new_tokens.min(self.engine.max_seq_len - tokens.len() + 1);
        // As many as there can be, however many were asked for.
        let draws = if sampling.temperature > 0.0 { sampling::draws(seed, most) } else { Vec::new() };
        let own = self.tokenizer().filter(|_| !self.settings.ignore_eos).map_or(&[][..], Tokenizer::stop_ids);
        let stream = self.tokenizer().map(|tokenizer| tokenizer.stream_after(tokens));
        self.leave();
        self.made = Generated::default();
        self.making = Some(Making {
            prompt: tokens.to_vec(),
            sampling,
            draws,
            compensate_prompt: self.settings.compensate_prompt,
            stop_ids: [own, &self.settings.stop_ids].concat(),
            answer: Answer::new(stream, &self.settings.stop),
            most,
            limit: if most < max_new_tokens { Finish::Context } else { Finish::Length },
            queued: 0,
            taken: 0,
            since: Instant::now(),
        });
        Ok(())
    }

    /// Makes ready what a prompt of `tokens` tokens and those after it need, such as compiled kernels; what the session
    /// holds is lost. Without this the first prompt waits for it.
    ///
    /// # Errors
    /// A prompt that there is no room for, or what the device says.
    pub fn prepare(&mut self, tokens: usize) -> Result<()> {
        self.clear();
        let compensated = self.settings.compensate_prompt;
        self.engine.runner.borrow_mut().prepare(self.slot, tokens, compensated)?;
        self.prepared = true;
        Ok(())
    }

    /// The next token and its text; `None` when the text has ended, for which [`Generated::finish`] has the reason.
    ///
    /// # Errors
    /// [`ErrorKind::Stopped`]: the interruption of [`device::Options`](crate::device::Options) came; another call goes
    /// on where it was if that is taken back. Logits that no token can be chosen by, or what the device says: the
    /// session begins its next text anew then.
    #[expect(clippy::should_implement_trait, reason = "an iterator has no place for errors that end it")]
    pub fn next(&mut self) -> Result<Option<Piece>> {
        let Some(mut making) = self.making.take() else { return Ok(None) };
        let piece = self.advance(&mut making);
        match &piece {
            Err(error) if error.kind() == ErrorKind::Stopped => self.making = Some(making),
            Err(_) => self.rows = 0,
            Ok(_) if self.made.finish.is_none() => self.making = Some(making),
            Ok(_) => {}
        }
        piece
    }

    /// Makes all that is left of the text.
    ///
    /// # Errors
    /// Those of [`Session::next`].
    pub fn rest(&mut self) -> Result<&Generated> {
        while self.next()?.is_some() {}
        Ok(&self.made)
    }

    /// Ends the text here, if it has not ended; what was held back of it.
    ///
    /// # Errors
    /// Tokens that the tokenizer cannot decode.
    pub fn stop(&mut self) -> Result<String> {
        let Some(mut making) = self.making.take() else { return Ok(String::new()) };
        self.made.finish = Some(Finish::Caller);
        let rest = making.answer.flush().map_err(Error::input)?;
        self.made.text.push_str(rest);
        Ok(rest.to_owned())
    }

    /// Leaves a text that has not ended.
    fn leave(&mut self) {
        if self.making.take().is_some() {
            self.made.finish = Some(Finish::Caller);
        }
    }

    /// What was made of the latest prompt, so far.
    pub fn made(&self) -> &Generated {
        &self.made
    }

    /// The tokens that the session holds: the latest prompt as far as it was read, and what was made.
    pub fn tokens(&self) -> &[u32] {
        &self.text
    }

    /// Forgets the text.
    pub fn clear(&mut self) {
        self.leave();
        self.text.clear();
        self.rows = 0;
    }

    /// The logits `[vocab_size]` of what follows `tokens`, which are the whole text as in [`Session::prompt`]: for
    /// callers who choose tokens themselves.
    ///
    /// # Errors
    /// Those of [`Session::prompt`] and [`Session::next`].
    pub fn logits(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.ensure_fits(tokens)?;
        self.leave();
        let compensated = self.settings.compensate_prompt;
        let (last, before) = tokens.split_last().expect("at least one");
        self.resume(tokens, &Sampling::GREEDY, &[])?;
        self.extend(before, compensated)?;
        self.read_on(&[*last], compensated)
    }

    /// Reads `tokens`, at most [`Engine::max_tokens`], behind the text that the session holds; the logits of what
    /// follows each of them, `[tokens, vocab_size]`.
    ///
    /// # Errors
    /// Those of [`Session::prompt`] and [`Session::next`], and more tokens than one pass takes.
    pub fn read(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        let (count, most) = (tokens.len(), self.engine.max_tokens());
        if count > most {
            let said = format!("{count} tokens at once, 1 to {most} are allowed, read them in parts");
            return Err(Error::new(ErrorKind::Input, said));
        }
        let held = self.held().to_vec();
        let all = [&held, tokens].concat();
        self.ensure_fits(if tokens.is_empty() { tokens } else { &all })?;
        self.leave();
        self.resume(&all, &Sampling::GREEDY, &[])?;
        let compensated = self.settings.compensate_prompt;
        self.extend(&held, compensated)?;
        self.read_on(tokens, compensated)
    }

    /// Fails for a text that no session can go on from.
    fn ensure_fits(&self, tokens: &[u32]) -> Result<()> {
        let (count, room, vocab) = (tokens.len(), self.engine.max_seq_len, self.engine.config.vocab_size);
        if count == 0 {
            return Err(Error::new(ErrorKind::Input, "the prompt is empty, give at least one token".into()));
        }
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab) {
            let said = format!("token id {id}, the vocabulary ends at {}", vocab - 1);
            return Err(Error::new(ErrorKind::Input, said));
        }
        if count > room {
            let said = format!("the prompt has {count} tokens, the context has room for {room}, shorten the prompt");
            return Err(Error::new(ErrorKind::ContextFull, said));
        }
        Ok(())
    }

    /// The tokens that are known and read.
    fn held(&self) -> &[u32] {
        &self.text[..self.text.len().min(self.rows)]
    }

    /// Cuts the text to what it has in common with `tokens`, the last of which is always read.
    fn resume(&mut self, tokens: &[u32], sampling: &Sampling, draws: &[f32]) -> Result<()> {
        let common = self.held().iter().zip(&tokens[..tokens.len() - 1]).take_while(|(a, b)| a == b).count();
        let mut runner = self.engine.runner.borrow_mut();
        let kept = if runner.keeps(self.slot, common) { common } else { 0 };
        self.rows = 0;
        runner.resume(self.slot, kept, sampling, draws)?;
        self.rows = kept;
        self.text.truncate(kept);
        Ok(())
    }

    /// Reads what is missing of `tokens`, pass by pass.
    fn extend(&mut self, tokens: &[u32], compensated: bool) -> Result<()> {
        for pass in tokens[self.rows.min(tokens.len())..].chunks(self.engine.max_tokens()) {
            self.engine.ensure_running()?;
            let kept = std::mem::replace(&mut self.rows, 0);
            self.engine.runner.borrow_mut().extend(self.slot, pass, compensated)?;
            self.text.extend(pass);
            self.rows = kept + pass.len();
        }
        Ok(())
    }

    fn read_on(&mut self, tokens: &[u32], compensated: bool) -> Result<&[f32]> {
        self.engine.ensure_running()?;
        let kept = std::mem::replace(&mut self.rows, 0);
        self.engine.runner.borrow_mut().logits(self.slot, tokens, compensated, &mut self.logits)?;
        self.text.extend(tokens);
        self.rows = kept + tokens.len();
        Ok(&self.logits)
    }

    /// The first operations of a text: it is read, and the first token is asked for.
    fn begin(&mut self, making: &mut Making<'_>) -> Result<()> {
        // What was read by other ways is worth more than kernels that are ready together.
        if !self.prepared && self.rows == 0 {
            self.prepare(making.prompt.len())?;
        }
        making.since = Instant::now();
        self.resume(&making.prompt, &making.sampling, &making.draws)?;
        self.made.kept = self.made.kept.max(self.rows);
        // The last pass ends with a choice.
        let rest = making.prompt.len() - self.rows;
        let last = match rest % self.engine.max_tokens() {
            0 => self.engine.max_tokens(),
            part => part,
        };
        let (before, last) = making.prompt.split_at(making.prompt.len() - last);
        self.extend(before, making.compensate_prompt)?;
        self.engine.ensure_running()?;
        let kept = std::mem::replace(&mut self.rows, 0);
        self.engine.runner.borrow_mut().prompt(self.slot, last, making.compensate_prompt)?;
        self.text.extend(last);
        self.rows = kept + last.len();
        making.queued = 1;
        Ok(())
    }

    fn advance(&mut self, making: &mut Making<'_>) -> Result<Option<Piece>> {
        if making.most == 0 {
            self.made.finish = Some(making.limit);
            return Ok(None);
        }
        self.engine.ensure_running()?;
        if making.queued == 0 {
            self.begin(making)?;
        }
        let i = making.taken;
        let mut runner = self.engine.runner.borrow_mut();
        // Devices that run on their own get the next tokens before this one is waited for.
        let ahead = if i == 0 { 0 } else { runner.lookahead() };
        while making.queued < (i + 1 + ahead).min(making.most) {
            runner.step(self.slot)?;
            (making.queued, self.rows) = (making.queued + 1, self.rows + 1);
        }
        let token = runner.sampled(self.slot, i)?;
        drop(runner);
        making.taken += 1;
        self.text.push(token);
        let elapsed = making.since.elapsed();
        if i == 0 {
            self.made.prompt_time = elapsed;
        } else {
            self.made.decoded += 1;
            self.made.decode_time = elapsed - self.made.prompt_time;
        }
        let is_end = making.stop_ids.contains(&token);
        let mut text = String::new();
        if is_end {
            self.made.finish = Some(Finish::Stop);
        } else {
            self.made.tokens.push(token);
            text.push_str(making.answer.push(token).map_err(Error::input)?);
            if making.answer.is_stopped() {
                self.made.finish = Some(Finish::Caller);
            } else if making.taken == making.most {
                self.made.finish = Some(making.limit);
            }
        }
        if self.made.finish.is_some() {
            text.push_str(making.answer.flush().map_err(Error::input)?);
            if making.answer.is_stopped() {
                self.made.finish = Some(Finish::Caller);
            }
        }
        self.made.text.push_str(&text);
        Ok((!is_end || !text.is_empty()).then_some(Piece { token: (!is_end).then_some(token), text }))
    }
}

impl Drop for Session<'_, '_> {
    fn drop(&mut self) {
        self.engine.runner.borrow_mut().close(self.slot);
    }
}
