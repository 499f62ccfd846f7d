//! Models by name: what is asked of a hub, what is kept of its answers, and what is said where it fails.
#![cfg(unix)]

#[path = "../devices/mod.rs"]
mod devices;
#[path = "../fixtures/mod.rs"]
mod fixtures;
mod program;
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use decdec::hub::{Hub, ModelName, Settings};
use decdec::open::Opened;
use decdec::progress::{Progress, Silent};
use decdec::source::Source;
use decdec::tokenizer::TextFiles;
use safetensors::tensor::Dtype;
use server::{COMMIT, Fault, Server};

const WEIGHTS: &str = "model.safetensors";

/// The files of a small Llama, and some that nobody needs.
fn model() -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().expect("a directory");
    let gguf = dir.path().join("small.gguf");
    let (described, _) = fixtures::byte_level(fixtures::small_config("llama"), "gpt-2", &["a b"]);
    fs::write(&gguf, fixtures::small_tensors(described, 300).bytes()).expect("written");
    let mut texts: TextFiles = Source::open(&gguf).expect("a model").texts().clone();
    texts.chat_template = Some("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}".into());
    let directory = fixtures::directory::Directory::llama(Dtype::F16, &texts);
    directory.save(WEIGHTS, &directory.tensors);
    let mut files = BTreeMap::new();
    for entry in directory.path().read_dir().expect("readable") {
        let entry = entry.expect("readable");
        let name = entry.file_name().into_string().expect("text");
        files.insert(name, fs::read(entry.path()).expect("readable"));
    }
    for name in ["README.md", "pytorch_model.bin", "onnx/model.safetensors", "../escape.safetensors"] {
        files.insert(name.into(), b"nobody reads this".to_vec());
    }
    files
}

/// A hub, and a cache.
struct Place {
    server: Server,
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { server: Server::new(model()), dir: tempfile::tempdir().expect("a directory") }
    }

    fn settings(&self) -> Settings {
        Settings {
            endpoint: self.server.endpoint.clone(),
            token: None,
            cache: self.dir.path().to_owned(),
            offline: false,
            certificates: None,
            pause: Duration::from_millis(5),
            patience: Duration::from_secs(10),
        }
    }

    fn fetch(&self) -> Result<PathBuf, String> {
        self.fetch_as(self.settings())
    }

    fn fetch_as(&self, settings: Settings) -> Result<PathBuf, String> {
        fetch(settings, "small/model", &Silent)
    }

    /// The file of the weights' bytes, or with `.incomplete` behind its name.
    fn blob(&self, end: &str) -> PathBuf {
        let name = format!("{}{end}", self.server.sha256(WEIGHTS));
        self.dir.path().join("models--small--model/blobs").join(name)
    }

    /// Requests for the weights' bytes since the last call: the parts that they asked for.
    fn parts(&self) -> Vec<Option<String>> {
        let asked = self.server.asked();
        asked.into_iter().filter(|asked| asked.line.starts_with("GET /content/")).map(|asked| asked.range).collect()
    }
}

fn fetch(settings: Settings, name: &str, progress: &dyn Progress) -> Result<PathBuf, String> {
    let name = ModelName::parse(name).expect("a name");
    let fetched = Hub::new(settings).and_then(|hub| hub.fetch(&name, progress));
    fetched.map_err(|error| format!("{error:#}"))
}

fn says(result: Result<PathBuf, String>, parts: &[&str]) {
    let error = result.expect_err("refused");
    assert!(!error.contains('\n'), "one line: {error}");
    for part in parts {
        assert!(error.contains(part), "'{part}' is not in: {error}");
    }
}

/// Counts bytes.
#[derive(Default)]
struct Counter {
    length: AtomicU64,
    steps: AtomicU64,
}

impl Progress for Counter {
    fn set_length(&self, steps: u64) {
        self.length.store(steps, Ordering::Relaxed);
    }

    fn inc(&self, steps: u64) {
        self.steps.fetch_add(steps, Ordering::Relaxed);
    }
}

