//! The metadata of a GGUF as a Hugging Face `config.json`, in the names of the model's family.
//!
//! What is not said has the meaning that llama.cpp gives it. Every key of the architecture (`llama.block_count`) is
//! read here, or known to change nothing of what the model computes, or refused by name: a key that is passed over
//! may be one that makes another model of the same weights.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Model;
use super::tokenizer::special_id;
use crate::tensors::{EMBEDDING, HEAD};

/// Keys that are read, without the name of the architecture.
const READ: [&str; 22] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
];

/// Keys that say something about a model and change nothing of what it computes.
const SILENT: [&str; 3] = ["attention.layer_norm_epsilon", "rope.scaling.finetuned", "tensor_data_layout"];

/// Keys of what is not computed here, and the value at which it changes nothing.
const NEUTRAL: [(&str, f64); 9] = [
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("embedding_scale", 1.0),
    ("expert_used_count", 0.0),
    ("logit_scale", 1.0),
    ("pooling_type", 0.0),
    ("residual_scale", 1.0),
    ("use_parallel_residual", 0.0),
];

/// Keys that are read of one architecture only.
fn own_keys(architecture: &str) -> &'static [&'static str] {
    match architecture {
        "gemma2" => &["attention.sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping"],
        "gemma3" => &["attention.sliding_window_pattern", "final_logit_softcapping", "rope.freq_base_swa"],
        "granite" => &["attention.scale", "embedding_scale", "logit_scale", "residual_scale"],
        "mistral3" => &["attention.temperature_scale", "rope.scaling.yarn_log_multiplier"],
        "olmo2" => &["attention.sliding_window_pattern"],
        _ => &[],
    }
}

/// What all families read alike.
struct Sizes {
    layers: u64,
    hidden: u64,
    heads: u64,
    head_dim: u64,
    /// Channels of a head that turn.
    rotary_dim: u64,
    window: Option<u64>,
    theta: f64,
}

impl Model {
    /// The metadata as a Hugging Face `config.json`.
    pub(in crate::source) fn config_json(&self) -> Result<Value> {
        self.ensure_keys_are_known()?;
        let file = self.metadata();
        let sizes = self.sizes()?;
        let of_layers = |name: &str| file.integer_of_layers(&self.key(name), sizes.layers);
        let eps = file.float(&self.key("attention.layer_norm_rms_epsilon"))?;
        let eps = eps.with_context(|| self.missing("attention.layer_norm_rms_epsilon"))?;
        let context = file.integer(&self.key("context_length"))?.with_context(|| self.missing("context_length"))?;
        let mut json = json!({
            "hidden_act": "silu",
            "hidden_size": sizes.hidden,
            "intermediate_size":
                of_layers("feed_forward_length")?.with_context(|| self.missing("feed_forward_length"))?,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": of_layers("attention.head_count_kv")?.unwrap_or(sizes.heads),
            "head_dim": sizes.head_dim,
            "vocab_size": self.find(EMBEDDING)?.stored.shape().first(),
            "rms_norm_eps": shortest(eps),
            "rope_theta": shortest(sizes.theta),
            "rope_scaling": self.rope_scaling(sizes.theta, sizes.rotary_dim)?,
            "sliding_window": sizes.window,
            "max_position_embeddings": context,
            "tie_word_embeddings": self.find(HEAD).is_err(),
            "bos_token_id": special_id(file, "bos")?,
            "eos_token_id": special_id(file, "eos")?,
            "torch_dtype": "float16",
        });
        self.add_own(&mut json, &sizes)?;
        Ok(json)
    }

