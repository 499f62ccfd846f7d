//! `decdec bench`

use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use decdec::backend::DecodeBackend;
use decdec::generate::{Generated, Request, generate};
use decdec::model::Model;
use decdec::open::Opened;
use decdec::profile::Clock;
use decdec::sampling::Sampling;
use decdec::timeline::{self, Timeline};
use decdec::weights::ModelWeights;

use super::devices::{Job, Target, on_device};
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
    on_device(&Target { watch: args.timeline, ..Target::of(&args.run) }, Bench { args, opened: &opened })
}

/// Tokens of the longest text that is made.
fn longest(args: &BenchArgs) -> usize {
    args.context.saturating_add(args.tokens.max(if args.timeline { timeline::ROOM } else { 0 }))
}

struct Bench<'a> {
    args: &'a BenchArgs,
    opened: &'a Opened,
}

impl Job for Bench<'_> {
    type Output = ();

    fn needs(&self) -> Option<(&dyn ModelWeights, usize)> {
        Some((self.opened.weights(), longest(self.args)))
    }

    fn run<B: DecodeBackend>(self, backend: &B) -> Result<()> {
        let (args, weights) = (self.args, self.opened.weights());
        let bits = args.run.head_bits;
        let head = (bits < 16).then(|| decdec::quantize::head(weights, bits)).transpose()?;
        let mut model = Model::load_with_head(backend, weights, head.clone(), |_| ())?;
        let compensation = super::compensation(&model, &args.model.named.checkpoint_path, &args.run)?;
        model.compensate(compensation.as_ref())?;
        let device = backend.device();
        let title = format!(
            "{}, {} ({}), context {}, head {bits} bits",
            self.opened.name(),
            device.name,
            device.id,
            args.context
        );
        output::line(&title)?;
        let made = whole_tokens(&model, args)?;
        let (rate, us) = (made.decode_per_second(), made.decode_time.as_secs_f64() * 1e6 / made.decoded.max(1) as f64);
        output::line(format_args!("whole tokens: {rate:.1} tokens/s, {us:.1} us each"))?;
        if !args.timeline {
            return Ok(());
        }
        let mut recorder = backend.recorder(Clock::Auto)?;
        let sources = (weights, head.as_ref());
        let timeline = timeline::measure(&model, &mut recorder, sources, compensation.as_ref(), args.context)?;
        print(&timeline)?;
        if let Some(picture) = &args.picture {
            timeline::draw(&timeline, &format!("{title}: {rate:.1} tokens/s"), picture)?;
            tracing::info!("wrote {}", picture.display());
        }
        Ok(())
    }
}

/// Greedy tokens behind a context; a first, short text compiles and records.
fn whole_tokens<B: DecodeBackend>(model: &Model<'_, B>, args: &BenchArgs) -> Result<Generated> {
    let mut state = model.state(args.context + args.tokens)?;
    let prompt = vec![model.config().bos_token_id.unwrap_or(0); args.context];
    model.prepare(&mut state, args.context, false)?;
    let mut text = |max_new_tokens| {
        let request = Request {
            prompt: &prompt,
            max_new_tokens,
            sampling: Sampling::GREEDY,
            seed: 0,
            stop_ids: &[],
            compensate_prompt: false,
        };
        generate(model, &mut state, &request, |_| Ok(ControlFlow::Continue(())))
    };
    text(args.tokens.min(8))?;
    text(args.tokens)
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
