//! GGUF: weights, configuration, tokenizer and chat template in one file, or the weights spread over several.

mod blocks;
mod configuration;
mod file;
mod split;
mod tokenizer;
mod words;

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::config::ModelConfig;
use crate::format::Floats;
use crate::tokenizer::TextFiles;
use file::File;

/// A model in GGUF, its tensors found by their Hugging Face names.
#[derive(Debug)]
pub(super) struct Model {
    files: Vec<File>, // the first has the metadata
    architecture: String,
}

/// A tensor and where it is.
pub(super) struct Tensor<'a> {
    /// As the file has it, and as transformers has it.
    names: String,
    file: &'a File,
    stored: &'a file::Tensor,
}

impl Model {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let files = split::open(path)?;
        if let Some(kind) = files[0].text("general.type")?.filter(|&kind| kind != "model") {
            bail!("general.type is {kind:?}, \"model\" is expected: give the model itself");
        }
        let architecture =
            files[0].text("general.architecture")?.context("general.architecture is missing")?.to_owned();
        ensure!(
            matches!(architecture.as_str(), "llama" | "phi3" | "qwen2"),
            "general.architecture is {architecture:?}, llama, phi3 or qwen2 is expected"
        );
        let model = Self { files, architecture };
        model.ensure_dense()?;
        Ok(model)
    }

    /// What a mixture of experts lacks would only be called missing.
    fn ensure_dense(&self) -> Result<()> {
        let key = format!("{}.expert_count", self.architecture);
        let experts = self.metadata().integer(&key)?.filter(|&count| count > 0);
        let of_experts = |name: &&str| name.contains("_exps.") || name.contains(".ffn_gate_inp.");
        let found = self.files.iter().flat_map(File::names).filter(of_experts).min();
        let what = match (experts, found) {
            (Some(count), _) => format!("{key} is {count}"),
            (None, Some(name)) => format!("it has a tensor {name}"),
            (None, None) => return Ok(()),
        };
        bail!("the model is a mixture of experts ({what}), which is not supported: a dense one is expected")
    }

    fn metadata(&self) -> &File {
        &self.files[0]
    }

    /// The tensor that the file calls `own`.
    fn stored(&self, own: &str) -> Option<(&File, &file::Tensor)> {
        self.files.iter().find_map(|file| Some((file, file.tensor(own)?)))
    }

    pub(super) fn find(&self, name: &str) -> Result<Tensor<'_>> {
        let own = self.own_name(name).unwrap_or_else(|| name.to_owned());
        let (file, stored) = self.stored(&own).with_context(|| format!("tensor {own} is missing"))?;
        Ok(Tensor { names: format!("{own} ({name})"), file, stored })
    }

    /// The numbers of a tensor, all of them finite, q and k rows of Llama in their original order.
    pub(super) fn read(&self, name: &str, config: &ModelConfig) -> Result<Floats<'_>> {
        let tensor = self.find(name)?;
        let kind = tensor.stored.kind().with_context(|| format!("tensor {}", tensor.names))?;
        let values = kind.read(tensor.file.data(tensor.stored));
        // In the order of the file, so that the place is the one in the file.
        values.ensure_tensor_is_finite(&tensor.names, tensor.stored.shape())?;
        let permuted = self.architecture == "llama" && (name.contains(".q_proj.") || name.contains(".k_proj."));
        if !permuted {
            return Ok(values);
        }
        let (rows, head_dim) = (tensor.stored.shape()[0], config.layers[0].attention().head_dim);
        ensure!(rows.is_multiple_of(head_dim), "tensor {name} has {rows} rows, whole heads are expected");
        let columns = values.len() / rows;
        Ok(match values {
            Floats::F16(v) => Floats::F16(original_order(&v, columns, head_dim)),
            Floats::Bf16(v) => Floats::Bf16(original_order(&v, columns, head_dim)),
            Floats::F32(v) => Floats::F32(original_order(&v, columns, head_dim)),
        })
    }

    /// Checks that there are no tensors but those `used`: one more, and the model computes something else.
    pub(super) fn ensure_nothing_else(&self, used: &[String]) -> Result<()> {
        let mut known: HashSet<String> = used.iter().filter_map(|name| self.own_name(name)).collect();
        known.insert(configuration::ROPE_DIVISORS.to_owned());
        let other = self.files.iter().flat_map(File::names).filter(|&name| !known.contains(name)).min();
        if let Some(name) = other {
            bail!(
                "tensor {name} is not one of a {} model, what it would change is not computed: quantize from the \
                 Hugging Face directory instead",
                self.architecture
            );
        }
        Ok(())
    }

    /// The name that a tensor has in this file.
    fn own_name(&self, name: &str) -> Option<String> {
        Some(match name {
            super::EMBEDDING => "token_embd.weight".to_owned(),
            super::FINAL_NORM => "output_norm.weight".to_owned(),
            super::HEAD => "output.weight".to_owned(),
            _ => {
                let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
                let (module, kind) = rest.rsplit_once('.')?;
                let own = match module {
                    "input_layernorm" => "attn_norm",
                    "post_attention_layernorm" => "ffn_norm",
                    "self_attn.qkv_proj" => "attn_qkv",
                    "self_attn.q_proj" => "attn_q",
                    "self_attn.k_proj" => "attn_k",
                    "self_attn.v_proj" => "attn_v",
                    "self_attn.o_proj" => "attn_output",
                    "mlp.gate_proj" => "ffn_gate",
                    "mlp.up_proj" => "ffn_up",
                    // Phi-3 keeps gate and up in one matrix, under the name of up.
                    "mlp.gate_up_proj" if self.architecture == "phi3" => "ffn_up",
                    "mlp.down_proj" => "ffn_down",
                    _ => return None,
                };
                format!("blk.{layer}.{own}.{kind}")
            }
        })
    }

    /// Tokenizer, chat template and special tokens.
    pub(super) fn texts(&self) -> Result<TextFiles> {
        tokenizer::texts(self.metadata())
    }
}

impl Tensor<'_> {
    /// The shape of a tensor that can be read.
    pub(super) fn shape(&self) -> Result<Vec<usize>> {
        self.stored.kind().with_context(|| format!("tensor {}", self.names))?;
        Ok(self.stored.shape().to_vec())
    }
}

/// Undoes the order in which llama.cpp's converter stores the rows of a head: `(head_dim / 2, 2)` becomes
/// `(2, head_dim / 2)` again, so that channel `i` is rotated with channel `i + head_dim / 2`.
fn original_order<'a, T: Copy>(values: &[T], columns: usize, head_dim: usize) -> Cow<'a, [T]> {
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * columns) {
        for row in 0..head_dim {
            let stored = 2 * (row % half) + row / half;
            out.extend_from_slice(&head[stored * columns..(stored + 1) * columns]);
        }
    }
    Cow::Owned(out)
}
