//! Every model of a family from its source to a quantized model by the library, and what is done with one: residuals
//! made anew, text, a sweep. On the CPU.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use decdec::backend::GemvBackend;
use decdec::backend::cpu::Cpu;
use decdec::checkpoint::{BitWidth, Checkpoint};
use decdec::config::{LayerNorm, Mixer, ModelConfig, Projection};
use decdec::dec::Selection;
use decdec::engine::Engine;
use decdec::eval;
use decdec::format::{Dense, Format};
use decdec::model::{Compensation, Model};
use decdec::nsys::{Identity, Precision, trace};
use decdec::profile::{self, ByClock};
use decdec::progress::Silent;
use decdec::quantize::{Calibration, Options, Refine, ResidualOptions, quantize, residuals};
use decdec::sampling::{Sampling, argmax, draws};
use decdec::source::Source;
use decdec::weights::{Linear, ModelWeights, Weight};
use serde_json::json;

use crate::made::made;
use crate::models::{self, config, open};

/// Tokens of a window: more than windows of attention hold, and than YaRN's and longrope's first training had.
const SEQ_LEN: usize = 40;

/// What is done with each model of a family.
pub(crate) fn lives(family: &str) {
    for name in models::of(family) {
        let source = open(&name, &config(&name, "config.json")).unwrap();
        // SmolLM2's has 24 channels, of which codes are not made; it is a Llama.
        if name != "smollm2" {
            Tiny::new(&source).lives();
        }
    }
}

/// A model whose feed-forward part is as wide as codes need, with channels of zeros; and one with a changed norm.
#[derive(Clone)]
struct Tiny<'a> {
    source: &'a Source,
    config: ModelConfig,
    doubled: Option<(usize, LayerNorm)>,
}

impl<'a> Tiny<'a> {
    fn new(source: &'a Source) -> Self {
        let config = source.config().clone();
        let width = config.layers[0].intermediate_size();
        let config = match width.is_multiple_of(32) {
            true => config,
            false => config.with(json!({ "intermediate_size": width.next_multiple_of(32) })).unwrap(),
        };
        Self { source, config, doubled: None }
    }
}

impl ModelWeights for Tiny<'_> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Dense<'_>> {
        self.source.embedding()
    }

    fn head(&self) -> Result<Option<Dense<'_>>> {
        self.source.head()
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.source.final_norm()
    }

    fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>> {
        let by = if self.doubled == Some((layer, norm)) { 2.0 } else { 1.0 };
        Ok(self.source.norm(layer, norm)?.iter().map(|x| by * x).collect())
    }

    fn projection(&self, layer: usize, projection: Projection) -> Result<Linear<'_>> {
        let linear = self.source.projection(layer, projection)?;
        let ((n, m), (wide, high)) =
            (self.source.config().shape(layer, projection), self.config.shape(layer, projection));
        if (n, m) == (wide, high) {
            return Ok(linear);
        }
        // Gate stays at the top, up begins in the middle.
        let place = |row| if projection == Projection::GateUp && row >= m / 2 { row + (high - m) / 2 } else { row };
        let mut values = vec![0.0; wide * high];
        (0..m).for_each(|row| linear.weight.row(row, &mut values[place(row) * wide..][..n]));
        let bias = linear.bias.map(|bias| {
            let mut padded = vec![0.0; high];
            (0..m).for_each(|row| padded[place(row)] = bias[row]);
            padded.into()
        });
        let weight = Weight::Dense(Dense { in_features: wide, out_features: high, values: values.into() });
        Ok(Linear { bias, ..Linear::plain(weight) })
    }

    fn bits(&self, _layer: usize) -> Option<u32> {
        None
    }
}

/// Tokens without sense.
fn tokens(config: &ModelConfig, seed: u64, windows: usize) -> Vec<u32> {
    draws(seed, windows * SEQ_LEN).iter().map(|x| (x * config.vocab_size as f32) as u32).collect()
}

/// What all files of a directory hold.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap())).collect()
}

