//! What a user does with a model of a family, by the program itself, on the CPU: from a directory to a quantized model
//! and on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use decdec::backend::cpu::Cpu;
use decdec::config::Projection;
use decdec::eval;
use decdec::format::Format;
use decdec::model::Model;
use decdec::nsys::trace::{self, Kernel, Role};
use decdec::sampling::argmax;
use decdec::source::Source;
use decdec::tokenizer::{Message, TextFiles, TextReader, Tokenizer};
use decdec::weights::ModelWeights;
use serde_json::Value;
use tempfile::TempDir;

use crate::logits::logits;
use crate::models::{Complete, complete_of, config, data, file, open};

mod foreign;

/// Tokens of a window: more than windows of attention hold, and than the original contexts of YaRN and LongRoPE.
const SEQ_LEN: usize = 32;

/// Windows of the evaluated text, which calibration does not reach.
const WINDOWS: [usize; 2] = [100, 108];

/// A directory to work in, with a model in `original`.
pub(crate) struct Shop {
    dir: TempDir,
    complete: &'static Complete,
}

/// Does this with every model of a family that has a tokenizer.
pub(crate) fn on_each_model(family: &str, road: fn(&Shop)) {
    for complete in complete_of(family) {
        let shop = Shop { dir: tempfile::tempdir().expect("a directory"), complete };
        complete.write(&shop.path("original"));
        road(&shop);
    }
}

/// What all files of a directory hold.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = fs::read_dir(dir).expect("there").map(|entry| entry.expect("readable").path());
    files.map(|path| (path.file_name().expect("a name").into(), fs::read(&path).expect("readable"))).collect()
}

impl Shop {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The program with these words, without what changes its output.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("decdec"));
        command
            .env_remove("RUST_LOG")
            .env_remove("COLUMNS")
            .env_remove("RUST_BACKTRACE")
            .env("XDG_RUNTIME_DIR", "/tmp");
        command.current_dir(self.dir.path()).args(words);
        Command::from_std(command)
    }

    /// What it prints on stdout and on stderr.
    fn run(&self, words: &[&str]) -> [String; 2] {
        let output = self.command(words).output().expect("it runs");
        let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).expect("text"));
        assert!(output.status.success(), "{}: {}: {err}", self.complete.model, words.join(" "));
        [out, err]
    }

    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.run(words)[0]).expect("one object")
    }

    /// Fails with one line, which says this.
    fn refuses(&self, words: &[&str], what: &str) {
        let output = self.command(words).output().expect("it runs");
        let err = String::from_utf8(output.stderr).expect("text");
        let errors: Vec<_> = err.lines().filter(|line| line.starts_with("error: ")).collect();
        let told = matches!(errors[..], [error] if error.contains(what));
        assert!(!output.status.success() && told, "{}: {}: {err}", self.complete.model, words.join(" "));
    }

    /// Quantizes the model into a directory called `backend-bits`.
    fn quantize(&self, backend: &str, bits: &str, more: &[&str]) -> String {
        let out = format!("{backend}-{bits}");
        let words = ["quantize", "original", "--out", &out, "--backend", backend, "--bitwidth", bits];
        self.run(&[&words[..], &calibration().each_ref().map(String::as_str), more].concat());
        out
    }

    fn perplexity(&self, model: &str, more: &[&str]) -> Value {
        let (text, seq_len, [start, end]) = (data("botchan.txt"), SEQ_LEN.to_string(), WINDOWS);
        let windows = format!("{start}..{end}");
        let words = ["eval", "perplexity", model, "--text", text.to_str().expect("text"), "--device", "cpu", "--json"];
        self.json(&[&words[..], &["--seq-len", &seq_len, "--windows", &windows], more].concat())
    }

    /// Mean divergence from the original, with `k_chunk` channels of 1024 compensated.
    fn divergence(&self, model: &str, k_chunk: &str) -> f64 {
        let more = ["--compare", "original", "--k-chunks", k_chunk, k_chunk, k_chunk, k_chunk];
        self.perplexity(model, &more)["kl_divergence"].as_f64().expect("a number")
    }

    /// The model as the library reads it from the other spelling of its configuration.
    fn library(&self) -> (Source, Tokenizer) {
        let source = open(self.complete.model, &config(self.complete.model, "config.json")).expect("it opens");
        let texts = TextFiles::read(&self.path("original")).expect("readable");
        let tokenizer = Tokenizer::new(&texts, source.config()).expect("it loads");
        (source, tokenizer)
    }
}

