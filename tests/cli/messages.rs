//! What the program says, word for word: the help of every command, and messages that people have to act on.
//!
//! Each file of `snapshots` is a transcript of a few command lines. `INSTA_UPDATE=always cargo test … --test cli
//! messages` writes down what is said now; what came of it is read before it is committed.

use super::flags::words;
use super::*;

/// Compares `text` with the file of that name.
fn matches(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// Runs command lines in the workshop (a word with blanks stands in double quotes), one after the other, and compares
/// all that they say with the file of that name.
fn transcript(shop: &Workshop, name: &str, lines: &[&str]) {
    let mut all = String::new();
    for line in lines {
        let output = decdec().current_dir(shop.dir.path()).args(words(line)).output().expect("runs");
        all += &format!("$ decdec {line}\n");
        all += &String::from_utf8(output.stdout).expect("text");
        all += &String::from_utf8(output.stderr).expect("text");
        all += &format!("[exit {}]\n\n", output.status.code().expect("no signal"));
    }
    matches(name, &all.replace(&shop.dir.path().display().to_string(), "[DIR]"));
}

#[test]
fn help_of_every_command() {
    let commands = [
        "",
        "run",
        "quantize",
        "convert",
        "residuals",
        "generate",
        "chat",
        #[cfg(feature = "serve")]
        "serve",
        "eval",
        "eval perplexity",
        "bench",
        "profile",
        "tune",
        "inspect",
        "devices",
        "doctor",
        "completions",
    ];
    for command in commands {
        let output = decdec().args(command.split_whitespace()).arg("--help").assert().success().get_output().clone();
        let name = if command.is_empty() { "decdec".into() } else { command.replace(' ', "-") };
        matches(&format!("help-{name}"), &String::from_utf8(output.stdout).expect("text"));
    }
}

#[test]
fn models_that_are_not_there() {
    let shop = Workshop::new();
    let lines = ["generate --checkpoint-path nowhere", "inspect nowhere", "profile p --checkpoint-path nowhere"];
    transcript(&shop, "models-that-are-not-there", &lines);
}

#[test]
fn numbers_out_of_range() {
    let shop = Workshop::new();
    shop.plain_checkpoint();
    std::fs::write(shop.path("text.txt"), "ab ba abab bbaa ".repeat(40)).expect("written");
    let lines = [
        "generate --checkpoint-path plain --max-new-tokens -1",
        "generate --checkpoint-path plain --max-new-tokens 18446744073709551616",
        "generate --checkpoint-path plain --num-samples 0",
        "generate --checkpoint-path plain --max-seq-len 1000",
        "generate --checkpoint-path plain --top-p nan",
        "generate --checkpoint-path plain --temperature inf",
        "generate --checkpoint-path plain --k-chunks 8 8 8 1025",
        "generate --checkpoint-path plain --device cpu --n-tbs 0",
        "generate --checkpoint-path plain --compile 3",
        "generate --checkpoint-path plain --head-bits 5",
        "generate --checkpoint-path plain --kv-bits 4",
        "generate --checkpoint-path plain --bitwidth nan",
        "bench --checkpoint-path plain --context 0",
        "bench --checkpoint-path plain --context 100 --tokens 18446744073709551615",
        "eval perplexity plain --text text.txt --seq-len 1000000000000",
        "eval perplexity plain --text text.txt --seq-len 1",
        "eval perplexity plain --text text.txt --seq-len 32 --windows 0..18446744073709551615",
        "eval perplexity plain --text text.txt --windows 7..7",
        "quantize small.gguf --out x --device cpu --backend ap --bitwidth 3 --seq-len 16 --samples 18446744073709551615",
        "quantize small.gguf --out x --device cpu --backend ap --bitwidth 3 --seq-len 129",
        "quantize small.gguf --out x --backend ap --bitwidth 1e300",
        "profile p --checkpoint-path plain --tokens 1000000000000",
        "profile p --checkpoint-path plain --max-k-chunk 1025",
        "profile p --checkpoint-path plain --bitwidth 3.5",
        "profile p --checkpoint-path random:18446744073709551616",
        "tune p --checkpoint-path plain --target-slowdown 5,1e300",
        "tune p --checkpoint-path plain --target-slowdown 5 --qkv 0 18446744073709551615",
    ];
    transcript(&shop, "numbers-out-of-range", &lines);
}

#[test]
fn flags_that_are_not_understood() {
    let shop = Workshop::new();
    let lines = [
        "generate --k_chunk 8",
        "generate --fp_dtype fp16",
        "inspect --overwrite x",
        "tune p -- target_slowdown 5",
        "generate --checkpoint-path nowhere --prompt",
        "generate --checkpoint-path nowhere --prompt --json",
        "generate --checkpoint-path nowhere --prompt=--json",
        "inspect -x",
    ];
    transcript(&shop, "flags-that-are-not-understood", &lines);
}