#[test]
fn a_model_is_downloaded_once_into_the_shared_layout() {
    let place = Place::new();
    let counter = Counter::default();
    let dir = fetch(place.settings(), "small/model", &counter).expect("fetched");
    let bytes = counter.steps.load(Ordering::Relaxed);
    assert_eq!(bytes, counter.length.load(Ordering::Relaxed), "progress counts to its end");
    assert_eq!(dir, place.dir.path().join("models--small--model/snapshots").join(COMMIT));
    let mut names: Vec<_> = dir
        .read_dir()
        .expect("readable")
        .map(|e| e.expect("readable").file_name().into_string().expect("text"))
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            WEIGHTS,
            "tokenizer.json",
            "tokenizer_config.json"
        ],
        "only what is read"
    );
    let original = model();
    let mut sum = 0;
    for name in &names {
        let link = fs::read_link(dir.join(name)).expect("a link");
        assert_eq!(link.parent(), Some(Path::new("../../blobs")), "{name}");
        let there = fs::read(dir.join(name)).expect("readable");
        assert_eq!(there, original[name], "{name}");
        sum += there.len() as u64;
    }
    assert_eq!(sum, bytes);
    assert!(place.blob("").is_file() && !place.blob(".incomplete").exists());
    let kept = fs::read_to_string(place.dir.path().join("models--small--model/refs/main")).expect("there");
    assert_eq!(kept, COMMIT);
    // It is a model.
    assert!(Opened::open(&dir, None, false).expect("a model").quantization().is_none());
    // The second time, only what the revision is is asked.
    place.server.asked();
    assert_eq!(place.fetch().expect("there"), dir);
    let again: Vec<_> = place.server.asked().into_iter().map(|asked| asked.line).collect();
    assert_eq!(again, ["GET /api/models/small/model/revision/main"]);
    // A commit is a revision, too.
    let by_commit = fetch(place.settings(), &format!("small/model@{COMMIT}"), &Silent);
    assert_eq!(by_commit.expect("there"), dir);
}

#[test]
fn cuts_are_gone_on_from() {
    let place = Place::new();
    place.server.fail(&place.server.sha256(WEIGHTS), &[Fault::Cut(1000), Fault::Cut(0), Fault::Cut(500)]);
    let dir = place.fetch().expect("fetched");
    assert_eq!(fs::read(dir.join(WEIGHTS)).expect("there"), model()[WEIGHTS]);
    let from = |n: usize| Some(format!("bytes={n}-"));
    assert_eq!(place.parts(), [None, from(1000), from(1000), from(1500)]);
}

#[test]
fn what_an_earlier_program_left_is_gone_on_from() {
    let place = Place::new();
    let whole = &model()[WEIGHTS];
    place.server.fail(&place.server.sha256(WEIGHTS), &[Fault::Cut(700); 1]);
    place.server.fail(&place.server.sha256(WEIGHTS), &[Fault::Status(404, "X-Of", "a test")]);
    says(place.fetch(), &["404"]);
    assert_eq!(fs::read(place.blob(".incomplete")).expect("kept"), whole[..700]);
    assert!(!place.dir.path().join("models--small--model/refs").exists(), "no revision points to half a model");
    place.parts();
    place.fetch().expect("fetched");
    assert_eq!(place.parts(), [Some("bytes=700-".to_owned())]);
    assert_eq!(fs::read(place.blob("")).expect("there"), *whole);
}

#[test]
fn a_host_without_parts_sends_all_again() {
    let place = Place::new();
    place.server.fail(&place.server.sha256(WEIGHTS), &[Fault::Cut(1000), Fault::NoParts]);
    let dir = place.fetch().expect("fetched");
    assert_eq!(fs::read(dir.join(WEIGHTS)).expect("there"), model()[WEIGHTS]);
    assert_eq!(place.parts(), [None, Some("bytes=1000-".to_owned())]);
}

#[test]
fn wrong_contents_are_not_kept() {
    let place = Place::new();
    place.server.fail(&place.server.sha256(WEIGHTS), &[Fault::Flip]);
    says(
        place.fetch(),
        &["model.safetensors of small/model came with sha256", &place.server.sha256(WEIGHTS), "try again"],
    );
    assert!(!place.blob("").exists());
    place.fetch().expect("the second time it is right");
    // What was left there is wrong, what comes is right: it is seen at the end, and downloaded anew.
    fs::remove_dir_all(place.dir.path().join("models--small--model")).expect("removed");
    let mut left = model()[WEIGHTS][..900].to_vec();
    left[5] ^= 1;
    fs::create_dir_all(place.blob("").parent().expect("a directory")).expect("made");
    fs::write(place.blob(".incomplete"), &left).expect("written");
    place.parts();
    place.fetch().expect("fetched");
    assert_eq!(place.parts(), [Some("bytes=900-".to_owned()), None]);
    // More than there is.
    fs::remove_dir_all(place.dir.path().join("models--small--model")).expect("removed");
    fs::create_dir_all(place.blob("").parent().expect("a directory")).expect("made");
    fs::write(place.blob(".incomplete"), [&model()[WEIGHTS][..], b"more"].concat()).expect("written");
    place.fetch().expect("fetched");
    assert_eq!(place.parts(), [None]);
}

