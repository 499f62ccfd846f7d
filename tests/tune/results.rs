//! What comes out: the report, the CSV, the pictures, the tuned file.

use std::fs;

use decdec::backend::DeviceInfo;
use decdec::tune::{self, Directories, Options};
use decdec::tuned::Tuned;

use crate::{LLAMA, Synthetic, options, tuned, write};

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

/// Of a 70B model, with one target: tokens were measured, so the table tells prediction and reality apart.
#[test]
fn one_verified_target_has_a_table_too() {
    let dir = tempfile::tempdir().unwrap();
    let shapes = [(8192, 10_240), (8192, 8192), (8192, 57_344), (28_672, 8192)];
    let timings = Synthetic::manual().timings();
    write(dir.path(), &Synthetic::manual().kernels());
    let mut outcome = tuned(dir.path(), &[10.0]);
    outcome.shapes = shapes;
    assert!(!outcome.to_string().contains("real slowdown %"));
    let base = timings.base_us();
    tune::search_until_within(&timings, &mut outcome.tunings[0], &mut |choice| Ok((12.8, 12.8 * choice.us() / base)))
        .unwrap();
    let report = outcome.to_string();
    let table: Vec<_> = report.lines().rev().take(4).collect();
    assert!(table.iter().any(|line| line.contains("target %") && line.contains("real slowdown %")), "{report}");
    assert!(table.iter().any(|line| line.contains("10.0") && line.contains("4, 4, 5, 5")), "{report}");
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
    let read = Tuned::read(&written[7]).unwrap().remove(0);
    assert_eq!(read, outcome.tuned(&outcome.tunings[1]));
    assert_eq!((read.n_tb, read.k_chunks, read.target_slowdown), (14, [4, 4, 5, 5], 10.0));
    assert!(read.slowdown <= 10.0 && read.slowdown > 9.9);
    let mut device = test_card();
    read.check(&device, LLAMA, 3).unwrap();
    assert!(read.check(&device, LLAMA, 4).unwrap_err().to_string().contains("this model has layers of 4 bits"));
    device.name = "Other Card".into();
    assert!(read.check(&device, LLAMA, 3).unwrap_err().to_string().contains("tuned on Test Card"));
}

fn test_card() -> DeviceInfo {
    DeviceInfo {
        id: "cuda:0".into(),
        name: "Test Card".into(),
        driver: "1.3".into(),
        max_n_tb: 132,
        max_tokens: 1,
        lookahead: 0,
    }
}

/// Results for these bits on these devices, told apart by their `n_tb`.
fn results(of: &[(u32, &str, usize)]) -> Vec<Tuned> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Synthetic::manual().kernels());
    let outcome = tuned(dir.path(), &[10.0]);
    let result = |&(bits, device, n_tb): &(u32, &str, usize)| {
        let mut tuned = outcome.tuned(&outcome.tunings[0]);
        (tuned.bits, tuned.n_tb, tuned.device.name) = (bits, n_tb, device.into());
        tuned
    };
    of.iter().map(result).collect()
}

#[test]
fn every_width_gets_its_own_result_on_this_device() {
    let all = results(&[(3, "Other Card", 1), (4, "Other Card", 2), (4, "Test Card", 9), (3, "Test Card", 14)]);
    let choose = |all: &[Tuned], widths: &[u32]| Tuned::choose(all, &test_card(), LLAMA, widths);
    assert_eq!(choose(&all, &[3, 4]).unwrap(), [all[3].clone(), all[2].clone()]);
    assert_eq!(choose(&all, &[4]).unwrap(), [all[2].clone()]);
    for (some, widths, says) in [
        (&all[..], &[3, 4, 5][..], "layers of 5 bits"),
        (&all[..3], &[3, 4], "run decdec profile and decdec tune --save with --bitwidth 3"),
        (&all[..2], &[3, 4], "tuned on Other Card, but this is Test Card"),
    ] {
        let error = choose(some, widths).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = Tuned::choose(&all, &test_card(), [(64, 64); 4], &[3]).unwrap_err().to_string();
    assert!(error.contains("but this model has [(64, 64)"), "{error}");
}

/// Results of many devices and widths, saved at the same time.
#[test]
fn no_result_that_is_saved_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<_> = (0..6).map(|i| format!("card {i}")).collect();
    let of: Vec<_> = (0..12).map(|i| (3 + i as u32 % 2, names[i / 2].as_str(), 1 + i)).collect();
    let results = results(&of);
    std::thread::scope(|scope| {
        for result in &results {
            scope.spawn(|| result.save(dir.path()).unwrap());
        }
    });
    let file = dir.path().join("tuned.json");
    let mut saved = Tuned::read(&file).unwrap();
    saved.sort_by_key(|tuned| tuned.n_tb);
    assert_eq!(saved, results);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    // A later one for the same device and width takes the place of the earlier one.
    let again = Tuned { n_tb: 99, ..results[5].clone() };
    again.save(dir.path()).unwrap();
    let saved = Tuned::read(&file).unwrap();
    assert!(saved.len() == 12 && saved.contains(&again) && !saved.contains(&results[5]));
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
