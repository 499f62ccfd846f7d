//! A conversation written out as the model was trained to see it: the model's own Jinja template.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

const NAME: &str = "chat template";

/// Instructions that a rendering may take: thousands for each of a thousand messages. A template comes with the
/// model, from whoever made it, and may loop.
const FUEL: u64 = 10_000_000;

/// A compiled chat template.
#[derive(Debug)]
pub(super) struct Chat {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl Chat {
    /// Compiles `template` with the functions and white space rules that transformers gives it.
    pub(super) fn new(template: &str, bos_token: &str, eos_token: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            date(since.as_secs(), &format)
        });
        environment.add_template_owned(NAME, template.to_owned()).map_err(one_line)?;
        Ok(Self { environment, bos_token: bos_token.to_owned(), eos_token: eos_token.to_owned() })
    }

    pub(super) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages: Vec<Value> =
            messages.iter().map(|m| context! { role => &m.role, content => &m.content }).collect();
        let template = self.environment.get_template(NAME).map_err(one_line)?;
        let context = context! {
            messages,
            add_generation_prompt,
            bos_token => &self.bos_token,
            eos_token => &self.eos_token,
            tools => (),
            documents => (),
        };
        template.render(context).map_err(one_line)
    }
}

/// The error and where it is; its debug output would repeat the template.
fn one_line(error: Error) -> anyhow::Error {
    let message = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    anyhow!("the chat template fails in line {}: {message}", error.line().unwrap_or(0))
}

const MONTHS: [(&str, u64); 12] = [
    ("January", 31),
    ("February", 28),
    ("March", 31),
    ("April", 30),
    ("May", 31),
    ("June", 30),
    ("July", 31),
    ("August", 31),
    ("September", 30),
    ("October", 31),
    ("November", 30),
    ("December", 31),
];
/// From the first of January 1970 on.
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Seconds since 1970, UTC, in the fields of C's `strftime` that templates use; others stay as they are.
fn date(seconds: u64, format: &str) -> String {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let days = seconds / 86_400;
    let (mut year, mut day) = (1970, days);
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 0;
    let length = |month: usize| MONTHS[month].1 + u64::from(month == 1 && is_leap(year));
    while day >= length(month) {
        day -= length(month);
        month += 1;
    }
    let (month_name, weekday) = (MONTHS[month].0, WEEKDAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        let field = if c == '%' { chars.next() } else { None };
        let written = match field {
            None => write!(out, "{c}"),
            Some('Y') => write!(out, "{year}"),
            Some('m') => write!(out, "{:02}", month + 1),
            Some('d') => write!(out, "{:02}", day + 1),
            Some('B') => write!(out, "{month_name}"),
            Some('b') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('H') => write!(out, "{:02}", seconds / 3600 % 24),
            Some('M') => write!(out, "{:02}", seconds / 60 % 60),
            Some('S') => write!(out, "{:02}", seconds % 60),
            Some(other) => write!(out, "%{other}"),
        };
        written.expect("a string takes any text");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates() {
        let all = "%A %a %d %B %b %m %Y %H:%M:%S 100%";
        assert_eq!(date(0, all), "Thursday Thu 01 January Jan 01 1970 00:00:00 100%");
        assert_eq!(date(951_782_399, all), "Monday Mon 28 February Feb 02 2000 23:59:59 100%");
        assert_eq!(date(951_868_800, "%d %b %Y"), "01 Mar 2000", "2000 was a leap year, this is two days on");
        assert_eq!(date(4_107_542_400, "%d %b %Y %q"), "01 Mar 2100 %q", "2100 will not be one");
    }
}
