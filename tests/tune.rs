//! The tuner: known optima, noise, the manual's own example, files that are refused, what is written.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use decdec::backend::DeviceInfo;
use decdec::config::Projection;
use decdec::nsys::trace::{self, Kernel, Line, Role};
use decdec::nsys::{Algo, Capture, Identity, KernelRecord, Precision, Writer};
use decdec::tune::search::{Choice, Module, Timings};
use decdec::tune::{self, Directories, Options, Outcome, Tuned};
use proptest::prelude::*;
use rusqlite::Connection;

const LLAMA: [(usize, usize); 4] = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)];

/// Base times and, by module, `(n_tb, times at k_chunk 1, 2, …)`, in µs.
#[derive(Debug)]
struct Synthetic {
    base: [f64; 4],
    curves: [Vec<(usize, Vec<f64>)>; 4],
}

impl Synthetic {
    /// The shape of the manual's example: 104.53 µs, `k_chunk` 4, 4, 5, 5 at 10 %.
    fn manual() -> Self {
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

    fn timings(&self) -> Timings {
        let mut shapes = LLAMA.into_iter();
        let mut base = self.base.into_iter();
        Timings(self.curves.each_ref().map(|curves| {
            let measured =
                curves.iter().map(|(n_tb, us)| (*n_tb, us.iter().enumerate().map(|(k, &us)| (k + 1, us)).collect()));
            Module::new(shapes.next().unwrap(), base.next().unwrap(), measured.collect())
        }))
    }

    /// As kernels of a run of three tokens: the base product, then pairs in which compensation starts first.
    fn kernels(&self) -> Vec<(Line, KernelRecord)> {
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

fn ns(us: f64) -> u64 {
    (us * 1e3).round() as u64
}

fn identity() -> Identity {
    Identity {
        prefix: "test".into(),
        model: "Meta-Llama-3-8B-Instruct".into(),
        precision: Precision::Fp16,
        algo: Algo::Sqllm,
        bits: 3,
    }
}

fn capture() -> Capture {
    Capture {
        identity: identity(),
        shapes: LLAMA,
        weights: "random:0".into(),
        clock: "invented".into(),
        device: "cuda:0".into(),
        device_name: "Test Card".into(),
        driver: "1.2".into(),
        tokens: 3,
        layers: 1,
        device_memory: 3e12,
        host_link: 5e10,
        n_tbs: vec![4, 8, 12, 14],
        k_chunks: (1..=6).collect(),
    }
}

/// Writes both files of `kernels` into `dir`, as a sweep does.
fn write(dir: &Path, kernels: &[(Line, KernelRecord)]) {
    let (trace, sqlite) = (identity().trace(dir), identity().sqlite(dir));
    let mut writer = Writer::create(&sqlite, &capture()).unwrap();
    writer.append(kernels).unwrap();
    writer.finish(&trace, &sqlite).unwrap();
}

fn options(dir: &Path, targets: &[f64]) -> Options {
    let (identity, dir) = (identity(), dir.to_path_buf());
    Options { identity, dir, shapes: [None; 4], targets: targets.to_vec(), exhaustive: false }
}

fn tuned(dir: &Path, targets: &[f64]) -> Outcome {
    tune::run(&options(dir, targets)).unwrap()
}

/// The message of what `tune` refuses.
fn refusal(dir: &Path) -> String {
    format!("{:#}", tune::run(&options(dir, &[10.0])).unwrap_err())
}

#[test]
fn the_manuals_example_comes_out_word_for_word() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    let report = tuned(dir.path(), &[10.0]).to_string();
    let expected = "\
========================== Fine-grained Search ===========================
Fine-grained k_chunk:
    qkv (4096 x 6144): 4 / 1024 (n_tb=12)
    o (4096 x 4096): 4 / 1024 (n_tb=8)
    gu (4096 x 28672): 5 / 1024 (n_tb=14)
    d (14336 x 4096): 5 / 1024 (n_tb=14)
Fine-grained layer time: 104.53 us (Slowdown: 1.10)
    qkv (4096 x 6144): 16.01 us
    o (4096 x 4096): 13.08 us
    gu (4096 x 28672): 49.29 us
    d (14336 x 4096): 26.15 us
========================== End Tuning ===========================

~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Tuning Results: Meta-Llama-3-8B-Instruct sqllm 3-bit @ 10.0% slowdown
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Target Slowdown          : 10.0 %
Best n_tb                : 14
k_chunk per module       : 4, 4, 5, 5
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
";
    assert!(report.ends_with(expected), "{report}");
}

#[test]
fn several_targets_end_in_one_table() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    let report = tune::run(&Options { exhaustive: true, ..options(dir.path(), &[2.5, 10.0]) }).unwrap().to_string();
    let table: Vec<_> = report.lines().rev().take(6).collect();
    let row = |start: &str| table.iter().find(|l| l.trim_start().starts_with(start)).copied().unwrap_or("missing");
    assert!(row("2.5").contains(" 14 "), "{report}");
    assert!(row("10.0").contains("4, 4, 5, 5"), "{report}");
    assert!(report.contains("@ 2.5% slowdown") && report.contains("@ 10.0% slowdown"), "{report}");
    assert!(report.contains("Exhaustive layer time"), "{report}");
}

#[test]
fn one_spike_does_not_stop_the_search() {
    let mut noisy = Synthetic::manual();
    let budget = noisy.base.iter().sum::<f64>() * 1.1;
    let calm = noisy.timings().search(budget).fine;
    for curves in &mut noisy.curves {
        curves[1].1[1] *= 3.0;
    }
    let found = noisy.timings().search(budget).fine;
    assert!(found.us() <= budget);
    assert_eq!(found.k_chunks(), calm.k_chunks());
    // Negative control: without smoothing, a spike three times as high fits no target of 10 %.
    assert!(noisy.curves[0][1].1[1] > 1.1 * noisy.base[0]);
}

#[test]
fn spikes_below_the_base_are_noise_too() {
    let mut noisy = Synthetic::manual();
    noisy.curves[2][1].1[5] = 1.0;
    let timings = noisy.timings();
    for (module, base) in timings.0.iter().zip(noisy.base) {
        for curve in module.curves.values() {
            assert_eq!(curve[0], (0, base));
            assert!(curve.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1), "{curve:?}");
        }
    }
}

