//! Calls as Python has them: `name(key="text", other=[1, 2.5], flag=True)`.

use serde_json::{Map, Value};

use super::marks::Call;

/// The call that a line is; none where it is something else.
pub(super) fn call(line: &str) -> Option<Call> {
    let (name, rest) = line.split_once('(')?;
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_.-".contains(c));
    let mut reader = Reader(rest);
    let mut arguments = Map::new();
    while !reader.takes(')') {
        if !arguments.is_empty() && !reader.takes(',') {
            return None;
        }
        if reader.takes(')') {
            break;
        }
        let (key, rest) = reader.0.split_once('=')?;
        reader.0 = rest;
        let key = key.trim();
        let value = is_name(key).then(|| reader.value(0)).flatten()?;
        arguments.insert(key.to_owned(), value);
    }
    let whole = reader.0.trim().is_empty() && is_name(name.trim());
    whole.then(|| Call { name: name.trim().to_owned(), arguments: Value::Object(arguments).to_string() })
}

/// Lists in lists that a call may have.
const DEEPEST: usize = 64;

/// What is left to read.
struct Reader<'a>(&'a str);

impl Reader<'_> {
    fn takes(&mut self, c: char) -> bool {
        let rest = self.0.trim_start().strip_prefix(c);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        self.0 = self.0.trim_start();
        match self.0.chars().next().filter(|_| depth < DEEPEST)? {
            quote @ ('"' | '\'') => self.text(quote).map(Value::String),
            '[' => {
                self.takes('[');
                let mut list = Vec::new();
                while !self.takes(']') {
                    (list.is_empty() || self.takes(',')).then_some(())?;
                    if self.takes(']') {
                        break;
                    }
                    list.push(self.value(depth + 1)?);
                }
                Some(Value::Array(list))
            }
            '{' => {
                self.takes('{');
                let mut map = Map::new();
                while !self.takes('}') {
                    (map.is_empty() || self.takes(',')).then_some(())?;
                    if self.takes('}') {
                        break;
                    }
                    let Value::String(key) = self.value(depth + 1)? else { return None };
                    self.takes(':').then_some(())?;
                    map.insert(key, self.value(depth + 1)?);
                }
                Some(Value::Object(map))
            }
            _ => {
                let end = self.0.find([',', ')', ']', '}']).unwrap_or(self.0.len());
                let (word, rest) = self.0.split_at(end);
                self.0 = rest;
                match word.trim() {
                    "True" | "true" => Some(true.into()),
                    "False" | "false" => Some(false.into()),
                    "None" | "null" => Some(Value::Null),
                    number => serde_json::from_str::<serde_json::Number>(number).ok().map(Value::Number),
                }
            }
        }
    }

    /// A text in quotes, with the escapes that Python and JSON have in common.
    fn text(&mut self, quote: char) -> Option<String> {
        let mut text = String::new();
        let mut chars = self.0[1..].char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.0 = &self.0[1 + at + 1..];
                    return Some(text);
                }
                '\\' => text.push(match chars.next()?.1 {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    other => other,
                }),
                c => text.push(c),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_what_is_none() {
        let read = |line: &str| call(line).map(|call| (call.name, call.arguments));
        for (line, name, arguments) in [
            ("now()", "now", "{}"),
            (r#"get_weather(city="Ber\"lin, (x)", days=3)"#, "get_weather", r#"{"city":"Ber\"lin, (x)","days":3}"#),
            ("f(a=[1, -2.5, 'x'], b={'k': None}, c=True,)", "f", r#"{"a":[1,-2.5,"x"],"b":{"k":null},"c":true}"#),
        ] {
            assert_eq!(read(line), Some((name.into(), arguments.into())), "{line}");
        }
        for line in
            ["", "f", "f(", "f(1)", "f(a=)", "f(a=1", "f(a=1) g()", "f(a=x)", "a b(c=1)", "f(a='x)", "f(a=1 b=2)"]
        {
            assert_eq!(read(line), None, "{line}");
        }
        assert_eq!(read(&format!("f(a={})", "[".repeat(100_000))), None);
    }
}
