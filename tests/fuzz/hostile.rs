//! Files that are broken on purpose: each is refused in one line that says what is wrong with it, and none costs
//! more than [`CAP`]. Those of PyTorch have a table of their own in `tests/torch.rs`.

use std::fs;
use std::io::Write;

use decdec::checkpoint::Checkpoint;
use decdec::format::{AnyPrec, Floats};
use decdec::nsys;
use decdec::open::Opened;
use decdec::source::Source;
use decdec::tokenizer::Message;
use half::f16;
use serde_json::{Value as Json, json};
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use crate::allocation::{CAP, peak};
use crate::seeds::{checkpoint_tensors, configs, ggufs, source_tensors, sqlite, tensors, wheel};
use crate::targets::{TOKENIZER, TRACE, identity, scratch, small_config};

/// What is wrong, how it is opened, what the error says.
struct Case<'a> {
    what: String,
    open: Box<dyn Fn() -> anyhow::Result<()> + 'a>,
    says: &'a str,
}

fn case<'a>(what: &str, says: &'a str, open: impl Fn() -> anyhow::Result<()> + 'a) -> Case<'a> {
    Case { what: what.to_owned(), open: Box::new(open), says }
}

fn refuse(cases: &[Case<'_>]) {
    let mut wrong = Vec::new();
    for Case { what, open, says } in cases {
        let mut result = Ok(());
        let held = peak(|| result = open());
        let Err(error) = result else {
            wrong.push(format!("{what}: is accepted"));
            continue;
        };
        let error = format!("{error:#}");
        if !error.contains(says) || error.contains('\n') {
            wrong.push(format!("{what}: {error:?} does not say {says:?} in one line"));
        }
        if held > CAP {
            wrong.push(format!("{what}: {held} bytes were held, {CAP} are allowed"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn open_file(bytes: &[u8], name: &str) -> anyhow::Result<()> {
    let dir = scratch();
    let path = dir.path().join(name);
    fs::write(&path, bytes)?;
    Source::open(&path).map(drop)
}

fn gguf(bytes: &[u8]) -> anyhow::Result<()> {
    open_file(bytes, "m.gguf")
}

/// A directory with a configuration and a tokenizer.
fn directory(config: &Json) -> tempfile::TempDir {
    let dir = scratch();
    fs::write(dir.path().join("config.json"), config.to_string()).expect("writable");
    fs::write(dir.path().join("tokenizer.json"), TOKENIZER).expect("writable");
    dir
}

fn safetensors(bytes: &[u8]) -> anyhow::Result<()> {
    let dir = directory(&small_config());
    fs::write(dir.path().join("model.safetensors"), bytes)?;
    Source::open(dir.path()).map(drop)
}

/// A header of this text and `len` bytes of tensors.
fn with_header(header: &str, len: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; len]].concat()
}

/// `bytes` with `new` written over what follows the last `mark`, `skip` bytes behind it.
fn patched(bytes: &[u8], mark: &[u8], skip: usize, new: &[u8]) -> Vec<u8> {
    let at = bytes.windows(mark.len()).rposition(|w| w == mark).expect("the mark is there") + mark.len() + skip;
    [&bytes[..at], new, &bytes[at + new.len()..]].concat()
}

pub(crate) fn broken_ggufs() {
    let sound = ggufs().remove(0).1;
    gguf(&sound).expect("the original opens");
    let with = |mark: &str, skip: usize, new: &[u8]| {
        let bytes = patched(&sound, mark.as_bytes(), skip, new);
        move || gguf(&bytes)
    };
    let count = |skip: usize, n: u64| with("GGUF", skip, &n.to_le_bytes());
    // Behind a tensor's name: dimensions u32, sizes u64 each, type u32, offset u64.
    let (up, embedding) = ("blk.0.ffn_up.weight", "token_embd.weight");
    let list = "tokenizer.ggml.tokens"; // type u32, element type u32, count u64
    let mut cases = vec![
        case("2^60 tensors", "1152921504606846976 tensors, at most 16384", count(4, 1 << 60)),
        case("2^60 metadata values", "1152921504606846976 metadata values, at most 1024", count(12, 1 << 60)),
        case("more tensors than there are", "truncated", count(4, 16_384)),
        case("version 4", "GGUF version 4", with("GGUF", 0, &[4])),
        case("a text of 2^64 - 1 bytes", "18446744073709551615 bytes", with("general.architecture", 4, &[0xff; 8])),
        case("2^63 texts in a list", "truncated", with(list, 8, &(1u64 << 63).to_le_bytes())),
        case("a list of lists", "a list of type 9 is not supported", with(list, 4, &[9])),
        case("2^62 numbers", "a list longer than the file", with("tokenizer.ggml.token_type", 8, &[0xff; 8])),
        case("a type of the future", "metadata type 99", with("llama.block_count", 0, &[99])),
        case("a text that is not UTF-8", "not UTF-8", with("general.architecture", 12, &[0xff])),
        case("2^32 layers", "num_hidden_layers is 4294967295", with("llama.block_count", 4, &[0xff; 4])),
        case("5 dimensions", "5 dimensions", with(up, 0, &[5])),
        case("a shape that overflows", "it is truncated", with(up, 4, &[0, 0, 0, 0, 0, 0, 0, 0x7f].repeat(2))),
        case("an offset that overflows", "it is truncated", with(up, 24, &[0xff; 8])),
        case("an offset behind the end", "it is truncated", with(up, 24, &(1u64 << 40).to_le_bytes())),
        case("half a block", "rows of 33 numbers", with(up, 4, &[33])),
        case("a type that nobody knows", "type 77 is not supported", with(embedding, 20, &[77])),
        case("another shape", "has shape [31, 32]", with(up, 12, &[31])),
    ];
    let long =
        [&b"GGUF\x03\0\0\0"[..], &[0; 8], &1u64.to_le_bytes(), &(1u64 << 20).to_le_bytes(), &[b'a'; 1 << 20]].concat();
    cases.push(case("a key of a megabyte", "a name of 1048576 bytes", move || gguf(&long)));
    // No name, no dimensions, an unknown type, offset 0.
    let nameless = [&[0u8; 12][..], &[77, 0, 0, 0], &[0; 8]].concat().repeat(16_384);
    let many = [&b"GGUF\x03\0\0\0"[..], &16_384u64.to_le_bytes(), &[0; 8], &nameless].concat();
    cases.push(case("16384 tensors without a name", "tensor \"\" comes twice", move || gguf(&many)));
    refuse(&cases);

    // The last tensor ends before the padding.
    let cut = |len: usize| {
        case(&format!("cut to {len} bytes"), "", {
            let sound = &sound;
            move || gguf(&sound[..len])
        })
    };
    let boundaries = (0..1600).chain((1600..sound.len()).step_by(61));
    refuse(&boundaries.map(cut).collect::<Vec<_>>());
}

pub(crate) fn broken_zips() {
    let sound = wheel(&ggufs()[0].1, CompressionMethod::Deflated);
    let two = |method: CompressionMethod, zeros: usize| {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        for name in if zeros == 0 { &["a.gguf", "b.gguf"][..] } else { &["a.gguf"] } {
            zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).expect("written");
            zip.write_all(&vec![0; zeros]).expect("written");
        }
        zip.finish().expect("written").into_inner()
    };
    let bomb = two(CompressionMethod::Deflated, 48 << 20);
    // The sizes behind the directory's mark: packed at 20, unpacked at 24.
    let lies = patched(&bomb, b"PK\x01\x02", 20, &1000u32.to_le_bytes());
    let lies = patched(&lies, b"PK\x03\x04", 18, &1000u32.to_le_bytes());
    let crowd = {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        for i in 0..70_000 {
            let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
            zip.start_file(i.to_string(), stored).expect("written");
        }
        zip.finish().expect("written").into_inner()
    };
    let open = |bytes: Vec<u8>| move || open_file(&bytes, "m.whl");
    refuse(&[
        case("a zip bomb", "is it a zip bomb?", open(bomb)),
        case("a bomb that says it is none", "larger than its declared", open(lies)),
        case("two models", "2 .gguf files, one is expected", open(two(CompressionMethod::Stored, 0))),
        case("70000 entries", "70000 entries, at most 65536", open(crowd)),
        case("no end", "is the file truncated?", open(sound[..sound.len() - 20].to_vec())),
        case("damaged", "cannot unpack", open(patched(&sound, b"PK\x03\x04", 38, &[0xff; 8]))),
    ]);
    let cut = |len: usize| {
        let sound = &sound;
        case(&format!("cut to {len} bytes"), "", move || open_file(&sound[..len], "m.whl"))
    };
    refuse(&(0..sound.len()).map(cut).collect::<Vec<_>>());
}

pub(crate) fn broken_safetensors() {
    let sound = tensors(&source_tensors());
    safetensors(&sound).expect("the original opens");
    let info = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"model.embed_tokens.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let open = |bytes: Vec<u8>| move || safetensors(&bytes);
    let header = |text: &str| open(with_header(text, 256));
    let many: Vec<_> =
        (0..70_000).map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    let many = format!("{{{}}}", many.join(","));
    refuse(&[
        case("nothing", "truncated", open(vec![])),
        case("a header of 2^64 - 1 bytes", "a header of 18446744073709551615 bytes", open(vec![0xff; 64])),
        case(
            "a header of 100 MB",
            "a header of 104857600 bytes, at most 4194304",
            open([0, 0, 0x40, 6, 0, 0, 0, 0].into()),
        ),
        case("a header behind the end", "truncated", open(with_header("{}", 0)[..9].to_vec())),
        case("no JSON", "truncated or no safetensors", header("{]")),
        case("deeply nested", "truncated or no safetensors", header(&"[".repeat(100_000))),
        case("70000 tensors", "tensor model.embed_tokens.weight is missing", open(with_header(&many, 0))),
        case("a tensor behind the end", "truncated or no safetensors", header(&info("F16", "[4,32]", "[0,512]"))),
        case("an offset that overflows", "truncated", header(&info("F16", "[4,32]", "[18446744073709551615,0]"))),
        case("a shape that overflows", "truncated", header(&info("F16", "[4294967296,4294967296,4]", "[0,256]"))),
        case("another size than its shape", "truncated", header(&info("F16", "[4,31]", "[0,256]"))),
        case("bytes that no tensor has", "truncated", open(with_header(&info("F16", "[4,32]", "[0,256]"), 300))),
        case(
            "overlapping tensors",
            "truncated",
            header(
                r#"{"a":{"dtype":"U8","shape":[200],"data_offsets":[0,200]},"b":{"dtype":"U8","shape":[156],"data_offsets":[100,256]}}"#,
            ),
        ),
        case("a type of the future", "truncated", header(&info("F3", "[4,32]", "[0,256]"))),
        case("integers", "has type I16", header(&info("I16", "[4,32]", "[0,256]"))),
    ]);
    let cut = |len: usize| {
        case(&format!("cut to {len} bytes"), "", {
            let sound = &sound;
            move || safetensors(&sound[..len])
        })
    };
    let boundaries = (0..1200).chain((1200..sound.len()).step_by(64));
    refuse(&boundaries.map(cut).collect::<Vec<_>>());
}

pub(crate) fn broken_checkpoints() {
    let sound = tensors(&checkpoint_tensors());
    let config = || {
        let mut config = small_config();
        config["decdec"] =
            configs().into_iter().find(|(name, _)| *name == "decdec").expect("there").1["decdec"].clone();
        (config["decdec"]["backend"], config["decdec"]["bits"]) = ("ap".into(), 3.0.into());
        config["decdec"]["group_size"] = Json::Null;
        config
    };
    let open = |config: &Json, bytes: &[u8]| {
        let dir = directory(config);
        for name in ["model", "residuals", "thresholds"] {
            fs::write(dir.path().join(name).with_extension("safetensors"), bytes)?;
        }
        Checkpoint::open(dir.path()).map(drop)
    };
    open(&config(), &sound).expect("the original opens");
    // Bytes written over the start of a tensor.
    let with = |name: &str, new: &[u8]| {
        let (len, header) = safetensors::SafeTensors::read_metadata(&sound).expect("a header");
        let at = 8 + len + header.info(name).expect(name).data_offsets.0;
        let bytes = [&sound[..at], new, &sound[at + new.len()..]].concat();
        move || open(&config(), &bytes)
    };
    let name = |suffix: &str| format!("model.layers.0.mlp.down_proj.{suffix}");
    let half = |x: f32| f16::from_f32(x).to_le_bytes();
    let changed = |key: &'static str, value: Json| {
        let (mut config, sound) = (config(), &sound);
        if config["decdec"].get(key).is_some() {
            config["decdec"][key] = value;
        } else {
            config[key] = value;
        }
        move || open(&config, sound)
    };
    let other = |suffix: &str, shape: &[usize]| {
        let mut all = checkpoint_tensors();
        all.get_mut(&name(suffix)).expect("there").1 = shape.to_vec();
        let bytes = tensors(&all);
        move || open(&config(), &bytes)
    };
    refuse(&[
        case("a NaN scale", "down_proj.scales: number 0 is NaN, finite", with(&name("scales"), &half(f32::NAN))),
        case(
            "an infinite centroid",
            "down_proj.lut: number 0 is inf (at [0, 0]), finite",
            with(&name("lut"), &half(f32::INFINITY)),
        ),
        case("a NaN norm", "norm.weight: number 0 is NaN", with("model.norm.weight", &f32::NAN.to_le_bytes())),
        case("a NaN threshold", "threshold 0 is NaN", with(&name("thresholds"), &f32::NAN.to_le_bytes())),
        case("thresholds that increase", "thresholds never increase", {
            with(&name("thresholds"), &[1f32, 2.0].map(f32::to_le_bytes).concat())
        }),
        case("negative thresholds", "threshold 0 is -1", with(&name("thresholds"), &(-1f32).to_le_bytes())),
        case("codes outside the codebook", "[32, 4], F16 [32, 8] is expected", other("lut", &[32, 4])),
        case("fewer planes than bits", "[2, 32, 1], I32 [3, 32, 1] is expected", other("qweight", &[2, 32, 1])),
        case("another width", "[3, 96, 1], I32 [4, 96, 1] is expected", changed("bits", json!(4.0))),
        case("too many bits", "2 to 8 in steps", changed("bits", json!(1e300))),
        case("another version", "checkpoint version 4294967297", changed("version", json!(4_294_967_297u64))),
        case("2^24 layers", "num_hidden_layers is 16777216", changed("num_hidden_layers", json!(1 << 24))),
        case("a wide head", "num_attention_heads 3", changed("num_attention_heads", json!(3))),
        case("a group size without groups", "ap has none", changed("group_size", json!(64))),
    ]);
    let lut = Floats::from(vec![f16::ONE; 32 * 4]);
    let message = AnyPrec::pack(32, 32, 2, &[4; 1024], lut).expect_err("refused").to_string();
    assert_eq!(message, "anyprec: code 4 in row 0, below 4 is allowed");
}

pub(crate) fn broken_texts() {
    let open = |name: &'static str, bytes: Vec<u8>| {
        move || {
            let dir = directory(&small_config());
            fs::write(dir.path().join("model.safetensors"), tensors(&source_tensors()))?;
            fs::write(dir.path().join(name), &bytes)?;
            Opened::open(dir.path(), None, false)?.tokenizer().map(drop)
        }
    };
    let chat = |template: &'static str| {
        move || {
            let dir = directory(&small_config());
            fs::write(dir.path().join("model.safetensors"), tensors(&source_tensors()))?;
            fs::write(dir.path().join("chat_template.jinja"), template)?;
            let tokenizer = Opened::open(dir.path(), None, false)?.tokenizer()?;
            tokenizer.chat_ids(&[Message::new("user", "a")], true).map(drop)
        }
    };
    let huge = |len: u64| {
        move || {
            let dir = directory(&small_config());
            fs::write(dir.path().join("model.safetensors"), tensors(&source_tensors()))?;
            fs::File::options().append(true).open(dir.path().join("tokenizer.json"))?.set_len(len)?;
            Source::open(dir.path()).map(drop)
        }
    };
    refuse(&[
        case("a configuration of 2 MB", "2097152 bytes, at most 1048576", open("config.json", vec![b' '; 2 << 20])),
        case("a configuration of lists", "is not a JSON object", open("config.json", b"[]".to_vec())),
        case("a deep configuration", "is not valid JSON", open("config.json", vec![b'['; 1 << 20])),
        case("half a configuration", "is not valid JSON", open("config.json", b"{\"model_type\": \"lla".to_vec())),
        case("an index of 2 MB", "at most 1048576", || {
            let dir = directory(&small_config());
            fs::write(dir.path().join("model.safetensors.index.json"), vec![b' '; 2 << 20])?;
            Source::open(dir.path()).map(drop)
        }),
        case("a tokenizer of a terabyte", "1099511627776 bytes, at most 67108864", huge(1 << 40)),
        case("a deep tokenizer", "tokenizer.json is damaged", open("tokenizer.json", vec![b'['; 1 << 20])),
        case("a template of 3 MB", "at most 2097152", open("chat_template.jinja", vec![b' '; 3 << 20])),
        case("a template that is no Jinja", "fails in line 1", chat("{% for %}")),
        case(
            "a template that writes on",
            "writes more than",
            chat("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}"),
        ),
        case("a template that repeats", "a value takes more than", chat("{{ (0,) * 99999999 }}")),
        case("a template that is not UTF-8", "is not UTF-8", open("chat_template.jinja", vec![0xff])),
        case("ends of text that are none", "token ids are expected", {
            open("generation_config.json", br#"{"eos_token_id": "</s>"}"#.to_vec())
        }),
    ]);
}

pub(crate) fn broken_profiles() {
    let sound = sqlite("shortName INTEGER, demangledName INTEGER", "1, 1");
    let dir = scratch();
    let trace = dir.path().join("p.trace");
    fs::write(&trace, TRACE).expect("writable");
    let read = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes)?;
        nsys::read(&trace, &path, &identity()).map(drop)
    };
    read("sound", &sound).expect("the original is read");
    let changed = |sql: &'static str| {
        let (sound, path) = (&sound, dir.path().join("changed"));
        let trace = &trace;
        move || {
            fs::write(&path, sound)?;
            rusqlite::Connection::open(&path)?.execute_batch(sql)?;
            nsys::read(trace, &path, &identity()).map(drop)
        }
    };
    refuse(&[
        case("no SQLite", "begins with", || read("text", b"SQLite format 2\0")),
        case("half a file", "damaged", || read("half", &sound[..sound.len() / 2])),
        case("pages that lead back to each other", "damaged: interrupted", || read("loop", &looping(&sound))),
        case("a view that never ends", "no table", {
            changed(
                "DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL; CREATE VIEW CUPTI_ACTIVITY_KIND_KERNEL AS
                 WITH RECURSIVE n(start) AS (SELECT 1 UNION ALL SELECT start + 1 FROM n) SELECT start FROM n",
            )
        }),
        case("a kernel that ends before it starts", "without a time", {
            changed("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET \"end\" = 0")
        }),
        case("a negative grid", "column 4 is -1", changed("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET gridX = -1")),
        case("names of a gigabyte", "ran", {
            changed("UPDATE StringIds SET value = value || '<' || hex(zeroblob(100000)) || '>'")
        }),
        case(
            "fewer kernels",
            "4 times, but 1",
            changed("DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE start BETWEEN 1 AND 6"),
        ),
    ]);
}

