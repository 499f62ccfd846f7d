//! How a `config.json` says that heads are rotated: in `rope_parameters`, or as older versions wrote it, in
//! `rope_scaling` and fields beside it. What is said twice must be the same.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Fields;
use crate::config::{Pairing, Rope, RopeScaling};

/// What the class of a family has of its own about RoPE.
#[derive(Debug, Clone, Copy)]
pub(in crate::config) struct RopeRules {
    /// The base where none is said.
    pub(in crate::config) theta: f64,
    /// The part of a head that turns where none is said; `None` where the class turns whole heads only.
    pub(in crate::config) rotated: Option<f64>,
    /// Which channels turn together.
    pub(in crate::config) pairing: Pairing,
    /// The types that the class takes, by name.
    pub(in crate::config) types: &'static [(&'static str, Kind)],
    /// Fields that may stand in the object about RoPE and belong to something else.
    pub(in crate::config) others: &'static [&'static str],
}

/// What a type of scaling computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum Kind {
    Default,
    Linear,
    Llama3,
    Yarn,
    LongRope,
}

impl RopeRules {
    /// Llama's, which most families share.
    pub(in crate::config) const LLAMA: Self = Self {
        theta: 10_000.0,
        rotated: None,
        pairing: Pairing::Halves,
        types: &[
            ("default", Kind::Default),
            ("linear", Kind::Linear),
            ("llama3", Kind::Llama3),
            ("yarn", Kind::Yarn),
            ("longrope", Kind::LongRope),
        ],
        others: &[],
    };

    /// The names of the types, as a message lists them.
    fn listed(&self) -> String {
        crate::config::families::listed(&self.types.iter().map(|(name, _)| *name).collect::<Vec<_>>())
    }
}

/// Where RoPE's constants are: in objects of the newer and the older spelling, either or both.
const OBJECTS: [&str; 2] = ["rope_parameters", "rope_scaling"];

/// What may stand in such an object, whatever its type. Others change what a type computes.
const KEYS: [&str; 9] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "finetuned",
];

impl Kind {
    /// What may stand there besides.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Yarn => &["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"],
            Self::LongRope => &["attention_factor", "short_factor", "long_factor"],
            _ => &[],
        }
    }
}

/// Where an object about RoPE stands.
#[derive(Clone, Copy)]
struct Place<'a> {
    rules: &'a RopeRules,
    /// The configuration.
    whole: Fields<'a>,
    /// `Some` where each type of layer has an object of its own: whether the ends of YaRN's ramp are rounded, which
    /// then is said once beside these objects ([`Fields::truncates`]).
    nested: Option<bool>,
    /// Channels that turn.
    rotary_dim: usize,
}

impl<'a> Fields<'a> {
    /// How the heads of a model with one rotation turn.
    pub(in crate::config) fn rope(self, head_dim: usize, rules: &RopeRules) -> Result<Rope> {
        let objects = self.rope_objects()?;
        let places = || [self].into_iter().chain(objects.iter().map(|(_, object)| *object));
        let theta = agreed("rope_theta", places())?.unwrap_or(rules.theta);
        let rotary_dim = rotary_dim(head_dim, agreed("partial_rotary_factor", places())?, rules)?;
        let place = Place { rules, whole: self, nested: None, rotary_dim };
        let scalings = objects.iter().map(|(name, object)| object.scaling(place).with_context(|| *name));
        let scaling = same(scalings.collect::<Result<Vec<_>>>()?)?;
        checked(Rope { head_dim, rotary_dim, pairing: rules.pairing, theta, scaling })
    }

    /// How the heads turn in layers that see the whole text and in those that see a window: by the object of each in
    /// `rope_parameters`. In the older spelling `rope_theta` and `rope_scaling` are those of the former, the latter are
    /// never scaled, and `local_theta` names the field with their base.
    pub(in crate::config) fn ropes_of_layer_types(
        self,
        head_dim: usize,
        full: &RopeRules,
        sliding: &RopeRules,
        local_theta: Option<&str>,
    ) -> Result<[Rope; 2]> {
        const TYPES: [&str; 2] = ["full_attention", "sliding_attention"];
        let objects = self.rope_objects()?;
        let newer = objects.iter().find(|(name, _)| *name == OBJECTS[0]).map(|(_, object)| *object);
        for (key, value) in newer.and_then(|object| object.json.as_object()).into_iter().flatten() {
            ensure!(
                TYPES.contains(&key.as_str()) || key == "truncate",
                "rope_parameters: {key} is {value}, one object for {} and one for {} are expected",
                TYPES[0],
                TYPES[1]
            );
        }
        let nested = |name: &str| newer.and_then(|object| object.present(name)).map(Fields::new);
        let nested_truncate = newer.map_or(Ok(true), Fields::truncates)?;
        let older = objects.iter().find(|(name, _)| *name == OBJECTS[1]).map(|(_, object)| *object);
        let rope = |rules: &RopeRules, inner: [Option<Fields<'a>>; 2], outer: Option<f64>| {
            let inner: Vec<Fields<'a>> = inner.into_iter().flatten().collect();
            let theta = agreed("rope_theta", inner.iter().copied())?;
            ensure!(
                theta.is_none() || outer.is_none() || theta == outer,
                "rope_theta is {} in one place and {} in another, leave one out",
                theta.unwrap_or_default(),
                outer.unwrap_or_default()
            );
            let place = Place { rules, whole: self, nested: Some(nested_truncate), rotary_dim: head_dim };
            let scalings = inner.iter().map(|object| {
                rotary_dim(head_dim, object.positive("partial_rotary_factor")?, rules)?;
                object.scaling(place).with_context(|| if newer.is_some() { OBJECTS[0] } else { OBJECTS[1] })
            });
            let scaling = same(scalings.collect::<Result<Vec<_>>>()?)?;
            let theta = theta.or(outer).unwrap_or(rules.theta);
            checked(Rope { head_dim, rotary_dim: head_dim, pairing: rules.pairing, theta, scaling })
        };
        rotary_dim(head_dim, self.positive("partial_rotary_factor")?, full)?;
        let local = local_theta.map(|key| self.positive(key)).transpose()?.flatten();
        Ok([
            rope(full, [nested(TYPES[0]), older], self.positive("rope_theta")?)?,
            rope(sliding, [nested(TYPES[1]), None], local)?,
        ])
    }

