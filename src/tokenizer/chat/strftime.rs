//! `strftime_now`: the date that some templates write into a system turn, in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use chrono::{DateTime, Utc};

/// Fields that are numbers, and so may be padded in other ways.
const NUMBERS: &str = "CGHIMSUVWYdegjklmuwy";

/// Names, and fields that are made of others.
const OTHERS: &str = "ABDFPRTXabchnprstx%";

/// A moment, in the fields of C's `strftime` for the locale "C".
pub(super) fn at(time: SystemTime, format: &str) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    written(since.as_secs(), since.subsec_micros(), format)
}

/// Writes the fields of `format`, `seconds` and `micros` after 1970 began; what is no field stays as it is.
fn written(seconds: u64, micros: u32, format: &str) -> String {
    let time = DateTime::from_timestamp(seconds as i64, 1000 * micros).unwrap_or_default();
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out += &rest[..at];
        let flag = rest[at + 1..].chars().next().filter(|flag| "-_0^#".contains(*flag));
        let before = at + 1 + usize::from(flag.is_some());
        let Some(name) = rest[before..].chars().next() else { return out + &rest[at..] };
        let end = before + name.len_utf8();
        out += &field(&time, name, flag).unwrap_or_else(|| rest[at..end].to_owned());
        rest = &rest[end..];
    }
    out + rest
}

/// One field; none if there is none of this name. `flag` says how a number is padded, or how a name is spelled.
fn field(time: &DateTime<Utc>, name: char, flag: Option<char>) -> Option<String> {
    let written = |field: String| time.format(&field).to_string();
    Some(match (name, flag) {
        // Python's time without a zone writes nothing for these.
        ('z' | 'Z', _) => String::new(),
        ('f', _) => written("%6f".into()),
        ('p', Some('#')) => written("%P".into()),
        (name, Some('^' | '#')) if "AaBbhp".contains(name) => written(format!("%{name}")).to_uppercase(),
        (name, Some(flag @ ('-' | '_' | '0'))) if NUMBERS.contains(name) => written(format!("%{flag}{name}")),
        (name, _) if NUMBERS.contains(name) || OTHERS.contains(name) => written(format!("%{name}")),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::written;

    /// What Python's `datetime.strftime` writes for these moments in UTC.
    #[test]
    fn as_python_writes_dates() {
        let all = "%A %a %d %e %B %b %h %m %Y %y %C|%H:%M:%S %I %k %l %p %P|\
            %j %w %u %U %W %G %g %V|%F %D %T %R %r|%c|%x|%X|%s %%";
        let known = [
            (
                0,
                "Thursday Thu 01  1 January Jan Jan 01 1970 70 19|00:00:00 12  0 12 AM am|\
                001 4 4 00 00 1970 70 01|1970-01-01 01/01/70 00:00:00 00:00 12:00:00 AM|\
                Thu Jan  1 00:00:00 1970|01/01/70|00:00:00|0 %",
            ),
            (
                951_782_399,
                "Monday Mon 28 28 February Feb Feb 02 2000 00 20|23:59:59 11 23 11 PM pm|\
                059 1 1 09 09 2000 00 09|2000-02-28 02/28/00 23:59:59 23:59 11:59:59 PM|\
                Mon Feb 28 23:59:59 2000|02/28/00|23:59:59|951782399 %",
            ),
            (
                951_868_800,
                "Wednesday Wed 01  1 March Mar Mar 03 2000 00 20|00:00:00 12  0 12 AM am|\
                061 3 3 09 09 2000 00 09|2000-03-01 03/01/00 00:00:00 00:00 12:00:00 AM|\
                Wed Mar  1 00:00:00 2000|03/01/00|00:00:00|951868800 %",
            ),
            (
                1_609_459_200,
                "Friday Fri 01  1 January Jan Jan 01 2021 21 20|00:00:00 12  0 12 AM am|\
                001 5 5 00 00 2020 20 53|2021-01-01 01/01/21 00:00:00 00:00 12:00:00 AM|\
                Fri Jan  1 00:00:00 2021|01/01/21|00:00:00|1609459200 %",
            ),
            (
                1_735_516_800,
                "Monday Mon 30 30 December Dec Dec 12 2024 24 20|00:00:00 12  0 12 AM am|\
                365 1 1 52 53 2025 25 01|2024-12-30 12/30/24 00:00:00 00:00 12:00:00 AM|\
                Mon Dec 30 00:00:00 2024|12/30/24|00:00:00|1735516800 %",
            ),
            (
                1_764_460_800,
                "Sunday Sun 30 30 November Nov Nov 11 2025 25 20|00:00:00 12  0 12 AM am|\
                334 0 7 48 47 2025 25 48|2025-11-30 11/30/25 00:00:00 00:00 12:00:00 AM|\
                Sun Nov 30 00:00:00 2025|11/30/25|00:00:00|1764460800 %",
            ),
            (
                4_107_542_400,
                "Monday Mon 01  1 March Mar Mar 03 2100 00 21|00:00:00 12  0 12 AM am|\
                060 1 1 09 09 2100 00 09|2100-03-01 03/01/00 00:00:00 00:00 12:00:00 AM|\
                Mon Mar  1 00:00:00 2100|03/01/00|00:00:00|4107542400 %",
            ),
        ];
        for (seconds, expected) in known {
            assert_eq!(written(seconds, 0, all), expected, "{seconds}");
        }
        let flags = "%-d %_d %-m %-H %-I %^a %^B %#p %#A %q %f %z|%Z %-j %_j %-y %0e %";
        let expected = "28 28 2 23 11 MON FEBRUARY pm MONDAY %q 000042 | 59  59 0 28 %";
        assert_eq!(written(951_782_399, 42, flags), expected);
    }
}
