//! `decdec bench`

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use decdec::device::{self, Device, Occupied};
use decdec::engine::{Compensate, Engine, Settings};
use decdec::timeline::{self, Timeline};

use crate::cli::BenchArgs;
use crate::output;

/// Runs the command.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let opened = super::open(&args.model, args.run.compat_scale_order)?;
    let (longest, max) = (longest(args), opened.weights().config().max_position_embeddings);
    ensure!(
        longest <= max,
        "a text of {longest} tokens is to be made, the model's context is {max}: give less --context or --tokens"
    );
    let device = super::devices::open(&args.run, device::Options { watch: args.timeline, ..Default::default() })?;
    let engine = super::engine(&device, &opened, &args.run, longest, false, Compensate::Tuned)?;
    let info = engine.device();
    let (bits, kv_bits) = (args.run.head_bits, args.run.kv_bits);
    let kept = if kv_bits == 16 { String::new() } else { format!(", keys and values {kv_bits} bits") };
    let title =
        format!("{}, {} ({}), context {}, head {bits} bits{kept}", opened.name(), info.name, info.id, args.context);
    output::line(&title)?;
    let us = whole_tokens(&device, &engine, args)?.as_secs_f64() * 1e6 / args.tokens as f64;
    let rate = 1e6 / us;
    output::line(format_args!("whole tokens: {rate:.1} tokens/s, {us:.1} us each"))?;
    if !args.timeline {
        return Ok(());
    }
    let timeline = engine.timeline(opened.weights(), args.context)?;
    print(&timeline)?;
    if let Some(picture) = &args.picture {
        timeline::draw(&timeline, &format!("{title}: {rate:.1} tokens/s"), picture)?;
        tracing::info!("wrote {}", picture.display());
    }
    Ok(())
}

/// Tokens of the longest text that is made.
fn longest(args: &BenchArgs) -> usize {
    args.context.saturating_add(BEFORE.saturating_add(args.tokens).max(if args.timeline { timeline::ROOM } else { 0 }))
}

/// How long a text may take on a device that acts as another.
const LONGEST: Duration = Duration::from_secs(20);

/// Tokens that are made before the clock starts: operations are compiled and recorded, and as many as a device queues ahead.
const BEFORE: usize = 24;

/// The time of greedy tokens behind a context.
fn whole_tokens(device: &Device, engine: &Engine<'_>, args: &BenchArgs) -> Result<Duration> {
    let prompt = vec![engine.config().bos_token_id.unwrap_or(0); args.context];
    let settings = Settings { max_new_tokens: BEFORE + args.tokens, ..Settings::default() };
    let mut session = engine.session(settings)?;
    session.prompt(&prompt)?;
    let mut make = |tokens| -> Result<()> {
        for made in 0..tokens {
            ensure!(session.next()?.is_some(), "the text ended after {made} of {tokens} tokens");
        }
        Ok(())
    };
    make(BEFORE / 2)?;
    let held = device.occupy_rest(LONGEST)?;
    if let Some(rate) = held.as_ref().and_then(Occupied::read_rate) {
        output::line(format_args!("plain reads of memory beside what is held: {:.0} GB/s", rate / 1e9))?;
    }
    make(BEFORE - BEFORE / 2)?;
    let start = Instant::now();
    make(args.tokens)?;
    let took = start.elapsed();
    held.iter().try_for_each(Occupied::check)?;
    Ok(took)
}

fn print(timeline: &Timeline) -> Result<()> {
    let Timeline { clock, bandwidths, measured, parts, layers_us } = timeline;
    let how = if *measured { "by plain reads" } else { "of the fastest part" };
    let (memory, link) = (bandwidths.device_memory / 1e9, bandwidths.host_link / 1e9);
    output::line(format_args!(
        "times from {clock}; floors at {memory:.1} GB/s of memory, {link:.1} GB/s of the host link ({how})"
    ))?;
    let mut table = super::table();
    table.set_header([
        "part",
        "times",
        "kB",
        "kB over link",
        "floor us",
        "by itself us",
        "of floor",
        "in one launch us",
    ]);
    for p in parts {
        let kb = |bytes: usize| format!("{:.1}", bytes as f64 / 1e3);
        table.add_row([
            p.name.to_owned(),
            p.count.to_string(),
            kb(p.bytes),
            kb(p.host_bytes),
            format!("{:.1}", p.floor_us),
            format!("{:.1}", p.us),
            format!("{:.2}", p.floor_us / p.us.max(1e-3)),
            p.fused_us.map_or_else(String::new, |us| format!("{us:.1}")),
        ]);
    }
    output::line(&table)?;
    let (floor, us) = (timeline.floor_us(), timeline.us());
    output::line(format_args!(
        "token: floor {floor:.1} us, operation by operation {us:.1} us; its layers as one: {layers_us:.1} us"
    ))
}