#[test]
fn where_nothing_fits_nothing_is_compensated_and_said_so() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    let outcome = tuned(dir.path(), &[0.0]);
    assert_eq!(outcome.tunings[0].found.fine.k_chunks(), [0; 4]);
    assert_eq!(outcome.tunings[0].found.excluded.len(), 4);
    assert_eq!(outcome.tunings[0].found.fine.us(), outcome.timings.base_us());
    assert!(outcome.to_string().contains("no common k_chunk fits"), "{outcome}");
    assert_eq!(outcome.tuned(&outcome.tunings[0]).k_chunks, [0; 4]);
}

#[test]
fn where_everything_fits_the_edge_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    let outcome = tuned(dir.path(), &[1000.0]);
    assert_eq!(outcome.tunings[0].found.fine.k_chunks(), [6; 4]);
    assert_eq!(outcome.tunings[0].found.clamped.len(), 4);
    assert!(outcome.to_string().contains("profile with --max-k-chunk 12"), "{outcome}");
}

#[test]
fn the_smallest_module_is_left_out_first_and_may_come_back() {
    // At k_chunk 1, o alone breaks the target; without it 3 fits everywhere, and nothing is left for o.
    let one = |times: &[f64]| vec![(4, times.to_vec())];
    let mut table = Synthetic {
        base: [10.0; 4],
        curves: [
            one(&[10.1, 10.2, 10.3]),
            one(&[19.0, 19.5, 20.0]),
            one(&[10.1, 10.2, 10.3]),
            one(&[10.1, 10.2, 10.3]),
        ],
    };
    let found = table.timings().search(41.0);
    assert_eq!(found.excluded, [Projection::O]);
    assert_eq!(found.fine.k_chunks(), [3, 0, 3, 3]);
    // The others too dear for a common k_chunk: o comes back in the second phase.
    table.curves = [one(&[11.0]), one(&[10.2]), one(&[10.5]), one(&[10.9])];
    let found = table.timings().search(41.8);
    assert_eq!(found.excluded, [Projection::O, Projection::Qkv]);
    assert_eq!(found.global.k_chunks(), [0, 0, 1, 1]);
    assert_eq!(found.fine.k_chunks(), [0, 1, 1, 1]);
}

/// A random table: base times and times that grow or not, two to four `n_tb` per module.
fn tables() -> impl Strategy<Value = Synthetic> {
    let curve = (2usize..12, prop::collection::vec(0.0f64..3.0, 1..5));
    let module = (5.0f64..50.0, prop::collection::vec(curve, 1..4));
    prop::collection::vec(module, 4).prop_map(|modules| {
        let base = std::array::from_fn(|i| modules[i].0);
        let curves = std::array::from_fn(|i| {
            let (base, curves) = &modules[i];
            let by_n_tb: BTreeMap<_, _> =
                curves.iter().map(|(n, added)| (*n, added.iter().map(|a| base + a).collect())).collect();
            by_n_tb.into_iter().collect()
        });
        Synthetic { base, curves }
    })
}

