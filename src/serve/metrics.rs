//! Counters, and what Prometheus reads of them: vLLM's names, which routers know, and decdec's own.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::line::Line;

/// A number that grows.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn inc(&self) {
        self.add(1);
    }

    pub(super) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, count: usize) {
        self.0.store(count as u64, Ordering::Relaxed);
    }
}

/// Upper bounds of a histogram's buckets, in seconds.
const BOUNDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// How long something took, in buckets.
#[derive(Debug, Default)]
pub(super) struct Histogram {
    buckets: [Counter; BOUNDS.len()],
    count: Counter,
    micros: Counter,
}

impl Histogram {
    pub(super) fn add(&self, time: Duration) {
        if let Some(i) = BOUNDS.iter().position(|&bound| time.as_secs_f64() <= bound) {
            self.buckets[i].inc();
        }
        self.count.inc();
        self.micros.add(time.as_micros() as usize);
    }
}

/// How much of something there was of late, per second.
#[derive(Debug)]
pub(super) struct Rate {
    since: Instant,
    /// The seconds that were counted last, from `since`, each at its number modulo their count: its number, what it had.
    seconds: Mutex<[(u64, usize); 10]>,
}

impl Default for Rate {
    fn default() -> Self {
        Self { since: Instant::now(), seconds: Mutex::default() }
    }
}

impl Rate {
    pub(super) fn inc(&self) {
        self.add(self.since.elapsed());
    }

    pub(super) fn per_second(&self) -> f64 {
        self.over(self.since.elapsed())
    }

    fn seconds(&self) -> MutexGuard<'_, [(u64, usize); 10]> {
        self.seconds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, now: Duration) {
        let mut seconds = self.seconds();
        let at = (now.as_secs() % seconds.len() as u64) as usize;
        if seconds[at].0 != now.as_secs() {
            seconds[at] = (now.as_secs(), 0);
        }
        seconds[at].1 += 1;
    }

    /// The mean of the second that is not over and those before it; the first second counts as a whole.
    fn over(&self, now: Duration) -> f64 {
        let seconds = self.seconds();
        let before = seconds.len() as u64 - 1;
        let sum: usize =
            seconds.iter().filter(|(number, _)| number + before >= now.as_secs()).map(|(_, count)| count).sum();
        let whole = before.min(now.as_secs()) as f64;
        sum as f64 / (whole + f64::from(now.subsec_nanos()) / 1e9).max(1.0)
    }
}

/// What is counted.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    /// Texts in the making.
    pub(super) running: Counter,
    /// Tokens that slots hold, and could hold.
    pub(super) held: Counter,
    pub(super) capacity: Counter,
    pub(super) prompt_tokens: Counter,
    pub(super) made: Counter,
    /// Tokens made of late.
    pub(super) speed: Rate,
    /// Bytes of residuals for the channels that were chosen for tokens.
    pub(super) fetched: Counter,
    /// Tokens of prompts that were looked for in slots, and found there.
    pub(super) looked_up: Counter,
    pub(super) found: Counter,
    pub(super) stopped: Counter,
    pub(super) full: Counter,
    pub(super) cancelled: Counter,
    pub(super) failed: Counter,
    pub(super) refused: Counter,
    pub(super) first_token: Histogram,
    pub(super) between: Histogram,
    pub(super) whole: Histogram,
    pub(super) queued: Histogram,
    pub(super) step: Histogram,
}

/// A metric's name, kind, and what it says.
type Head<'a> = (&'a str, &'a str, &'a str);

/// Text in Prometheus' format.
struct Page<'a> {
    text: String,
    model: &'a str,
}

impl Page<'_> {
    fn head(&mut self, (name, kind, help): Head<'_>) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, head: Head<'_>, value: f64) {
        self.head(head);
        let _ = writeln!(self.text, "{}{{model_name=\"{}\"}} {value}", head.0, self.model);
    }

    fn labelled(&mut self, head: Head<'_>, label: &str, values: &[(String, f64)]) {
        self.head(head);
        for (name, value) in values {
            let _ = writeln!(self.text, "{}{{model_name=\"{}\",{label}=\"{name}\"}} {value}", head.0, self.model);
        }
    }

    fn histogram(&mut self, (name, help): (&str, &str), histogram: &Histogram) {
        self.head((name, "histogram", help));
        let (mut sum, model) = (0, self.model);
        for (bound, bucket) in BOUNDS.iter().zip(&histogram.buckets) {
            sum += bucket.get();
            let _ = writeln!(self.text, "{name}_bucket{{model_name=\"{model}\",le=\"{bound}\"}} {sum}");
        }
        let (count, seconds) = (histogram.count.get(), histogram.micros.get() as f64 / 1e6);
        let _ = writeln!(self.text, "{name}_bucket{{model_name=\"{model}\",le=\"+Inf\"}} {count}");
        let _ = writeln!(self.text, "{name}_sum{{model_name=\"{model}\"}} {seconds}");
        let _ = writeln!(self.text, "{name}_count{{model_name=\"{model}\"}} {count}");
    }
}

impl Metrics {
    /// The share of slots' room that is in use.
    pub(super) fn usage(&self) -> f64 {
        self.held.get() as f64 / self.capacity.get().max(1) as f64
    }

    /// The share of prompts' tokens that slots held already.
    pub(super) fn hit_rate(&self) -> f64 {
        self.found.get() as f64 / self.looked_up.get().max(1) as f64
    }
}

