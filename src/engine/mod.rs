//! A model that is ready to make texts, on whatever device: what programs, chats and servers stand on.
//!
//! An [`Engine`] is a model on a device, compensated as it was tuned there. A [`Session`] is one text that goes on: it
//! is given the whole text each time, keeps what it has read already of it, and reads the rest. Several sessions of one
//! engine may make their texts in turn.
//!
//! ```no_run
//! use decdec::device::Device;
//! use decdec::engine::{Engine, Options, Settings};
//!
//! let device = Device::open("auto")?;
//! let engine = Engine::open(&device, "my-model".as_ref(), &Options::default())?;
//! let mut session = engine.session(Settings::default())?;
//! session.prompt_text("Once upon a time")?;
//! while let Some(piece) = session.next()? {
//!     print!("{}", piece.text);
//! }
//! # Ok::<(), anyhow::Error>(())
//! ```

pub(crate) mod answer;
mod batch;
mod compensate;
mod error;
mod first_use;
mod made;
pub(crate) mod runner;
mod session;
mod speculation;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::anyhow;

use crate::backend::{DECODE_ROWS, DecodeBackend, DeviceInfo, KvBits};
use crate::config::ModelConfig;
use crate::dec::Selection;
use crate::device::{Device, Job};
use crate::model::{Compensation, LayerCompensation, Model};
use crate::open::Opened;
use crate::progress::{Progress, Silent};
use crate::timeline::Timeline;
use crate::tokenizer::Tokenizer;
use crate::weights::{ModelWeights, Weight};

pub use batch::{Batch, Event, TextId};
pub use error::{Error, ErrorKind};
pub use made::{Finish, Generated, Piece, Settings, per_second};
pub use session::Session;
pub use speculation::{Draft, Drafting, Lookup, MOST_GUESSED, Speculate};

use compensate::settled;
use runner::{OnDevice, Runner};

/// What may go wrong in an engine.
pub type Result<T> = std::result::Result<T, Error>;

/// Tokens of a session's longest text where nobody says how many.
const DEFAULT_SEQ_LEN: usize = 8192;

/// How a model is compensated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Compensate {
    /// As `tuned.json` of the checkpoint says, if it fits the device and the model; else, if the model has residuals, as
    /// was measured in two seconds at first use on the device: what costs a token 10 % at most.
    #[default]
    Tuned,
    /// As the checkpoint was made to be, or 8 of 1024 channels where it does not say: results do not depend on the
    /// device, and nothing is timed.
    AsMade,
    /// As this file says, which `decdec tune` wrote.
    File(PathBuf),
    /// So: one set for all layers, or one for each bit width, fewest bits first.
    Sets(Vec<LayerCompensation>),
    /// Not at all.
    Off,
}

/// How an engine is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tokens of the longest text of a session, what it is given and what it makes together; `None` is the model's
    /// context, 8192 at most. Longer ones take more memory.
    pub max_seq_len: Option<usize>,
    /// The most texts at once. Each takes memory from when it begins.
    pub slots: usize,
    /// How the model is compensated.
    pub compensate: Compensate,
    /// How channels are found.
    pub selection: Selection,
    /// Bits of the head: 16 as it is stored, 8 or 4 rounded while loading, which moves fewer bytes for each token.
    pub head_bits: usize,
    /// How keys and values are kept: in 8 bits a text takes about half the memory.
    pub kv_bits: KvBits,
    /// Tokens become text, and those that the model's files name end one. Otherwise there are tokens only, and a text
    /// ends where it is full.
    pub text: bool,
}

impl Default for Options {
    fn default() -> Self {
        let (compensate, selection) = (Compensate::default(), Selection::Bucket);
        Self {
            max_seq_len: None,
            slots: DECODE_ROWS,
            compensate,
            selection,
            head_bits: 16,
            kv_bits: KvBits::Whole,
            text: true,
        }
    }
}

