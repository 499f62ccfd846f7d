//! Profiles that are there already: finished, interrupted, or of something else.

use super::*;

#[test]
fn what_is_there_is_kept_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), Format::AnyPrec);
    let first = sweep(&mut ByClock::default(), &options).unwrap();
    let before = fs::read(&first.sqlite).unwrap();
    let second = sweep(&mut ByClock::default(), &options).unwrap();
    assert!(second.measured.is_none());
    assert!(second.to_string().contains("kept"), "{second}");
    assert_eq!(fs::read(&first.sqlite).unwrap(), before);
    fs::remove_file(&first.trace).unwrap();
    let error = sweep(&mut ByClock::default(), &options).unwrap_err().to_string();
    assert!(error.contains("use --overwrite"), "{error}");
    options.overwrite = true;
    assert!(sweep(&mut ByClock::default(), &options).unwrap().measured.is_some());
    assert_ne!(fs::read(&first.sqlite).unwrap(), before, "measured again");
}

#[test]
fn an_interrupted_sweep_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), Format::AnyPrec);
    // Calls: four to set up, then one per configuration.
    let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 4 + 6, zero: false };
    let error = format!("{:#}", sweep(&mut faulty, &options).unwrap_err());
    assert!(error.contains("unplugged"), "{error}");
    assert!(!options.identity.trace(dir.path()).exists());
    let mut whole = Faulty { clock: ByClock::default(), calls: 0, at: 0, zero: false };
    let outcome = sweep(&mut whole, &options).unwrap();
    let measured = outcome.measured.unwrap();
    assert_eq!(measured.resumed, 5);
    assert_eq!(whole.calls, 4 + measured.configurations - 5, "what was measured is not measured again");
    assert_eq!(measured.capture.k_chunks, [1, 2, 3]);
    let (bases, pairs) = expected(&grid::useful_n_tbs(&tiny(), 1, 5).unwrap());
    assert_eq!(read(&options).kernels.len(), 24 + bases + 2 * pairs);
    // The second process' clock started anew, and yet every pair found its own times.
    let mut last = 0;
    for (_, record) in read(&options).kernels.iter().filter(|(line, _)| matches!(line.kernel, Kernel::Gemv(_))) {
        assert!(record.start_ns >= last);
        last = record.end_ns;
    }
}

#[test]
fn an_interrupted_sweep_with_other_options_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), Format::AnyPrec);
    let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 9, zero: false };
    sweep(&mut faulty, &options).unwrap_err();
    options.tokens = 1;
    let outcome = sweep(&mut ByClock::default(), &options).unwrap();
    assert_eq!(outcome.measured.unwrap().resumed, 0);
    fs::write(options.identity.sqlite(dir.path()).with_extension("sqlite.partial"), "rubbish").unwrap();
    options.overwrite = true;
    assert!(sweep(&mut ByClock::default(), &options).is_ok());
}

/// The same name and the same flags, but the checkpoint at that path is another one by now.
#[test]
fn an_interrupted_sweep_of_another_model_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), Format::AnyPrec);
    let interrupt = || {
        let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 4 + 6, zero: false };
        sweep(&mut faulty, &options).unwrap_err();
    };
    interrupt();
    assert_eq!(sweep_of(7, &mut ByClock::default(), &options).unwrap().measured.unwrap().resumed, 5);
    fs::remove_file(options.identity.trace(dir.path())).unwrap();
    fs::remove_file(options.identity.sqlite(dir.path())).unwrap();
    interrupt();
    assert_eq!(sweep_of(8, &mut ByClock::default(), &options).unwrap().measured.unwrap().resumed, 0);
}

/// Makes a database say that it was taken on another device.
fn on_another_card(sqlite: &Path) {
    let db = rusqlite::Connection::open(sqlite).unwrap();
    let changed = "UPDATE META_DATA_CAPTURE SET value = 'Another Card' WHERE name = 'DECDEC_DEVICE_NAME'";
    assert_eq!(db.execute(changed, []).unwrap(), 1);
}

#[test]
fn two_devices_do_not_take_turns_with_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), Format::AnyPrec);
    let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 4 + 6, zero: false };
    sweep(&mut faulty, &options).unwrap_err();
    // Half of a sweep of another device, then a whole one: neither is dropped nor taken for this one's.
    let (sqlite, trace) = (options.identity.sqlite(dir.path()), options.identity.trace(dir.path()));
    for there in [sqlite.with_extension("sqlite.partial"), sqlite.clone()] {
        if there == sqlite {
            options.overwrite = true;
            sweep(&mut ByClock::default(), &options).unwrap();
            options.overwrite = false;
        }
        on_another_card(&there);
        let before = fs::read(&there).unwrap();
        let error = sweep(&mut ByClock::default(), &options).unwrap_err().to_string();
        assert!(error.contains("is of Another Card (cpu), this is ") && error.contains("another prefix"), "{error}");
        assert_eq!(fs::read(&there).unwrap(), before);
        assert_eq!(trace.exists(), there == sqlite);
    }
    options.overwrite = true;
    assert!(sweep(&mut ByClock::default(), &options).unwrap().measured.is_some());
}

#[test]
fn a_second_writer_waits_or_takes_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), Format::AnyPrec);
    let sqlite = options.identity.sqlite(dir.path());
    let first = sweep(&mut ByClock::default(), &options).unwrap().measured.unwrap().capture;
    let writer = nsys::Writer::create(&sqlite, &first).unwrap();
    for overwrite in [false, true] {
        let options = Options { overwrite, ..options.clone() };
        let error = sweep(&mut ByClock::default(), &options).unwrap_err().to_string();
        assert!(error.contains("another process is writing"), "{error}");
    }
    assert!(sqlite.with_extension("sqlite.partial").exists(), "the first one's work is left alone");
    let other = Identity { prefix: "other".into(), ..options.identity.clone() };
    sweep(&mut ByClock::default(), &Options { identity: other, ..options.clone() }).unwrap();
    drop(writer);
    assert!(sweep(&mut ByClock::default(), &options).unwrap().measured.is_some());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "two profiles and nothing else");
}
