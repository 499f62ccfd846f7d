//! What templates expect of Python and of transformers beside what minijinja has.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, State, filters, functions};

use super::json;
use super::limits::{self, refused};

/// Filters of minijinja by name, and the functions behind them.
macro_rules! named {
    ($module:ident: $($name:ident),*) => { [$((stringify!($name), Value::from_function($module::$name))),*] };
}

/// Gives `environment` the filters, functions and methods that transformers' templates have.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    minijinja_contrib::add_to_environment(environment);
    let plain = named!(filters: upper, lower, title, capitalize, replace, length, dictsort, items, reverse, trim, join,
        split, lines, default, round, abs, int, float, attr, first, last, min, max, sort, list, string, bool, batch,
        slice, sum, indent, select, reject, selectattr, rejectattr, map, groupby, unique, chain, zip, pprint, format);
    let also = [("count", Value::from_function(filters::length)), ("d", Value::from_function(filters::default))];
    for (name, filter) in plain.into_iter().chain(also) {
        environment.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            limits::call(name, &args)?;
            filter.call(state, &args)
        });
    }
    for (name, function) in named!(functions: dict, namespace) {
        environment.add_function(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            limits::call(name, &args)?;
            function.call(state, &args)
        });
    }
    environment.add_filter("operand", limits::operand);
    environment.add_filter("percent", percent);
    environment.add_filter("times", times);
    environment.add_filter("tojson", json::tojson);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    environment.remove_global("debug");
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> { Err(refused(message)) });
    environment.set_unknown_method_callback(method);
}

/// An operator of numbers, on integers if both are, else on floats; what it has no result for cannot be calculated.
fn arithmetic(
    (left, sign, right): (&Value, &str, &Value),
    integers: impl Fn(i128, i128) -> Option<i128>,
    floats: impl Fn(f64, f64) -> Option<f64>,
) -> Result<Value, Error> {
    let result = if let (Ok(a), Ok(b)) = (i128::try_from(left.clone()), i128::try_from(right.clone())) {
        integers(a, b).map(|result| i64::try_from(result).map_or_else(|_| Value::from(result), Value::from))
    } else if let (Ok(a), Ok(b)) = (f64::try_from(left.clone()), f64::try_from(right.clone())) {
        floats(a, b).map(Value::from)
    } else {
        let (left, right) = (left.kind(), right.kind());
        return Err(refused(format!("tried to use {sign} operator on unsupported types {left} and {right}")));
    };
    result.ok_or_else(|| refused(format!("unable to calculate {left} {sign} {right}")))
}

/// `left % right`: a text with `right` in its places, or the remainder of a division with the divisor's sign.
fn percent(left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        let args = match right.downcast_object_ref::<Tuple>() {
            Some(tuple) => tuple.to_vec(),
            None => vec![right.clone()],
        };
        limits::call("percent", &[std::slice::from_ref(left), &args[..]].concat())?;
        return format(FormatStyle::Printf, text, &args).map(Value::from);
    }
    let integers = |a: i128, b: i128| {
        let remainder = a.checked_rem(b)?;
        let other_sign = remainder != 0 && (remainder < 0) != (b < 0);
        Some(if other_sign { remainder + b } else { remainder })
    };
    let floats = |a: f64, b: f64| {
        let remainder = a % b;
        let other_sign = remainder != 0.0 && (remainder < 0.0) != (b < 0.0);
        (b != 0.0).then_some(if other_sign { remainder + b } else { remainder })
    };
    arithmetic((left, "%", right), integers, floats)
}

/// `left * right`: a product, or a text, list or tuple over and over.
fn times(left: &Value, right: &Value) -> Result<Value, Error> {
    let is_list = |value: &Value| matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Iterable);
    let (list, count) = match (is_list(left), is_list(right)) {
        (true, false) => (left, right),
        (false, true) => (right, left),
        _ => return arithmetic((left, "*", right), i128::checked_mul, |a, b| Some(a * b)),
    };
    let count =
        i64::try_from(count.clone()).map_err(|_| refused("what is repeated is repeated a whole number of times"))?;
    let count = usize::try_from(count).unwrap_or(0);
    limits::repeated(list, count)?;
    if let Some(text) = list.as_str() {
        return Ok(Value::from(text.repeat(count)));
    }
    let items: Vec<Value> = list.try_iter()?.collect();
    let items = std::iter::repeat_n(items, count).flatten();
    Ok(if list.is_tuple() { Value::from(Tuple::from(items.collect::<Vec<_>>())) } else { items.collect() })
}

