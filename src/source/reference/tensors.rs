//! The tensors of a reference directory under one roof: every file's, by name.
//!
//! Residuals and thresholds come in lists with an entry for each layer; they are filed beside the weights they
//! belong to: `model.layers.0.self_attn.q_proj.cheatsheet`, `….reordered_scales`, `….thresholds`. Our names for the
//! first two are `residual` and `scales`; a codebook, `lut` to us, has its bits in its name.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;

use crate::config::read_json;
use crate::format::{Floats, Format, Kind, Numbers, Size, Tensor as Described};
use crate::source::torch::{DType, Id, Tensor, TorchFile, Value};
use crate::tensors::{Expected, HEAD, Module, TensorSet};
use crate::weights::tensors_of;

/// Parts of a module, by name.
type Named<'a> = Vec<(&'a str, Value<'a>)>;

/// Names in a message about keys; the rest are counted.
const NAMED: usize = 6;

#[derive(Debug, Default)]
pub(super) struct Tensors {
    files: Vec<TorchFile>,
    names: HashMap<String, (usize, Id)>,
    /// The width that is read of every layer.
    pub(super) bits: Vec<u32>,
    /// Leaves the scales of fused modules in the order in which the reference leaves them.
    pub(super) compat_scale_order: bool,
}

impl Tensors {
    /// Adds a state dict: `pytorch_model.bin`, or the shards that `pytorch_model.bin.index.json` lists.
    pub(super) fn add_weights(&mut self, dir: &Path) -> Result<()> {
        let index = dir.join(super::INDEX);
        let mut shards = BTreeSet::from([super::WEIGHTS.to_owned()]);
        if !dir.join(super::WEIGHTS).exists() {
            let json = read_json(&index)?;
            let map = json.get("weight_map").and_then(Json::as_object);
            let map = map.with_context(|| format!("{}: no object weight_map in it", index.display()))?;
            shards =
                map.values().map(shard_name).collect::<Result<_>>().with_context(|| index.display().to_string())?;
        }
        for shard in shards {
            self.add(&dir.join(shard), |root| {
                let tensors = root.entries()?.into_iter();
                Ok(tensors.map(|(name, value)| (name.to_owned(), value)).collect())
            })?;
        }
        Ok(())
    }

    /// Adds `cheatsheet.pt`: for each layer `{module: {cheatsheet, reordered_scales}}`.
    pub(super) fn add_residuals(&mut self, path: &Path) -> Result<()> {
        self.add_layers(path, |parts| Ok(parts.entries()?.into_iter().collect()))
    }

    /// Adds `thresholds.pt`: for each layer `{module: thresholds}`.
    pub(super) fn add_thresholds(&mut self, path: &Path) -> Result<()> {
        self.add_layers(path, |thresholds| Ok(vec![("thresholds", thresholds)]))
    }

