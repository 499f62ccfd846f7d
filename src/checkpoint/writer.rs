//! Writing a checkpoint: layer by layer into a directory beside the target, renamed into place at the end.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::Dtype;

use super::tensors::{self, Tensor, Tensors, write_error};
use super::{BITWIDTHS, CONFIG, Checkpoint, MODEL, Manifest, RESIDUALS, Stored, THRESHOLDS};
use super::{EMBEDDING, FINAL_NORM, HEAD, INPUT_NORM, POST_NORM, config_json, layer_prefix, prefix};
use crate::config::{ModelConfig, Projection};
use crate::format::Dense;
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, Weight};

const KEY: &str = "job.txt";
const NO_JOB: &str = "finished";
const LOCK: &str = "job.lock";
const RESULT: &str = "checkpoint";
const REPLACED: &str = "replaced";

/// A checkpoint in the making: `OUT.partial` beside the target `OUT`, which stays as it is until
/// [`CheckpointWriter::finish`]. Finished layers survive an interruption.
#[derive(Debug)]
pub struct CheckpointWriter {
    out: PathBuf,
    partial: PathBuf,
    _lock: File,
}

impl CheckpointWriter {
    /// Starts, or goes on, with a checkpoint at `out`. `key` says everything that the result depends on: what an
    /// interrupted job with another key left is discarded.
    ///
    /// # Errors
    /// `out` exists and `overwrite` is false, or is something other than a checkpoint; another process is at it.
    pub fn create(out: &Path, key: &str, overwrite: bool) -> Result<Self> {
        let name = out.file_name().with_context(|| format!("{} names no directory", out.display()))?;
        let mut partial_name = name.to_owned();
        partial_name.push(".partial");
        let partial = out.with_file_name(partial_name);
        bring_back(&partial, out)?;
        ensure_replaceable(out, overwrite)?;
        ensure_ours(&partial)?;
        make_dir(&partial)?;
        let lock = lock(&partial)?;
        if let Some(found) = fs::read_to_string(partial.join(KEY)).ok().filter(|found| found != key) {
            if found != NO_JOB {
                tracing::warn!("{} is from another job, it is discarded", partial.display());
            }
            clear(&partial)?;
        }
        let writer = Self { out: out.to_owned(), partial, _lock: lock };
        writer.write_file(KEY, key.as_bytes())?;
        Ok(writer)
    }

    /// Keeps a file of the job beside the layers, atomically: what makes going on cheaper.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (new, path) = (self.partial.join(format!("{name}.new")), self.partial.join(name));
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|e| write_error(e, &path, bytes.len()))
    }

    /// What [`CheckpointWriter::write_file`] kept under that name; `None` if there is nothing.
    pub fn read_file(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.partial.join(name)).ok()
    }

    /// True if this layer is finished at this bit width.
    pub fn has_layer(&self, layer: usize, bits: u32) -> bool {
        Tensors::open(&self.layer_path(layer, bits)).is_ok()
    }

    /// Keeps a finished layer, atomically: its norms and its four projections in the order of
    /// [`Projection::ALL`], each with residual and thresholds, or all of them without.
    ///
    /// # Errors
    /// Whatever the disk says; a projection that is not quantized.
    pub fn write_layer(
        &self,
        layer: usize,
        bits: u32,
        norms: &(Vec<f32>, Vec<f32>),
        linears: &[Linear<'_>; 4],
    ) -> Result<()> {
        let norm = |name, values: &'_ [f32]| (format!("{}.{name}", layer_prefix(layer)), values.len());
        let (input, hidden) = norm(INPUT_NORM, &norms.0);
        let (post, _) = norm(POST_NORM, &norms.1);
        let mut list = vec![Tensor::f32(input, &[hidden], &norms.0), Tensor::f32(post, &[hidden], &norms.1)];
        for (projection, linear) in Projection::ALL.into_iter().zip(linears) {
            push_linear(&mut list, &prefix(layer, projection), linear)?;
        }
        let path = self.layer_path(layer, bits);
        let new = path.with_extension("new");
        tensors::write(&new, list)?;
        fs::rename(&new, &path).map_err(|e| write_error(e, &path, 0))
    }

    /// A finished layer, as the checkpoint will hold it.
    ///
    /// # Errors
    /// The layer is not finished at this bit width.
    pub fn layer(&self, layer: usize, bits: u32) -> Result<LayerFile> {
        Ok(LayerFile { layer, bits, tensors: Tensors::open(&self.layer_path(layer, bits))? })
    }

    /// Puts the finished layers and the rest of the model together and renames the result to the target.
    /// `bits[layer]` chooses the width of every layer.
    ///
    /// # Errors
    /// A layer that is not finished, or whatever the disk says; the target is as it was then.
    pub fn finish(
        self,
        config: &ModelConfig,
        manifest: &Manifest,
        bits: &[u32],
        rest: &Unquantized<'_>,
        texts: &TextFiles,
    ) -> Result<()> {
        // Files that an interrupted attempt has left, of this job or of the checkpoint that it replaced, are gone.
        let dir = self.partial.join(RESULT);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot empty {}", dir.display()))?;
        }
        make_dir(&dir)?;
        let layers = bits
            .iter()
            .enumerate()
            .map(|(layer, &bits)| Tensors::open(&self.layer_path(layer, bits)))
            .collect::<Result<Vec<_>>>()?;
        let mut files = [rest.tensors(config), Vec::new(), Vec::new()];
        for tensor in layers.iter().flat_map(Tensors::iter) {
            let file = match tensor.name.rsplit('.').next() {
                Some("residual" | "scales") => 1,
                Some("thresholds") => 2,
                _ => 0,
            };
            files[file].push(tensor);
        }
        let written = if manifest.has_residuals() { 3 } else { 1 };
        for (name, list) in [MODEL, RESIDUALS, THRESHOLDS].into_iter().zip(files).take(written) {
            tensors::write(&dir.join(name), list)?;
        }
        let mut json = config_json::write(config);
        json["decdec"] = serde_json::to_value(manifest)?;
        write_json(&dir.join(CONFIG), &json)?;
        if manifest.bits.is_mixed() {
            let map: serde_json::Map<_, _> =
                bits.iter().enumerate().map(|(layer, &bits)| (layer.to_string(), bits.into())).collect();
            write_json(&dir.join(BITWIDTHS), &map.into())?;
        }
        texts.write(&dir)?;
        Checkpoint::open(&dir).context("the finished checkpoint does not pass its own checks")?;
        replace(&dir, &self.out)?;
        clear(&self.partial)?;
        fs::remove_dir_all(&self.partial).with_context(|| format!("cannot remove {}", self.partial.display()))
    }

    fn layer_path(&self, layer: usize, bits: u32) -> PathBuf {
        self.partial.join(format!("layer-{layer:03}-{bits}bit.safetensors"))
    }
}

