//! A compensation that costs little, where nobody has tuned: measured at first use, and kept for the next ones.
//!
//! A few choices are tried with whole tokens, those that compensate most first, until one costs a token 10 % at most. What
//! comes of it is kept in the cache directory under what decides it: device, driver, model and program.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::backend::{DecodeBackend, DeviceInfo};
use crate::config::{Projection, read_json};
use crate::dec::{CHUNK, Selection};
use crate::files;
use crate::fingerprint::Fingerprint;
use crate::model::{Compensation, LayerCompensation, Model, growth};
use crate::weights::ModelWeights;

/// The most that a default may cost, per cent.
const MOST_SLOWDOWN: f64 = 10.0;

/// How long choices are tried, after everything is compiled.
const PATIENCE: Duration = Duration::from_secs(2);

/// A token that takes longer is not measured: its products take so long that compensation hides among them.
const SLOW: Duration = Duration::from_millis(150);

/// Tokens of a measurement, and how long they should take together.
const TOKENS: usize = 16;
const STRETCH: Duration = Duration::from_millis(40);

/// What is tried, most channels first: `k_chunk` of qkv, o, gu and d. Short products hide least.
const TRIED: [[usize; 4]; 6] = [[8; 4], [0, 0, 8, 8], [4; 4], [0, 0, 4, 4], [0, 0, 2, 2], [0, 0, 0, 2]];

/// Thread blocks that are tried where layers are one launch, in which they are missing elsewhere.
const N_TBS: [usize; 3] = [4, 8, 16];

/// What was found, and how.
pub(super) struct FirstUse {
    /// `None`: nothing that was tried costs little enough.
    pub(super) compensation: Option<LayerCompensation>,
    /// What it costs a token, per cent; `None` where a token takes too long to measure.
    pub(super) slowdown: Option<f64>,
    /// `now`, or where it was kept.
    pub(super) kept: String,
}

/// The file that is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    device: String,
    driver: String,
    n_tb: usize,
    k_chunks: [usize; 4],
    slowdown: Option<f64>,
}

impl FirstUse {
    /// What is kept of this model on this device, or else what is measured now. The model is left compensated in some way
    /// or other.
    ///
    /// # Errors
    /// What the device says; tensors that cannot be read. A cache that cannot be read or written is only noted.
    pub(super) fn of<B: DecodeBackend>(
        model: &mut Model<'_, B>,
        weights: &dyn ModelWeights,
        selection: Selection,
    ) -> Result<Self> {
        let device = model.backend().device().clone();
        let path = files::cache_directory("compensation");
        let path = path.map(|dir| Ok::<_, anyhow::Error>(dir.join(name(&device, weights, selection)?))).transpose()?;
        if let Some((path, kept)) = path.as_deref().and_then(|path| Some((path, read(path, &device)?))) {
            return Ok(Self::new(&kept, format!("at first use, kept in {}", path.display())));
        }
        let (own, slowdown) = measure(model, selection)?;
        let LayerCompensation { n_tb, k_chunks } = own;
        let kept = Kept { device: device.name, driver: device.driver, n_tb, k_chunks, slowdown };
        if let Some(path) = &path
            && let Err(error) = write(path, &kept)
        {
            tracing::info!("{}: {error:#}, it is measured again the next time", path.display());
        }
        Ok(Self::new(&kept, "now".into()))
    }

    fn new(kept: &Kept, how: String) -> Self {
        let own = LayerCompensation { n_tb: kept.n_tb, k_chunks: kept.k_chunks };
        Self { compensation: (own.k_chunks != [0; 4]).then_some(own), slowdown: kept.slowdown, kept: how }
    }
}

/// The name of the file for this model on this device: everything that decides what comes out.
fn name(device: &DeviceInfo, weights: &dyn ModelWeights, selection: Selection) -> Result<PathBuf> {
    let config = weights.config();
    let mut all = Fingerprint::default();
    let bits: Vec<_> = (0..config.layers.len()).map(|layer| weights.bits(layer)).collect();
    let of = (env!("CARGO_PKG_VERSION"), &device.name, &device.driver, format!("{config:?} {bits:?} {selection:?}"));
    all.numbers(b"first use", format!("{of:?}").as_bytes());
    all.linear(&weights.projection(0, Projection::O)?);
    Ok(format!("{}.json", &all.digits()[..32]).into())
}

/// What is kept, if it is whole and of this device.
fn read(path: &Path, device: &DeviceInfo) -> Option<Kept> {
    if !path.is_file() {
        return None;
    }
    let kept = read_json(path).and_then(|json| Ok(serde_json::from_value::<Kept>(json)?));
    let sound = |kept: &Kept| {
        let fits = (1..=device.max_n_tb).contains(&kept.n_tb) && kept.k_chunks.iter().all(|&k| k <= CHUNK);
        fits && kept.device == device.name && kept.driver == device.driver
    };
    match kept {
        Ok(kept) if sound(&kept) => Some(kept),
        Ok(_) => None,
        Err(error) => {
            tracing::info!("{error:#}: it is measured again");
            None
        }
    }
}

fn write(path: &Path, kept: &Kept) -> Result<()> {
    files::make_directory(path.parent().context("a file has a directory")?)?;
    files::replace(path, |path| Ok(fs::write(path, crate::tuned::json(kept)?)?))
}

