//! Flags as they are typed: underscores for dashes, texts that look like flags, and what was meant by a flag that a
//! command does not have.
//!
//! Clap suggests what is spelled alike. Here is what is called otherwise elsewhere, and what another command has.

use std::ffi::OsString;

use clap::Error;
use clap::error::{ContextKind, ContextValue, ErrorKind};

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

/// A command line in this program's own spelling.
pub(super) struct Line {
    /// What there is to parse.
    pub(super) words: Vec<OsString>,
    /// What the user should know of it.
    pub(super) notes: Vec<String>,
}

impl Line {
    /// Every flag that the command has, spelled with dashes. What follows a flag whose text may begin with a dash is
    /// text; that it looks like a flag is noted.
    pub(super) fn new(root: &clap::Command, given: impl Iterator<Item = OsString>) -> Self {
        let given: Vec<_> = given.collect();
        let (_, command) = find(root, &given);
        let (mut words, mut notes) = (Vec::with_capacity(given.len()), Vec::new());
        let mut text_of = None;
        let mut given = given.into_iter();
        for word in given.by_ref() {
            let own = word.to_str().and_then(|word| own_spelling(command, word));
            let flag = own.as_deref().unwrap_or_default();
            if let Some(before) = text_of.take() {
                if !flag.is_empty() {
                    let word = word.to_string_lossy();
                    notes.push(format!("{word} is the text of {before}: write {before}={word} if it is meant to be"));
                }
                words.push(word);
                continue;
            }
            if word == "--" {
                words.push(word);
                break;
            }
            text_of = takes_any_text(command, flag).then(|| flag.to_owned());
            words.push(own.map_or(word, OsString::from));
        }
        words.extend(given);
        Self { words, notes }
    }

    /// The error with the flag that was meant, as far as that is known.
    pub(super) fn better(&self, root: &clap::Command, mut error: Error) -> Error {
        if error.kind() != ErrorKind::UnknownArgument {
            return error;
        }
        let Some(ContextValue::String(wrong)) = error.get(ContextKind::InvalidArg).cloned() else { return error };
        let wrong = wrong.replace('_', "-");
        let (name, command) = find(root, &self.words);
        let meant = CALLED.iter().filter(|(others, _)| others.contains(&wrong.as_str())).flat_map(|(_, ours)| *ours);
        if let Some(meant) = meant.copied().find(|flag| has(command, flag)) {
            error.insert(ContextKind::SuggestedArg, ContextValue::String(meant.to_owned()));
            error.remove(ContextKind::Suggested);
            return error;
        }
        let elsewhere: Vec<String> = commands(root, "decdec")
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
}

/// Lets every flag have a negative number, so that what is said of it names the flag.
pub(super) fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let number = |arg: clap::Arg| {
        let plain = arg.get_long().is_some() && arg.get_action().takes_values() && !arg.is_allow_hyphen_values_set();
        if plain { arg.allow_negative_numbers(true) } else { arg }
    };
    command.mut_args(number).mut_subcommands(with_negative_numbers)
}

/// `word` with dashes in place of underscores in its flag, if that is one of the command's.
fn own_spelling(command: &clap::Command, word: &str) -> Option<String> {
    let (flag, value) = word.split_once('=').map_or((word, None), |(flag, value)| (flag, Some(value)));
    let flag = flag.replace('_', "-");
    let known = flag.starts_with("--") && has(command, &flag);
    known.then(|| value.map_or(flag.clone(), |value| format!("{flag}={value}")))
}

/// Whether the word after `flag` is its text, whatever that begins with.
fn takes_any_text(command: &clap::Command, flag: &str) -> bool {
    let long = flag.strip_prefix("--");
    command.get_arguments().any(|arg| arg.get_long() == long && long.is_some() && arg.is_allow_hyphen_values_set())
}