impl Tiny<'_> {
    fn calibration(&self) -> Calibration {
        Calibration::of_text(tokens(&self.config, 1, 64), SEQ_LEN, 64, "random")
    }

    fn quantized(&self, format: Format, bits: f64, refine: Refine, out: &Path) -> Checkpoint {
        let options = Options {
            backend: format,
            bits: BitWidth::try_from(bits).unwrap(),
            group_size: None,
            awq: refine != Refine::None,
            refine,
            calibration: self.calibration(),
            source: "tiny".into(),
            overwrite: false,
        };
        let (stop, bar) = (AtomicBool::new(false), Silent);
        quantize(self, self.source.texts(), &options, out, &stop, &bar).unwrap();
        Checkpoint::open(out).unwrap()
    }

    fn residuals(&self, quantized: &Checkpoint, out: &Path) -> Result<()> {
        let options = ResidualOptions { calibration: self.calibration(), source: "tiny".into(), overwrite: false };
        let (stop, bar) = (AtomicBool::new(false), Silent);
        residuals(self, quantized, self.source.texts(), &options, out, &stop, &bar).map(drop)
    }

    /// Mean divergence of a checkpoint from the model, over text that calibration did not see, with `k_chunk` channels
    /// of 1024 compensated.
    fn divergence(&self, checkpoint: &Checkpoint, k_chunk: usize) -> f64 {
        let cpu = Cpu::new();
        let source = Engine::of(Model::load(&cpu, self, |_| ()).unwrap(), SEQ_LEN);
        let mut quantized = Model::load(&cpu, checkpoint, |_| ()).unwrap();
        quantized.compensate(Some(&Compensation::uniform(1, k_chunk, Selection::Exact))).unwrap();
        let tokens = tokens(&self.config, 2, 8);
        let windows = eval::windows(&tokens, SEQ_LEN, 0..8).unwrap();
        let quantized = Engine::of(quantized, SEQ_LEN);
        eval::perplexity(&quantized, Some(&source), &windows, |_| Ok(())).unwrap().kl_divergence.unwrap()
    }

    fn lives(&self) {
        let dir = tempfile::tempdir().unwrap();
        for format in [Format::AnyPrec, Format::LutGemm] {
            let at = |name: &str| dir.path().join(format!("{format}-{name}"));
            let eight = self.quantized(format, 8.0, Refine::None, &at("8"));
            let three = self.quantized(format, 3.0, Refine::None, &at("3"));
            let refined = self.quantized(format, 3.0, Refine::Compensated { k_chunks: [[64; 4]; 2] }, &at("refined"));
            let [fine, coarse, whole] =
                [(&eight, 0), (&three, 0), (&three, 1024)].map(|(model, k_chunk)| self.divergence(model, k_chunk));
            // Divergences grow with the squares of errors, and steps of 8 bits are 36 times finer than those of 3.
            assert!(fine < coarse / 100.0, "{format}: {fine} at 8 bits, {coarse} at 3");
            // Residuals are kept in steps of a 7th of the largest in a row.
            assert!(whole < coarse / 10.0, "{format}: {coarse}, {whole} where all is compensated");
            let [some, fitted] = [&three, &refined].map(|model| self.divergence(model, 64));
            assert!(some < coarse, "{format}: {coarse}, {some} where some is compensated");
            assert!(fitted < some, "{format}: {some}, {fitted} where codes are fitted to that");
            self.completed(&eight, &at("8"), &at("again"));
            if format == Format::LutGemm {
                self.scales_are_found(&three, &refined, &at("anew"));
            }
            speaks(&refined);
            sweeps(&refined, format, &at("nsys"));
        }
        self.other_norms_are_refused(&dir.path().join("ap-8"), &dir.path().join("none"));
    }

    /// Residuals of a model that is there are those that quantizing it left.
    fn completed(&self, quantized: &Checkpoint, whole: &Path, out: &Path) {
        self.residuals(quantized, out).unwrap();
        assert_eq!(contents(out), contents(whole));
    }

    /// Residuals made anew for codes whose channels AWQ scaled: what enters is scaled as it was. `plain` is not scaled.
    fn scales_are_found(&self, plain: &Checkpoint, scaled: &Checkpoint, out: &Path) {
        self.residuals(scaled, out).unwrap();
        let anew = Checkpoint::open(out).unwrap();
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>();
        let thresholds = |checkpoint: &Checkpoint, layer, projection| {
            checkpoint.projection(layer, projection).unwrap().thresholds.unwrap().to_vec()
        };
        // How far thresholds of what enters are off, over all layers.
        let off = |checkpoint: &Checkpoint, projections: [Projection; 2]| {
            let each = (0..self.config.layers.len()).flat_map(|layer| projections.map(|p| (layer, p)));
            let each = each.map(|(layer, projection)| {
                let [a, b] = [scaled, checkpoint].map(|c| thresholds(c, layer, projection));
                squares(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / squares(&mut a.iter().copied())
            });
            each.sum::<f64>().sqrt()
        };
        // The scales of these are known but for the last bits of f32.
        let known = [Projection::Qkv, Projection::GateUp];
        assert!(off(&anew, known) < 1e-5, "qkv and gu are off by {}", off(&anew, known));
        // Those of others follow from rows of 32 weights and 3 bits, whose rounding hides small scales: at most 0.71 is left
        // of what not looking leaves, as measured.
        let estimated = [Projection::O, Projection::Down];
        let (found, unscaled) = (off(&anew, estimated), off(plain, estimated));
        assert!(found < 0.85 * unscaled, "o and d are off by {found}, by {unscaled} if they are not scaled");
    }

    /// Norms that feed no projection are the original's, or it is another model.
    fn other_norms_are_refused(&self, quantized: &Path, out: &Path) {
        let quantized = Checkpoint::open(quantized).unwrap();
        let last = self.config.layers.len() - 1;
        for (norm, _) in self.config.layers[last].norms(self.config.hidden_size) {
            if matches!(norm, LayerNorm::AttentionInput | LayerNorm::FeedForwardInput) {
                continue;
            }
            let other = Self { doubled: Some((last, norm)), ..self.clone() };
            let message = format!("{:#}", other.residuals(&quantized, out).unwrap_err());
            let (_, module) = self.config.family.norms.iter().find(|(own, _)| *own == norm).unwrap();
            let tensor = format!("tensor model.layers.{last}.{module}.weight: channel 0 is ");
            assert!(message.contains(&tensor), "{message}");
            fs::remove_dir_all(out.with_extension("partial")).unwrap();
        }
        let mut other = self.clone();
        let Mixer::Attention(attention) = &mut other.config.layers[last].mixer;
        if attention.qk_norm.take().is_some() {
            let message = format!("{:#}", other.residuals(&quantized, out).unwrap_err());
            assert!(message.contains(&format!("layer {last} of the original has ")), "{message}");
            assert!(message.contains(", norms ") && message.contains("_norm ["), "{message}");
        }
    }
}

