//! Every flag that users of the reference know, in both spellings, by the command that they would give it to; and
//! what is suggested for flags that are wrong.

use std::collections::BTreeSet;

use super::*;

/// Command, flag, and a value that it takes.
const KNOWN: [(&str, &str, &[&str]); 29] = [
    ("generate", "--prompt", &["ab"]),
    ("generate", "--num_samples", &["5"]),
    ("generate", "--max_new_tokens", &["1000"]),
    ("generate", "--top_k", &["200"]),
    ("generate", "--temperature", &["0.0"]),
    ("generate", "--compile", &["2"]),
    ("generate", "--device", &["cuda:1"]),
    ("generate", "--model_name", &["Phi-3-medium-4k-instruct"]),
    ("generate", "--bitwidth", &["3.5"]),
    ("generate", "--checkpoint_path", &["/nowhere"]),
    ("generate", "--dtype", &["bfloat16"]),
    ("generate", "--backend", &["lutgemm"]),
    ("generate", "--n_tbs", &["12", "16"]),
    ("generate", "--k_chunks", &["8", "8", "8", "8", "4", "4", "4", "4"]),
    ("generate", "--print_result", &[]),
    ("profile", "--model_name", &["Meta-Llama-3-70B-Instruct"]),
    ("profile", "--algo", &["sqllm"]),
    ("profile", "--bitwidth", &["3"]),
    ("profile", "--checkpoint_path", &["/nowhere"]),
    ("profile", "--fp_dtype", &["fp16"]),
    ("profile", "--tokens", &["10"]),
    ("profile", "--overwrite", &[]),
    ("tune", "--fp_dtype", &["fp16"]),
    ("tune", "--algo", &["awq"]),
    ("tune", "--qkv", &["4096", "6144"]),
    ("tune", "--o", &["4096", "4096"]),
    ("tune", "--gu", &["4096", "28672"]),
    ("tune", "--d", &["14336", "4096"]),
    ("tune", "--target_slowdown", &["2.5"]),
];

/// Clap ends with 2 where it does not understand; a model that is not there is our own error, 1.
const NOT_UNDERSTOOD: i32 = 2;

/// A command that fails because there is nothing to work on.
fn without_a_model(name: &str) -> Command {
    let mut command = decdec();
    command.arg(name);
    match name {
        "generate" => command.args(["--checkpoint-path", "/nowhere"]),
        _ => command.args(["prefix", "--nsys-dir", "/nowhere/nsys", "--checkpoint-path", "/nowhere/model"]),
    };
    command
}

#[test]
fn the_reference_s_flags_are_accepted_in_both_spellings() {
    for (command, flag, values) in KNOWN {
        for spelling in [flag.to_owned(), flag.replace('_', "-")] {
            // A flag that comes twice is refused: what is under test replaces the one that leads nowhere.
            let mut run = decdec();
            if flag == "--checkpoint_path" {
                run.arg(command).args(if command == "generate" { &[][..] } else { &["prefix"] });
            } else {
                run = without_a_model(command);
            }
            let output = run.arg(&spelling).args(values).assert().failure().get_output().clone();
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_ne!(output.status.code(), Some(NOT_UNDERSTOOD), "{command} {spelling} {values:?}: {stderr}");
        }
    }
    let output = without_a_model("generate").arg("--no_such_flag").assert().failure().get_output().clone();
    assert_eq!(output.status.code(), Some(NOT_UNDERSTOOD), "a flag that is not known is not understood");
}

