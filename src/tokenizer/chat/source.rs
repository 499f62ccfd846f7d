//! A chat template's text as minijinja takes it, where that differs from what Jinja2 takes.
//!
//! - Line endings become `\n`, as Jinja2 reads them.
//! - `{% generation %}` marks the answers of a conversation for training. Here it is a block without effect.
//! - `a % b` becomes `(a)|percent(b)`, since minijinja has `%` for numbers only, and `a * b` becomes `(a)|times(b)`,
//!   since what minijinja repeats may take gigabytes.
//! - What is joined (`+`, `~`), each list, dict and tuple that is written out, and what becomes an
//!   attribute (`{% set a.b = c %}`) passes through the filter `operand`. It changes nothing and refuses what is too
//!   large ([`super::limits`]): a short template could otherwise double a text until memory ends, and minijinja counts
//!   instructions, not bytes.
//!
//! A filter binds closer than any operator, so that putting `|operand` behind an operand never changes what an
//! expression means.

/// A template's text, ready to be compiled.
pub(super) struct Source {
    pub(super) text: String,
    /// Bytes of the longest stretch that is written out as it stands.
    pub(super) longest: usize,
}

/// Prepares a template. What is not well formed stays as it is: minijinja says what is wrong with it.
pub(super) fn prepare(template: &str) -> Source {
    let template = template.replace("\r\n", "\n").replace('\r', "\n");
    let mut source = Source { text: String::with_capacity(template.len()), longest: 0 };
    let mut rest = template.as_str();
    while let Some(at) = opening(rest) {
        source.plain(&rest[..at]);
        rest = &rest[at..];
        let length = if rest.starts_with("{#") {
            let length = rest.find("#}").map_or(rest.len(), |end| end + 2);
            source.text.push_str(&rest[..length]);
            length
        } else {
            let tag = Tag::rewrite(rest);
            source.text.push_str(&tag.out);
            match tag.name.as_str() {
                "raw" => tag.length + source.plain(&rest[tag.length..][..raw(&rest[tag.length..])]),
                _ => tag.length,
            }
        };
        rest = &rest[length..];
    }
    source.plain(rest);
    source
}

impl Source {
    fn plain(&mut self, text: &str) -> usize {
        self.longest = self.longest.max(text.len());
        self.text.push_str(text);
        text.len()
    }
}

/// Where the next tag or comment starts.
fn opening(text: &str) -> Option<usize> {
    let mut at = 0;
    loop {
        at += text[at..].find('{')?;
        if matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')) {
            return Some(at);
        }
        at += 1;
    }
}

