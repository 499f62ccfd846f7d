//! `tojson` as transformers gives it to templates: Python's `json.dumps`, which escapes nothing for HTML and leaves
//! text that is not ASCII as it is.

use minijinja::Error;
use minijinja::value::{Kwargs, Value, ValueKind};

use super::limits::{self, MAX_TEXT, refused};

/// `x | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
pub(super) fn tojson(value: &Value, ensure_ascii: Option<bool>, named: Kwargs) -> Result<String, Error> {
    limits::size(value)?;
    let ensure_ascii = ensure_ascii.or(named.get::<Option<bool>>("ensure_ascii")?).unwrap_or(false);
    let indent = match named.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(i64::try_from(indent)?.clamp(0, 64) as usize),
        }),
    };
    let separators: Option<Vec<String>> = named.get("separators")?;
    let sort_keys = named.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    named.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(refused("separators are two texts")),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let mut json = Json { out: String::new(), ensure_ascii, indent, item, key, sort_keys };
    json.value(value, 0)?;
    Ok(json.out)
}

struct Json {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    /// Between two items.
    item: String,
    /// Between a key and its value.
    key: String,
    sort_keys: bool,
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if self.out.len() > MAX_TEXT {
            return Err(refused("tojson writes more than a template may"));
        }
        match value.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number => self.out += &scalar(value),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(['[', ']'], items, depth, |json, item| json.value(&item, depth + 1))?;
            }
            ValueKind::Map => {
                let pairs = value.as_object().and_then(|object| object.try_iter_pairs());
                let mut pairs: Vec<(Value, Value)> = pairs.into_iter().flatten().collect();
                if self.sort_keys {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.list(['{', '}'], pairs, depth, |json, (key, value)| {
                    match key.as_str() {
                        Some(text) => json.text(text),
                        None => json.text(&scalar(&key)),
                    }
                    json.out += &json.key;
                    json.value(&value, depth + 1)
                })?;
            }
            kind => return Err(refused(format!("a value of type {kind} cannot be written as JSON"))),
        }
        Ok(())
    }

    fn list<T>(
        &mut self,
        [opening, closing]: [char; 2],
        items: Vec<T>,
        depth: usize,
        mut write: impl FnMut(&mut Self, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(opening);
        let is_empty = items.is_empty();
        for (i, item) in items.into_iter().enumerate() {
            if i > 0 {
                self.out += &self.item;
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !is_empty {
            self.line(depth);
        }
        self.out.push(closing);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out += &indent.repeat(depth);
        }
    }

    fn text(&mut self, text: &str) {
        let json = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            self.out += &json;
            return;
        }
        for c in json.chars() {
            match c {
                ' '..='~' => self.out.push(c),
                c => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| self.out += &format!("\\u{unit:04x}")),
            }
        }
    }
}

/// A number, truth value or none as `json.dumps` writes it.
fn scalar(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => value.is_true().to_string(),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) if number.is_nan() => "NaN".into(),
            Ok(number) if number.is_infinite() => if number > 0.0 { "Infinity" } else { "-Infinity" }.into(),
            // The shortest digits, with an exponent of two digits and a sign, as Python has it.
            Ok(number) => match format!("{number:?}").split_once('e') {
                Some((digits, exponent)) => {
                    let exponent: i32 = exponent.parse().unwrap_or(0);
                    format!("{}e{exponent:+03}", digits.strip_suffix(".0").unwrap_or(digits))
                }
                None => format!("{number:?}"),
            },
            Err(_) => value.to_string(),
        },
        _ => value.to_string(),
    }
}
