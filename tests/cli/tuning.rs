//! From a card that nobody has seen to a text at the promised slowdown.

use predicates::boolean::PredicateBooleanExt;
use std::fs;

use super::{Command, Workshop, contains, decdec, refuses};

/// `decdec profile` or `decdec tune` of the workshop's checkpoint, with all files in the workshop.
fn about(shop: &Workshop, command: &str, prefix: &str, more: &[&str]) -> Command {
    let mut line = decdec();
    line.current_dir(shop.dir.path()).args([command, prefix, "--checkpoint-path", "checkpoint", "--device", "cpu"]);
    line.args(more);
    line
}

/// A few values of a sweep; of 64 channels one is compensated from `k_chunk` 16 on.
const SWEEP: [&str; 8] = ["--tokens", "2", "--min-n-tb", "1", "--max-n-tb", "2", "--max-k-chunk", "20"];

const STEM: &str = "run_checkpoint_fp16_sqllm_3";

#[test]
fn two_commands_and_generate_takes_what_they_found() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    about(&shop, "profile", "run", &SWEEP).assert().success().stdout(contains("times from host clock"));
    // Again: what is there is kept.
    about(&shop, "profile", "run", &SWEEP).assert().success().stdout(contains("kept"));
    let tune = |more: &[&str]| about(&shop, "tune", "run", more);
    tune(&["--target-slowdown", "1000,5", "--verify", "--verify-tokens", "20"])
        .assert()
        .success()
        .stdout(contains("Real slowdown of a token : ").and(contains("real slowdown %")));
    let file = shop.path("tuned").join(format!("{STEM}_1000.0.json"));
    let tuned: serde_json::Value = serde_json::from_str(&fs::read_to_string(&file).expect("written")).expect("JSON");
    assert!(tuned["real_slowdown"].as_f64().expect("a number") <= 1000.0, "{tuned}");
    assert_eq!(tuned["k_chunks"], serde_json::json!([20, 20, 20, 20]));

    let used = contains(", k_chunk [20, 20, 20, 20], as ");
    let file = file.to_str().expect("text");
    shop.generate(&checkpoint, &["--tuned", file, "--device", "cpu"]).assert().success().stderr(used.clone());
    // What was found, measured again by itself.
    let again = ["--tuned", file, "--tokens", "2"];
    about(&shop, "profile", "again", &again).assert().success().stdout(
        contains("k_chunk          : 20 to 20")
            .and(contains("k_chunk [20, 20, 20, 20]: layer ").and(contains("(when tuned "))),
    );
    refuses(about(&shop, "profile", "again", &["--tuned", file, "--max-k-chunk", "3"]), &["cannot be used with"]);

    // In the checkpoint, beside what was tuned on another device, it is found by itself.
    let other = serde_json::json!([{ "device": { "id": "cuda:0", "name": "Another Card", "driver": "" } }]);
    let mut all = vec![tuned.clone()];
    all[0]["device"] = other[0]["device"].clone();
    all[0]["k_chunks"] = serde_json::json!([1, 1, 1, 1]);
    fs::write(checkpoint.join("tuned.json"), serde_json::to_vec(&all).expect("JSON")).expect("written");
    shop.generate(&checkpoint, &["--device", "cpu"])
        .assert()
        .success()
        .stderr(contains("left aside: tuned on Another Card"));
    for _ in 0..2 {
        tune(&["--target-slowdown", "1000", "--save"]).assert().success().stderr(contains("tuned.json"));
    }
    let saved = fs::read_to_string(checkpoint.join("tuned.json")).expect("there");
    assert_eq!(serde_json::from_str::<Vec<serde_json::Value>>(&saved).expect("a list").len(), 2, "{saved}");
    shop.generate(&checkpoint, &["--device", "cpu"]).assert().success().stderr(used);
    refuses(tune(&["--target-slowdown", "5,10", "--save"]), &["--save keeps one result, but 2 targets"]);
}