    /// A field of the object that says how heads turn.
    pub(in crate::config) fn in_rope(self, key: &str) -> Result<Option<f64>> {
        let objects = self.rope_objects()?;
        let found = objects.iter().find(|(_, object)| object.present(key).is_some());
        found.map_or(Ok(None), |(name, object)| object.not_negative(key).with_context(|| *name))
    }

    /// The objects that say something, with their names.
    fn rope_objects(self) -> Result<Vec<(&'static str, Fields<'a>)>> {
        let mut objects = Vec::new();
        for name in OBJECTS {
            let Some(object) = self.present(name) else { continue };
            let fields =
                object.as_object().with_context(|| format!("{name} is {object}, an object or null is expected"))?;
            if !fields.is_empty() {
                objects.push((name, Fields::new(object)));
            }
        }
        Ok(objects)
    }

    /// How one object says that frequencies are scaled.
    fn scaling(self, place: Place<'_>) -> Result<RopeScaling> {
        let name = self.rope_type(place.rules)?;
        let found = place.rules.types.iter().find(|(own, _)| *own == name);
        let Some(&(_, kind)) = found else {
            bail!("RoPE type {name:?} is unknown, {} is expected", place.rules.listed());
        };
        let scaling = match kind {
            Kind::Default => RopeScaling::None,
            Kind::Linear => match self.needed("factor")? {
                1.0 => RopeScaling::None,
                factor => RopeScaling::Linear { factor },
            },
            Kind::Llama3 => {
                let (low, high) = (self.needed("low_freq_factor")?, self.needed("high_freq_factor")?);
                ensure!(low < high, "low_freq_factor {low} is not below high_freq_factor {high}");
                RopeScaling::Llama3 {
                    factor: self.needed("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: self.original(place)?,
                }
            }
            Kind::Yarn => self.yarn(place)?,
            Kind::LongRope => self.longrope(place)?,
        };
        let known = |key: &str| KEYS.iter().chain(kind.keys()).chain(place.rules.others).any(|known| *known == key);
        let mut unknown = self.json.as_object().into_iter().flatten().filter(|(key, v)| !v.is_null() && !known(key));
        if let Some((key, value)) = unknown.next() {
            bail!(
                "{key} is {value}, which is not known for the RoPE type {name:?}: leave it out if it changes nothing"
            );
        }
        Ok(scaling)
    }

    fn yarn(self, place: Place<'_>) -> Result<RopeScaling> {
        let factor = self.needed("factor")?;
        let growth = |mscale: f64| if factor > 1.0 { 0.1 * mscale * factor.ln() + 1.0 } else { 1.0 };
        let (mscale, all_dim) = (self.not_negative("mscale")?, self.not_negative("mscale_all_dim")?);
        let by_default = match (mscale.unwrap_or(0.0), all_dim.unwrap_or(0.0)) {
            // 0 counts as not said.
            (0.0, _) | (_, 0.0) => growth(1.0),
            (mscale, all_dim) => growth(mscale) / growth(all_dim),
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: self.original(place)?,
            beta_fast: self.positive("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.positive("beta_slow")?.unwrap_or(1.0),
            truncate: place.nested.map_or_else(|| self.truncates(), Ok)?,
            attention_factor: self.positive("attention_factor")?.unwrap_or(by_default),
        })
    }

    /// Whether the ends of YaRN's ramp are rounded: true where nothing is said, and null counts as false.
    fn truncates(self) -> Result<bool> {
        Ok(self.json.get("truncate").is_none() || self.boolean("truncate")?.unwrap_or(false))
    }

    fn longrope(self, place: Place<'_>) -> Result<RopeScaling> {
        let original = self.original(place)?;
        ensure!(original > 1.0, "original_max_position_embeddings is {original}, 2 or more is expected");
        let factor = match self.positive("factor")? {
            Some(factor) => factor,
            None => place.whole.dimension("max_position_embeddings")? as f64 / original,
        };
        let by_default = if factor > 1.0 { (1.0 + factor.ln() / original.ln()).sqrt() } else { 1.0 };
        let divisors = |key: &str| {
            let value = self.present(key).with_context(|| format!("the RoPE scaling has no {key}"))?;
            let number = |n: &Value| n.as_f64().filter(|n| *n > 0.0);
            let numbers = value.as_array().and_then(|list| list.iter().map(number).collect::<Option<Vec<f64>>>());
            let numbers =
                numbers.with_context(|| format!("{key} is {value}, a list of numbers above 0 is expected"))?;
            let (count, pairs) = (numbers.len(), place.rotary_dim / 2);
            ensure!(count == pairs, "{key} has {count} numbers, one for each pair of channels, {pairs}, is expected");
            Ok(numbers)
        };
        Ok(RopeScaling::LongRope {
            short_factor: divisors("short_factor")?,
            long_factor: divisors("long_factor")?,
            original_max_position_embeddings: original as usize,
            attention_factor: self.positive("attention_factor")?.unwrap_or(by_default),
        })
    }

    fn needed(self, key: &str) -> Result<f64> {
        self.positive(key)?.with_context(|| format!("the RoPE scaling has no {key}"))
    }

    /// The context of the first training. What stands beside the object counts more than what is in it.
    fn original(self, place: Place<'_>) -> Result<f64> {
        const KEY: &str = "original_max_position_embeddings";
        let beside = if place.nested.is_none() { place.whole.positive(KEY)? } else { None };
        match beside.or(self.positive(KEY)?) {
            Some(original) => Ok(original),
            None => Ok(place.whole.dimension("max_position_embeddings")? as f64),
        }
    }

    /// The type of scaling, under the newer name or the older one. Versions of transformers differ in which of them
    /// counts.
    fn rope_type(self, rules: &RopeRules) -> Result<&'a str> {
        let plain = |key: &String| matches!(key.as_str(), "rope_theta" | "partial_rotary_factor");
        match (self.text("rope_type")?, self.text("type")?) {
            (Some(new), Some(old)) if new != old => {
                let kind = |name| rules.types.iter().find(|(own, _)| *own == name).map(|(_, kind)| *kind);
                ensure!(
                    kind(new).is_some() && kind(new) == kind(old),
                    "rope_type is {new:?}, but type is {old:?}, leave one out"
                );
                Ok(new)
            }
            (Some(kind), _) | (None, Some(kind)) => Ok(kind),
            (None, None) if self.json.as_object().is_some_and(|object| object.keys().all(plain)) => Ok("default"),
            (None, None) => {
                bail!("the RoPE scaling {} has no rope_type, {} is expected", self.json, rules.listed())
            }
        }
    }
}

