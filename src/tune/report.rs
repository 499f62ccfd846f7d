//! The report, field by field as users of the reference know it, and the CSV.

use std::fmt;

use anyhow::Result;
use comfy_table::{Table as TextTable, presets};

use super::search::Choice;
use super::table::{Sample, Table};
use super::{Objective, Outcome, Tuning, Verified};
use crate::config::Projection;
use crate::dec::CHUNK;

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "note: objective {}: {}", self.objective.name(), self.objective_means())?;
        for notice in &self.notices {
            writeln!(f, "note: {notice}")?;
        }
        for tuning in &self.tunings {
            writeln!(f)?;
            f.write_str(&self.one(tuning))?;
        }
        if self.tunings.len() > 1 || self.tunings.iter().any(|tuning| tuning.verified.is_some()) {
            writeln!(f, "\n{}", self.summary())?;
        }
        Ok(())
    }
}

impl Outcome {
    fn objective_means(&self) -> String {
        match self.objective {
            Objective::Divergence(weights) => {
                let weights = weights.map(|w| format!("{w:.2e}")).join(", ");
                format!("the divergence that compensation gives back, nats for a unit of k_chunk {weights}")
            }
            Objective::Channels if self.timings.token.is_some() => "the sum of k_chunk times bytes".into(),
            Objective::Channels => "the sum of k_chunk".into(),
        }
    }

    /// The report for one target.
    fn one(&self, tuning: &Tuning) -> String {
        let id = &self.identity;
        let mut out = String::new();
        heading(&mut out, 29, "Global Search", 30);
        self.choice(&mut out, "Global", &tuning.found.global);
        heading(&mut out, 26, "Fine-grained Search", 27);
        self.choice(&mut out, "Fine-grained", &tuning.found.fine);
        if let Some(best) = &tuning.exhaustive {
            heading(&mut out, 27, "Exhaustive Search", 28);
            self.choice(&mut out, "Exhaustive", best);
            let (fine, sum) = (&tuning.found.fine, best.sum_k());
            line(&mut out, &format!("Sum of k_chunk: {sum} ({:+} to fine-grained)", sum as i64 - fine.sum_k() as i64));
            line(
                &mut out,
                &format!("Layer time: {:.2} us ({:+.2} us to fine-grained)", best.us(), best.us() - fine.us()),
            );
        }
        heading(&mut out, 26, "End Tuning", 27);
        let rule = "~".repeat(70);
        let percent = per_cent(tuning.target);
        let k_chunks = tuning.found.fine.k_chunks().map(|k| k.to_string()).join(", ");
        let (model, algo, bits, n_tb) = (&id.model, id.format.algo(), id.bits, tuning.found.fine.n_tb);
        out += &format!(
            "\n{rule}\nTuning Results: {model} {algo} {bits}-bit @ {percent}% slowdown\n{rule}\n\
             Target Slowdown          : {percent} %\n\
             Best n_tb                : {n_tb}\n\
             k_chunk per module       : {k_chunks}\n{rule}\n"
        );
        if let Some(verified) = &tuning.verified {
            let Verified { slowdown, base_ms, tuned_ms, missed } = verified;
            line(&mut out, &format!("Real slowdown of a token : {slowdown:.2} % ({base_ms:.3} to {tuned_ms:.3} ms)"));
            for (k_chunks, slowdown) in missed {
                let k_chunks = k_chunks.map(|k| k.to_string()).join(", ");
                line(&mut out, &format!("    k_chunk {k_chunks} took {slowdown:.2} %: too slow, others were tried"));
            }
        }
        out
    }

    fn choice(&self, out: &mut String, name: &str, choice: &Choice) {
        let modules = || Projection::ALL.into_iter().zip(self.shapes).zip(&choice.modules);
        line(out, &format!("{name} k_chunk:"));
        for ((projection, (inputs, outputs)), m) in modules() {
            line(out, &format!("    {projection} ({inputs} x {outputs}): {} / {CHUNK} (n_tb={})", m.k_chunk, m.n_tb));
        }
        let (us, slowdown) = (choice.us() - self.outside_us(), choice.us() / self.timings.base_us());
        line(out, &format!("{name} layer time: {us:.2} us (Slowdown: {slowdown:.2})"));
        for ((projection, (inputs, outputs)), m) in modules() {
            line(out, &format!("    {projection} ({inputs} x {outputs}): {:.2} us", m.us));
        }
    }

    /// One row per target.
    pub fn summary(&self) -> TextTable {
        let mut table = TextTable::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY);
        let mut head = vec!["target %", "slowdown %", "layer us", "n_tb", "k_chunk per module", "sum"];
        if self.tunings.iter().any(|t| t.exhaustive.is_some()) {
            head.push("exhaustive sum");
        }
        if self.tunings.iter().any(|t| t.verified.is_some()) {
            head.push("real slowdown %");
        }
        table.set_header(head);
        for tuning in &self.tunings {
            let fine = &tuning.found.fine;
            let mut row = vec![
                per_cent(tuning.target),
                format!("{:.2}", (fine.us() / self.timings.base_us() - 1.0) * 100.0),
                format!("{:.2}", fine.us() - self.outside_us()),
                fine.n_tb.to_string(),
                fine.k_chunks().map(|k| k.to_string()).join(", "),
                fine.sum_k().to_string(),
            ];
            row.extend(tuning.exhaustive.as_ref().map(|best| best.sum_k().to_string()));
            row.extend(tuning.verified.as_ref().map(|verified| format!("{:.2}", verified.slowdown)));
            table.add_row(row);
        }
        table
    }
}

/// `10.0`, `2.5`, `2.25`: at least one decimal, as many as it takes.
pub(super) fn per_cent(value: f64) -> String {
    if (value * 10.0).fract() == 0.0 { format!("{value:.1}") } else { value.to_string() }
}

fn heading(out: &mut String, left: usize, title: &str, right: usize) {
    line(out, &format!("{} {title} {}", "=".repeat(left), "=".repeat(right)));
}

fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

/// The measured table with the columns of the reference's CSV.
pub(super) fn csv(outcome: &Outcome) -> Result<Vec<u8>> {
    let id = &outcome.identity;
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record([
        "model",
        "algo",
        "bit_width",
        "module",
        "standalone/concurrent",
        "n_tb",
        "k_chunk",
        "decdec_time_us",
        "gemv_time_us",
        "dec_time_us",
        "orderings",
    ])?;
    let mut row = |module: usize, mode: &str, n_tb: usize, k_chunk: usize, sample: &Sample| {
        let Sample { decdec_us, gemv_us, dec_us, orderings } = sample;
        csv.write_record([
            &id.model,
            id.format.algo(),
            &id.bits.to_string(),
            Projection::ALL[module].name(),
            mode,
            &n_tb.to_string(),
            &k_chunk.to_string(),
            &format!("{decdec_us:.3}"),
            &format!("{gemv_us:.3}"),
            &format!("{dec_us:.3}"),
            orderings,
        ])
    };
    let Table { base, pairs } = &outcome.table;
    for (module, sample) in base.iter().enumerate() {
        row(module, "standalone", 0, 0, sample)?;
    }
    for (&(module, n_tb, k_chunk), sample) in pairs {
        row(module, "concurrent", n_tb, k_chunk, sample)?;
    }
    Ok(csv.into_inner()?)
}
