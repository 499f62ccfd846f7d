//! What a model needs before it is loaded: on the device, and pinned on the host.

use std::fmt;

use anyhow::{Result, ensure};

use super::pack::Packing;
use super::{Cuda, Dtype, Residuals, attention, host};
use crate::config::{NormPlacement, Projection};
use crate::weights::{ModelWeights, Weight};

/// Bytes that a model takes, and bytes that are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryTable {
    /// Matrices, tables and norms, on the device.
    pub weights: usize,
    /// Keys, values and angles of the longest text, on the device.
    pub cache: usize,
    /// Activations, and a dequantized matrix for prompts, on the device.
    pub workspace: usize,
    /// Residuals on the device.
    pub device_residuals: usize,
    /// Residuals in pinned host memory, and what uploads go through.
    pub pinned: usize,
    /// Free on the device now.
    pub free_device: usize,
    /// Available on the host now; 0 if it does not say.
    pub free_host: usize,
}

impl fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "device: weights {} MiB, cache {}, workspace {}, residuals {}, free {}; host: pinned (residuals, upload buffers) {} MiB, free {}",
            self.weights >> 20,
            self.cache >> 20,
            self.workspace >> 20,
            self.device_residuals >> 20,
            self.free_device >> 20,
            self.pinned >> 20,
            self.free_host >> 20
        )
    }
}

impl MemoryTable {
    /// Everything on the device.
    pub fn device(&self) -> usize {
        self.weights + self.cache + self.workspace + self.device_residuals
    }

    /// Checks that it fits.
    ///
    /// # Errors
    /// What is too much, with both numbers and the flags that change it.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.device() <= self.free_device,
            "the model needs {} MiB of device memory (weights {}, cache {}, workspace {}, residuals {}), {} are free, \
             use a lower --max-seq-len, fewer bits{}",
            self.device() >> 20,
            self.weights >> 20,
            self.cache >> 20,
            self.workspace >> 20,
            self.device_residuals >> 20,
            self.free_device >> 20,
            if self.device_residuals > 0 { " or --residuals host" } else { "" }
        );
        ensure!(
            self.free_host == 0 || self.pinned <= self.free_host,
            "the residuals need {} MiB of pinned host memory, {} are available, use --residuals device",
            self.pinned >> 20,
            self.free_host >> 20
        );
        Ok(())
    }
}

impl Cuda {
    /// What `weights` will take with texts of at most `max_seq_len` tokens.
    ///
    /// # Errors
    /// Tensors that cannot be read, or a lost device.
    pub fn memory_table(&self, weights: &dyn ModelWeights, max_seq_len: usize) -> Result<MemoryTable> {
        let config = weights.config();
        let (mut bytes, mut residuals, mut largest) = (0, 0, 0);
        for layer in 0..config.layers.len() {
            for p in Projection::ALL {
                let linear = weights.projection(layer, p)?;
                bytes += self.matrix_bytes(&linear.weight);
                residuals += linear.residual.as_ref().map_or(0, |r| r.words().len() * 4);
                largest = largest.max(linear.weight.in_features() * linear.weight.out_features());
            }
        }
        let table = self.matrix_bytes(&Weight::Dense(weights.embedding()?));
        bytes += if config.tie_word_embeddings { table } else { 2 * table };
        let tokens = self.device.max_tokens.min(max_seq_len);
        let branches = config.layers.iter().any(|layer| layer.norms != NormPlacement::Before);
        let width = config.hidden_size * if branches { 2 } else { 1 }
            + Projection::ALL.into_iter().map(|p| config.widest(p)).max().unwrap_or(0) * 2
            + config.widest(Projection::Qkv);
        let number = if self.options.dtype == Dtype::Float32 { 4 } else { 2 };
        let on_device = self.options.residuals == Residuals::Device;
        Ok(MemoryTable {
            weights: bytes,
            cache: attention::cache_bytes(config, self.options.dtype, max_seq_len),
            workspace: tokens * width * 4 * 2
                + attention::pass_bytes(config, self.options.dtype, tokens)
                + if self.blas.is_some() { largest * number } else { 0 },
            device_residuals: if on_device { residuals } else { 0 },
            pinned: host::STAGING + if on_device { 0 } else { residuals },
            free_device: self.driver.memory()?.0,
            free_host: available_host_memory(),
        })
    }

    /// Bytes of a matrix in the layout that it is uploaded in.
    fn matrix_bytes(&self, weight: &Weight<'_>) -> usize {
        let (k, rows) = (weight.in_features(), weight.out_features());
        let plain = self.options.dtype == Dtype::Float32 || self.options.compile == 0;
        if let Some(packing) = Packing::of(weight, self.options.dtype).filter(|_| !plain) {
            return packing.tiles() * (packing.code_bytes() + packing.aux_bytes() + packing.lut_bytes());
        }
        match weight {
            Weight::Dense(_) => k * rows * 4,
            Weight::AnyPrec(w) => k * rows + ((rows * 4) << w.bits()),
            Weight::LutGemm(w) => k * rows + k / w.group_size() * rows * (w.bits() + 1) * 4,
        }
    }
}

/// What the host can still give, bytes; 0 where `/proc/meminfo` is not there.
fn available_host_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<usize>().ok());
    kilobytes.unwrap_or(0) * 1024
}