/// `sound` with twenty pages more in front of its table of kernels, each of which names the next one sixty times:
/// 60^17 rows.
fn looping(sound: &[u8]) -> Vec<u8> {
    const PAGE: usize = 512;
    const LEVELS: u32 = 17;
    let mut file = sound.to_vec();
    let pages = (file.len() / PAGE) as u32;
    // The table's root is the last leaf (type 13) that was written for it: the only one with five rows.
    let root = (1..pages as usize).find(|p| file[p * PAGE] == 13 && file[p * PAGE + 4] == 5).expect("five kernels");
    let leaf = file[root * PAGE..][..PAGE].to_vec();
    // Pages are numbered from 1.
    file[root * PAGE..][..PAGE].copy_from_slice(&interior(pages + 1));
    for level in 0..LEVELS {
        file.extend(interior(pages + 1 + level + 1));
    }
    file.extend(leaf);
    file[28..32].copy_from_slice(&(pages + LEVELS + 1).to_be_bytes());
    file
}

/// A page of SQLite's B-tree (file format, section 1.6) whose 60 cells all point to page `child`.
fn interior(child: u32) -> Vec<u8> {
    let mut page = vec![0; 512];
    page[0] = 5;
    page[3..5].copy_from_slice(&60u16.to_be_bytes());
    page[8..12].copy_from_slice(&child.to_be_bytes());
    for cell in 0..60 {
        let at = 512 - 5 * (cell + 1);
        page[at..at + 4].copy_from_slice(&child.to_be_bytes());
        page[at + 4] = cell as u8;
        page[12 + 2 * cell..][..2].copy_from_slice(&(at as u16).to_be_bytes());
    }
    page[5..7].copy_from_slice(&(512u16 - 300).to_be_bytes());
    page
}
