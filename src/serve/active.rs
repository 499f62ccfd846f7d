//! A text that has a slot.

use std::time::{Duration, Instant};

use super::choose::{Chooser, scored};
use super::job::{End, Event, Finish, Job, Scored};
use super::line::SlotView;
use super::metrics::Metrics;
use super::texts::{Choose, Chosen, Reading};
use crate::engine::answer::Answer;
use crate::engine::{Error, ErrorKind, Result};
use crate::sampling::Sampling;
use crate::tokenizer::Tokenizer;

/// The most tokens whose probabilities are computed in one step.
const SCORED: usize = 64;

/// A text that has a slot.
pub(super) struct Active<'t> {
    job: Job,
    tokenizer: &'t Tokenizer,
    chooser: Chooser,
    answer: Answer<'t>,
    /// Tokens of the prompt that are read.
    read: usize,
    cached: usize,
    made: Vec<u32>,
    most: usize,
    /// Its tokens were not all read in the same way: none of them are kept.
    is_mixed: bool,
    begun: Instant,
    first: Option<Instant>,
    last: Instant,
}

/// What a text reads in a step.
pub(super) struct Step {
    pub(super) tokens: Vec<u32>,
    pub(super) is_prompt: bool,
    compensated: bool,
    choose: Choose,
}

impl Step {
    /// Tokens that are compensated where the model is.
    pub(super) fn compensated(&self) -> usize {
        if self.compensated { self.tokens.len() } else { 0 }
    }

    pub(super) fn reading(&self, slot: usize) -> Reading<'_> {
        Reading { slot, tokens: &self.tokens, compensated: self.compensated, choose: self.choose }
    }
}

impl<'t> Active<'t> {
    /// A text of which nothing is read.
    pub(super) fn new(job: Job, max_seq_len: usize, tokenizer: &'t Tokenizer) -> Self {
        let rules = &job.rules;
        // The last token needs no place in the context: nothing reads it.
        let most = rules.max_tokens.min((max_seq_len + 1).saturating_sub(job.prompt.len()));
        let own = if rules.ignore_eos { &[][..] } else { tokenizer.stop_ids() };
        let chooser = Chooser::new(rules, &job.prompt, [own, &rules.stop_ids].concat(), most);
        let answer = Answer::new(Some(tokenizer.stream_after(&job.prompt)), &rules.stop);
        let now = Instant::now();
        let made = Vec::new();
        Self {
            job,
            tokenizer,
            chooser,
            answer,
            read: 0,
            cached: 0,
            made,
            most,
            is_mixed: false,
            begun: now,
            first: None,
            last: now,
        }
    }

    /// Its slot holds the first `cached` tokens of its prompt.
    pub(super) fn begin(&mut self, cached: usize) {
        (self.read, self.cached) = (cached, cached);
        self.say(Event::Begun { cached });
    }

    /// What is read from now on is compensated otherwise.
    pub(super) fn mix(&mut self) {
        self.is_mixed = true;
    }

    /// How its tokens are chosen on a device.
    pub(super) fn rules(&self) -> (&Sampling, &[f32]) {
        self.chooser.rules()
    }

    /// Nobody listens any more.
    pub(super) fn is_gone(&self) -> bool {
        self.job.events.is_closed()
    }

    /// Its prompt is read.
    pub(super) fn goes_on(&self) -> bool {
        self.read == self.job.prompt.len()
    }

    /// When it was asked for.
    pub(super) fn since(&self) -> Instant {
        self.job.since
    }

    pub(super) fn say(&self, event: Event) {
        self.job.say(event);
    }

    /// The tokens that the slot may be gone on from, and whether they are compensated; `uniform` says that nothing is.
    pub(super) fn held(self, uniform: bool) -> (Vec<u32>, bool) {
        let compensated = self.job.rules.compensate_prompt;
        if self.is_mixed {
            return (Vec::new(), compensated);
        }
        let mut held = self.job.prompt;
        held.truncate(self.read);
        if uniform || compensated {
            held.extend(self.made.split_last().map_or(&[][..], |(_, read)| read));
        }
        (held, compensated)
    }

    /// What it reads next: at most `room` tokens of its prompt, or the token that was made last.
    pub(super) fn next_step(&self, room: usize) -> Option<Step> {
        let (prompt, rules) = (&self.job.prompt, &self.job.rules);
        if self.goes_on() {
            let tokens = vec![*self.made.last()?];
            return Some(Step { tokens, is_prompt: false, compensated: true, choose: self.chooser.asks() });
        }
        // Logits of many tokens take memory: 64 of 128,256 each are 33 MB.
        let room = if rules.scores_prompt { room.min(SCORED) } else { room };
        let end = prompt.len().min(self.read + room);
        let tokens = prompt[self.read..end].to_vec();
        let choose = match (rules.scores_prompt, end == prompt.len() && self.most > 0) {
            (true, _) => Choose::AllLogits,
            (false, true) => self.chooser.asks(),
            (false, false) => Choose::Nothing,
        };
        (room > 0).then_some(Step { tokens, is_prompt: true, compensated: rules.compensate_prompt, choose })
    }

