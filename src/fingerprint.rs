//! What tells one model from another: a hash of everything in it, so that work on one is never taken for another's.
//!
//! Every number counts, as the program reads it: two files with the same numbers are the same model, whatever they
//! are called and however they are packed. A GB of f16 weights takes a third of a second of one core beside what
//! reading it takes (two cores of a server: 1.8 GB in 0.8 s).

use std::hash::{Hash, Hasher};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};

use crate::config::Projection;
use crate::format::{Dense, Floats, Numbers};
use crate::interrupted::ensure_running;
use crate::tokenizer::TextFiles;
use crate::weights::{Linear, ModelWeights};

/// Bytes from which on a hash is worth all cores.
const LONG: usize = 128 << 10;

/// A hash in the making. What goes in is marked with its kind and its length, so that nothing is taken for what stands
/// beside it.
#[derive(Debug, Default)]
pub(crate) struct Fingerprint(blake3::Hasher);

impl Fingerprint {
    /// Takes the tensors and the configuration of a model.
    ///
    /// # Errors
    /// A tensor that cannot be read; [`crate::interrupted::Interrupted`] soon after `stop` is set.
    pub(crate) fn model(&mut self, weights: &dyn ModelWeights, stop: &AtomicBool) -> Result<()> {
        let config = weights.config();
        self.bytes(b"configuration", format!("{config:?}").as_bytes());
        self.dense(&weights.embedding()?);
        if let Some(head) = weights.head()? {
            self.dense(&head);
        }
        self.numbers(b"final norm", &weights.final_norm()?);
        for layer in 0..config.layers.len() {
            self.bytes(b"bits", format!("{:?}", weights.bits(layer)).as_bytes());
            for (norm, _) in config.layers[layer].norms(config.hidden_size) {
                self.numbers(format!("{norm:?}").as_bytes(), &weights.norm(layer, norm)?);
            }
            for projection in Projection::ALL {
                ensure_running(stop)?;
                let linear = weights.projection(layer, projection);
                self.linear(&linear.with_context(|| format!("layer {layer}, {projection}"))?);
            }
        }
        Ok(())
    }

    /// Takes one projection with all that belongs to it.
    pub(crate) fn linear(&mut self, linear: &Linear<'_>) {
        self.bytes(b"size", format!("{:?}", linear.weight.size()).as_bytes());
        for (tensor, numbers) in linear.tensors() {
            self.bytes(b"tensor", tensor.suffix.as_bytes());
            match numbers {
                Numbers::Words(words) => self.numbers(b"words", &words),
                Numbers::Floats(values) => self.floats(&values),
            }
        }
    }

    /// Takes tokenizer, chat template and special tokens.
    pub(crate) fn texts(&mut self, texts: &TextFiles) {
        texts.hash(&mut Fields(&mut self.0));
    }

    /// Takes a list of numbers, bit for bit.
    pub(crate) fn numbers<T: bytemuck::NoUninit>(&mut self, kind: &[u8], values: &[T]) {
        self.bytes(kind, bytemuck::cast_slice(values));
    }

    /// The hash, in 64 digits.
    pub(crate) fn digits(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }

    fn dense(&mut self, dense: &Dense<'_>) {
        self.bytes(b"dense", format!("{} x {}", dense.out_features, dense.in_features).as_bytes());
        self.floats(&dense.values);
    }

    fn floats(&mut self, values: &Floats<'_>) {
        let kind: &[u8] = match values {
            Floats::F16(_) => b"f16",
            Floats::Bf16(_) => b"bf16",
            Floats::F32(_) => b"f32",
        };
        self.bytes(kind, values.as_bytes());
    }

    fn bytes(&mut self, kind: &[u8], bytes: &[u8]) {
        for lengths in [kind.len(), bytes.len()] {
            self.0.update(&(lengths as u64).to_le_bytes());
        }
        self.0.update(kind);
        if bytes.len() < LONG {
            self.0.update(bytes)
        } else {
            self.0.update_rayon(bytes)
        };
    }
}

/// The way of `#[derive(Hash)]`, which leaves no field out, into the same hash.
struct Fields<'a>(&'a mut blake3::Hasher);

