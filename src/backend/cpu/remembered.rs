//! Keys or values of one layer in host memory, as they are or in bytes.

use std::borrow::Cow;
use std::ops::Range;

use crate::backend::KvBits;
use crate::backend::kv::InBytes;

/// Rows of numbers.
#[derive(Debug)]
pub(super) struct Remembered {
    width: usize,
    rows: Rows,
}

#[derive(Debug)]
enum Rows {
    Whole(Vec<f32>),
    Bytes { bytes: Vec<i8>, steps: Vec<f32> },
}

impl Remembered {
    /// `rows` rows of zeros.
    pub(super) fn new(rows: usize, width: usize, bits: KvBits) -> Self {
        let rows = match bits {
            KvBits::Whole => Rows::Whole(vec![0.0; rows * width]),
            KvBits::Eight => Rows::Bytes { bytes: vec![0; rows * width], steps: vec![0.0; rows] },
        };
        Self { width, rows }
    }

    /// Bytes of so many rows.
    pub(super) fn bytes(rows: usize, width: usize, bits: KvBits) -> usize {
        match bits {
            KvBits::Whole => 4 * rows * width,
            KvBits::Eight => rows * (width + 4),
        }
    }

    /// Overwrites a row with what is kept of these numbers.
    pub(super) fn write(&mut self, row: usize, numbers: &[f32]) {
        let at = row * self.width..(row + 1) * self.width;
        match &mut self.rows {
            Rows::Whole(all) => all[at].copy_from_slice(numbers),
            Rows::Bytes { bytes, steps } => {
                let step = InBytes::of(numbers);
                steps[row] = step.step();
                bytes[at].iter_mut().zip(numbers).for_each(|(byte, &x)| *byte = step.byte(x));
            }
        }
    }

    /// Overwrites a row with one of another's, which keeps numbers alike.
    pub(super) fn copy(&mut self, row: usize, from: &Self, from_row: usize) {
        let (to, at) = (row * self.width, from_row * self.width..(from_row + 1) * self.width);
        match (&mut self.rows, &from.rows) {
            (Rows::Whole(all), Rows::Whole(from)) => all[to..to + self.width].copy_from_slice(&from[at]),
            (Rows::Bytes { bytes, steps }, Rows::Bytes { bytes: from, steps: from_steps }) => {
                bytes[to..to + self.width].copy_from_slice(&from[at]);
                steps[row] = from_steps[from_row];
            }
            _ => unreachable!("a text keeps its numbers in one way"),
        }
    }

    /// The numbers of some rows.
    pub(super) fn read(&self, rows: Range<usize>) -> Cow<'_, [f32]> {
        let at = rows.start * self.width..rows.end * self.width;
        match &self.rows {
            Rows::Whole(all) => Cow::Borrowed(&all[at]),
            Rows::Bytes { bytes, steps } => {
                let mut numbers = Vec::with_capacity(at.len());
                for (bytes, &step) in bytes[at].chunks_exact(self.width).zip(&steps[rows]) {
                    numbers.extend(bytes.iter().map(|&byte| step * f32::from(byte)));
                }
                Cow::Owned(numbers)
            }
        }
    }
}