/// The command that `words` name, the program's own name first; with its full name.
fn find<'a>(root: &'a clap::Command, words: &[OsString]) -> (String, &'a clap::Command) {
    let (mut name, mut command) = ("decdec".to_owned(), root);
    for word in words.iter().skip(1) {
        let Some(next) = command.find_subcommand(word) else { break };
        name = format!("{name} {}", next.get_name());
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    fn line(words: &[&str]) -> Line {
        let given = std::iter::once("decdec").chain(words.iter().copied()).map(OsString::from);
        Line::new(&Cli::command(), given)
    }

    #[test]
    fn underscores_become_dashes_in_flags_alone() {
        let cases: [(&[&str], &[&str]); 9] = [
            (&["generate", "--max_new_tokens", "5"], &["generate", "--max-new-tokens", "5"]),
            (&["generate", "--top_k=5", "--top_p", "0.5"], &["generate", "--top-k=5", "--top-p", "0.5"]),
            (&["eval", "perplexity", "x", "--seq_len", "5"], &["eval", "perplexity", "x", "--seq-len", "5"]),
            // A flag that is not known stays as it was typed, for the message.
            (&["generate", "--no_such_flag"], &["generate", "--no_such_flag"]),
            (&["inspect", "--max_new_tokens"], &["inspect", "--max_new_tokens"]),
            // Texts and paths are nobody's to change.
            (&["generate", "--prompt", "--max_new_tokens"], &["generate", "--prompt", "--max_new_tokens"]),
            (&["generate", "--prompt=--a_b", "--top_k", "1"], &["generate", "--prompt=--a_b", "--top-k", "1"]),
            (&["generate", "--checkpoint_path", "a_b"], &["generate", "--checkpoint-path", "a_b"]),
            (&["tune", "p", "--", "target_slowdown"], &["tune", "p", "--", "target_slowdown"]),
        ];
        for (typed, expected) in cases {
            assert_eq!(line(typed).words[1..], *expected, "{typed:?}");
        }
        #[cfg(unix)]
        {
            use std::os::unix::ffi::OsStringExt;
            let odd = OsString::from_vec(b"--max_new_tokens\xff".to_vec());
            let given = ["decdec".into(), "generate".into(), odd.clone()];
            assert_eq!(Line::new(&Cli::command(), given.into_iter()).words[2], odd);
        }
    }

    #[test]
    fn a_text_that_is_a_flag_is_noted() {
        let noted = line(&["generate", "--prompt", "--max_new_tokens", "--stop", "--", "--system", "- a"]).notes;
        assert_eq!(
            noted,
            ["--max_new_tokens is the text of --prompt: write --prompt=--max_new_tokens if it is meant to be"]
        );
        assert!(line(&["generate", "--prompt=--json", "--stop", "---", "--json"]).notes.is_empty());
    }

    /// What a flag says does not depend on the command, apart from those that mean something else there.
    #[test]
    fn each_flag_is_defined_once() {
        const OTHERS: [&str; 15] = [
            "backend",
            "bitwidth",
            "seed",
            "seq-len",
            "max-seq-len",
            "tokens",
            "overwrite",
            "tuned",
            "model-name",
            "device",
            "k-chunks",
            "picture",
            "text",
            "prompt",
            "windows",
        ];
        let root = Cli::command();
        let mut said: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (_, command) in commands(&root, "decdec") {
            for argument in command.get_arguments() {
                let Some(flag) = argument.get_long() else { continue };
                // Which of its two names says what is meant depends on whether a mean is asked for.
                let spelled_once = argument.get_all_aliases().is_none() || flag == "bitwidth";
                assert!(!flag.contains('_') && spelled_once, "{flag} has one spelling");
                let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
                said.entry(flag.to_owned()).or_default().insert(help);
            }
        }
        let several: Vec<_> = said.iter().filter(|(_, helps)| helps.len() > 1).map(|(flag, _)| flag.as_str()).collect();
        let unexpected: Vec<_> = several.iter().filter(|flag| !OTHERS.contains(flag)).collect();
        assert!(unexpected.is_empty(), "defined several times: {unexpected:?}");
        assert!(OTHERS.iter().all(|flag| several.contains(flag)), "of {OTHERS:?} only {several:?} mean several things");
    }
}
