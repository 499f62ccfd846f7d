//! The program: parse, one call per command, print the error, exit code.

// Everything is said through `output`, which does not panic where nobody listens.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cli;
mod commands;
mod output;

use std::process::ExitCode;

use anyhow::Result;
use decdec::backend::DeviceLost;
use decdec::engine::{self, ErrorKind};

use crate::cli::{Cli, Command, EvalCommand};
use crate::commands::interrupt::{self, Interrupted};

fn main() -> ExitCode {
    report_panics();
    log_to_stderr();
    decdec::mapped::exit_when_a_file_shrinks();
    let result = match cli::parse() {
        Ok(cli) => interrupt::listen().and_then(|()| run(&cli)).map(|()| ExitCode::SUCCESS),
        Err(instead) => cli::show(&instead),
    };
    result.unwrap_or_else(|error| end(&error))
}

fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Run(args) => commands::run::run(args),
        Command::Quantize(args) => commands::quantize::run(args),
        Command::Convert(args) => commands::convert::convert(args),
        Command::Residuals(args) => commands::convert::residuals(args),
        Command::Generate(args) => commands::generate::run(args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => commands::serve::run(args),
        Command::Eval(EvalCommand::Perplexity(args)) => commands::eval::perplexity(args),
        Command::Eval(EvalCommand::Compare(args)) => commands::eval::compare(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Profile(args) => commands::profile::run(args),
        Command::Tune(args) => commands::tune::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Devices(args) => commands::devices::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Man { directory } => cli::manual(directory),
        Command::Completions { shell } => output::text(cli::completions(*shell)),
    }
}

/// Says what went wrong, unless nobody is there to hear it or the user knows.
fn end(error: &anyhow::Error) -> ExitCode {
    let kind = error.downcast_ref::<engine::Error>().map(engine::Error::kind);
    if error.is::<Interrupted>() || kind == Some(ErrorKind::Stopped) {
        return interrupt::EXIT_CODE.into();
    }
    if let Some(code) = error.downcast_ref::<output::Unwritable>().and_then(output::Unwritable::quiet_end) {
        return code;
    }
    output::aside(format_args!("error: {error:#}"));
    if error.is::<DeviceLost>() || kind == Some(ErrorKind::DeviceLost) {
        // The driver's exit handlers would wait for what may never end.
        decdec::backend::exit_at_once(1);
    }
    ExitCode::FAILURE
}

/// A panic is a bug of this program: two lines say so and what to do. The stack is for those who ask for it.
fn report_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let owned = payload.downcast_ref::<String>().map(String::as_str);
        let message = owned.or(payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
        let place = panic.location().map(|place| format!(" ({place})")).unwrap_or_default();
        output::aside(bug(message, &place));
        let stack = std::backtrace::Backtrace::capture();
        if stack.status() == std::backtrace::BacktraceStatus::Captured {
            output::aside(stack);
        }
    }));
}

/// What is said of a panic.
fn bug(message: &str, place: &str) -> String {
    let message: Vec<_> = message.lines().map(str::trim).collect();
    format!(
        "error: {}{place}\nhint: this is a bug in decdec: please report it with the line above, the command line, and \
         what decdec doctor prints",
        message.join(" ")
    )
}

/// Notes go to stderr as plain lines; `RUST_LOG` asks for more or less of them.
fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("decdec=info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        // A note that cannot be written would be reported on the same stderr, with a panic.
        .log_internal_errors(false)
        .init();
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_bug_is_told_in_two_lines() {
        let said = super::bug("assertion failed\n  left: 1\n right: 2", " (src/x.rs:1:2)");
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines[0], "error: assertion failed left: 1 right: 2 (src/x.rs:1:2)");
        assert!(lines.len() == 2 && lines[1].starts_with("hint: this is a bug in decdec: please report it"), "{said}");
    }
}
