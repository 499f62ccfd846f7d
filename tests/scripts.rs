//! What `scripts/test.sh` says of a run: `scripts/tally.sh` on steps made up here, and on a test that skips itself.

mod devices;

use std::fs;
use std::path::Path;
use std::process::Command;

/// What cargo and libtest print of one program; its counts are of passed, failed and ignored.
fn log(program: &str, [passed, failed, ignored]: [usize; 3]) -> String {
    let running = format!("     Running tests/{program}.rs (target/release/deps/{program}-0123456789abcdef)\n\n");
    let ignored_tests = "test a_tool ... ignored, writes files\n".repeat(ignored);
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    let rest = "0 measured; 0 filtered out; finished in 0.01s";
    format!(
        "{running}{ignored_tests}test result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; {rest}\n"
    )
}

/// Writes a step of a run: its status, its log, and what its tests said that they skip.
fn step(dir: &Path, name: &str, status: i32, log: &str, skips: &str) {
    for (ending, text) in [("status", status.to_string().as_str()), ("log", log), ("skips", skips)] {
        if ending != "skips" || !skips.is_empty() {
            fs::write(dir.join(format!("{name}.{ending}")), text).expect("writable");
        }
    }
}

/// The last line of the tally, all of it, and whether the run passes.
fn tally(dir: &Path, ci: bool) -> (String, String, bool) {
    let mut command = Command::new("scripts/tally.sh");
    let output = command.arg(dir).env("CI", if ci { "true" } else { "" }).output().expect("bash");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    (text.lines().last().expect("a line").to_owned(), text.clone(), output.status.success())
}

const CUDA: &str = "golden golden_products_on_cuda: cuda not in DECDEC_TEST_DEVICES\n";
const OTHER: &str = "golden golden_products_on_cpu: the moon is full\n";

#[test]
fn every_test_is_counted_once() {
    let dir = tempfile::tempdir().expect("a directory");
    step(dir.path(), "format", 0, "", "");
    step(dir.path(), "lints", 0, "    Finished `release` profile\n", "");
    // One test said so twice; another step skips the test of the same name.
    let doctests = log("", [2, 0, 0]).split_once("\n\n").map(|(_, rest)| format!("   Doc-tests decdec\n\n{rest}"));
    let logs = [log("golden", [8, 0, 0]), log("fuzz", [7, 0, 1]), doctests.expect("two parts")].concat();
    step(dir.path(), "tests", 0, &logs, &CUDA.repeat(2));
    step(dir.path(), "again", 0, &log("golden", [3, 0, 0]), CUDA);
    let (last, all, passes) = tally(dir.path(), false);
    assert!(passes, "{all}");
    assert_eq!(last, "20 passed, 0 failed, 3 skipped", "two lints, twenty tests, two of them skipped, one ignored");
    assert!(all.contains("skipped: 3 cuda not in DECDEC_TEST_DEVICES\n"), "{all}");
    assert!(all.contains("skipped: 1 writes files\n"), "{all}");
}

#[test]
fn what_fails_fails_the_run() {
    let dead = "     Running tests/grouped/main.rs (target/release/deps/grouped-0123456789abcdef)\n\nrunning 5 tests\n";
    for (what, status, log, want) in [
        ("a lint", 1, String::new(), "1 passed, 1 failed, 0 skipped"),
        ("two tests", 1, log("golden", [6, 2, 0]), "7 passed, 2 failed, 0 skipped"),
        ("a program that dies", 1, log("golden", [8, 0, 0]) + dead, "9 passed, 1 failed, 0 skipped"),
        ("what cargo alone knows", 1, log("golden", [8, 0, 0]), "9 passed, 1 failed, 0 skipped"),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        step(dir.path(), "format", 0, "", "");
        step(dir.path(), "broken", status, &log, "");
        let (last, all, passes) = tally(dir.path(), false);
        assert!(last == want && !passes, "{what}: {all}");
        assert!(all.contains("failed: broken, "), "{what}: {all}");
    }
}

#[test]
fn continuous_integration_allows_listed_skips_only() {
    let dir = tempfile::tempdir().expect("a directory");
    step(dir.path(), "tests", 0, &log("golden", [8, 0, 0]), CUDA);
    let (last, all, passes) = tally(dir.path(), true);
    assert!(last == "7 passed, 0 failed, 1 skipped" && passes, "{all}");

    step(dir.path(), "tests", 0, &log("golden", [8, 0, 0]), &[CUDA, OTHER].concat());
    let (last, all, passes) = tally(dir.path(), false);
    assert!(last == "6 passed, 0 failed, 2 skipped" && passes, "{all}");
    let (last, all, passes) = tally(dir.path(), true);
    assert!(last == "6 passed, 1 failed, 1 skipped" && !passes, "{all}");
    let named = format!("failed: {}, which scripts/allowed-skips does not name\n", OTHER.trim_end());
    assert!(all.contains(&named), "{all}");
}

const IN_A_CHILD: &str = "DECDEC_SKIP_IN_A_CHILD";

#[test]
fn a_test_that_skips_itself_is_no_passed_test() {
    if std::env::var_os(IN_A_CHILD).is_some() {
        devices::skip("it is a child");
        return;
    }
    // This very test, as cargo would run it.
    let dir = tempfile::tempdir().expect("a directory");
    let program = std::env::current_exe().expect("a path");
    let mut child = Command::new(&program);
    child.args(["--exact", "a_test_that_skips_itself_is_no_passed_test"]).env(IN_A_CHILD, "1");
    let output = child.env("DECDEC_SKIPS", dir.path().join("tests.skips")).output().expect("it runs");
    let running = format!("     Running tests/scripts.rs ({})\n", program.display());
    fs::write(dir.path().join("tests.log"), running + &String::from_utf8_lossy(&output.stdout)).expect("writable");
    fs::write(dir.path().join("tests.status"), "0\n").expect("writable");
    let skips = fs::read_to_string(dir.path().join("tests.skips")).expect("it says so");
    assert_eq!(skips, "scripts a_test_that_skips_itself_is_no_passed_test: it is a child\n");
    assert_eq!(tally(dir.path(), false).0, "0 passed, 0 failed, 1 skipped");
}
