//! Models of the Hugging Face Hub by their name, kept in the cache that Python's `huggingface_hub` uses.
//!
//! The Hub answers three requests: what files a model has at a revision, what one of them is (`HEAD`), and its bytes
//! (`GET`, from any byte on). Large files come from another host, which must never see the token. In the cache, a file
//! lies once under the name that the Hub gives its contents, its `ETag`, and every revision links to it:
//! ```text
//! models--ORG--MODEL/
//!   blobs/ETAG                  contents; ETAG.incomplete while they come
//!   refs/main                   the commit that the revision was, when it was last asked
//!   snapshots/COMMIT/FILE  ->   ../../blobs/ETAG
//! ```

mod cache;
mod choice;
mod download;
mod http;
mod name;
mod settings;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::config::{ModelConfig, read_json};
use crate::progress::Progress;
use cache::Repository;
use download::Remote;
use http::{Client, Failure};
pub use name::ModelName;
pub use settings::Settings;

/// A hub of models, and the cache of what came from it.
pub struct Hub {
    settings: Settings,
    client: Client,
}

/// The files of a model at one commit.
struct Listing {
    commit: String,
    files: BTreeSet<String>,
}

impl Hub {
    /// A hub as the settings say; nothing is asked yet.
    ///
    /// # Errors
    /// A file of certificates that cannot be read.
    pub fn new(settings: Settings) -> Result<Self> {
        let client = Client::new(&settings)?;
        Ok(Self { settings, client })
    }

    /// The directory of a model in the cache, with everything that this program reads of it: what is not there yet is
    /// downloaded, and goes on where an earlier download was cut. Where the hub cannot be reached, what an earlier call
    /// has left serves, if it is whole. `progress` counts bytes.
    ///
    /// # Errors
    /// A model that the hub does not have or does not show, one of a kind that this program cannot run (before its weights are
    /// downloaded), contents that are not what the hub says, a disk that takes no more.
    pub fn fetch(&self, model: &ModelName, progress: &dyn Progress) -> Result<PathBuf> {
        let kept = Repository::new(&self.settings.cache, model);
        if self.settings.offline {
            return kept.whole(model).context("HF_HUB_OFFLINE forbids to ask the hub: unset it to download the model");
        }
        let listing = match self.listing(model) {
            Ok(listing) => listing,
            Err(Failure::Refused(error)) => return Err(error),
            Err(Failure::Unreachable(why) | Failure::Away(why)) => {
                let unreachable = format!("cannot reach {}", self.settings.endpoint);
                let found = kept.whole(model).with_context(|| format!("{unreachable}: {why}"))?;
                tracing::warn!("{unreachable}, the copy of {model} in the cache is taken: {why}");
                return Ok(found);
            }
        };
        let has = |name: &str| listing.files.contains(name);
        ensure!(
            has("config.json") && has("tokenizer.json"),
            "{model} lacks {}: name a model that transformers has saved, with its tokenizer, as safetensors",
            if has("config.json") { "tokenizer.json" } else { "config.json" },
        );
        let place = kept.snapshot(&listing.commit);
        let small = choice::small(&listing.files);
        let bytes = self.download(model, (&kept, &listing.commit), &small, 0, progress)?;
        ensure_runnable(&place).with_context(|| format!("{model} was not downloaded"))?;
        let weights = choice::weights(&listing.files, &place).with_context(|| model.to_string())?;
        self.download(model, (&kept, &listing.commit), &weights, bytes, progress)?;
        kept.point(model.revision(), &listing.commit)?;
        Ok(place)
    }

    /// What the hub has of a model.
    fn listing(&self, model: &ModelName) -> Result<Listing, Failure> {
        let revision = model.revision().replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}", self.settings.endpoint, model.repository());
        let json = self.client.json(&url, model)?;
        let unexpected =
            || Failure::Refused(anyhow::anyhow!("{url} does not answer as a hub does, is HF_ENDPOINT right?"));
        let commit =
            json.get("sha").and_then(Value::as_str).filter(|sha| name::is_plain(sha)).ok_or_else(unexpected)?;
        let siblings = json.get("siblings").and_then(Value::as_array).ok_or_else(unexpected)?;
        // What this program reads lies in no directory: a name with one is nobody's to make a path of.
        let files = siblings.iter().filter_map(|file| file["rfilename"].as_str()).filter(|file| name::is_plain(file));
        Ok(Listing { commit: commit.to_owned(), files: files.map(str::to_owned).collect() })
    }

    /// Downloads those of a commit's files that are not there, after so many bytes of others; how many there are then.
    fn download(
        &self,
        model: &ModelName,
        (kept, commit): (&Repository, &str),
        files: &[String],
        before: u64,
        progress: &dyn Progress,
    ) -> Result<u64> {
        let missing = files.iter().filter(|file| !kept.has(commit, file));
        let remotes: Vec<_> = missing
            .map(|file| {
                let url = format!("{}/{}/resolve/{commit}/{file}", self.settings.endpoint, model.repository());
                Remote::ask(&self.client, model, file, url)
            })
            .collect::<Result<_>>()?;
        let bytes = before + remotes.iter().filter_map(|remote| remote.size).sum::<u64>();
        progress.set_length(bytes);
        for remote in remotes {
            progress.set_message(&remote.file);
            remote.fetch(&self.client, model, kept, progress)?;
            kept.link(commit, &remote.file, &remote.etag)?;
        }
        Ok(bytes)
    }
}

/// Says what stands against running a model before its weights are downloaded.
fn ensure_runnable(place: &Path) -> Result<()> {
    let mut config = read_json(&place.join("config.json"))?;
    // A checkpoint of ours says there what it is.
    config.as_object_mut().map(|fields| fields.remove("decdec"));
    ModelConfig::from_json(&config).map(drop)
}
