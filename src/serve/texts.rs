//! What a server asks of a model: texts in slots that grow one step at a time.

use crate::engine::Result;
use crate::model::LayerCompensation;
use crate::sampling::Sampling;

/// What is wanted behind the tokens that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choose {
    /// Nothing: more of the prompt follows.
    Nothing,
    /// The next token, by the rules and the next draw of [`Texts::begin`]. All tokens of a text are chosen in this way,
    /// or none.
    Token,
    /// The logits `[vocab_size]` of the next token.
    Logits,
    /// The logits behind each of the tokens, `[tokens, vocab_size]`.
    AllLogits,
}

/// What came of a [`Choose`].
#[derive(Debug, Clone, PartialEq)]
pub enum Chosen {
    /// The tokens are read.
    Nothing,
    /// The next token.
    Token(u32),
    /// Logits.
    Logits(Vec<f32>),
}

/// What one slot reads in a step: at least one token, behind those that it holds.
#[derive(Debug, Clone, Copy)]
pub struct Reading<'a> {
    /// Whose text.
    pub slot: usize,
    /// 1 to [`Texts::max_tokens`] tokens of the prompt, or the one that was made last.
    pub tokens: &'a [u32],
    /// Whether they are compensated: those that were made always are.
    pub compensated: bool,
    /// What is wanted behind them.
    pub choose: Choose,
}

/// A model that makes several texts, one in each slot.
///
/// The same readings give the same results whatever the other slots do.
pub trait Texts {
    /// How many texts there may be.
    fn slots(&self) -> usize;
    /// Tokens of the longest text.
    fn max_seq_len(&self) -> usize;
    /// The most tokens that one reading takes.
    fn max_tokens(&self) -> usize;
    /// Begins a text in `slot` with the first `kept` tokens that it holds; how many of them are still there, which may
    /// be none. The `i`-th token is chosen by `sampling` and `draws[i]`, uniform in `[0, 1)`.
    ///
    /// # Errors
    /// What the device says.
    fn begin(&mut self, slot: usize, kept: usize, sampling: &Sampling, draws: &[f32]) -> Result<usize>;
    /// Reads, each slot at most once; one result for each reading, in their order.
    ///
    /// # Errors
    /// What the device says where no reading has a result; a slot whose reading failed holds nothing afterwards.
    fn step(&mut self, readings: &[Reading<'_>]) -> Result<Vec<Result<Chosen>>>;
    /// True if tokens that are made are compensated.
    fn is_compensated(&self) -> bool;
    /// Bytes of residuals that each of them fetches; 0 where nothing is compensated.
    fn fetched(&self) -> usize;
    /// How: one set for all layers, or one for each bit width; none where nothing is compensated.
    fn compensation(&self) -> Vec<LayerCompensation>;
    /// Compensates otherwise from now on; no sets stop it.
    ///
    /// # Errors
    /// Sets that do not fit the model or the device: nothing has changed then.
    fn compensate(&mut self, sets: &[LayerCompensation]) -> Result<()>;
}