    fn sizes(&self) -> Result<Sizes> {
        let file = self.metadata();
        let integer = |name: &str| file.integer(&self.key(name))?.with_context(|| self.missing(name));
        let (layers, hidden) = (integer("block_count")?, integer("embedding_length")?);
        let heads = file.integer_of_layers(&self.key("attention.head_count"), layers)?;
        let heads = heads.with_context(|| self.missing("attention.head_count"))?;
        let head_dim = match file.integer(&self.key("attention.key_length"))? {
            Some(head_dim) => head_dim,
            None => hidden.checked_div(heads).context("attention.head_count is 0, 1 or more is expected")?,
        };
        let turning = "rope.dimension_count";
        let rotary_dim = file.integer(&self.key(turning))?.unwrap_or(head_dim);
        let whole = !matches!(self.architecture.as_str(), "phi3" | "glm4");
        let value_length = "attention.value_length";
        let value_dim = file.integer(&self.key(value_length))?.unwrap_or(head_dim);
        for (name, found) in [(value_length, value_dim), (turning, if whole { rotary_dim } else { head_dim })] {
            let key = self.key(name);
            ensure!(found == head_dim, "{key} is {found}, the width of a head, {head_dim}, is expected");
        }
        let window = file.integer(&self.key("attention.sliding_window"))?.filter(|&window| window > 0);
        let theta = file.float(&self.key("rope.freq_base"))?.unwrap_or(10_000.0);
        Ok(Sizes { layers, hidden, heads, head_dim, rotary_dim, window, theta })
    }

    /// What the family has of its own: its name and the fields that others lack.
    fn add_own(&self, json: &mut Value, sizes: &Sizes) -> Result<()> {
        let file = self.metadata();
        let float = |name: &str| anyhow::Ok(file.float(&self.key(name))?.map(shortest));
        let (model_type, class) = match self.architecture.as_str() {
            "llama" if sizes.window.is_none() => ("llama", "LlamaForCausalLM"),
            "llama" => ("mistral", "MistralForCausalLM"),
            "mistral3" => match float("attention.temperature_scale")? {
                Some(beta) => {
                    let mut rope = json["rope_scaling"].take();
                    if rope.is_null() {
                        rope = json!({ "rope_type": "default" });
                    }
                    rope["llama_4_scaling_beta"] = beta.into();
                    rope["original_max_position_embeddings"] = self.original_context()?.into();
                    json["rope_scaling"] = rope;
                    ("ministral3", "Ministral3ForCausalLM")
                }
                None => ("mistral", "MistralForCausalLM"),
            },
            "phi3" => {
                json["partial_rotary_factor"] = part(sizes);
                json["original_max_position_embeddings"] = self.original_context()?.into();
                ("phi3", "Phi3ForCausalLM")
            }
            "qwen3" => ("qwen3", "Qwen3ForCausalLM"),
            "smollm3" => ("smollm3", "SmolLM3ForCausalLM"),
            "gemma2" => {
                self.add_gemma(json, sizes, 46, 2)?;
                json["attn_logit_softcapping"] = float("attn_logit_softcapping")?.unwrap_or(50.0).into();
                json["final_logit_softcapping"] = float("final_logit_softcapping")?.unwrap_or(30.0).into();
                ("gemma2", "Gemma2ForCausalLM")
            }
            "gemma3" => {
                self.add_gemma(json, sizes, 62, 6)?;
                json["final_logit_softcapping"] = float("final_logit_softcapping")?.into();
                let local = float("rope.freq_base_swa")?.unwrap_or(10_000.0);
                nest_rope(json, sizes.theta, local);
                ("gemma3_text", "Gemma3ForCausalLM")
            }
            "olmo2" if sizes.window.is_some() => {
                json["layer_types"] = self.layer_types(sizes, 4)?;
                nest_rope(json, sizes.theta, shortest(sizes.theta));
                ("olmo3", "Olmo3ForCausalLM")
            }
            "olmo2" => ("olmo2", "Olmo2ForCausalLM"),
            "granite" => {
                let scale = float("attention.scale")?.filter(|&scale| scale != 0.0);
                json["attention_multiplier"] = scale.unwrap_or((sizes.head_dim as f64).powf(-0.5)).into();
                for (field, key) in [
                    ("embedding_multiplier", "embedding_scale"),
                    ("residual_multiplier", "residual_scale"),
                    ("logits_scaling", "logit_scale"),
                ] {
                    json[field] = float(key)?.filter(|&factor| factor != 0.0).unwrap_or(1.0).into();
                }
                ("granite", "GraniteForCausalLM")
            }
            "glm4" => {
                json["partial_rotary_factor"] = part(sizes);
                json["attention_bias"] = self.stored("blk.0.attn_q.bias").is_some().into();
                ("glm4", "Glm4ForCausalLM")
            }
            _ => ("qwen2", "Qwen2ForCausalLM"),
        };
        json["model_type"] = model_type.into();
        json["architectures"] = json!([class]);
        Ok(())
    }

