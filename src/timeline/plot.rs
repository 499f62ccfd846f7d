//! The timeline as a picture: a bar for every part, and in it the least time that its bytes take.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::FontStyle;

use super::Timeline;

const INK: RGBColor = RGBColor(40, 44, 52);
const MESH: RGBColor = RGBColor(225, 228, 232);
const FLOOR: RGBColor = RGBColor(31, 96, 170);
const APART: RGBColor = RGBColor(190, 203, 218);
const FUSED: RGBColor = RGBColor(214, 130, 20);

/// Draws `timeline` to `path`, a PNG; `title` says of what it is.
///
/// # Errors
/// What the file system says.
pub fn draw(timeline: &Timeline, title: &str, path: &Path) -> Result<()> {
    bars(timeline, title, path).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn bars(timeline: &Timeline, title: &str, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    crate::fonts::use_bundled();
    let count = timeline.parts.len();
    let root = BitMapBackend::new(path, (1100, 90 + 44 * count as u32 + 60)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: u32| ("sans-serif", size).into_font().color(&INK);
    let (head, body) = root.split_vertically(70);
    head.draw(&Text::new(title.to_owned(), (14, 8), ("sans-serif", 17, FontStyle::Bold).into_font().color(&INK)))?;
    let keys = [("least time of its bytes", FLOOR), ("by itself", APART), ("in one launch", FUSED)];
    for (i, (name, color)) in keys.into_iter().enumerate() {
        let left = 14 + 230 * i as i32;
        head.draw(&Rectangle::new([(left, 44), (left + 22, 58)], color.filled()))?;
        head.draw(&Text::new(name, (left + 30, 42), text(15)))?;
    }
    let most = timeline.parts.iter().map(|p| p.us.max(p.floor_us).max(p.fused_us.unwrap_or(0.0))).fold(1e-3, f64::max);
    let mut chart = ChartBuilder::on(&body)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..most * 1.12, count as f64..0.0)?;
    let name = |at: &f64| {
        let part = timeline.parts.get((*at - 0.5).round().max(0.0) as usize);
        part.filter(|_| (at.fract() - 0.5).abs() < 0.01).map_or(String::new(), |part| part.name.to_owned())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .bold_line_style(MESH)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(text(15))
        .axis_desc_style(text(15))
        .y_labels(0)
        .y_label_formatter(&name)
        .x_desc("µs of a token")
        .draw()?;
    for (i, part) in timeline.parts.iter().enumerate() {
        let top = i as f64;
        let mut bar = |from: f64, to: f64, us: f64, color: RGBColor| {
            let ends = [(0.0, top + from), (us, top + to)];
            chart.draw_series([Rectangle::new(ends, color.filled())]).map(|_| ())
        };
        bar(0.12, 0.5, part.us, APART)?;
        bar(0.5, 0.88, part.fused_us.unwrap_or(0.0), FUSED)?;
        bar(0.38, 0.62, part.floor_us, FLOOR)?;
        let label = format!("{:.1}", part.fused_us.unwrap_or(part.us));
        let right = part.us.max(part.floor_us).max(part.fused_us.unwrap_or(0.0)) + most * 0.01;
        chart.draw_series([Text::new(label, (right, top + 0.32), text(14))])?;
        let left = chart.backend_coord(&(0.0, top + 0.32));
        root.draw(&Text::new(part.name, (14, left.1), text(15)))?;
    }
    root.present()?;
    Ok(())
}
