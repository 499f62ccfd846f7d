//! The best of all choices, where channels are worth more in one module than in another, and prices are those of whole
//! tokens: exact on what was measured, and linear between two `k_chunk` that were.

use super::search::{Choice, Chosen, Curve, Found, Timings, Token};

/// `k_chunk` up to which values between those measured are looked at as well.
const BETWEEN: usize = 128;

/// Two modules' `k_chunk`, what they are worth and what they take, µs.
#[derive(Clone, Copy)]
struct Pair {
    us: f64,
    worth: f64,
    points: [(usize, f64); 2],
}

impl Timings {
    /// The choice that is worth most, Σ `weights` · `k_chunk`, among those of at most `budget_us(n_tb)`; of equals the
    /// quickest. A module whose channels are worth nothing gets none, and no compensation at all is always allowed. The first phase is that of [`Timings::search`], for the
    /// largest of the budgets.
    pub fn search_weighted(&self, budget_us: &dyn Fn(usize) -> f64, weights: [f64; 4]) -> Found {
        let n_tbs = self.n_tbs();
        let most = n_tbs.iter().map(|&n_tb| budget_us(n_tb)).fold(0.0, f64::max);
        let (excluded, starts) = self.all_starts(most);
        let global = starts.into_iter().min_by(|a, b| a.us().total_cmp(&b.us())).unwrap_or_else(|| self.at_base(1));
        let mut fine = self.at_base(n_tbs.first().copied().unwrap_or(1));
        let mut consider = |choice: Choice| {
            let (new, old) = (choice.worth(weights), fine.worth(weights));
            if new > old || new == old && choice.us() < fine.us() {
                fine = choice;
            }
        };
        for &n_tb in &n_tbs {
            self.best_at(n_tb, budget_us(n_tb), weights).into_iter().for_each(&mut consider);
        }
        for choice in self.measured().filter(|choice| choice.us() <= budget_us(choice.n_tb) && pays(choice, weights)) {
            consider(choice);
        }
        Found { clamped: self.clamped(&fine), global, fine, excluded, uneven: false }
    }

    /// Choices that were measured as they are, with the times that they took.
    pub fn measured(&self) -> impl Iterator<Item = Choice> {
        let measured = self.token.iter().flat_map(|token| &token.measured);
        measured.filter_map(|&(n_tb, k_chunks, us)| {
            let mut choice = self.at_base(n_tb);
            for ((module, chosen), k_chunk) in self.modules.iter().zip(&mut choice.modules).zip(k_chunks) {
                let (_, curve) = module.at(n_tb)?;
                chosen.k_chunk = k_chunk;
                chosen.us = curve.iter().find(|(k, _)| *k == k_chunk)?.1;
            }
            let modules: f64 = choice.modules.iter().map(|m| m.us).sum();
            choice.besides_us = us - modules;
            Some(choice)
        })
    }

    /// What trying everything finds within the budget: of whole tokens the best choice that was measured as it is, else
    /// the best by the modules' times.
    pub fn optimum(&self, budget_us: f64, weights: Option<[f64; 4]>) -> Choice {
        match weights {
            Some(weights) if self.token.is_some() => self.best_measured(budget_us, weights),
            Some(weights) => self.search_weighted(&|_| budget_us, weights).fine,
            None => self.exhaustive(budget_us),
        }
    }

    /// The choice measured as it is that is worth most within the budget: what trying all of them finds.
    pub fn best_measured(&self, budget_us: f64, weights: [f64; 4]) -> Choice {
        let none = self.at_base(self.n_tbs().first().copied().unwrap_or(1));
        let fits = self.measured().filter(|choice| choice.us() <= budget_us && pays(choice, weights));
        fits.fold(none, |best, choice| {
            let (new, old) = (choice.worth(weights), best.worth(weights));
            if new > old || new == old && choice.us() < best.us() { choice } else { best }
        })
    }

