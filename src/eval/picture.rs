//! What a choice of bits and compensation costs and brings, as a picture: divergence over bytes on the device, and over
//! tokens in a second.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::FontStyle;

const INK: RGBColor = RGBColor(40, 44, 52);
const MESH: RGBColor = RGBColor(225, 228, 232);
/// Models, told apart by colour.
const MODELS: [RGBColor; 6] = [
    RGBColor(31, 96, 170),
    RGBColor(214, 130, 20),
    RGBColor(46, 139, 87),
    RGBColor(200, 60, 40),
    RGBColor(130, 70, 160),
    RGBColor(90, 100, 110),
];

/// One model with one way of compensation.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Choice {
    /// The model's name.
    pub model: String,
    /// Channels compensated per 1024, for qkv, o, gate-up and down.
    pub k_chunks: [usize; 4],
    /// Mean divergence from full precision over all texts, in nats.
    pub kl_divergence: f64,
    /// Bytes of weights, embedding and head.
    pub device_bytes: usize,
    /// Tokens made in a second, one text at a time.
    pub tokens_per_second: f64,
}

impl Choice {
    /// `8`, or `0 0 8 8` where projections differ.
    pub fn k_chunk(&self) -> String {
        let [first, rest @ ..] = self.k_chunks;
        match rest.iter().all(|&k| k == first) {
            true => first.to_string(),
            false => self.k_chunks.map(|k| k.to_string()).join(" "),
        }
    }
}

/// Draws `choices` to `path`, a PNG; `title` says of what they are.
///
/// # Errors
/// What the file system says.
pub fn draw(choices: &[Choice], title: &str, path: &Path) -> Result<()> {
    panels(choices, title, path).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn panels(choices: &[Choice], title: &str, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    crate::fonts::use_bundled();
    let root = BitMapBackend::new(path, (1200, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(52);
    head.draw(&Text::new(title.to_owned(), (14, 14), ("sans-serif", 18, FontStyle::Bold).into_font().color(&INK)))?;
    let text = |size: u32| ("sans-serif", size).into_font().color(&INK);
    let most = choices.iter().map(|c| c.kl_divergence).fold(1e-6, f64::max);
    let mut models: Vec<&str> = Vec::new();
    choices.iter().for_each(|c| {
        if !models.contains(&c.model.as_str()) {
            models.push(&c.model);
        }
    });
    type Of = fn(&Choice) -> f64;
    let across: [(&str, Of); 2] =
        [("MB on the device", |c| c.device_bytes as f64 / 1e6), ("tokens/s", |c| c.tokens_per_second)];
    for (area, (name, of)) in body.split_evenly((1, 2)).iter().zip(across) {
        let ends = choices.iter().map(of).fold((f64::INFINITY, 0f64), |(a, b), x| (a.min(x), b.max(x)));
        let room = ((ends.1 - ends.0) * 0.18).max(ends.1 * 0.02).max(1e-6);
        let mut chart = ChartBuilder::on(area)
            .margin(14)
            .x_label_area_size(44)
            .y_label_area_size(66)
            .build_cartesian_2d((ends.0 - room).max(0.0)..ends.1 + room, 0.0..most * 1.15)?;
        chart
            .configure_mesh()
            .bold_line_style(MESH)
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .label_style(text(14))
            .axis_desc_style(text(15))
            .x_desc(name)
            .y_desc("mean KL divergence, nats")
            .draw()?;
        for (model, color) in models.iter().zip(MODELS.iter().cycle()) {
            let own = || choices.iter().filter(|c| c.model == *model);
            let places: Vec<(f64, f64)> = own().map(|c| (of(c), c.kl_divergence)).collect();
            chart.draw_series(LineSeries::new(places.clone(), color.mix(0.5).stroke_width(2)))?;
            chart.draw_series(places.iter().map(|&at| Circle::new(at, 5, color.filled())))?;
            let labels = own().map(|c| {
                let label = format!("{}, k_chunk {}", c.model, c.k_chunk());
                EmptyElement::at((of(c), c.kl_divergence)) + Text::new(label, (8, -16), text(13))
            });
            chart.draw_series(labels)?;
        }
    }
    root.present()?;
    Ok(())
}
