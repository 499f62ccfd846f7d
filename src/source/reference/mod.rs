//! Directories exactly as the scripts of the reference implementation write them (spec §2.6, §5).
//!
//! `config.json`, `pytorch_model.bin` (or shards with an index), `cheatsheet.pt` with the residuals,
//! `thresholds.pt`, for mixed precision `bitwidth_map.json`, and the tokenizer's files. Llama's modules come
//! one by one and are fused here; Phi-3's come fused.

mod fuse;
mod tensors;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;

use self::fuse::{first, interleave, interleave_floats, row_order};
use self::tensors::{Expected, Tensors};
use super::modules::parts;
use super::{EMBEDDING, FINAL_NORM, HEAD, Part, norm_name};
use crate::checkpoint::WeightFormat;
use crate::config::{LayerNorm, ModelConfig, Projection};
use crate::format::{AnyPrec, Dense, Floats, LutGemm, Residual, threshold};
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights, Weight};

const WEIGHTS: &str = "pytorch_model.bin";
const INDEX: &str = "pytorch_model.bin.index.json";
const RESIDUALS: &str = "cheatsheet.pt";
const THRESHOLDS: &str = "thresholds.pt";
const BIT_MAP: &str = "bitwidth_map.json";

/// A directory of the reference, memory-mapped.
#[derive(Debug)]
pub struct Reference {
    config: ModelConfig,
    config_json: Json,
    texts: TextFiles,
    tensors: Tensors,
    format: WeightFormat,
    bits: Vec<u32>, // [num_layers]
    has_residuals: bool,
    compat_scale_order: bool,
}

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
        let config_json = tensors::json(&dir.join("config.json"))?;
        let config = ModelConfig::from_json(&config_json)?;
        let mut tensors = Tensors::default();
        tensors.add_weights(dir)?;
        let has_residuals = add_compensation(&mut tensors, dir)?;
        let format = weight_format(&tensors)?;
        let map = dir.join(BIT_MAP);
        let map = if map.exists() { Some(tensors::json(&map)?) } else { None };
        let bits = layer_bits(&config, &tensors, format, bits, map.as_ref())?;
        let texts = TextFiles::read(dir)?;
        let reference = Self { config, config_json, texts, tensors, format, bits, has_residuals, compat_scale_order };
        reference.check()?;
        Ok(reference)
    }

    /// `config.json` as it is.
    pub fn config_json(&self) -> &Json {
        &self.config_json
    }

    /// Tokenizer, chat template, special tokens.
    pub fn texts(&self) -> &TextFiles {
        &self.texts
    }

    /// How the codes are packed.
    pub fn backend(&self) -> WeightFormat {
        self.format
    }

    /// Bits of every layer, `[num_layers]`; they differ in mixed precision.
    pub fn layer_bits(&self) -> &[u32] {
        &self.bits
    }

    /// True if there are residuals and thresholds for every projection.
    pub fn has_residuals(&self) -> bool {
        self.has_residuals
    }

    /// The modules whose rows, one below the other, make `projection`, told by which have a tensor `suffix`.
    fn parts(&self, layer: usize, projection: Projection, suffix: &str) -> Vec<Part> {
        parts(&self.config, layer, projection, |part| self.tensors.contains(&part.tensor(suffix)))
    }

    /// Every tensor that is needed is there in the right shape, and none that is not understood.
    fn check(&self) -> Result<()> {
        let ModelConfig { vocab_size, hidden_size, tie_word_embeddings, .. } = self.config;
        let mut expected = HashMap::new();
        let mut expect = |name: String, shape: &[usize], words| {
            expected.insert(name, Expected { shape: shape.to_vec(), words });
        };
        expect(EMBEDDING.to_owned(), &[vocab_size, hidden_size], false);
        expect(FINAL_NORM.to_owned(), &[hidden_size], false);
        if !tie_word_embeddings || self.tensors.contains(HEAD) {
            expect(HEAD.to_owned(), &[vocab_size, hidden_size], false);
        }
        for layer in 0..self.config.layers.len() {
            for (norm, len) in self.config.layers[layer].norms(hidden_size) {
                expect(norm_name(&self.config, layer, norm)?, &[len], false);
            }
            for projection in Projection::ALL {
                self.expect_projection(layer, projection, &mut expect)?;
            }
        }
        // Buffers of older transformers: the rotary frequencies follow from the configuration.
        self.tensors.check(&expected, |name| name.ends_with(".rotary_emb.inv_freq"))
    }

    fn expect_projection(
        &self,
        layer: usize,
        projection: Projection,
        expect: &mut impl FnMut(String, &[usize], bool),
    ) -> Result<()> {
        let in_features = self.config.shape(layer, projection).0;
        let bits = self.bits[layer] as usize;
        ensure!(in_features.is_multiple_of(32), "{projection}: {in_features} channels, a multiple of 32 is expected");
        for part in self.parts(layer, projection, codes(self.format)) {
            match self.format {
                WeightFormat::AnyPrec => {
                    // The first `bits` of more planes are a model of their own, with its own codebooks.
                    let name = part.tensor("qweight");
                    let stored = self.tensors.find(&name).ok().and_then(|t| t.shape().first().copied());
                    let planes = stored.unwrap_or(bits);
                    ensure!((bits..=8).contains(&planes), "{name} has {planes} bit planes, {bits} to 8 are expected");
                    expect(name, &[planes, part.rows, in_features / 32], true);
                    for b in (2..=8).filter(|&b| b == bits || self.tensors.contains(&part.tensor(&lut(b)))) {
                        expect(part.tensor(&lut(b)), &[part.rows, 1 << b], false);
                    }
                }
                WeightFormat::LutGemm => {
                    let q_bias = part.tensor("q_bias");
                    let groups = self.tensors.find(&q_bias).ok().and_then(|t| t.shape().first().copied());
                    let groups = groups.unwrap_or(in_features / 128);
                    ensure!(
                        groups > 0 && in_features.is_multiple_of(groups),
                        "{q_bias} has {groups} groups, a divisor of {in_features} is expected"
                    );
                    expect(part.tensor("binary"), &[in_features / 32, bits, part.rows], true);
                    expect(part.tensor("alpha"), &[groups, bits, part.rows], false);
                    expect(q_bias, &[groups, part.rows], false);
                }
            }
            let bias = part.tensor("bias");
            if self.config.biased.contains(&projection) || self.tensors.contains(&bias) {
                expect(bias, &[part.rows], false);
            }
        }
        if self.has_residuals {
            for part in self.parts(layer, projection, "cheatsheet") {
                let rows = part.rows;
                ensure!(rows.is_multiple_of(8), "{} has {rows} rows, a multiple of 8 is expected", part.name);
                expect(part.tensor("cheatsheet"), &[in_features, part.rows / 8], true);
                expect(part.tensor("reordered_scales"), &[part.rows], false);
            }
            for part in self.parts(layer, projection, "thresholds") {
                expect(part.tensor("thresholds"), &[in_features], false);
            }
        }
        Ok(())
    }

    fn weight(&self, layer: usize, projection: Projection) -> Result<Weight<'_>> {
        let (in_features, out_features) = self.config.shape(layer, projection);
        let parts = self.parts(layer, projection, codes(self.format));
        let bits = self.bits[layer] as usize;
        let words = |suffix| parts.iter().map(|p| self.tensors.words(&p.tensor(suffix))).collect::<Result<Vec<_>>>();
        let floats =
            |suffix: &str| parts.iter().map(|p| self.tensors.floats(&p.tensor(suffix))).collect::<Result<Vec<_>>>();
        Ok(match self.format {
            WeightFormat::AnyPrec => {
                let planes = words("qweight")?.into_iter().zip(&parts);
                let planes = planes.map(|(planes, part)| first(planes, bits * part.rows * (in_features / 32)));
                let planes = interleave(planes.collect(), bits);
                let lut = interleave_floats(floats(&lut(bits))?, 1);
                Weight::AnyPrec(AnyPrec::new(in_features, out_features, bits, planes, lut)?)
            }
            WeightFormat::LutGemm => {
                let binary = interleave(words("binary")?, in_features / 32 * bits);
                let groups = self.tensors.find(&parts[0].tensor("q_bias"))?.shape()[0];
                let (alpha, q_bias) = (floats("alpha")?, floats("q_bias")?);
                let same = q_bias.iter().zip(&parts).all(|(q_bias, part)| q_bias.len() == groups * part.rows);
                ensure!(same, "layer {layer}: the modules of {projection} have different group sizes");
                let (alpha, q_bias) = (interleave_floats(alpha, groups * bits), interleave_floats(q_bias, groups));
                let group = in_features / groups;
                Weight::LutGemm(LutGemm::new(in_features, out_features, bits, group, binary, alpha, q_bias)?)
            }
        })
    }

    fn residual(&self, layer: usize, projection: Projection) -> Result<Residual<'_>> {
        let (in_features, out_features) = self.config.shape(layer, projection);
        let (mut words, mut scales) = (Vec::new(), Vec::new());
        for part in self.parts(layer, projection, "cheatsheet") {
            words.push(self.tensors.words(&part.tensor("cheatsheet"))?);
            let stored = self.tensors.floats(&part.tensor("reordered_scales"))?;
            scales.push(if self.compat_scale_order { stored } else { row_order(&stored) });
        }
        let scales = interleave_floats(scales, 1);
        let scales = if self.compat_scale_order { row_order(&scales) } else { scales };
        Residual::new(in_features, out_features, interleave(words, in_features), scales)
    }

    fn thresholds(&self, layer: usize, projection: Projection) -> Result<Cow<'_, [f32]>> {
        // Modules that are fused see the same input, so that all of them hold the same thresholds.
        let parts = self.parts(layer, projection, "thresholds");
        let name = parts[0].tensor("thresholds");
        let thresholds = match self.tensors.floats(&name)? {
            Floats::F32(values) => values,
            other => Cow::Owned(other.to_f32().into_owned()),
        };
        threshold::validate(&thresholds, self.config.shape(layer, projection).0).with_context(|| name)?;
        Ok(thresholds)
    }

    /// The biases of all parts; zeros where only some have one.
    fn bias(&self, layer: usize, projection: Projection) -> Result<Option<Cow<'_, [f32]>>> {
        let parts = self.parts(layer, projection, codes(self.format));
        if !parts.iter().any(|part| self.tensors.contains(&part.tensor("bias"))) {
            return Ok(None);
        }
        let mut bias = Vec::new();
        for part in parts {
            match part.tensor("bias") {
                name if self.tensors.contains(&name) => bias.extend_from_slice(&self.tensors.floats(&name)?.to_f32()),
                _ => bias.resize(bias.len() + part.rows, 0.0),
            }
        }
        Ok(Some(Cow::Owned(bias)))
    }

    fn table(&self, name: &str) -> Result<Dense<'_>> {
        let ModelConfig { vocab_size, hidden_size, .. } = self.config;
        Ok(Dense { in_features: hidden_size, out_features: vocab_size, values: self.tensors.floats(name)? })
    }
}

