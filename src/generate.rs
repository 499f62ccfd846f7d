//! Text from a prompt: read it, sample token after token, stop, measure.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::backend::DecodeBackend;
use crate::model::{Model, State};
use crate::sampling::{self, Sampling};

/// One text to make.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// What to go on from; at least one token.
    pub prompt: &'a [u32],
    /// The most tokens to make.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Decides every choice, with `sampling`.
    pub seed: u64,
    /// Tokens that end the text.
    pub stop_ids: &'a [u32],
    /// Compensate the prompt too, as is done for every later token.
    pub compensate_prompt: bool,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// One of the tokens that end a text.
    Stop,
    /// The most tokens asked for.
    Length,
    /// The model's context is full.
    Context,
    /// The caller had enough: a stop text, or Ctrl-C.
    Caller,
}

/// What came of a [`Request`].
#[derive(Debug, Clone)]
pub struct Generated {
    /// Tokens made, the one that ended the text not among them.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// From the first operation to the first token.
    pub prompt_time: Duration,
    /// From the first token to the last.
    pub decode_time: Duration,
    /// Tokens decoded in `decode_time`: all but the first, the one that ended the text among them.
    pub decoded: usize,
}

impl Generated {
    /// Tokens made each second, the prompt's time included, as the reference counts.
    pub fn tokens_per_second(&self) -> f64 {
        per_second(self.tokens.len(), self.prompt_time + self.decode_time)
    }

    /// Tokens decoded each second, the prompt left out; 0 when there was at most one.
    pub fn decode_per_second(&self) -> f64 {
        per_second(self.decoded, self.decode_time)
    }
}

/// `count / time`; 0 where no time has passed, so that it is a number whatever was asked for.
pub fn per_second(count: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// Makes one text; `on_token` hears each token in order and may end it.
///
/// # Errors
/// An empty prompt, one longer than the state has room for, a state of another model, rules that say nothing
/// ([`Sampling::validate`]), logits that no token can be chosen by since the largest is not a finite number, what
/// `on_token` says, or a failing device.
pub fn generate<B: DecodeBackend>(
    model: &Model<'_, B>,
    state: &mut State<B>,
    request: &Request<'_>,
    mut on_token: impl FnMut(u32) -> Result<ControlFlow<()>>,
) -> Result<Generated> {
    let backend = model.backend();
    let (prompt, context) = (request.prompt.len(), state.max_seq_len());
    ensure!(prompt > 0, "the prompt is empty, give at least one token");
    ensure!(
        prompt <= context,
        "the prompt has {prompt} tokens, the context has room for {context}, shorten the prompt"
    );
    // The last token needs no place in the context: nothing reads it.
    let most = request.max_new_tokens.min(context - prompt + 1);
    // As many as there can be, however many were asked for.
    let draws = if request.sampling.temperature > 0.0 { sampling::draws(request.seed, most) } else { Vec::new() };
    model.begin(state, &request.sampling, &draws)?;
    let mut made = Generated {
        tokens: Vec::new(),
        finish: if most < request.max_new_tokens { Finish::Context } else { Finish::Length },
        prompt_time: Duration::ZERO,
        decode_time: Duration::ZERO,
        decoded: 0,
    };
    if most == 0 {
        return Ok(made);
    }
    let start = Instant::now();
    model.prompt(state, request.prompt, request.compensate_prompt)?;
    let mut queued = 1;
    for i in 0..most {
        // Devices that run on their own get the next tokens before this one is waited for.
        let ahead = if i == 0 { 0 } else { backend.device().lookahead };
        while queued < (i + 1 + ahead).min(most) {
            model.step(state)?;
            queued += 1;
        }
        let token = model.sampled(state, i)?;
        if i == 0 {
            made.prompt_time = start.elapsed();
        } else {
            made.decoded += 1;
            made.decode_time = start.elapsed() - made.prompt_time;
        }
        if request.stop_ids.contains(&token) {
            made.finish = Finish::Stop;
            break;
        }
        made.tokens.push(token);
        if on_token(token)?.is_break() {
            made.finish = Finish::Caller;
            break;
        }
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::config::ModelConfig;
    use crate::format::Storage;
    use crate::random::RandomWeights;

    /// However many tokens are asked for, there are as many as the context has room for, and rates are numbers.
    #[test]
    fn counts_are_bounded_by_the_room() {
        let preset = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap();
        let config = preset.with(serde_json::json!({
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 32,
        }));
        let config = config.unwrap();
        let weights = RandomWeights::new(config, Storage::ANYPREC, 3, 1).unwrap();
        let backend = Cpu::new();
        let model = Model::load(&backend, &weights, |_| ()).unwrap();
        let mut state = model.state(8).unwrap();
        let prompt = [1, 2, 3];
        for temperature in [0.0, 1.0] {
            let mut make = |max_new_tokens| {
                let sampling = Sampling { temperature, ..Sampling::GREEDY };
                let stop_ids = &[][..];
                let (prompt, seed, compensate_prompt) = (&prompt[..], 7, false);
                let request = Request { prompt, max_new_tokens, sampling, seed, stop_ids, compensate_prompt };
                generate(&model, &mut state, &request, |_| Ok(ControlFlow::Continue(()))).unwrap()
            };
            // Of the eight places three are taken, and the last token needs none.
            for (asked, expected) in [(0, 0), (1, 1), (6, 6), (7, 6), (1 << 40, 6), (1 << 63, 6), (usize::MAX, 6)] {
                let made = make(asked);
                assert_eq!(made.tokens.len(), expected, "{asked} at temperature {temperature}");
                assert_eq!(made.finish, if asked > 6 { Finish::Context } else { Finish::Length }, "{asked}");
                assert!(made.tokens_per_second().is_finite() && made.decode_per_second().is_finite(), "{asked}");
                assert_eq!(made.tokens, make(6).tokens[..expected], "the same draws decide, however many there are");
            }
        }
    }

    /// An allocation that fails would end the process.
    #[test]
    fn a_context_that_no_memory_holds_is_refused() {
        let config = ModelConfig::preset("Meta-Llama-3-70B-Instruct").unwrap();
        let error = Cpu::new().sequence(&config, 1 << 24).map(drop).expect_err("11 TB").to_string();
        assert!(
            error.contains("a context of 16777216 tokens would take ") && error.contains("--max-seq-len"),
            "{error}"
        );
    }
}
