//! From logits in host memory to a token, where a device's own sampling does not do: probabilities that are told,
//! penalties, tokens that may not come.

use std::collections::{BTreeMap, BTreeSet};

use super::engine::no_token;
use super::guide::Guide;
use super::job::{Penalties, Rules, Scored};
use super::texts::Choose;
use crate::engine::{Error, Result};
use crate::sampling::{Sampling, draws};

/// How the tokens of one text are chosen.
pub(super) struct Chooser {
    sampling: Sampling,
    draws: Vec<f32>,
    penalties: Penalties,
    bias: Vec<(u32, f32)>,
    logprobs: Option<usize>,
    /// Tokens that end the text, and how many tokens come before the first of them.
    ends: Vec<u32>,
    min_tokens: usize,
    guide: Option<Guide>,
    /// Tokens of the prompt, where repeating them costs.
    prompt: BTreeSet<u32>,
    counts: BTreeMap<u32, usize>,
    made: usize,
}

impl Chooser {
    /// Rules for at most `most` tokens behind `prompt`; `ends` are the tokens that end the text.
    pub(super) fn new(rules: &Rules, prompt: &[u32], ends: Vec<u32>, most: usize) -> Self {
        let repeats = rules.penalties.repetition != 1.0;
        Self {
            sampling: rules.sampling,
            draws: if rules.sampling.temperature > 0.0 { draws(rules.seed, most) } else { Vec::new() },
            penalties: rules.penalties,
            bias: rules.bias.clone(),
            logprobs: rules.logprobs,
            ends,
            min_tokens: rules.min_tokens,
            guide: rules.guide.clone(),
            prompt: if repeats { prompt.iter().copied().collect() } else { BTreeSet::new() },
            counts: BTreeMap::new(),
            made: 0,
        }
    }

    fn needs_logits(&self) -> bool {
        self.penalties != Penalties::NONE
            || !self.bias.is_empty()
            || self.logprobs.is_some()
            || self.guide.is_some()
            || self.min_tokens > 0
    }

    fn draw(&self) -> f32 {
        self.draws.get(self.made).copied().unwrap_or(0.0)
    }

    /// What every step is asked for.
    pub(super) fn asks(&self) -> Choose {
        if self.needs_logits() { Choose::Logits } else { Choose::Token }
    }

    /// How a device chooses.
    pub(super) fn rules(&self) -> (&Sampling, &[f32]) {
        (&self.sampling, &self.draws)
    }

    /// A token by these rules.
    ///
    /// # Errors
    /// Logits that choose nothing.
    pub(super) fn choose(&mut self, logits: &[f32]) -> Result<Scored> {
        let mut ruled = logits.to_vec();
        self.apply(&mut ruled)?;
        let id = self.sampling.choose(&ruled, self.draw()).ok_or_else(no_token)?;
        Ok(scored(logits, id, self.logprobs))
    }

    /// What the rules make of logits.
    fn apply(&mut self, logits: &mut [f32]) -> Result<()> {
        let Penalties { repetition, presence, frequency } = self.penalties;
        if repetition != 1.0 {
            for &id in self.prompt.iter().chain(self.counts.keys().filter(|id| !self.prompt.contains(id))) {
                let logit = &mut logits[id as usize];
                *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            }
        }
        for (&id, &count) in &self.counts {
            logits[id as usize] -= presence + frequency * count as f32;
        }
        for &(id, bias) in &self.bias {
            logits[id as usize] += bias;
        }
        if self.made < self.min_tokens {
            self.ends.iter().for_each(|&id| logits[id as usize] = f32::NEG_INFINITY);
        }
        match &mut self.guide {
            Some(guide) => guide.mask(logits).map_err(Error::from),
            None => Ok(()),
        }
    }

    /// Takes note of a token that was chosen; true where what was asked for is complete with it.
    ///
    /// # Errors
    /// A token that the guide does not allow.
    pub(super) fn took(&mut self, id: u32) -> Result<bool> {
        self.made += 1;
        *self.counts.entry(id).or_default() += 1;
        self.guide.as_mut().map_or(Ok(false), |guide| guide.took(id)).map_err(Error::from)
    }
}

