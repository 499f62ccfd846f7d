//! The two files of a profile: what reads alike, and what is refused.

use std::fs;
use std::process::Command;

use decdec::config::Projection;
use decdec::format::Format;
use decdec::nsys::trace::{self, Kernel, Line, Role};
use decdec::tune::{self, Options};
use rusqlite::Connection;

use crate::{LLAMA, Synthetic, identity, options, refusal, tuned, write};

#[test]
fn every_line_of_a_trace_reads_back() {
    for algo in [Format::AnyPrec, Format::LutGemm] {
        let lines: Vec<_> = Synthetic::manual().kernels().into_iter().map(|(line, _)| line).collect();
        let text: String = lines.iter().map(|line| format!("{}\n", line.display(algo))).collect();
        assert_eq!(trace::parse(&text, algo).unwrap(), lines);
    }
    let line = Line { role: Role::Concurrent(7), kernel: Kernel::Dec(3) };
    assert_eq!(line.display(Format::LutGemm).to_string(), "concurrent 7 fused_dec_kernel 3");
    let line = Line { role: Role::Standalone, kernel: Kernel::Gemv(Projection::GateUp) };
    assert_eq!(line.display(Format::LutGemm).to_string(), "standalone nqmv_bias gu");
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
        let error = format!("{:#}", trace::parse(text, Format::AnyPrec).unwrap_err());
        assert!(error.contains(says), "{text:?}: {error}");
    }
    assert_eq!(trace::parse(good, Format::AnyPrec).unwrap().len(), 1);
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
        (format!("DROP TABLE {KERNELS}"), "only DECDEC_TOKENS, META_DATA_CAPTURE"),
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
        crate::devices::skip("no sqlite3 client (apt install sqlite3)");
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
