//! What layers ask of a device, for `docs/models.md`: the shapes of models known by name, and the operations of each
//! family's layers.

use std::collections::BTreeSet;

use decdec::config::{
    Activation, Attention, Family, LayerConfig, LayerNorm, ModelConfig, NormPlacement, Op, QkNorm, Reads, RopeScaling,
};

use crate::models::{config, of};

/// The columns of [`shapes`].
pub(crate) const SHAPES: [&str; 7] = [
    "model",
    "layers",
    "hidden, intermediate",
    "heads / key-value heads × width",
    "queries to a key",
    "window",
    "vocabulary",
];

/// The columns of [`operations`].
pub(crate) const OPERATIONS: [&str; 5] =
    ["family", "operations of a layer", "rotation", "attention", "around the layers"];

/// The models that `--model-name` knows, without weights.
pub(crate) fn shapes() -> Vec<Vec<String>> {
    let row = |name: &str| {
        let model = ModelConfig::preset(name).expect("known by name");
        let Attention { num_heads, num_kv_heads, head_dim, .. } = *model.layers[0].attention();
        let windows: Vec<usize> = model.layers.iter().filter_map(|layer| layer.attention().window).collect();
        let window = match windows.first() {
            None => "none".to_owned(),
            Some(window) if windows.len() == model.layers.len() => window.to_string(),
            Some(window) => format!("{window} in {} layers", windows.len()),
        };
        vec![
            format!("`{name}`"),
            model.layers.len().to_string(),
            format!("{}, {}", model.hidden_size, model.layers[0].intermediate_size()),
            format!("{num_heads} / {num_kv_heads} × {head_dim}"),
            (num_heads / num_kv_heads).to_string(),
            window,
            format!("{}{}", model.vocab_size, if model.tie_word_embeddings { ", tied" } else { "" }),
        ]
    };
    ModelConfig::PRESETS.iter().map(|name| row(name)).collect()
}

/// What the layers of a family's tiny models compute, which have every kind of layer.
pub(crate) fn operations(family: &Family) -> Vec<String> {
    let models = of(family.model_types[0].0);
    let models: Vec<ModelConfig> = models
        .iter()
        .map(|name| ModelConfig::from_json(&config(name, "config.json")).unwrap_or_else(|e| panic!("{name}: {e:#}")))
        .collect();
    let all = |words: &dyn Fn(&ModelConfig) -> Vec<String>| {
        let found: BTreeSet<String> = models.iter().flat_map(words).collect();
        found.into_iter().collect::<Vec<_>>().join("; ")
    };
    let of_layers = |words: &dyn Fn(&ModelConfig, &LayerConfig) -> Vec<String>| {
        all(&|model| model.layers.iter().flat_map(|layer| words(model, layer)).collect())
    };
    vec![
        family.name.to_owned(),
        of_layers(&|_, layer| vec![layer.program().iter().map(|op| operation(*op)).collect::<Vec<_>>().join(", ")]),
        of_layers(&|model, layer| vec![rotation(model, layer.attention())]),
        of_layers(&|_, layer| attention(layer.attention())),
        all(&around),
    ]
}

fn operation(op: Op) -> String {
    match op {
        Op::Project { projection, reads, .. } => match reads {
            Reads::Stream(Some(_)) => format!("norm → {projection}"),
            Reads::Stream(None) | Reads::Attended => projection.to_string(),
            Reads::Gated(Activation::Silu) => format!("SiLU gate → {projection}"),
            Reads::Gated(Activation::GeluTanh) => format!("GELU gate → {projection}"),
        },
        Op::NormQk(QkNorm::PerHead) => "norm of each head of q and k".into(),
        Op::NormQk(QkNorm::WholeRow) => "norm of all of q, of all of k".into(),
        Op::Attend => "attend".into(),
        Op::AddNormed(LayerNorm::AttentionOutput | LayerNorm::FeedForwardOutput) => "norm, add".into(),
        Op::AddNormed(other) => format!("{other:?}, add"),
    }
}

fn rotation(model: &ModelConfig, attention: &Attention) -> String {
    let Some(rope) = attention.rope.map(|rope| &model.ropes[rope]) else { return "none".into() };
    let kind = match rope.scaling {
        RopeScaling::None => "plain",
        RopeScaling::Linear { .. } => "linear",
        RopeScaling::Llama3 { .. } => "llama3",
        RopeScaling::Yarn { .. } => "YaRN",
        RopeScaling::LongRope { .. } => "LongRoPE",
    };
    if rope.rotary_dim == rope.head_dim { kind.into() } else { format!("{kind} of a part of each head") }
}

/// What is not softmax over all tokens, scaled by the root of a head's width.
fn attention(attention: &Attention) -> Vec<String> {
    let plain = (attention.head_dim as f64).powf(-0.5);
    let all = [
        (attention.window.is_some(), "window"),
        ((attention.scale - plain).abs() > 1e-9, "scale of its own"),
        (attention.softcap.is_some(), "cap of scores"),
        (attention.query_scaling.is_some(), "queries grow with the position"),
    ];
    all.into_iter().filter(|(has, _)| *has).map(|(_, what)| what.to_owned()).collect()
}

fn around(model: &ModelConfig) -> Vec<String> {
    let biased = model.biased.iter().map(|projection| format!("bias of {projection}"));
    let all = [
        (model.embedding_scale != 1.0, "scaled embedding"),
        (model.residual_multiplier != 1.0, "scaled branches"),
        (model.logit_scale != 1.0, "scaled logits"),
        (model.logit_softcap.is_some(), "cap of logits"),
        (model.tie_word_embeddings, "tied head"),
    ];
    all.into_iter().filter(|(has, _)| *has).map(|(_, what)| what.to_owned()).chain(biased).collect()
}

/// Layers that differ are told apart.
#[test]
fn operations_tell_families_apart() {
    let row = |name: &str| {
        let all = decdec::config::families::ALL;
        operations(all.into_iter().find(|family| family.model_types[0].0 == name).expect("a family"))
    };
    assert_eq!(row("llama")[1], "norm → qkv, attend, o, norm → gu, SiLU gate → d");
    assert_eq!(
        row("olmo2")[1],
        "qkv, norm of all of q, of all of k, attend, o, norm, add, gu, SiLU gate → d, norm, add"
    );
    assert!(row("gemma2")[3].contains("cap of scores") && !row("gemma3_text")[3].contains("cap of scores"));
    assert!(row("smollm3")[2].contains("none") && row("granite")[4].contains("scaled branches"));
    let placed = |placement| ModelConfig::preset("Qwen3-8B").is_some_and(|model| model.layers[0].norms == placement);
    assert!(placed(NormPlacement::Before) && !placed(NormPlacement::After));
}