/// A token with its probability and the `top` most probable ones, if they are asked for.
pub(super) fn scored(logits: &[f32], id: u32, top: Option<usize>) -> Scored {
    let Some(count) = top else { return Scored { id, logprob: None, top: Vec::new() } };
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    let log_sum = f64::from(largest) + sum.ln();
    let logprob = |id: u32| (f64::from(logits[id as usize]) - log_sum) as f32;
    let mut ids: Vec<u32> = (0..logits.len() as u32).filter(|&id| !logits[id as usize].is_nan()).collect();
    let descending = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if count > 0 && count < ids.len() {
        ids.select_nth_unstable_by(count - 1, descending);
    }
    ids.truncate(count);
    ids.sort_unstable_by(descending);
    Scored { id, logprob: Some(logprob(id)), top: ids.into_iter().map(|id| (id, logprob(id))).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.5, 2.0, 1.9, -1.0, 2.0];

    fn chooser(rules: Rules) -> Chooser {
        Chooser::new(&rules, &[1], vec![4], 10)
    }

    #[test]
    fn probabilities_add_up_and_the_best_comes_first() {
        let all = scored(&LOGITS, 2, Some(5));
        let sum: f32 = all.top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(all.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 4, 2, 0, 3], "equal ones by their ids");
        assert_eq!(all.logprob, Some(all.top[2].1), "one number in both places");
        assert_eq!(scored(&LOGITS, 2, Some(2)).top, all.top[..2]);
        assert_eq!(scored(&LOGITS, 2, None), Scored { id: 2, logprob: None, top: vec![] });
    }

    #[test]
    fn rules_change_what_is_chosen_and_not_what_is_told() {
        let choose = |rules: Rules, before: &[u32]| {
            let mut chooser = chooser(Rules { logprobs: Some(0), ..rules });
            before.iter().for_each(|&id| assert!(!chooser.took(id).expect("no guide")));
            chooser.choose(&LOGITS).expect("a token")
        };
        let plain = choose(Rules::default(), &[]);
        assert_eq!(plain.id, 1);
        let cost = |penalties| Rules { penalties, ..Rules::default() };
        assert_eq!(choose(cost(Penalties { repetition: 1.5, ..Penalties::NONE }), &[]).id, 4, "the prompt has 1");
        assert_eq!(choose(cost(Penalties { presence: 0.05, ..Penalties::NONE }), &[1, 4, 1]).id, 1);
        assert_eq!(choose(cost(Penalties { presence: 0.2, ..Penalties::NONE }), &[1, 4]).id, 2);
        assert_eq!(choose(cost(Penalties { frequency: 0.05, ..Penalties::NONE }), &[1, 4, 1]).id, 4);
        let biased = choose(Rules { bias: vec![(3, 10.0)], ..Rules::default() }, &[]);
        assert_eq!((biased.id, biased.logprob), (3, scored(&LOGITS, 3, Some(0)).logprob));
        let later = Rules { min_tokens: 2, bias: vec![(4, 1.0)], ..Rules::default() };
        assert_eq!([choose(later.clone(), &[0]).id, choose(later, &[0, 0]).id], [1, 4], "an end may come later");
    }

    #[test]
    fn a_device_chooses_where_it_can() {
        assert_eq!(chooser(Rules::default()).asks(), Choose::Token);
        for rules in [
            Rules { min_tokens: 1, ..Rules::default() },
            Rules { logprobs: Some(0), ..Rules::default() },
            Rules { bias: vec![(1, 1.0)], ..Rules::default() },
            Rules { penalties: Penalties { presence: 0.1, ..Penalties::NONE }, ..Rules::default() },
        ] {
            assert_eq!(chooser(rules).asks(), Choose::Logits);
        }
        let sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        let seeded = chooser(Rules { sampling, seed: 7, ..Rules::default() });
        assert_eq!(seeded.rules(), (&sampling, draws(7, 10).as_slice()));
        // Where the host chooses, the same draws decide.
        let mut by_host = chooser(Rules { sampling, seed: 7, logprobs: Some(0), ..Rules::default() });
        for draw in &draws(7, 10)[..4] {
            let id = by_host.choose(&LOGITS).expect("a token").id;
            assert_eq!(Some(id), sampling.choose(&LOGITS, *draw));
            by_host.took(id).expect("no guide");
        }
    }
}
