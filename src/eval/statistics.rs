//! What llama.cpp's `llama-perplexity --kl-divergence` says of two models, under its names.
//!
//! Errors are those of a mean of independent tokens: the standard deviation divided by the square root of their number,
//! and what follows from it to first order.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

/// What one token adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Token {
    /// −ln of the probability that the model gives the token.
    pub(super) nll: f64,
    /// The same of the source.
    pub(super) source_nll: f64,
    /// Divergence of the source's distribution from the model's, in nats.
    pub(super) kld: f64,
    /// Both find the same token most likely.
    pub(super) same_top: bool,
}

/// A number, and its error where it is a mean.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figure {
    /// The number: a perplexity, nats, or per cent where the name says so.
    pub value: f64,
    /// One standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
}

/// Figures by name, in the order in which llama-perplexity prints them.
#[derive(Debug, Clone, PartialEq)]
pub struct Figures(pub Vec<(&'static str, Figure)>);

impl Figures {
    /// The figure of this name.
    pub fn get(&self, name: &str) -> Option<Figure> {
        self.0.iter().find(|(own, _)| *own == name).map(|(_, figure)| *figure)
    }

    /// Those of `tokens`, of which there are two at least.
    pub(super) fn of(tokens: &[Token]) -> Self {
        let each = |of: &dyn Fn(&Token) -> f64| -> Vec<f64> { tokens.iter().map(of).collect() };
        let (own, source) = (each(&|t| t.nll), each(&|t| t.source_nll));
        let (own_mean, source_mean) = (mean(&own), mean(&source));
        let difference = mean(&each(&|t| t.nll - t.source_nll));
        let [own_var, source_var] = [&own, &source].map(|x| covariance(x, x));
        let between = covariance(&own, &source);
        let scaled = |figure: Figure, by: f64| Figure { value: by, error: figure.error.map(|error| error * by) };
        let alone = |value| Figure { value, error: None };
        // The variance of a difference of two numbers that go along with each other.
        let apart = |a: f64, b: f64| (a * a * own_var + b * b * source_var - 2.0 * a * b * between).max(0.0).sqrt();
        let (ppl, base) = (own_mean.value.exp(), source_mean.value.exp());
        let log_ratio = Figure { value: difference.value, error: Some(apart(1.0, 1.0)) };
        let mut figures = vec![
            ("Mean PPL(Q)", scaled(own_mean, ppl)),
            ("Mean PPL(base)", scaled(source_mean, base)),
            ("Cor(ln(PPL(Q)), ln(PPL(base))) %", alone(100.0 * between / (own_var * source_var).sqrt())),
            ("Mean ln(PPL(Q)/PPL(base))", log_ratio),
            ("Mean PPL(Q)/PPL(base)", scaled(log_ratio, log_ratio.value.exp())),
            ("Mean PPL(Q)-PPL(base)", Figure { value: ppl - base, error: Some(apart(ppl, base)) }),
        ];
        let mut klds = each(&|t| t.kld);
        figures.push(("Mean KLD", mean(&klds)));
        klds.sort_unstable_by(f64::total_cmp);
        let of_klds = [
            ("Maximum KLD", 1.0),
            ("99.9% KLD", 0.999),
            ("99.0% KLD", 0.99),
            ("95.0% KLD", 0.95),
            ("90.0% KLD", 0.9),
            ("Median KLD", 0.5),
            ("10.0% KLD", 0.1),
            ("5.0% KLD", 0.05),
            ("1.0% KLD", 0.01),
            ("Minimum KLD", 0.0),
        ];
        figures.extend(of_klds.map(|(name, share)| (name, alone(percentile(&klds, share)))));
        let mut changes = each(&|t| 100.0 * ((-t.nll).exp() - (-t.source_nll).exp()));
        figures.push(("Mean Δp %", mean(&changes)));
        let squares = mean(&changes.iter().map(|x| x * x).collect::<Vec<_>>());
        changes.sort_unstable_by(f64::total_cmp);
        let of_changes = [
            ("Maximum Δp %", 1.0),
            ("99.9% Δp %", 0.999),
            ("99.0% Δp %", 0.99),
            ("95.0% Δp %", 0.95),
            ("90.0% Δp %", 0.9),
            ("75.0% Δp %", 0.75),
            ("Median Δp %", 0.5),
            ("25.0% Δp %", 0.25),
            ("10.0% Δp %", 0.1),
            ("5.0% Δp %", 0.05),
            ("1.0% Δp %", 0.01),
            ("0.1% Δp %", 0.001),
            ("Minimum Δp %", 0.0),
        ];
        figures.extend(of_changes.map(|(name, share)| (name, alone(percentile(&changes, share)))));
        let rms = squares.value.sqrt();
        let of_root = squares.error.map(|error| if rms > 0.0 { error / (2.0 * rms) } else { 0.0 });
        figures.push(("RMS Δp %", Figure { value: rms, error: of_root }));
        let same = tokens.iter().filter(|t| t.same_top).count() as f64 / tokens.len() as f64;
        let error = (same * (1.0 - same) / (tokens.len() as f64 - 1.0)).sqrt();
        figures.push(("Same top p %", Figure { value: 100.0 * same, error: Some(100.0 * error) }));
        // Two equal models, or texts without any variation, correlate undefinedly.
        figures.iter_mut().filter(|(_, figure)| figure.value.is_nan()).for_each(|(_, figure)| figure.value = 100.0);
        Self(figures)
    }
}

impl Serialize for Figures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, figure) in &self.0 {
            map.serialize_entry(name, figure)?;
        }
        map.end()
    }
}

