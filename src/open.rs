//! From a path to a model, whatever it is: our checkpoint, a quantized model
//! that other programs made, a full-precision source.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, ensure};

use crate::checkpoint::{BitWidth, Checkpoint, Manifest};
use crate::config::ModelConfig;
use crate::format::Format;
use crate::random::RandomWeights;
use crate::source::Source;
use crate::source::grouped::Grouped;
use crate::source::reference::Reference;
use crate::source::simulated::Simulated;
use crate::tensors::StoredModel;
use crate::tokenizer::{TextFiles, Tokenizer};
use crate::weights::ModelWeights;

/// A model on disk.
pub struct Opened {
    weights: Box<dyn ModelWeights>,
    texts: Option<TextFiles>,
    tokenizer: OnceLock<Arc<Tokenizer>>,
    path: Option<PathBuf>,
    quantization: Option<(Format, BitWidth)>,
    /// What a checkpoint of ours says of itself.
    manifest: Option<Manifest>,
    /// The file or directory, and what a checkpoint says it was made from.
    names: Vec<String>,
}

impl Opened {
    /// Opens whatever lies at `path`. Of a reference directory with several codebooks, `bits` chooses one;
    /// `compat_scale_order` keeps its residual scales in the order in which the reference's loader leaves them.
    ///
    /// # Errors
    /// Nothing there, or what [`Checkpoint::open`], [`Reference::open`] and [`Source::open`] refuse.
    pub fn open(path: &Path, bits: Option<BitWidth>, compat_scale_order: bool) -> Result<Self> {
        let opened = Self::open_at(path, bits, compat_scale_order)?;
        Ok(Self { path: Some(path.to_owned()), ..opened })
    }

    fn open_at(path: &Path, bits: Option<BitWidth>, compat_scale_order: bool) -> Result<Self> {
        let place = std::fs::canonicalize(path).with_context(|| format!("cannot open the model {}", path.display()))?;
        let mut names = vec![place.file_name().unwrap_or_default().to_string_lossy().into_owned()];
        if Checkpoint::is_at(path) {
            let checkpoint = Checkpoint::open(path)?;
            let manifest = checkpoint.manifest().clone();
            names.insert(0, manifest.source.clone());
            let quantization = Some((manifest.backend, manifest.bits));
            return Ok(Self { quantization, manifest: Some(manifest), ..Self::stored(checkpoint, names)? });
        }
        if Grouped::detect(path) {
            return Self::stored(Grouped::open(path)?, names);
        }
        if Reference::detect(path) {
            let bits = bits.filter(|bits| !bits.is_mixed()).map(BitWidth::low);
            return Self::stored(Reference::open(path, bits, compat_scale_order)?, names);
        }
        Self::stored(Source::open(path)?, names)
    }

    /// A model in files.
    fn stored(model: impl Deref<Target = StoredModel> + Sync + 'static, names: Vec<String>) -> Result<Self> {
        let bits = |format| Ok::<_, anyhow::Error>((format, BitWidth::of_layers(model.layer_bits())?));
        let quantization = model.format().map(bits).transpose()?;
        Ok(Self {
            texts: Some(model.texts().clone()),
            tokenizer: OnceLock::new(),
            path: None,
            names,
            quantization,
            manifest: None,
            weights: Box::new(model),
        })
    }

    /// The same model; a full-precision one as the quantized model that it stands for, where its quantization was only
    /// simulated.
    ///
    /// # Errors
    /// What [`Simulated::recover`] refuses.
    pub fn quantized(self) -> Result<Self> {
        if self.quantization.is_some() {
            return Ok(self);
        }
        let simulated = Simulated::recover(self.weights).with_context(|| {
            format!("{} is full precision, decdec quantize makes a checkpoint of it", self.names.join(" in "))
        })?;
        let quantization = Some((Format::AnyPrec, BitWidth::of_layers(simulated.layer_bits())?));
        Ok(Self { weights: Box::new(simulated), quantization, ..self })
    }

