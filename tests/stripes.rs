//! How rows are divided among compensating blocks: properties, and the CUDA kernels' own arithmetic against ours.

mod devices;

use std::ops::Range;
use std::process::Command;

use decdec::config::{ModelConfig, Projection};
use decdec::dec::{DecPlan, Selection};

fn stripes(rows: usize, n_tb: usize) -> Vec<Range<usize>> {
    let plan = DecPlan::new(32, rows, &[0.0; 32], 0, n_tb, Selection::Bucket).unwrap();
    plan.stripes().collect()
}

/// Rows of every preset's projections, and small and odd ones.
fn all_rows() -> Vec<usize> {
    let presets = ModelConfig::PRESETS.iter().map(|name| ModelConfig::preset(name).unwrap());
    let mut rows: Vec<_> = presets.flat_map(|config| Projection::ALL.map(|p| config.shape(0, p).1)).collect();
    rows.extend((1..=40).map(|words| 8 * words));
    rows.extend([576, 960, 1536, 3072, 4096 - 32, 4096 + 8, 5120, 8 * 131, 8 * 133]);
    rows.sort_unstable();
    rows.dedup();
    rows
}

#[test]
fn every_word_is_in_one_stripe_and_no_block_has_much_more_than_another() {
    for rows in all_rows() {
        for n_tb in 1..=264 {
            let stripes = stripes(rows, n_tb);
            assert!(stripes.len() <= n_tb && stripes.iter().all(|stripe| !stripe.is_empty()));
            assert_eq!((stripes[0].start, stripes.last().unwrap().end), (0, rows / 8), "{rows} rows, {n_tb} blocks");
            assert!(stripes.windows(2).all(|pair| pair[0].end == pair[1].start));
            let plan = DecPlan::new(32, rows, &[0.0; 32], 0, n_tb, Selection::Bucket).unwrap();
            let lines = stripes.iter().map(|stripe| stripe.len().div_ceil(plan.line()));
            assert!(lines.clone().max().unwrap() - lines.min().unwrap() <= 1, "{rows} rows, {n_tb} blocks");
        }
    }
}

/// The text of `struct Stripe` in the CUDA kernels, compiled for this machine.
#[test]
fn the_kernels_divide_rows_alike() {
    let text = std::fs::read_to_string("kernels-cuda/compensation/dec.cuh").unwrap();
    let start = text.find("struct Stripe {").expect("the kernels' division of rows");
    let end = start + text[start..].find("\n};").expect("its end") + 3;
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("stripes.cpp"), dir.path().join("stripes"));
    let body = "
        int main() {
            int rows, n_tb;
            while (scanf(\"%d %d\", &rows, &n_tb) == 2) {
                int words = rows / 8, pieces = words % 2 ? words : words / 2, size = words % 2 ? 1 : 2;
                for (int block = 0; block < n_tb; block++) {
                    Stripe s = words % 2 ? Stripe::of<1>(pieces, block, n_tb) : Stripe::of<2>(pieces, block, n_tb);
                    if (s.begin < s.end) printf(\"%d %d \", s.begin * size, s.end * size);
                }
                printf(\"\\n\");
            }
        }";
    let head = "#include <algorithm>\n#include <cstdio>\n#define __device__\n#define __forceinline__ inline\nusing std::min;\n";
    std::fs::write(&source, format!("{head}{}{body}", &text[start..end])).unwrap();
    let Ok(compiled) = Command::new("c++").args(["-O1", "-o"]).arg(&program).arg(&source).output() else {
        devices::skip("no C++ compiler");
        return;
    };
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let pairs: Vec<_> = all_rows().into_iter().flat_map(|rows| (1..=264).map(move |n_tb| (rows, n_tb))).collect();
    let asked: String = pairs.iter().map(|(rows, n_tb)| format!("{rows} {n_tb}\n")).collect();
    let questions = dir.path().join("questions");
    std::fs::write(&questions, asked).unwrap();
    let out = Command::new(&program).stdin(std::fs::File::open(questions).unwrap()).output().unwrap();
    let answers = String::from_utf8(out.stdout).unwrap();
    assert_eq!(answers.lines().count(), pairs.len());
    for ((rows, n_tb), answer) in pairs.into_iter().zip(answers.lines()) {
        let own: String = stripes(rows, n_tb).iter().map(|s| format!("{} {} ", s.start, s.end)).collect();
        assert_eq!(answer, own, "{rows} rows, {n_tb} blocks");
    }
}
