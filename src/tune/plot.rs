//! Pictures: one per module with a panel for every `n_tb`, and one of all four modules.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::FontStyle;

use super::report::per_cent;
use super::search::{Chosen, Curve, Module};
use super::{Outcome, Tuning};
use crate::config::Projection;

/// Pixels of one panel.
const PANEL: (u32, u32) = (360, 260);

/// Pixels of a module in the overview, and of the column beside it that says what was chosen.
const QUARTER: (u32, u32) = (600, 430);
const NOTES: u32 = 200;

/// Pixels of the strip with the picture's title.
const TITLE: u32 = 64;

const INK: RGBColor = RGBColor(40, 44, 52);
const MESH: RGBColor = RGBColor(225, 228, 232);
const LINE: RGBColor = RGBColor(31, 96, 170);
const FAINT: RGBColor = RGBColor(170, 182, 196);

/// Targets, told apart by colour.
const TARGETS: [RGBColor; 4] =
    [RGBColor(200, 60, 40), RGBColor(214, 130, 20), RGBColor(46, 139, 87), RGBColor(130, 70, 160)];

/// Behind panels whose n_tb was taken.
const TAKEN: RGBColor = RGBColor(255, 250, 235);

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, BitMapBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

type Drawn<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// A picture of this size, with what `draw` draws below title and legend.
fn picture(
    outcome: &Outcome,
    path: &Path,
    size: (u32, u32),
    title: &str,
    draw: impl FnOnce(&Area<'_>) -> Drawn,
) -> Result<()> {
    let all = || -> Drawn {
        crate::fonts::use_bundled();
        let root = BitMapBackend::new(path, size).into_drawing_area();
        root.fill(&WHITE)?;
        let body = titled(&root, outcome, title)?;
        legend(&root, size.0, &outcome.tunings)?;
        draw(&body)?;
        Ok(root.present()?)
    };
    all().map_err(|error| anyhow!("{error}"))
}

/// Relative time over `k_chunk` of one module, a panel for every `n_tb`; points as measured, a line as smoothed.
pub(super) fn module(outcome: &Outcome, projection: Projection, path: &Path) -> Result<()> {
    let module = &outcome.timings.modules[projection.index()];
    let panels = module.curves.len();
    let columns = ((panels as f64 * 1.2).sqrt().ceil() as usize).max(2).min(panels.max(1));
    let rows = panels.div_ceil(columns);
    let size = ((PANEL.0 * columns as u32).max(760), PANEL.1 * rows as u32 + TITLE);
    let (inputs, outputs) = module.shape;
    let title = format!("{projection} ({inputs} x {outputs}): time relative to {:.2} µs", module.base_us);
    let top = top(outcome, projection) / module.base_us;
    let y = 1.0 - (top - 1.0) * 0.12..top;
    picture(outcome, path, size, &title, |body| {
        let mut panels = module.curves.iter().zip(body.split_evenly((rows, columns)));
        panels.try_for_each(|((&n_tb, curve), area)| panel(outcome, projection, n_tb, curve, &area, y.clone()))
    })
}

/// Time over `k_chunk` of all four modules, with what was chosen for each target.
pub(super) fn overview(outcome: &Outcome, path: &Path) -> Result<()> {
    let size = (2 * (QUARTER.0 + NOTES), 2 * QUARTER.1 + TITLE);
    let title = format!("all modules, layer base {:.2} µs", outcome.timings.base_us());
    picture(outcome, path, size, &title, |body| {
        let mut modules = Projection::ALL.into_iter().zip(&outcome.timings.modules).zip(body.split_evenly((2, 2)));
        modules.try_for_each(|((projection, module), area)| quarter(outcome, projection, module, &area))
    })
}

fn panel(
    outcome: &Outcome,
    projection: Projection,
    n_tb: usize,
    curve: &Curve,
    area: &Area<'_>,
    y: std::ops::Range<f64>,
) -> Drawn {
    let base = outcome.timings.modules[projection.index()].base_us;
    let x = 0.0..last_k(curve) * 1.04;
    let here = || chosen(outcome, projection).filter(|(chosen, ..)| chosen.n_tb == n_tb);
    let targets: Vec<_> = here().map(|(_, tuning, _)| format!("{} %", per_cent(tuning.target))).collect();
    let (caption, color) = match here().next() {
        Some((.., color)) => (format!("n_tb = {n_tb}, taken at {}", targets.join(", ")), color),
        None => (format!("n_tb = {n_tb}"), INK),
    };
    if here().next().is_some() {
        area.fill(&TAKEN)?;
    }
    let mut chart = ChartBuilder::on(area)
        .margin(6)
        .caption(caption, ("sans-serif", 17, FontStyle::Bold).into_font().color(&color))
        .x_label_area_size(36)
        .y_label_area_size(50)
        .build_cartesian_2d(x.clone(), y.clone())?;
    mesh(&mut chart, "k_chunk", "time / base", 14, 2)?;
    for (tuning, color) in outcome.tunings.iter().zip(TARGETS.into_iter().cycle()) {
        let at = 1.0 + tuning.target / 100.0;
        let line = [(x.start, at), (x.end, at)];
        chart.draw_series(DashedLineSeries::new(line, 6, 4, color.stroke_width(1)))?;
    }
    let measured = outcome.table.pairs.range((projection.index(), n_tb, 0)..=(projection.index(), n_tb, usize::MAX));
    let points = measured.map(|(&(_, _, k), sample)| (k as f64, sample.decdec_us / base));
    let visible = points.filter(|&(_, ratio)| y.contains(&ratio));
    chart.draw_series(visible.map(|point| Circle::new(point, 2, FAINT.filled())))?;
    chart.draw_series(LineSeries::new(below(curve, base, y.end), LINE.stroke_width(2)))?;
    let rings = here().enumerate().map(|(i, (chosen, _, color))| {
        Circle::new((chosen.k_chunk as f64, chosen.us / base), 5 + 3 * i as i32, color.stroke_width(2))
    });
    chart.draw_series(rings)?;
    Ok(())
}

/// What was chosen for a module, by target, and the target's colour.
fn chosen(outcome: &Outcome, projection: Projection) -> impl Iterator<Item = (Chosen, &Tuning, RGBColor)> {
    let tunings = outcome.tunings.iter().zip(TARGETS.into_iter().cycle());
    tunings.map(move |(tuning, color)| (tuning.found.fine.modules[projection.index()], tuning, color))
}

/// One module of the overview: every `n_tb` faint, the chosen ones strong, what was chosen as rings; in words beside
/// it.
fn quarter(outcome: &Outcome, projection: Projection, module: &Module, area: &Area<'_>) -> Drawn {
    let (area, notes) = area.split_horizontally(QUARTER.0);
    let (inputs, outputs) = module.shape;
    let far = module.curves.values().map(last_k).fold(1.0, f64::max);
    let (bottom, top) = (module.base_us, top(outcome, projection));
    let y = bottom - (top - bottom) * 0.12..top;
    let caption = format!("{projection} ({inputs} x {outputs}), base {:.2} µs", module.base_us);
    let mut chart = ChartBuilder::on(&area)
        .margin(10)
        .caption(caption, ("sans-serif", 19, FontStyle::Bold).into_font().color(&INK))
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..far * 1.04, y)?;
    mesh(&mut chart, "k_chunk (channels of 1024)", "time, µs", 16, usize::from(top < 100.0))?;
    for curve in module.curves.values() {
        chart.draw_series(LineSeries::new(below(curve, 1.0, top), FAINT.stroke_width(1)))?;
    }
    let first_note = 60;
    for (i, (chosen, tuning, color)) in chosen(outcome, projection).enumerate() {
        if let Some(curve) = module.curves.get(&chosen.n_tb) {
            chart.draw_series(LineSeries::new(below(curve, 1.0, top), color.stroke_width(2)))?;
        }
        // Larger from target to target, so that none hides another.
        let at = (chosen.k_chunk as f64, chosen.us);
        chart.draw_series([Circle::new(at, 5 + 3 * i as i32, color.stroke_width(2))])?;
        let slower = (chosen.us / module.base_us - 1.0) * 100.0;
        let what = match chosen.k_chunk {
            0 => "not compensated".to_owned(),
            k_chunk => format!("k_chunk {k_chunk}, n_tb {}", chosen.n_tb),
        };
        let lines =
            [format!("at {} %", per_cent(tuning.target)), what, format!("{:.2} µs (+{slower:.1} %)", chosen.us)];
        for (line, text) in lines.into_iter().enumerate() {
            let style = if line == 0 { FontStyle::Bold } else { FontStyle::Normal };
            let down = first_note + 82 * i as i32 + 20 * line as i32;
            notes.draw(&Text::new(text, (0, down), ("sans-serif", 15, style).into_font().color(&color)))?;
        }
    }
    Ok(())
}

