//! Plans of the layers' launch, for cards that are not here.

use super::*;
use crate::config::{FeedForward, LayerConfig, Mixer, ModelConfig, NormPlacement, QkNorm, QueryScaling};

fn by(n_tb: usize) -> Compensated {
    Compensated { list: 9000, n_tb, products: [true; 4] }
}

const LLAMA: Shapes = Shapes { hidden: 4096, intermediate: 14336, heads: 32, kv_heads: 8, head_dim: 128 };

#[test]
fn shared_memory_is_used_and_not_exceeded() {
    let always = Tuning { layers_always: true, ..Tuning::default() };
    for (format, multiprocessors, shared, dec) in [
        (Format::AnyPrec { bits: 3 }, 132, 232_448, None),
        (Format::AnyPrec { bits: 3 }, 132, 232_448, Some(by(4))),
        (Format::AnyPrec { bits: 4 }, 132, 232_448, Some(by(4))),
        (Format::LutGemm { bits: 4, group: 32 }, 132, 232_448, None),
        (Format::AnyPrec { bits: 3 }, 170, 101_376, None),
    ] {
        let launch = layers_launch(format, LLAMA, always, dec, multiprocessors, shared);
        let launch = launch.unwrap_or_else(|| panic!("no room for {format:?} in {shared}"));
        assert!(launch.shared <= shared && launch.stages >= 2, "{launch:?}");
        // One more stage would not have fitted.
        let stage = launch.warps * (512 * 4 + 32768 / 32);
        assert!(launch.stages == 8 || launch.shared + stage > shared, "{launch:?}");
    }
}

#[test]
fn one_launch_is_for_where_it_pays() {
    let pays =
        |format, shapes, dec, shared| layers_launch(format, shapes, Tuning::default(), dec, 132, shared).is_some();
    for bits in [3, 4] {
        for dec in [None, Some(by(4))] {
            assert!(pays(Format::AnyPrec { bits }, LLAMA, dec, 232_448), "{bits} bits, {dec:?}");
            assert!(pays(Format::LutGemm { bits, group: 128 }, LLAMA, dec, 232_448), "{bits} bits, {dec:?}");
        }
    }
    let three = Format::AnyPrec { bits: 3 };
    let large = Shapes { hidden: 8192, intermediate: 28672, heads: 64, ..LLAMA };
    let phi = Shapes { hidden: 5120, intermediate: 17920, heads: 40, kv_heads: 10, head_dim: 128 };
    assert!(!pays(three, large, None, 232_448) && !pays(three, phi, None, 232_448));
    assert!(!pays(three, LLAMA, None, 101_376), "a small ring");
    let all = Compensated { products: [false, false, true, false], ..by(132) };
    assert!(!pays(three, LLAMA, Some(all), 232_448), "no block would multiply");
}

/// Whatever is asked for, each compensating block has rows of every product that is compensated.
#[test]
fn no_compensating_block_is_idle() {
    let always = Tuning { layers_always: true, ..Tuning::default() };
    let small = Shapes { hidden: 576, intermediate: 1184, heads: 6, kv_heads: 2, head_dim: 96 };
    for (shapes, products, n_tb, wanted) in [
        (small, [true; 4], 17, 17),
        (small, [true; 4], 18, 18),
        (small, [true; 4], 19, 18),
        (small, [true; 4], 100, 18),
        (small, [true, false, false, false], 100, 960 / 32),
        (small, [false, false, true, false], 100, 2368 / 32),
        (LLAMA, [true; 4], 100, 100),
    ] {
        let dec = Compensated { products, ..by(n_tb) };
        let launch = layers_launch(Format::AnyPrec { bits: 3 }, shapes, always, Some(dec), 132, 232_448).unwrap();
        assert_eq!(launch.n_tb, wanted, "{shapes:?}, {products:?}, n_tb {n_tb}");
        // `Stripe::of` of dec.cuh, pieces of 32 rows.
        for (_, rows) in shapes.products().into_iter().zip(products).filter(|p| p.1).map(|p| p.0) {
            let (pieces, n) = (rows / STRIPE, launch.n_tb);
            let mut line = 8;
            while line > 1 && pieces < line * n {
                line /= 2;
            }
            let lines = pieces.div_ceil(line);
            let stripe = |b: usize| (lines * b / n * line).min(pieces)..(lines * (b + 1) / n * line).min(pieces);
            assert!((0..n).all(|b| !stripe(b).is_empty()), "{rows} rows in {n} stripes");
        }
    }
}

#[test]
fn too_little_room_is_said() {
    let always = Tuning { layers_always: true, ..Tuning::default() };
    let small = layers_launch(Format::AnyPrec { bits: 3 }, LLAMA, always, None, 20, 101_376);
    assert_eq!(small, None, "90 tiles of partial sums do not fit");
    let odd = Shapes { intermediate: 1000, ..LLAMA };
    assert_eq!(layers_launch(Format::AnyPrec { bits: 3 }, odd, always, None, 132, 232_448), None);
}

/// A Llama layer is taken, with a window or without; whatever `layers.cu` does not compute is not.
#[test]
fn only_llama_layers_go_in_one_launch() {
    let llama = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap().layers.remove(0);
    let taken = |change: &dyn Fn(&mut LayerConfig)| {
        let mut layer = llama.clone();
        change(&mut layer);
        takes(&layer.program(), layer.attention())
    };
    let attends = |change: &dyn Fn(&mut Attention)| {
        taken(&|layer| {
            let Mixer::Attention(attention) = &mut layer.mixer;
            change(attention);
        })
    };
    assert!(taken(&|_| ()));
    assert!(attends(&|a| a.window = Some(4096)));
    assert!(attends(&|a| a.num_kv_heads = 1));
    assert!(!attends(&|a| a.qk_norm = Some(QkNorm::PerHead)));
    assert!(!attends(&|a| a.softcap = Some(50.0)));
    assert!(!attends(&|a| a.rope = None));
    assert!(!attends(&|a| a.scale *= 1.01));
    assert!(!attends(&|a| a.query_scaling = Some(QueryScaling { beta: 0.1, original: 8192 })));
    assert!(!taken(&|layer| layer.norms = NormPlacement::After));
    assert!(!taken(&|layer| layer.norms = NormPlacement::Both));
    assert!(!taken(&|layer| {
        layer.feed_forward = FeedForward::Dense { intermediate_size: 14336, activation: Activation::GeluTanh };
    }));
}
