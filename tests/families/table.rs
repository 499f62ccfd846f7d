//! `docs/models.md`, made of the registry of families and of this program's tests; `DECDEC_UPDATE_DOCS=1` writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use decdec::config::families::{self, Family, MULTIMODAL};

use crate::asks;
use crate::models::{complete_of, file, of};

/// A column: its head, and the tests that a family has for it.
const COLUMNS: [(&str, &[&str]); 14] = [
    ("CPU", &["cpu::logits"]),
    ("WGSL", &["wgpu::logits"]),
    ("CUDA float32", &["cuda::float32"]),
    ("float16", &["cuda::float16"]),
    ("bfloat16", &["cuda::bfloat16"]),
    ("GGUF", &["gguf::cpu", "gguf::wgpu", "gguf::cuda"]),
    ("chat", &["chat"]),
    ("quantize", &["library", "quantize"]),
    ("residuals", &["library", "residuals"]),
    ("convert", &["convert"]),
    ("generate", &["generate"]),
    ("eval", &["eval"]),
    ("profile", &["profile"]),
    ("tune", &["tune"]),
];

/// Published models that tests read, with the file of those tests.
const REAL: [(&str, &str, &str); 1] = [("llama", "SmolLM2-135M-Instruct", "tests/smollm2.rs")];

const HEAD: &str = "\
# Models

<!-- Made by tests/families/table.rs: \
DECDEC_UPDATE_DOCS=1 cargo test --release --features reference-wgpu --test families table -->

decdec runs dense decoders of the families below. It reads a model from a Hugging Face directory (`config.json`, \
`*.safetensors`, `tokenizer.json`), from a `.gguf` file, or from a wheel or zip that holds one, and quantizes it; \
quantized models of other programs (AWQ, GPTQ, the reference's directories, full-precision files whose quantization \
is only simulated) are run as they are or converted. Of models that see images the part about text is read. A field \
of `config.json` that would change what a model computes and is not understood is refused by name.

";

const FAMILIES: &str = "\
## Families

The last column says as what tests meet a family: as a published model, or only as tiny ones of random numbers, made \
by transformers with every kind of layer that the family has (`tests/data/models`).

";

const TESTED: &str = "\
## What is tested

Behind each mark is a test in `tests/families`, called `MODEL_TYPE::COLUMN`. Logits on the CPU, on a Vulkan device \
(WGSL) and on CUDA are those of transformers, for a short text and one past every window and original context; GGUF \
on all three; chats become their ids. Commands are run by the program on the CPU, and on every tiny model by the \
library (`MODEL_TYPE::library`). Where a model is changed or a field overlooked, the same comparisons fail. CUDA needs \
an NVIDIA GPU (`scripts/gpu.sh`).

";

const ASKS: &str = "\
## What layers ask of a device

Models known by name (`--model-name`), and the operations of each family's layers in order, as `LayerConfig::program` \
has them; where layers of a family differ, all kinds are given. \"Attention\" says what is not plain softmax of `q·k` \
over the root of a head's width.

";

const REFUSED: &str = "\
## Refused

Known by name, and refused with what the decoder lacks for them. Names are those of `config.json` or of GGUF, letters \
and digits only.

";

const NOTES: &str = "\
## Good to know

- **Windows.** A layer whose attention sees only the last N tokens keeps those alone in its cache, however long the \
text is and however many of its tokens are read at once (on CUDA in sixteens). Gemma, OLMo 3, Mistral 7B v0.1 and \
Phi-3-mini-4k and medium-4k have such layers.
- **LongRoPE** (Phi-3 128k, Phi-4-mini) has two lists of frequencies. Which one counts is decided once, when a text \
begins: the long list if the session's context (`--max-seq-len`, the model's own where it is left out) is longer than \
the model's original one, the short list otherwise. The same short text has other logits under another `--max-seq-len`.
- **YaRN** counts where `config.json` or the GGUF has it. Qwen publishes files without; with `rope_scaling` of type \
`yarn` added, the context is as long as the factor says.
- **GGUF** does not say all that `config.json` does: Gemma's scale of attention is known by size (27B), SmolLM3's \
layers without rotation are every fourth, files of Mistral go by the names of Llama and Ministral 3, files of OLMo 3 \
by that of OLMo 2, and their keys tell them apart.
- **Qwen2.5-1M** runs as in transformers, by plain attention: its `dual_chunk_attention_config`, which changes texts of \
more than a quarter of a million tokens, is left aside.

";

/// The names that this program's tests have.
fn tests() -> BTreeSet<String> {
    let program = std::env::current_exe().expect("a path");
    let output = Command::new(program).args(["--list", "--format", "terse"]).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let list = String::from_utf8(output.stdout).expect("text");
    list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

/// What a family is called in tests.
fn module(family: &Family) -> &'static str {
    family.model_types[0].0
}

/// The first test without which a column of a family has no mark, if it is not among `tests`.
fn missing(tests: &BTreeSet<String>, family: &Family, column: &[&str]) -> Option<String> {
    let names = column.iter().map(|test| format!("{}::{test}", module(family)));
    names.into_iter().find(|name| !tests.contains(name))
}