/// What the reference's manuals say of commands and flags.
fn manuals() -> [(&'static str, String); 2] {
    let read =
        |name| (name, std::fs::read_to_string(Path::new("tests/data/reference/manuals").join(name)).expect(name));
    ["autotuner.md", "end-to-end.md"].map(read)
}

/// The words of each `python SCRIPT …` in the text's code blocks, and the command of ours that does its work.
fn invocations(text: &str) -> Vec<(&'static str, Vec<String>)> {
    let mut found = Vec::new();
    for block in text.split("```bash").skip(1).filter_map(|rest| rest.split("```").next()) {
        for call in block.split("python ").skip(1) {
            let command = match call.split_whitespace().next() {
                Some("generate.py") => "generate",
                Some("run_profile.py") => "profile",
                Some("tuner.py") => "tune",
                _ => continue,
            };
            let call =
                call.lines().take_while(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n");
            found.push((command, words(&call.replace("\\\n", " ")).split_off(1)));
        }
    }
    found
}

/// Words as a shell splits them; double quotes keep blanks.
pub(super) fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (i, part) in line.split('"').enumerate() {
        match i % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

#[test]
fn every_flag_of_the_reference_s_manuals_is_known() {
    let mut seen = BTreeSet::new();
    for (name, text) in manuals() {
        for (command, words) in invocations(&text) {
            seen.extend(
                words
                    .iter()
                    .filter(|word| word.len() > 2 && word.starts_with("--"))
                    .map(|flag| (command, flag.clone())),
            );
            // The line itself: understood, but for the model or the profile that is not here.
            let place = tempfile::tempdir().expect("a directory");
            let output =
                decdec().current_dir(place.path()).arg(command).args(&words).assert().failure().get_output().clone();
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_ne!(output.status.code(), Some(NOT_UNDERSTOOD), "{command} {words:?}: {stderr}");
            // The manual's own slip, `-- target_slowdown`, is explained.
            assert!(!words.contains(&"--".to_owned()) || stderr.contains("write --target-slowdown"), "{stderr}");
        }
        let table = if name == "end-to-end.md" { "generate" } else { "profile" };
        let rows = text.lines().filter_map(|line| line.strip_prefix("| `--")?.split('`').next());
        seen.extend(rows.map(|flag| (table, format!("--{flag}"))));
    }
    assert!(seen.len() > 20, "the manuals were read: {seen:?}");
    let known: BTreeSet<_> = KNOWN.iter().map(|&(command, flag, _)| (command, flag.to_owned())).collect();
    // The name, width and type of a profile are one set of flags for both of its commands.
    let shared = |flag: &str| KNOWN.iter().any(|&(command, known, _)| command == "profile" && known == flag);
    let unknown: Vec<_> =
        seen.iter().filter(|seen| !(known.contains(seen) || seen.0 == "tune" && shared(&seen.1))).collect();
    assert!(unknown.is_empty(), "not in the table above: {unknown:?}");
}

#[test]
fn a_wrong_flag_suggests_the_right_one() {
    let cases: [(&[&str], &str); 17] = [
        (&["generate", "--k_chunk", "8"], "--k-chunks"),
        (&["generate", "--k-chunk", "8"], "--k-chunks"),
        (&["generate", "--n-tb", "8"], "--n-tbs"),
        (&["generate", "--max-tokens", "8"], "--max-new-tokens"),
        (&["generate", "--model", "x"], "--checkpoint-path"),
        (&["generate", "--checkpoint", "x"], "--checkpoint-path"),
        (&["generate", "--bits", "3"], "--bitwidth"),
        (&["generate", "--fp_dtype", "fp16"], "--dtype"),
        (&["generate", "--algo", "sqllm"], "--backend"),
        (&["generate", "--topk", "3"], "top"),
        (&["generate", "--overwrite"], "--overwrite is a flag of decdec quantize"),
        (&["profile", "p", "--token", "3"], "--tokens"),
        (&["profile", "p", "--dtype", "fp16"], "--fp-dtype"),
        (&["tune", "p", "--slowdown", "3"], "--target-slowdown"),
        (&["tune", "p", "--target-slowdwn", "3"], "--target-slowdown"),
        (&["convert", "x", "--output", "y"], "--out"),
        (&["quantise"], "quantize"),
    ];
    for (line, meant) in cases {
        let output = decdec().args(line).assert().code(NOT_UNDERSTOOD).get_output().clone();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let tip = stderr.lines().find(|line| line.contains("tip:")).unwrap_or_default();
        assert!(tip.contains(meant), "{line:?}: {meant} is not in {stderr}");
    }
}

#[test]
fn help_reads_from_top_to_bottom() {
    let help = |words: &[&str]| {
        let output = decdec().args(words).arg("--help").assert().success().get_output().stdout.clone();
        String::from_utf8(output).expect("text")
    };
    let top = help(&[]);
    let commands =
        ["quantize", "convert", "residuals", "generate", "eval", "profile", "tune", "inspect", "devices", "doctor"];
    let listed: Vec<usize> = commands.iter().filter_map(|name| top.find(&format!("\n  {name} "))).collect();
    assert!(listed.len() == commands.len() && listed.is_sorted(), "in the order of use: {top}");
    assert!(top.contains("run_profile.py                  decdec profile"), "{top}");
    // The road that the help describes is one that the program takes.
    for line in top.lines().filter_map(|line| line.strip_prefix("  decdec ")) {
        let output = decdec().current_dir("/").args(words(line)).assert().failure().get_output().clone();
        assert_ne!(output.status.code(), Some(NOT_UNDERSTOOD), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    for name in commands {
        let text = if name == "eval" { help(&["eval", "perplexity"]) } else { help(&[name]) };
        let flags: Vec<_> = text.lines().filter(|line| line.trim_start().starts_with("--")).collect();
        let unnamed =
            flags.iter().find(|line| line.split_whitespace().count() < 2 && !text.contains(&format!("{line}\n     ")));
        assert!(unnamed.is_none(), "{name}: a flag without a word: {unnamed:?}");
    }
}

/// A text is what follows its flag, whatever it begins with.
#[test]
fn texts_may_begin_with_a_dash() {
    let shop = Workshop::new();
    let checkpoint = shop.plain_checkpoint();
    let prompt_tokens = |flags: &[&str]| {
        let output = shop.generate(&checkpoint, flags).arg("--json").assert().success().get_output().clone();
        let made: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
        made["prompt_tokens"].as_u64().expect("a count")
    };
    for text in ["- a", "-1", "-", "--", "---", "-h", "--ab", "--json", "--max_new_tokens", "--help", "-a\n-b"] {
        // The attached spelling cannot be taken for anything else.
        let attached = prompt_tokens(&[&format!("--prompt={text}")]);
        assert_eq!(prompt_tokens(&["--prompt", text]), attached, "{text}");
        assert_eq!(prompt_tokens(&["--stop", text, "--prompt", text]), attached, "{text}");
        let system = ["--checkpoint-path", "/nowhere", "--chat", "--prompt", "a", "--system", text];
        decdec().arg("generate").args(system).assert().code(1);
    }
    // The next flag is a flag again.
    refuses(shop.generate(&checkpoint, &["--prompt", "a", "--top-p", "--json"]), &["--top-p"]);
}
