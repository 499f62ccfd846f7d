//! GGUF: weights, configuration, tokenizer and chat template in one file, or the weights spread over several.

mod blocks;
mod configuration;
mod file;
mod rope;
mod split;
mod tokenizer;
mod words;

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::config::{Family, LayerNorm, Pairing, Projection, families};
use crate::format::Floats;
use crate::tensors::{self, Expected, TensorSet};
use crate::tokenizer::TextFiles;
use file::File;

/// A model in GGUF, its tensors found by their Hugging Face names.
#[derive(Debug)]
pub(super) struct Model {
    files: Vec<File>, // the first has the metadata
    architecture: String,
    /// Whose names the tensors have; some architectures serve another one too.
    family: &'static Family,
}

/// A tensor and where it is.
struct Tensor<'a> {
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
        let Some(family) = Family::of_gguf(&architecture) else {
            let known = families::ALL.iter().flat_map(|family| family.gguf.iter().copied()).collect::<Vec<_>>();
            let lacks = families::lacking(&architecture);
            let lacks = lacks.map(|lacks| format!(": the decoder lacks {lacks}")).unwrap_or_default();
            bail!("general.architecture is {architecture:?}, {} is expected{lacks}", families::listed(&known));
        };
        let model = Self { files, architecture, family };
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

    fn find(&self, name: &str) -> Result<Tensor<'_>> {
        let own = self.own_name(name).unwrap_or_else(|| name.to_owned());
        let (file, stored) = self.stored(&own).with_context(|| format!("tensor {own} is missing"))?;
        Ok(Tensor { names: format!("{own} ({name})"), file, stored })
    }

    /// Checks that there are no tensors but those `used`: one more, and the model computes something else.
    fn ensure_nothing_else(&self, used: &[Expected]) -> Result<()> {
        let mut known: HashSet<String> = used.iter().filter_map(|tensor| self.own_name(&tensor.name)).collect();
        known.extend(rope::TENSORS.map(str::to_owned));
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
            tensors::EMBEDDING => "token_embd.weight".to_owned(),
            tensors::FINAL_NORM => "output_norm.weight".to_owned(),
            tensors::HEAD => "output.weight".to_owned(),
            _ => {
                let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
                let (module, kind) = rest.rsplit_once('.')?;
                let norm = self.family.norms.iter().find(|(_, own)| *own == module).map(|(norm, _)| *norm);
                let own = match module {
                    _ if norm.is_some() => own_norm(norm?),
                    "self_attn.qkv_proj" => "attn_qkv",
                    "self_attn.q_proj" => "attn_q",
                    "self_attn.k_proj" => "attn_k",
                    "self_attn.v_proj" => "attn_v",
                    "self_attn.o_proj" => "attn_output",
                    "mlp.gate_proj" => "ffn_gate",
                    "mlp.up_proj" => "ffn_up",
                    // Gate and up in one matrix have the name of up.
                    "mlp.gate_up_proj" if self.family.fused.contains(&Projection::GateUp) => "ffn_up",
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

/// What a norm is called.
fn own_norm(norm: LayerNorm) -> &'static str {
    match norm {
        LayerNorm::AttentionInput => "attn_norm",
        LayerNorm::Query => "attn_q_norm",
        LayerNorm::Key => "attn_k_norm",
        LayerNorm::AttentionOutput => "post_attention_norm",
        LayerNorm::FeedForwardInput => "ffn_norm",
        LayerNorm::FeedForwardOutput => "post_ffw_norm",
    }
}

impl TensorSet for Model {
    fn contains(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }

    fn check(&self, Expected { name, shape, .. }: &Expected) -> Result<()> {
        let tensor = self.find(name)?;
        tensor.kind()?;
        let stored = tensor.stored.shape();
        ensure!(stored == shape, "tensor {name} has shape {stored:?}, {shape:?} is expected");
        Ok(())
    }

    /// What a class of transformers computes is fixed by its name; a GGUF says it with the tensors that it has.
    fn check_all(&self, expected: &[Expected]) -> Result<()> {
        expected.iter().try_for_each(|expected| self.check(expected))?;
        self.ensure_nothing_else(expected)
    }

    fn floats(&self, name: &str) -> Result<Floats<'_>> {
        let tensor = self.find(name)?;
        let values = tensor.kind()?.read(tensor.file.data(tensor.stored));
        values.ensure_tensor_is_finite(&tensor.names, tensor.stored.shape())?;
        Ok(values)
    }

    fn words(&self, name: &str) -> Result<Cow<'_, [u32]>> {
        bail!("tensor {name}: bit patterns are expected, which a GGUF has none of")
    }

    /// llama.cpp's converter moves the rows of queries and keys of some architectures so that neighbours turn together.
    fn pairing(&self) -> Option<Pairing> {
        let moved = ["llama", "mistral3", "smollm3", "granite", "glm4"].contains(&self.architecture.as_str());
        moved.then_some(Pairing::Neighbours)
    }

    fn has_gammas(&self) -> bool {
        true
    }
}

impl Tensor<'_> {
    /// The type of a tensor that can be read.
    fn kind(&self) -> Result<blocks::Kind> {
        self.stored.kind().with_context(|| format!("tensor {}", self.names))
    }
}