/// A model on a device.
pub struct Engine<'d> {
    pub(crate) runner: RefCell<Box<dyn Runner + 'd>>,
    config: ModelConfig,
    device: DeviceInfo,
    tokenizer: Option<Arc<Tokenizer>>,
    max_seq_len: usize,
    interrupt: Option<&'static AtomicBool>,
    compensation: RefCell<Option<Compensation>>,
    head_bytes: Option<usize>, // of a head that was rounded
}

impl<'d> Engine<'d> {
    /// Loads the model at `path`, whatever it is: a checkpoint of ours, a quantized model that other programs made, a
    /// full-precision one.
    ///
    /// # Errors
    /// [`ErrorKind::Input`]: what [`Opened::open`] refuses, a `max_seq_len` that the model was not trained for, a tuned
    /// file of another device or model. Otherwise what the device says, such as too little memory.
    pub fn open(device: &'d Device, path: &Path, options: &Options) -> Result<Self> {
        let opened = Opened::open(path, None, false).map_err(Error::input)?;
        Self::load(device, &opened, options, &Silent)
    }

    /// Loads a model that was opened; `progress` hears of every layer.
    ///
    /// # Errors
    /// Those of [`Engine::open`].
    pub fn load(device: &'d Device, opened: &Opened, options: &Options, progress: &dyn Progress) -> Result<Self> {
        let context = opened.weights().config().max_position_embeddings;
        let max_seq_len = options.max_seq_len.unwrap_or(context.min(DEFAULT_SEQ_LEN));
        if max_seq_len == 0 || max_seq_len > context {
            let said =
                format!("the longest text is to have {max_seq_len} tokens, the model's context has 1 to {context}");
            return Err(Error::new(ErrorKind::Input, said));
        }
        if options.slots == 0 {
            let said = "slots is 0, a session needs one, give at least 1".to_owned();
            return Err(Error::new(ErrorKind::Input, said));
        }
        let has_text = options.text && opened.texts().is_some();
        let tokenizer = has_text.then(|| opened.tokenizer()).transpose().map_err(Error::input)?;
        device.ensure_memory(opened.weights(), max_seq_len)?;
        let loaded = device.run(Load { opened, options, max_seq_len, progress })?;
        Ok(Self { tokenizer, interrupt: device.interrupt(), ..loaded })
    }

    /// An engine of a model that was loaded already, without a tokenizer; it is compensated as `model` is.
    pub fn of<B: DecodeBackend>(model: Model<'d, B>, max_seq_len: usize) -> Self {
        Self::with_slots(model, DECODE_ROWS, max_seq_len)
    }

    fn with_slots<B: DecodeBackend>(model: Model<'d, B>, slots: usize, max_seq_len: usize) -> Self {
        Self {
            config: model.config().clone(),
            device: model.backend().device().clone(),
            tokenizer: None,
            max_seq_len,
            interrupt: None,
            compensation: RefCell::new(None),
            head_bytes: None,
            runner: RefCell::new(Box::new(OnDevice::new(model, slots, max_seq_len))),
        }
    }

    /// A session without a text.
    ///
    /// # Errors
    /// [`ErrorKind::NoSlot`], or no memory for another one.
    pub fn session(&self, settings: Settings) -> Result<Session<'_, 'd>> {
        let slot = self.runner.borrow_mut().open()?;
        Ok(Session::new(self, slot, settings))
    }

    /// A batch without texts.
    pub fn batch(&self) -> Batch<'_, 'd> {
        Batch::new(self)
    }

    /// Compensates from now on as `compensation` says; `None` stops it. Texts in the making go on with it.
    ///
    /// # Errors
    /// Those of [`Model::compensate`]; nothing has changed then.
    pub fn compensate(&self, compensation: Option<&Compensation>) -> Result<()> {
        self.runner.borrow_mut().compensate(compensation).map_err(Error::input)?;
        self.compensation.replace(compensation.cloned());
        Ok(())
    }