/// What is said of `key` in any of these places; an error where two of them differ.
fn agreed<'a>(key: &str, places: impl Iterator<Item = Fields<'a>>) -> Result<Option<f64>> {
    let mut found: Option<f64> = None;
    for place in places {
        let Some(value) = place.positive(key)? else { continue };
        if let Some(first) = found.filter(|first| *first != value) {
            bail!("{key} is {first} in one place and {value} in another, leave one out");
        }
        found = Some(value);
    }
    Ok(found)
}

/// The one scaling that all objects agree on.
fn same(scalings: Vec<RopeScaling>) -> Result<RopeScaling> {
    if let [one, other] = &scalings[..] {
        ensure!(one == other, "rope_parameters is {one:?}, but rope_scaling is {other:?}, leave one out");
    }
    Ok(scalings.into_iter().next().unwrap_or(RopeScaling::None))
}

/// Refuses what YaRN's logarithms have no answer to.
fn checked(rope: Rope) -> Result<Rope> {
    let yarn = matches!(rope.scaling, RopeScaling::Yarn { .. });
    ensure!(!yarn || rope.theta > 1.0, "rope_theta is {}, a number above 1 is expected with YaRN", rope.theta);
    Ok(rope)
}

/// How many channels of a head turn.
fn rotary_dim(head_dim: usize, said: Option<f64>, rules: &RopeRules) -> Result<usize> {
    let rotated = said.or(rules.rotated).unwrap_or(1.0);
    ensure!(rules.rotated.is_some() || rotated == 1.0, "partial_rotary_factor is {rotated}, only 1 is supported");
    let channels = (head_dim as f64 * rotated) as usize;
    ensure!(
        rotated <= 1.0 && channels > 0 && (channels.is_multiple_of(2) || rotated == 1.0),
        "partial_rotary_factor is {rotated} of a head_dim of {head_dim}, an even number of channels is expected to turn"
    );
    Ok(channels)
}

/// The longest text that frequencies are stretched for: YaRN's `factor` times the original context.
pub(super) fn stretched(rope: &Rope) -> Option<f64> {
    match rope.scaling {
        RopeScaling::Yarn { factor, original_max_position_embeddings, .. } => {
            Some(factor * original_max_position_embeddings)
        }
        _ => None,
    }
}
