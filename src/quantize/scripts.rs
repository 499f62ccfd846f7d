//! Which scripts a text is written in, and which a model's vocabulary has: text in a language that calibration did not see
//! loses more.

use super::calibration::Text;
use crate::tokenizer::Tokenizer;

/// Names of scripts, and the characters of each, first and last.
const SCRIPTS: [(&str, &[(char, char)]); 10] = [
    ("Latin", &[('A', 'Z'), ('a', 'z'), ('\u{c0}', '\u{24f}')]),
    ("Greek", &[('\u{370}', '\u{3ff}')]),
    ("Cyrillic", &[('\u{400}', '\u{52f}')]),
    ("Hebrew", &[('\u{590}', '\u{5ff}')]),
    ("Arabic", &[('\u{600}', '\u{6ff}'), ('\u{750}', '\u{77f}')]),
    ("Devanagari", &[('\u{900}', '\u{97f}')]),
    ("Thai", &[('\u{e00}', '\u{e7f}')]),
    ("Kana", &[('\u{3040}', '\u{30ff}')]),
    ("Han", &[('\u{3400}', '\u{4dbf}'), ('\u{4e00}', '\u{9fff}')]),
    ("Hangul", &[('\u{ac00}', '\u{d7a3}')]),
];
/// The share of letters, or of words of a vocabulary, from which on a script counts.
const COUNTS: f64 = 0.01;

/// What to tell of a text that has only one of several scripts that a model knows; nothing, if it is not so.
pub fn one_script(text: &Text, tokenizer: &Tokenizer) -> Option<String> {
    let known = scripts(tokenizer.words().iter().filter_map(|&id| tokenizer.decode(&[id]).ok()), 1);
    let found = scripts(text.tokens.chunks(4096).filter_map(|ids| tokenizer.decode(ids).ok()), usize::MAX);
    let [only] = found[..] else { return None };
    let others: Vec<&str> = known.into_iter().filter(|&script| script != only).collect();
    (!others.is_empty()).then(|| {
        format!(
            "the calibration text has {only} letters alone, the model knows {} too: give text in the languages that it is \
             for",
            others.join(", ")
        )
    })
}

/// The scripts that count in `texts`, of which at most so many letters each.
fn scripts(texts: impl Iterator<Item = String>, letters: usize) -> Vec<&'static str> {
    let mut counts = [0usize; SCRIPTS.len()];
    for text in texts {
        let of = |c: char| SCRIPTS.iter().position(|(_, ranges)| ranges.iter().any(|&(a, b)| (a..=b).contains(&c)));
        text.chars().filter_map(of).take(letters).for_each(|script| counts[script] += 1);
    }
    let all: usize = counts.iter().sum();
    let counted = SCRIPTS.iter().zip(counts).filter(|&(_, count)| count > 0 && count as f64 >= COUNTS * all as f64);
    counted.map(|((name, _), _)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_told_from_each_other() {
        let of = |text: &str| scripts([text.to_owned()].into_iter(), usize::MAX);
        assert_eq!(of("It was 7 o'clock, déjà."), ["Latin"]);
        assert_eq!(of("坊っちゃん and Botchan"), ["Latin", "Kana", "Han"]);
        assert_eq!(of("1234 ?!"), [""; 0]);
        // One foreign letter in a hundred and fifty is a name.
        assert_eq!(of(&["x".repeat(150), "я".into()].concat()), ["Latin"]);
    }
}
