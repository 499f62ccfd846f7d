//! AWQ directories of Hugging Face: the weights that come out are the ones that went in, bit for bit.

use std::fs;
use std::path::Path;

use decdec::config::Projection;
use decdec::source::awq::Awq;
use decdec::weights::ModelWeights;
use half::f16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Channels that share a scale.
const GROUP: usize = 32;

/// Where the layout puts row `r` of eight: the nibble, from the lowest up.
const NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A quantized module: `w[row, k] = scale[g, row]·(code[row, k] − zero[g, row])`.
struct Module {
    name: &'static str,
    rows: usize,
    channels: usize,
    codes: Vec<u32>,  // [rows, channels]
    zeros: Vec<u32>,  // [channels / GROUP, rows]
    scales: Vec<f16>, // [channels / GROUP, rows]
}

impl Module {
    fn random(name: &'static str, rows: usize, channels: usize, rng: &mut ChaCha8Rng) -> Self {
        let groups = channels / GROUP;
        let codes = (0..rows * channels).map(|_| rng.next_u32() % 16).collect();
        let zeros = (0..rows * groups).map(|_| rng.next_u32() % 16).collect();
        let scales = (0..rows * groups).map(|_| f16::from_f32(0.001 + rng.next_u32() as f32 / 1e11)).collect();
        Self { name, rows, channels, codes, zeros, scales }
    }

    fn weight(&self, row: usize, k: usize) -> f32 {
        let at = k / GROUP * self.rows + row;
        self.scales[at].to_f32() * (self.codes[row * self.channels + k] as f32 - self.zeros[at] as f32)
    }

    /// `[columns, rows / 8]` of `code(row, column)`.
    fn packed(&self, columns: usize, code: impl Fn(usize, usize) -> u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for column in 0..columns {
            for word in 0..self.rows / 8 {
                let nibbles = (0..8).map(|r| code(8 * word + r, column) << (4 * NIBBLE[r]));
                bytes.extend(nibbles.fold(0, |word, nibble| word | nibble).to_le_bytes());
            }
        }
        bytes
    }
}

/// A model of one layer.
fn modules() -> [Module; 7] {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let shapes = [
        ("self_attn.q_proj", 64, 64),
        ("self_attn.k_proj", 32, 64),
        ("self_attn.v_proj", 32, 64),
        ("self_attn.o_proj", 64, 64),
        ("mlp.gate_proj", 96, 64),
        ("mlp.up_proj", 96, 64),
        ("mlp.down_proj", 64, 96),
    ];
    shapes.map(|(name, rows, channels)| Module::random(name, rows, channels, &mut rng))
}

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": true,
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": true,
        },
    })
}

/// Writes the model; `leave_out` names a tensor that is not written.
fn write(dir: &Path, modules: &[Module], config: &Value, leave_out: &str) {
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let ones = |len: usize| vec![f16::ONE.to_le_bytes(); len].concat();
    tensors.push(("model.embed_tokens.weight".into(), Dtype::F16, vec![8, 64], ones(8 * 64)));
    for name in ["norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"] {
        tensors.push((format!("model.{name}.weight"), Dtype::F16, vec![64], ones(64)));
    }
    for module in modules {
        let Module { rows, channels, .. } = *module;
        let groups = channels / GROUP;
        let name = |tensor| format!("model.layers.0.{}.{tensor}", module.name);
        let codes = module.packed(channels, |row, k| module.codes[row * channels + k]);
        let zeros = module.packed(groups, |row, g| module.zeros[g * rows + row]);
        let scales = module.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        tensors.push((name("qweight"), Dtype::I32, vec![channels, rows / 8], codes));
        tensors.push((name("qzeros"), Dtype::I32, vec![groups, rows / 8], zeros));
        tensors.push((name("scales"), Dtype::F16, vec![groups, rows], scales));
    }
    let views = tensors
        .iter()
        .filter(|(name, ..)| name != leave_out)
        .map(|(name, dtype, shape, bytes)| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
}

#[test]
fn awq_weights_are_exact() {
    let dir = tempfile::tempdir().unwrap();
    let modules = modules();
    write(dir.path(), &modules, &config(), "");
    assert!(Awq::detect(dir.path()));
    let model = Awq::open(dir.path()).unwrap();
    assert_eq!((model.bits(0), model.group_size(), model.head().unwrap()), (Some(4), GROUP, None));
    let parts = [&modules[..3], &modules[3..4], &modules[4..6], &modules[6..]];
    for (projection, parts) in Projection::ALL.into_iter().zip(parts) {
        let weight = model.projection(0, projection).unwrap().weight;
        let mut got = vec![0.0; weight.in_features()];
        let rows = parts.iter().flat_map(|module| (0..module.rows).map(move |row| (module, row)));
        for (fused_row, (module, row)) in rows.enumerate() {
            weight.row(fused_row, &mut got);
            for (k, &got) in got.iter().enumerate() {
                assert_eq!(got, module.weight(row, k), "{}, row {row}, channel {k}", module.name);
            }
        }
        assert_eq!(weight.out_features(), parts.iter().map(|module| module.rows).sum::<usize>());
    }
}

#[test]
fn awq_of_other_kinds_is_refused() {
    let modules = modules();
    let error = |config: &Value, leave_out: &str| {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &modules, config, leave_out);
        format!("{:#}", Awq::open(dir.path()).unwrap_err())
    };
    for (key, value, says) in [
        ("quant_method", json!("gptq"), "quant_method is \"gptq\", \"awq\" is expected"),
        ("bits", json!(3), "bits is 3, 4 is expected"),
        ("version", json!("gemv"), "version is \"gemv\", \"gemm\" is expected"),
        ("zero_point", json!(false), "zero_point is false"),
        ("group_size", json!(-1), "group_size is -1"),
        ("group_size", json!(48), "group size 48 does not divide 64"),
        ("group_size", json!(64), "q_proj.qzeros has shape [2, 8], [1, 8] is expected"),
    ] {
        let mut config = config();
        config["quantization_config"][key] = value;
        let error = error(&config, "");
        assert!(error.contains(says), "{error:?} does not say {says:?}");
    }
    let missing = error(&config(), "model.layers.0.mlp.up_proj.qzeros");
    assert!(missing.ends_with("tensor model.layers.0.mlp.up_proj.qzeros is missing"), "{missing}");
    let plain = tempfile::tempdir().unwrap();
    assert!(!Awq::detect(plain.path()));
}
