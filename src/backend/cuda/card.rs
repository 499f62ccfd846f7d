//! Another card than the one that is there: to see on a large one what the program does on a smaller one.

use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use super::driver::Numbers;

/// What is different about the card that this one acts as. Such a card has fewer multiprocessors
/// ([`Cuda::occupy_rest`](super::Cuda::occupy_rest) holds the others), less shared memory, an older instruction set, slower
/// memory.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Card {
    /// Multiprocessors that launches are made for.
    pub multiprocessors: Option<usize>,
    /// Shared memory of a block, bytes.
    pub shared: Option<usize>,
    /// Compute capability: kernels are compiled for it, and the driver translates them.
    pub capability: Option<(i32, i32)>,
    /// Bytes a second of its memory: what is held reads as fast as leaves so much.
    pub memory_rate: Option<f64>,
}

impl Card {
    /// One with `multiprocessors`, else as this one.
    pub fn of_multiprocessors(multiprocessors: usize) -> Self {
        Self { multiprocessors: Some(multiprocessors), ..Self::default() }
    }

    /// What `DECDEC_CUDA_ACT_AS` names, if it is set.
    ///
    /// # Errors
    /// Those of [`Card::from_str`].
    pub(super) fn of_environment() -> Result<Option<Self>> {
        let Some(name) = std::env::var_os("DECDEC_CUDA_ACT_AS").filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        name.to_string_lossy().parse().map(Some).context("DECDEC_CUDA_ACT_AS")
    }

    /// Puts its numbers in place of the device's.
    pub(super) fn replace(&self, numbers: &mut Numbers) -> Result<()> {
        let all = numbers.all_multiprocessors;
        let most = self.multiprocessors.unwrap_or(all);
        ensure!((1..=all).contains(&most), "{most} multiprocessors are to be used, 1 to {all} are allowed");
        let (shared, own) = (self.shared.unwrap_or(numbers.shared_per_block), numbers.shared_per_block);
        ensure!(shared <= own, "{shared} bytes of shared memory are to be used, {own} are there");
        let (capability, highest) = (self.capability, (numbers.major, numbers.minor));
        if let Some((major, minor)) = capability {
            ensure!(
                ((8, 0)..=highest).contains(&(major, minor)),
                "compute capability {major}.{minor} is asked for, 8.0 to {}.{} can run here",
                highest.0,
                highest.1
            );
            (numbers.major, numbers.minor) = (major, minor);
        }
        numbers.multiprocessors = most;
        numbers.shared_per_block = shared;
        numbers.memory_rate = self.memory_rate.unwrap_or(numbers.memory_rate);
        numbers.crowded = self.memory_rate.is_some();
        numbers.translated = capability.is_some_and(|capability| capability != highest);
        Ok(())
    }
}

impl FromStr for Card {
    type Err = anyhow::Error;

    /// A GeForce by its name, or `multiprocessors=46,shared=101376,capability=8.9,memory=504` (GB/s), each of which may be
    /// left out. (Of the 128 multiprocessors of an RTX 4090 there are 84: the others are needed to slow memory down.)
    fn from_str(name: &str) -> Result<Self> {
        let named = match name {
            "rtx4090" => "multiprocessors=84,shared=101376,capability=8.9,memory=1008",
            "rtx4070" => "multiprocessors=46,shared=101376,capability=8.9,memory=504",
            "rtx3060" => "multiprocessors=28,shared=101376,capability=8.6,memory=360",
            other => other,
        };
        let mut card = Self::default();
        for part in named.split(',') {
            let known = "rtx4090, rtx4070, rtx3060, or multiprocessors, shared, capability, memory with a number each";
            let (key, value) = part.split_once('=').with_context(|| format!("{part:?}, {known} are expected"))?;
            let number = || value.parse().with_context(|| format!("{key}: {value:?} is no number"));
            match key {
                "multiprocessors" => card.multiprocessors = Some(number()?),
                "shared" => card.shared = Some(number()?),
                "capability" => {
                    let of = |(major, minor): (&str, &str)| Some((major.parse().ok()?, minor.parse().ok()?));
                    let capability = value.split_once('.').and_then(of);
                    card.capability = Some(capability.with_context(|| format!("{value:?}, such as 8.9 is expected"))?);
                }
                "memory" => card.memory_rate = Some(number()? as f64 * 1e9),
                _ => bail!("{key:?}, {known} are expected"),
            }
        }
        Ok(card)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h200() -> Numbers {
        Numbers {
            name: "NVIDIA H200".into(),
            driver: 13000,
            major: 9,
            minor: 0,
            multiprocessors: 132,
            all_multiprocessors: 132,
            shared_per_block: 232_448,
            all_shared_per_block: 232_448,
            memory_rate: 4.9e12,
            clock: 1.98e9,
            crowded: false,
            translated: false,
        }
    }

    #[test]
    fn a_smaller_card_has_its_numbers() {
        let mut numbers = h200();
        "rtx4070".parse::<Card>().unwrap().replace(&mut numbers).unwrap();
        assert_eq!((numbers.multiprocessors, numbers.shared_per_block), (46, 101_376));
        assert_eq!((numbers.major, numbers.minor, numbers.translated), (8, 9, true));
        assert_eq!(numbers.memory_rate, 504e9);
        assert_eq!(numbers.all_multiprocessors, 132);
        let mut numbers = h200();
        Card::of_multiprocessors(46).replace(&mut numbers).unwrap();
        assert_eq!((numbers.multiprocessors, numbers.major, numbers.translated), (46, 9, false));
    }

    #[test]
    fn what_is_not_there_cannot_be_had() {
        for (name, said) in [
            ("multiprocessors=133", "133 multiprocessors"),
            ("multiprocessors=0", "0 multiprocessors"),
            ("shared=300000", "300000 bytes"),
            ("capability=10.0", "10.0"),
            ("capability=7.5", "7.5"),
        ] {
            let error = name.parse::<Card>().unwrap().replace(&mut h200()).unwrap_err().to_string();
            assert!(error.contains(said), "{name}: {error}");
        }
        for name in ["rtx9999", "speed=3", "capability=8", "shared=much", ""] {
            assert!(name.parse::<Card>().is_err(), "{name}");
        }
    }
}
