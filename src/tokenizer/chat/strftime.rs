//! `strftime_now`: the date that some templates write into a system turn, in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment, in the fields of C's `strftime` for the locale "C".
pub(super) fn at(time: SystemTime, format: &str) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Date::new(since.as_secs(), since.subsec_micros()).format(format)
}

/// A moment in UTC.
struct Date {
    seconds: u64, // since 1970
    micros: u32,
    year: u64,
    month: u64,    // from 1 on
    day: u64,      // of the month, from 1 on
    year_day: u64, // from 0 on
    weekday: u64,  // from Sunday, 0, on
}

fn days_in(year: u64) -> u64 {
    365 + u64::from(year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)))
}

impl Date {
    fn new(seconds: u64, micros: u32) -> Self {
        let days = seconds / 86_400;
        let (mut year, mut year_day) = (1970, days);
        while year_day >= days_in(year) {
            year_day -= days_in(year);
            year += 1;
        }
        let length = |month: u64| match month {
            2 => days_in(year) - 337,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let (mut month, mut day) = (1, year_day);
        while day >= length(month) {
            day -= length(month);
            month += 1;
        }
        // The first of January 1970 was a Thursday.
        Self { seconds, micros, year, month, day: day + 1, year_day, weekday: (days + 4) % 7 }
    }

    /// Year and week of ISO 8601: weeks start on Monday, and belong to the year of their Thursday.
    fn iso_week(&self) -> (u64, u64) {
        let since_monday = (self.weekday + 6) % 7;
        match (self.year_day + 3).checked_sub(since_monday) {
            None => (self.year - 1, (days_in(self.year - 1) + self.year_day + 3 - since_monday) / 7 + 1),
            Some(thursday) if thursday >= days_in(self.year) => (self.year + 1, 1),
            Some(thursday) => (self.year, thursday / 7 + 1),
        }
    }

    /// Writes the fields of `format`; what is no field stays as it is.
    fn format(&self, format: &str) -> String {
        let mut out = String::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            out += &rest[..at];
            let field = &rest[at + 1..];
            let flag = field.chars().next().filter(|flag| matches!(flag, '-' | '_' | '0' | '^' | '#'));
            let Some(name) = field.chars().nth(usize::from(flag.is_some())) else {
                out += &rest[at..];
                return out;
            };
            let length = 1 + usize::from(flag.is_some()) + name.len_utf8();
            match self.field(name, flag) {
                Some(text) => out += &text,
                None => out += &rest[at..at + length],
            }
            rest = &rest[at + length..];
        }
        out + rest
    }

    fn field(&self, name: char, flag: Option<char>) -> Option<String> {
        let (hour, minute, second) = (self.seconds / 3600 % 24, self.seconds / 60 % 60, self.seconds % 60);
        let hour12 = (hour + 11) % 12 + 1;
        let (iso_year, iso_week) = self.iso_week();
        let padded = |value: u64, width: usize, fill: char| match flag.filter(|f| "-_0".contains(*f)).unwrap_or(fill) {
            '-' => value.to_string(),
            '_' | ' ' => format!("{value:width$}"),
            _ => format!("{value:0width$}"),
        };
        let two = |value| padded(value, 2, '0');
        let text = |text: &str| match flag {
            Some('^') => text.to_uppercase(),
            Some('#') if name == 'p' => text.to_lowercase(),
            Some('#') => text.to_uppercase(),
            _ => text.to_owned(),
        };
        let (month, weekday) = (MONTHS[self.month as usize - 1], WEEKDAYS[self.weekday as usize]);
        let half = if hour < 12 { "AM" } else { "PM" };
        Some(match name {
            'Y' => padded(self.year, 4, '0'),
            'C' => two(self.year / 100),
            'y' => two(self.year % 100),
            'm' => two(self.month),
            'd' => two(self.day),
            'e' => padded(self.day, 2, ' '),
            'j' => padded(self.year_day + 1, 3, '0'),
            'B' => text(month),
            'b' | 'h' => text(&month[..3]),
            'A' => text(weekday),
            'a' => text(&weekday[..3]),
            'w' => padded(self.weekday, 1, '0'),
            'u' => padded((self.weekday + 6) % 7 + 1, 1, '0'),
            'U' => two((self.year_day + 7 - self.weekday) / 7),
            'W' => two((self.year_day + 7 - (self.weekday + 6) % 7) / 7),
            'G' => padded(iso_year, 4, '0'),
            'g' => two(iso_year % 100),
            'V' => two(iso_week),
            'H' => two(hour),
            'k' => padded(hour, 2, ' '),
            'I' => two(hour12),
            'l' => padded(hour12, 2, ' '),
            'M' => two(minute),
            'S' => two(second),
            'f' => format!("{:06}", self.micros),
            'p' => text(half),
            'P' => half.to_lowercase(),
            's' => self.seconds.to_string(),
            // Python's time without a zone writes nothing for these.
            'z' | 'Z' => String::new(),
            'c' => self.format("%a %b %e %H:%M:%S %Y"),
            'D' | 'x' => self.format("%m/%d/%y"),
            'F' => self.format("%Y-%m-%d"),
            'R' => self.format("%H:%M"),
            'r' => self.format("%I:%M:%S %p"),
            'T' | 'X' => self.format("%H:%M:%S"),
            'n' => "\n".into(),
            't' => "\t".into(),
            '%' => "%".into(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Date;

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
            assert_eq!(Date::new(seconds, 0).format(all), expected, "{seconds}");
        }
        let flags = "%-d %_d %-m %-H %-I %^a %^B %#p %#A %q %f %z|%Z %-j %_j %-y %0e %";
        let expected = "28 28 2 23 11 MON FEBRUARY pm MONDAY %q 000042 | 59  59 0 28 %";
        assert_eq!(Date::new(951_782_399, 42).format(flags), expected);
    }
}
