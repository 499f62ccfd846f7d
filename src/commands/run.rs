//! `decdec run`: from a model's name to a chat. What takes long, download and quantization, is done once and kept.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use decdec::checkpoint::{BitWidth, Checkpoint};
use decdec::files;
use decdec::open::Opened;

use super::{chat, locate, quantize};
use crate::cli::{self, RunByNameArgs};

/// Bits of a weight where nobody says how many: what is lost then, few will notice.
const BITS: &str = "4";

/// Runs the command.
pub(crate) fn run(args: &RunByNameArgs) -> Result<()> {
    let (model, bits) = asked(&args.model)?;
    if model.exists() {
        let opened = Opened::open(&model, bits, args.talk.run.compat_scale_order)?;
        opened.expect(None, bits.filter(|_| opened.quantization().is_some()), None)?;
        ensure!(
            opened.quantization().is_some(),
            "{} is full precision: decdec quantize makes a checkpoint of it, which decdec run takes",
            model.display()
        );
        return chat::talk(&opened, &args.talk);
    }
    let name = model.to_str().filter(|name| is_name(name));
    let name = name
        .with_context(|| format!("{} is neither a directory nor ORG/MODEL on the Hugging Face Hub", model.display()))?;
    let bits_or_usual = bits.map_or_else(|| BITS.parse(), Ok)?;
    let kept = kept(name, bits_or_usual)?;
    if !Checkpoint::is_at(&kept) {
        let opened = locate::open(&model, bits, args.talk.run.compat_scale_order)?;
        if opened.quantization().is_some() {
            // Somebody has done it.
            opened.expect(None, bits, None)?;
            return chat::talk(&opened, &args.talk);
        }
        drop(opened);
        std::fs::create_dir_all(kept.parent().context("a checkpoint has a place")?)
            .with_context(|| format!("cannot create {}", kept.display()))?;
        let device = match args.talk.run.on.device.as_str() {
            // Only these quantize.
            device if device == "cpu" || device.starts_with("cuda") => device,
            _ => "auto",
        };
        tracing::info!("quantizing {name} to {bits_or_usual} bits, once");
        quantize::run(&cli::quantize_by_default(&model, bits_or_usual, &kept, device)?)?;
    }
    tracing::info!("{name} at {bits_or_usual} bits is kept in {}", kept.display());
    let opened = Opened::open(&kept, None, false)
        .with_context(|| format!("remove {} to have it made anew", kept.display()))?
        .called(name);
    chat::talk(&opened, &args.talk)
}

/// The model, and the bits behind a colon; a path that exists is taken as it is.
fn asked(model: &Path) -> Result<(PathBuf, Option<BitWidth>)> {
    let parts = model.to_str().filter(|_| !model.exists()).and_then(|text| text.rsplit_once(':'));
    let Some((name, bits)) = parts else { return Ok((model.to_owned(), None)) };
    let bits = bits.parse().with_context(|| format!("in {}", model.display()))?;
    Ok((name.into(), Some(bits)))
}

#[cfg(feature = "hub")]
fn is_name(text: &str) -> bool {
    decdec::hub::ModelName::parse(text).is_some()
}

#[cfg(not(feature = "hub"))]
fn is_name(_: &str) -> bool {
    false
}

/// Where the quantized model of a name is kept.
fn kept(name: &str, bits: BitWidth) -> Result<PathBuf> {
    let Some(models) = files::cache_directory("models") else {
        bail!("there is no directory to keep quantized models in, set DECDEC_CACHE_DIR")
    };
    Ok(models.join(format!("{}-ap-{bits}", name.replace('/', "--"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_stand_behind_a_colon() {
        let of = |text: &str| asked(Path::new(text)).map(|(model, bits)| (model, bits.map(|bits| bits.to_string())));
        assert_eq!(of("a/b").unwrap(), ("a/b".into(), None));
        assert_eq!(of("a/b:3").unwrap(), ("a/b".into(), Some("3".into())));
        assert_eq!(of("a/b@v1:3.5").unwrap(), ("a/b@v1".into(), Some("3.5".into())));
        for wrong in ["a/b:", "a/b:x", "a/b:99"] {
            assert!(format!("{:#}", of(wrong).unwrap_err()).starts_with(&format!("in {wrong}: ")), "{wrong}");
        }
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("m:3");
        std::fs::create_dir(&odd).unwrap();
        assert_eq!(asked(&odd).unwrap(), (odd.clone(), None), "a path that exists wins");
    }
}
