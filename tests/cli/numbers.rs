//! Every number of every command at its edges and far beyond them: refused in one line, or done, and what is printed
//! are numbers.

use std::io::Read;
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::flags::words;
use super::*;

/// Command lines that work, to which one flag is added; `[OUT]` is a place of its own for each run.
const LINES: [&str; 9] = [
    "quantize small.gguf --backend lutgemm --bitwidth 3 --refine compensated --seq-len 4 --samples 2 --out [OUT]",
    "convert plain --original small.gguf --seq-len 4 --samples 2 --out [OUT]",
    "residuals --original small.gguf --quantized plain --seq-len 4 --samples 2 --out [OUT]",
    "generate --checkpoint-path plain --prompt ab --max-new-tokens 3 --temperature 1 --stop abab",
    "generate --checkpoint-path plain --json --max-new-tokens 3 --num-samples 2",
    "eval perplexity plain --text text.txt --windows 0..2 --seq-len 32",
    "bench --checkpoint-path plain --tokens 4 --context 2",
    "profile edge --checkpoint-path plain --tokens 1 --max-n-tb 1 --max-k-chunk 20 --nsys-dir [OUT]",
    "tune run --checkpoint-path plain --target-slowdown 100 --verify --verify-tokens 2 --tuned-dir [OUT]",
];

/// What stands for numbers in the help.
const NUMBERS: [&str; 9] = ["N", "K", "P", "T", "MODE", "BITS", "IN", "PERCENT", "A..B"];

const VALUES: [&str; 14] = [
    "0",
    "1",
    "7",
    "1025",
    "1000000000000",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-1",
    "nan",
    "inf",
    "1e300",
    "0..18446744073709551615",
];

/// The flags of a command that take numbers, with as many values as they need.
fn numeric_flags(line: &str) -> Vec<(String, usize)> {
    let words: Vec<_> = line.split_whitespace().take_while(|word| !word.starts_with("--")).collect();
    let command = if words[0] == "eval" { &words[..2] } else { &words[..1] };
    let help = decdec().args(command).arg("--help").assert().success().get_output().stdout.clone();
    let help = String::from_utf8(help).expect("text");
    let flags = help.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let flag = words.next().filter(|word| word.starts_with("--"))?;
        let values: Vec<_> = words.take_while(|word| word.starts_with('<')).collect();
        let name = values.first()?.trim_end_matches('.').trim_matches(['<', '>']);
        let count = if ["--k-chunks", "--for-k-chunks"].contains(&flag) { 4 } else { values.len() };
        NUMBERS.contains(&name).then(|| (flag.to_owned(), count))
    });
    flags.collect()
}

/// What came of a line within a minute; stdout is read as far as anyone would.
fn run(shop: &Workshop, line: &[String]) -> (Option<i32>, String, String) {
    let mut command = Process::new(assert_cmd::cargo::cargo_bin("decdec"));
    command.current_dir(shop.dir.path()).args(line);
    settle(&mut command);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let stderr = child.stderr.take().expect("piped");
    let aside = std::thread::spawn(move || std::io::read_to_string(stderr).expect("text"));
    let mut stdout = Vec::new();
    child.stdout.take().expect("piped").take(20_000).read_to_end(&mut stdout).expect("readable");
    let started = Instant::now();
    while child.try_wait().expect("asks").is_none() {
        if started.elapsed() > Duration::from_secs(60) {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let code = child.wait().expect("ended").code();
    (code, String::from_utf8_lossy(&stdout).into_owned(), aside.join().expect("read"))
}

/// The line with `flag` set to `values`, in place of what it has.
fn with(line: &str, flag: &str, values: &[&str]) -> Vec<String> {
    let mut words = words(line);
    if let Some(at) = words.iter().position(|word| word == flag) {
        let end = words[at + 1..].iter().position(|word| word.starts_with("--")).map_or(words.len(), |n| at + 1 + n);
        words.drain(at..end);
    }
    words.push(flag.to_owned());
    words.extend(values.iter().map(|&value| value.to_owned()));
    words
}

#[test]
fn every_number_is_refused_or_done() {
    let shop = Workshop::new();
    shop.plain_checkpoint();
    std::fs::write(shop.path("text.txt"), "ab ba abab bbaa ".repeat(40)).expect("written");
    let profile = words("profile run --checkpoint-path plain --tokens 1 --max-n-tb 1 --max-k-chunk 20");
    assert_eq!(run(&shop, &profile).0, Some(0));
    let mut cases = Vec::new();
    for line in LINES {
        let flags = numeric_flags(line);
        assert!(flags.len() >= 3, "the help of {line} names its numbers: {flags:?}");
        for (flag, count) in flags {
            cases.extend(VALUES.map(|value| (line, flag.clone(), vec![value; count])));
        }
    }
    assert!(cases.len() > 500, "{}", cases.len());
    let faults: Vec<String> = cases
        .par_iter()
        .filter_map(|(line, flag, values)| {
            let place = tempfile::tempdir_in(shop.dir.path()).expect("a directory");
            let line = line.replace("[OUT]", place.path().join("out").to_str().expect("text"));
            let line = with(&line, flag, values);
            let (code, stdout, stderr) = run(&shop, &line);
            let errors = stderr.lines().filter(|line| line.starts_with("error:")).count();
            let told = match code {
                Some(0 | 141) => errors == 0,
                Some(1 | 2) => errors == 1,
                _ => false,
            };
            let is_number = |word: &str| !["nan", "inf", "-inf", "null"].contains(&word.to_lowercase().as_str());
            let measured = stderr.lines().filter(|line| line.contains("tokens/sec"));
            let printed = stdout.lines().chain(measured).flat_map(|line| line.split([' ', ',', ':', '(', ')']));
            let numbers = printed.into_iter().all(is_number);
            let good = told && numbers && !stderr.contains("bug in decdec") && !stderr.contains("memory allocation");
            (!good).then(|| format!("{}\n  {code:?} {stdout}{stderr}", line.join(" ")))
        })
        .collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), cases.len(), faults.join("\n"));
}

/// What a count leads to is compared with what this process may have, before it is taken.
#[cfg(unix)]
#[test]
fn more_than_there_is_memory_is_refused() {
    let shop = Workshop::new();
    let program = assert_cmd::cargo::cargo_bin("decdec");
    let said = |samples: &str| {
        // 4 GB of addresses.
        let limited = r#"ulimit -v 4000000 && exec "$0" "$@""#;
        let mut command = Process::new("sh");
        command.current_dir(shop.dir.path()).args(["-c", limited]).arg(&program);
        command.args(words("quantize small.gguf --backend ap --bitwidth 3 --refine none --out out --seq-len 4"));
        command.args(["--samples", samples]);
        settle(&mut command);
        let output = command.output().expect("runs");
        (output.status.code(), String::from_utf8(output.stderr).expect("text"))
    };
    let (code, stderr) = said("4000000");
    let refused = "error: calibrating with 16000000 tokens would take ";
    assert!(code == Some(1) && stderr.contains(refused) && stderr.contains("there are 4.1 GB"), "{stderr}");
    assert!(!shop.path("out").exists() && !shop.path("out.partial").exists(), "nothing was begun");
    let (code, stderr) = said("4");
    assert_eq!(code, Some(0), "a few samples go: {stderr}");
}