/// All of it.
pub(super) fn page(line: &Line, model: &str) -> String {
    let model: String = model.chars().filter(|c| !matches!(c, '"' | '\\' | '\n')).collect();
    let m = &line.metrics;
    let mut page = Page { text: String::new(), model: &model };
    let waiting = line.waiting() as f64;
    let gauges: [(&str, &str, f64); 5] = [
        ("vllm:num_requests_running", "texts in the making", m.running.get() as f64),
        ("vllm:num_requests_waiting", "texts that wait for a slot", waiting),
        ("vllm:kv_cache_usage_perc", "share of the slots' room that is in use, 0 to 1", m.usage()),
        ("vllm:gpu_prefix_cache_hit_rate", "share of prompts' tokens that slots held already, 0 to 1", m.hit_rate()),
        ("vllm:avg_generation_throughput_toks_per_s", "tokens made per second, of the last ten", m.speed.per_second()),
    ];
    gauges.iter().for_each(|&(name, help, value)| page.value((name, "gauge", help), value));
    let counters: [(&str, &str, &Counter); 8] = [
        ("vllm:prompt_tokens_total", "tokens of prompts", &m.prompt_tokens),
        ("vllm:generation_tokens_total", "tokens made", &m.made),
        ("vllm:prefix_cache_queries_total", "tokens of prompts that were looked for in slots", &m.looked_up),
        ("vllm:prefix_cache_hits_total", "tokens of prompts that slots held", &m.found),
        ("decdec_residual_bytes_total", "bytes of residuals that compensated tokens fetched", &m.fetched),
        ("decdec_requests_cancelled_total", "texts whose client had gone", &m.cancelled),
        ("decdec_requests_failed_total", "texts that the device failed", &m.failed),
        ("decdec_requests_refused_total", "requests for which the queue had no room", &m.refused),
    ];
    counters.iter().for_each(|&(name, help, counter)| page.value((name, "counter", help), counter.get() as f64));
    let ends = [("stop", &m.stopped), ("length", &m.full), ("abort", &m.cancelled), ("error", &m.failed)];
    let ends = ends.map(|(reason, counter)| (reason.to_owned(), counter.get() as f64));
    page.labelled(("vllm:request_success_total", "counter", "texts that ended"), "finished_reason", &ends);
    for (name, help, histogram) in [
        ("vllm:time_to_first_token_seconds", "from the request to its first token", &m.first_token),
        ("vllm:inter_token_latency_seconds", "from one token of a text to the next", &m.between),
        ("vllm:e2e_request_latency_seconds", "from the request to its last token", &m.whole),
        ("vllm:request_queue_time_seconds", "from the request to its slot", &m.queued),
        ("decdec_step_seconds", "one step of all texts", &m.step),
    ] {
        page.histogram((name, help), histogram);
    }
    let sets = line.compensation();
    let chunks: Vec<_> = sets
        .iter()
        .enumerate()
        .flat_map(|(i, set)| ["qkv", "o", "gu", "d"].iter().zip(set.k_chunks).map(move |(p, k)| (i, p, k)))
        .map(|(i, projection, k)| {
            (if sets.len() == 1 { (*projection).into() } else { format!("{projection}{i}") }, k as f64)
        })
        .collect();
    let help = "channels compensated per 1024, by projection";
    page.labelled(("decdec_k_chunk", "gauge", help), "projection", &chunks);
    page.text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LayerCompensation;

    #[test]
    fn a_rate_is_that_of_the_last_ten_seconds() {
        let rate = Rate::default();
        let at = |millis: u64| Duration::from_millis(millis);
        assert_eq!(rate.over(at(0)), 0.0);
        (0..10).for_each(|_| rate.add(at(500)));
        assert_eq!([rate.over(at(500)), rate.over(at(2_500))], [10.0, 4.0], "the first second counts as a whole");
        (0..30).for_each(|_| rate.add(at(9_000)));
        assert_eq!([rate.over(at(9_500)), rate.over(at(10_000))], [40.0 / 9.5, 30.0 / 9.0], "the first second is over");
        rate.add(at(10_200));
        assert_eq!([rate.over(at(10_500)), rate.over(at(30_000))], [31.0 / 9.5, 0.0]);
    }

    #[test]
    fn a_page_counts() {
        let line = Line::new(4);
        let m = &line.metrics;
        m.made.add(7);
        m.first_token.add(Duration::from_millis(3));
        m.first_token.add(Duration::from_secs(1000));
        line.set_compensation(vec![LayerCompensation { n_tb: 8, k_chunks: [1, 2, 3, 4] }]);
        let page = page(&line, "a\"b");
        for expected in [
            "vllm:generation_tokens_total{model_name=\"ab\"} 7\n",
            "vllm:num_requests_waiting{model_name=\"ab\"} 0\n",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"ab\",le=\"0.0025\"} 0\n",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"ab\",le=\"0.005\"} 1\n",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"ab\",le=\"300\"} 1\n",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"ab\",le=\"+Inf\"} 2\n",
            "vllm:time_to_first_token_seconds_count{model_name=\"ab\"} 2\n",
            "decdec_k_chunk{model_name=\"ab\",projection=\"gu\"} 3\n",
        ] {
            assert!(page.contains(expected), "{expected} is not in\n{page}");
        }
        let names: Vec<_> = page.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let once: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(names.len(), once.len(), "each is described once");
    }
}