/// Flags of a short calibration.
fn calibration() -> [String; 6] {
    let text = data("botchan.txt").to_str().expect("text").to_owned();
    ["--calib".into(), text, "--seq-len".into(), SEQ_LEN.to_string(), "--samples".into(), "32".into()]
}

/// In both formats, more bits are closer to the original, and so is what compensates; residuals that compensate all are
/// nearly there.
pub(crate) fn quantize(shop: &Shop) {
    for backend in ["ap", "lutgemm"] {
        let [three, four] =
            ["3", "4"].map(|bits| shop.quantize(backend, bits, &["--for-k-chunks", "64", "64", "64", "64"]));
        let [coarse, some] = ["0", "64"].map(|k_chunk| shop.divergence(&three, k_chunk));
        let fine = shop.divergence(&four, "0");
        // A residual says what is to be corrected beside as many channels as it was made for.
        let for_all = ["--for-k-chunks", "1024", "1024", "1024", "1024", "--overwrite"];
        let whole = shop.divergence(&shop.quantize(backend, "3", &for_all), "1024");
        let what = format!("{}, {backend}", shop.complete.model);
        // Of squares of errors: a step of 4 bits is half of one of 3, a residual's a 14th of a row's largest.
        assert!(fine < coarse / 1.5 && fine > 0.0, "{what}: {coarse} at 3 bits, {fine} at 4");
        assert!(some < coarse, "{what}: {coarse}, {some} where 2 of 32 channels are compensated");
        assert!(whole < coarse / 8.0, "{what}: {coarse}, {whole} where all are compensated");
    }
}