/// Bytes up to the tag that ends a raw block.
fn raw(text: &str) -> usize {
    let ends = |at: &usize| text[at + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw");
    text.match_indices("{%").map(|(at, _)| at).find(ends).unwrap_or(text.len())
}

/// Words that stand between operands.
const KEYWORDS: [&str; 9] = ["and", "or", "not", "in", "is", "if", "else", "elif", "recursive"];

/// One tag on its way from the template to minijinja.
#[derive(Default)]
struct Tag {
    out: String,
    /// Bytes of the template that were read.
    length: usize,
    /// The statement's first word; empty for an expression.
    name: String,
    levels: Vec<Level>,
    /// The last token ends an operand: an operator that follows has two sides.
    after_operand: bool,
    /// The last token was `.` or `|`: the name that follows belongs to the operand.
    in_operand: bool,
    /// Names before `in` or `=` are being assigned to.
    targets: bool,
    /// An attribute is, and its value is being read.
    attribute: bool,
}

/// What is known within one pair of brackets, or outside of all.
#[derive(Default)]
struct Level {
    /// Where the bracket stands in the output.
    opened: usize,
    /// The bracket writes out a value; it neither calls nor indexes.
    literal: bool,
    /// It has to be checked: a list, a dict, a tuple, or the result of an operator.
    checked: bool,
    /// The operand at hand is the right side of `+` or `~`.
    joined: bool,
    /// Where the product at hand starts in the output.
    product: Option<usize>,
    /// The operand at hand is the right side of `%` or `*`.
    right_side: bool,
}

impl Tag {
    /// Reads the tag that `text` starts with.
    fn rewrite(text: &str) -> Self {
        let mut tag = Self { out: text[..2].to_owned(), length: 2, levels: vec![Level::default()], ..Self::default() };
        let closing = if text.starts_with("{%") { "%}" } else { "}}" };
        let mut expects_name = closing == "%}";
        if text[2..].starts_with(['-', '+']) {
            tag.take(text, 1);
        }
        while tag.length < text.len() {
            let rest = &text[tag.length..];
            let marked = rest.starts_with(['-', '+']) && rest[1..].starts_with(closing);
            if tag.levels.len() == 1 && (marked || rest.starts_with(closing)) {
                tag.end_product();
                if tag.attribute {
                    tag.out.push_str(")|operand ");
                }
                tag.take(text, usize::from(marked) + 2);
                break;
            }
            let length = token(rest);
            match &rest[..length] {
                space if space.starts_with(char::is_whitespace) => tag.take(text, length),
                word if expects_name && word.starts_with(|c: char| c.is_alphabetic()) => {
                    tag.statement(word);
                    expects_name = false;
                }
                token => tag.token(token),
            }
        }
        tag
    }

    fn take(&mut self, text: &str, length: usize) {
        self.out.push_str(&text[self.length..self.length + length]);
        self.length += length;
    }

    fn push(&mut self, token: &str) {
        self.out.push_str(token);
        self.length += token.len();
    }

    fn level(&mut self) -> &mut Level {
        self.levels.last_mut().expect("the outermost level stays")
    }

    /// The word that says what a statement does.
    fn statement(&mut self, word: &str) {
        self.name = word.to_owned();
        self.out.push_str(match word {
            "generation" => "with",
            "endgeneration" => "endwith",
            other => other,
        });
        self.length += word.len();
        self.targets = matches!(word, "for" | "set" | "with");
        // `{% call(name) macro() %}`: what is in brackets are names.
        self.after_operand = word == "call";
    }

    fn token(&mut self, token: &str) {
        let first = token.chars().next().expect("tokens are not empty");
        match token {
            _ if self.in_operand && (first.is_alphanumeric() || first == '_') => {
                self.push(token);
                (self.in_operand, self.after_operand) = (false, true);
            }
            "." | "|" => {
                self.push(token);
                (self.in_operand, self.after_operand) = (true, false);
            }
            _ if KEYWORDS.contains(&token) => {
                self.targets &= token != "in";
                self.separate(token);
            }
            "," => {
                self.level().checked |= self.levels.last().is_some_and(|level| level.literal);
                self.separate(token);
            }
            "=" => {
                let of_set = self.targets && self.name == "set" && self.levels.len() == 1;
                self.targets = false;
                self.separate(token);
                if of_set && self.out.contains('.') {
                    self.out.push_str(" (");
                    self.attribute = true;
                }
            }
            "(" | "[" | "{" => self.open(token),
            ")" | "]" | "}" => self.close(token),
            "+" | "-" | "~" | "*" | "/" | "//" | "%" | "**" if self.after_operand => self.operator(token),
            "+" | "-" | "*" | "**" => {
                self.begin_product();
                self.push(token);
            }
            _ if first.is_alphanumeric() || matches!(first, '_' | '"' | '\'') => {
                let quoted = matches!(first, '"' | '\'');
                if self.after_operand && !quoted {
                    self.end_product();
                }
                self.begin_product();
                self.push(token);
                self.after_operand = true;
            }
            _ => self.separate(token),
        }
    }

    /// A token between operands that is no operator of theirs.
    fn separate(&mut self, token: &str) {
        self.end_product();
        self.push(token);
        (self.after_operand, self.in_operand) = (false, false);
    }

    fn operator(&mut self, token: &str) {
        match token {
            "**" => self.push(token),
            "-" => self.separate(token),
            "/" | "//" => {
                self.end_operand();
                self.push(token);
            }
            "%" | "*" => {
                self.end_operand();
                let start = self.level().product.unwrap_or(self.out.len());
                let left = self.out.split_off(start);
                self.out += &format!("({left})|{}(", if token == "%" { "percent" } else { "times" });
                self.length += 1;
                self.level().right_side = true;
            }
            _ => {
                self.end_operand();
                self.out.push_str("|operand ");
                self.push(token);
                let level = self.level();
                (level.joined, level.checked) = (true, true);
                level.product = None;
            }
        }
        self.after_operand = false;
    }

    fn open(&mut self, bracket: &str) {
        let literal = !self.after_operand;
        self.begin_product();
        let checked = literal && bracket != "(";
        self.levels.push(Level { opened: self.out.len(), literal, checked, ..Level::default() });
        self.push(bracket);
        self.after_operand = false;
    }

    fn close(&mut self, bracket: &str) {
        self.end_product();
        self.push(bracket);
        if self.levels.len() > 1
            && let Some(level) = self.levels.pop()
            && level.literal
            && level.checked
            && !self.targets
        {
            self.out.insert(level.opened, '(');
            self.out.push_str("|operand)");
        }
        (self.after_operand, self.in_operand) = (true, false);
    }

    fn begin_product(&mut self) {
        let at = self.out.len();
        self.level().product.get_or_insert(at);
    }

    /// Ends the right side of an operator.
    fn end_operand(&mut self) {
        let level = self.level();
        let (joined, right_side) = (level.joined, level.right_side);
        (level.joined, level.right_side) = (false, false);
        if joined {
            self.out.push_str("|operand ");
        }
        if right_side {
            self.out.push(')');
        }
    }

    fn end_product(&mut self) {
        self.end_operand();
        self.level().product = None;
    }
}

/// Bytes of the token that `text` starts with: a string, a name or number, white space, or an operator.
fn token(text: &str) -> usize {
    let first = text.chars().next().expect("there is text");
    let run = |belongs: &dyn Fn(char) -> bool| text.find(|c| !belongs(c)).unwrap_or(text.len());
    match first {
        '"' | '\'' => {
            let mut escaped = false;
            let end = text[1..].find(|c| {
                let ends = c == first && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            });
            end.map_or(text.len(), |end| end + 2)
        }
        c if c.is_whitespace() => run(&char::is_whitespace),
        c if c.is_ascii_digit() => {
            let whole = run(&|c| c.is_alphanumeric() || c == '_');
            let fraction = &text[whole..];
            let is_fraction = fraction.starts_with('.') && fraction[1..].starts_with(|c: char| c.is_ascii_digit());
            match is_fraction {
                true => whole + 1 + fraction[1..].find(|c: char| !c.is_alphanumeric()).unwrap_or(fraction.len() - 1),
                false => whole,
            }
        }
        c if c.is_alphabetic() || c == '_' => run(&|c| c.is_alphanumeric() || c == '_'),
        _ => {
            let two = ["**", "//", "==", "!=", "<=", ">="].iter().find(|two| text.starts_with(*two));
            two.map_or(first.len_utf8(), |two| two.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::prepare;

    fn prepared(template: &str) -> String {
        prepare(template).text
    }

    #[test]
    fn what_needs_nothing_stays() {
        for template in [
            "",
            "a { b } {c",
            "{{ a.b['c'](d, e=1)[2:-1] | trim('x') | map(attribute='y') }}",
            "{%- for k, v in d.items() if k is not none and not v recursive -%}{% endfor %}",
            "{% for (k, v) in d %}{% set (a, b) = c %}{% macro m(a, b=1) %}{% call(x, y) m(1) %}",
            "{% raw %}{{ a ~ b }}{% generation %}{%- endraw %}",
            "{# a % b {{ #}{{ '{% generation %}' }}{{ \"a\\\"% b\" }}",
            "{{ a - b / c // d ** e }}{{ f(*a, **b) }}{{ -a }}{{ a == b != c <= d }}",
            "{{ unfinished",
            "{{ 'unfinished",
            "{% if",
            "{{ (a) }}{{ (a and b) }}",
        ] {
            assert_eq!(prepared(template), template);
        }
    }

    #[test]
    fn operators_and_literals_are_checked() {
        for (template, expected) in [
            ("{{ a + b }}", "{{ a |operand + b |operand }}"),
            ("{{ a~b.c|trim-}}", "{{ a|operand ~b.c|trim|operand -}}"),
            ("{{ a + 'x' if b else c }}", "{{ a |operand + 'x' |operand if b else c }}"),
            ("{{ (a ~ b).strip() }}", "{{ ((a |operand ~ b|operand )|operand).strip() }}"),
            ("{{ f(a * 2, b) }}", "{{ f((a )|times( 2), b) }}"),
            ("{% set x = [a, {'b': c}] %}", "{% set x = ([a, ({'b': c}|operand)]|operand) %}"),
            ("{% set x = (a, b) %}", "{% set x = ((a, b)|operand) %}"),
            ("{% set a.b = c, d %}{% set e = f.g %}", "{% set a.b = ( c, d )|operand %}{% set e = f.g %}"),
            ("{{ -a + 1.5 - b }}", "{{ -a |operand + 1.5 |operand - b }}"),
        ] {
            assert_eq!(prepared(template), expected);
        }
    }

    #[test]
    fn remainders_and_formats_are_filters() {
        for (template, expected) in [
            ("{% if loop.index0 % 2 == 0 %}", "{% if (loop.index0 )|percent( 2 )== 0 %}"),
            ("{{ '%s' % (a, b) }}", "{{ ('%s' )|percent( ((a, b)|operand) )}}"),
            ("{{ a * b % c + d }}", "{{ ((a )|times( b ))|percent( c )|operand + d |operand }}"),
            ("{{ a + b % c }}", "{{ a |operand + (b |operand )|percent( c )}}"),
            ("{{ a % b % c }}", "{{ ((a )|percent( b ))|percent( c )}}"),
            ("{{ a % b|trim }}", "{{ (a )|percent( b|trim )}}"),
        ] {
            assert_eq!(prepared(template), expected);
        }
    }

    #[test]
    fn generation_is_a_block_without_effect() {
        let template = "{%- generation -%}a{% endgeneration %}{%generation%}";
        assert_eq!(prepared(template), "{%- with -%}a{% endwith %}{%with%}");
        assert_eq!(prepared("{{ generation }}"), "{{ generation }}", "a name like any other");
    }

    #[test]
    fn line_endings_and_lengths() {
        let source = prepare("a\r\nb\rc{{ 'x\r\n' }}\n");
        assert_eq!((source.text.as_str(), source.longest), ("a\nb\nc{{ 'x\n' }}\n", 5));
        assert_eq!(prepare("ab{% raw %}{{ 1234 }}{% endraw %}").longest, 10);
    }
}
