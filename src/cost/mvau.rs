//! Matrix-vector units of a dataflow circuit: FINN-R's formulas.

use super::mac::{Format, Source, ratio};

/// A linear layer as hardware sees it.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Inputs of one output: MW.
    pub inputs: usize,
    /// Outputs: MH.
    pub outputs: usize,
    /// Positions at which all of them are computed.
    pub pixels: usize,
}

/// How much of it is computed at once: both divide the shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folding {
    /// Outputs at once: P.
    pub pe: usize,
    /// Inputs at once: Q.
    pub simd: usize,
}

impl Folding {
    /// The largest divisors of `shape` that are not above `most`.
    #[must_use]
    pub fn within(shape: &Shape, most: Self) -> Self {
        let divisor =
            |of: usize, most: usize| (1..=most.min(of).max(1)).rev().find(|d| of.is_multiple_of(*d)).unwrap_or(1);
        Self { pe: divisor(shape.outputs, most.pe), simd: divisor(shape.inputs, most.simd) }
    }
}

/// What a layer takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Lookup tables, multipliers built of them.
    pub lut: f64,
    /// DSP blocks, if multipliers are built of those.
    pub dsp: usize,
    /// Memories of 18 kbit for the weights.
    pub bram: usize,
    /// Cycles per sample.
    pub cycles: u64,
    /// Bits of weights.
    pub weight_bits: u64,
}

impl Cost {
    /// Lookup tables times cycles.
    pub fn area_time(&self) -> f64 {
        self.lut * self.cycles as f64
    }
}

/// The cost of a layer of `shape` whose sums have `accumulator` bits; minifloats by their ratio to integers of as many bits. The formulas
/// are those of FINN-R for LUT multipliers, without thresholds, and with weights in memories.
pub fn cost(
    shape: &Shape,
    folding: Folding,
    (weight, activation): (Format, Format),
    accumulator: u32,
) -> (Cost, Source) {
    if shape.inputs == 0 || shape.outputs == 0 || shape.pixels == 0 {
        return (Cost::default(), Source::Formula);
    }
    let (p, q) = (folding.pe as f64, folding.simd as f64);
    let (w, a) = (f64::from(weight.bits()), f64::from(activation.bits()));
    let multipliers = q * (2.0 * ((w + a) / 6.0).ceil() - 1.0) * (w + a);
    let tree = (w + a) * (2.0 * q - 1.0);
    let dearer = (ratio(weight) * ratio(activation)).sqrt();
    let lut = 300.0 + 1.1 * p * (dearer * (multipliers + tree) + f64::from(accumulator));
    let width = folding.pe * folding.simd * weight.bits() as usize;
    let depth = (shape.inputs * shape.outputs).div_ceil(folding.pe * folding.simd);
    let cycles = (shape.outputs / folding.pe) as u64 * (shape.inputs / folding.simd) as u64 * shape.pixels as u64;
    let cost = Cost {
        lut,
        dsp: folding.pe * folding.simd * ((weight.bits() + activation.bits()) as usize).div_ceil(48),
        bram: brams(width, depth),
        cycles,
        weight_bits: (shape.inputs * shape.outputs) as u64 * u64::from(weight.bits()),
    };
    (cost, if dearer > 1.0 { Source::Fitted } else { Source::Formula })
}

/// Memories of 18 kbit for `depth` words of `width` bits.
fn brams(width: usize, depth: usize) -> usize {
    match (width, depth) {
        (0, _) | (_, 0) => 0,
        (1, _) => depth.div_ceil(16384),
        (2, _) => depth.div_ceil(8192),
        (3..=4, _) => depth.div_ceil(4096) * width.div_ceil(4),
        (5..=9, _) => depth.div_ceil(2048) * width.div_ceil(9),
        (10..=18, _) | (_, 513..) => depth.div_ceil(1024) * width.div_ceil(18),
        _ => depth.div_ceil(512) * width.div_ceil(36),
    }
}

/// Bits that sums of `inputs` products never leave, whatever the codes are: the data types' bound.
pub fn accumulator_of_types(inputs: usize, weight: u32, activation: u32, signed: bool) -> u32 {
    let alpha = (inputs.max(1) as f64).log2() + f64::from(weight + activation) - 1.0 - f64::from(u32::from(signed));
    whole((alpha + (1.0 + (-alpha).exp2()).log2() + 1.0).ceil())
}

