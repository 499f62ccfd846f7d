//! Products of many rows: each with the bits that it has alone.

use decdec::backend::cuda::{Card, Cuda, Dtype, Options};
use decdec::backend::{DecodeBackend, Feed, GemvBackend, Norm, Product};
use decdec::config::Activation;
use decdec::format::{Dense, Storage};
use decdec::random::RandomWeights;
use decdec::weights::{Linear, Weight};
use half::f16;

use crate::cuda_common::{Noise, cuda, options};
use crate::oracle::any_codebooks;

/// Most rows of a pass here: three tiles of tokens.
const MOST: usize = 40;

/// One of every way to multiply.
fn every_way(k: usize, rows: usize, noise: &mut Noise) -> Vec<(String, Linear<'static>)> {
    let mut all = Vec::new();
    for bits in [3, 4, 5] {
        let w = RandomWeights::single(k, rows, Storage::ANYPREC, bits, noise.next()).unwrap();
        if bits < 5 {
            all.push((format!("anyprec {bits}, codebooks of any numbers"), any_codebooks(&w, noise)));
        }
        all.push((format!("anyprec {bits}"), w));
    }
    for (bits, group) in [(3, 32), (4, 128), (8, 64), (6, 32)] {
        if k.is_multiple_of(group) {
            let w = RandomWeights::single(k, rows, Storage::lutgemm(group), bits, noise.next()).unwrap();
            all.push((format!("lutgemm {bits} g{group}"), w));
        }
    }
    let values: Vec<f16> = (0..k * rows).map(|_| f16::from_f32(0.02 * noise.normal())).collect();
    let mut dense = Linear::plain(Weight::Dense(Dense { in_features: k, out_features: rows, values: values.into() }));
    dense.bias = Some((0..rows).map(|_| noise.normal()).collect());
    all.push(("dense with bias".to_owned(), dense));
    all
}

/// What a product is asked for.
struct Ask<'a> {
    cuda: &'a Cuda,
    matrix: &'a <Cuda as GemvBackend>::Matrix,
    feed: Feed<'a, <Cuda as GemvBackend>::Vector>,
    add: bool,
    /// Numbers of a row of x, and of y.
    widths: (usize, usize),
}

impl Ask<'_> {
    /// y of the rows in `x`, added to `before` if that is asked for.
    fn of(&self, x: &[f32], before: &[f32]) -> Vec<f32> {
        let (from_width, to_width) = self.widths;
        let rows = x.len() / from_width;
        let (mut from, mut to) = (self.cuda.vector(x.len()).unwrap(), self.cuda.vector(rows * to_width).unwrap());
        self.cuda.write(x, &mut from).unwrap();
        let poison = vec![f32::NAN; rows * to_width];
        self.cuda.write(if self.add { before } else { &poison }, &mut to).unwrap();
        let product = Product { feed: self.feed, matrix: self.matrix, plan: None, compensated: 0, add: self.add };
        self.cuda.project(&product, &from, &mut to, rows).unwrap();
        let mut got = vec![0f32; rows * to_width];
        self.cuda.read(&to, &mut got).unwrap();
        got
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Rows in passes of 2 to 40 against the same rows alone; and a row that changes changes no other.
fn rows_have_the_bits_that_they_have_alone(ask: &Ask<'_>, noise: &mut Noise, what: &str) {
    let (from_width, to_width) = ask.widths;
    let mut x: Vec<f32> = (0..MOST).flat_map(|_| noise.activations(from_width)).collect();
    // A row without anything large, and one of zeros.
    x[from_width..2 * from_width].iter_mut().for_each(|x| *x *= 1e-4);
    x[2 * from_width..3 * from_width].fill(0.0);
    let before: Vec<f32> = (0..MOST * to_width).map(|_| noise.normal()).collect();
    let alone: Vec<f32> =
        x.chunks(from_width).zip(before.chunks(to_width)).flat_map(|(x, before)| ask.of(x, before)).collect();
    assert!(alone.iter().all(|v| v.is_finite()), "{what}");
    assert_ne!(alone[..to_width], alone[3 * to_width..4 * to_width], "{what}: two rows alike");
    for rows in [2, 3, 8, 9, 16, 17, MOST] {
        let got = ask.of(&x[..rows * from_width], &before[..rows * to_width]);
        let differ = bits(&got).iter().zip(bits(&alone)).filter(|(got, want)| *got != want).count();
        assert_eq!(differ, 0, "{what}: {differ} of {} numbers of {rows} rows are others than alone", got.len());
    }
    let changed = 5;
    x[changed * from_width] += 0.37;
    let got = ask.of(&x, &before);
    for (row, (got, alone)) in got.chunks(to_width).zip(alone.chunks(to_width)).enumerate() {
        assert_eq!(bits(got) != bits(alone), row == changed, "{what}: row {row} after row {changed} has changed");
    }
}

fn products_of(k: usize, rows: usize) {
    let Some(cuda) = cuda(options(Dtype::Float16, 2)) else { return };
    let mut noise = Noise::new(k as u64);
    let mut gamma = cuda.vector(k).unwrap();
    cuda.write(&(0..k).map(|_| 1.0 + 0.1 * noise.normal()).collect::<Vec<_>>(), &mut gamma).unwrap();
    let norm = Norm { gamma, len: k, eps: 1e-5 };
    for (i, (what, linear)) in every_way(k, rows, &mut noise).into_iter().enumerate() {
        let matrix = cuda.matrix(&linear).unwrap();
        let (feed, width) = match i % 3 {
            0 => (Feed::Norm(&norm), k),
            1 => (Feed::Gated(Activation::Silu), 2 * k),
            _ => (Feed::Plain, k),
        };
        let ask = Ask { cuda: &cuda, matrix: &matrix, feed, add: i % 2 == 1, widths: (width, rows) };
        rows_have_the_bits_that_they_have_alone(&ask, &mut noise, &format!("{what}, {k} × {rows}, input {}", i % 3));
    }
}

#[test]
fn rows_of_short_products_are_alike_in_passes_of_any_length() {
    products_of(576, 72);
}

#[test]
fn rows_of_wide_products_are_alike_in_passes_of_any_length() {
    products_of(4096, 1024);
}

#[test]
fn rows_of_products_with_long_chains_are_alike_in_passes_of_any_length() {
    products_of(4640, 72);
}

#[test]
fn rows_of_sliced_products_are_alike_in_passes_of_any_length() {
    products_of(14336, 512);
}

/// Neither does a row depend on how many multiprocessors share the work.
#[test]
fn rows_do_not_depend_on_the_number_of_multiprocessors() {
    let Some(all) = cuda(options(Dtype::Float16, 2)) else { return };
    let Some(few) = cuda(Options { card: Some(Card::of_multiprocessors(7)), ..options(Dtype::Float16, 2) }) else {
        return;
    };
    let mut noise = Noise::new(11);
    for (format, k, rows) in [(Storage::ANYPREC, 4640, 1000), (Storage::lutgemm(32), 14336, 200)] {
        let linear = RandomWeights::single(k, rows, format, 4, noise.next()).unwrap();
        let x: Vec<f32> = (0..9).flat_map(|_| noise.activations(k)).collect();
        for count in [1, 8, 9] {
            let [want, got] = [&all, &few].map(|cuda| {
                let matrix = cuda.matrix(&linear).unwrap();
                let ask = Ask { cuda, matrix: &matrix, feed: Feed::Plain, add: false, widths: (k, rows) };
                bits(&ask.of(&x[..count * k], &[]))
            });
            assert!(want == got, "{format:?}: {count} rows have other bits on few multiprocessors");
        }
    }
}