    /// Adds a list of layers, each with the tensors that `parts` finds at a module.
    fn add_layers(&mut self, path: &Path, parts: fn(Value<'_>) -> Result<Named<'_>>) -> Result<()> {
        self.add(path, |root| {
            let mut tensors = Vec::new();
            for (layer, modules) in root.items()?.enumerate() {
                for (module, value) in modules.entries()? {
                    let named = |(part, value)| (format!("model.layers.{layer}.{module}.{part}"), value);
                    tensors.extend(parts(value)?.into_iter().map(named));
                }
            }
            Ok(tensors)
        })
    }

    fn add(&mut self, path: &Path, list: impl FnOnce(Value<'_>) -> Result<Vec<(String, Value<'_>)>>) -> Result<()> {
        let file = TorchFile::open(path)?;
        let index = self.files.len();
        for (name, value) in list(file.root()).with_context(|| path.display().to_string())? {
            // A state dict may carry more than tensors; what is expected and no tensor is reported as missing.
            if value.tensor().is_ok() && self.names.insert(name.clone(), (index, value.id())).is_some() {
                bail!("{}: {name} is also in another file", path.display());
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// The names in the files.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// True if the files have a tensor of this name, which is theirs.
    pub(super) fn has(&self, own: &str) -> bool {
        self.names.contains_key(own)
    }

    /// The name that a tensor has in the files.
    fn own_name(&self, name: &str) -> String {
        let own = |module: &str, suffix| match suffix {
            "lut" => {
                let layer = layer(module).and_then(|layer| self.bits.get(layer));
                format!("{module}.lut{}", layer.copied().unwrap_or(0))
            }
            "residual" => format!("{module}.cheatsheet"),
            "scales" => format!("{module}.reordered_scales"),
            _ => name.to_owned(),
        };
        name.rsplit_once('.').map_or_else(|| name.to_owned(), |(module, suffix)| own(module, suffix))
    }

    /// The tensor, with its name in the files.
    pub(super) fn find(&self, name: &str) -> Result<(String, Tensor<'_>)> {
        let own = self.own_name(name);
        let &(file, id) = self.names.get(&own).with_context(|| format!("tensor {own} is missing"))?;
        Ok((own, self.files[file].value(id).tensor()?))
    }

    /// The slowest dimension of a tensor, where there is one.
    fn first_dimension(&self, name: &str) -> Option<usize> {
        self.find(name).ok()?.1.shape().first().copied()
    }
}

impl TensorSet for Tensors {
    fn contains(&self, name: &str) -> bool {
        self.names.contains_key(&self.own_name(name))
    }

    fn check(&self, Expected { name, shape, kind }: &Expected) -> Result<()> {
        let (name, tensor) = self.find(name)?;
        let found = tensor.shape();
        ensure!(found == shape, "{name} has shape {found:?}, {shape:?} is expected");
        let float = matches!(tensor.dtype(), DType::F16 | DType::Bf16 | DType::F32 | DType::F64);
        let (fits, wanted) = match kind {
            Kind::Float => (float, "floating-point numbers"),
            Kind::I32 | Kind::U32 => (tensor.dtype() == DType::I32, "i32"),
        };
        ensure!(fits, "{name} is a tensor of {}, {wanted} are expected", tensor.dtype());
        Ok(())
    }

    /// Exactly these tensors are there, but for some that are known to say nothing.
    fn check_all(&self, expected: &[Expected]) -> Result<()> {
        let expected_names: HashSet<String> = expected.iter().map(|tensor| self.own_name(&tensor.name)).collect();
        let missing: BTreeSet<_> =
            expected_names.iter().map(String::as_str).filter(|&name| !self.names.contains_key(name)).collect();
        ensure!(missing.is_empty(), "missing in the directory: {}", listed(&missing));
        // Buffers of older transformers: the rotary frequencies follow from the configuration. A head may be there
        // though it is the embedding.
        let tolerated = |name: &str| name == HEAD || name.ends_with(".rotary_emb.inv_freq");
        let extra: BTreeSet<_> =
            self.names().filter(|name| !expected_names.contains(*name) && !tolerated(name)).collect();
        ensure!(extra.is_empty(), "not understood in the directory: {}", listed(&extra));
        expected.iter().try_for_each(|expected| self.check(expected))
    }

    /// In the order of the file: so the place of a number that is not finite is the one there.
    fn floats(&self, name: &str) -> Result<Floats<'_>> {
        let (name, tensor) = self.find(name)?;
        let floats = tensor.floats().with_context(|| name.clone())?;
        floats.ensure_tensor_is_finite(&name, tensor.shape())?;
        Ok(floats)
    }

    fn words(&self, name: &str) -> Result<Cow<'_, [u32]>> {
        let (name, tensor) = self.find(name)?;
        tensor.words().with_context(|| name)
    }

    fn group_size(&self, module: &Module, in_features: usize) -> Result<Option<usize>> {
        let name = module.tensor("q_bias");
        let groups = self.first_dimension(&name).unwrap_or(in_features / 128);
        ensure!(
            groups > 0 && in_features.is_multiple_of(groups),
            "{name} has {groups} groups, a divisor of {in_features} is expected"
        );
        Ok(Some(in_features / groups))
    }

    /// The first planes of more planes are a model of their own, with its own codebooks.
    fn expected(&self, module: &Module, format: Option<Format>, size: &Size) -> Result<Vec<Expected>> {
        let described = tensors_of(format).iter();
        let mut all: Vec<_> = described.map(|tensor| module.expected(tensor, size)).collect();
        if format == Some(Format::AnyPrec) {
            let Expected { name, shape, .. } = &mut all[0];
            let (bits, planes) = (size.bits, self.first_dimension(name).unwrap_or(size.bits));
            ensure!((bits..=8).contains(&planes), "{name} has {planes} bit planes, {bits} to 8 are expected");
            shape[0] = planes;
            let others =
                (2..=8).filter(|&other| other != bits).map(|bits| (module.tensor(&format!("lut{bits}")), bits));
            let others = others.filter(|(name, _)| self.names.contains_key(name));
            all.extend(others.map(|(name, bits)| Expected {
                name,
                shape: vec![module.rows, 1 << bits],
                kind: Kind::Float,
            }));
        }
        Ok(all)
    }

    fn weight(&self, module: &Module, format: Option<Format>, size: &Size) -> Result<Vec<Numbers<'_>>> {
        let described = tensors_of(format).iter();
        let numbers = described.map(|tensor| self.numbers(&module.tensor(tensor.suffix), tensor));
        let mut numbers: Vec<Numbers<'_>> = numbers.collect::<Result<_>>()?;
        if let (Some(Format::AnyPrec), Numbers::Words(planes)) = (format, &mut numbers[0]) {
            first(planes, size.bits * module.rows * (size.in_features / 32));
        }
        Ok(numbers)
    }

    fn residual(&self, modules: &[Module], size: &Size) -> Result<[Numbers<'_>; 2]> {
        let in_rows = |scales: Floats<'_>| {
            let words = scales.len() / 8;
            // Nibble-major: `stored[i·(rows/8) + c]` belongs to row `8c + i`.
            let order: Vec<usize> = (0..scales.len()).map(|row| row % 8 * words + row / 8).collect();
            let size = Size { out_features: scales.len(), ..*size };
            Described::SCALES.reorder(&size, &Numbers::Floats(scales), &order)
        };
        let compat = self.compat_scale_order;
        let (mut words, mut scales) = (Vec::new(), Vec::new());
        for module in modules {
            words.push(Numbers::Words(self.words(&module.tensor("residual"))?));
            let stored = self.floats(&module.tensor("scales"))?;
            scales.push(if compat { Numbers::Floats(stored) } else { in_rows(stored) });
        }
        let scales = Described::SCALES.join(size, scales);
        let scales = if compat { in_rows(scales.into_floats()) } else { scales };
        Ok([Described::RESIDUAL.join(size, words), scales])
    }
}

/// The layer that a name is of.
pub(super) fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Leaves the first `len` of `values`.
fn first(values: &mut Cow<'_, [u32]>, len: usize) {
    match values {
        Cow::Borrowed(values) => *values = &values[..len],
        Cow::Owned(values) => values.truncate(len),
    }
}

/// The file name of a shard: of this directory, never a path out of it.
fn shard_name(file: &Json) -> Result<String> {
    let name = file.as_str().with_context(|| format!("shard {file} is not a text"))?;
    ensure!(Path::new(name).file_name().is_some_and(|own| own == name), "shard {name:?} is not a plain file name");
    Ok(name.to_owned())
}

fn listed(names: &BTreeSet<&str>) -> String {
    let mut list = names.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
    if names.len() > NAMED {
        list += &format!(" and {} more", names.len() - NAMED);
    }
    list
}
