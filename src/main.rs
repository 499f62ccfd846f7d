//! The program: parse, one call per command, print the error, exit code.

mod cli;
mod commands;

use std::process::ExitCode;

use clap::CommandFactory;

use crate::cli::{Cli, Command, EvalCommand};
use crate::commands::Interrupted;

#[allow(clippy::print_stderr, reason = "the program's own error")]
fn main() -> ExitCode {
    let cli = cli::parse();
    log_to_stderr();
    decdec::mapped::exit_when_a_file_shrinks();
    let result = match &cli.command {
        Command::Quantize(args) => commands::quantize::run(args),
        Command::Convert(args) => commands::convert::convert(args),
        Command::Residuals(args) => commands::convert::residuals(args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Eval(EvalCommand::Perplexity(args)) => commands::eval::perplexity(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Profile(args) => commands::profile::run(args),
        Command::Tune(args) => commands::tune::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Devices(args) => commands::devices::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "decdec", &mut std::io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => ExitCode::from(130),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
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
        .init();
}