fn mesh(chart: &mut Chart<'_, '_>, x: &str, y: &str, size: u32, decimals: usize) -> Drawn {
    chart
        .configure_mesh()
        .bold_line_style(MESH)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(("sans-serif", size).into_font().color(&INK))
        .axis_desc_style(("sans-serif", size).into_font().color(&INK))
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|k| format!("{k:.0}"))
        .y_label_formatter(&|value| format!("{value:.decimals$}"))
        .x_desc(x)
        .y_desc(y)
        .draw()?;
    Ok(())
}

/// Draws the picture's title and returns what is left below it.
fn titled<'a>(root: &Area<'a>, outcome: &Outcome, title: &str) -> Drawn<Area<'a>> {
    let id = &outcome.identity;
    let device = outcome.capture.as_ref().map(|c| &c.device_name).or(outcome.device_name.as_ref());
    let device = device.map(|name| format!(", {name}")).unwrap_or_default();
    let first = format!("{} {} {}-bit{device}", id.model, id.format.algo(), id.bits);
    let (head, body) = root.split_vertically(TITLE);
    head.draw(&Text::new(first, (14, 10), ("sans-serif", 21, FontStyle::Bold).into_font().color(&INK)))?;
    head.draw(&Text::new(title.to_owned(), (14, 38), ("sans-serif", 17).into_font().color(&INK)))?;
    Ok(body)
}