/// The first of the choices that costs little enough, and what it costs, per cent; else none with the cost of the last.
fn measure<B: DecodeBackend>(
    model: &mut Model<'_, B>,
    selection: Selection,
) -> Result<(LayerCompensation, Option<f64>)> {
    let backend = model.backend();
    let default = LayerCompensation::by_default(backend.device());
    let context = [model.config().bos_token_id.unwrap_or(0)];
    let room = model.config().max_position_embeddings.saturating_sub(context.len());
    let most = (1..=TOKENS).rev().find(|&tokens| growth(tokens) <= room);
    let Some(most) = most else { return Ok((default, None)) };
    let mut state = model.state(1, context.len() + growth(most))?;
    let most_n_tb = backend.device().max_n_tb;
    let n_tbs: Vec<usize> = match backend.fuses_layers() {
        true => N_TBS.into_iter().filter(|&n_tb| n_tb <= most_n_tb).collect(),
        false => vec![default.n_tb],
    };
    let ways: Vec<_> = TRIED
        .iter()
        .flat_map(|&k_chunks| n_tbs.iter().map(move |&n_tb| LayerCompensation { n_tb, k_chunks }))
        .collect();
    let so = |own: LayerCompensation| Compensation { by_bits: vec![own], selection };
    // All kernels at once.
    model.prepare_ways(&mut state, ways.len(), &mut |model, way| model.compensate(Some(&so(ways[way]))))?;
    model.compensate(None)?;
    let one = model.time_tokens(&mut state, &context, 1)?;
    if one > SLOW {
        return Ok((default, None));
    }
    let tokens = ((STRETCH.as_secs_f64() / one.as_secs_f64()) as usize).clamp(1, most);
    let started = Instant::now();
    let mut last = None;
    for own in ways {
        // Beside each other, so that a clock that drifts moves both.
        model.compensate(None)?;
        let base = model.time_tokens(&mut state, &context, tokens)?;
        model.compensate(Some(&so(own)))?;
        let took = model.time_tokens(&mut state, &context, tokens)?;
        let slowdown = (took.as_secs_f64() / base.as_secs_f64() - 1.0) * 100.0;
        tracing::debug!("{own:?}: {base:?} to {took:?}, {slowdown:+.2} %");
        if slowdown <= MOST_SLOWDOWN {
            return Ok((own, Some(slowdown)));
        }
        last = Some(slowdown);
        if started.elapsed() > PATIENCE {
            break;
        }
    }
    Ok((LayerCompensation { k_chunks: [0; 4], ..default }, last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::GemvBackend;
    use crate::backend::cpu::Cpu;
    use crate::config::ModelConfig;
    use crate::format::Storage;
    use crate::random::RandomWeights;

    fn weights(seed: u64) -> RandomWeights {
        let config = ModelConfig::from_json(&serde_json::json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 32,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        }));
        RandomWeights::new(config.unwrap(), Storage::ANYPREC, 3, seed).unwrap()
    }

    /// What was measured costs 10 % at most, by the same clock; or nothing is compensated.
    #[test]
    fn what_is_found_costs_little_or_is_nothing() {
        let (cpu, weights) = (Cpu::new(), weights(1));
        let mut model = Model::load(&cpu, &weights, |_| ()).unwrap();
        let (own, slowdown) = measure(&mut model, Selection::Bucket).unwrap();
        let slowdown = slowdown.expect("tokens of a tiny model are quick");
        assert_eq!(own.k_chunks == [0; 4], slowdown > MOST_SLOWDOWN, "{own:?}: {slowdown} %");
        assert!(own.k_chunks == [0; 4] || TRIED.contains(&own.k_chunks), "{own:?}");
    }

    #[test]
    fn what_is_kept_is_of_this_device_model_and_driver() {
        let (weights, dir) = (weights(1), tempfile::tempdir().unwrap());
        let device = Cpu::new().device().clone();
        let of = |device: &DeviceInfo, weights: &RandomWeights| name(device, weights, Selection::Bucket).unwrap();
        let file = of(&device, &weights);
        assert_eq!(file, of(&device, &weights));
        let others = [
            of(&DeviceInfo { name: "Another Card".into(), ..device.clone() }, &weights),
            of(&DeviceInfo { driver: "2".into(), ..device.clone() }, &weights),
            of(&device, &self::weights(2)),
            name(&device, &weights, Selection::Exact).unwrap(),
        ];
        assert!(others.iter().all(|other| *other != file), "{others:?}");

        let path = dir.path().join("there").join(file);
        let (device_name, driver) = (device.name.clone(), device.driver.clone());
        let kept = Kept { device: device_name, driver, n_tb: 2, k_chunks: [0, 0, 8, 8], slowdown: Some(3.5) };
        assert_eq!(read(&path, &device), None);
        write(&path, &kept).unwrap();
        assert_eq!(read(&path, &device), Some(kept.clone()));
        // Whatever is damaged, out of range or of another device is measured again.
        let spoiled = [
            Kept { n_tb: 0, ..kept.clone() },
            Kept { k_chunks: [0, 0, 8, 2000], ..kept.clone() },
            Kept { device: "Another Card".into(), ..kept.clone() },
            Kept { driver: "2".into(), ..kept },
        ];
        for spoiled in spoiled {
            write(&path, &spoiled).unwrap();
            assert_eq!(read(&path, &device), None, "{spoiled:?}");
        }
        for bytes in [&b"{"[..], b"", b"{\"device\": 3}"] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path, &device), None);
        }
    }
}
