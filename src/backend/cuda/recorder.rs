//! When the kernels of a sweep ran, inside a graph like a token's.
//!
//! Kernels overlap there: one starts while its predecessor drains, loads its first weights, and waits. What a
//! launch costs a token is then not its end minus its start, but its end minus the end of the launch before; so
//! recorded, the launches of a graph add up to the time of the whole.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Cuda;
use super::buffer::Buffer;
use super::cupti::Cupti;
use super::driver::{Arguments, Launch as Grid};
use super::graph::Graph;
use super::host::Mapped;
use crate::backend::record::{Bandwidths, Clock, KernelRecord, Launch, Recorder};

/// What is read to measure device memory: far more than caches hold.
const DEVICE_BYTES: usize = 1 << 30;

/// The same for the host link.
const HOST_BYTES: usize = 128 << 20;

/// Launches from which on a graph is worth the comparison of CUPTI's times with those of events.
const COMPARED: usize = 16;

/// Times the launches of a sweep on one GPU.
pub struct CudaRecorder {
    how: How,
    now_ns: u64,
}

enum How {
    /// Every kernel's own times. `recording` from the first graph on that was compared with events.
    Cupti { cupti: Cupti, recording: bool },
    /// The mean over a graph of like launches.
    Events,
    /// The mean over the one graph that everything runs in, once.
    Once,
}

impl CudaRecorder {
    /// Opens the clock; a device is open already.
    ///
    /// # Errors
    /// CUPTI was asked for by name, and is missing or busy.
    pub(super) fn new(clock: Clock) -> Result<Self> {
        let cupti = |cupti| How::Cupti { cupti, recording: false };
        let how = match clock {
            Clock::Cupti => cupti(Cupti::open()?),
            Clock::Auto => Cupti::open().map(cupti).unwrap_or_else(|error| {
                tracing::warn!("{error:#}; until then times are those of device events");
                How::Events
            }),
            Clock::Events => How::Events,
            Clock::Once => How::Once,
        };
        Ok(Self { how, now_ns: 0 })
    }
}

impl Recorder<Cuda> for CudaRecorder {
    fn clock(&self) -> String {
        match &self.how {
            How::Cupti { cupti, .. } => format!("CUPTI {}, in a replayed graph", cupti.version()),
            How::Events => "device events around replayed graphs of like launches".into(),
            How::Once => "device events around one graph".into(),
        }
    }