/// The same with whole tokens, by weights that were measured with the checkpoint: what was found is taken by itself.
#[test]
fn whole_tokens_are_tuned_by_what_each_projection_gives_back() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let flags = ["--measure", "tokens", "--tokens", "2", "--min-n-tb", "1", "--max-n-tb", "1", "--max-k-chunk", "64"];
    let flags = [&flags[..], &["--max-slowdown", "100000", "--mixes", "0,64"]].concat();
    about(&shop, "profile", "run", &flags)
        .assert()
        .success()
        .stdout(contains("measured         : whole tokens").and(contains("ready to compensate, nothing selected")));
    let tune = |more: &[&str]| about(&shop, "tune", "run", &[&["--target-slowdown", "100000"], more].concat());
    tune(&["--exhaustive"]).assert().success().stdout(
        contains("note: objective k: the sum of k_chunk times bytes")
            .and(contains("k_chunk per module       : 64, 64, 64, 64")),
    );
    refuses(tune(&["--objective", "kl"]), &["needs weights", "decdec eval perplexity checkpoint --compare SOURCE"]);

    let weigh = |more: &[&str]| {
        let mut line = decdec();
        line.args(["eval", "perplexity"]).arg(&checkpoint).args(["--device", "cpu", "--seq-len", "16", "--text"]);
        line.arg(shop.path("text")).args(more);
        line
    };
    fs::write(shop.path("text"), "a b ab ba aab bba abab ".repeat(20)).expect("written");
    let source = shop.path("small.gguf");
    let source = source.to_str().expect("text");
    weigh(&["--write-weights"]).assert().failure().stderr(contains("--compare"));
    let weights = checkpoint.join("kl_weights.json");
    assert!(!weights.exists());
    let with = ["--compare", source, "--write-weights", "--k-chunks", "64", "64", "64", "64"];
    // Whatever its perplexity is: what is written is of divergences.
    let said = String::from_utf8(weigh(&with).output().expect("it runs").stderr).expect("text");
    assert!(said.contains("kl_weights.json"), "{said}");
    let wrote: serde_json::Value = serde_json::from_str(&fs::read_to_string(&weights).expect("there")).expect("JSON");
    let worth: Vec<_> = wrote["per_k_chunk"].as_array().expect("a list").iter().filter_map(|w| w.as_f64()).collect();
    assert!(worth.len() == 4 && worth.iter().any(|w| *w > 0.0) && worth.iter().all(|w| *w >= 0.0), "{wrote}");
    // Of the 32 channels of the narrowest projection, 32 of 1024 are one.
    assert_eq!(wrote["k_chunk"], 32);
    assert!(wrote["uncompensated"].as_f64().expect("a number") > 0.0);
    let of = |per_k_chunk: &str| {
        format!(r#"{{"format":1,"per_k_chunk":{per_k_chunk},"k_chunk":8,"uncompensated":0.5,"tokens":99}}"#)
    };
    fs::write(&weights, of("[0.0, 0.001, 0.0, 0.0]")).expect("written");
    tune(&["--verify", "--verify-tokens", "8", "--save"])
        .assert()
        .success()
        .stdout(contains("note: objective kl").and(contains("k_chunk per module       : 0, 64, 0, 0")));
    let used = contains("k_chunk [0, 64, 0, 0], as ").and(contains("tuned.json says"));
    shop.generate(&checkpoint, &["--device", "cpu"]).assert().success().stderr(used);
    for spoiled in [of("[0.0, 0.0, 0.0, 0.0]"), of("[1e999, 0, 0, 0]"), of("[-1, 0, 0, 0]"), "{".into(), String::new()]
    {
        fs::write(&weights, spoiled).expect("written");
        refuses(tune(&[]), &["kl_weights.json"]);
        tune(&["--objective", "k"]).assert().success();
    }
}

/// Where nobody has tuned, a choice is measured once and kept; evaluation takes what the checkpoint was made for.
#[test]
fn without_a_tuned_file_a_choice_is_measured_once_and_evaluation_measures_none() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let cache = shop.path("cache");
    let json = |stdout: &[u8]| -> serde_json::Value { serde_json::from_slice(stdout).expect("one object") };
    let run = |more: &[&str]| {
        let mut line = shop.generate(&checkpoint, &["--device", "cpu", "--prompt", "ab", "--json"]);
        let output = line.env("DECDEC_CACHE_DIR", &cache).args(more).output().expect("it runs");
        assert!(output.status.success());
        (json(&output.stdout), String::from_utf8(output.stderr).expect("text"))
    };
    let (first, said) = run(&[]);
    assert!(said.contains("compensating ") && (said.contains("measured now") || said.contains("(now;")), "{said}");
    let kept: Vec<_> = fs::read_dir(cache.join("compensation")).expect("there").collect();
    assert_eq!(kept.len(), 1);
    let (second, said) = run(&[]);
    assert!(said.contains("kept in") && said.contains("cache"), "{said}");
    assert_eq!((&second["k_chunks"], &second["tokens"]), (&first["k_chunks"], &first["tokens"]));
    // What the JSON says repeats the text.
    if let Some(k_chunks) = first["k_chunks"].as_array() {
        let k_chunks: Vec<_> = k_chunks.iter().map(ToString::to_string).collect();
        let flags = ["--k-chunks"].into_iter().chain(k_chunks.iter().map(String::as_str)).collect::<Vec<_>>();
        assert_eq!(run(&flags).0["tokens"], first["tokens"]);
    }
    fs::write(shop.path("text"), "a b ab ba aab bba abab ".repeat(20)).expect("written");
    let mut evaluate = decdec();
    evaluate.args(["eval", "perplexity"]).arg(&checkpoint).args(["--device", "cpu", "--seq-len", "16", "--text"]);
    evaluate.arg(shop.path("text")).env("DECDEC_CACHE_DIR", shop.path("untouched"));
    let made_for = "k_chunk [8, 8, 8, 8], as the checkpoint was made for";
    let said = String::from_utf8(evaluate.output().expect("it runs").stderr).expect("text");
    assert!(said.contains(made_for), "{said}");
    assert!(!shop.path("untouched").exists(), "nothing is timed, and nothing kept");
}