    /// What Gemma 2 and 3 share. Their largest models, known by their `largest` number of layers, divide scores by
    /// another root; one layer of `period` sees the whole text.
    fn add_gemma(&self, json: &mut Value, sizes: &Sizes, largest: u64, period: u64) -> Result<()> {
        let scalar = if sizes.layers == largest { sizes.hidden / sizes.heads.max(1) } else { sizes.head_dim };
        json["query_pre_attn_scalar"] = scalar.into();
        json["hidden_activation"] = "gelu_pytorch_tanh".into();
        json["layer_types"] = self.layer_types(sizes, period)?;
        Ok(())
    }

    /// Which layers slide: by a list of truth values, or all but each `n`-th, `period` where nothing is said.
    fn layer_types(&self, sizes: &Sizes, period: u64) -> Result<Value> {
        let (file, key) = (self.metadata(), self.key("attention.sliding_window_pattern"));
        let slides = match file.booleans_of_layers(&key, sizes.layers)? {
            Some(slides) => slides,
            None => {
                let period = file.integer(&key)?.unwrap_or(period);
                // Without a period none slides.
                (1..=sizes.layers).map(|layer| period != 0 && !layer.is_multiple_of(period)).collect()
            }
        };
        let named = |slides| if slides { "sliding_attention" } else { "full_attention" };
        Ok(slides.into_iter().map(named).collect::<Vec<_>>().into())
    }

    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn missing(&self, name: &str) -> String {
        format!("{} is missing", self.key(name))
    }

    fn ensure_keys_are_known(&self) -> Result<()> {
        let file = self.metadata();
        let (prefix, own) = (self.key(""), own_keys(&self.architecture));
        let mut keys: Vec<&str> = file.keys().filter_map(|key| key.strip_prefix(&prefix)).collect();
        keys.sort_unstable();
        let known = |name: &&str| READ.contains(name) || SILENT.contains(name) || own.contains(name);
        for name in keys.into_iter().filter(|name| !known(name)) {
            let (key, value) = (self.key(name), file.described(&self.key(name)));
            match NEUTRAL.iter().find(|(neutral, _)| *neutral == name) {
                Some(&(_, neutral)) if file.number(&key) == Some(neutral) => {}
                Some((_, neutral)) => bail!("{key} is {value}, only {neutral} is supported"),
                None => bail!(
                    "the metadata {key} ({value}) is not known, what it would change is not computed: quantize from \
                     the Hugging Face directory instead"
                ),
            }
        }
        Ok(())
    }
}

/// The part of a head that turns.
fn part(sizes: &Sizes) -> Value {
    (sizes.rotary_dim as f64 / sizes.head_dim.max(1) as f64).into()
}

/// Puts what is said of RoPE where a model with two rotations has it: scaling is that of the layers that see the whole
/// text.
fn nest_rope(json: &mut Value, theta: f64, local: f64) {
    let mut full = json["rope_scaling"].take();
    if full.is_null() {
        full = json!({ "rope_type": "default" });
    }
    full["rope_theta"] = shortest(theta).into();
    json["rope_parameters"] = json!({
        "full_attention": full,
        "sliding_attention": { "rope_type": "default", "rope_theta": local },
    });
    let fields = json.as_object_mut().into_iter();
    fields.for_each(|fields| fields.retain(|key, _| key != "rope_theta" && key != "rope_scaling"));
}

/// An f32 as the f64 that prints alike: 1e-5, not 9.999999747378752e-6.
pub(super) fn shortest(n: f64) -> f64 {
    (n as f32).to_string().parse().unwrap_or(n)
}