impl Hasher for Fields<'_> {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        unreachable!("the whole hash is asked for, never a short one")
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::config::{LayerNorm, Mixer, ModelConfig};
    use crate::format::{Residual, Storage};
    use crate::quantize::fixture;
    use crate::random::RandomWeights;
    use crate::weights::Weight;

    /// A model of which one bit of one tensor is flipped.
    struct Flipped<'a> {
        model: &'a dyn ModelWeights,
        /// The tensor, counted as they are read, and its bit.
        at: (usize, u64),
        read: AtomicUsize,
    }

    impl Flipped<'_> {
        /// These bytes, with the bit flipped if they are the tensor.
        fn flip(&self, bytes: &mut [u8]) {
            let (tensor, bit) = (self.at.0, self.at.1 % (8 * bytes.len() as u64));
            if self.read.fetch_add(1, Ordering::Relaxed) == tensor {
                bytes[bit as usize / 8] ^= 1 << (bit % 8);
            }
        }

        fn list<T: bytemuck::Pod>(&self, values: &[T]) -> Vec<T> {
            let mut values = values.to_vec();
            self.flip(bytemuck::cast_slice_mut(&mut values));
            values
        }

        fn floats(&self, values: &Floats<'_>) -> Floats<'static> {
            match values {
                Floats::F16(v) => Floats::F16(self.list(v).into()),
                Floats::Bf16(v) => Floats::Bf16(self.list(v).into()),
                Floats::F32(v) => Floats::F32(self.list(v).into()),
            }
        }

        fn numbers(&self, numbers: Numbers<'_>) -> Numbers<'static> {
            match numbers {
                Numbers::Words(words) => Numbers::Words(self.list(&words).into()),
                Numbers::Floats(values) => Numbers::Floats(self.floats(&values)),
            }
        }

        fn dense(&self, dense: Dense<'_>) -> Dense<'static> {
            let Dense { in_features, out_features, values } = dense;
            Dense { in_features, out_features, values: self.floats(&values) }
        }
    }

    impl ModelWeights for Flipped<'_> {
        fn config(&self) -> &ModelConfig {
            self.model.config()
        }
        fn embedding(&self) -> Result<Dense<'_>> {
            Ok(self.dense(self.model.embedding()?))
        }
        fn head(&self) -> Result<Option<Dense<'_>>> {
            Ok(self.model.head()?.map(|head| self.dense(head)))
        }
        fn final_norm(&self) -> Result<Vec<f32>> {
            Ok(self.list(&self.model.final_norm()?))
        }
        fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
            Ok(self.list(&self.model.norm(layer, norm)?))
        }
        fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
            let linear = self.model.projection(layer, projection)?;
            let (size, format, matrix) = (linear.weight.size(), linear.weight.format(), linear.weight.tensors().len());
            let mut tensors: Vec<_> = linear.tensors().into_iter().map(|(_, numbers)| self.numbers(numbers)).collect();
            let mut beside = tensors.split_off(matrix).into_iter();
            let mut next = |is_there: bool| is_there.then(|| beside.next()).flatten();
            let bias = next(linear.bias.is_some()).map(|bias| bias.into_floats().into_f32());
            let residual = next(linear.residual.is_some()).zip(next(linear.residual.is_some()));
            let residual = residual.map(|(words, scales)| {
                Residual::new(size.in_features, size.out_features, words.into_words(), scales.into_floats())
            });
            let thresholds = next(linear.thresholds.is_some()).map(|values| values.into_floats().into_f32());
            let weight = Weight::from_tensors(format, size, tensors)?;
            Ok(Linear { weight, bias, residual: residual.transpose()?, thresholds })
        }
        fn bits(&self, layer: usize) -> Option<u32> {
            self.model.bits(layer)
        }
    }

    fn digits(model: &dyn ModelWeights) -> Result<String> {
        let mut fingerprint = Fingerprint::default();
        fingerprint.model(model, &AtomicBool::new(false))?;
        Ok(fingerprint.digits())
    }

    /// The fingerprint with that bit flipped, and how many tensors there are.
    fn flipped(model: &dyn ModelWeights, at: (usize, u64)) -> (Result<String>, usize) {
        let flipped = Flipped { model, at, read: AtomicUsize::new(0) };
        let digits = digits(&flipped);
        (digits, flipped.read.into_inner())
    }

    /// The same numbers in full precision, with biases.
    struct Whole(RandomWeights);

    impl ModelWeights for Whole {
        fn config(&self) -> &ModelConfig {
            self.0.config()
        }
        fn embedding(&self) -> Result<Dense<'_>> {
            self.0.embedding()
        }
        fn head(&self) -> Result<Option<Dense<'_>>> {
            self.0.head()
        }
        fn final_norm(&self) -> Result<Vec<f32>> {
            self.0.final_norm()
        }
        fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
            self.0.norm(layer, norm)
        }
        fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
            let weight = self.0.projection(layer, projection)?.weight;
            let (in_features, out_features) = (weight.in_features(), weight.out_features());
            let mut values = vec![0.0; in_features * out_features];
            values.chunks_exact_mut(in_features).enumerate().for_each(|(row, values)| weight.row(row, values));
            let bias = Some(Cow::Owned(values[..out_features].to_vec()));
            let dense = Dense { in_features, out_features, values: Floats::F32(values.into()) };
            Ok(Linear { bias, ..Linear::plain(Weight::Dense(dense)) })
        }
        fn bits(&self, _layer: usize) -> Option<u32> {
            None
        }
    }

    fn models() -> [Box<dyn ModelWeights>; 3] {
        let changes = serde_json::json!({ "num_hidden_layers": 2, "tie_word_embeddings": false });
        let config = fixture::config().with(changes).unwrap();
        let random = |format| RandomWeights::new(config.clone(), format, 3, 1).unwrap();
        let [codes, groups] = [Storage::ANYPREC, Storage::lutgemm(32)].map(random);
        [Box::new(Whole(random(Storage::ANYPREC))), Box::new(codes), Box::new(groups)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn one_bit_of_any_tensor_makes_another_model(tensor in any::<usize>(), bit in any::<u64>()) {
            for model in models() {
                let own = digits(model.as_ref()).unwrap();
                let (same, tensors) = flipped(model.as_ref(), (usize::MAX, 0));
                prop_assert_eq!(&same.unwrap(), &own, "a copy is the same model");
                prop_assert!(tensors > 20);
                // What its reader refuses has no fingerprint, so it is not taken for another model either.
                if let Ok(other) = flipped(model.as_ref(), (tensor % tensors, bit)).0 {
                    prop_assert_ne!(other, own, "bit {} of tensor {} of {}", bit, tensor % tensors, tensors);
                }
            }
        }
    }

    #[test]
    fn texts_and_configuration_count_too() {
        let [model, ..] = models();
        let mut seen = std::collections::BTreeSet::from([digits(model.as_ref()).unwrap()]);
        let changed = |change: fn(&mut ModelConfig)| {
            let mut config = model.config().clone();
            change(&mut config);
            let model = RandomWeights::new(config, Storage::ANYPREC, 3, 1).unwrap();
            digits(&Whole(model)).unwrap()
        };
        let changes: [fn(&mut ModelConfig); 4] = [
            |c| c.ropes[0].theta *= 1.0 + f64::EPSILON,
            |c| c.rms_norm_eps *= 1.0 + f32::EPSILON,
            |c| {
                let Mixer::Attention(attention) = &mut c.layers[0].mixer;
                attention.window = Some(7);
            },
            |c| c.eos_token_ids.push(3),
        ];
        assert!(changes.into_iter().all(|change| seen.insert(changed(change))));

        let named = |name: &str, token: Option<&str>| BTreeMap::from([(name.to_owned(), token.map(str::to_owned))]);
        let texts = TextFiles {
            tokenizer_json: b"{}".to_vec(),
            chat_template: None,
            special_tokens: named("eos_token", Some("</s>")),
            eos_token_ids: vec![2],
        };
        let digits = |texts: &TextFiles| {
            let mut fingerprint = Fingerprint::default();
            fingerprint.texts(texts);
            fingerprint.digits()
        };
        let changes = [
            texts.clone(),
            TextFiles { tokenizer_json: b"{ }".to_vec(), ..texts.clone() },
            TextFiles { chat_template: Some(String::new()), ..texts.clone() },
            TextFiles { special_tokens: named("bos_token", Some("</s>")), ..texts.clone() },
            TextFiles { special_tokens: named("eos_token", None), ..texts.clone() },
            TextFiles { special_tokens: BTreeMap::new(), ..texts.clone() },
            TextFiles { eos_token_ids: vec![2, 2], ..texts.clone() },
        ];
        assert!(changes.iter().all(|texts| seen.insert(digits(texts))));
        assert!(!seen.insert(digits(&texts)), "the same texts give the same");
    }

    #[test]
    fn a_program_that_is_told_to_stop_does() {
        let [model, ..] = models();
        let error = Fingerprint::default().model(model.as_ref(), &AtomicBool::new(true)).unwrap_err();
        assert!(error.is::<crate::interrupted::Interrupted>());
    }
}
