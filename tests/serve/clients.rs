//! Other people's clients: the official Python packages against the program itself, on SmolLM2.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::program::Program;
use crate::{answers, devices};

/// The Python that has these packages: that of `DECDEC_PYTHON`, or `python3`; a skipped test if it lacks one of them.
fn python(packages: &[&str]) -> Option<String> {
    let python = std::env::var("DECDEC_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = |package: &str| {
        let found = Command::new(&python).args(["-c", &format!("import {package}")]).stderr(Stdio::null()).status();
        found.is_ok_and(|status| status.success())
    };
    let lacks: Vec<_> = packages.iter().filter(|package| !has(package)).copied().collect();
    if lacks.is_empty() {
        return Some(python);
    }
    devices::skip(&format!("{} not in DECDEC_PYTHON", lacks.join(", ")));
    None
}

/// What a script of `scripts/serve` says, which has to end well.
fn run(python: &str, script: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(python);
    let output = command.arg(Path::new("scripts/serve").join(script)).args(arguments).output().expect("it runs");
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{wrong}");
    said.into_owned()
}

#[test]
fn the_official_python_clients() {
    let Some(python) = python(&["openai", "anthropic"]) else { return };
    let Some(model) = answers::smollm2() else { return };
    let program = Program::start(&model, &[]);
    let said = run(&python, "clients.py", &[&program.url]);
    assert_eq!(said.lines().filter(|line| line.starts_with("ok ")).count(), 9, "{said}");
}

/// lm-evaluation-harness reads the same numbers from the server as `decdec eval` computes.
#[test]
fn evaluations_by_the_server_are_the_programs_own() {
    let Some(python) = python(&["lm_eval", "tenacity"]) else { return };
    let Some(model) = answers::smollm2() else { return };
    let program = Program::start(&model, &["--served-model-name", "m"]);
    let dir = tempfile::tempdir().expect("a directory");
    let own = assert_cmd::cargo::cargo_bin("decdec");
    let arguments = [program.url.as_str(), text(&own), text(&model), text(dir.path()), "--device", "cpu"];
    let said = run(&python, "evaluation.py", &arguments);
    assert!(said.contains("accuracy") && said.contains("as decdec eval's"), "{said}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// Two replicas behind a router: balanced, one killed under load, brought back, one drained, and no request lost.
fn behind(router: &str) {
    let Some(folder) = std::env::var_os("DECDEC_ROUTERS") else {
        return devices::skip("DECDEC_ROUTERS names no folder");
    };
    let Some(model) = answers::smollm2() else { return };
    let program = Path::new(&folder).join(router).join("bin").join(router);
    assert!(program.is_file(), "{} is not there, scripts/clients.sh fetches it", program.display());
    let (dir, own) = (tempfile::tempdir().expect("a directory"), assert_cmd::cargo::cargo_bin("decdec"));
    let logs = dir.path().join(router);
    let said = run("python3", "routers.py", &[text(&program), text(&own), text(&model), text(&logs)]);
    assert!(said.contains("none lost"), "{said}");
}

#[test]
fn replicas_behind_routers() {
    behind("vllm-router");
    behind("smg");
}

/// The page in a browser: by keyboard, on a phone, dark and light, asking nobody but the server.
#[test]
fn the_page_in_a_browser() {
    let Some(python) = python(&["playwright"]) else { return };
    if !Command::new("chromium").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return devices::skip("no chromium");
    }
    let Some(model) = answers::smollm2() else { return };
    let program = Program::start(&model, &[]);
    let dir = tempfile::tempdir().expect("a directory");
    let said = run(&python, "page.py", &[&program.url, text(&dir.path().join("page.png"))]);
    assert!(said.starts_with("ok: keyboard"), "{said}");
}

#[cfg(unix)]
#[test]
fn sigterm_ends_the_program_well() {
    let Some(model) = answers::smollm2() else { return };
    let mut program = Program::start(&model, &["--drain-notice", "0"]);
    let id = program.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().expect("it runs").success());
    assert!(program.child.wait().expect("it ends").success());
}

/// What cannot be served is said in one line before anything is loaded.
#[test]
fn a_server_that_cannot_begin() {
    let dir = tempfile::tempdir().expect("a directory");
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "# none\n").expect("written");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let cases: [(&[&str], &str); 5] = [
        (
            &["--port", &port],
            &format!("cannot listen on 127.0.0.1:{port}, is another server running, or give another --port"),
        ),
        (&["--port", "0", "--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask, give --api-key-file"),
        (&["--port", "0", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:0"),
        (&["--port", "0", "--api-key-file", text(&keys)], "keys"),
        (&["--port", "0"], "cannot open the model nowhere"),
    ];
    for (arguments, expected) in cases {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin("decdec"));
        let output = command.args(["serve", "--checkpoint-path", "nowhere"]).args(arguments).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.lines().count() == 1, "{said}");
        assert!(said.starts_with("error: ") && said.contains(expected), "{expected} is not in {said}");
    }
}