/// Every choice that the rules allow, by brute force: the best Σ `k_chunk`, then the least time.
fn brute_force(timings: &Timings, budget: f64) -> (usize, f64) {
    let mut best = (0, timings.base_us());
    for most in timings.n_tbs() {
        let curves = timings.0.each_ref().map(|m| {
            let curve = m.curves.range(..=most).next_back().map(|(_, curve)| curve.clone());
            curve.unwrap_or_else(|| vec![(0, m.base_us)])
        });
        for a in &curves[0] {
            for b in &curves[1] {
                for c in &curves[2] {
                    for d in &curves[3] {
                        let (k, us) = (a.0 + b.0 + c.0 + d.0, a.1 + b.1 + c.1 + d.1);
                        if us <= budget && (k > best.0 || k == best.0 && us < best.1) {
                            best = (k, us);
                        }
                    }
                }
            }
        }
    }
    best
}

proptest! {
    #[test]
    fn the_search_keeps_its_promises(table in tables(), low in 0.0f64..0.3, more in 0.0f64..0.3) {
        let timings = table.timings();
        let (budget, wider) = (timings.base_us() * (1.0 + low), timings.base_us() * (1.0 + low + more));
        let found = timings.search(budget);
        let at_least = |a: &Choice, b: &Choice| a.k_chunks().iter().zip(b.k_chunks()).all(|(a, b)| *a >= b);
        prop_assert!(found.fine.us() <= budget, "above the target");
        prop_assert!(at_least(&found.fine, &found.global), "worse than the global phase");
        let exhaustive = timings.exhaustive(budget);
        prop_assert!(exhaustive.us() <= budget);
        let (sum, us) = brute_force(&timings, budget);
        prop_assert_eq!(exhaustive.sum_k(), sum);
        prop_assert!((exhaustive.us() - us).abs() < 1e-9);
        prop_assert!(found.fine.sum_k() <= sum);
        // Nothing single fits any more.
        for (i, module) in timings.0.iter().enumerate() {
            let now = found.fine.modules[i];
            let curve = module.curves.range(..=found.fine.n_tb).next_back();
            let next = curve.and_then(|(_, curve)| curve.iter().find(|p| p.0 > now.k_chunk));
            prop_assert!(next.is_none_or(|&(_, us)| found.fine.us() - now.us + us > budget - 1e-9));
        }
        // Monotone: modules compensated, then their common k_chunk, then the sum.
        let then = timings.search(wider);
        let common = |choice: &Choice| choice.k_chunks().into_iter().max().unwrap_or(0);
        let rank = |f: &tune::search::Found| (4 - f.excluded.len(), common(&f.global));
        prop_assert!(rank(&then) >= rank(&found), "a wider target gave {:?} after {:?}", then, found);
        if rank(&then) == rank(&found) {
            prop_assert!(then.fine.sum_k() >= found.fine.sum_k());
        }
        prop_assert!(timings.exhaustive(wider).sum_k() >= exhaustive.sum_k());
    }
}

#[test]
fn every_line_of_a_trace_reads_back() {
    for algo in [Algo::Sqllm, Algo::Awq] {
        let lines: Vec<_> = Synthetic::manual().kernels().into_iter().map(|(line, _)| line).collect();
        let text: String = lines.iter().map(|line| format!("{}\n", line.display(algo))).collect();
        assert_eq!(trace::parse(&text, algo).unwrap(), lines);
    }
    let line = Line { role: Role::Concurrent(7), kernel: Kernel::Dec(3) };
    assert_eq!(line.display(Algo::Awq).to_string(), "concurrent 7 fused_dec_kernel 3");
    let line = Line { role: Role::Standalone, kernel: Kernel::Gemv(Projection::GateUp) };
    assert_eq!(line.display(Algo::Awq).to_string(), "standalone nqmv_bias gu");
}