    /// The best of one `n_tb` by its modules' times; what was measured as a whole and took longer is none.
    ///
    /// Where the best is one that took longer, all others are searched: those with another `k_chunk` of the first module,
    /// those with the same and another of the second, and so on.
    fn best_at(&self, n_tb: usize, budget_us: f64, weights: [f64; 4]) -> Option<Choice> {
        let points = std::array::from_fn(|i| match self.modules[i].at(n_tb) {
            Some((_, curve)) if weights[i] > 0.0 => between(curve),
            _ => vec![(0, self.modules[i].base_us)],
        });
        let mut parts: Vec<(Choice, [Curve; 4])> = Vec::new();
        let search = |parts: &mut Vec<_>, points: [Curve; 4]| {
            parts.extend(self.best_of(n_tb, &points, budget_us, weights).map(|choice| (choice, points)));
        };
        search(&mut parts, points);
        loop {
            let order = |choice: &Choice| (choice.worth(weights), -choice.us());
            let best = (0..parts.len()).max_by(|&a, &b| {
                let (a, b) = (order(&parts[a].0), order(&parts[b].0));
                a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
            })?;
            let (choice, points) = parts.swap_remove(best);
            if choice.sum_k() == 0 {
                return None;
            }
            match self.token.as_ref().and_then(|token| took(token, &choice)) {
                Some(us) if us > budget_us => {
                    for (i, k_chunk) in choice.k_chunks().into_iter().enumerate() {
                        let mut others = points.clone();
                        for (curve, same) in others.iter_mut().zip(choice.k_chunks()).take(i) {
                            curve.retain(|&(k, _)| k == same);
                        }
                        others[i].retain(|&(k, _)| k != k_chunk);
                        search(&mut parts, others);
                    }
                }
                Some(us) => return Some(Choice { besides_us: choice.besides_us + us - choice.us(), ..choice }),
                None => return Some(choice),
            }
        }
    }

    /// The best of these points of the four modules, by the modules' times.
    fn best_of(&self, n_tb: usize, points: &[Curve; 4], budget_us: f64, weights: [f64; 4]) -> Option<Choice> {
        let besides_us = self.besides_us(n_tb, true);
        let first = front(&points[0], &points[1], [weights[0], weights[1]]);
        let second = front(&points[2], &points[3], [weights[2], weights[3]]);
        let (left, right) = best_pair(&first, &second, budget_us - besides_us)?;
        let chosen = [left.points[0], left.points[1], right.points[0], right.points[1]];
        let base = self.at_base(n_tb);
        let modules = std::array::from_fn(|i| {
            let (k_chunk, us) = chosen[i];
            Chosen { n_tb: base.modules[i].n_tb, k_chunk, us }
        });
        Some(Choice { n_tb, modules, besides_us })
    }
}

/// Whether every module that is compensated is worth something: bytes that give nothing are not read, even where a
/// measurement with them happened to be the quicker one.
fn pays(choice: &Choice, weights: [f64; 4]) -> bool {
    choice.modules.iter().zip(weights).all(|(module, weight)| module.k_chunk == 0 || weight > 0.0)
}

/// What a choice took as a whole, if it was measured.
fn took(token: &Token, choice: &Choice) -> Option<f64> {
    let same = |(n_tb, k_chunks, _): &&(usize, [usize; 4], f64)| *n_tb == choice.n_tb && *k_chunks == choice.k_chunks();
    token.measured.iter().find(same).map(|(.., us)| *us)
}

/// A curve with the values between those measured, if it is short.
fn between(curve: &Curve) -> Curve {
    if curve.last().is_none_or(|&(last, _)| last > BETWEEN) {
        return curve.clone();
    }
    let mut all: Curve = curve.first().copied().into_iter().collect();
    for pair in curve.windows(2) {
        let [(k, us), (next, then)] = [pair[0], pair[1]];
        all.extend((k + 1..next).map(|i| (i, us + (then - us) * (i - k) as f64 / (next - k) as f64)));
        all.push((next, then));
    }
    all
}

/// Of all pairs of two modules' points, those that no quicker one is worth as much as; quickest first.
fn front(a: &Curve, b: &Curve, weights: [f64; 2]) -> Vec<Pair> {
    let pair = |x: &(usize, f64), y: &(usize, f64)| Pair {
        us: x.1 + y.1,
        worth: weights[0] * x.0 as f64 + weights[1] * y.0 as f64,
        points: [*x, *y],
    };
    let mut all: Vec<Pair> = a.iter().flat_map(|x| b.iter().map(move |y| pair(x, y))).collect();
    all.sort_by(|x, y| x.us.total_cmp(&y.us).then(y.worth.total_cmp(&x.worth)));
    let mut most = f64::NEG_INFINITY;
    all.retain(|pair| {
        let more = pair.worth > most;
        most = most.max(pair.worth);
        more
    });
    all
}

/// The two that are worth most together within the budget; of equals the quickest.
fn best_pair(first: &[Pair], second: &[Pair], budget_us: f64) -> Option<(Pair, Pair)> {
    let mut best: Option<(Pair, Pair)> = None;
    let mut end = second.len();
    for &left in first {
        while end > 0 && left.us + second[end - 1].us > budget_us {
            end -= 1;
        }
        let Some(&right) = second[..end].last() else { break };
        let (worth, us) = (left.worth + right.worth, left.us + right.us);
        let better = |(l, r): &(Pair, Pair)| {
            let now = l.worth + r.worth;
            worth > now || worth == now && us < l.us + r.us
        };
        if best.as_ref().is_none_or(better) {
            best = Some((left, right));
        }
    }
    best
}