/// Methods that minijinja's values do not have themselves.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let all = [std::slice::from_ref(value), args].concat();
    limits::call(name, &all)?;
    let own = match value.as_str() {
        Some(text) => text_method(text, name, args)?,
        None => None,
    };
    match own {
        Some(result) => Ok(result),
        None if value.kind() == ValueKind::Seq && name == "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let position = value.try_iter()?.position(|item| item == *wanted);
            position.map(Value::from).ok_or_else(|| refused(format!("{wanted} is not in the list")))
        }
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Methods of Python's strings.
fn text_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let parts = |parts: [&str; 3]| Value::from(Tuple::from(parts.map(Value::from).to_vec()));
    let one = || from_args::<(&str,)>(args).map(|(argument,)| argument);
    // Fills up to a width; `before` is how many of the missing characters go before the text.
    let padded = |before: fn(usize, usize) -> usize| {
        let (width, fill): (usize, Option<char>) = from_args(args)?;
        let missing = width.saturating_sub(text.chars().count());
        let fill = |count| std::iter::repeat_n(fill.unwrap_or(' '), count).collect::<String>();
        let before = before(missing, width);
        Ok::<_, Error>(Value::from(fill(before) + text + &fill(missing - before)))
    };
    Ok(Some(match name {
        "split" | "rsplit" => {
            let (separator, most) = split_arguments(args)?;
            if separator.as_deref() == Some("") {
                return Err(refused("empty separator"));
            }
            split(text, separator.as_deref(), most, name == "rsplit")
        }
        "partition" => {
            let by = one()?;
            parts(text.split_once(by).map_or([text, "", ""], |(before, after)| [before, by, after]))
        }
        "rpartition" => {
            let by = one()?;
            parts(text.rsplit_once(by).map_or(["", "", text], |(before, after)| [before, by, after]))
        }
        "removeprefix" => Value::from(text.strip_prefix(one()?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(one()?).unwrap_or(text)),
        "casefold" => Value::from(text.to_lowercase()),
        "swapcase" => {
            let swap =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "ljust" => padded(|_, _| 0)?,
        "rjust" => padded(|missing, _| missing)?,
        // As Python divides what does not come out even.
        "center" => padded(|missing, width| missing / 2 + (missing & width & 1))?,
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let zeros = "0".repeat(width.saturating_sub(text.chars().count()));
            let sign = usize::from(text.starts_with(['-', '+']));
            Value::from(format!("{}{zeros}{}", &text[..sign], &text[sign..]))
        }
        "index" | "rindex" => {
            let part = one()?;
            let at = if name == "index" { text.find(part) } else { text.rfind(part) };
            let at = at.ok_or_else(|| refused("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        _ => return Ok(None),
    }))
}

/// `sep` and `maxsplit`, by place or by name.
fn split_arguments(args: &[Value]) -> Result<(Option<String>, Option<usize>), Error> {
    let (separator, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        Some(separator) => Some(separator),
        None => named.get::<Option<Value>>("sep")?,
    };
    let most = match most {
        Some(most) => Some(most),
        None => named.get::<Option<i64>>("maxsplit")?,
    };
    named.assert_all_used()?;
    let separator = separator.filter(|separator| !separator.is_none());
    let separator = separator.map(|s| s.as_str().map(str::to_owned).ok_or_else(|| refused("a separator is no text")));
    Ok((separator.transpose()?, most.and_then(|most| usize::try_from(most).ok())))
}

/// The parts of `text` between separators, at most `most` of them cut off from the start, or `from_end`.
fn split<'a>(text: &'a str, separator: Option<&str>, most: Option<usize>, from_end: bool) -> Value {
    let cut = |rest: &'a str| match (separator, from_end) {
        (Some(separator), false) => rest.split_once(separator),
        (Some(separator), true) => rest.rsplit_once(separator).map(|(rest, part)| (part, rest)),
        (None, false) => rest.split_once(char::is_whitespace).map(|(part, rest)| (part, rest.trim_start())),
        (None, true) => rest.rsplit_once(char::is_whitespace).map(|(rest, part)| (part, rest.trim_end())),
    };
    let mut parts = Vec::new();
    let mut rest = match (separator, from_end) {
        (Some(_), _) => text,
        (None, false) => text.trim_start(),
        (None, true) => text.trim_end(),
    };
    while let Some((part, after)) = cut(rest).filter(|_| most.is_none_or(|most| parts.len() < most)) {
        parts.push(part);
        rest = after;
    }
    parts.extend(Some(rest).filter(|rest| separator.is_some() || !rest.is_empty()));
    if from_end {
        parts.reverse();
    }
    parts.into_iter().map(Value::from).collect()
}
