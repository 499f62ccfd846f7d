//! The text that a session makes: what it asks of each pass, and what becomes of the tokens that come.

use std::collections::VecDeque;
use std::time::Instant;

use super::super::answer::Answer;
use super::super::made::{Finish, Piece};
use super::super::speculation::{MOST_GUESSED, Speculate};
use super::{Error, Result, Session};
use crate::model::Part;
use crate::sampling::Sampling;

/// A text that has not ended.
pub(super) struct Making<'e> {
    pub(super) prompt: Vec<u32>,
    pub(super) sampling: Sampling,
    pub(super) draws: Vec<f32>,
    pub(super) compensate_prompt: bool,
    pub(super) stop_ids: Vec<u32>,
    pub(super) answer: Answer<'e>,
    /// The most tokens that are made, and why no more.
    pub(super) most: usize,
    pub(super) limit: Finish,
    pub(super) speculate: Speculate,
    /// What the slot held of the prompt was looked for.
    pub(super) begun: bool,
    /// Tokens asked for, and tokens that have come.
    pub(super) queued: usize,
    pub(super) taken: usize,
    /// What was guessed in the pass that is queued, if it chooses tokens.
    pub(super) guessed: Option<Vec<u32>>,
    /// When the latest pass was asked for.
    pub(super) asked: Instant,
    /// Tokens that have come and were not taken yet.
    pub(super) ready: VecDeque<u32>,
    pub(super) since: Instant,
}

/// What a text wants of a pass.
#[derive(Debug)]
pub(in crate::engine) struct Asked {
    pub(super) slot: usize,
    pub(super) tokens: Option<Vec<u32>>, // none: the one that was chosen last
    pub(super) choices: usize,
    pub(super) compensated: bool,
}

impl Asked {
    /// The same for a model.
    pub(in crate::engine) fn part(&self) -> Part<'_> {
        let Self { slot, choices, compensated, .. } = *self;
        Part { slot, tokens: self.tokens.as_deref(), choices, compensated }
    }

    pub(in crate::engine) fn rows(&self) -> usize {
        self.part().rows()
    }

    pub(in crate::engine) fn choices(&self) -> usize {
        self.choices
    }

    pub(in crate::engine) fn chooses(&self) -> bool {
        self.choices > 0
    }
}

impl Session<'_, '_> {
    /// Rows that were read behind the text.
    pub(super) fn has_been_read(&mut self, asked: &Asked) {
        self.rows += asked.rows();
        if let Some(tokens) = asked.tokens.as_ref().filter(|_| self.text.len() < self.rows) {
            let known = tokens.len() - (self.rows - self.text.len());
            self.text.extend(&tokens[known..]);
        }
    }

    /// How many of `tokens` the session holds from their beginning on.
    pub(in crate::engine) fn in_common(&self, tokens: &[u32]) -> usize {
        self.held().iter().zip(tokens).take_while(|(a, b)| a == b).count()
    }

    /// The text's prompt was read, and its first token is asked for.
    pub(in crate::engine) fn has_read(&self) -> bool {
        self.making.as_ref().is_some_and(|making| making.queued > 0)
    }

    /// What the text wants of the next pass, `room` rows at most. `None` where it wants nothing, as it has ended.
    ///
    /// # Errors
    /// What the device says: the text has failed then.
    pub(in crate::engine) fn ask(&mut self, room: usize) -> Result<Option<Asked>> {
        self.with_making(|session, making| session.asks(making, room))
    }

    /// What [`Session::ask`] wanted is queued.
    pub(in crate::engine) fn sent(&mut self, asked: Asked) {
        if let Some(mut making) = self.making.take() {
            self.is_sent(&mut making, asked);
            self.making = Some(making);
        }
    }

    /// Waits for the tokens of the pass that is queued.
    ///
    /// # Errors
    /// Those of [`Session::next`].
    pub(in crate::engine) fn settle(&mut self) -> Result<()> {
        self.with_making(Self::settles)
    }

    /// The piece of the next token that has come, if one has.
    pub(in crate::engine) fn take_ready(&mut self) -> Option<Result<Option<Piece>>> {
        let token = self.making.as_mut()?.ready.pop_front()?;
        Some(self.with_making(|session, making| session.take(making, token)))
    }

    /// The pass that this text was in has failed.
    pub(in crate::engine) fn give_up(&mut self) {
        self.making = None;
        self.rows = 0;
    }

    fn asks(&mut self, making: &mut Making<'_>, room: usize) -> Result<Option<Asked>> {
        if making.most == 0 {
            self.made.finish = Some(making.limit);
            return Ok(None);
        }
        if !making.begun {
            self.begin(making)?;
        }
        if making.queued > 0 {
            return self.asks_for_next(making, room).map(Some);
        }
        let rest = &making.prompt[self.rows..];
        let tokens = rest[..rest.len().min(room)].to_vec();
        let choices = usize::from(tokens.len() == rest.len());
        let (slot, compensated) = (self.slot, making.compensate_prompt);
        Ok(Some(Asked { slot, tokens: Some(tokens), choices, compensated }))
    }