/// The same for known codes: `rows` of weights, activations from `low` to `high`. Exact.
pub fn accumulator_of_codes<'a>(rows: impl Iterator<Item = &'a [i64]>, (low, high): (i64, i64)) -> u32 {
    let (mut least, mut most) = (0_i128, 0_i128);
    for row in rows {
        let ends = row
            .iter()
            .map(|&w| (i128::from(w * low).min(i128::from(w * high)), i128::from(w * low).max(i128::from(w * high))));
        let (from, to) = ends.fold((0, 0), |(from, to), (low, high)| (from + low, to + high));
        (least, most) = (least.min(from), most.max(to));
    }
    let largest = (-least).max(most + 1).max(1);
    // ceil(log2(largest)) and the sign.
    let magnitude = i128::BITS - (largest - 1).leading_zeros();
    magnitude + 1
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of bits")]
fn whole(bits: f64) -> u32 {
    bits.clamp(1.0, 128.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn int(bits: u32) -> Format {
        Format::Int { bits }
    }

    #[test]
    fn a_unit_costs_what_the_formula_says() {
        let shape = Shape { inputs: 64, outputs: 32, pixels: 10 };
        let (cost, source) = cost(&shape, Folding { pe: 4, simd: 8 }, (int(8), int(8)), 24);
        // 8 (2 ceil(16 / 6) - 1) 16 = 640, 16 (15) = 240: 300 + 1.1 * 4 * (640 + 240 + 24).
        assert!((cost.lut - (300.0 + 4.4 * 904.0)).abs() < 1e-9 && source == Source::Formula, "{cost:?}");
        assert_eq!((cost.dsp, cost.cycles, cost.weight_bits), (32, 8 * 8 * 10, 64 * 32 * 8));
        // 256 bits wide, 64 deep: ceil(256 / 36) memories.
        assert_eq!(cost.bram, 8);
        assert_eq!(Folding::within(&shape, Folding { pe: 5, simd: 7 }), Folding { pe: 4, simd: 4 });
    }

    #[test]
    fn more_bits_and_more_lanes_never_cost_less() {
        let shape = Shape { inputs: 64, outputs: 32, pixels: 1 };
        let lut = |w: u32, a: u32, pe: usize, simd: usize| {
            cost(&shape, Folding { pe, simd }, (int(w), int(a)), accumulator_of_types(64, w, a, true)).0.lut
        };
        for (w, a) in (2..8).flat_map(|w| (2..8).map(move |a| (w, a))) {
            assert!(lut(w + 1, a, 2, 4) >= lut(w, a, 2, 4) && lut(w, a + 1, 2, 4) >= lut(w, a, 2, 4));
            assert!(lut(w, a, 4, 4) >= lut(w, a, 2, 4) && lut(w, a, 2, 8) >= lut(w, a, 2, 4));
            assert!((lut(w, a, 2, 4) - lut(a, w, 2, 4)).abs() < 1e-9);
        }
    }

    #[test]
    fn sums_never_leave_their_accumulators_and_the_worst_one_fills_it() {
        let rows: [&[i64]; 2] = [&[7, -8, 3], &[-8, -8, -8]];
        // 255 (8 + 8 + 8) = 6120 below: 13 bits and the sign.
        assert_eq!(accumulator_of_codes(rows.into_iter(), (0, 255)), 14);
        assert!(accumulator_of_codes(rows.into_iter(), (0, 255)) <= accumulator_of_types(3, 4, 8, false));
        // -8 * -128 * 2 = 2048 needs 13 bits, -2048 would need 12.
        let pair: [&[i64]; 1] = [&[-8, -8]];
        assert_eq!(accumulator_of_codes(pair.into_iter(), (-128, 127)), 13);
        assert_eq!(accumulator_of_codes(std::iter::empty(), (0, 1)), 1);
    }

    /// Worked by hand from the formulas of FINN-R: bits of both, folding, accumulator, lookup tables.
    #[test]
    fn units_worked_by_hand() {
        let shape = Shape { inputs: 128, outputs: 64, pixels: 49 };
        for (w, a, pe, simd, accumulator, lut) in [
            // 16 (2 · 1 − 1) 4 = 64, 4 · 31 = 124: 300 + 8.8 (64 + 124 + 12).
            (2, 2, 8, 16, 12, 2060.0),
            // 4 (2 · 2 − 1) 12 = 144, 12 · 7 = 84: 300 + 2.2 (144 + 84 + 20).
            (4, 8, 2, 4, 20, 845.6),
            // 1 (2 · 2 − 1) 7 = 21, 7 · 1 = 7: 300 + 1.1 (21 + 7 + 15).
            (3, 4, 1, 1, 15, 347.3),
            // The multiplier of 8 by 8 is (2 · 3 − 1) 16 = 80, 16 · 1 = 16: 300 + 1.1 (80 + 16 + 22).
            (8, 8, 1, 1, 22, 429.8),
        ] {
            let (cost, source) = cost(&shape, Folding { pe, simd }, (int(w), int(a)), accumulator);
            assert!((cost.lut - lut).abs() < 1e-9 && source == Source::Formula, "w{w}a{a}: {cost:?}");
            let folds = (64 / pe * (128 / simd)) as u64;
            assert_eq!((cost.cycles, cost.weight_bits), (49 * folds, 64 * 128 * u64::from(w)), "w{w}a{a}");
            assert!((cost.area_time() - lut * (49 * folds) as f64).abs() < 1e-3, "w{w}a{a}");
        }
        // Weights of 2 bits for 8 by 16 lanes: words of 256 bits, 64 of them.
        assert_eq!(cost(&shape, Folding { pe: 8, simd: 16 }, (int(2), int(2)), 12).0.bram, 8);
        for nothing in [
            Shape { inputs: 0, ..shape.clone() },
            Shape { outputs: 0, ..shape.clone() },
            Shape { pixels: 0, ..shape.clone() },
        ] {
            let folding = Folding::within(&nothing, Folding { pe: 4, simd: 4 });
            assert_eq!(cost(&nothing, folding, (int(8), int(8)), 24).0, Cost::default(), "{nothing:?}");
        }
    }

    /// A memory of 18 kbit is 16384 × 1, 8192 × 2, 4096 × 4, 2048 × 9, 1024 × 18 or 512 × 36: both sides of every border.
    #[test]
    fn memories_are_cut_as_their_width_asks() {
        for (width, depth, count) in [
            (1, 16384, 1),
            (1, 16385, 2),
            (2, 8192, 1),
            (2, 8193, 2),
            (3, 4096, 1),
            (4, 4097, 2),
            (5, 2048, 1),
            (9, 2049, 2),
            (10, 1024, 1),
            (18, 1025, 2),
            (19, 512, 1),
            (36, 512, 1),
            (37, 512, 2),
            (36, 513, 2),
            (37, 1024, 3),
            (0, 9, 0),
            (9, 0, 0),
        ] {
            assert_eq!(brams(width, depth), count, "{width} bits, {depth} deep");
        }
    }

    /// The bound of the types is that of the worst weights, with signed activations to the bit.
    #[test]
    fn bounds_of_types_are_those_of_the_worst_codes() {
        // log2(64) + 8 + 8 − 1 − 1 = 20, and 21.0000014 rounded up.
        assert_eq!(accumulator_of_types(64, 8, 8, true), 22);
        assert_eq!(accumulator_of_types(64, 8, 8, false), 23);
        // 2 + log2(1 + 1/4) + 1 = 3.32: −2 · −2 = 4 needs 4 bits.
        assert_eq!(accumulator_of_types(1, 2, 2, true), 4);
        for (n, w, a) in
            [1_usize, 3, 64, 577].iter().flat_map(|n| (2..9).flat_map(move |w| (2..9).map(move |a| (*n, w, a))))
        {
            let row = vec![-(1_i64 << (w - 1)); n];
            let of = |range| accumulator_of_codes(std::iter::once(&row[..]), range);
            let signed = of((-(1_i64 << (a - 1)), (1 << (a - 1)) - 1));
            assert_eq!(signed, accumulator_of_types(n, w, a, true), "{n} {w} {a}");
            let (unsigned, bound) = (of((0, (1 << a) - 1)), accumulator_of_types(n, w, a, false));
            assert!((unsigned..=unsigned + 1).contains(&bound), "{n} {w} {a}: {unsigned} {bound}");
        }
    }
}
