//! Sweeps of whole tokens.

use super::*;

/// The same with whole tokens: prices of being ready, of each projection and of mixes are there, products' stretches are
/// the trace's rows, and the kind is told.
#[test]
fn a_sweep_of_whole_tokens_becomes_two_files_and_a_tuned_result() {
    for format in [Format::AnyPrec, Format::LutGemm] {
        let dir = tempfile::tempdir().unwrap();
        let options = token_options(&dir.path().join("nsys"), format);
        let outcome = sweep(&mut ByClock::default(), &options).unwrap();
        let measured = outcome.measured.as_ref().unwrap();
        let said = outcome.to_string();
        assert!(said.contains("whole tokens") && said.contains("ready to compensate, nothing selected"), "{said}");
        assert_eq!((measured.capture.kind, measured.capture.layers), (Kind::Tokens, LAYERS));
        assert!(measured.capture.layers_ns > 0 && measured.capture.host_link <= measured.capture.device_memory);
        let left: Vec<_> = fs::read_dir(&options.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "nothing but the two files is left: {left:?}");

        let profile = read(&options);
        assert_eq!(profile.capture.as_ref().unwrap(), &measured.capture);
        let db = rusqlite::Connection::open(&outcome.sqlite).unwrap();
        let kind = "SELECT value FROM META_DATA_CAPTURE WHERE name = 'DECDEC_KIND'";
        assert_eq!(db.query_row(kind, [], |row| row.get::<_, String>(0)).unwrap(), "tokens");
        // At both n_tb: nothing, each projection at both k_chunk, the usual mixes of the least and every one of the most.
        let single = |i: usize| [256, 1024].map(|k| std::array::from_fn(|p| if p == i { k } else { 0 }));
        let mut expected: Vec<[usize; 4]> = (0..4).flat_map(single).chain(profile::every_mix(&[0, 1024])).collect();
        expected.extend([[256; 4], [0, 0, 256, 256]]);
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(expected.len(), CHOICES);
        for n_tb in [1, 2] {
            let of = profile.tokens.iter().filter(|token| token.n_tb == n_tb);
            let mut found: Vec<_> = of.map(|token| token.k_chunks).collect();
            found.sort_unstable();
            assert_eq!(found, expected);
        }
        let pairs = profile.kernels.iter().filter(|(line, _)| matches!(line.role, Role::Concurrent(_))).count() / 2;
        assert_eq!(pairs, profile.tokens.len() * 4 * LAYERS);
        assert!(profile.tokens.iter().all(|token| token.token_ns > 0 && token.base_ns > 0));
        tunes(&options, dir.path());
    }
}

/// What [`token_options`] has measured at each `n_tb`.
const CHOICES: usize = 22;

/// Of 64 channels, 16 and all of them; whatever they cost.
fn token_options(dir: &Path, format: Format) -> Options {
    Options {
        kind: Some(Kind::Tokens),
        max_n_tb: Some(2),
        max_k_chunk: None,
        k_chunks: Some(vec![256, 1024]),
        dearest: 1e3,
        choices: profile::every_mix(&[0, 1024]),
        ..options(dir, format)
    }
}

/// A sweep of whole tokens that was cut off goes on; what was measured is not measured again.
#[test]
fn an_interrupted_sweep_of_whole_tokens_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let options = token_options(dir.path(), Format::AnyPrec);
    // Calls: one for the layers' time, four to set up, one for the base, then one per configuration.
    let mut faulty = Faulty { clock: ByClock::default(), calls: 0, at: 6 + 10, zero: false };
    let error = format!("{:#}", sweep(&mut faulty, &options).unwrap_err());
    assert!(error.contains("unplugged"), "{error}");
    assert!(!options.identity.trace(dir.path()).exists());
    let mut whole = Faulty { clock: ByClock::default(), calls: 0, at: 0, zero: false };
    let measured = sweep(&mut whole, &options).unwrap().measured.unwrap();
    assert_eq!((measured.resumed, measured.configurations), (9, 2 * CHOICES));
    assert_eq!(whole.calls, 2 + measured.configurations - 9, "a base for each n_tb, and what was missing");
    assert_eq!(read(&options).tokens.len(), 2 * CHOICES);
}

/// A profile of an older format, finished or not, is neither taken for one of this format nor lost without a word.
#[test]
fn a_profile_of_an_older_format_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), Format::AnyPrec);
    let sqlite = sweep(&mut ByClock::default(), &options).unwrap().sqlite;
    let older = "DELETE FROM META_DATA_CAPTURE WHERE name IN ('DECDEC_FORMAT', 'DECDEC_KIND')";
    rusqlite::Connection::open(&sqlite).unwrap().execute(older, []).unwrap();
    let before = fs::read(&sqlite).unwrap();
    let error = format!("{:#}", sweep(&mut ByClock::default(), &options).unwrap_err());
    assert!(error.contains("a profile of format 1, this program reads 2: take it again with"), "{error}");
    assert_eq!(fs::read(&sqlite).unwrap(), before);
    let again = Options { overwrite: true, ..options };
    assert!(sweep(&mut ByClock::default(), &again).unwrap().measured.is_some());
}

/// Tuned and verified with real tokens: each target holds, and nothing that was measured and holds is worth more.
#[test]
fn what_is_found_in_whole_tokens_holds() {
    let dir = tempfile::tempdir().unwrap();
    let options = token_options(&dir.path().join("nsys"), Format::AnyPrec);
    sweep(&mut ByClock::default(), &options).unwrap();
    verified(&options, true, |outcome, _| {
        let worth: Vec<_> = outcome.tunings.iter().map(|tuning| tuning.found.fine.sum_k()).collect();
        assert!(worth[0] <= worth[2] && outcome.tunings[2].found.fine.k_chunks() == [1024; 4], "{worth:?}");
    });
}
