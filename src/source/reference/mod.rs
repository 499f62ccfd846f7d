//! Directories exactly as the scripts of the reference implementation write them (spec §2.6, §5).
//!
//! `config.json`, `pytorch_model.bin` (or shards with an index), `cheatsheet.pt` with the residuals,
//! `thresholds.pt`, for mixed precision `bitwidth_map.json`, and the tokenizer's files. Llama's modules come
//! one by one and are fused here; Phi-3's come fused.

mod tensors;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;

use self::tensors::Tensors;
use crate::config::{ModelConfig, read_json};
use crate::format::Format;
use crate::tensors::{Layout, StoredModel, is_stored_model};
use crate::tokenizer::TextFiles;

const WEIGHTS: &str = "pytorch_model.bin";
const INDEX: &str = "pytorch_model.bin.index.json";
const RESIDUALS: &str = "cheatsheet.pt";
const THRESHOLDS: &str = "thresholds.pt";
const BIT_MAP: &str = "bitwidth_map.json";

/// A directory of the reference, memory-mapped.
#[derive(Debug)]
pub struct Reference(StoredModel);

is_stored_model!(Reference, 0);

impl Reference {
    /// True if `dir` holds PyTorch weights, which only [`Reference::open`] reads.
    pub fn detect(dir: &Path) -> bool {
        dir.join(WEIGHTS).exists() || dir.join(INDEX).exists()
    }

    /// Opens a directory.
    ///
    /// `bits` chooses a precision where AnyPrec stores several; without it, `bitwidth_map.json` decides, or the
    /// only precision that is stored. `compat_scale_order` reproduces how the reference fuses the residual
    /// scales of unfused modules: most rows then get another row's scale (spec §5).
    ///
    /// # Errors
    /// Files that [`super::torch::TorchFile`] refuses; missing, extra or misshapen tensors, by name; a precision
    /// that is not stored or has to be chosen; only one of `cheatsheet.pt` and `thresholds.pt`.
    pub fn open(dir: &Path, bits: Option<u32>, compat_scale_order: bool) -> Result<Self> {
        Self::read(dir, bits, compat_scale_order).with_context(|| format!("cannot open the model {}", dir.display()))
    }

    fn read(dir: &Path, bits: Option<u32>, compat_scale_order: bool) -> Result<Self> {
        let config = ModelConfig::from_json(&read_json(&dir.join("config.json"))?)?;
        let mut tensors = Tensors::default();
        tensors.add_weights(dir)?;
        let compensated = add_compensation(&mut tensors, dir)?;
        let format = weight_format(&tensors)?;
        let map = dir.join(BIT_MAP);
        let map = if map.exists() { Some(read_json(&map)?) } else { None };
        let bits = layer_bits(&config, &tensors, format, bits, map.as_ref())?;
        tensors.bits.clone_from(&bits);
        tensors.compat_scale_order = compat_scale_order;
        let layout = Layout { format: Some(format), group_size: None, own: false, compensated };
        let texts = TextFiles::read(dir)?;
        let model = StoredModel { tensors: Box::new(tensors), config, texts, layout, bits };
        model.check(|projection| model.config.biased.contains(&projection).then_some(true))?;
        Ok(Self(model))
    }
}

/// How the codes of a directory are packed.
fn weight_format(tensors: &Tensors) -> Result<Format> {
    let any = |suffix| tensors.names().any(|name| name.ends_with(suffix));
    match (any(".qweight"), any(".binary")) {
        (true, false) => Ok(Format::AnyPrec),
        (false, true) => Ok(Format::LutGemm),
        (true, true) => bail!("both qweight (AnyPrec) and binary (LUT-GEMM) tensors, one kind is expected"),
        (false, false) => bail!("neither qweight (AnyPrec) nor binary (LUT-GEMM) tensors: is it quantized?"),
    }
}

/// The precisions that `layer` is stored in, told by its output projection, which is never fused.
fn stored_bits(format: Format, tensors: &Tensors, layer: usize) -> Vec<u32> {
    let module = format!("model.layers.{layer}.self_attn.o_proj");
    match format {
        Format::AnyPrec => (2..=8).filter(|bits| tensors.has(&format!("{module}.lut{bits}"))).collect(),
        Format::LutGemm => {
            let binary = tensors.find(&format!("{module}.binary")).ok();
            binary.and_then(|(_, binary)| u32::try_from(*binary.shape().get(1)?).ok()).into_iter().collect()
        }
    }
}

/// Adds residuals and thresholds, which come together or not at all.
fn add_compensation(tensors: &mut Tensors, dir: &Path) -> Result<bool> {
    let (residuals, thresholds) = (dir.join(RESIDUALS), dir.join(THRESHOLDS));
    match (residuals.exists(), thresholds.exists()) {
        (false, false) => return Ok(false),
        (true, true) => {}
        (true, false) => bail!("{RESIDUALS} is there and {THRESHOLDS} is not, both are needed to compensate"),
        (false, true) => bail!("{THRESHOLDS} is there and {RESIDUALS} is not, both are needed to compensate"),
    }
    tensors.add_residuals(&residuals)?;
    tensors.add_thresholds(&thresholds)?;
    Ok(true)
}

/// Bits of every layer: as asked for where that is stored, else by the map, else the only precision that is stored.
fn layer_bits(
    config: &ModelConfig,
    tensors: &Tensors,
    format: Format,
    asked: Option<u32>,
    map: Option<&Json>,
) -> Result<Vec<u32>> {
    let layers = tensors.names().filter_map(tensors::layer).max().map_or(0, |last| last.saturating_add(1));
    let expected = config.layers.len();
    ensure!(layers == expected, "{layers} layers are stored, config.json says {expected}");
    let map = map.map(|map| serde_json::from_value::<BTreeMap<usize, u32>>(map.clone())).transpose();
    let map = map.with_context(|| format!("{BIT_MAP}: an object {{layer: bits}} is expected"))?;
    if let Some(map) = &map {
        let (got, first_wrong) = (map.len(), (0..layers).find(|layer| !map.contains_key(layer)));
        ensure!(got == layers && first_wrong.is_none(), "{BIT_MAP} has {got} layers, 0 to {} are expected", layers - 1);
    }
    // In mixed precision a layer may be stored in another width only.
    let has_asked = |layer| asked.is_some_and(|bits| stored_bits(format, tensors, layer).contains(&bits));
    let somewhere = (0..layers).any(has_asked);
    let choose = |layer| {
        let stored = stored_bits(format, tensors, layer);
        let asked = asked.filter(|_| !somewhere || has_asked(layer));
        let listed = stored.iter().map(u32::to_string).collect::<Vec<_>>().join(" or ");
        let bits = match (asked, &map, &stored[..]) {
            (Some(bits), _, _) => bits,
            (None, Some(map), _) => map[&layer],
            (None, None, &[only]) => only,
            (None, None, []) => bail!("layer {layer} has no {} for its output projection", format.tensors()[0].suffix),
            (None, None, _) => {
                bail!("layer {layer} is stored with several bit widths, choose with --bitwidth {listed}")
            }
        };
        ensure!(
            (2..=8).contains(&bits) && stored.contains(&bits),
            "layer {layer} is not stored with {bits} bits, {listed} can be had"
        );
        Ok(bits)
    };
    (0..layers).map(choose).collect()
}