    /// Takes what came of a step; why the text ends, if it does.
    ///
    /// # Errors
    /// Logits that choose nothing, tokens that cannot be decoded.
    pub(super) fn took(&mut self, step: &Step, chosen: Chosen, metrics: &Metrics) -> Result<Option<Finish>> {
        let before = self.read;
        if step.is_prompt {
            self.read += step.tokens.len();
        }
        let token = match chosen {
            Chosen::Nothing => None,
            Chosen::Token(id) => Some(Scored { id, logprob: None, top: Vec::new() }),
            Chosen::Logits(logits) if step.choose == Choose::AllLogits => self.score(before, &logits)?,
            Chosen::Logits(logits) => Some(self.chooser.choose(&logits)?),
        };
        let is_read = self.read == self.job.prompt.len();
        match token {
            Some(token) => self.take(token, metrics),
            None if is_read && self.most == 0 => Ok(Some(Finish::Length)),
            None if is_read => Err(Error::new(ErrorKind::Other, "the model chose no token".into())),
            None => Ok(None),
        }
    }

    /// Tells the probabilities of the prompt's tokens behind `before`; the first token behind the prompt, if it is to
    /// be made.
    fn score(&mut self, before: usize, logits: &[f32]) -> Result<Option<Scored>> {
        let prompt = &self.job.prompt;
        let top = self.job.rules.logprobs;
        let rows: Vec<&[f32]> = logits.chunks(logits.len() / (self.read - before)).collect();
        let mut scores = Vec::new();
        if before == 0 {
            scores.push(Scored { id: prompt[0], logprob: None, top: Vec::new() });
        }
        for (row, &id) in rows.iter().zip(&prompt[before + 1..]) {
            scores.push(scored(row, id, top));
        }
        self.say(Event::Prompt(scores));
        match rows.last() {
            Some(row) if self.read == self.job.prompt.len() && self.most > 0 => Ok(Some(self.chooser.choose(row)?)),
            _ => Ok(None),
        }
    }

    /// Takes a token that was made.
    fn take(&mut self, token: Scored, metrics: &Metrics) -> Result<Option<Finish>> {
        let now = Instant::now();
        match self.first {
            None => {
                self.first = Some(now);
                metrics.first_token.add(self.job.since.elapsed());
            }
            Some(_) => metrics.between.add(now - self.last),
        }
        self.last = now;
        metrics.made.inc();
        metrics.speed.inc();
        let id = token.id;
        self.made.push(id);
        let rules = &self.job.rules;
        let own_end = !rules.ignore_eos && self.tokenizer.stop_ids().contains(&id);
        let may_end = self.made.len() > rules.min_tokens;
        let end = match () {
            () if !may_end => None,
            () if rules.stop_ids.contains(&id) => Some(Finish::Token(id)),
            () if own_end => Some(Finish::Stop),
            () => None,
        };
        if end.is_some() {
            return self.close(None, end);
        }
        let complete = self.chooser.took(id)?;
        let mut text = String::new();
        if rules.special_text || !self.tokenizer.is_special(id) {
            text.push_str(self.answer.push(id).map_err(Error::from)?);
        }
        if complete || self.answer.is_stopped() || self.made.len() == self.most {
            let end = if complete { Finish::Stop } else { Finish::Length };
            return self.close(Some((text, token)), Some(end));
        }
        self.say(Event::Made { text, token: Some(token) });
        Ok(None)
    }

    /// Tells what was held back with the last token.
    fn close(&mut self, last: Option<(String, Scored)>, end: Option<Finish>) -> Result<Option<Finish>> {
        let (mut text, token) = last.map_or((String::new(), None), |(text, token)| (text, Some(token)));
        text.push_str(self.answer.flush().map_err(Error::from)?);
        if token.is_some() || !text.is_empty() {
            self.say(Event::Made { text, token });
        }
        let stopped = self.answer.stopped_by().map(|stop| Finish::Text(stop.to_owned()));
        Ok(stopped.or(end))
    }

    pub(super) fn end(&self, finish: Finish) -> End {
        let first = self.first.unwrap_or(self.begun);
        End {
            finish,
            prompt_tokens: self.job.prompt.len(),
            cached: self.cached,
            made: self.made.len(),
            waited: self.begun - self.job.since,
            prompt_time: first - self.begun,
            decode_time: if self.first.is_some() { self.last - first } else { Duration::ZERO },
        }
    }

    pub(super) fn view(&self, id: usize) -> SlotView {
        let (prompt_tokens, made) = (self.job.prompt.len(), self.made.len());
        SlotView { id, is_processing: true, prompt_tokens, read: self.read, made, held: self.read + made }
    }
}
