//! A conversation: by lines from a pipe, and on a pseudo-terminal, where Ctrl-C stops the answer only.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use predicates::boolean::PredicateBooleanExt;

use super::{Command, Workshop, contains, decdec, refuses, settle};

/// A checkpoint that has a chat template and a context of so many tokens, and never ends an answer by itself.
pub(super) fn talkative(shop: &Workshop, context: usize) -> PathBuf {
    let checkpoint = shop.checkpoint();
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    fs::write(checkpoint.join("chat_template.jinja"), template).expect("written");
    let file = checkpoint.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&file).expect("there")).expect("JSON");
    config["max_position_embeddings"] = context.into();
    config["eos_token_id"] = serde_json::Value::Null;
    fs::write(&file, config.to_string()).expect("written");
    checkpoint
}

fn chat(checkpoint: &Path, more: &[&str]) -> Command {
    let mut line = decdec();
    line.arg("chat").arg("--checkpoint-path").arg(checkpoint).args(["--device", "cpu"]);
    line.args(["--k-chunks", "0", "0", "0", "0"]).args(more);
    line
}

/// Commands change what they say; history is kept, and only what is new is read; mistakes are told and cost nothing.
#[test]
fn a_conversation_from_a_pipe() {
    let shop = Workshop::new();
    let checkpoint = talkative(&shop, 400);
    let saved = shop.path("said.json");
    let lines = [
        "/system be brief".to_owned(),
        "a b".to_owned(),
        String::new(),
        "/k 0 0 64 64".to_owned(),
        "ab".to_owned(),
        "/k 1 2".to_owned(),
        "/k 1 2 3 5000".to_owned(),
        "/nonsense".to_owned(),
        format!("/save {}", saved.display()),
        format!("/save {}", saved.display()),
        "/reset".to_owned(),
        "ba".to_owned(),
        "/quit".to_owned(),
        "never said".to_owned(),
    ];
    let output = chat(&checkpoint, &["--max-new-tokens", "5"]).write_stdin(lines.join("\n")).output().expect("it runs");
    let said = String::from_utf8(output.stderr).expect("text");
    assert!(output.status.success(), "{said}");
    for part in [
        "n_tb 8, k_chunk [0, 0, 64, 64]",
        "/k is followed by \"1 2\", four numbers are expected",
        "k_chunk is 5000, 0 to 1024 are allowed",
        "no command /nonsense",
        "said.json",
        "File exists",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let rates: Vec<_> = said.lines().filter(|line| line.contains(" tokens/s, 5 tokens, ")).collect();
    assert_eq!(rates.len(), 3, "three answers: {said}");
    let read = |i: usize| -> usize {
        let anew = rates[i].split(" of the conversation").next().and_then(|line| line.rsplit(' ').next());
        anew.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{}", rates[i]))
    };
    let conversation: serde_json::Value = serde_json::from_slice(&fs::read(&saved).expect("there")).expect("JSON");
    let roles: Vec<_> = conversation.as_array().expect("a list").iter().map(|m| m["role"].clone()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!(conversation[1]["content"], "a b");
    // "be brief" and "a b" with their roles, then only what is new: less than half as many with "ab".
    assert!(read(1) < read(0), "{said}");
}

#[test]
fn a_chat_needs_text_and_a_context_that_fits() {
    let shop = Workshop::new();
    let checkpoint = talkative(&shop, 400);
    refuses(chat(&checkpoint, &["--max-seq-len", "401"]), &["--max-seq-len is 401, 1 to 400"]);
    let preset = ["chat", "--checkpoint-path", "random:0", "--model-name", "Meta-Llama-3-8B-Instruct"];
    let mut random = decdec();
    random.args(preset).args(["--backend", "ap", "--bitwidth", "4", "--max-new-tokens", "0"]);
    refuses(random, &["--max-new-tokens"]);
    // A conversation that has become too long is told, and can be begun anew.
    let long = format!("{}\n/reset\nab\n", "a b ".repeat(200));
    let mut command = chat(&checkpoint, &["--max-new-tokens", "3"]);
    command
        .write_stdin(long)
        .assert()
        .success()
        .stderr(contains("/reset forgets the conversation").and(contains(" tokens/s, 3 tokens")));
}

/// What a program on a pseudo-terminal has said so far.
struct Screen {
    said: String,
    pieces: Receiver<Vec<u8>>,
}

impl Screen {
    /// Waits until `says` is true of what was said.
    fn until(&mut self, what: &str, says: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !says(&self.said) {
            let left = deadline.saturating_duration_since(Instant::now());
            let piece = self.pieces.recv_timeout(left).unwrap_or_else(|_| panic!("{what} never came: {}", self.said));
            self.said.push_str(&String::from_utf8_lossy(&piece));
        }
    }
}

#[test]
fn on_a_terminal_ctrl_c_stops_the_answer_and_the_chat_goes_on() {
    let shop = Workshop::new();
    let checkpoint = talkative(&shop, 100_000);
    let program = assert_cmd::cargo::cargo_bin("decdec");
    // Without exec a shell may stay between, which ends with 130 once it has heard Ctrl-C itself.
    let line = format!(
        "exec {} chat --checkpoint-path {} --device cpu --k-chunks 0 0 0 0 --max-new-tokens 90000 --max-seq-len 100000",
        program.display(),
        checkpoint.display()
    );
    // util-linux's script runs a program on a pseudo-terminal of its own.
    let mut command = std::process::Command::new("script");
    settle(&mut command);
    command.args(["-qefc", &line, "/dev/null"]).env("TERM", "xterm");
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = spawned.expect("script of util-linux is there");
    let (mut keys, mut from) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
    let (to, pieces) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n) = from.read(&mut buffer) {
            if n == 0 || to.send(buffer[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut screen = Screen { said: String::new(), pieces };
    let mut press = |bytes: &[u8]| keys.write_all(bytes).and_then(|()| keys.flush()).expect("written");
    screen.until("a prompt", |said| said.contains("> "));
    press(b"a b\r");
    // The answer is under way: more than the line that was typed is there.
    screen.until("an answer", |said| said.split("a b").nth(1).is_some_and(|answer| answer.len() > 200));
    press(b"\x03");
    screen.until("the end of the answer", |said| said.contains(", stopped)"));
    // Negative control: the answer would have gone on much longer.
    let tokens = screen.said.split(" tokens/s, ").nth(1).and_then(|rest| rest.split(' ').next()).expect("a count");
    assert!(tokens.parse::<usize>().expect("a number") < 90_000, "{tokens}");
    // It still listens; Ctrl-C at the prompt ends nothing either.
    press(b"\x03");
    screen.until("a hint", |said| said.contains("Ctrl-D or /quit ends"));
    press(b"/k 0 0 64 64\r");
    screen.until("what is compensated", |said| said.contains("k_chunk [0, 0, 64, 64]"));
    press(b"\x04");
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        assert!(Instant::now() < deadline, "Ctrl-D ends the chat: {}", screen.said);
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
}
