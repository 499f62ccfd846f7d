//! Ctrl-C ends every command that takes a while, whatever it waits for.

use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use super::flags::words;
use super::*;

fn start(shop: &Workshop, line: &str, stdout: Stdio, stderr: Stdio) -> Child {
    let mut command = Process::new(assert_cmd::cargo::cargo_bin("decdec"));
    command.current_dir(shop.dir.path()).args(words(line));
    settle(&mut command);
    command.stdout(stdout).stderr(stderr).spawn().expect("starts")
}

/// What Ctrl-C does. The shell's own `kill`: not every machine has one as a program.
pub(crate) fn interrupt(child: &Child) {
    let command = format!("kill -INT {}", child.id());
    assert!(Process::new("sh").args(["-c", &command]).status().expect("sh").success(), "{command}");
}

/// Interrupts `child` once it is at work, and finds it gone soon, as a shell expects it to be.
fn ends_soon(mut child: Child, line: &str) {
    std::thread::sleep(Duration::from_millis(1000));
    assert!(child.try_wait().expect("asks").is_none(), "{line}: it ended by itself, it should take longer");
    let asked = Instant::now();
    interrupt(&child);
    let status = loop {
        if let Some(status) = child.try_wait().expect("asks") {
            break status;
        }
        if asked.elapsed() > Duration::from_secs(5) {
            let _ = child.kill();
            panic!("{line}: it does not hear");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(130), "{line}");
}

#[test]
fn every_command_that_takes_a_while_hears_it() {
    let shop = Workshop::new();
    shop.plain_checkpoint();
    std::fs::write(shop.path("text.txt"), "ab ba abab bbaa ".repeat(200_000)).expect("written");
    let lines = [
        "generate --checkpoint-path plain --num-samples 100000000",
        "generate --checkpoint-path plain --num-samples 100000000 --json",
        "eval perplexity plain --text text.txt --seq-len 128",
        "profile run --checkpoint-path plain --tokens 10000 --max-k-chunk 1024",
        "quantize small.gguf --backend ap --bitwidth 3 --seq-len 128 --samples 20000 --out out",
        "residuals --original small.gguf --quantized plain --seq-len 128 --samples 20000 --out pair",
    ];
    for line in lines {
        ends_soon(start(&shop, line, Stdio::null(), Stdio::null()), line);
    }
    assert!(!shop.path("out").exists() && !shop.path("pair").exists(), "nothing half made");
}

/// A job that was told to stop but cannot hear, because it waits for a reader that does not read.
#[test]
fn a_job_that_waits_is_ended() {
    let shop = Workshop::new();
    shop.plain_checkpoint();
    // Short samples fill a pipe in a moment.
    let line = "generate --checkpoint-path plain --num-samples 100000000 --max-new-tokens 1";
    ends_soon(start(&shop, line, Stdio::piped(), Stdio::null()), line);
    let line = "generate --checkpoint-path plain --num-samples 100000000 --max-new-tokens 1 --json";
    ends_soon(start(&shop, line, Stdio::null(), Stdio::piped()), line);
}
