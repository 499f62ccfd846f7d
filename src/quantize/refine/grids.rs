//! How the two formats' codes stand for weights.

use half::f16;

use super::Grid;

/// One codebook of `2^bits` weights for each row; ascending.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Codebook {
    pub(crate) bits: usize,
}

impl Grid for Codebook {
    fn parameters(&self) -> usize {
        1 << self.bits
    }

    fn weights(&self, parameters: &[f32], codes: &[u8], out: &mut [f32]) {
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = parameters[usize::from(code)]);
    }

    fn derivatives(&self, codes: &[u8], gradient: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        codes.iter().zip(gradient).for_each(|(&code, g)| out[usize::from(code)] += g);
    }

    fn curvatures(&self, codes: &[u8], diagonal: &[f32], out: &mut [f32]) {
        self.derivatives(codes, diagonal, out);
    }

    fn nearest(&self, parameters: &[f32], _: usize, target: f32) -> (u8, f32) {
        let above = parameters.partition_point(|&c| c < target).min(parameters.len() - 1);
        let below = above.saturating_sub(1);
        let code = if target - parameters[below] <= parameters[above] - target { below } else { above };
        (code as u8, parameters[code])
    }

    fn tidy(&self, parameters: &mut [f32], codes: &mut [u8]) {
        if parameters.is_sorted() {
            return;
        }
        let mut order: Vec<u8> = (0..=(parameters.len() - 1) as u8).collect();
        order.sort_by(|&a, &b| parameters[usize::from(a)].total_cmp(&parameters[usize::from(b)]));
        let sorted: Vec<f32> = order.iter().map(|&i| parameters[usize::from(i)]).collect();
        parameters.copy_from_slice(&sorted);
        let mut place = vec![0; order.len()];
        order.iter().enumerate().for_each(|(new, &old)| place[usize::from(old)] = new as u8);
        codes.iter_mut().for_each(|code| *code = place[usize::from(*code)]);
    }

    fn store(&self, parameters: &mut [f32]) {
        parameters.iter_mut().for_each(|c| *c = f16::from_f32(*c).to_f32());
    }
}

/// LUT-GEMM's groups of channels, each of evenly spaced weights: a centre and half a step for every group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups {
    pub(crate) bits: usize,
    pub(crate) group_size: usize,
    pub(crate) groups: usize,
}

impl Groups {
    /// Code 0 is this many half steps below the centre.
    fn last(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Half steps from the centre.
    fn place(&self, code: u8) -> f32 {
        2.0 * f32::from(code) - self.last()
    }
}

impl Grid for Groups {
    fn parameters(&self) -> usize {
        2 * self.groups
    }

    fn weights(&self, parameters: &[f32], codes: &[u8], out: &mut [f32]) {
        let groups = out.chunks_exact_mut(self.group_size).zip(codes.chunks_exact(self.group_size));
        for ((out, codes), parameters) in groups.zip(parameters.chunks_exact(2)) {
            let weight = |&code| parameters[0] + parameters[1] * self.place(code);
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = weight(code));
        }
    }

    fn derivatives(&self, codes: &[u8], gradient: &[f32], out: &mut [f32]) {
        let groups = codes.chunks_exact(self.group_size).zip(gradient.chunks_exact(self.group_size));
        for ((codes, gradient), out) in groups.zip(out.chunks_exact_mut(2)) {
            out[0] = gradient.iter().sum();
            out[1] = codes.iter().zip(gradient).map(|(&code, g)| g * self.place(code)).sum();
        }
    }

    fn curvatures(&self, codes: &[u8], diagonal: &[f32], out: &mut [f32]) {
        let groups = codes.chunks_exact(self.group_size).zip(diagonal.chunks_exact(self.group_size));
        for ((codes, diagonal), out) in groups.zip(out.chunks_exact_mut(2)) {
            out[0] = diagonal.iter().sum();
            out[1] = codes.iter().zip(diagonal).map(|(&code, d)| d * self.place(code).powi(2)).sum();
        }
    }

    fn nearest(&self, parameters: &[f32], k: usize, target: f32) -> (u8, f32) {
        let group = &parameters[k / self.group_size * 2..][..2];
        let place = ((target - group[0]) / group[1] + self.last()) / 2.0;
        // Adding 2^23 rounds to a whole number, which is then in the lowest bits.
        let code = (place.clamp(0.0, self.last()) + 8_388_608.0).to_bits() as u8;
        (code, group[0] + group[1] * self.place(code))
    }

    fn tidy(&self, parameters: &mut [f32], codes: &mut [u8]) {
        let last = self.last() as u8;
        for (group, codes) in parameters.chunks_exact_mut(2).zip(codes.chunks_exact_mut(self.group_size)) {
            if group[1] < 0.0 {
                group[1] = -group[1];
                codes.iter_mut().for_each(|code| *code = last - *code);
            }
        }
    }

    fn store(&self, parameters: &mut [f32]) {
        for group in parameters.chunks_exact_mut(2) {
            group[0] = f16::from_f32(group[0]).to_f32();
            group[1] = f16::from_f32(group[1]).max(f16::MIN_POSITIVE_SUBNORMAL).to_f32();
        }
    }
}
