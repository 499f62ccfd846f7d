use proptest::prelude::*;

use super::super::fixture::{SPECIALS, book, kinds};
use super::TextReader;

/// Texts of what cuts could spoil: words, runs of white space, special tokens, characters of several bytes.
fn parts() -> impl Strategy<Value = String> {
    let words: Vec<String> = book().split(' ').skip(200).take(400).map(str::to_owned).collect();
    let part = prop_oneof![
        6 => prop::sample::select(words),
        2 => Just(" ".to_owned()),
        1 => "[ \n\t]{1,6}",
        1 => prop::sample::select(SPECIALS.to_vec()).prop_map(str::to_owned),
        1 => "[a-zA-Z0-9',.!?-]{1,12}",
        1 => "\\PC{1,4}",
        1 => prop::sample::select(vec!["<tool>", "東京の", "e\u{301}", "\u{1f600}", "12345", "  x", "it's\n"])
            .prop_map(str::to_owned),
    ];
    (prop::collection::vec(part, 0..120), prop::bool::ANY)
        .prop_map(|(parts, spaced)| parts.join(if spaced { " " } else { "" }))
}

#[test]
fn pieces_make_the_tokens_of_the_whole() {
    let kinds = kinds();
    let mut cuts = vec![0; kinds.len()];
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) };
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let cuts_seen = std::cell::RefCell::new(&mut cuts);
    runner
        .run(&(parts(), 24usize..200, 0usize..80), |(text, size, wanted)| {
            for (i, (kind, tokenizer)) in kinds.iter().enumerate() {
                let whole = tokenizer.encode(&text).expect("tokens");
                // As a slow reader hands it out.
                let pieces = |wanted| {
                    let mut rest = text.as_str();
                    let more = |piece: &mut String| {
                        let at = rest.char_indices().nth(17).map_or(rest.len(), |(at, _)| at);
                        piece.push_str(&rest[..at]);
                        rest = &rest[at..];
                        Ok(!rest.is_empty())
                    };
                    tokenizer.encode_pieces(more, wanted, size).expect("tokens")
                };
                prop_assert_eq!(&pieces(usize::MAX), &whole, "{} in {:?}", kind, text);
                let some = pieces(wanted);
                let n = wanted.min(whole.len());
                prop_assert!(some.len() >= n, "{kind}: {} of {n}", some.len());
                prop_assert_eq!(&some[..n], &whole[..n], "{} in {:?}", kind, text);
                cuts_seen.borrow_mut()[i] += usize::from(some.len() < whole.len());
            }
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
    for (seen, (kind, _)) in cuts.iter().zip(&kinds) {
        assert!(*seen > 20, "{kind}: only {seen} texts were cut short, the property was hardly tried");
    }
}

#[test]
fn a_cut_elsewhere_changes_tokens() {
    for (kind, tokenizer) in kinds() {
        let text = "something wonderful happened";
        let whole = tokenizer.encode_chat(text).expect("tokens");
        let differs = (1..text.len()).filter(|&at| {
            let parts = [&text[..at], &text[at..]].map(|part| tokenizer.encode_chat(part).expect("tokens"));
            parts.concat() != whole
        });
        assert!(differs.count() > 5, "{kind}: a cut anywhere would do, the property says nothing");
    }
}

#[test]
fn no_more_is_read_than_it_takes() {
    let (_, tokenizer) = kinds().remove(0);
    // The book over and over; reading to its end would never end.
    struct Endless(Vec<u8>, usize);
    impl std::io::Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let from = self.1 % self.0.len();
            let count = buffer.len().min(self.0.len() - from);
            buffer[..count].copy_from_slice(&self.0[from..from + count]);
            self.1 += count;
            Ok(count)
        }
    }
    let mut endless = Endless(book().into_bytes(), 0);
    let ids = tokenizer.encode_first(&mut TextReader::new(&mut endless), 1000).expect("tokens");
    assert_eq!(ids[..1000], tokenizer.encode(&book()).expect("tokens")[..1000]);
    assert!(endless.1 < 300_000, "{} bytes were read", endless.1);
}

/// All of `bytes`, handed out in portions of `size`.
fn read(bytes: &[u8], size: usize) -> anyhow::Result<String> {
    struct Slow<'a>(&'a [u8], usize);
    impl std::io::Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let count = self.1.min(buffer.len()).min(self.0.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }
    TextReader::new(Slow(bytes, size)).read_all()
}

#[test]
fn texts_are_read_as_they_are_meant() {
    let text = |bytes: &str| read(bytes.as_bytes(), 1).expect("a text");
    assert_eq!(text("\u{feff}a\r\nb\rc\n\r\n\r"), "a\nb\nc\n\n\n");
    assert_eq!(text("a\u{feff}b"), "a\u{feff}b", "a mark inside is text");
    assert_eq!(text("\u{feff}\u{feff}b\u{feff}"), "b\u{feff}", "a file that was marked twice");
    assert_eq!(text(""), "");
    assert_eq!(text("\u{feff}"), "");
    // Line endings and characters that end where a portion of the file ends.
    for shift in 0..8 {
        let long = format!("{}\r\n", "é\r\n東\r\u{1f600}x").repeat(9000);
        let long = format!("{}{long}", "y".repeat(shift));
        let got = read(long.as_bytes(), usize::MAX).expect("a text");
        assert_eq!(got, long.replace("\r\n", "\n").replace('\r', "\n"));
    }
    for broken in [&b"a\xff"[..], b"ab\xe6\x9d", b"\xfe\xff\0a"] {
        assert_eq!(read(broken, 1).expect_err("not UTF-8").to_string(), "it is not UTF-8");
    }
}