impl ModelWeights for Reference {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        self.table(EMBEDDING)
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        if self.config.tie_word_embeddings { Ok(None) } else { self.table(HEAD).map(Some) }
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        Ok(self.tensors.floats(FINAL_NORM)?.to_f32().into_owned())
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        Ok(self.tensors.floats(&norm_name(&self.config, layer, norm)?)?.to_f32().into_owned())
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let mut linear = Linear::plain(self.weight(layer, projection)?);
        linear.bias = self.bias(layer, projection)?;
        if self.has_residuals {
            linear.residual = Some(self.residual(layer, projection)?);
            linear.thresholds = Some(self.thresholds(layer, projection)?);
        }
        Ok(linear)
    }

    fn bits(&self, layer: usize) -> Option<u32> {
        Some(self.bits[layer])
    }
}

/// How the codes of a directory are packed.
fn weight_format(tensors: &Tensors) -> Result<WeightFormat> {
    let any = |suffix| tensors.names().any(|name| name.ends_with(suffix));
    match (any(".qweight"), any(".binary")) {
        (true, false) => Ok(WeightFormat::AnyPrec),
        (false, true) => Ok(WeightFormat::LutGemm),
        (true, true) => bail!("both qweight (AnyPrec) and binary (LUT-GEMM) tensors, one kind is expected"),
        (false, false) => bail!("neither qweight (AnyPrec) nor binary (LUT-GEMM) tensors: is it quantized?"),
    }
}

