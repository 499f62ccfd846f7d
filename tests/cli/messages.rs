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
        "quantize",
        "convert",
        "residuals",
        "generate",
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
