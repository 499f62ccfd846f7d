//! Scaling leaves the function alone, and every search is better than not searching.

use super::super::fixture::{self, config, layer, numbers, variants};
use super::super::forward::Ropes;
use super::*;
use crate::config::ModelConfig;

/// A residual stream in which a few channels are much larger than the others.
fn stream(config: &ModelConfig, tokens: usize) -> Vec<f32> {
    let mut h = numbers(20, tokens * config.hidden_size, 1.0);
    h.iter_mut().enumerate().filter(|(i, _)| i % config.hidden_size % 13 == 2).for_each(|(_, x)| *x *= 20.0);
    h
}

fn run(config: &ModelConfig, layer: &Layer, h: &[f32]) -> (Vec<f32>, Inputs) {
    let tokens = h.len() / config.hidden_size;
    let mut h = h.to_vec();
    let mut cache = fixture::cache(layer, 1, tokens);
    let inputs = fixture::forward(config, layer, &Ropes::new(config, tokens), &mut cache, 1, &mut h);
    (h, inputs)
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn scaling_changes_inputs_and_weights_and_not_the_function() {
    let config = config();
    let mut layer = layer(&config, 0.2);
    let h = stream(&config, 40);
    let (before, mut inputs) = run(&config, &layer, &h);
    let unscaled = inputs.clone();
    scale(&mut layer, &mut inputs, 3, 32);
    let (after, now) = run(&config, &layer, &h);
    let size = before.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert!(largest_difference(&before, &after) < 1e-4 * size);
    for projection in Projection::ALL {
        let i = projection.index();
        let size = now[i].iter().fold(0f32, |m, x| m.max(x.abs()));
        let difference = largest_difference(&inputs[i], &now[i]);
        assert!(difference < 1e-4 * size, "{projection}: thresholds would be those of another model");
    }
    let qkv = Projection::Qkv.index();
    assert!(largest_difference(&unscaled[qkv], &now[qkv]) > 1.0, "loud channels are turned down");
}

/// Whatever a family does; where no norm comes before a projection, it is not scaled.
#[test]
fn scaling_leaves_the_function_of_every_family() {
    for (name, config) in variants(&config()) {
        let mut layer = layer(&config, 0.2);
        let h = stream(&config, 40);
        let (before, unscaled) = run(&config, &layer, &h);
        let mut inputs = unscaled.clone();
        scale(&mut layer, &mut inputs, 3, 32);
        let (after, now) = run(&config, &layer, &h);
        let size = |x: &[f32]| x.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(largest_difference(&before, &after) < 1e-4 * size(&before), "{name}");
        for projection in Projection::ALL {
            let i = projection.index();
            assert!(largest_difference(&inputs[i], &now[i]) < 1e-4 * size(&now[i]), "{name}, {projection}");
            let scaled = largest_difference(&unscaled[i], &now[i]) > 1e-2 * size(&now[i]);
            let foldable = layer.config.reads(projection) != Reads::Stream(None);
            assert!(foldable || !scaled, "{name}, {projection}: nothing takes the inverse");
            assert!(!foldable || scaled || projection == Projection::O, "{name}, {projection} is not scaled");
        }
    }
}

#[test]
fn value_channels_shared_by_heads_share_a_scale() {
    let config = config();
    let x = numbers(3, 10 * 64, 1.0);
    let magnitudes = magnitudes(&config.layers[0], Projection::O, &x, 64);
    for v in 0..2 * 16 {
        let (kv_head, i) = (v / 16, v % 16);
        assert_eq!(magnitudes[kv_head * 32 + i], magnitudes[kv_head * 32 + 16 + i]);
    }
    assert_ne!(magnitudes[0], magnitudes[32]);
}

/// Σ over tokens and rows of the squared output error of `weight`.
fn output_error(linear: &Affine, weight: &Weight<'_>, x: &[f32]) -> f64 {
    let mut delta = vec![0.0; linear.weight.len()];
    for (row, delta) in delta.chunks_exact_mut(linear.in_features).enumerate() {
        weight.row(row, delta);
        delta.iter_mut().zip(linear.row(row)).for_each(|(d, w)| *d -= w);
    }
    let mut y = vec![0.0; x.len() / linear.in_features * linear.out_features];
    product(x, &delta, linear.in_features, &mut y);
    squares(&y)
}

#[test]
fn searching_is_better_than_rounding() {
    let config = config();
    let plain = layer(&config, 0.2);
    let h = stream(&config, 64);
    let (_, inputs) = run(&config, &plain, &h);
    let (mut scaled, mut scaled_inputs) = (plain.clone(), inputs.clone());
    scale(&mut scaled, &mut scaled_inputs, 3, 32);
    for projection in Projection::ALL {
        let i = projection.index();
        let rounded = quantize(plain.linear(projection), 3, 32, None).unwrap();
        let clipped = quantize(plain.linear(projection), 3, 32, Some(&inputs[i][..])).unwrap();
        let both = quantize(scaled.linear(projection), 3, 32, Some(&scaled_inputs[i][..])).unwrap();
        let error = |weight| output_error(plain.linear(projection), weight, &inputs[i]);
        assert!(error(&clipped) < error(&rounded), "{projection}");
        let both = output_error(scaled.linear(projection), &both, &scaled_inputs[i]);
        assert!(both < error(&rounded), "{projection}");
    }
}

#[test]
fn rounding_hits_the_nearest_of_what_is_stored() {
    let linear = Affine { in_features: 64, out_features: 8, weight: numbers(1, 64 * 8, 0.3), bias: None };
    for bits in [2, 3, 4, 8] {
        let Weight::LutGemm(stored) = quantize(&linear, bits, 32, None).unwrap() else { panic!("another format") };
        let (mut row, mut codebook) = (vec![0.0; 64], vec![0.0; 1 << bits]);
        for r in 0..8 {
            stored.row(r, &mut row);
            for (k, (&got, &w)) in row.iter().zip(linear.row(r)).enumerate() {
                stored.codebook(r, k / 32, &mut codebook);
                let nearest = codebook.iter().map(|c| (c - w).abs()).fold(f32::INFINITY, f32::min);
                assert!((got - w).abs() <= nearest + 1e-6, "{bits} bits, row {r}, channel {k}");
                assert!(nearest <= 0.3 / ((1 << bits) - 1) as f32 * 1.01, "{bits} bits: the range is covered");
            }
        }
    }
}

#[test]
fn a_flat_group_is_kept() {
    let linear = Affine { in_features: 32, out_features: 8, weight: vec![0.25; 256], bias: None };
    let weight = quantize(&linear, 3, 32, Some(&numbers(4, 320, 1.0)[..])).unwrap();
    let mut row = vec![0.0; 32];
    weight.row(5, &mut row);
    assert!(largest_difference(&row, &[0.25; 32]) < 1e-6, "{row:?}");
}
