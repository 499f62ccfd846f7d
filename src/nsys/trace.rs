//! The trace: one line per kernel, in the order of launch (spec §4.1).

use std::fmt;

use anyhow::{Context, Result, bail, ensure};

use super::DEC_KERNEL;
use crate::config::Projection;
use crate::format::Format;

/// A kernel as the trace names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// The base product of a projection.
    Gemv(Projection),
    /// Compensation with this `k_chunk`.
    Dec(usize),
}

/// Why a kernel ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// First launch; its time means nothing.
    Compile,
    /// Second launch; its time means nothing either.
    Warmup,
    /// A base product without compensation.
    Standalone,
    /// One of the two kernels of the pair with this number; pairs are numbered from 0 without gaps.
    Concurrent(usize),
}

/// One line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Why it ran.
    pub role: Role,
    /// What ran.
    pub kernel: Kernel,
}

impl Line {
    /// The line as it is written, without the end of line.
    pub fn display(self, format: Format) -> impl fmt::Display {
        let role = match self.role {
            Role::Compile => "compile".into(),
            Role::Warmup => "warmup".into(),
            Role::Standalone => "standalone".into(),
            Role::Concurrent(pair) => format!("concurrent {pair}"),
        };
        match self.kernel {
            Kernel::Gemv(projection) => format!("{role} {} {projection}", format.gemv_kernel()),
            Kernel::Dec(k_chunk) => format!("{role} {DEC_KERNEL} {k_chunk}"),
        }
    }

    /// The name that the line and the kernel's row share.
    pub fn kernel_name(self, format: Format) -> &'static str {
        match self.kernel {
            Kernel::Gemv(_) => format.gemv_kernel(),
            Kernel::Dec(_) => DEC_KERNEL,
        }
    }

    fn parse(text: &str, format: Format) -> Result<Self> {
        let mut words = text.split_whitespace();
        let role = match words.next() {
            Some("compile") => Role::Compile,
            Some("warmup") => Role::Warmup,
            Some("standalone") => Role::Standalone,
            Some("concurrent") => {
                let pair = words.next().context("a pair's number is expected after concurrent")?;
                Role::Concurrent(pair.parse().with_context(|| format!("{pair:?} is not the number of a pair"))?)
            }
            other => bail!("{:?} is not compile, warmup, standalone or concurrent", other.unwrap_or("")),
        };
        let name = words.next().context("a kernel's name is expected")?;
        let argument = words.next().with_context(|| format!("something is expected after {name}"))?;
        ensure!(words.next().is_none(), "nothing is expected after {argument:?}");
        let kernel = if name == DEC_KERNEL {
            let k_chunk = argument.parse().ok().filter(|&k| k <= crate::dec::CHUNK);
            Kernel::Dec(k_chunk.with_context(|| format!("k_chunk {argument}, 0 to {} are allowed", crate::dec::CHUNK))?)
        } else if name == format.gemv_kernel() {
            let projection = Projection::ALL.into_iter().find(|p| p.name() == argument);
            Kernel::Gemv(projection.with_context(|| format!("module {argument:?}, qkv, o, gu or d is expected"))?)
        } else if let Some(other) = Format::ALL.into_iter().find(|other| other.gemv_kernel() == name) {
            bail!("{name} belongs to --algo {}, not to {}", other.algo(), format.algo())
        } else {
            bail!("unknown kernel {name:?}, {} or {DEC_KERNEL} is expected", format.gemv_kernel())
        };
        ensure!(
            role != Role::Standalone || matches!(kernel, Kernel::Gemv(_)),
            "only {} runs standalone",
            format.gemv_kernel()
        );
        Ok(Self { role, kernel })
    }
}

/// Parses a whole trace.
///
/// # Errors
/// The first line that is not one of the format's, by number and content; pairs with gaps or without one of
/// their two kernels.
pub fn parse(text: &str, format: Format) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut pairs: Vec<[usize; 2]> = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let parsed = Line::parse(line, format)
            .with_context(|| format!("trace line {}: {:?}", number + 1, line.chars().take(80).collect::<String>()))?;
        if let Role::Concurrent(pair) = parsed.role {
            ensure!(
                pair <= pairs.len(),
                "trace line {}: pair {pair} follows {} pairs, they are numbered from 0 without gaps",
                number + 1,
                pairs.len()
            );
            if pair == pairs.len() {
                pairs.push([0; 2]);
            }
            pairs[pair][usize::from(matches!(parsed.kernel, Kernel::Dec(_)))] += 1;
        }
        lines.push(parsed);
    }
    if let Some(pair) = pairs.iter().position(|&kernels| kernels != [1, 1]) {
        let [gemv, dec] = pairs[pair];
        bail!(
            "pair {pair} of the trace has {gemv} base kernels and {dec} compensation kernels, one of each is expected"
        );
    }
    ensure!(!lines.is_empty(), "the trace is empty");
    Ok(lines)
}
