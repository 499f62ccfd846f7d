//! Tokens that are guessed and verified: several in the time of one or two, where the guesses are good.
//!
//! A guess is right where it is the very token that the text would have had: chosen by the same rules, from the same logits,
//! with the same draw. So a text is the same with and without, greedy or not; only the time that it takes is another.

use super::{Engine, ErrorKind, Session, Settings};

/// The most tokens that are guessed at once: with the one that is known, as many rows as a tensor core's product has.
pub const MOST_GUESSED: usize = 7;

/// Tokens that a guess has to have in common with the end of the text, at least, and those that are looked at.
const SHORTEST: usize = 2;
const LONGEST: usize = 8;

/// Whether tokens are guessed ahead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Speculate {
    /// Never: every pass makes one token.
    #[default]
    Off,
    /// As many as pays: by what passes have cost so far, and by how many guesses were right.
    Auto,
    /// So many, 1 to 7, wherever there is a guess.
    Most(usize),
}

/// Where guesses come from.
pub trait Draft {
    /// At most `most` tokens that may follow `text`; none where there is no guess.
    ///
    /// # Errors
    /// What a device says.
    fn guess(&mut self, text: &[u32], most: usize) -> super::Result<Vec<u32>>;
}

/// Guesses from the text itself: what followed the last time that it had the same few tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lookup;

impl Draft for Lookup {
    fn guess(&mut self, text: &[u32], most: usize) -> super::Result<Vec<u32>> {
        Ok(look_up(text, most).to_vec())
    }
}

/// Guesses of another model, one with fewer weights.
pub struct Drafting<'e, 'd>(Session<'e, 'd>);

impl<'e, 'd> Drafting<'e, 'd> {
    /// `engine` makes the guesses: of a model with the same tokens.
    ///
    /// # Errors
    /// Those of [`Engine::session`].
    pub fn new(engine: &'e Engine<'d>) -> super::Result<Self> {
        Ok(Self(engine.session(Settings { ignore_eos: true, ..Settings::default() })?))
    }
}

impl Draft for Drafting<'_, '_> {
    /// The most probable tokens; none where the text is longer than the model's context.
    fn guess(&mut self, text: &[u32], most: usize) -> super::Result<Vec<u32>> {
        self.0.settings.max_new_tokens = most;
        match self.0.prompt(text) {
            Err(error) if matches!(error.kind(), ErrorKind::ContextFull | ErrorKind::Input) => return Ok(Vec::new()),
            said => said?,
        }
        Ok(self.0.rest()?.tokens.clone())
    }
}

/// What followed the latest of the places in `text` that have the most tokens, two to eight, in common with its end.
fn look_up(text: &[u32], most: usize) -> &[u32] {
    let mut best = (SHORTEST - 1, text.len());
    for end in (1..text.len()).rev() {
        let pairs = text[..end].iter().rev().zip(text.iter().rev()).take(LONGEST);
        let common = pairs.take_while(|(a, b)| a == b).count();
        if common > best.0 {
            best = (common, end);
        }
        if common == LONGEST {
            break;
        }
    }
    let follows = &text[best.1..];
    &follows[..follows.len().min(most)]
}

/// What guessing has cost and brought so far.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    /// Seconds of a pass of so many rows and one, a running mean; 0 where there was none.
    seconds: [f64; MOST_GUESSED + 1],
    /// The share of guesses that are right.
    right: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { seconds: [0.0; MOST_GUESSED + 1], right: HOPED }
    }
}

/// The share of right guesses that is hoped for where nothing is known; also what an estimate returns to while it goes
/// without guesses, so that they are tried again.
const HOPED: f64 = 0.6;

/// How much a pass is thought to cost more for each row, before it was tried: too little, so that it is.
const ROW: f64 = 0.05;

impl Pace {
    /// How many of `most` guesses pay: as many tokens a second as possible.
    pub(super) fn pays(&self, most: usize) -> usize {
        let of_one = if self.seconds[0] > 0.0 { self.seconds[0] } else { 1.0 };
        let seconds = |guessed: usize| match self.seconds[guessed] {
            0.0 => of_one * (1.0 + ROW * guessed as f64),
            seconds => seconds,
        };
        let tokens = |guessed: usize| (0..=guessed as i32).map(|i| self.right.powi(i)).sum::<f64>();
        let speed = |guessed: usize| tokens(guessed) / seconds(guessed);
        (0..=most.min(MOST_GUESSED)).max_by(|&a, &b| speed(a).total_cmp(&speed(b))).unwrap_or(0)
    }

    /// A pass with so many guesses has taken so long.
    pub(super) fn took(&mut self, guessed: usize, seconds: f64) {
        let mean = &mut self.seconds[guessed];
        *mean = if *mean == 0.0 { seconds } else { 0.8 * *mean + 0.2 * seconds };
    }

    /// Of `looked_at` guesses, `right` were right.
    pub(super) fn were_right(&mut self, right: usize, looked_at: usize) {
        for i in 0..looked_at {
            self.right = 0.9 * self.right + if i < right { 0.1 } else { 0.0 };
        }
    }

    /// There was a guess that did not pay.
    pub(super) fn passed_over(&mut self) {
        self.right += 0.01 * (HOPED - self.right);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_longest_and_latest_match_is_guessed() {
        let guess = |text: &[u32], most| look_up(text, most).to_vec();
        assert_eq!(guess(&[1, 2, 3, 4, 9, 1, 2, 3], 7), [4, 9, 1, 2, 3]);
        assert_eq!(guess(&[1, 2, 3, 4, 9, 1, 2, 3], 2), [4, 9]);
        // The longer match, though another is later; of equals the later one.
        assert_eq!(guess(&[7, 1, 2, 5, 1, 2, 6, 7, 1, 2], 1), [5]);
        assert_eq!(guess(&[1, 2, 5, 1, 2, 6, 1, 2], 1), [6]);
        // One token in common is none, nor is there one where nothing repeats.
        assert_eq!(guess(&[1, 2, 3, 1], 7), [0u32; 0]);
        assert_eq!(guess(&[1, 2, 3], 7), [0u32; 0]);
        assert_eq!(guess(&[], 7), [0u32; 0]);
        assert_eq!(guess(&[4, 4, 4, 4], 7), [4]);
    }

    #[test]
    fn guesses_are_made_where_they_pay() {
        let mut pace = Pace::default();
        pace.took(0, 1.0);
        assert!(pace.pays(7) > 0, "untried, they are tried");
        // Rows that cost as much as passes: nothing pays, however good.
        (1..=7).for_each(|n| pace.took(n, 1.0 + n as f64));
        pace.were_right(50, 50);
        assert_eq!(pace.pays(7), 0);
        let mut cheap = Pace::default();
        (0..=7).for_each(|n| cheap.took(n, 1.0 + 0.05 * n as f64));
        cheap.were_right(50, 50);
        assert_eq!((cheap.pays(7), cheap.pays(3)), (7, 3));
        cheap.were_right(0, 60);
        assert_eq!(cheap.pays(7), 0, "wrong guesses do not pay");
        (0..200).for_each(|_| cheap.passed_over());
        assert!(cheap.pays(7) > 0, "they are tried again");
    }
}
