//! What one meets first: version, manual, colours, variables of the environment, what doctor advises.

use super::{Command, Workshop, contains, decdec, refuses};

fn stdout(mut command: Command) -> String {
    String::from_utf8(command.assert().success().get_output().stdout.clone()).expect("text")
}

fn with(words: &[&str]) -> Command {
    let mut command = decdec();
    command.args(words);
    command
}

#[test]
fn the_version_says_what_was_built() {
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(stdout(with(&["-V"])), format!("decdec {version}\n"));
    let long = stdout(with(&["--version"]));
    let lines: Vec<_> = long.lines().collect();
    assert_eq!(lines[0], format!("decdec {version}"));
    assert!(lines.len() == 4 && lines[1].starts_with("commit: ") && lines[3].starts_with("platform: "), "{long}");
    let built: Vec<_> = lines[2].strip_prefix("features: ").expect("features").split(", ").collect();
    for (name, is_built) in [
        ("hub", cfg!(feature = "hub")),
        ("serve", cfg!(feature = "serve")),
        ("reference-wgpu", cfg!(feature = "reference-wgpu")),
    ] {
        assert_eq!(built.contains(&name), is_built, "{name}: {long}");
    }
}

#[test]
fn every_command_has_a_page_of_the_manual() {
    let dir = tempfile::tempdir().expect("a directory");
    let place = dir.path().join("man1");
    with(&["man", place.to_str().expect("text")]).assert().success();
    let help = stdout(with(&["--help"]));
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands = commands.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names: Vec<_> =
        commands.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect();
    assert!(names.len() > 10 && names.contains(&"run") && !names.contains(&"man"), "{names:?}");
    let page = |name: &str| std::fs::read_to_string(place.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    for name in &names {
        let text = page(&format!("decdec-{name}.1"));
        assert!(text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"), "{name}");
    }
    assert!(page("decdec-eval-perplexity.1").contains("compare"));
    assert!(page("decdec.1").contains("decdec\\-quantize"));
    let refused = place.join("decdec.1").join("below");
    refuses(with(&["man", refused.to_str().expect("text")]), &["cannot write the manual", "below"]);
}

#[test]
fn colours_are_for_those_who_want_them() {
    let help = |variables: &[(&str, &str)]| {
        let mut command = with(&["--help"]);
        command.env_remove("NO_COLOR").envs(variables.iter().copied());
        stdout(command)
    };
    let plain = help(&[]);
    assert!(!plain.contains('\u{1b}'), "none in a pipe");
    assert!(help(&[("CLICOLOR_FORCE", "1")]).contains('\u{1b}'), "they can be had");
    assert_eq!(help(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]), plain);
}

#[test]
fn flags_may_stand_in_the_environment() {
    let shop = Workshop::new();
    let checkpoint = shop.plain_checkpoint();
    let generate = |more: &[&str]| {
        let mut command = with(&["generate", "--prompt", "a", "--max-new-tokens", "2"]);
        command.env("DECDEC_CHECKPOINT_PATH", &checkpoint).env("DECDEC_DEVICE", "cpu").args(more);
        command
    };
    generate(&[]).assert().success();
    let mut wrong = generate(&[]);
    wrong.env("DECDEC_DEVICE", "tpu");
    refuses(wrong, &["tpu"]);
    // What is typed counts more.
    let mut typed = generate(&["--device", "cpu"]);
    typed.env("DECDEC_DEVICE", "tpu").assert().success();
    refuses(generate(&["--checkpoint-path", "/nowhere"]), &["/nowhere"]);
}

#[test]
fn doctor_ends_with_what_to_do_next() {
    let said = stdout(with(&["doctor"]));
    let last = said.lines().last().expect("a line");
    assert!(last.starts_with("hint: ") && last.contains("decdec "), "{said}");
    // Where there is no card that works, models run on the processor.
    let works = said.lines().any(|line| line.starts_with("cuda:0 memory"));
    assert_eq!(last.contains("on the CPU"), !works, "{said}");
}

/// A message that is answered once.
#[cfg(unix)]
#[test]
fn a_prompt_is_answered_once() {
    let shop = Workshop::new();
    let checkpoint = super::chat::talkative(&shop, 400);
    let ask = |command: &[&str]| {
        let mut line = with(command);
        line.args(["--prompt", "a b", "--device", "cpu", "--max-new-tokens", "5", "--k-chunks", "0", "0", "0", "0"]);
        line
    };
    let path = checkpoint.to_str().expect("text");
    let output = ask(&["chat", "--checkpoint-path", path]).write_stdin("never read").assert().success();
    let output = output.stderr(contains(" tokens/s, 5 tokens")).get_output().clone();
    assert!(!output.stdout.is_empty());
    // run takes a quantized model's directory, and does the same.
    assert_eq!(stdout(ask(&["run", path])).as_bytes(), output.stdout);
    let long = "a b ".repeat(200);
    refuses(with(&["run", path, "--device", "cpu", "--prompt", &long]), &["the prompt was not answered: shorten it"]);
    refuses(
        with(&["run", shop.path("small.gguf").to_str().expect("text")]),
        &["is full precision: decdec quantize makes"],
    );
    refuses(with(&["run", "org/model"]), &["HF_HUB_OFFLINE", "org/model is not in the cache"]);
}
