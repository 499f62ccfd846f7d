//! How a model is compensated when nobody says so in so many words, and the line that tells.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::first_use::FirstUse;
use super::{Compensate, Options};
use crate::backend::DecodeBackend;
use crate::model::{LayerCompensation, Model};
use crate::open::Opened;
use crate::quantize::made_for;
use crate::tuned::Tuned;

/// How `model`, which was loaded from `opened`, is to be compensated; what was not asked for in so many words is noted.
/// The model may be left compensated in some other way.
pub(super) fn settled<B: DecodeBackend>(
    model: &mut Model<'_, B>,
    opened: &Opened,
    options: &Options,
) -> Result<Option<Vec<LayerCompensation>>> {
    let is_full_precision = model.bit_widths().is_empty();
    match &options.compensate {
        Compensate::Off => return Ok(None),
        Compensate::Sets(sets) => return Ok(Some(sets.clone())),
        Compensate::File(file) => {
            ensure!(!is_full_precision, "a full-precision model has nothing to compensate, leave the tuned file out");
            return tuned(model, file).with_context(|| file.display().to_string()).map(Some);
        }
        Compensate::Tuned | Compensate::AsMade if is_full_precision => return Ok(None),
        Compensate::Tuned => {
            let beside = opened.path().map(|path| path.join("tuned.json")).filter(|file| file.is_file());
            if let Some(file) = beside {
                // A damaged file is an error; one of another device or model is not.
                Tuned::read(&file)?;
                match tuned(model, &file) {
                    Ok(sets) => return Ok(Some(sets)),
                    Err(error) => tracing::info!("{} is left aside: {error:#}", file.display()),
                }
            }
        }
        Compensate::AsMade => {}
    }
    if !model.has_residuals() {
        tracing::info!("the model has no residuals: nothing is compensated");
        return Ok(None);
    }
    if options.compensate == Compensate::AsMade {
        return Ok(Some(as_made(model, opened)));
    }
    let FirstUse { compensation, slowdown, kept } = FirstUse::of(model, opened.weights(), options.selection)?;
    let costs = match slowdown {
        Some(slowdown) => format!("{slowdown:+.1} % of a token, measured {kept}"),
        None => "a token takes too long to measure".to_owned(),
    };
    let Some(sets) = compensation.map(|own| vec![own]) else {
        tracing::info!("compensating nothing: all that was tried cost more than 10 % ({kept}; decdec tune tries more)");
        return Ok(None);
    };
    tracing::info!("compensating with {} ({costs}; not tuned for this device)", LayerCompensation::spelled(&sets));
    Ok(Some(sets))
}

/// What the checkpoint was made for, in each of the model's widths.
fn as_made<B: DecodeBackend>(model: &Model<'_, B>, opened: &Opened) -> Vec<LayerCompensation> {
    let default = LayerCompensation::by_default(model.backend().device());
    let made = opened.manifest().and_then(|manifest| made_for(&manifest.calibration));
    let sets = match made {
        Some([low, high]) if model.bit_widths().len() > 1 => {
            [low, high].map(|k_chunks| LayerCompensation { k_chunks, ..default }).to_vec()
        }
        Some([k_chunks, _]) => vec![LayerCompensation { k_chunks, ..default }],
        None => vec![default],
    };
    let why = if made.is_some() { "as the checkpoint was made for" } else { "as nothing says otherwise" };
    tracing::info!("compensating with {}, {why}", LayerCompensation::spelled(&sets));
    sets
}

/// What `file` says of this device and model: a set for each bit width.
fn tuned<B: DecodeBackend>(model: &Model<'_, B>, file: &Path) -> Result<Vec<LayerCompensation>> {
    let shapes = model.config().shapes(0);
    let chosen = Tuned::choose(&Tuned::read(file)?, model.backend().device(), shapes, &model.bit_widths())?;
    let sets: Vec<_> =
        chosen.iter().map(|tuned| LayerCompensation { n_tb: tuned.n_tb, k_chunks: tuned.k_chunks }).collect();
    tracing::info!("compensating with {}, as {} says", LayerCompensation::spelled(&sets), file.display());
    Ok(sets)
}