/// A finished layer of a checkpoint in the making, memory-mapped.
#[derive(Debug)]
pub struct LayerFile {
    layer: usize,
    bits: u32,
    tensors: Tensors,
}

impl LayerFile {
    /// γ before attention and γ before the feed-forward part.
    ///
    /// # Errors
    /// As when a checkpoint is opened.
    pub fn norms(&self, config: &ModelConfig) -> Result<(Vec<f32>, Vec<f32>)> {
        super::read_norms(&self.tensors, self.layer, config)
    }

    /// One projection of a layer with residuals, `group_size` as in the [`Manifest`].
    ///
    /// # Errors
    /// As when a checkpoint is opened.
    pub fn projection(
        &self,
        projection: Projection,
        config: &ModelConfig,
        group_size: Option<usize>,
    ) -> Result<Linear<'_>> {
        let stored = Stored { model: &self.tensors, compensation: Some([&self.tensors; 2]) };
        stored.linear(self.layer, projection, config, group_size, self.bits)
    }
}

/// What a checkpoint holds in full precision.
#[derive(Debug)]
pub struct Unquantized<'a> {
    /// `[vocab_size, hidden_size]`
    pub embedding: Dense<'a>,
    /// `[vocab_size, hidden_size]`; `None` when it is the embedding.
    pub head: Option<Dense<'a>>,
    /// γ of the last norm, `[hidden_size]`
    pub final_norm: Vec<f32>,
}

impl Unquantized<'_> {
    fn tensors(&self, config: &ModelConfig) -> Vec<Tensor<'_>> {
        let shape = [config.vocab_size, config.hidden_size];
        let mut list = vec![
            Tensor::floats(EMBEDDING.into(), &shape, &self.embedding.values),
            Tensor::f32(FINAL_NORM.into(), &[config.hidden_size], &self.final_norm),
        ];
        list.extend(self.head.as_ref().map(|head| Tensor::floats(HEAD.into(), &shape, &head.values)));
        list
    }
}

