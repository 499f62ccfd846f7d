//! `decdec bench`

use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use decdec::backend::DecodeBackend;
use decdec::generate::{Request, generate};
use decdec::model::Model;
use decdec::open::Opened;
use decdec::profile::Clock;
use decdec::sampling::Sampling;
use decdec::timeline::{self, Timeline};
use decdec::weights::ModelWeights;

use super::devices::{Job, Target, on_device};
use crate::cli::BenchArgs;

/// Runs the command.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    ensure!(args.context > 0, "--context is 0, at least 1 token is needed");
    ensure!(args.tokens > 1, "--tokens is {}, at least 2 are needed", args.tokens);
    let opened = super::open(&args.checkpoint_path, (args.model_name.as_deref(), args.backend, args.bitwidth), false)?;
    on_device(&Target { watch: args.timeline, ..args.run.target() }, Bench { args, opened: &opened })
}

struct Bench<'a> {
    args: &'a BenchArgs,
    opened: &'a Opened,
}

impl Job for Bench<'_> {
    type Output = ();

    fn needs(&self) -> Option<(&dyn ModelWeights, usize)> {
        Some((self.opened.weights(), self.args.context + self.args.tokens.max(timeline::ROOM)))
    }

    #[allow(clippy::print_stdout, reason = "the command's result")]
    fn run<B: DecodeBackend>(self, backend: &B) -> Result<()> {
        let (args, weights) = (self.args, self.opened.weights());
        let bits = args.run.head_bits;
        let head = (bits < 16).then(|| decdec::quantize::head(weights, bits)).transpose()?;
        let mut model = Model::load_with_head(backend, weights, head.clone(), |_| ())?;
        let compensation = super::compensation(&model, &args.checkpoint_path, &args.run)?;
        model.compensate(compensation.as_ref())?;
        let device = backend.device();
        let title = format!(
            "{}, {} ({}), context {}, head {bits} bits",
            self.opened.name(),
            device.name,
            device.id,
            args.context
        );
        println!("{title}");
        let rate = tokens_per_second(&model, args)?;
        println!("whole tokens: {rate:.1} tokens/s, {:.1} us each", 1e6 / rate);
        if !args.timeline {
            return Ok(());
        }
        let mut recorder = backend.recorder(Clock::Auto)?;
        let sources = (weights, head.as_ref());
        let timeline = timeline::measure(&model, &mut recorder, sources, compensation.as_ref(), args.context)?;
        print(&timeline);
        if let Some(picture) = &args.picture {
            timeline::draw(&timeline, &format!("{title}: {rate:.1} tokens/s"), picture)?;
            tracing::info!("wrote {}", picture.display());
        }
        Ok(())
    }
}

/// Greedy tokens behind a context; a first, short text compiles and records.
fn tokens_per_second<B: DecodeBackend>(model: &Model<'_, B>, args: &BenchArgs) -> Result<f64> {
    let mut state = model.state(args.context + args.tokens)?;
    let prompt = vec![model.config().bos_token_id.unwrap_or(0); args.context];
    model.prepare(&mut state, args.context, false)?;
    let mut rate = 0.0;
    for max_new_tokens in [args.tokens.min(8), args.tokens] {
        let request = Request {
            prompt: &prompt,
            max_new_tokens,
            sampling: Sampling::GREEDY,
            seed: 0,
            stop_ids: &[],
            compensate_prompt: false,
        };
        rate = generate(model, &mut state, &request, |_| Ok(ControlFlow::Continue(())))?.decode_per_second();
    }
    Ok(rate)
}

#[allow(clippy::print_stdout, reason = "the command's result")]
fn print(timeline: &Timeline) {
    let Timeline { clock, bandwidths, measured, parts, layers_us } = timeline;
    let how = if *measured { "by plain reads" } else { "of the fastest part" };
    let (memory, link) = (bandwidths.device_memory / 1e9, bandwidths.host_link / 1e9);
    println!("times from {clock}; floors at {memory:.1} GB/s of memory, {link:.1} GB/s of the host link ({how})");
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
    println!("{table}");
    let (floor, us) = (timeline.floor_us(), timeline.us());
    println!("token: floor {floor:.1} us, operation by operation {us:.1} us; its layers as one: {layers_us:.1} us");
}
