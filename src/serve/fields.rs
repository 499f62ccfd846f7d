//! The fields of a request, taken one by one: what is left over is refused by name.

use serde_json::{Map, Value};

use super::problem::{Answer, Problem};

/// The fields of a JSON object that have not been taken yet.
#[derive(Debug)]
pub(super) struct Fields {
    map: Map<String, Value>,
    /// Where the object stands in the request, with a dot behind it.
    place: String,
    known: Vec<&'static str>,
}

/// Numbers in a message are short.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 60 { format!("{}…", text.chars().take(60).collect::<String>()) } else { text }
}

impl Fields {
    /// The object that a body holds.
    pub(super) fn parse(body: &[u8]) -> Answer<Self> {
        let value: Value = serde_json::from_slice(body)
            .map_err(|error| Problem::bad(format!("the body is not valid JSON: {error}")))?;
        Self::of("", value)
    }

    /// The object in a field.
    pub(super) fn of(name: &str, value: Value) -> Answer<Self> {
        let place = if name.is_empty() { String::new() } else { format!("{name}.") };
        match value {
            Value::Object(map) => Ok(Self { map, place, known: Vec::new() }),
            other if name.is_empty() => {
                Err(Problem::bad(format!("the body is {}, an object is expected", shown(&other))))
            }
            other => Err(wrong(name, &other, "an object")),
        }
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.place)
    }

    /// The value of a field, if it has one.
    pub(super) fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// A field as what `read` makes of it.
    pub(super) fn read<T>(
        &mut self,
        name: &'static str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Answer<Option<T>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| wrong(&self.name(name), &value, expected))
    }

    /// A field that has to be there.
    pub(super) fn need(&mut self, name: &'static str) -> Answer<Value> {
        let full = self.name(name);
        self.take(name).ok_or_else(|| Problem::field(full.clone(), format!("{full} is missing")))
    }

    pub(super) fn text(&mut self, name: &'static str) -> Answer<Option<String>> {
        self.read(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn flag(&mut self, name: &'static str) -> Answer<Option<bool>> {
        self.read(name, "true or false", Value::as_bool)
    }

    pub(super) fn whole(&mut self, name: &'static str, min: usize, max: usize) -> Answer<Option<usize>> {
        let expected = if max == usize::MAX { format!("a whole number from {min}") } else { format!("{min} to {max}") };
        let fits = |number: &u64| (min as u64..=max as u64).contains(number);
        self.read(name, &expected, |value| whole(value).filter(fits).map(|number| number as usize))
    }

    pub(super) fn number(&mut self, name: &'static str, min: f64, max: f64) -> Answer<Option<f32>> {
        let expected = format!("a number from {min} to {max}");
        let fits = |number: &f64| (min..=max).contains(number);
        self.read(name, &expected, |value| value.as_f64().filter(fits).map(|number| number as f32))
    }

    /// A list of token ids.
    pub(super) fn ids(&mut self, name: &'static str) -> Answer<Option<Vec<u32>>> {
        self.read(name, "a list of token ids", ids)
    }

    /// Strings: one, or a list.
    pub(super) fn texts(&mut self, name: &'static str) -> Answer<Option<Vec<String>>> {
        self.read(name, "a string or a list of strings", |value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(list) => list.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
            _ => None,
        })
    }

    /// The object in a field.
    pub(super) fn object(&mut self, name: &'static str) -> Answer<Option<Self>> {
        let full = self.name(name);
        self.take(name).map(|value| Self::of(&full, value)).transpose()
    }

    /// Fields that say who asks, and what a client may keep for itself: they change nothing.
    pub(super) fn pass(&mut self, names: &[&'static str]) {
        names.iter().for_each(|name| drop(self.take(name)));
    }

    /// Refuses fields that there is no support for, unless they say what is done anyway.
    pub(super) fn refuse(&mut self, fields: &[(&'static str, Value, &str)]) -> Answer<()> {
        for (name, harmless, hint) in fields {
            let full = self.name(name);
            match self.take(name) {
                Some(value) if value != *harmless => return Err(Problem::unsupported(&full, hint)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Refuses what was not taken.
    pub(super) fn finish(&mut self) -> Answer<()> {
        let Some(name) = self.map.keys().next() else { return Ok(()) };
        let full = self.name(name);
        let plain = |text: &str| text.to_lowercase().replace(['_', '-'], "");
        let alike = self.known.iter().find(|known| plain(known) == plain(name) || plain(known).contains(&plain(name)));
        let hint = alike.map_or("leave it out".into(), |known| format!("is {known} meant"));
        let problem = Problem::field(full.clone(), format!("{full} is not a field of this request, {hint}"));
        Err(problem.with_code("unknown_parameter"))
    }
}

/// What is said of a value that does not fit.
pub(super) fn wrong(name: &str, value: &Value, expected: &str) -> Problem {
    Problem::field(name, format!("{name} is {}, {expected} is expected", shown(value)))
}

/// A whole number, also one that is written with a fraction of zero.
fn whole(value: &Value) -> Option<u64> {
    let from_fraction = |number: f64| (number.fract() == 0.0 && (0.0..9e15).contains(&number)).then_some(number as u64);
    value.as_u64().or_else(|| value.as_f64().and_then(from_fraction))
}

/// Token ids.
pub(super) fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).expect("an object")
    }

    #[test]
    fn what_is_wrong_is_named() {
        let said = |json: &str| {
            let mut fields = match Fields::parse(json.as_bytes()) {
                Ok(fields) => fields,
                Err(problem) => return problem.message,
            };
            let taken = fields.whole("n", 1, 8).and_then(|_| fields.texts("stop")).and_then(|_| fields.flag("stream"));
            taken.and_then(|_| fields.number("top_p", 0.0, 1.0)).and_then(|_| fields.finish()).unwrap_err().message
        };
        for (json, expected) in [
            ("[1]", "the body is [1], an object is expected"),
            ("{", "the body is not valid JSON: EOF while parsing an object at line 1 column 1"),
            (r#"{"n": 0}"#, "n is 0, 1 to 8 is expected"),
            (r#"{"n": "2"}"#, "n is \"2\", 1 to 8 is expected"),
            (r#"{"n": 1.5}"#, "n is 1.5, 1 to 8 is expected"),
            (r#"{"stop": [1]}"#, "stop is [1], a string or a list of strings is expected"),
            (r#"{"stream": 1}"#, "stream is 1, true or false is expected"),
            (r#"{"top_p": 1.5}"#, "top_p is 1.5, a number from 0 to 1 is expected"),
            (r#"{"Top-P": 1}"#, "Top-P is not a field of this request, is top_p meant"),
            (r#"{"weird": null}"#, "weird is not a field of this request, leave it out"),
        ] {
            assert_eq!(said(json), expected, "{json}");
        }
    }

    #[test]
    fn null_is_no_value() {
        let mut all = fields(r#"{"n": null, "stop": "a", "best_of": 2.0}"#);
        assert_eq!(all.whole("n", 1, 8).expect("none"), None);
        assert_eq!(all.texts("stop").expect("one").expect("one"), ["a"]);
        assert_eq!(all.whole("best_of", 1, 8).expect("one"), Some(2));
        all.finish().expect("all are taken");
        let mut harmless = fields(r#"{"store": false}"#);
        harmless.refuse(&[("store", Value::Bool(false), "nothing is stored")]).expect("nothing changes");
        let mut other = fields(r#"{"store": true}"#);
        let problem = other.refuse(&[("store", Value::Bool(false), "nothing is stored")]).unwrap_err();
        assert_eq!(problem.message, "store is not supported, nothing is stored");
    }
}
