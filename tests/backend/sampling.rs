//! The choice of a token, against the rules in f64.

use anyhow::Result;
use decdec::config::ModelConfig;
use decdec::sampling::{NO_TOKEN, Sampling, draws};

use crate::UnderTest;
use crate::common;
use crate::decode::{config, upload};
use crate::noise::Noise;

/// Part of all draws by which rounded weights may move the border between two tokens: 2^-44 for each of a few hundred.
const BORDER: f64 = 1e-9;

/// The tokens that are sampled from `texts`, one after the other.
fn sample<B: UnderTest>(backend: &B, sampling: &Sampling, draws: &[f32], texts: &[Vec<f32>]) -> Vec<Result<u32>> {
    let config = ModelConfig { vocab_size: texts[0].len(), ..config() };
    let mut cache = backend.cache(&config, 1, texts.len(), Default::default()).unwrap();
    backend.begin(&mut cache, 0, sampling, draws).unwrap();
    for logits in texts {
        backend.sample(&mut cache, &[0], &upload(backend, logits)).unwrap();
    }
    (0..texts.len()).map(|i| backend.sampled(&cache, 0, i)).collect()
}

/// Fails if `got` is not the error of a text that cannot go on.
fn is_no_token(got: &Result<u32>, what: &str) {
    let error = got.as_ref().expect_err(what).to_string();
    for part in ["not a finite number", "--dtype", "decdec eval"] {
        assert!(error.contains(part), "{what}: {error}");
    }
}

pub(crate) fn greedy<B: UnderTest>(backend: &B) {
    let vocab = 1003;
    let base = common::uniform(1, vocab);
    let with = |changes: &[(usize, f32)]| {
        let mut logits = base.clone();
        changes.iter().for_each(|&(i, value)| logits[i] = value);
        logits
    };
    let negative: Vec<f32> = base.iter().map(|x| x - 5.0).collect();
    let largest = (0..vocab).rev().max_by(|&a, &b| negative[a].total_cmp(&negative[b])).unwrap() as u32;
    let mut zeros = vec![0.0; vocab];
    zeros[..9].fill(-0.0);
    let mut one_left = vec![f32::NAN; vocab];
    one_left[77] = f32::MIN;
    let cases = [
        (with(&[(1002, 7.0)]), Some(1002)),
        (with(&[(700, 7.0), (256, 7.0), (900, 7.0)]), Some(256)),
        (with(&[(3, f32::NAN), (800, 2.0), (1002, -f32::NAN)]), Some(800)),
        (with(&[(5, f32::INFINITY), (4, f32::MAX)]), None),
        (with(&[(5, f32::NEG_INFINITY), (4, f32::MAX)]), Some(4)),
        (vec![f32::NEG_INFINITY; vocab], None),
        (vec![f32::NAN; vocab], None),
        (one_left, Some(77)),
        (zeros, Some(0)),
        (negative, Some(largest)),
    ];
    let (texts, want): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    for (i, (got, want)) in sample(backend, &Sampling::GREEDY, &[], &texts).iter().zip(want).enumerate() {
        match want {
            Some(want) => assert_eq!(*got.as_ref().unwrap(), want, "case {i}"),
            None => is_no_token(got, &format!("case {i}")),
        }
    }
}

pub(crate) fn draws_decide<B: UnderTest>(backend: &B) {
    let sampling = Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.02 };
    let texts: Vec<Vec<f32>> = (0..24).map(|i| common::heavy_tailed(i, 517)).collect();
    let draws = draws(5, texts.len());
    let of = |draws: &[f32]| -> Vec<u32> {
        sample(backend, &sampling, draws, &texts).into_iter().map(Result::unwrap).collect()
    };
    let want: Vec<u32> = texts.iter().zip(&draws).map(|(l, &draw)| sampling.choose(l, draw).unwrap()).collect();
    assert_eq!(of(&draws), want);
    let other: Vec<f32> = draws.iter().map(|draw| 0.999 - draw).collect();
    assert_ne!(of(&other), want, "the draws do not decide");
    // Where there is no draw, 0 decides, whatever was there before.
    let zeros = of(&vec![0.0; draws.len()]);
    assert_eq!(of(&draws[..9])[9..], zeros[9..]);
}

/// Logits that are easy to choose wrongly from.
fn awkward(noise: &mut Noise, len: usize, kind: usize) -> Vec<f32> {
    let mut logits: Vec<f32> = (0..len).map(|_| 4.0 * noise.normal()).collect();
    let mut scatter = |logits: &mut Vec<f32>, values: &[f32], times: usize| {
        for _ in 0..times {
            let at = noise.below(len);
            logits[at] = values[noise.below(values.len())];
        }
    };
    let (most, least) = (f32::INFINITY, f32::NEG_INFINITY);
    match kind {
        1 => logits.iter_mut().for_each(|l| *l = l.round()),
        2 => logits.fill([0.0, -0.0, 5.0, f32::MAX, f32::MIN, 1e-40][len % 6]),
        3 => logits.iter_mut().for_each(|l| *l = if *l < 0.0 { -0.0 } else { 0.0 }),
        4 => scatter(&mut logits, &[f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)], len / 3),
        5 => {
            logits.fill(f32::NAN);
            scatter(&mut logits, &[-3.0, -3.0, f32::MIN], 3);
        }
        6 => logits.fill(f32::NAN),
        7 => logits.fill(least),
        8 => {
            logits.fill(least);
            scatter(&mut logits, &[2.0, 2.0, 1.5, f32::NAN], 6);
        }
        9 => scatter(&mut logits, &[most, f32::MAX, f32::NAN], 4),
        10 => {
            logits.fill(least);
            scatter(&mut logits, &[f32::NAN], len / 2);
        }
        11 => scatter(&mut logits, &[f32::MAX, f32::MIN, least], len / 4),
        12 => logits.iter_mut().for_each(|l| *l *= 1e-40),
        _ => {}
    }
    logits
}