fn code(names: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    names.into_iter().map(|name| format!("`{}`", name.as_ref())).collect::<Vec<_>>().join(", ")
}

/// What a GGUF calls its architecture.
fn architecture(path: &Path) -> String {
    let (bytes, key) = (fs::read(path).expect("readable"), b"general.architecture");
    let at = bytes.windows(key.len()).position(|window| window == key).expect("the key") + key.len();
    let length = u64::from_le_bytes(bytes[at + 4..at + 12].try_into().expect("a length")) as usize;
    String::from_utf8(bytes[at + 12..at + 12 + length].to_vec()).expect("text")
}

fn table(text: &mut String, head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    writeln!(text, "| {} |\n|{}", head.join(" | "), "---|".repeat(head.len())).expect("a text");
    for row in rows {
        assert_eq!(row.len(), head.len());
        writeln!(text, "| {} |", row.join(" | ")).expect("a text");
    }
    text.push('\n');
}

fn described(family: &Family) -> Vec<String> {
    let module = module(family);
    let own = family.model_types.iter().map(|(name, _)| *name);
    let around = MULTIMODAL.iter().filter(|(.., inside)| inside.contains(&module)).map(|(name, ..)| *name);
    let types = own.chain(around.filter(|name| *name != module));
    let files = complete_of(module).into_iter().map(|complete| architecture(&file(complete.model, "model.gguf")));
    let architectures: BTreeSet<String> = family.gguf.iter().map(|name| (*name).to_owned()).chain(files).collect();
    let real = REAL.iter().find(|(of, ..)| *of == module);
    let met = real.map_or("tiny models".to_owned(), |(_, model, test)| format!("[{model}](../{test}), tiny models"));
    vec![family.name.to_owned(), family.covers.to_owned(), code(types), code(architectures), met]
}

/// A mark for each column, a missing test's name for one without.
fn tested(tests: &BTreeSet<String>, family: &Family) -> Vec<String> {
    let marks = COLUMNS.iter().map(|(_, column)| missing(tests, family, column).unwrap_or("✓".to_owned()));
    [family.name.to_owned()].into_iter().chain(marks).collect()
}

/// The page.
fn page(tests: &BTreeSet<String>) -> String {
    let mut text = HEAD.to_owned();
    text.push_str(FAMILIES);
    let head = ["family", "models", "`model_type`", "GGUF architecture", "met as"];
    table(&mut text, &head, families::ALL.into_iter().map(described));

    text.push_str(TESTED);
    let head: Vec<_> = ["family"].into_iter().chain(COLUMNS.iter().map(|(head, _)| *head)).collect();
    table(&mut text, &head, families::ALL.into_iter().map(|family| tested(tests, family)));
    text.push_str("The tiny models of each family:\n\n");
    for family in families::ALL {
        writeln!(text, "- {}: {}", family.name, code(of(module(family)))).expect("a text");
    }
    text.push('\n');
    text.push_str(NOTES);

    text.push_str(ASKS);
    table(&mut text, &asks::SHAPES, asks::shapes());
    table(&mut text, &asks::OPERATIONS, families::ALL.into_iter().map(asks::operations));

    text.push_str(REFUSED);
    let mut lacking: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    families::unsupported().iter().for_each(|(name, lacks)| lacking.entry(lacks).or_default().push(name));
    let rows = lacking.into_iter().map(|(lacks, names)| vec![lacks.to_owned(), code(names)]);
    table(&mut text, &["what is lacking", "names"], rows);
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

#[test]
fn the_table_is_up_to_date() {
    if !cfg!(feature = "reference-wgpu") {
        crate::devices::skip("the table has a column for WGSL, which this build does not have");
        return;
    }
    let tests = tests();
    for family in families::ALL {
        for (column, names) in COLUMNS {
            let missing = missing(&tests, family, names);
            assert_eq!(missing, None, "{}: {column} has no test of this name in tests/families", family.name);
        }
    }
    for (family, model, test) in REAL {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(test)).expect("readable");
        let named = model.split('-').take(2).collect::<Vec<_>>().join("-");
        assert!(text.contains(&named), "{test} does not read {named}, which {family} is said to be met as");
    }
    let (path, page) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/models.md"), page(&tests));
    if std::env::var_os("DECDEC_UPDATE_DOCS").is_some() {
        fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        fs::write(&path, &page).expect("writable");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == page,
        "docs/models.md is not what the registry and the tests say: DECDEC_UPDATE_DOCS=1 writes it"
    );
}

/// A family without one of its tests, and a test of another name, leave a cell without a mark.
#[test]
fn a_missing_test_is_named() {
    let all: BTreeSet<String> = families::ALL
        .iter()
        .flat_map(|family| {
            COLUMNS.iter().flat_map(|(_, names)| names.iter()).map(|test| format!("{}::{test}", module(family)))
        })
        .collect();
    for family in families::ALL {
        for (_, names) in COLUMNS {
            for test in names {
                let name = format!("{}::{test}", module(family));
                let mut fewer = all.clone();
                assert!(fewer.remove(&name));
                fewer.insert(format!("{name}s"));
                assert_eq!(missing(&fewer, family, names), Some(name.clone()));
                assert!(tested(&fewer, family).contains(&name), "{name} is not in the table");
            }
        }
    }
}