#[test]
fn traces_that_are_not_of_the_format_are_refused() {
    let good = "standalone matmul_kbit_32 qkv\n";
    for (text, says) in [
        ("", "empty"),
        ("standalone matmul_kbit_32 qkv\nwarm matmul_kbit_32 o\n", "trace line 2"),
        ("standalone matmul_kbit_32 up\n", "module \"up\", qkv, o, gu or d is expected"),
        ("standalone fused_dec_kernel 4\n", "only matmul_kbit_32 runs standalone"),
        ("standalone nqmv_bias qkv\n", "belongs to --algo awq"),
        ("standalone gemv qkv\n", "unknown kernel \"gemv\""),
        ("standalone matmul_kbit_32\n", "something is expected after"),
        ("standalone matmul_kbit_32 qkv o\n", "nothing is expected after"),
        ("concurrent 0 fused_dec_kernel 1025\n", "0 to 1024 are allowed"),
        ("concurrent -1 fused_dec_kernel 4\n", "not the number of a pair"),
        ("concurrent 1 fused_dec_kernel 4\n", "without gaps"),
        ("concurrent 0 fused_dec_kernel 4\n", "0 base kernels and 1 compensation kernels"),
        ("concurrent 18446744073709551615 matmul_kbit_32 o\n", "without gaps"),
    ] {
        let error = format!("{:#}", trace::parse(text, Algo::Sqllm).unwrap_err());
        assert!(error.contains(says), "{text:?}: {error}");
    }
    assert_eq!(trace::parse(good, Algo::Sqllm).unwrap().len(), 1);
}

/// Rewrites the SQLite file by `sql` after a good profile was written, and says how `tune` refuses it.
fn spoiled(sql: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    assert!(tune::run(&options(dir.path(), &[10.0])).is_ok(), "good before it is spoiled");
    Connection::open(identity().sqlite(dir.path())).unwrap().execute_batch(sql).unwrap();
    refusal(dir.path())
}

#[test]
fn databases_that_do_not_fit_are_refused_with_what_was_found() {
    const KERNELS: &str = "CUPTI_ACTIVITY_KIND_KERNEL";
    let short = "(SELECT id FROM StringIds WHERE value = 'fused_dec_kernel')";
    for (sql, says) in [
        (format!("DELETE FROM {KERNELS} WHERE rowid = 1"), "names matmul_kbit_32 "),
        (format!("DELETE FROM {KERNELS} WHERE shortName = {short}"), "but 0 such kernels ran"),
        (format!("UPDATE {KERNELS} SET start = 0, end = 0 WHERE rowid = 9"), "from 0 to 0 ns"),
        (format!("UPDATE {KERNELS} SET end = start WHERE rowid = 9"), "a kernel without a time"),
        (format!("UPDATE {KERNELS} SET gridX = -3 WHERE rowid = 9"), "is -3"),
        (format!("UPDATE {KERNELS} SET gridX = 0 WHERE shortName = {short}"), "0 thread blocks"),
        (format!("UPDATE {KERNELS} SET start = 'soon' WHERE rowid = 9"), "a row of"),
        (format!("DROP TABLE {KERNELS}"), "only META_DATA_CAPTURE, META_DATA_EXPORT"),
        (format!("ALTER TABLE {KERNELS} RENAME COLUMN gridX TO grid"), "no column gridX"),
        (
            format!(
                "ALTER TABLE {KERNELS} RENAME COLUMN shortName TO a; ALTER TABLE {KERNELS} RENAME COLUMN demangledName TO b"
            ),
            "neither shortName nor demangledName",
        ),
        ("UPDATE StringIds SET value = 'nqmv_bias' WHERE value = 'matmul_kbit_32'".into(), "taken with --algo awq"),
        (
            "UPDATE META_DATA_CAPTURE SET value = 'Phi-3-medium-4k-instruct' WHERE name = 'DECDEC_MODEL'".into(),
            "is Phi-3-medium-4k-instruct, not Meta-Llama-3-8B-Instruct",
        ),
        (
            "UPDATE META_DATA_CAPTURE SET value = '4' WHERE name = 'DECDEC_BITWIDTH'".into(),
            "--bitwidth of this profile is 4, not 3",
        ),
        (
            "UPDATE META_DATA_CAPTURE SET value = '4096' WHERE name = 'DECDEC_SHAPE_O'".into(),
            "two numbers are expected",
        ),
        ("DELETE FROM META_DATA_CAPTURE WHERE name = 'DECDEC_CLOCK'".into(), "lacks DECDEC_CLOCK"),
    ] {
        let error = spoiled(&sql);
        assert!(error.contains(says), "{sql}: {error}");
    }
}