/// Made anew, residuals are those that quantizing made; made for a model that another program quantized, they bring
/// it back. Against another original they are refused.
pub(crate) fn residuals(shop: &Shop) {
    let make = |original: &str, quantized: &str, out: &str| {
        let words = ["residuals", "--original", original, "--quantized", quantized, "--out", out];
        let calibration = calibration();
        words.into_iter().map(str::to_owned).chain(calibration).collect::<Vec<_>>()
    };
    let run = |words: &[String]| shop.run(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let own = shop.quantize("ap", "3", &["--refine", "none"]);
    run(&make("original", &own, "again"));
    assert!(contents(&shop.path(&own)) == contents(&shop.path("again")), "{}", shop.complete.model);

    foreign::coarse(&shop.path("original"), &shop.path("foreign"));
    run(&make("original", "foreign", "pair"));
    let [alone, whole] = ["0", "1024"].map(|k_chunk| shop.divergence("pair", k_chunk));
    assert!(whole < alone / 8.0, "{}: {alone}, {whole} where all is compensated", shop.complete.model);

    foreign::other_layers(&shop.path("original"), &shop.path("stranger"));
    let strangers = make("stranger", "foreign", "none");
    shop.refuses(&strangers.iter().map(String::as_str).collect::<Vec<_>>(), "tensor model.layers.0.");
}

/// A checkpoint stays as it is; a directory in which quantization was only simulated keeps its logits.
pub(crate) fn convert(shop: &Shop) {
    let own = shop.quantize("ap", "3", &["--refine", "none"]);
    shop.run(&["convert", &own, "--out", "copy"]);
    assert!(contents(&shop.path(&own)) == contents(&shop.path("copy")), "{}", shop.complete.model);

    foreign::coarse(&shop.path("original"), &shop.path("foreign"));
    shop.run(&["convert", "foreign", "--out", "converted"]);
    let divergence = |from: &str| {
        let value = shop.perplexity("converted", &["--compare", from]);
        value["kl_divergence"].as_f64().expect("a number")
    };
    let (same, other) = (divergence("foreign"), divergence("original"));
    // The same numbers multiplied in another order: logits differ by some 10^-6, divergence by the square of that.
    assert!(same < 1e-9 && other > 1e-6, "{}: {same}, {other} from the original", shop.complete.model);
    shop.refuses(&["convert", "original", "--out", "none"], "is full precision");
}

/// Greedy text is what reading it at once says, the same from a directory and from GGUF; a chat is read as its template
/// has it; a model quantized to 8 bits says the same.
pub(crate) fn generate(shop: &Shop) {
    let gguf = file(shop.complete.model, "model.gguf");
    let greedy = |model: &str, prompt: &str, more: &[&str]| {
        let words = ["generate", "--checkpoint-path", model, "--prompt", prompt, "--device", "cpu", "--json"];
        shop.json(&[&words[..], &["--ignore-eos", "--max-new-tokens", "24"], more].concat())
    };
    let tokens = |value: &Value| -> Vec<u32> {
        value["tokens"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let (source, tokenizer) = shop.library();
    let (cpu, vocab) = (Cpu::new(), source.config().vocab_size);
    let model = Model::load(&cpu, &source, |_| ()).expect("loads");
    // What follows each token behind the prompt, the text read at once.
    let read = |prompt: &[u32], made: &[u32]| -> Vec<u32> {
        let text = [prompt, made].concat();
        let logits = logits(&model, &text, text.len());
        let rows = logits.chunks_exact(vocab).skip(prompt.len() - 1).take(made.len());
        rows.map(|row| argmax(row).expect("numbers")).collect()
    };
    let prompt = "the thing that he said";
    let ids = tokenizer.encode(prompt).expect("ids");
    let made = tokens(&greedy("original", prompt, &[]));
    assert_eq!(made.len(), 24);
    assert_eq!(read(&ids, &made), made, "{}", shop.complete.model);
    let others = tokenizer.encode("it's another").expect("ids");
    assert_ne!(read(&others, &made), made, "{}: whatever the prompt", shop.complete.model);
    assert_eq!(tokens(&greedy(gguf.to_str().expect("text"), prompt, &[])), made, "{}, GGUF", shop.complete.model);

    let ids = tokenizer.chat_ids(&[Message::new("user", "a")], true).expect("ids");
    let words = ["generate", "--checkpoint-path", "original", "--chat", "--prompt", "a", "--device", "cpu", "--json"];
    if ids.len() < source.config().max_position_embeddings {
        let chat = shop.json(&[&words[..], &["--ignore-eos", "--max-new-tokens", "8"]].concat());
        assert_eq!(chat["prompt_tokens"], ids.len());
        assert_eq!(read(&ids, &tokens(&chat)), tokens(&chat), "{}, chat", shop.complete.model);
    } else {
        // A template whose words are too many for a tiny model.
        shop.refuses(&words, &format!("the prompt has {} tokens", ids.len()));
    }

    // 8 bits hold each of the 32 numbers of a row; wider rows lose little, which compensation gives back.
    let quantized = shop.quantize("ap", "8", &["--refine", "none"]);
    let quantized = tokens(&greedy(&quantized, prompt, &["--k-chunks", "1024", "1024", "1024", "1024"]));
    assert_eq!(quantized, made, "{}, quantized", shop.complete.model);
}

/// The perplexity is that of logits which the library computes; 8 bits keep it, 2 bits are farther from it by orders
/// of magnitude.
pub(crate) fn eval(shop: &Shop) {
    let (source, tokenizer) = shop.library();
    let text = TextReader::new(fs::File::open(data("botchan.txt")).expect("there")).read_all().expect("text");
    let ids = tokenizer.encode(&text).expect("ids");
    let (cpu, vocab) = (Cpu::new(), source.config().vocab_size);
    let model = Model::load(&cpu, &source, |_| ()).expect("loads");
    let (mut sum, mut count) = (0.0, 0);
    for window in eval::windows(&ids, SEQ_LEN, WINDOWS[0]..WINDOWS[1]).expect("long enough") {
        let all = logits(&model, window, SEQ_LEN);
        for (logits, &next) in all.chunks_exact(vocab).zip(&window[1..]) {
            let log_sum = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
            sum += log_sum - f64::from(logits[next as usize]);
            count += 1;
        }
    }
    let perplexity = |model: &str| shop.perplexity(model, &[])["perplexity"].as_f64().expect("a number");
    let (own, want) = (perplexity("original"), (sum / f64::from(count)).exp());
    // Sums of f32 logits with errors of 10^-6.
    assert!((own / want - 1.0).abs() < 1e-5, "{}: {own}, {want} expected", shop.complete.model);

    let [eight, two] = ["8", "2"].map(|bits| shop.quantize("ap", bits, &["--refine", "none"]));
    let near = perplexity(&eight);
    assert!((near / own - 1.0).abs() < 1e-2, "{}: {own}, {near} at 8 bits", shop.complete.model);
    let (fine, coarse) = (shop.divergence(&eight, "0"), shop.divergence(&two, "0"));
    assert!(fine < coarse / 1000.0, "{}: {fine} at 8 bits, {coarse} at 2", shop.complete.model);
}

/// Measures a checkpoint with up to one channel of 32 compensated.
fn sweep(shop: &Shop, checkpoint: &str) {
    let words = ["profile", "run", "--checkpoint-path", checkpoint, "--device", "cpu", "--tokens", "1"];
    let [out, _] = shop.run(&[&words[..], &["--min-n-tb", "1", "--max-n-tb", "1", "--max-k-chunk", "40"]].concat());
    assert!(out.contains("times from host clock"), "{out}");
}

/// Both files are there, every projection of every layer is timed, alone and compensated.
pub(crate) fn profile(shop: &Shop) {
    let layers = shop.library().0.config().layers.len();
    for format in [Format::AnyPrec, Format::LutGemm] {
        let checkpoint = shop.quantize(format.name(), "3", &["--refine", "none"]);
        sweep(shop, &checkpoint);
        let stem = format!("nsys/run_{checkpoint}_fp16_{}_3", format.algo());
        assert!(fs::read(shop.path(&format!("{stem}.sqlite"))).expect("there").starts_with(b"SQLite format 3"));
        let text = fs::read_to_string(shop.path(&format!("{stem}.trace"))).expect("there");
        let lines = trace::parse(&text, format).expect("a trace");
        for projection in Projection::ALL {
            let timed = |alone: bool| {
                let role = move |role: Role| {
                    if alone { role == Role::Standalone } else { matches!(role, Role::Concurrent(_)) }
                };
                lines.iter().filter(|line| line.kernel == Kernel::Gemv(projection) && role(line.role)).count()
            };
            assert_eq!(timed(true), layers, "{checkpoint} {projection}");
            assert!(timed(false) >= layers && timed(false) % layers == 0, "{checkpoint} {projection}");
        }
    }
}

/// Where any slowdown is allowed all that was measured is compensated, and text is made with that; without a profile
/// there is nothing to search.
pub(crate) fn tune(shop: &Shop) {
    let checkpoint = shop.quantize("ap", "3", &["--refine", "none"]);
    let words = ["tune", "run", "--checkpoint-path", &checkpoint, "--device", "cpu", "--target-slowdown", "1000000"];
    shop.refuses(&words, "run decdec profile with the same names first");
    sweep(shop, &checkpoint);
    let [out, _] = shop.run(&words);
    assert!(out.contains("Best n_tb"), "{out}");
    let found = fs::read_dir(shop.path("tuned")).expect("there").map(|entry| entry.expect("readable").path());
    let found: Vec<_> = found.collect();
    let [file] = &found[..] else { panic!("{found:?}") };
    let tuned: Value = serde_json::from_slice(&fs::read(file).expect("readable")).expect("JSON");
    assert_eq!(tuned["k_chunks"], serde_json::json!([40, 40, 40, 40]), "{}", shop.complete.model);
    let words = ["generate", "--checkpoint-path", &checkpoint, "--prompt", "ab", "--max-new-tokens", "4"];
    let [_, err] = shop.run(&[&words[..], &["--device", "cpu", "--tuned", file.to_str().expect("text")]].concat());
    assert!(err.contains("k_chunk [40, 40, 40, 40]"), "{err}");
}