/// The mean, and its error.
fn mean(values: &[f64]) -> Figure {
    let value = values.iter().sum::<f64>() / values.len() as f64;
    Figure { value, error: Some(covariance(values, values).sqrt()) }
}

/// The covariance of two means.
fn covariance(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let (mean_a, mean_b) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    a.iter().zip(b).map(|(a, b)| (a - mean_a) * (b - mean_b)).sum::<f64>() / n / (n - 1.0)
}

/// The value below which a share of the ascending `values` lies, between neighbours in proportion.
fn percentile(values: &[f64], share: f64) -> f64 {
    let place = share * (values.len() - 1) as f64;
    let below = place.floor();
    let next = values[(below as usize + 1).min(values.len() - 1)];
    values[below as usize] + (place - below) * (next - values[below as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(p: f64, source: f64, kld: f64, same_top: bool) -> Token {
        Token { nll: -p.ln(), source_nll: -source.ln(), kld, same_top }
    }

    /// Worked out by hand from the definitions.
    #[test]
    fn figures_are_those_of_the_definitions() {
        let tokens = [
            token(0.5, 0.25, 0.4, true),
            token(0.25, 0.25, 0.1, true),
            token(0.125, 0.25, 0.2, false),
            token(0.25, 0.5, 0.3, true),
        ];
        let figures = Figures::of(&tokens);
        let near = |name: &str, value: f64, error: Option<f64>| {
            let got = figures.get(name).unwrap_or_else(|| panic!("{name} is missing"));
            assert!((got.value - value).abs() < 1e-12, "{name}: {got:?}, {value} expected");
            match (got.error, error) {
                (Some(got), Some(error)) => assert!((got - error).abs() < 1e-9, "{name}: {got}, {error} expected"),
                (got, error) => assert_eq!(got, error, "{name}"),
            }
        };
        let ln_2 = 2f64.ln();
        // −ln p is 1, 2, 3, 2 and 2, 2, 2, 1 times ln 2.
        let (own, source) = (2.0 * ln_2, 1.75 * ln_2);
        let own_error = ln_2 * (2.0f64 / 3.0 / 4.0).sqrt();
        near("Mean PPL(Q)", own.exp(), Some(own.exp() * own_error));
        near("Mean PPL(base)", source.exp(), Some(source.exp() * ln_2 * (0.75f64 / 3.0 / 4.0).sqrt()));
        // Their differences are −1, 0, 1 and 1.
        let spread: f64 = [-1.25f64, -0.25, 0.75, 0.75].iter().map(|d| d * d).sum::<f64>() / 3.0;
        near("Mean ln(PPL(Q)/PPL(base))", 0.25 * ln_2, Some(ln_2 * (spread / 4.0).sqrt()));
        near("Mean PPL(Q)-PPL(base)", own.exp() - source.exp(), figures.get("Mean PPL(Q)-PPL(base)").unwrap().error);
        near("Cor(ln(PPL(Q)), ln(PPL(base))) %", 0.0, None);
        near("Mean KLD", 0.25, Some((0.05f64 / 3.0 / 4.0).sqrt()));
        near("Maximum KLD", 0.4, None);
        near("Median KLD", 0.25, None);
        near("99.0% KLD", 0.3 + 0.97 * 0.1, None);
        near("Minimum KLD", 0.1, None);
        // Per cent: 25, 0, −12.5, −25.
        near("Mean Δp %", -3.125, figures.get("Mean Δp %").unwrap().error);
        near("RMS Δp %", ((625.0 + 156.25 + 625.0) / 4.0f64).sqrt(), figures.get("RMS Δp %").unwrap().error);
        near("Same top p %", 75.0, Some(100.0 * (0.1875f64 / 3.0).sqrt()));
        assert!(Figures::of(&tokens[1..]) != figures, "another token gives other figures");
    }
}
