//! What packed formats have in common: tensors of a matrix, as long as their description says.

use anyhow::{Result, ensure};

use super::{Floats, Numbers, Size, Tensor};

/// The tensors of a matrix, in the order of their description, or of what belongs to one.
#[derive(Debug, Clone, PartialEq)]
pub struct Packed<'a> {
    size: Size,
    pub(crate) tensors: Vec<Numbers<'a>>,
}

impl<'a> Packed<'a> {
    /// Takes the tensors of `name`, described by `described`.
    ///
    /// # Errors
    /// Shapes that do not tile, lengths that do not follow from them, or a number that is not finite.
    pub(super) fn new(name: &str, described: &[Tensor], size: Size, tensors: Vec<Numbers<'a>>) -> Result<Self> {
        ensure_shape(size.in_features, size.out_features)?;
        for (tensor, numbers) in described.iter().zip(&tensors) {
            let (suffix, shape, got) = (tensor.suffix, tensor.shape(&size), numbers.len());
            ensure!(
                got == shape.iter().product::<usize>(),
                "{name}: {got} numbers of {suffix}, {shape:?} are expected"
            );
            if let Numbers::Floats(values) = numbers {
                values.ensure_finite(&format!("{name}: {suffix}"))?;
            }
        }
        Ok(Self { size, tensors })
    }

    /// What the shapes of the tensors follow from.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Input channels.
    pub fn in_features(&self) -> usize {
        self.size.in_features
    }

    /// Output rows.
    pub fn out_features(&self) -> usize {
        self.size.out_features
    }

    /// Bits of one code.
    pub fn bits(&self) -> usize {
        self.size.bits
    }

    /// The tensors, in the order of their description.
    pub fn tensors(&self) -> &[Numbers<'a>] {
        &self.tensors
    }

    /// Bytes as stored.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(Numbers::bytes).sum()
    }

    pub(crate) fn borrowed(&self) -> Packed<'_> {
        Packed { size: self.size, tensors: self.tensors.iter().map(Numbers::borrowed).collect() }
    }

    pub(super) fn words(&self, i: usize) -> &[u32] {
        let Numbers::Words(words) = &self.tensors[i] else { unreachable!("bit patterns by their description") };
        words
    }

    pub(super) fn floats(&self, i: usize) -> &Floats<'a> {
        let Numbers::Floats(values) = &self.tensors[i] else { unreachable!("numbers by their description") };
        values
    }
}

/// A format's type, which has a [`Packed`] as its only field, is read like one.
macro_rules! packed {
    ($name:ident) => {
        impl<'a> std::ops::Deref for $name<'a> {
            type Target = Packed<'a>;

            fn deref(&self) -> &Packed<'a> {
                &self.0
            }
        }
    };
}
pub(super) use packed;

/// Checks what every packed format asks of a matrix: whole words along both sides.
pub(super) fn ensure_shape(in_features: usize, out_features: usize) -> Result<()> {
    ensure!(
        in_features > 0 && in_features.is_multiple_of(32),
        "{in_features} input channels, a multiple of 32 is expected"
    );
    ensure!(
        out_features > 0 && out_features.is_multiple_of(8),
        "{out_features} output rows, a multiple of 8 is expected"
    );
    Ok(())
}

/// Checks the bits of a code, and that codes `[out_features, in_features]` have no more.
pub(super) fn ensure_codes(name: &str, size: &Size, codes: &[u8]) -> Result<()> {
    let Size { in_features, out_features, bits, .. } = *size;
    ensure_bits(name, bits)?;
    ensure_shape(in_features, out_features)?;
    let want = in_features * out_features;
    ensure!(codes.len() == want, "{name}: {} codes, {want} expected", codes.len());
    if let Some(i) = super::bits::too_large(codes, bits) {
        anyhow::bail!("{name}: code {} in row {}, below {} is allowed", codes[i], i / in_features, 1 << bits);
    }
    Ok(())
}

/// Checks the bits of a code.
pub(super) fn ensure_bits(name: &str, bits: usize) -> Result<()> {
    ensure!((2..=8).contains(&bits), "{name}: {bits} bits, 2 to 8 are allowed");
    Ok(())
}