/// Text, token after token, is what reading it at once says.
fn speaks(checkpoint: &Checkpoint) {
    let cpu = Cpu::new();
    let mut model = Model::load(&cpu, checkpoint, |_| ()).unwrap();
    model.compensate(Some(&Compensation::uniform(1, 64, Selection::Exact))).unwrap();
    let (prompt, vocab) = (tokens(model.config(), 3, 1)[..9].to_vec(), model.config().vocab_size);
    let mut state = model.state(1, SEQ_LEN).unwrap();
    let made = made(&model, &mut state, &prompt, SEQ_LEN - prompt.len(), true);
    let text = [&prompt[..], &made].concat();
    model.begin(&mut state, 0, &Sampling::GREEDY, &[]).unwrap();
    let mut read = Vec::new();
    for part in text.chunks(state.max_tokens()) {
        let mut on_device = cpu.vector(part.len() * vocab).unwrap();
        model.logits(&mut state, 0, part, true, &mut on_device).unwrap();
        let mut logits = vec![0.0; part.len() * vocab];
        cpu.read(&on_device, &mut logits).unwrap();
        read.extend(logits.chunks_exact(vocab).map(|logits| argmax(logits).unwrap()));
    }
    assert_eq!(read[prompt.len() - 1..text.len() - 1], made);
}

/// Every projection of every layer is timed, with compensation and without.
fn sweeps(checkpoint: &Checkpoint, format: Format, dir: &Path) {
    let options = profile::Options {
        identity: Identity { prefix: "tiny".into(), model: "tiny".into(), precision: Precision::Fp32, format, bits: 3 },
        weights: "tiny".into(),
        dir: dir.to_path_buf(),
        tokens: 1,
        overwrite: false,
        halve_layers: false,
        min_n_tb: Some(1),
        max_n_tb: Some(1),
        max_k_chunk: None,
        k_chunks: Some(vec![64]),
        selection: Selection::Bucket,
        kind: None,
        dearest: profile::Options::DEAREST,
        choices: Vec::new(),
    };
    let outcome = profile::run(&Cpu::new(), &mut ByClock::default(), checkpoint, &options).unwrap();
    let lines = trace::parse(&fs::read_to_string(&outcome.trace).unwrap(), format).unwrap();
    let count = |role: fn(trace::Role) -> bool| lines.iter().filter(|line| role(line.role)).count();
    let launches = 4 * checkpoint.config().layers.len();
    assert_eq!(count(|role| role == trace::Role::Standalone), launches);
    assert_eq!(count(|role| matches!(role, trace::Role::Concurrent(_))), 2 * launches);
}