#[test]
fn a_connection_that_is_always_cut_is_given_up() {
    let place = Place::new();
    place.server.fail(&place.server.sha256(WEIGHTS), &[Fault::Cut(0); 5]);
    says(place.fetch(), &["model.safetensors was cut at 0 bytes", "try again, it goes on from there"]);
    assert_eq!(place.parts().len(), 5);
    place.fetch().expect("it goes on");
}

#[test]
fn a_token_goes_to_the_hub_and_nowhere_else() {
    let place = Place::new();
    place.server.lock("of-a-user");
    says(place.fetch(), &["does not show small/model without a token (401)", "set HF_TOKEN"]);
    let with = |token: &str| Settings { token: Some(token.to_owned()), ..place.settings() };
    says(place.fetch_as(with("another")), &["does not show small/model to your token (401)"]);
    place.server.asked();
    place.fetch_as(with("of-a-user")).expect("fetched");
    let (elsewhere, own): (Vec<_>, Vec<_>) =
        place.server.asked().into_iter().partition(|asked| asked.line.contains("/content/"));
    assert!(elsewhere.len() == 1 && elsewhere[0].token.is_none(), "{elsewhere:?}");
    assert!(own.len() > 5 && own.iter().all(|asked| asked.token.as_deref() == Some("Bearer of-a-user")), "{own:?}");
}

#[test]
fn what_the_hub_refuses_is_told_with_the_way_out() {
    let place = Place::new();
    says(fetch(place.settings(), "no/model", &Silent), &["does not show no/model without a token (401)"]);
    says(fetch(place.settings(), "small/model@v9", &Silent), &["small/model has no revision v9 (404)"]);
    place.server.fail("/main", &[Fault::Status(404, "X-Error-Code", "RepoNotFound")]);
    says(place.fetch(), &["there is no small/model on http://127.0.0.1", "(404), nor a file or directory"]);
    place.server.fail("/config.json", &[Fault::Status(403, "X-Error-Code", "GatedRepo")]);
    says(place.fetch(), &["small/model is gated (403): ask for access on http://", "HF_TOKEN"]);
    place.server.fail("/main", &[Fault::Status(418, "X-Of", "a test")]);
    says(place.fetch(), &["answers 418"]);
    place.server.fail("/main", &[Fault::Status(302, "Location", "/api/models/small/model/revision/main"); 10]);
    says(place.fetch(), &["redirects in circles"]);
    place.server.fail("/main", &[Fault::Status(200, "X-Of", "a test")]);
    says(place.fetch(), &["does not answer with JSON, is HF_ENDPOINT right?"]);
    // A model that has moved: the hub sends to its new place.
    place.server.fail("/main", &[Fault::Status(307, "Location", "/api/models/small/model/revision/main")]);
    place.fetch().expect("fetched");
}

#[test]
fn a_hub_that_is_busy_is_waited_for() {
    let place = Place::new();
    place.server.fail("/main", &[Fault::Status(429, "Retry-After", "1"), Fault::Status(503, "X-Of", "a test")]);
    let started = Instant::now();
    place.fetch().expect("fetched");
    assert!(started.elapsed() >= Duration::from_secs(1), "as long as it asks for");
    assert_eq!(place.server.asked().iter().filter(|asked| asked.line.ends_with("/main")).count(), 3);
    let place = Place::new();
    place.server.fail("/main", &[Fault::Status(429, "Retry-After", "3600")]);
    says(place.fetch(), &["too many requests (429) and asks to wait 3600 s", "HF_TOKEN"]);
    place.server.fail("/main", &[Fault::Status(500, "X-Of", "a test"); 5]);
    says(place.fetch(), &["cannot reach http://127.0.0.1", "answers 500", "small/model is not in the cache"]);
}

#[test]
fn without_a_network_the_cache_has_to_do() {
    let place = Place::new();
    let offline = || Settings { offline: true, ..place.settings() };
    says(place.fetch_as(offline()), &["HF_HUB_OFFLINE", "small/model is not in the cache"]);
    let dir = place.fetch().expect("fetched");
    place.server.asked();
    assert_eq!(place.fetch_as(offline()).expect("kept"), dir);
    assert!(place.server.asked().is_empty(), "nothing is asked");
    // Nobody listens there: what is kept is taken.
    let away = || Settings { endpoint: "http://127.0.0.1:9".into(), ..place.settings() };
    assert_eq!(place.fetch_as(away()).expect("kept"), dir);
    says(
        fetch(away(), "other/model", &Silent),
        &["cannot reach http://127.0.0.1:9", "other/model is not in the cache"],
    );
    // What is not whole does not count as kept.
    fs::remove_file(place.blob("")).expect("there");
    says(place.fetch_as(offline()), &["small/model is not whole in the cache: it has no safetensors files"]);
    fs::remove_file(dir.join("tokenizer.json")).expect("there");
    says(place.fetch_as(offline()), &["tokenizer.json is missing"]);
    // And is mended: a link that leads nowhere is no file.
    place.fetch().expect("fetched");
    assert_eq!(place.fetch_as(offline()).expect("kept"), dir);
}

