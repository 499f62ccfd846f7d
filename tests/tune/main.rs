//! The tuner: known optima, noise, the manual's own example, files that are refused, what is written.

#[path = "../changed/mod.rs"]
mod changed;
#[path = "../devices/mod.rs"]
mod devices;
mod files;
mod results;
mod search;
mod tokens;
mod verify;

use std::path::Path;

use decdec::config::Projection;
use decdec::format::Format;
use decdec::nsys::trace::{Kernel, Line, Role};
use decdec::nsys::{Capture, Identity, KernelRecord, Kind, Precision, Writer};
use decdec::tune::search::{Module, Timings};
use decdec::tune::{self, Objective, Options, Outcome};

pub(crate) const LLAMA: [(usize, usize); 4] = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)];

/// Base times and, by module, `(n_tb, times at k_chunk 1, 2, …)`, in µs.
#[derive(Debug)]
pub(crate) struct Synthetic {
    pub(crate) base: [f64; 4],
    pub(crate) curves: [Vec<(usize, Vec<f64>)>; 4],
}

impl Synthetic {
    /// The shape of the manual's example: 104.53 µs, `k_chunk` 4, 4, 5, 5 at 10 %.
    pub(crate) fn manual() -> Self {
        let slow = |base: f64| (4, (1..=6).map(|k| base * (1.3 + 0.1 * f64::from(k))).collect());
        Self {
            base: [14.00, 11.20, 45.50, 24.33],
            curves: [
                vec![slow(14.0), (12, vec![14.5, 15.0, 15.5, 16.01, 17.5, 18.0])],
                vec![slow(11.2), (8, vec![11.7, 12.2, 12.6, 13.08, 14.5, 15.0])],
                vec![slow(45.5), (14, vec![45.8, 46.6, 47.9, 48.4, 49.29, 51.0])],
                vec![slow(24.33), (14, vec![24.6, 25.0, 25.4, 25.8, 26.15, 27.5])],
            ],
        }
    }

    pub(crate) fn timings(&self) -> Timings {
        let mut shapes = LLAMA.into_iter();
        let mut base = self.base.into_iter();
        let modules = self.curves.each_ref().map(|curves| {
            let measured =
                curves.iter().map(|(n_tb, us)| (*n_tb, us.iter().enumerate().map(|(k, &us)| (k + 1, us)).collect()));
            Module::new(shapes.next().unwrap(), base.next().unwrap(), measured.collect())
        });
        Timings { modules, token: None }
    }

    /// As kernels of a run of three tokens: the base product, then pairs in which compensation starts first.
    pub(crate) fn kernels(&self) -> Vec<(Line, KernelRecord)> {
        let mut kernels = Vec::new();
        let mut now = 1_000;
        let mut pair = 0;
        let mut run = |role, kernel, start: u64, ns: u64, n_tb: usize| {
            let grid = [n_tb as u32, 1, 1];
            let record = KernelRecord { start_ns: start, end_ns: start + ns, grid, ..KernelRecord::default() };
            kernels.push((Line { role, kernel }, record));
        };
        let gemv = |module: usize| Kernel::Gemv(Projection::ALL[module]);
        for _ in 0..3 {
            for (module, base) in self.base.iter().enumerate() {
                run(Role::Compile, gemv(module), now, 900_000, 1);
                run(Role::Standalone, gemv(module), now + 900_000, ns(*base), 1);
                now += 900_000 + ns(*base);
            }
        }
        for (module, curves) in self.curves.iter().enumerate() {
            for (n_tb, times) in curves {
                for (k, us) in times.iter().enumerate() {
                    for _ in 0..3 {
                        let role = Role::Concurrent(pair);
                        run(role, Kernel::Dec(k + 1), now, ns(*us) - 100, *n_tb);
                        run(role, gemv(module), now + 50, ns(*us) - 50, 1);
                        now += ns(*us) + 500;
                        pair += 1;
                    }
                }
            }
        }
        kernels
    }
}

pub(crate) fn ns(us: f64) -> u64 {
    (us * 1e3).round() as u64
}

pub(crate) fn identity() -> Identity {
    Identity {
        prefix: "test".into(),
        model: "Meta-Llama-3-8B-Instruct".into(),
        precision: Precision::Fp16,
        format: Format::AnyPrec,
        bits: 3,
    }
}

pub(crate) fn capture() -> Capture {
    Capture {
        kind: Kind::Products,
        identity: identity(),
        shapes: LLAMA,
        weights: "random:0".into(),
        fingerprint: "0".into(),
        clock: "invented".into(),
        device: "cuda:0".into(),
        device_name: "Test Card".into(),
        driver: "1.2".into(),
        tokens: 3,
        layers: 1,
        layers_ns: 0,
        device_memory: 3e12,
        host_link: 5e10,
        n_tbs: vec![4, 8, 12, 14],
        k_chunks: (1..=6).collect(),
    }
}

/// Writes both files of `kernels` into `dir`, as a sweep does.
pub(crate) fn write(dir: &Path, kernels: &[(Line, KernelRecord)]) {
    let (trace, sqlite) = (identity().trace(dir), identity().sqlite(dir));
    let mut writer = Writer::create(&sqlite, &capture()).unwrap();
    writer.append(kernels).unwrap();
    writer.finish(&trace, &sqlite).unwrap();
}

pub(crate) fn options(dir: &Path, targets: &[f64]) -> Options {
    let (identity, dir) = (identity(), dir.to_path_buf());
    Options {
        identity,
        dir,
        shapes: [None; 4],
        targets: targets.to_vec(),
        exhaustive: false,
        objective: Objective::Channels,
    }
}

pub(crate) fn tuned(dir: &Path, targets: &[f64]) -> Outcome {
    tune::run(&options(dir, targets)).unwrap()
}

/// The message of what `tune` refuses.
pub(crate) fn refusal(dir: &Path) -> String {
    format!("{:#}", tune::run(&options(dir, &[10.0])).unwrap_err())
}
