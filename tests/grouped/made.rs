//! Quantized modules of random numbers, and directories of AWQ and GPTQ that hold them.

use super::*;

/// Channels that share a scale.
pub(crate) const GROUP: usize = 32;

/// Where the layout puts row `r` of eight: the nibble, from the lowest up.
pub(crate) const NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A quantized module: `w[row, k] = scale[g, row]·(code[row, k] − zero[g, row])`.
pub(crate) struct Module {
    pub(crate) name: &'static str,
    pub(crate) rows: usize,
    pub(crate) channels: usize,
    pub(crate) bits: u32,
    pub(crate) codes: Vec<u32>,  // [rows, channels]
    pub(crate) zeros: Vec<u32>,  // [channels / GROUP, rows]
    pub(crate) scales: Vec<f16>, // [channels / GROUP, rows]
}

impl Module {
    pub(crate) fn random(name: &'static str, rows: usize, channels: usize, bits: u32, rng: &mut ChaCha8Rng) -> Self {
        let groups = channels / GROUP;
        let codes = (0..rows * channels).map(|_| rng.next_u32() % (1 << bits)).collect();
        let zeros = (0..rows * groups).map(|_| rng.next_u32() % (1 << bits)).collect();
        let scales = (0..rows * groups).map(|_| f16::from_f32(0.001 + rng.next_u32() as f32 / 1e11)).collect();
        Self { name, rows, channels, bits, codes, zeros, scales }
    }

    pub(crate) fn weight(&self, row: usize, k: usize) -> f32 {
        let at = k / GROUP * self.rows + row;
        self.scales[at].to_f32() * (self.codes[row * self.channels + k] as f32 - self.zeros[at] as f32)
    }

    /// `[columns, rows / 8]` of `code(row, column)`.
    pub(crate) fn packed(&self, columns: usize, code: impl Fn(usize, usize) -> u32) -> Vec<u8> {
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

/// Fields of `bits` bits, one after the other from the lowest bit up, as words.
pub(crate) fn stream(bits: u32, fields: impl Iterator<Item = u32>) -> Vec<u32> {
    let all: Vec<bool> = fields.flat_map(|field| (0..bits).map(move |b| field >> b & 1 == 1)).collect();
    let word = |bits: &[bool]| bits.iter().rev().fold(0, |word, &bit| word << 1 | u32::from(bit));
    all.chunks(32).map(word).collect()
}

impl Module {
    /// `qweight` of GPTQ, `[channels · bits / 32, rows]`.
    pub(crate) fn gptq_codes(&self) -> Vec<u8> {
        let lines: Vec<_> =
            self.codes.chunks(self.channels).map(|codes| stream(self.bits, codes.iter().copied())).collect();
        let words = (0..lines[0].len()).flat_map(|w| lines.iter().map(move |line| line[w]));
        words.flat_map(u32::to_le_bytes).collect()
    }

    /// `qzeros` of GPTQ, `[groups, rows · bits / 32]`, zeros less `less` around the corner.
    pub(crate) fn gptq_zeros(&self, less: u32) -> Vec<u8> {
        let mask = (1 << self.bits) - 1;
        let groups = self.zeros.chunks(self.rows);
        let words = groups.flat_map(|zeros| stream(self.bits, zeros.iter().map(|zero| zero.wrapping_sub(less) & mask)));
        words.flat_map(u32::to_le_bytes).collect()
    }
}

/// A model of one layer.
pub(crate) fn modules() -> [Module; 7] {
    modules_of(4)
}

pub(crate) fn modules_of(bits: u32) -> [Module; 7] {
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
    shapes.map(|(name, rows, channels)| Module::random(name, rows, channels, bits, &mut rng))
}

pub(crate) fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": true,
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": true,
        },
    })
}

/// A name, a type, a shape, bytes.
pub(crate) type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

/// Embedding and norms: the embedding random, so that something goes through the model, γ 1.
pub(crate) fn unquantized() -> Vec<Stored> {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut number = || f16::from_f32(rng.next_u32() as f32 / 2e9 - 1.0);
    let embedding = (0..8 * 64).flat_map(|_| number().to_le_bytes()).collect();
    let mut tensors = vec![("model.embed_tokens.weight".into(), Dtype::F16, vec![8, 64], embedding)];
    for name in ["norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"] {
        let ones = [f16::ONE.to_le_bytes(); 64].concat();
        tensors.push((format!("model.{name}.weight"), Dtype::F16, vec![64], ones));
    }
    tensors
}

/// Writes the model; `leave_out` names a tensor that is not written.
pub(crate) fn write(dir: &Path, modules: &[Module], config: &Value, leave_out: &str) {
    let mut tensors = unquantized();
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
    tensors.retain(|(name, ..)| name != leave_out);
    save(dir, &tensors, config);
}

/// The same in GPTQ's layout, of either version; `order` is every `g_idx` if there is one.
pub(crate) fn write_gptq(dir: &Path, modules: &[Module], config: &Value, order: Option<fn(usize) -> usize>) {
    let quantization = &config["quantization_config"];
    let is_v2 = ["checkpoint_format", "format"].iter().any(|key| quantization[key] == "gptq_v2");
    let less = u32::from(!is_v2);
    let mut tensors = unquantized();
    for module in modules {
        let Module { rows, channels, .. } = *module;
        let (groups, bits) = (channels / GROUP, module.bits as usize);
        let name = |tensor| format!("model.layers.0.{}.{tensor}", module.name);
        let scales = module.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        tensors.push((name("qweight"), Dtype::I32, vec![channels / 32 * bits, rows], module.gptq_codes()));
        tensors.push((name("qzeros"), Dtype::I32, vec![groups, rows / 32 * bits], module.gptq_zeros(less)));
        tensors.push((name("scales"), Dtype::F16, vec![groups, rows], scales));
        if let Some(order) = order {
            let groups = (0..channels).flat_map(|k| (order(k) as u32).to_le_bytes()).collect();
            tensors.push((name("g_idx"), Dtype::I32, vec![channels], groups));
        }
    }
    save(dir, &tensors, config);
}

pub(crate) fn save(dir: &Path, tensors: &[Stored], config: &Value) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
}