fn push_linear<'a>(list: &mut Vec<Tensor<'a>>, prefix: &str, linear: &'a Linear<'_>) -> Result<()> {
    let name = |suffix: &str| format!("{prefix}.{suffix}");
    let (inputs, outputs) = (linear.weight.in_features(), linear.weight.out_features());
    match &linear.weight {
        Weight::Dense(_) => bail!("{prefix} is not quantized"),
        Weight::AnyPrec(w) => {
            let shape = [w.bits(), outputs, inputs / 32];
            list.push(Tensor::words(name("qweight"), Dtype::I32, &shape, w.planes()));
            list.push(Tensor::floats(name("lut"), &[outputs, 1 << w.bits()], w.lut()));
        }
        Weight::LutGemm(w) => {
            let (bits, groups) = (w.bits(), inputs / w.group_size());
            list.push(Tensor::words(name("binary"), Dtype::I32, &[inputs / 32, bits, outputs], w.binary()));
            list.push(Tensor::floats(name("alpha"), &[groups, bits, outputs], w.alpha()));
            list.push(Tensor::floats(name("q_bias"), &[groups, outputs], w.q_bias()));
        }
    }
    list.extend(linear.bias.as_deref().map(|bias| Tensor::f32(name("bias"), &[outputs], bias)));
    if let Some(residual) = &linear.residual {
        list.push(Tensor::words(name("residual"), Dtype::U32, &[inputs, outputs / 8], residual.words()));
        list.push(Tensor::floats(name("scales"), &[outputs], residual.scales()));
        let thresholds = linear.thresholds.as_deref().with_context(|| format!("{prefix} has no thresholds"))?;
        list.push(Tensor::f32(name("thresholds"), &[inputs], thresholds));
    }
    Ok(())
}

/// Only a checkpoint of ours, or nothing, is ever replaced.
fn ensure_replaceable(out: &Path, overwrite: bool) -> Result<()> {
    let Ok(existing) = fs::symlink_metadata(out) else { return Ok(()) };
    let empty = existing.is_dir() && fs::read_dir(out).is_ok_and(|mut files| files.next().is_none());
    if empty {
        return Ok(());
    }
    ensure!(
        Checkpoint::is_at(out),
        "{} exists and is not a decdec checkpoint, it will not be replaced: choose another --out",
        out.display()
    );
    ensure!(overwrite, "{} exists, use --overwrite to replace it, or choose another --out", out.display());
    Ok(())
}

/// The directory of a job is emptied in the end: it must not be one that someone else has filled.
fn ensure_ours(partial: &Path) -> Result<()> {
    let Ok(files) = fs::read_dir(partial) else { return Ok(()) };
    let foreign = files.filter_map(Result::ok).any(|file| !file.file_name().to_string_lossy().starts_with("job."));
    ensure!(
        !foreign || partial.join(KEY).exists(),
        "{} is needed for unfinished work, but holds something else: move it away or choose another --out",
        partial.display()
    );
    Ok(())
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
}

fn lock(partial: &Path) -> Result<File> {
    let path = partial.join(LOCK);
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("another process is writing {}, wait for it or choose another --out", partial.display())
        }
        // A file system without locks: nobody else can be told apart, so nobody is kept out.
        Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// Empties the directory of a job, the lock excepted. The key goes last, since it says that the rest is ours, and
/// is no job's key until then: a program that is killed here leaves nothing that another one would go on with.
fn clear(partial: &Path) -> Result<()> {
    let remove = || -> std::io::Result<()> {
        let new = partial.join(format!("{KEY}.new"));
        fs::write(&new, NO_JOB)?;
        fs::rename(&new, partial.join(KEY))?;
        for entry in fs::read_dir(partial)? {
            let entry = entry?;
            if entry.file_name() == LOCK || entry.file_name() == KEY {
                continue;
            }
            if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path())? } else { fs::remove_file(entry.path())? }
        }
        fs::remove_file(partial.join(KEY))
    };
    remove().with_context(|| format!("cannot empty {}", partial.display()))
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_vec_pretty(json)?;
    fs::write(path, &text).map_err(|e| write_error(e, path, text.len()))
}

/// Renames `new` to `out`. What was there changes places with it, so that at no time nothing is there; on file
/// systems that cannot do that, it is moved away first, and comes back if the program is killed then and run again.
fn replace(new: &Path, out: &Path) -> Result<()> {
    let context = || format!("cannot rename {} to {}", new.display(), out.display());
    if !out.exists() {
        return fs::rename(new, out).with_context(context);
    }
    if exchange(new, out) {
        return Ok(());
    }
    let old = new.with_file_name(REPLACED);
    fs::rename(out, &old).with_context(|| format!("cannot move {} away", out.display()))?;
    fs::rename(new, out).or_else(|e| fs::rename(&old, out).and(Err(e))).with_context(context)
}

/// Lets two directories change places in one step, where the system and its file system can.
fn exchange(new: &Path, out: &Path) -> bool {
    #[cfg(target_os = "linux")]
    return {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, new, CWD, out, RenameFlags::EXCHANGE).is_ok()
    };
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (new, out);
        false
    }
}

/// Brings back what a program was killed while replacing.
fn bring_back(partial: &Path, out: &Path) -> Result<()> {
    let old = partial.join(REPLACED);
    if !out.exists() && Checkpoint::is_at(&old) {
        fs::rename(&old, out).with_context(|| format!("cannot move {} back to {}", old.display(), out.display()))?;
    }
    Ok(())
}
