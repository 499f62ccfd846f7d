//! Times of Nsight Systems in place of one's own.

use super::*;

/// A stand-in for `nsys`: runs what it is given, then "exports" a prepared file.
fn fake_nsys(dir: &Path, export: &Path) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && {{ echo 'Nsight Systems 2099.1'; exit 0; }}\n\
         while [ \"$1\" != --output ]; do shift; done\nout=\"$2\"; shift 2\n\
         \"$@\" || exit 1\ncp '{}' \"$out.sqlite\"\n",
        export.display()
    );
    let path = dir.join("nsys");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// What a program under `nsys` leaves: every third nanosecond count wrong, its launches named as the device
/// names them. And what `nsys` exports: the same launches with other times, after some of bandwidth's.
fn profiled_under_nsys(dir: &Path, options: &Options, missing: usize) -> (std::path::PathBuf, std::path::PathBuf) {
    struct Named(ByClock);
    impl Recorder<Cpu> for Named {
        fn clock(&self) -> String {
            "events".into()
        }
        fn record(
            &mut self,
            cpu: &Cpu,
            kinds: &[usize],
            launch: &mut dyn FnMut(usize) -> Result<()>,
        ) -> Result<Vec<Launch>> {
            let mut recorded = self.0.record(cpu, kinds, launch)?;
            for launch in &mut recorded {
                launch.gemv.name = "void anyprec_gemv<3>(int)".into();
            }
            Ok(recorded)
        }
        fn bandwidths(&mut self, _: &Cpu) -> Result<Option<Bandwidths>> {
            Ok(None)
        }
    }
    let own = dir.join("own");
    sweep(&mut Named(ByClock::default()), &Options { dir: own.clone(), ..options.clone() }).unwrap();
    // The recorder names the launch; what compensates inside of it has no name of its own.
    let db = rusqlite::Connection::open(options.identity.sqlite(&own)).unwrap();
    let launches = "shortName = (SELECT id FROM StringIds WHERE value = 'matmul_kbit_32')";
    let count: usize = db
        .query_row(&format!("SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE {launches}"), [], |row| {
            row.get::<_, i64>(0)
        })
        .unwrap() as usize;
    drop(db);
    let export = dir.join("export.sqlite");
    let db = rusqlite::Connection::open(&export).unwrap();
    db.execute_batch(
        "BEGIN; CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT); INSERT INTO StringIds VALUES (1, 'anyprec_gemv');
         CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, shortName INTEGER, gridX INTEGER);",
    )
    .unwrap();
    for i in 0..count + 5 - missing {
        // The five of the bandwidth measurement took long, the i-th of the sweep 1000 + i ns.
        let start = 1_000_000 * (i as i64 + 1);
        let ns = if i < 5 { 500_000 } else { 1000 + i as i64 - 5 };
        db.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?1, ?2, 1, 132)", [start, start + ns]).unwrap();
    }
    db.execute_batch("COMMIT").unwrap();
    (own, export)
}

#[test]
fn times_of_a_real_nsys_replace_our_own() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(&dir.path().join("nsys-files"), Format::AnyPrec);
    let (own, export) = profiled_under_nsys(dir.path(), &options, 0);
    let nsys = fake_nsys(dir.path(), &export);
    let child = |staging: &Path| vec!["cp".into(), "-R".into(), own.join(".").into(), staging.into()];
    profile::under_nsight(&nsys, &options, child).unwrap();
    let profile = read(&options);
    assert_eq!(profile.capture.unwrap().clock, "Nsight Systems 2099.1");
    let gemvs = profile.kernels.iter().filter(|(line, _)| matches!(line.kernel, Kernel::Gemv(_)));
    for (i, (_, record)) in gemvs.enumerate() {
        assert_eq!(record.end_ns - record.start_ns, 1000 + i as u64);
    }
    for pair in profile.kernels.windows(2).filter(|pair| matches!(pair[0].0.kernel, Kernel::Dec(_))) {
        let (dec, launch) = (&pair[0].1, &pair[1].1);
        assert!(launch.start_ns <= dec.start_ns && dec.end_ns <= launch.end_ns, "inside its launch");
        assert!(dec.grid[0] <= 5 && launch.grid[0] == 132);
    }
    let error = profile::under_nsight(&nsys, &options, child).unwrap_err().to_string();
    assert!(error.contains("use --overwrite"), "{error}");
    let options = Options { overwrite: true, ..options };
    let error = format!("{:#}", profile::under_nsight(&nsys, &options, |_| vec!["false".into()]).unwrap_err());
    assert!(error.contains("ended with"), "{error}");
    let error = format!("{:#}", profile::under_nsight(Path::new("/no/nsys"), &options, child).unwrap_err());
    assert!(error.contains("--nsys-path is the program nsys"), "{error}");
}

#[test]
fn an_export_that_lacks_launches_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(&dir.path().join("nsys-files"), Format::AnyPrec);
    let (own, export) = profiled_under_nsys(dir.path(), &options, 6);
    let error = nsys::adopt(&options.identity, &own, &export, &options.dir, "nsys").unwrap_err();
    assert!(format!("{error:#}").contains("anyprec_gemv was launched"), "{error:#}");
}
