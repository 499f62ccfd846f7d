//! Plans of the layers' launch, for cards that are not here, and which layers it takes.

use std::collections::BTreeSet;

use super::plan::{MOST_STAGES, STRIPE};
use super::*;
use crate::backend::cuda::launch::{Room, Tuning};
use crate::config::{Activation, FeedForward, LayerConfig, Mixer, ModelConfig, NormPlacement, QkNorm, QueryScaling};

fn by(n_tb: usize) -> Compensated {
    Compensated { list: 9000, n_tb, products: [true; 4] }
}

const LLAMA: Shapes = Shapes { hidden: 4096, intermediate: 14336, heads: 32, kv_heads: 8, head_dim: 128 };

#[test]
fn shared_memory_is_used_and_not_exceeded() {
    let always = Tuning { one_launch: Some(true), ..Tuning::default() };
    for (format, multiprocessors, shared, dec) in [
        (Format::AnyPrec { bits: 3, planes: 1 }, 132, 232_448, None),
        (Format::AnyPrec { bits: 3, planes: 1 }, 132, 232_448, Some(by(4))),
        (Format::AnyPrec { bits: 4, planes: 1 }, 132, 232_448, Some(by(4))),
        (Format::LutGemm { bits: 4, group: 32 }, 132, 232_448, None),
        (Format::AnyPrec { bits: 4, planes: 2 }, 132, 166_912, None),
    ] {
        let launch = layers_launch(format, (LLAMA, 32), always, dec, &Room::h200(multiprocessors, shared));
        let launch = launch.unwrap_or_else(|| panic!("no room for {format:?} in {shared}"));
        assert!(launch.shared <= shared && launch.stages >= 2, "{launch:?}");
        // One more stage would not have fitted.
        let stage = launch.warps * (512 * 4 + 32768 / 32);
        assert!(launch.stages == MOST_STAGES || launch.shared + stage > shared, "{launch:?}");
    }
}

#[test]
fn one_launch_is_for_where_it_pays() {
    let pays = |format, shapes, dec, shared| {
        layers_launch(format, (shapes, 32), Tuning::default(), dec, &Room::h200(132, shared)).is_some()
    };
    for bits in [3, 4] {
        for dec in [None, Some(by(4))] {
            assert!(pays(Format::AnyPrec { bits, planes: 1 }, LLAMA, dec, 232_448), "{bits} bits, {dec:?}");
            assert!(pays(Format::LutGemm { bits, group: 128 }, LLAMA, dec, 232_448), "{bits} bits, {dec:?}");
        }
    }
    let three = Format::AnyPrec { bits: 3, planes: 1 };
    assert!(pays(three, Shapes { hidden: 8192, intermediate: 28672, heads: 64, ..LLAMA }, None, 232_448));
    let narrow = Shapes { hidden: 576, intermediate: 1536, heads: 9, kv_heads: 3, head_dim: 64 };
    assert!(!pays(three, narrow, None, 232_448), "36 blocks");
    assert!(pays(three, Shapes { hidden: 2048, intermediate: 8192, head_dim: 64, ..LLAMA }, None, 232_448));
    assert!(!pays(three, LLAMA, None, 101_376), "a small ring");
    let all = Compensated { products: [false, false, true, false], ..by(132) };
    assert!(!pays(three, LLAMA, Some(all), 232_448), "no block would multiply");
}

/// Whatever is asked for, each compensating block has rows of every product that is compensated.
#[test]
fn no_compensating_block_is_idle() {
    let always = Tuning { one_launch: Some(true), ..Tuning::default() };
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
        let launch = layers_launch(
            Format::AnyPrec { bits: 3, planes: 1 },
            (shapes, 32),
            always,
            Some(dec),
            &Room::h200(132, 232_448),
        )
        .unwrap();
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
    let always = Tuning { one_launch: Some(true), ..Tuning::default() };
    let small =
        layers_launch(Format::AnyPrec { bits: 3, planes: 1 }, (LLAMA, 32), always, None, &Room::h200(20, 101_376));
    assert_eq!(small, None, "90 tiles of partial sums do not fit");
    let odd = Shapes { intermediate: 1000, ..LLAMA };
    assert_eq!(
        layers_launch(Format::AnyPrec { bits: 3, planes: 1 }, (odd, 32), always, None, &Room::h200(132, 232_448)),
        None
    );
}

/// The programs of all families are taken, each compiled otherwise; one of another order is not.
#[test]
fn programs_of_every_family_go_in_one_launch() {
    let llama = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap().layers.remove(0);
    let mut found = BTreeSet::new();
    for norms in [NormPlacement::Before, NormPlacement::After, NormPlacement::Both] {
        for qk_norm in [None, Some(QkNorm::PerHead), Some(QkNorm::WholeRow)] {
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let mut layer = LayerConfig { norms, ..llama.clone() };
                let Mixer::Attention(attention) = &mut layer.mixer;
                attention.qk_norm = qk_norm;
                layer.feed_forward = FeedForward::Dense { intermediate_size: 14336, activation };
                let ops = layer.program();
                let program = Program::of(&ops).unwrap_or_else(|| panic!("{ops:?}"));
                assert!(found.insert(program.defines()), "{ops:?}: compiled as another program is");
                for i in 0..ops.len() {
                    let mut other = ops.clone();
                    other.remove(i);
                    assert_eq!(Program::of(&other).filter(|p| *p == program), None, "{other:?}");
                    let mut other = ops.clone();
                    other.swap(i, (i + 1) % ops.len());
                    assert_eq!(Program::of(&other), None, "{other:?}");
                }
            }
        }
    }
}