    /// What the checkpoint says of itself; `None` for whatever is not a decdec checkpoint.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The file or directory that it was opened from, without what is above it.
    pub fn name(&self) -> &str {
        self.names.last().map_or("", String::as_str)
    }

    /// The same model under a name that it goes by elsewhere, in place of its directory's.
    pub fn called(mut self, name: &str) -> Self {
        self.names.pop();
        self.names.push(name.to_owned());
        self
    }

    /// Its tensors.
    pub fn weights(&self) -> &dyn ModelWeights {
        self.weights.as_ref()
    }

    /// A model of random numbers, called `name`: it has no tokenizer.
    pub fn random(weights: RandomWeights, format: Format, bits: BitWidth, name: &str) -> Self {
        let names = vec![name.to_owned()];
        let quantization = Some((format, bits));
        let (texts, tokenizer, path, manifest) = (None, OnceLock::new(), None, None);
        Self { weights: Box::new(weights), texts, tokenizer, path, quantization, manifest, names }
    }

    /// Tokenizer, chat template, special tokens; `None` for random numbers.
    pub fn texts(&self) -> Option<&TextFiles> {
        self.texts.as_ref()
    }

    /// The model's tokenizer, made once.
    ///
    /// # Errors
    /// A random model has none; a damaged one.
    pub fn tokenizer(&self) -> Result<Arc<Tokenizer>> {
        if let Some(tokenizer) = self.tokenizer.get() {
            return Ok(Arc::clone(tokenizer));
        }
        let texts = self.texts.as_ref().context("random weights have no tokenizer, give a checkpoint")?;
        let tokenizer = Arc::new(Tokenizer::new(texts, self.weights.config())?);
        Ok(Arc::clone(self.tokenizer.get_or_init(|| tokenizer)))
    }

    /// Where it was opened; none for random numbers.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// How its weights are stored and in how many bits; `None` for full precision.
    pub fn quantization(&self) -> Option<(Format, BitWidth)> {
        self.quantization
    }

    /// Holds what the user said of the model against what it is.
    ///
    /// # Errors
    /// The first difference, with both values.
    pub fn expect(&self, backend: Option<Format>, bits: Option<BitWidth>, name: Option<&str>) -> Result<()> {
        if let Some(name) = name {
            self.expect_name(name)?;
        }
        let Some((own_backend, own_bits)) = self.quantization else {
            ensure!(backend.is_none(), "--backend is given, but the model is full precision, leave it out");
            ensure!(bits.is_none(), "--bitwidth is given, but the model is full precision, leave it out");
            return Ok(());
        };
        if let Some(backend) = backend {
            ensure!(backend == own_backend, "--backend is {backend}, the checkpoint is {own_backend}, leave it out");
        }
        if let Some(bits) = bits {
            ensure!(bits == own_bits, "--bitwidth is {bits}, the checkpoint has {own_bits} bits, leave it out");
        }
        Ok(())
    }

    /// A preset's name must have the preset's shapes, any other must occur in what the model is called.
    fn expect_name(&self, name: &str) -> Result<()> {
        let own = self.weights.config();
        if let Some(preset) = ModelConfig::preset(name) {
            let [theirs, ours] = [&preset, own].map(|config| (config.layers.len(), config.shapes(0)));
            ensure!(
                theirs == ours,
                "--model-name is {name} with {} layers of {:?}, the model has {} layers of {:?}, leave it out",
                theirs.0,
                theirs.1,
                ours.0,
                ours.1
            );
            return Ok(());
        }
        let plain = |text: &str| text.to_lowercase().replace(|c: char| !c.is_alphanumeric(), "");
        let known = self.names.iter().any(|own| plain(own).contains(&plain(name)));
        ensure!(known, "--model-name is {name}, the model is {}, leave it out", self.names.join(" in "));
        Ok(())
    }
}
