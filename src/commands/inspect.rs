//! `decdec inspect`

use anyhow::Result;
use decdec::config::Projection;
use decdec::weights::ModelWeights;

use crate::cli::InspectArgs;
use crate::output;

/// Bytes and weights of one part of a model.
#[derive(Debug, Default, Clone, Copy, serde::Serialize)]
struct Part {
    weights: usize,
    device_bytes: usize,
    host_bytes: usize,
}

impl Part {
    fn add(&mut self, other: Self) {
        self.weights += other.weights;
        self.device_bytes += other.device_bytes;
        self.host_bytes += other.host_bytes;
    }

    fn bits_per_weight(&self) -> f64 {
        self.device_bytes as f64 * 8.0 / self.weights.max(1) as f64
    }
}

/// Runs the command.
pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let opened = super::locate::open(&args.path, args.width.bitwidth, false)?;
    opened.expect(None, args.width.bitwidth, None)?;
    let weights = opened.weights();
    let config = weights.config();
    let projections = Projection::ALL.map(|p| measure(weights, p));
    let mut total = Part::default();
    let mut rows = Vec::new();
    for (p, part) in Projection::ALL.into_iter().zip(projections) {
        let part = part?;
        total.add(part);
        rows.push((p.name().to_owned(), Some(config.shape(0, p)), part));
    }
    let quantized = total;
    let mut rest = Part::default();
    for table in [Some(weights.embedding()?), weights.head()?].into_iter().flatten() {
        rest.add(Part { weights: table.values.len(), device_bytes: table.values.bytes(), host_bytes: 0 });
    }
    total.add(rest);
    rows.push(("embedding, head".into(), None, rest));
    rows.push(("all".into(), None, total));
    let (format, bits) = match opened.quantization() {
        Some((format, bits)) => (format.name().to_owned(), bits.to_string()),
        None => ("full precision".into(), String::new()),
    };
    let layer_bits: Vec<_> = (0..config.layers.len()).map(|l| weights.bits(l)).collect();
    if args.output.json {
        let parts: serde_json::Map<_, _> = rows
            .iter()
            .map(|(name, _, part)| Ok((name.clone(), serde_json::to_value(part)?)))
            .collect::<Result<_>>()?;
        let line = serde_json::json!({
            "format": format, "bits": bits, "layers": config.layers.len(), "layer_bits": layer_bits,
            "bits_per_weight": quantized.bits_per_weight(), "parts": parts,
        });
        return output::line(line);
    }
    output::line(format_args!("{}, {} layers, {format} {bits}", config.family.name, config.layers.len()))?;
    if bits.contains('.') {
        let each: String = layer_bits.iter().flatten().map(u32::to_string).collect();
        output::line(format_args!("bits of each layer: {each}"))?;
    }
    let mut table = super::table();
    table.set_header(["part of all layers", "in × out", "device MB", "host MB", "bits per weight"]);
    for (name, shape, part) in rows {
        let megabytes = |bytes: usize| format!("{:.1}", bytes as f64 / 1e6);
        table.add_row([
            name,
            shape.map_or(String::new(), |(i, o)| format!("{i} × {o}")),
            megabytes(part.device_bytes),
            megabytes(part.host_bytes),
            format!("{:.2}", part.bits_per_weight()),
        ]);
    }
    output::line(&table)
}

/// One projection of all layers: quantized weights on the device, residuals in host memory.
fn measure(weights: &dyn ModelWeights, projection: Projection) -> Result<Part> {
    let mut sum = Part::default();
    for layer in 0..weights.config().layers.len() {
        let linear = weights.projection(layer, projection)?;
        sum.add(Part {
            weights: linear.weight.in_features() * linear.weight.out_features(),
            device_bytes: linear.weight.bytes(),
            host_bytes: linear.residual.as_ref().map_or(0, |r| r.bytes()),
        });
    }
    Ok(sum)
}
