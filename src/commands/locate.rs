//! From what the user calls a model to a path: one that is there, or a name on the Hugging Face Hub, whose model is
//! downloaded where it is not in the cache.

use std::borrow::Cow;
use std::path::Path;

use anyhow::Result;
use decdec::checkpoint::BitWidth;
use decdec::open::Opened;

/// The path of a model; a name on the Hub where there is no such path and it can be one.
///
/// # Errors
/// Those of [`decdec::hub::Hub::fetch`].
pub(crate) fn path(model: &Path) -> Result<Cow<'_, Path>> {
    #[cfg(feature = "hub")]
    if !model.exists()
        && let Some(name) = model.to_str().and_then(decdec::hub::ModelName::parse)
    {
        use decdec::hub::{Hub, Settings};
        let hub = Hub::new(Settings::from_env(|name| std::env::var_os(name))?)?;
        return hub.fetch(&name, &super::Bar::of_bytes()).map(Cow::Owned);
    }
    Ok(Cow::Borrowed(model))
}

/// The model of a path or a name, which goes by that name.
///
/// # Errors
/// Those of [`path`] and [`Opened::open`].
pub(crate) fn open(model: &Path, bits: Option<BitWidth>, compat_scale_order: bool) -> Result<Opened> {
    let path = path(model)?;
    let opened = Opened::open(&path, bits, compat_scale_order)?;
    Ok(match (path, model.to_str()) {
        (Cow::Owned(_), Some(name)) => opened.called(name),
        _ => opened,
    })
}