/// The targets' colours, at the right end of the title.
fn legend(root: &Area<'_>, width: u32, tunings: &[Tuning]) -> Drawn {
    let mut left = width as i32 - 14;
    for (tuning, color) in tunings.iter().zip(TARGETS.into_iter().cycle()).collect::<Vec<_>>().into_iter().rev() {
        let text = format!("+{} %", per_cent(tuning.target));
        left -= 8 * text.chars().count() as i32 + 44;
        root.draw(&PathElement::new([(left, 47), (left + 24, 47)], color.stroke_width(3)))?;
        root.draw(&Text::new(text, (left + 30, 38), ("sans-serif", 16).into_font().color(&INK)))?;
    }
    Ok(())
}

/// How far up a module's picture reaches, µs: to its slowest time, but no further than tells the targets apart.
fn top(outcome: &Outcome, projection: Projection) -> f64 {
    let module = &outcome.timings.modules[projection.index()];
    let slowest = module.curves.values().flatten().map(|&(_, us)| us).fold(module.base_us, f64::max);
    let widest = outcome.tunings.iter().map(|t| t.target / 100.0).fold(0.0, f64::max);
    let most = module.base_us * (1.0 + (2.5 * widest).max(0.3));
    let chosen = outcome.tunings.iter().map(|t| t.found.fine.modules[projection.index()].us).fold(0.0, f64::max);
    let least = module.base_us * (1.0 + widest).max(1.05);
    (slowest.min(most).max(chosen).max(least) - module.base_us) * 1.08 + module.base_us
}

/// The part of a curve (which never falls) that lies below `top`, in units of `unit` µs.
fn below(curve: &Curve, unit: f64, top: f64) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> = Vec::new();
    for &(k, us) in curve {
        let (k, value) = (k as f64, us / unit);
        if value > top {
            if let Some(&(from, start)) = points.last() {
                points.push((from + (k - from) * (top - start) / (value - start), top));
            }
            break;
        }
        points.push((k, value));
    }
    points
}

fn last_k(curve: &Curve) -> f64 {
    curve.last().map_or(1.0, |&(k, _)| k.max(1) as f64)
}
