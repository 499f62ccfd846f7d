//! Several checkpoints, each with several ways of compensation, in one table and one picture.

use anyhow::{Result, ensure};
use decdec::config::Projection;
use decdec::device::{self, Device};
use decdec::engine::{Compensate, Engine, Options, Settings};
use decdec::eval::{self, Choice, Evaluation};
use decdec::model::LayerCompensation;
use decdec::progress::Progress;
use decdec::weights::ModelWeights;

use crate::cli::CompareArgs;
use crate::{commands, output};

/// One line of the table: a choice, and what was measured on each text.
struct Line {
    choice: Choice,
    texts: Vec<Evaluation>,
}

/// Runs the command.
pub(crate) fn compare(args: &CompareArgs) -> Result<()> {
    let source = commands::locate::open(&args.source, None, false)?;
    let (vocab, context) = (source.weights().config().vocab_size, source.weights().config().max_position_embeddings);
    ensure!(args.seq_len <= context, "--seq-len is {}, 2 to {context} (the model's context) are allowed", args.seq_len);
    let wanted = args.windows.as_ref().map_or(usize::MAX, |windows| windows.end.saturating_mul(args.seq_len));
    let tokenizer = source.tokenizer()?;
    let texts: Vec<Vec<u32>> =
        args.text.iter().map(|path| commands::read_tokens(path, &tokenizer, wanted)).collect::<Result<_>>()?;
    let windows: Vec<Vec<&[u32]>> = texts
        .iter()
        .map(|ids| eval::windows(ids, args.seq_len, args.windows.clone().unwrap_or(0..ids.len() / args.seq_len)))
        .collect::<Result<_>>()?;
    let interrupt = Some(commands::interrupt::heard());
    let device = Device::open_with(&args.on.device, &device::Options { interrupt, ..device::Options::default() })?;
    let options = |compensate| Options {
        max_seq_len: Some(args.seq_len.max(args.tokens + 1)),
        compensate,
        selection: args.on.selection.into(),
        text: false,
        ..Options::default()
    };
    let truth = commands::load(&device, &source, &options(Compensate::Off))?;
    let mut lines = Vec::new();
    for path in &args.paths {
        let opened = commands::locate::open(path, None, false)?;
        let theirs = opened.weights().config().vocab_size;
        ensure!(theirs == vocab, "{} has a vocabulary of {theirs}, the source {vocab}", path.display());
        for &k_chunks in &args.k_chunks {
            let set = LayerCompensation { k_chunks, ..LayerCompensation::by_default(device.info()) };
            let is_plain = k_chunks == [0; 4];
            let compensate = if is_plain { Compensate::Off } else { Compensate::Sets(vec![set]) };
            let engine = commands::load(&device, &opened, &options(compensate))?;
            let texts = measure(&engine, &truth, &windows)?;
            let mean = |of: &dyn Fn(&Evaluation) -> f64| texts.iter().map(of).sum::<f64>() / texts.len() as f64;
            let choice = Choice {
                model: path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
                k_chunks,
                kl_divergence: mean(&|e| e.kl_divergence.unwrap_or(f64::NAN)),
                device_bytes: device_bytes(opened.weights())?,
                tokens_per_second: speed(&engine, args.tokens)?,
            };
            lines.push(Line { choice, texts });
        }
    }
    show(args, &lines)?;
    if let Some(picture) = &args.picture {
        let choices: Vec<Choice> = lines.into_iter().map(|line| line.choice).collect();
        eval::draw(&choices, &format!("{} on {}", source.name(), device.info().name), picture)?;
        tracing::info!("wrote {}", picture.display());
    }
    Ok(())
}

/// All texts, with a bar.
fn measure(engine: &Engine<'_>, truth: &Engine<'_>, texts: &[Vec<&[u32]>]) -> Result<Vec<Evaluation>> {
    let bar = commands::Bar::new(texts.iter().map(Vec::len).sum(), "reading");
    let each = texts.iter().map(|windows| {
        eval::perplexity(engine, Some(truth), windows, |_| {
            bar.inc(1);
            Ok(())
        })
    });
    each.collect()
}

/// Tokens in a second, of a short text made twice: the first time compiles and records.
fn speed(engine: &Engine<'_>, tokens: usize) -> Result<f64> {
    let mut session = engine.session(Settings::default())?;
    for max_new_tokens in [tokens.min(8), tokens] {
        session.clear();
        session.settings.max_new_tokens = max_new_tokens;
        session.prompt(&[engine.config().bos_token_id.unwrap_or(0)])?;
        session.rest()?;
    }
    Ok(session.made().decode_per_second())
}

/// Bytes of weights, embedding and head.
fn device_bytes(weights: &dyn ModelWeights) -> Result<usize> {
    let tables = [Some(weights.embedding()?), weights.head()?];
    let mut bytes: usize = tables.into_iter().flatten().map(|table| table.values.bytes()).sum();
    for layer in 0..weights.config().layers.len() {
        for projection in Projection::ALL {
            bytes += weights.projection(layer, projection)?.weight.bytes();
        }
    }
    Ok(bytes)
}

fn show(args: &CompareArgs, lines: &[Line]) -> Result<()> {
    if args.output.json {
        for line in lines {
            let mut json = serde_json::to_value(&line.choice)?;
            json["texts"] = serde_json::to_value(&line.texts)?;
            output::line(json)?;
        }
        return Ok(());
    }
    let names: Vec<String> =
        args.text.iter().map(|path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned()).collect();
    let mut table = commands::table();
    let fixed = ["model", "k_chunk", "MB", "tokens/s"].map(str::to_owned);
    let of_texts = names
        .iter()
        .flat_map(|name| ["PPL(Q)", "Mean KLD", "99.9% KLD", "Same top p %"].map(|f| format!("{name} {f}")));
    table.set_header(fixed.into_iter().chain(of_texts));
    for Line { choice, texts } in lines {
        let megabytes = format!("{:.1}", choice.device_bytes as f64 / 1e6);
        let mut row =
            vec![choice.model.clone(), choice.k_chunk(), megabytes, format!("{:.1}", choice.tokens_per_second)];
        for text in texts {
            let figure = |name: &str, digits: usize| {
                let figure = text.figures.as_ref().and_then(|figures| figures.get(name));
                figure.map_or_else(String::new, |f| match f.error {
                    Some(error) => format!("{:.digits$} ± {error:.digits$}", f.value),
                    None => format!("{:.digits$}", f.value),
                })
            };
            row.extend([
                figure("Mean PPL(Q)", 2),
                figure("Mean KLD", 4),
                figure("99.9% KLD", 3),
                figure("Same top p %", 1),
            ]);
        }
        table.add_row(row);
    }
    output::line(&table)
}