    /// The token chosen last is read, and behind it what is guessed.
    fn asks_for_next(&mut self, making: &mut Making<'_>, room: usize) -> Result<Asked> {
        making.asked = Instant::now();
        let most = match making.speculate {
            Speculate::Off => 0,
            Speculate::Auto => MOST_GUESSED,
            Speculate::Most(most) => most,
        };
        // The last token needs no row, and none is read behind the end of the context.
        let rows = self.engine.max_seq_len - self.rows - 1;
        let most = most.min(making.most - making.queued - 1).min(room - 1).min(rows);
        let pays = if making.speculate == Speculate::Auto { self.pace.pays(most) } else { most };
        if pays == 0 && most > 0 {
            self.pace.passed_over();
        }
        let mut guessed = if pays > 0 { self.draft.guess(&self.text, pays)? } else { Vec::new() };
        guessed.truncate(pays);
        let choices = guessed.len() + 1;
        let last = self.text.last().copied().filter(|_| !guessed.is_empty());
        let tokens = last.map(|last| std::iter::once(last).chain(guessed).collect());
        Ok(Asked { slot: self.slot, tokens, choices, compensated: true })
    }

    fn is_sent(&mut self, making: &mut Making<'_>, asked: Asked) {
        if making.queued == 0 {
            self.has_been_read(&asked);
        } else {
            // Which of the guesses are right is not known yet.
            self.rows += asked.rows();
        }
        if asked.chooses() {
            let guessed =
                asked.tokens.filter(|_| making.queued > 0).map_or_else(Vec::new, |tokens| tokens[1..].to_vec());
            making.queued += asked.choices;
            making.guessed = Some(guessed);
        }
    }

    /// Waits for what the queued pass has chosen: as many tokens as were guessed right, and one. The others are taken back.
    fn settles(&mut self, making: &mut Making<'_>) -> Result<()> {
        let Some(guessed) = making.guessed.clone() else { return Ok(()) };
        let first = making.queued - guessed.len() - 1;
        let mut runner = self.engine.runner.borrow_mut();
        let mut tokens = Vec::with_capacity(guessed.len() + 1);
        for i in 0..=guessed.len() {
            let token = runner.sampled(self.slot, first + i)?;
            tokens.push(token);
            if guessed.get(i).is_some_and(|&guess| guess != token) {
                break;
            }
        }
        let wrong = guessed.len() + 1 - tokens.len();
        if wrong > 0 {
            let (rows, queued) = (self.rows - wrong, making.queued - wrong);
            let kept = std::mem::replace(&mut self.rows, 0);
            runner.cut(self.slot, rows, queued)?;
            self.rows = kept - wrong;
            making.queued = queued;
        }
        drop(runner);
        making.guessed = None;
        if first > 0 {
            let right = tokens.len() - 1;
            self.pace.took(guessed.len(), making.asked.elapsed().as_secs_f64());
            self.pace.were_right(right, guessed.len().min(right + 1));
            self.made.passes += 1;
            self.made.guessed += guessed.len();
            self.made.right += right;
        }
        making.ready.extend(tokens);
        Ok(())
    }

    /// Keeps what the slot holds of the prompt.
    fn begin(&mut self, making: &mut Making<'_>) -> Result<()> {
        // What was read by other ways is worth more than kernels that are ready together.
        if !self.prepared && self.rows == 0 {
            self.prepare_slot(making.prompt.len())?;
        }
        making.since = Instant::now();
        self.resume(&making.prompt, &making.sampling, &making.draws)?;
        self.made.kept = self.made.kept.max(self.rows);
        making.begun = true;
        if self.engine.runner.borrow().forgets() {
            // What wrong guesses write over is seen by the tokens after them.
            making.speculate = Speculate::Off;
        }
        Ok(())
    }

    pub(super) fn advance(&mut self, making: &mut Making<'_>) -> Result<Option<Piece>> {
        loop {
            self.engine.ensure_running()?;
            if let Some(token) = making.ready.pop_front() {
                return self.take(making, token);
            }
            if making.guessed.is_some() {
                self.settles(making)?;
                continue;
            }
            if making.queued > 0 && making.speculate == Speculate::Off {
                return self.advance_ahead(making);
            }
            let Some(asked) = self.asks(making, self.engine.max_tokens())? else { return Ok(None) };
            let kept = std::mem::replace(&mut self.rows, 0);
            self.engine.runner.borrow_mut().pass(&[asked.part()])?;
            self.rows = kept;
            self.is_sent(making, asked);
        }
    }

    /// The next token. Devices that run on their own get those after it before it is waited for.
    fn advance_ahead(&mut self, making: &mut Making<'_>) -> Result<Option<Piece>> {
        let i = making.taken;
        let mut runner = self.engine.runner.borrow_mut();
        while making.queued < (i + 1 + runner.lookahead()).min(making.most) {
            runner.pass(&[Part::next(self.slot)])?;
            (making.queued, self.rows) = (making.queued + 1, self.rows + 1);
        }
        let token = runner.sampled(self.slot, i)?;
        drop(runner);
        self.made.passes += 1;
        self.take(making, token)
    }

    /// A token has come.
    fn take(&mut self, making: &mut Making<'_>, token: u32) -> Result<Option<Piece>> {
        let i = making.taken;
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