/// What differs between the layers of a model stands in the table; heads of other numbers do not.
#[test]
fn layers_of_one_launch_have_the_same_heads() {
    let llama = ModelConfig::preset("Meta-Llama-3-8B-Instruct").unwrap().layers.remove(0).attention().clone();
    let goes = |change: &dyn Fn(&mut Attention)| {
        let mut other = llama.clone();
        change(&mut other);
        alike(&other, &llama)
    };
    assert!(goes(&|a| a.window = Some(4096)) && goes(&|a| a.rope = None) && goes(&|a| a.scale *= 2.0));
    assert!(goes(&|a| a.softcap = Some(50.0)));
    assert!(goes(&|a| a.query_scaling = Some(QueryScaling { beta: 0.1, original: 8192 })));
    assert!(!goes(&|a| a.num_heads = 16) && !goes(&|a| a.num_kv_heads = 1) && !goes(&|a| a.head_dim = 64));
    assert!(!goes(&|a| a.qk_norm = Some(QkNorm::PerHead)));
}

/// A table has room for all layers of a launch, or for those that a warp's ring may be in; a model of many goes in launches of as
/// many each.
#[test]
fn many_layers_go_in_equal_launches() {
    for (count, at_once) in [(0, 0), (1, 1), (32, 32), (40, 40), (41, 21), (48, 24), (62, 31), (80, 40), (126, 32)] {
        assert_eq!(layers_at_once(count), at_once, "{count} layers");
    }
    let always = Tuning { one_launch: Some(true), ..Tuning::default() };
    let format = Format::AnyPrec { bits: 3, planes: 1 };
    let launch = |shapes, count, room: &Room| layers_launch(format, (shapes, count), always, None, room).unwrap();
    for count in 1..=MOST_LAYERS {
        assert_eq!(launch(LLAMA, count, &Room::h200(132, 232_448)).turns, count.next_multiple_of(8), "{count} layers");
    }
    assert_eq!(launch(LLAMA, 32, &Room::RTX_4090).turns, 4, "no room for a table and a ring");
    // Here some warps have no unit at all, so that their rings are at the last layer from the beginning.
    let small = Shapes { hidden: 512, intermediate: 1024, heads: 8, kv_heads: 8, head_dim: 64 };
    assert_eq!(launch(small, 32, &Room { memory_rate: 4.9e12, ..Room::RTX_4090 }).turns, 32);
}

/// What is slow to read needs no large ring: a card with 100 KB takes Llama-3-8B's layers in one launch.
#[test]
fn small_rings_are_enough_for_slow_memory() {
    let launch = |bits, room: &Room| {
        layers_launch(Format::AnyPrec { bits, planes: 1 }, (LLAMA, 32), Tuning::default(), None, room)
    };
    let room = Room::RTX_4090;
    assert!(launch(3, &room).is_some());
    assert_eq!(launch(3, &Room { memory_rate: 4.9e12, ..room }), None, "memory would idle");
}

/// Units of a row go round the warps, for most widths that models have; where they do not, few warps wait. (Of 8192 channels
/// sixteen do too, but have no room for two units each beside the input of down.)
#[test]
fn warps_go_with_the_shape() {
    for (hidden, intermediate, heads, kv_heads, head_dim, warps) in [
        (2048, 8192, 32, 8, 64, 16),
        (2304, 9216, 8, 4, 256, 9),
        (2560, 9728, 32, 8, 128, 10),
        (3072, 8192, 24, 8, 128, 12),
        (3584, 18944, 28, 4, 128, 14),
        (3840, 15360, 16, 8, 256, 15),
        (4096, 14336, 32, 8, 128, 16),
        (4608, 36864, 32, 16, 128, 9),
        (5120, 32768, 32, 8, 128, 10),
        (5376, 21504, 32, 16, 128, 11),
        (6144, 23040, 48, 2, 128, 12),
    ] {
        let shapes = Shapes { hidden, intermediate, heads, kv_heads, head_dim };
        let always = Tuning { one_launch: Some(true), ..Tuning::default() };
        for format in [Format::AnyPrec { bits: 3, planes: 1 }, Format::LutGemm { bits: 4, group: 128 }] {
            for dec in [None, Some(by(4))] {
                let launch = layers_launch(format, (shapes, 32), always, dec, &Room::h200(132, 232_448)).expect("room");
                assert_eq!(launch.warps, warps, "{shapes:?}");
                let asked = Tuning { layers: Some(8), ..always };
                let launch = layers_launch(format, (shapes, 32), asked, dec, &Room::h200(132, 232_448));
                assert!(launch.is_none_or(|launch| launch.warps == 8), "{shapes:?}: eight warps were asked for");
            }
        }
    }
}