    fn record(
        &mut self,
        cuda: &Cuda,
        kinds: &[usize],
        launch: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Launch>> {
        let all: Vec<usize> = (0..kinds.len()).collect();
        match &mut self.how {
            How::Once => {
                let (graph, names) = capture(cuda, &all, launch)?;
                let took = time(cuda, &graph, 1)?;
                Ok(self.evenly(&names, &vec![took / kinds.len() as u32; kinds.len()]))
            }
            How::Events => {
                run(cuda, &all, launch)?;
                let mut took = vec![Duration::ZERO; kinds.len()];
                let mut names = vec![Vec::new(); kinds.len()];
                let most = kinds.iter().max().map_or(0, |kind| kind + 1);
                for kind in 0..most {
                    let alike: Vec<_> = all.iter().copied().filter(|&i| kinds[i] == kind).collect();
                    if alike.is_empty() {
                        continue;
                    }
                    let (graph, of_alike) = capture(cuda, &alike, launch)?;
                    graph.launch()?;
                    let whole = time(cuda, &graph, 3)?;
                    for (&i, name) in alike.iter().zip(of_alike) {
                        (took[i], names[i]) = (whole / alike.len() as u32, name);
                    }
                }
                Ok(self.evenly(&names, &took))
            }
            How::Cupti { cupti, recording } => {
                run(cuda, &all, launch)?;
                let owner = cupti.owner(cuda.driver.handles())?;
                if !*recording {
                    if kinds.len() >= COMPARED {
                        let (graph, _) = capture(cuda, &all, launch)?;
                        graph.launch()?;
                        let alone = time(cuda, &graph, 3)?;
                        drop(graph);
                        cupti.enable(true)?;
                        *recording = true;
                        compare(cuda, &all, launch, alone)?;
                    } else {
                        cupti.enable(true)?;
                    }
                }
                let (graph, names) = capture(cuda, &all, launch)?;
                graph.launch()?;
                cuda.driver.wait()?;
                cupti.take(owner)?;
                graph.launch()?;
                cuda.driver.wait()?;
                let kernels = cupti.take(owner)?;
                if !*recording {
                    cupti.enable(false)?;
                }
                chained(kernels, &names)
            }
        }
    }

    fn bandwidths(&mut self, cuda: &Cuda) -> Result<Option<Bandwidths>> {
        let (free, _) = cuda.driver.memory()?;
        let device = Buffer::new(&cuda.driver, DEVICE_BYTES.min(free / 4))?;
        let multiprocessors = cuda.driver.numbers().multiprocessors;
        let device_memory = read_speed(cuda, device.pointer(), device.bytes(), &[4, 8].map(|n| n * multiprocessors))?;
        drop(device);
        let host = Mapped::new(&cuda.driver, HOST_BYTES)?;
        let host_link = read_speed(cuda, host.pointer(), HOST_BYTES, &[8, 16, 32])?;
        Ok(Some(Bandwidths { device_memory, host_link }))
    }
}

impl CudaRecorder {
    /// One launch behind the other, as long as was measured.
    fn evenly(&mut self, names: &[Vec<String>], took: &[Duration]) -> Vec<Launch> {
        let mut launch = |(names, took): (&Vec<String>, &Duration)| {
            let start_ns = self.now_ns + 1;
            self.now_ns = start_ns + (took.as_nanos() as u64).max(1);
            let record = |name: &str| KernelRecord {
                name: name.into(),
                start_ns,
                end_ns: self.now_ns,
                ..KernelRecord::default()
            };
            let (gemv, dec) = roles(names);
            Launch { gemv: record(&names[gemv]), dec: dec.map(|dec| record(&names[dec])) }
        };
        names.iter().zip(took).map(&mut launch).collect()
    }
}

/// Which of a launch's kernels is the product, and which the compensation, if it has one of its own.
fn roles(names: &[String]) -> (usize, Option<usize>) {
    let gemv = names.iter().position(|name| name.starts_with("gemv")).unwrap_or(0);
    (gemv, names.iter().position(|name| name == "dec"))
}

/// Runs launches as they are, so that everything is compiled and allocated and the device is warm.
fn run(cuda: &Cuda, which: &[usize], launch: &mut dyn FnMut(usize) -> Result<()>) -> Result<()> {
    which.iter().try_for_each(|&i| launch(i))?;
    cuda.driver.wait()
}

/// Launches as a graph, and the names of the kernels of each.
fn capture(
    cuda: &Cuda,
    which: &[usize],
    launch: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<(Graph, Vec<Vec<String>>)> {
    let mut names = Vec::with_capacity(which.len());
    let graph = cuda.driver.capture(&mut || {
        for &i in which {
            let queued = cuda.driver.watch(&mut || launch(i))?;
            ensure!(!queued.is_empty(), "cuda: a launch without a kernel cannot be timed");
            names.push(queued);
        }
        Ok(())
    })?;
    Ok((graph, names))
}

/// The median time of `times` replays.
fn time(cuda: &Cuda, graph: &Graph, times: usize) -> Result<Duration> {
    let mut took = (0..times).map(|_| cuda.driver.time(&mut || graph.launch())).collect::<Result<Vec<_>>>()?;
    took.sort();
    took.get(times / 2).copied().context("nothing was timed")
}

/// Says how much CUPTI itself slows a graph down that took `alone` before it recorded.
fn compare(cuda: &Cuda, which: &[usize], launch: &mut dyn FnMut(usize) -> Result<()>, alone: Duration) -> Result<()> {
    let (graph, _) = capture(cuda, which, launch)?;
    graph.launch()?;
    let recorded = time(cuda, &graph, 3)?;
    let (alone, recorded) = (alone.as_secs_f64() * 1e6, recorded.as_secs_f64() * 1e6);
    tracing::info!(
        "{} base products in a graph: {alone:.1} us, recorded by CUPTI {recorded:.1} us ({:+.1} %)",
        which.len(),
        (recorded / alone - 1.0) * 100.0
    );
    Ok(())
}

/// Gives `kernels`, in the order of their starts, to the launches that queued them by `names`; each launch starts
/// where the one before it ended.
fn chained(kernels: Vec<KernelRecord>, names: &[Vec<String>]) -> Result<Vec<Launch>> {
    let expected: usize = names.iter().map(Vec::len).sum();
    ensure!(
        kernels.len() == expected,
        "CUPTI recorded {} kernels of {expected}: this configuration was not recorded",
        kernels.len()
    );
    let mut kernels = kernels.into_iter();
    let mut before = None;
    let mut launches = Vec::with_capacity(names.len());
    for names in names {
        let mut own: Vec<_> = kernels.by_ref().take(names.len()).collect();
        for (kernel, name) in own.iter().zip(names) {
            ensure!(
                kernel.start_ns > 0 && kernel.end_ns > kernel.start_ns,
                "CUPTI left {name} without a time (start {}, end {}): this configuration was not recorded",
                kernel.start_ns,
                kernel.end_ns
            );
            ensure!(
                kernel.name.contains(name.as_str()),
                "CUPTI recorded {} where {name} was launched: this configuration was not recorded",
                kernel.name
            );
        }
        let end_ns = own.iter().map(|kernel| kernel.end_ns).max().unwrap_or(0);
        let (gemv, dec) = roles(names);
        let dec = dec.map(|dec| own[dec].clone());
        // Everything that is not compensation belongs to the product.
        let product = own.iter().enumerate().filter(|&(i, _)| dec.is_none() || names[i] != "dec");
        let product_end = product.map(|(_, kernel)| kernel.end_ns).max().unwrap_or(end_ns);
        let start_ns = before.unwrap_or(own[0].start_ns).min(product_end - 1);
        let gemv = KernelRecord { start_ns, end_ns: product_end, ..own.swap_remove(gemv) };
        launches.push(Launch { gemv, dec });
        before = Some(end_ns);
    }
    Ok(launches)
}

/// Bytes per second of a plain read of `bytes` at `from`: the best of three times with each number of blocks.
fn read_speed(cuda: &Cuda, from: u64, bytes: usize, blocks: &[usize]) -> Result<f64> {
    let kernel = cuda.kernel("read.cu", "read", &[])?;
    let out = Buffer::new(&cuda.driver, 4)?;
    let (count, to) = ((bytes / 16) as u64, out.pointer());
    let mut best = Duration::MAX;
    for &blocks in blocks {
        for _ in 0..4 {
            let took = cuda.driver.time(&mut || {
                let mut arguments = Arguments::new().with(&from).with(&count).with(&to);
                cuda.driver.launch(&kernel, Grid::new(blocks, 256), &mut arguments)
            })?;
            best = best.min(took);
        }
    }
    ensure!(best > Duration::ZERO, "cuda: the clock stands still: {bytes} bytes were read in no time");
    Ok(count as f64 * 16.0 / best.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(name: &str, start_ns: u64, end_ns: u64) -> KernelRecord {
        KernelRecord { name: name.into(), start_ns, end_ns, ..KernelRecord::default() }
    }

    fn names(launches: &[&[&str]]) -> Vec<Vec<String>> {
        launches.iter().map(|names| names.iter().map(|&name| name.to_owned()).collect()).collect()
    }

    /// Overlapping or apart, launches add up to the whole.
    #[test]
    fn launches_of_a_graph_add_up() {
        let ran = vec![kernel("gemv", 100, 150), kernel("gemv", 130, 180), kernel("gemv", 190, 240)];
        let launches = chained(ran, &names(&[&["gemv"], &["gemv"], &["gemv"]])).unwrap();
        let times: Vec<_> = launches.iter().map(|l| l.gemv.end_ns - l.gemv.start_ns).collect();
        assert_eq!(times, [50, 30, 60]);
        assert_eq!(times.iter().sum::<u64>(), 240 - 100);
        assert!(launches.iter().all(|l| l.dec.is_none()));
    }

    #[test]
    fn a_compensation_of_its_own_is_told_apart() {
        let ran =
            vec![kernel("gemv", 10, 20), kernel("stage", 20, 30), kernel("gemv_any", 30, 70), kernel("dec", 65, 90)];
        let launches = chained(ran, &names(&[&["gemv"], &["stage", "gemv_any", "dec"]])).unwrap();
        let last = &launches[1];
        assert_eq!((last.gemv.name.as_str(), last.gemv.start_ns, last.gemv.end_ns), ("gemv_any", 20, 70));
        assert_eq!(last.dec.as_ref().map(|dec| (dec.start_ns, dec.end_ns)), Some((65, 90)));
    }

    #[test]
    fn records_that_do_not_fit_are_refused() {
        let two = names(&[&["gemv"], &["gemv"]]);
        for (ran, says) in [
            (vec![kernel("gemv", 1, 2)], "recorded 1 kernels of 2"),
            (vec![kernel("gemv", 0, 0), kernel("gemv", 3, 5)], "without a time (start 0, end 0)"),
            (vec![kernel("gemv", 1, 2), kernel("gemv", 3, 3)], "without a time (start 3, end 3)"),
            (vec![kernel("gemv", 1, 2), kernel("embed", 3, 4)], "recorded embed where gemv was launched"),
        ] {
            let error = chained(ran, &two).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