#[test]
fn models_that_cannot_run_are_refused_before_their_weights_come() {
    let place = Place::new();
    place.server.put("config.json", br#"{"model_type": "rwkv"}"#);
    says(place.fetch(), &["small/model was not downloaded: ", "rwkv"]);
    assert!(place.parts().is_empty());
    let place = Place::new();
    place.server.remove("tokenizer.json");
    says(place.fetch(), &["small/model lacks tokenizer.json"]);
    place.server.remove("config.json");
    says(place.fetch(), &["small/model lacks config.json"]);
    let place = Place::new();
    place.server.remove(WEIGHTS);
    says(place.fetch(), &["small/model: it has no safetensors files, but pytorch_model.bin"]);
}

#[test]
fn shards_are_found_by_their_index() {
    let place = Place::new();
    let whole = model()[WEIGHTS].clone();
    place.server.remove(WEIGHTS);
    place.server.put("a-1-of-1.safetensors", &whole);
    place.server.put("consolidated.safetensors", b"the same once more");
    place
        .server
        .put("model.safetensors.index.json", br#"{"weight_map": {"model.norm.weight": "a-1-of-1.safetensors"}}"#);
    let dir = place.fetch().expect("fetched");
    assert!(dir.join("a-1-of-1.safetensors").is_file() && !dir.join("consolidated.safetensors").exists());
    Opened::open(&dir, None, false).expect("a model");
}

/// Two programs want the same model: one downloads, the other waits for it.
#[test]
fn two_at_once_download_once() {
    let place = Place::new();
    let dirs: Vec<_> = std::thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| place.fetch().expect("fetched")));
        both.map(|one| one.join().expect("no panic")).into()
    });
    assert_eq!(dirs[0], dirs[1]);
    assert_eq!(place.parts(), [None]);
}

/// Python's library finds what we have downloaded, and we find what it has.
#[test]
fn the_cache_is_shared_with_python() {
    let python = std::env::var("DECDEC_PYTHON").unwrap_or_else(|_| "python3".into());
    let run = |script: &str, place: &Place| {
        let mut command = std::process::Command::new(&python);
        command.args(["-c", script]).env("HF_HUB_CACHE", place.dir.path()).env("HF_ENDPOINT", &place.server.endpoint);
        command.env("HF_HUB_DISABLE_TELEMETRY", "1").env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
        let output = command.output().expect("python runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).trim().to_owned(), said)
    };
    let place = Place::new();
    if !run("import huggingface_hub", &place).0 {
        return devices::skip("huggingface_hub not in DECDEC_PYTHON");
    }
    let find = "from huggingface_hub import snapshot_download, scan_cache_dir\n\
                print(snapshot_download('small/model', local_files_only=True))\n\
                cache = scan_cache_dir()\n\
                print(len(cache.warnings), [r.repo_id for r in cache.repos], sum(r.nb_files for r in cache.repos))";
    let (found, _, said) = run(find, &place);
    assert!(!found && said.contains("LocalEntryNotFoundError"), "nothing is there yet: {said}");
    let dir = place.fetch().expect("fetched");
    let (found, answer, said) = run(find, &place);
    assert!(found, "{said}");
    assert_eq!(answer.lines().collect::<Vec<_>>(), [dir.to_str().expect("text"), "0 ['small/model'] 6"]);
    // The other way round, with our server for both.
    let place = Place::new();
    let load = "from huggingface_hub import hf_hub_download\n\
                for name in ['config.json', 'tokenizer.json', 'model.safetensors']:\n    hf_hub_download('small/model', name)";
    let (loaded, _, said) = run(load, &place);
    assert!(loaded, "{said}");
    assert_eq!(place.fetch_as(Settings { offline: true, ..place.settings() }).expect("kept"), dir_of(&place));
}

fn dir_of(place: &Place) -> PathBuf {
    place.dir.path().join("models--small--model/snapshots").join(COMMIT)
}
