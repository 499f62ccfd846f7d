//! Numbers within limits. Clap puts the flag and what was given before these messages.

use std::ops::RangeInclusive;

use decdec::engine::{MOST_GUESSED, Speculate};

/// Most tokens that a configuration of a profile is measured with: medians of more say nothing new, and all of them
/// are held in memory.
pub(super) const MOST_PROFILED: usize = 10_000;

/// Largest size of a projection's side; products of two do not overflow.
pub(super) const MOST_FEATURES: usize = u32::MAX as usize;

/// Largest slowdown to aim for, per cent.
const MOST_SLOWDOWN: f64 = 1e6;

/// A parser of whole numbers in `allowed`.
pub(super) fn whole(allowed: RangeInclusive<usize>) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|number| allowed.contains(number));
        number.ok_or_else(|| match (*allowed.start(), *allowed.end()) {
            (start, usize::MAX) => format!("a whole number from {start} to {} is expected", usize::MAX),
            (start, end) => format!("{start} to {end} are allowed"),
        })
    }
}

/// What decides random choices.
pub(super) fn seed(text: &str) -> Result<u64, String> {
    whole(0..=usize::MAX)(text).map(|seed| seed as u64)
}

/// How much is compiled ahead.
pub(super) fn mode(text: &str) -> Result<u8, String> {
    whole(0..=2)(text).map(|mode| mode as u8)
}

/// How many tokens are guessed.
pub(super) fn speculate(text: &str) -> Result<Speculate, String> {
    match text {
        "auto" => Ok(Speculate::Auto),
        "off" => Ok(Speculate::Off),
        _ => {
            let number = text.parse().ok().filter(|number| (1..=MOST_GUESSED).contains(number));
            number.map(Speculate::Most).ok_or_else(|| format!("auto, off and 1 to {MOST_GUESSED} are allowed"))
        }
    }
}

/// A probability.
pub(super) fn share(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    number.ok_or_else(|| "0 to 1 are allowed".into())
}

/// What logits are divided by.
pub(super) fn temperature(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|temperature: &f32| *temperature >= 0.0 && temperature.is_finite());
    number.ok_or_else(|| "0 or more is allowed".into())
}

/// A slowdown in per cent.
pub(super) fn slowdown(text: &str) -> Result<f64, String> {
    let number = text.trim().parse().ok().filter(|slowdown| (0.0..=MOST_SLOWDOWN).contains(slowdown));
    number.ok_or_else(|| format!("0 to {MOST_SLOWDOWN} per cent are allowed"))
}

/// The share of calibration text that a model writes; with some of it, some of the given text.
pub(super) fn own_share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|share| (0.0..=0.95).contains(share));
    number.ok_or_else(|| "0 to 0.95 are allowed".into())
}

/// Bits of a head.
pub(super) fn head_bits(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|bits| [16, 8, 4].contains(bits));
    number.ok_or_else(|| "16, 8 and 4 are allowed".into())
}

/// Bits of keys and values.
pub(super) fn kv_bits(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|bits| [16, 8].contains(bits));
    number.ok_or_else(|| "16 and 8 are allowed".into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is typed: a number within the limits, or a message that says them.
        #[test]
        fn whole_numbers_stay_within_their_limits(
            number in prop_oneof![any::<i128>(), -2i128..2000, Just(1 << 63), Just(1 << 64), Just((1 << 64) - 1)],
            start in 0usize..3,
            end in prop_oneof![3usize..2000, Just(usize::MAX)],
        ) {
            let allowed = start as i128..=end as i128;
            match whole(start..=end)(&number.to_string()) {
                Ok(read) => prop_assert!(read as i128 == number && allowed.contains(&number)),
                Err(message) => {
                    prop_assert!(!allowed.contains(&number), "{number} was refused: {message}");
                    prop_assert!(message.contains(&start.to_string()) && message.contains(&end.to_string()));
                }
            }
        }

        /// Fractions are finite and within theirs.
        #[test]
        fn fractions_are_finite(number in prop_oneof![any::<f64>(), -1.0f64..3.0]) {
            let text = number.to_string();
            prop_assert_eq!(share(&text).is_ok(), (0.0..=1.0).contains(&(number as f32)));
            prop_assert_eq!(temperature(&text).is_ok(), number as f32 >= 0.0 && (number as f32).is_finite());
            prop_assert_eq!(slowdown(&text).is_ok(), (0.0..=MOST_SLOWDOWN).contains(&number));
            prop_assert_eq!(own_share(&text).is_ok(), (0.0..=0.95).contains(&number));
        }

        #[test]
        fn what_is_no_number_is_refused(text in "[a-z .-]{0,8}|[1-9][0-9]{20,39}|0x[0-9]|1e3|[0-9]+ ") {
            prop_assert!(whole(0..=usize::MAX)(&text).is_err() && seed(&text).is_err() && mode(&text).is_err());
            prop_assert!(head_bits(&text).is_err() && kv_bits(&text).is_err());
            prop_assert!(speculate(&text).is_err() || ["auto", "off"].contains(&&text[..]));
        }
    }
}
