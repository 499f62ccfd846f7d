//! What was meant by a flag that a command does not have.
//!
//! Clap suggests what is spelled alike. Here is what is called otherwise elsewhere, and what another command has.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Error};

use crate::cli::Cli;

/// What other programs, or other commands of this one, call a flag, and what it may be here; the first one that the
/// command has is meant.
const CALLED: [(&[&str], &[&str]); 10] = [
    (&["--slowdown", "--target"], &["--target-slowdown"]),
    (&["--model", "--checkpoint", "--model-path", "--path"], &["--checkpoint-path", "--quantized", "--text"]),
    (&["--max-tokens", "--n-predict", "--num-tokens"], &["--max-new-tokens", "--tokens"]),
    (&["--temp"], &["--temperature"]),
    (&["--bits", "--wbits", "--precision"], &["--bitwidth"]),
    (&["--output", "--output-dir", "--save"], &["--out"]),
    (&["--calibration", "--dataset"], &["--calib"]),
    (&["--dtype", "--fp-dtype", "--torch-dtype"], &["--dtype", "--fp-dtype"]),
    (&["--algo", "--backend", "--method"], &["--backend", "--algo"]),
    (&["--gpu", "--cuda"], &["--device"]),
];

/// The error with the flag that was meant, as far as that is known.
pub(crate) fn better(mut error: Error) -> Error {
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let Some(ContextValue::String(wrong)) = error.get(ContextKind::InvalidArg).cloned() else { return error };
    let wrong = wrong.replace('_', "-");
    let root = Cli::command();
    let words: Vec<String> = std::env::args().skip(1).take_while(|word| !word.starts_with('-')).collect();
    let (name, command) = find(&root, &words);
    let meant = CALLED.iter().filter(|(others, _)| others.contains(&wrong.as_str())).flat_map(|(_, ours)| *ours);
    if let Some(meant) = meant.copied().find(|flag| has(command, flag)) {
        error.insert(ContextKind::SuggestedArg, ContextValue::String(meant.to_owned()));
        error.remove(ContextKind::Suggested);
        return error;
    }
    let elsewhere: Vec<String> = commands(&root, "decdec")
        .into_iter()
        .filter(|(other, command)| *other != name && has(command, &wrong))
        .map(|(other, _)| other)
        .collect();
    if !elsewhere.is_empty() {
        let tip = format!("{wrong} is a flag of {}", elsewhere.join(", "));
        error.remove(ContextKind::SuggestedArg);
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    error
}

/// The command that `words` name, with its full name.
fn find<'a>(root: &'a clap::Command, words: &[String]) -> (String, &'a clap::Command) {
    let (mut name, mut command) = ("decdec".to_owned(), root);
    for word in words {
        let Some(next) = command.find_subcommand(word) else { break };
        name = format!("{name} {word}");
        command = next;
    }
    (name, command)
}

/// Every command that takes flags, with its full name.
fn commands<'a>(command: &'a clap::Command, name: &str) -> Vec<(String, &'a clap::Command)> {
    let below = command.get_subcommands();
    let mut all: Vec<_> = below.flat_map(|sub| commands(sub, &format!("{name} {}", sub.get_name()))).collect();
    all.push((name.to_owned(), command));
    all
}

fn has(command: &clap::Command, flag: &str) -> bool {
    let flag = flag.trim_start_matches("--");
    command.get_arguments().any(|argument| argument.get_long() == Some(flag))
}