/// One result for each width of a checkpoint that has two; both are taken, and a file that lacks one is not.
#[test]
fn each_width_of_a_mixed_checkpoint_is_tuned_for_itself() {
    let shop = Workshop::new();
    shop.quantize("checkpoint", &["--bitwidth", "3.5", "--refine", "none"]).assert().success();
    let checkpoint = shop.path("checkpoint");
    let saved = checkpoint.join("tuned.json");
    let saved = saved.to_str().expect("text");
    let sweep = |bits, k_chunk| {
        let flags =
            ["--bitwidth", bits, "--tokens", "2", "--min-n-tb", "1", "--max-n-tb", "1", "--max-k-chunk", k_chunk];
        about(&shop, "profile", "run", &flags).assert().success();
        let flags = ["--bitwidth", bits, "--target-slowdown", "100000", "--verify", "--verify-tokens", "8", "--save"];
        about(&shop, "tune", "run", &flags).assert().success().stdout(contains("Real slowdown of a token : "));
    };
    sweep("4", "3");
    let lacks = "layers of 3 bits: run decdec profile and decdec tune --save with --bitwidth 3";
    shop.generate(&checkpoint, &["--device", "cpu"])
        .assert()
        .success()
        .stderr(contains("left aside").and(contains(lacks)));
    refuses(shop.generate(&checkpoint, &["--device", "cpu", "--tuned", saved]), &["tuned.json", lacks]);
    let quantize = ["--bitwidth", "3.5", "--overwrite", "--dry-run", "--for-tuned", saved];
    refuses(shop.quantize("checkpoint", &quantize), &["at 4 bits", "3 bits", "are expected"]);
    sweep("3", "5");
    let both = contains("n_tb 1, k_chunk [5, 5, 5, 5]; n_tb 1, k_chunk [3, 3, 3, 3], as ");
    shop.generate(&checkpoint, &["--device", "cpu"]).assert().success().stderr(both.clone());
    shop.generate(&checkpoint, &["--device", "cpu", "--tuned", saved]).assert().success().stderr(both);
    shop.quantize("checkpoint", &quantize).assert().success();
    let out = shop.path("again");
    let mut again = shop.quantize("again", &["--bitwidth", "3.5", "--for-tuned", saved]);
    again.assert().success();
    let config = fs::read_to_string(out.join("config.json")).expect("there");
    assert!(config.contains("refined for k_chunk 5 5 5 5 and 3 3 3 3"), "{config}");
}

#[test]
fn mistakes_of_the_manual_get_a_hint() {
    let shop = Workshop::new();
    shop.checkpoint();
    refuses(about(&shop, "tune", "run", &["--", "target_slowdown", "2.5"]), &["write --target-slowdown"]);
    refuses(
        about(&shop, "tune", "run", &["--target_slowdown", "5"]),
        &["run decdec profile with the same names first"],
    );
    refuses(about(&shop, "tune", "run", &[]), &["no target", "2.5"]);
    refuses(about(&shop, "profile", "run", &["--algo", "awq"]), &["--algo is awq", "sqllm"]);
    refuses(about(&shop, "profile", "run", &["--bitwidth", "4"]), &["4", "3"]);
    refuses(about(&shop, "profile", "a/b", &[]), &["becomes part of a file name"]);
    refuses(about(&shop, "profile", "run", &["--nsys-path", "/no/nsys"]), &["--nsys-path is the program nsys"]);
    refuses(about(&shop, "profile", "run", &["--clock", "sundial"]), &["sundial", "auto, cupti or events"]);
}