    /// How the model is compensated, as [`Engine::load`] or [`Engine::compensate`] have settled it.
    pub fn compensation(&self) -> Option<Compensation> {
        self.compensation.borrow().clone()
    }

    /// Bytes of residuals that one compensated token fetches: those of the channels that are chosen for it.
    pub fn fetched(&self) -> usize {
        let (compensation, bits, widths) = (self.compensation.borrow(), self.layer_bits(), self.bit_widths());
        let Some(compensation) = compensation.as_ref() else { return 0 };
        let quantized = self.config.projections().filter(|&(layer, _)| bits[layer].is_some());
        quantized.map(|(layer, p)| compensation.fetched(&self.config, (layer, bits[layer]), &widths, p)).sum()
    }

    /// True if any projection is compensated.
    pub fn is_compensated(&self) -> bool {
        self.runner.borrow().is_compensated()
    }

    /// Bits of a weight in every layer; `None` for full precision.
    pub fn layer_bits(&self) -> Vec<Option<u32>> {
        self.runner.borrow().layer_bits()
    }

    /// Bit widths of the layers, fewest first; empty for full precision.
    pub fn bit_widths(&self) -> Vec<u32> {
        crate::model::widths(self.layer_bits().into_iter())
    }

    /// Where a token's time goes behind a text of `context` tokens; `weights` are those that the model was loaded from.
    ///
    /// # Errors
    /// Those of [`timeline::measure`](crate::timeline::measure).
    pub fn timeline(&self, weights: &dyn ModelWeights, context: usize) -> Result<Timeline> {
        let compensation = self.compensation();
        Ok(self.runner.borrow().timeline(weights, self.head_bytes, compensation.as_ref(), context)?)
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// Random numbers have none, and an engine that is not to make text.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let none = || Error::new(ErrorKind::Input, "the model has no tokenizer, give tokens in place of text".into());
        self.tokenizer.as_deref().ok_or_else(none)
    }

    /// Shapes and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn device(&self) -> &DeviceInfo {
        &self.device
    }

    /// Tokens of the longest text of a session.
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// The most tokens that one pass takes.
    pub fn max_tokens(&self) -> usize {
        self.device.max_tokens.clamp(1, self.max_seq_len)
    }

    /// Fails once the device's interruption has come.
    fn ensure_running(&self) -> Result<()> {
        match self.interrupt {
            Some(flag) if flag.load(Ordering::Relaxed) => Err(anyhow!(crate::backend::Interrupted).into()),
            _ => Ok(()),
        }
    }
}

/// Brings a model to a device.
struct Load<'a> {
    opened: &'a Opened,
    options: &'a Options,
    max_seq_len: usize,
    progress: &'a dyn Progress,
}

impl<'d> Job<'d> for Load<'_> {
    type Output = Result<Engine<'d>>;

    fn run<B: DecodeBackend + 'd>(self, backend: &'d B) -> Self::Output {
        let Self { opened, options, max_seq_len, progress } = self;
        let (weights, bits) = (opened.weights(), options.head_bits);
        let head = (bits < 16).then(|| crate::quantize::head(weights, bits)).transpose()?;
        let head_bytes = head.as_ref().map(Weight::bytes);
        progress.set_message("loading");
        progress.set_length(weights.config().layers.len() as u64);
        let mut model = Model::load_with_head(backend, weights, head, |_| progress.inc(1))?;
        model.keep_in(options.kv_bits);
        let by_bits = settled(&mut model, opened, options).map_err(Error::input)?;
        let compensation = by_bits.map(|by_bits| Compensation { by_bits, selection: options.selection });
        model.compensate(compensation.as_ref()).map_err(Error::input)?;
        Ok(Engine {
            head_bytes,
            compensation: RefCell::new(compensation),
            ..Engine::with_slots(model, options.slots, max_seq_len)
        })
    }
}