#[test]
fn files_that_are_not_a_profile_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(refusal(dir.path()).contains("run decdec profile"), "{}", refusal(dir.path()));
    write(dir.path(), &Synthetic::manual().kernels());
    let sqlite = identity().sqlite(dir.path());
    let good = fs::read(&sqlite).unwrap();
    fs::write(&sqlite, "not a database at all").unwrap();
    assert!(refusal(dir.path()).contains("begins with \"not a database a\""), "{}", refusal(dir.path()));
    fs::write(&sqlite, &good[..5000]).unwrap();
    assert!(!refusal(dir.path()).is_empty());
    fs::write(&sqlite, b"").unwrap();
    assert!(refusal(dir.path()).contains("not as a SQLite file does"));
    fs::write(&sqlite, &good).unwrap();
    let other = Options { shapes: [Some((5120, 7680)), None, None, None], ..options(dir.path(), &[10.0]) };
    let error = tune::run(&other).unwrap_err().to_string();
    assert!(error.contains("qkv is 5120 x 7680, but the profile is of 4096 x 6144"), "{error}");
    for (targets, says) in [(vec![], "no target"), (vec![-1.0], "-1 %"), (vec![f64::NAN], "NaN %")] {
        let error = tune::run(&options(dir.path(), &targets)).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// A real Nsight Systems writes no metadata of ours, other kernels too, and names in one way or another.
#[test]
fn exports_of_several_schema_versions_read_alike() {
    let dir = tempfile::tempdir().unwrap();
    let kernels = Synthetic::manual().kernels();
    write(dir.path(), &kernels);
    let want = tuned(dir.path(), &[10.0]);
    let gemv = "void matmul_kbit_32<(int)3, (bool)1>(const unsigned int *, __half *)";
    let dec = "void (anonymous namespace)::fused_dec_kernel<float>(const int4 *, int)";
    let ids = "CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
        INSERT INTO StringIds VALUES (5, 'ampere_gemm'), (7, 'matmul_kbit_32'), (8, 'fused_dec_kernel'),
        (70, 'GEMV'), (80, 'DEC'), (81, 'fused_dec_kernel_reference');"
        .replace("'GEMV'", &format!("'{gemv}'"))
        .replace("'DEC'", &format!("'{dec}'"));
    let variants = [
        ("shortName INTEGER, demangledName INTEGER", ids.clone(), ["7, 70", "8, 80"], "5, 5"),
        ("demangledName INTEGER, mangledName INTEGER", ids.clone(), ["70, 7", "80, 8"], "5, 81"),
        (
            "shortName INTEGER, demangledName INTEGER, graphNodeId INTEGER",
            ids,
            ["NULL, 70, 1", "NULL, 80, 2"],
            "81, 5, 3",
        ),
        ("demangledName TEXT", String::new(), [&format!("'{gemv}'")[..], &format!("'{dec}'")], "'ampere_gemm'"),
    ];
    for (columns, setup, names, stranger) in variants {
        let sqlite = identity().sqlite(dir.path());
        fs::remove_file(&sqlite).unwrap();
        let db = Connection::open(&sqlite).unwrap();
        db.execute_batch(&format!(
            "BEGIN; {setup} CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (gridX INTEGER, end INTEGER, start INTEGER, {columns});
             CREATE TABLE TARGET_INFO_GPU (id INTEGER, name TEXT); INSERT INTO TARGET_INFO_GPU VALUES (0, 'Test Card');"
        ))
        .unwrap();
        // Rows in no order of time, as the exporter leaves them.
        for (line, r) in kernels.iter().rev() {
            let name = names[usize::from(matches!(line.kernel, Kernel::Dec(_)))];
            let row = format!("({}, {}, {}, {name})", r.grid[0], r.end_ns, r.start_ns);
            db.execute(&format!("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES {row}"), []).unwrap();
        }
        db.execute_batch(&format!("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (1, 0, 0, {stranger}); COMMIT;"))
            .unwrap();
        drop(db);
        let unknown = refusal(dir.path());
        assert!(unknown.contains("does not say how large qkv is: give --qkv IN OUT"), "{unknown}");
        let got = tune::run(&Options { shapes: LLAMA.map(Some), ..options(dir.path(), &[10.0]) }).unwrap();
        assert_eq!(got.table, want.table, "{columns}");
        assert_eq!(got.tunings, want.tunings);
        assert_eq!(got.device_name.as_deref(), Some("Test Card"));
        assert_eq!(got.tuned(&got.tunings[0]).device.name, "Test Card");
    }
}

#[test]
fn the_stock_client_answers_the_parsers_query() {
    if Command::new("sqlite3").arg("--version").output().is_err() {
        eprintln!("skipped: no sqlite3 client (apt install sqlite3)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernels = Synthetic::manual().kernels();
    write(dir.path(), &kernels);
    let query = "SELECT s.value, k.start, k.end, k.gridX FROM CUPTI_ACTIVITY_KIND_KERNEL AS k
        JOIN StringIds AS s ON k.shortName = s.id ORDER BY k.start";
    let output = Command::new("sqlite3").arg(identity().sqlite(dir.path())).arg(query).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut want: Vec<_> = kernels
        .iter()
        .map(|(line, r)| {
            let name = if matches!(line.kernel, Kernel::Dec(_)) { "fused_dec_kernel" } else { "matmul_kbit_32" };
            (r.start_ns, format!("{name}|{}|{}|{}", r.start_ns, r.end_ns, r.grid[0]))
        })
        .collect();
    want.sort();
    let want: Vec<_> = want.into_iter().map(|(_, row)| row).collect();
    assert_eq!(String::from_utf8(output.stdout).unwrap().lines().collect::<Vec<_>>(), want);
}

#[test]
fn what_is_written_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    let outcome = tuned(dir.path(), &[2.5, 10.0]);
    let at = |name: &str| dir.path().join(name);
    let to = Directories { csv: at("csv"), plots: at("plots"), tuned: at("tuned") };
    let written = outcome.write(&to).unwrap();
    assert_eq!(written.len(), 1 + 5 + 2);

    let csv = fs::read_to_string(&written[0]).unwrap();
    let mut lines = csv.lines();
    assert_eq!(
        lines.next().unwrap(),
        "model,algo,bit_width,module,standalone/concurrent,n_tb,k_chunk,decdec_time_us,gemv_time_us,dec_time_us,orderings"
    );
    assert_eq!(lines.next().unwrap(), "Meta-Llama-3-8B-Instruct,sqllm,3,qkv,standalone,0,0,14.000,14.000,0.000,gG:3");
    let pair = "Meta-Llama-3-8B-Instruct,sqllm,3,d,concurrent,14,5,26.150,26.100,26.050,dgDG:3";
    assert!(csv.contains(pair), "{csv}");
    assert_eq!(csv.lines().count(), 1 + 4 + 4 * 2 * 6);

    for png in &written[1..6] {
        let bytes = fs::read(png).unwrap();
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 10_000, "{}: {} bytes", png.display(), bytes.len());
    }

    assert!(written[6].ends_with("tuned/test_Meta-Llama-3-8B-Instruct_fp16_sqllm_3_2.5.json"), "{:?}", written[6]);
    let read = Tuned::read(&written[7]).unwrap();
    assert_eq!(read, outcome.tuned(&outcome.tunings[1]));
    assert_eq!((read.n_tb, read.k_chunks, read.target_slowdown), (14, [4, 4, 5, 5], 10.0));
    assert!(read.slowdown <= 10.0 && read.slowdown > 9.9);
    let mut device = DeviceInfo {
        id: "cuda:0".into(),
        name: "Test Card".into(),
        driver: "1.3".into(),
        max_n_tb: 132,
        max_tokens: 1,
        lookahead: 0,
    };
    read.check(&device, LLAMA, 3).unwrap();
    assert!(read.check(&device, LLAMA, 4).unwrap_err().to_string().contains("this model has 4 bits"));
    device.name = "Other Card".into();
    assert!(read.check(&device, LLAMA, 3).unwrap_err().to_string().contains("tuned on Test Card"));
}

#[test]
fn tuned_files_that_are_not_sound_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    let outcome = tuned(dir.path(), &[10.0]);
    let good = serde_json::to_string(&outcome.tuned(&outcome.tunings[0])).unwrap();
    let path = dir.path().join("tuned.json");
    for (from, to, says) in [
        ("\"format\":1", "\"format\":2", "format 2, this program reads 1"),
        ("\"n_tb\":14", "\"n_tb\":0", "n_tb is 0"),
        ("[4,4,5,5]", "[4,4,5,2000]", "k_chunk is 2000, 0 to 1024 are allowed"),
        ("[4,4,5,5]", "[4,4,5]", "is no tuned result"),
        ("{", "[", "is no tuned result"),
    ] {
        assert!(good.contains(from), "{good}");
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let error = format!("{:#}", Tuned::read(&path).unwrap_err());
        assert!(error.contains(says), "{to}: {error}");
    }
    fs::write(&path, good).unwrap();
    assert!(Tuned::read(&path).is_ok());
}