/// A stand-in for `nsys` runs the program as it is told, and "exports" what the program itself recorded, with every
/// kernel twice as long.
#[test]
fn the_program_runs_itself_under_nsys() {
    use std::os::unix::fs::PermissionsExt;
    let shop = Workshop::new();
    shop.checkpoint();
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && {{ echo 'Nsight Systems 2099.1'; exit 0; }}\necho \"$@\" > '{}'\n\
         while [ \"$1\" != --output ]; do shift; done\nout=\"$2\"; shift 2\n\"$@\" || exit 1\n\
         cp \"$(dirname \"$out\")/{STEM}.sqlite\" \"$out.sqlite\"\n",
        shop.path("arguments").display(),
    );
    let nsys = shop.path("fake-nsys");
    fs::write(&nsys, script).expect("written");
    fs::set_permissions(&nsys, fs::Permissions::from_mode(0o755)).expect("a program");
    let flags = [&SWEEP[..], &["--nsys_path", nsys.to_str().expect("text")]].concat();
    about(&shop, "profile", "run", &flags).assert().success().stdout(contains(format!("{STEM}.sqlite")));
    let arguments = fs::read_to_string(shop.path("arguments")).expect("the stand-in ran");
    assert!(arguments.contains("--cuda-graph-trace=node --export=sqlite"), "{arguments}");
    assert!(!arguments.contains("--nsys_path") && arguments.contains("--clock once"), "{arguments}");
    assert_eq!(fs::read_dir(shop.path("nsys")).expect("there").count(), 2, "nothing is left behind");
    let db = rusqlite::Connection::open(shop.path("nsys").join(format!("{STEM}.sqlite"))).expect("a database");
    let clock = "SELECT value FROM META_DATA_CAPTURE WHERE name = 'DECDEC_CLOCK'";
    let clock: String = db.query_row(clock, [], |row| row.get(0)).expect("the clock");
    assert_eq!(clock, "Nsight Systems 2099.1");
    about(&shop, "tune", "run", &["--target-slowdown", "5"]).assert().success().stdout(contains("Best n_tb"));
}

/// The table has every part, its times add up to about the token, and the picture is one.
#[test]
fn bench_says_where_a_token_goes() {
    let shop = Workshop::new();
    let checkpoint = shop.checkpoint();
    let checkpoint = checkpoint.to_str().expect("text");
    let bench = |more: &[&str]| {
        let mut line = decdec();
        line.current_dir(shop.dir.path()).args(["bench", "--checkpoint-path", checkpoint, "--device", "cpu"]);
        line.args(["--tokens", "8"]).args(more);
        line
    };
    let out = bench(&["--context", "5", "--timeline", "--picture", "timeline.png"]).assert().success();
    let out = String::from_utf8(out.get_output().stdout.clone()).expect("text");
    let number = |line: &str, after: &str| -> f64 {
        let rest = line.split(after).nth(1).unwrap_or_else(|| panic!("{after} in {out}"));
        rest.trim().split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{after} in {out}"))
    };
    let mut sum = 0.0;
    for part in ["embed", "qkv", "attend", "o", "gu", "d", "advance", "head", "sample"] {
        let cells: Vec<_> = out
            .lines()
            .map(|line| line.split(['│', '┆']).map(str::trim).filter(|cell| !cell.is_empty()).collect::<Vec<_>>())
            .find(|cells| cells.first() == Some(&part))
            .unwrap_or_else(|| panic!("{part} in {out}"));
        sum += cells[5].parse::<f64>().expect("a time");
        let bytes: f64 = cells[2].parse().expect("bytes");
        assert_eq!(bytes > 0.0, !["advance", "sample"].contains(&part), "{part}: {out}");
    }
    let whole = number(&out, "operation by operation");
    assert!((sum - whole).abs() < 1.0, "parts of {sum} us, a token of {whole}: {out}");
    assert!(number(&out, "token: floor") <= whole, "{out}");
    assert!(out.contains("head 16 bits") && out.contains("tokens/s"), "{out}");
    let picture = fs::read(shop.path("timeline.png")).expect("written");
    assert!(picture.starts_with(b"\x89PNG") && picture.len() > 5000, "{} bytes", picture.len());
    bench(&[]).assert().success().stdout(contains("head 16 bits").and(contains("by itself us").not()));
    // A vocabulary of 300 does not go into whole words of eight rows.
    refuses(bench(&["--head-bits", "8"]), &["quantizing the head", "300", "a multiple of 8"]);
    refuses(bench(&["--head-bits", "5"]), &["5", "16, 8 and 4 are allowed"]);
    refuses(bench(&["--context", "0"]), &["'0' for '--context", "from 1"]);
}
