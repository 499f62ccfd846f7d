//! The program itself, and what befalls it: killed in a stream, its model's files lost, no room for what it notes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::answers;
use crate::client::{connect, exchange, post};

/// A running `decdec serve`, which ends with the test.
pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) url: String,
}

impl Program {
    pub(crate) fn start(model: &Path, more: &[&str]) -> Self {
        let arguments = [&["--slots", "4", "--max-seq-len", "1024"], more].concat();
        Self::with(model, &arguments, "decdec=warn", Stdio::inherit())
    }

    /// Notes of `level` go to `notes`.
    fn with(model: &Path, arguments: &[&str], level: &str, notes: Stdio) -> Self {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin("decdec"));
        command.args(["serve", "--device", "cpu"]).arg("--checkpoint-path").arg(model).args(arguments);
        if !arguments.contains(&"--port") {
            command.args(["--port", "0"]);
        }
        let mut child = command.stdout(Stdio::piped()).stderr(notes).env("RUST_LOG", level).spawn().expect("it starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        let url = line.split(' ').find_map(|word| word.strip_suffix(',').filter(|word| word.starts_with("http://")));
        Self { url: url.unwrap_or_else(|| panic!("no address in {line:?}")).to_owned(), child }
    }

    /// One of the smallest model there is.
    fn small(model: &Path, more: &[&str]) -> Self {
        let arguments = [&["--slots", "2", "--max-seq-len", "256"], more].concat();
        Self::with(model, &arguments, "decdec=warn", Stdio::inherit())
    }

    fn address(&self) -> SocketAddr {
        self.url.trim_start_matches("http://").parse().expect("an address")
    }

    fn ask(&self, body: &Value) -> Value {
        let response = exchange(self.address(), &post("/v1/completions", &body.to_string()));
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()["choices"][0]["text"].clone()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn body(more: &Value) -> Value {
    let mut body = json!({ "prompt": "a b", "temperature": 0, "max_tokens": 8, "ignore_eos": true });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

/// Whoever reads from a program that is killed sees the end of the connection and no `[DONE]`; another one takes its place.
#[test]
fn a_program_that_is_killed_in_a_stream() {
    let model = answers::reference("tiny-llama-ap3");
    let mut program = Program::small(&model, &[]);
    let whole = program.ask(&body(&json!({})));
    let address = program.address();
    // So much is told of every token that the system does not hold all of it for a client that does not read.
    let long = body(&json!({ "max_tokens": 250, "n": 64, "stream": true, "logprobs": 20 }));
    let mut stream = connect(address);
    stream.write_all(post("/v1/completions", &long.to_string()).as_bytes()).expect("sent");
    let mut told = vec![0; 2000];
    stream.read_exact(&mut told).expect("the stream has begun");
    program.child.kill().expect("it was there");
    program.child.wait().expect("it has ended");
    // A client that is cut off gets an end or a reset.
    let _ = stream.read_to_end(&mut told);
    let told = String::from_utf8_lossy(&told).into_owned();
    assert!(told.starts_with("HTTP/1.1 200") && told.contains("data: ") && !told.contains("[DONE]"), "it was whole");
    let again = Program::small(&model, &["--port", &address.port().to_string()]);
    assert_eq!((again.address(), again.ask(&body(&json!({})))), (address, whole));
}

/// A model that is loaded needs its files no more.
#[test]
fn files_that_shrink_while_they_are_served() {
    let dir = tempfile::tempdir().expect("a directory");
    for entry in answers::reference("tiny-llama-ap3").read_dir().expect("readable") {
        let path = entry.expect("readable").path();
        std::fs::copy(&path, dir.path().join(path.file_name().expect("a name"))).expect("copied");
    }
    let program = Program::small(dir.path(), &[]);
    let long = body(&json!({ "max_tokens": 60 }));
    let before = program.ask(&long);
    for entry in dir.path().read_dir().expect("readable") {
        File::options().write(true).open(entry.expect("readable").path()).and_then(|f| f.set_len(0)).expect("cut");
    }
    assert_eq!(program.ask(&long), before);
    let other = program.ask(&body(&json!({ "prompt": "c d e", "echo": true, "logprobs": 5 })));
    assert!(other.as_str().expect("text").starts_with("c d e"), "{other}");
}

/// Notes that nobody can write are lost, and nothing else is.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_for_its_notes() {
    let full = File::options().write(true).open("/dev/full").expect("Linux has one");
    let model = answers::reference("tiny-llama-ap3");
    let arguments = ["--slots", "2", "--max-seq-len", "256", "--drain-notice", "0", "--drain-limit", "0"];
    let mut program = Program::with(&model, &arguments, "trace", full.into());
    let whole = program.ask(&body(&json!({})));
    // Each way to end has its note: a text that nobody waits for, a request that is none, a server that waits no longer.
    let long = body(&json!({ "max_tokens": 250, "n": 64, "stream": true })).to_string();
    let mut stream = connect(program.address());
    stream.write_all(post("/v1/completions", &long).as_bytes()).expect("sent");
    stream.read_exact(&mut [0; 100]).expect("it has begun");
    drop(stream);
    assert_eq!(exchange(program.address(), "nonsense\r\n\r\n").status, 400);
    assert_eq!(program.ask(&body(&json!({}))), whole);
    let mut stream = connect(program.address());
    stream.write_all(post("/v1/completions", &long).as_bytes()).expect("sent");
    stream.read_exact(&mut [0; 1]).expect("it has begun");
    let id = program.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().expect("it runs").success());
    let _ = stream.read_to_end(&mut Vec::new());
    assert!(program.child.wait().expect("it ends").success());
}