/// The tensor that every quantized module has.
fn codes(format: WeightFormat) -> &'static str {
    match format {
        WeightFormat::AnyPrec => "qweight",
        WeightFormat::LutGemm => "binary",
    }
}

/// The precisions that `layer` is stored in, told by its output projection, which is never fused.
fn stored_bits(format: WeightFormat, tensors: &Tensors, layer: usize) -> Vec<u32> {
    let module = format!("model.layers.{layer}.self_attn.o_proj");
    match format {
        WeightFormat::AnyPrec => {
            (2..=8).filter(|&bits| tensors.contains(&format!("{module}.{}", lut(bits as usize)))).collect()
        }
        WeightFormat::LutGemm => {
            let binary = tensors.find(&format!("{module}.binary")).ok();
            binary.and_then(|binary| u32::try_from(*binary.shape().get(1)?).ok()).into_iter().collect()
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
    format: WeightFormat,
    asked: Option<u32>,
    map: Option<&Json>,
) -> Result<Vec<u32>> {
    let index = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
    let layers = tensors.names().filter_map(index).max().map_or(0, |last| last.saturating_add(1));
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
            (None, None, []) => bail!("layer {layer} has no {} for its output projection", codes(format)),
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

/// The codebook of `bits` bits.
fn lut(bits: usize) -> String {
    format!("lut{bits}")
}
