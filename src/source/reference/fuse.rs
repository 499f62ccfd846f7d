//! Modules that come one by one, joined into the fused matrices of a decoder layer.

use std::borrow::Cow;

use half::{bf16, f16};

use crate::format::Floats;

/// Undoes the nibble-major order of a residual's scales: `stored[i·(rows/8) + c]` belongs to row `8c + i`.
pub(super) fn row_order(stored: &Floats<'_>) -> Floats<'static> {
    let words = stored.len() / 8;
    let at = |row: usize| row % 8 * words + row / 8;
    match stored {
        Floats::F16(v) => (0..v.len()).map(|row| v[at(row)]).collect::<Vec<f16>>().into(),
        Floats::Bf16(v) => Floats::Bf16((0..v.len()).map(|row| v[at(row)]).collect()),
        Floats::F32(v) => (0..v.len()).map(|row| v[at(row)]).collect::<Vec<f32>>().into(),
    }
}

/// Joins arrays `[outer, rows of the part …]` to `[outer, rows of all …]`; a single part stays as it is.
pub(super) fn interleave<'a, T: Copy>(mut parts: Vec<Cow<'a, [T]>>, outer: usize) -> Cow<'a, [T]> {
    if parts.len() == 1 {
        return parts.remove(0);
    }
    let mut joined = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
    for o in 0..outer {
        for part in &parts {
            let len = part.len() / outer;
            joined.extend_from_slice(&part[o * len..][..len]);
        }
    }
    Cow::Owned(joined)
}

/// [`interleave`] in the parts' own type if all have the same, else in f32.
pub(super) fn interleave_floats<'a>(parts: Vec<Floats<'a>>, outer: usize) -> Floats<'a> {
    if parts.iter().all(|part| matches!(part, Floats::F16(_))) {
        let f16s = |part| if let Floats::F16(v) = part { Some(v) } else { None };
        return Floats::F16(interleave::<f16>(parts.into_iter().filter_map(f16s).collect(), outer));
    }
    if parts.iter().all(|part| matches!(part, Floats::Bf16(_))) {
        let bf16s = |part| if let Floats::Bf16(v) = part { Some(v) } else { None };
        return Floats::Bf16(interleave::<bf16>(parts.into_iter().filter_map(bf16s).collect(), outer));
    }
    let f32s = |part| match part {
        Floats::F32(v) => v,
        other => Cow::Owned(other.to_f32().into_owned()),
    };
    Floats::F32(interleave::<f32>(parts.into_iter().map(f32s).collect(), outer))
}

/// The first `len` of `values`.
pub(super) fn first<T: Copy>(values: Cow<'_, [T]>, len: usize) -> Cow<'_, [T]> {
    match values {
        Cow::Borrowed(values) => Cow::Borrowed(&values[..len]),
        Cow::Owned(mut values) => {
            values.truncate(len);
            Cow::Owned(values)
        }
    }
}