const KINDS: usize = 13;

/// The tokens that the rules allow: several where `draw` lies on a border. `None` where there is none to choose.
fn legal(rules: &Sampling, logits: &[f32], draw: f32) -> Option<Vec<u32>> {
    let numbers = logits.iter().copied().filter(|l| !l.is_nan());
    let top = numbers.fold(f32::NEG_INFINITY, f32::max);
    if !top.is_finite() {
        return None;
    }
    let mut order: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] > f32::NEG_INFINITY).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    if rules.temperature == 0.0 {
        return Some(vec![order[0] as u32]);
    }
    if rules.top_k > 0 {
        order.truncate(rules.top_k);
    }
    let weight = |&i: &usize| ((f64::from(logits[i]) - f64::from(top)) / f64::from(rules.temperature)).exp();
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let mut sum = 0.0;
    let add = |w: &f64| {
        sum += w;
        sum
    };
    let sums: Vec<f64> = weights.iter().map(add).collect();
    // How many stay, as rounded weights may have it.
    let total = sums[sums.len() - 1];
    let reached = |share: f64| sums.iter().position(|&s| s >= share * total).map_or(sums.len(), |i| i + 1);
    let large = |share: f64| weights.iter().take_while(|&&w| w >= share || w == 1.0).count();
    let stay = |border: f64| match rules.top_p < 1.0 {
        true => reached(f64::from(rules.top_p) * (1.0 + border)).min(large(f64::from(rules.min_p) * (1.0 - border))),
        false => large(f64::from(rules.min_p) * (1.0 - border)),
    };
    let mut allowed: Vec<u32> = (stay(-BORDER).max(1)..=stay(BORDER).max(1))
        .flat_map(|count| {
            let share = |i: usize| sums[i] / sums[count - 1];
            let below = |i: usize| if i == 0 { 0.0 } else { share(i - 1) };
            let draw = f64::from(draw);
            let met: Vec<usize> =
                (0..count).filter(|&i| below(i) <= draw + BORDER && draw - BORDER <= share(i)).collect();
            met.into_iter().map(|i| order[i] as u32)
        })
        .collect();
    allowed.dedup();
    Some(allowed)
}

/// Whatever the logits, the rules and the draw: a token that they allow, or the error that there is none.
pub(crate) fn awkward_logits<B: UnderTest>(backend: &B) {
    let mut noise = Noise::new(21);
    let (mut ended, mut unnoticed, mut drawn) = (0, 0, 0);
    for case in 0..B::CASES {
        let len = [517, 96, 1030, 518, 519, 520, 521, 1, 3][case / KINDS % 9];
        let logits = awkward(&mut noise, len, case % KINDS);
        let rules = Sampling {
            temperature: [0.0, 1.0, 0.3, 2.5, 1e-6, 1e6][noise.below(6)],
            top_k: [0, 0, 1, 2, 50, len, len + 1000][noise.below(7)],
            top_p: [1.0, 1.0, 0.9, 0.3, 0.0][noise.below(5)],
            min_p: [0.0, 0.0, 0.05, 0.5, 1.0][noise.below(5)],
        };
        let draw = [0.0, 1f32.next_down(), noise.uniform(), noise.uniform()][noise.below(4)];
        let got = sample(backend, &rules, &[draw], std::slice::from_ref(&logits)).remove(0);
        let what = format!("case {case}, {len} logits of kind {}, {rules:?}, draw {draw}", case % KINDS);
        let Some(legal) = legal(&rules, &logits, draw) else {
            ended += 1;
            is_no_token(&got, &what);
            continue;
        };
        let got = got.unwrap_or_else(|e| panic!("{what}: {e:#}"));
        assert!(legal.contains(&got), "{what}: {got}, {legal:?} allowed");
        drawn += usize::from(rules.temperature > 0.0);
        unnoticed += usize::from(len > 3 && legal.contains(&((got + 1) % len as u32)));
    }
    assert!(ended > B::CASES / 8 && drawn > B::CASES / 2, "{ended} ended, {drawn} drawn of {}", B::CASES);
    assert!(unnoticed < B::CASES / 10, "another token would pass in {unnoticed} of {} cases", B::CASES);
}

/// A text without a next token has none ever after, and says so for each; one that begins anew has.
pub(crate) fn after_no_token<B: UnderTest>(backend: &B) {
    let config = ModelConfig { vocab_size: 96, ..config() };
    let mut cache = backend.cache(&config, 1, 8, Default::default()).unwrap();
    let bad = upload(backend, &[f32::NAN; 96]);
    let good = upload(backend, &common::uniform(1, 96));
    for sampling in [Sampling::GREEDY, Sampling { temperature: 1.0, ..Sampling::GREEDY }] {
        backend.begin(&mut cache, 0, &sampling, &[0.5; 8]).unwrap();
        for logits in [&good, &bad, &good] {
            backend.sample(&mut cache, &[0], logits).unwrap();
        }
        let tokens: Vec<_> = (0..3).map(|i| backend.sampled(&cache, 0, i)).collect();
        is_no_token(&tokens[1], "the second");
        let (first, third) = (tokens[0].as_ref().unwrap(), tokens[2].as_ref().unwrap());
        assert!(first == third && *first != NO_TOKEN);
        let error = backend.sampled(&cache, 0, 3).unwrap_err().to_string();
        assert!(error.contains("token 3 was read before it was sampled"), "{error}");
    }
}
