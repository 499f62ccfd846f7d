//! One text that goes on.

mod making;

use std::time::Instant;

use super::answer::Answer;
use super::made::{Finish, Generated, Piece, Settings};
use super::speculation::{Draft, Lookup, MOST_GUESSED, Pace, Speculate};
use super::{Engine, Error, ErrorKind, Result};
use crate::sampling::{self, Sampling};
use crate::tokenizer::{Message, Tokenizer};

pub(super) use making::Asked;

use making::Making;

/// One text that goes on.
///
/// Each prompt is the whole text to go on from. What it begins with that the session holds is kept, the rest is read
/// with the first [`Session::next`]. So a conversation costs what is new of it. Layers with a window may have forgotten
/// what was kept: then all is read anew.
///
/// What is kept has the numbers that it was read with: tokens that were made are compensated as they were.
/// [`Session::clear`] makes a text independent of the ones before.
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
    draft: Box<dyn Draft + 'e>,
    pace: Pace,
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
            draft: Box::new(Lookup),
            pace: Pace::default(),
        }
    }

    /// Guesses come from `draft` from now on, where the settings say that there are to be any; otherwise they come from the
    /// text itself.
    pub fn guess_with(&mut self, draft: impl Draft + 'e) {
        self.draft = Box::new(draft);
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
        let Settings { sampling, seed, max_new_tokens, speculate, .. } = self.settings;
        sampling.validate().map_err(Error::input)?;
        if let Speculate::Most(most) = speculate
            && !(1..=MOST_GUESSED).contains(&most)
        {
            let said = format!("{most} tokens are to be guessed at once, 1 to {MOST_GUESSED} are supported");
            return Err(Error::new(ErrorKind::Input, said));
        }
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
            speculate: self.settings.speculate,
            begun: false,
            queued: 0,
            taken: 0,
            guessed: None,
            asked: Instant::now(),
            ready: Default::default(),
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
        self.prepare_slot(tokens)
    }

    fn prepare_slot(&mut self, tokens: usize) -> Result<()> {
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
        if self.making.is_none() {
            return Ok(None);
        }
        self.with_making(Self::advance)
    }

    /// `work` on the text that is made, which goes on afterwards unless it has ended or failed.
    fn with_making<T>(&mut self, work: impl FnOnce(&mut Self, &mut Making<'e>) -> Result<T>) -> Result<T> {
        let said = "no text is made, give the session a prompt first";
        let mut making = self.making.take().ok_or_else(|| Error::new(ErrorKind::Input, said.into()))?;
        let done = work(self, &mut making);
        match &done {
            Err(error) if error.kind() == ErrorKind::Stopped => self.making = Some(making),
            Err(_) => self.rows = 0,
            Ok(_) if self.made.finish.is_none() => self.making = Some(making),
            Ok(_) => {}
        }
        done
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
            self.pass(Asked { slot: self.slot, tokens: Some(pass.to_vec()), choices: 0, compensated })?;
        }
        Ok(())
    }

    /// A pass for this text alone.
    fn pass(&mut self, asked: Asked) -> Result<()> {
        self.engine.ensure_running()?;
        let kept = std::mem::replace(&mut self.rows, 0);
        self.engine.runner.borrow_mut().pass(&[asked.part()])?;
        self.rows = kept;
        self.has_been_read(&asked);
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
}

impl Drop for Session<'_, '_> {
    fn drop(&mut self) {
        self.engine.runner.borrow_mut().close(self.slot);
    }
}
