//! The lookup tables of one multiply-accumulate, by formats: measured where it was, estimated where not, and said which.

use passes::grid::{FloatFormat, Grid};

/// How a figure is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Synthesized.
    Measured,
    /// By a fit through what was synthesized.
    Fitted,
    /// By a published formula.
    Formula,
}

impl Source {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Fitted => "fitted",
            Self::Formula => "formula",
        }
    }
}

/// A number format as hardware multiplies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Two's complement or unsigned integers.
    Int {
        /// Of so many bits.
        bits: u32,
    },
    /// A sign, an exponent and a mantissa; all codes are numbers.
    Float {
        /// Bits of the exponent.
        exponent: u32,
        /// Bits of the mantissa.
        mantissa: u32,
    },
}

impl Format {
    /// That of `grid`; `None` for codebooks, and for formats of fewer than 2 or more than 16 bits.
    pub fn of(grid: &dyn Grid) -> Option<Self> {
        let bits = grid.info().bits;
        if !(2..=16).contains(&bits) {
            return None;
        }
        match grid.float_format() {
            Some(FloatFormat { exponent, mantissa, .. }) => Some(Self::Float { exponent, mantissa }),
            None => grid.info().integer.then_some(Self::Int { bits }),
        }
    }

    /// All of its bits.
    pub fn bits(self) -> u32 {
        match self {
            Self::Int { bits } => bits,
            Self::Float { exponent, mantissa } => 1 + exponent + mantissa,
        }
    }

    /// Exponent and mantissa; integers are floats with one bit of exponent, whose grid is uniform.
    fn fields(self) -> (u32, u32) {
        match self {
            Self::Int { bits } => (1, bits.saturating_sub(2)),
            Self::Float { exponent, mantissa } => (exponent, mantissa),
        }
    }

    fn is_float(self) -> bool {
        matches!(self, Self::Float { .. })
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Int { bits } => write!(f, "int{bits}"),
            Self::Float { exponent, mantissa } => write!(f, "e{exponent}m{mantissa}"),
        }
    }
}

/// One serial multiply-accumulate with an exact accumulator for 1024 terms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mac {
    /// Lookup tables.
    pub lut: f64,
    /// Bits of the accumulator.
    pub accumulator: u32,
    /// How it is known.
    pub source: Source,
}

/// Yosys `synth_xilinx -family xcup -nodsp`: bits or fields of both operands, lookup tables, accumulator bits.
static MEASURED: &[(Format, Format, u32, u32)] = {
    const fn int(bits: u32) -> Format {
        Format::Int { bits }
    }
    const fn float(exponent: u32, mantissa: u32) -> Format {
        Format::Float { exponent, mantissa }
    }
    &[
        (int(3), int(3), 38, 16),
        (int(4), int(4), 59, 18),
        (int(5), int(5), 103, 20),
        (int(6), int(6), 119, 22),
        (int(7), int(7), 160, 24),
        (int(8), int(8), 223, 26),
        (int(4), int(8), 90, 22),
        (int(4), int(6), 73, 20),
        (int(3), int(8), 71, 21),
        (int(2), int(8), 47, 20),
        (int(2), int(2), 29, 14),
        (float(1, 1), float(1, 1), 20, 15),
        (float(2, 0), float(2, 0), 25, 16),
        (float(1, 2), float(1, 2), 27, 17),
        (float(2, 1), float(2, 1), 37, 19),
        (float(3, 0), float(3, 0), 34, 24),
        (float(1, 3), float(1, 3), 42, 19),
        (float(2, 2), float(2, 2), 47, 21),
        (float(3, 1), float(3, 1), 50, 27),
        (float(4, 0), float(4, 0), 65, 40),
        (float(1, 4), float(1, 4), 59, 21),
        (float(2, 3), float(2, 3), 64, 23),
        (float(3, 2), float(3, 2), 63, 29),
        (float(4, 1), float(4, 1), 83, 43),
        (float(5, 0), float(5, 0), 111, 72),
        (float(1, 5), float(1, 5), 82, 23),
        (float(2, 4), float(2, 4), 90, 25),
        (float(3, 3), float(3, 3), 88, 31),
        (float(4, 2), float(4, 2), 104, 45),
        (float(5, 1), float(5, 1), 146, 75),
        (float(1, 6), float(1, 6), 114, 25),
        (float(2, 5), float(2, 5), 109, 27),
        (float(3, 4), float(3, 4), 115, 33),
        (float(4, 3), float(4, 3), 116, 47),
        (float(5, 2), float(5, 2), 156, 77),
        (float(2, 1), float(4, 3), 72, 33),
        (float(2, 1), float(3, 2), 50, 24),
        (float(2, 1), float(2, 3), 47, 21),
        (float(2, 1), float(3, 4), 57, 26),
        (float(2, 0), float(3, 4), 48, 24),
    ]
};

/// Terms that the accumulator adds without overflow, as a power of two.
const TERMS_LOG2: u32 = 10;

/// Every row of the measured table.
pub fn measured() -> impl Iterator<Item = (Format, Format, Mac)> {
    MEASURED
        .iter()
        .map(|&(a, b, lut, accumulator)| (a, b, Mac { lut: f64::from(lut), accumulator, source: Source::Measured }))
}

/// The multiply-accumulate of `a` and `b`, in either order.
pub fn mac(a: Format, b: Format) -> Mac {
    let same = |(x, y, _): &(Format, Format, Mac)| (*x, *y) == (a, b) || (*x, *y) == (b, a);
    if let Some((_, _, mac)) = measured().find(same) {
        return mac;
    }
    if !a.is_float() && !b.is_float() {
        // Least squares of relative errors over the eleven integer rows: 5 % on average, 19 % at most.
        let product = f64::from(a.bits() * b.bits());
        let lut = 35.08 + 4.185 * product - 5.667 * f64::from(a.bits() + b.bits());
        return Mac { lut, accumulator: a.bits() + b.bits() + TERMS_LOG2, source: Source::Fitted };
    }
    let fixed = fixed_bits(a, b);
    let accumulator = fixed + 1 + TERMS_LOG2;
    let (significands, positions) = shifts(a, b);
    let depth = f64::from(significands.min(positions)).log2();
    let ((_, ma), (_, mb)) = (a.fields(), b.fields());
    // Through the minifloat rows: 7 % on average, 29 % at most, where formats are tiny.
    let lut =
        -1.7 + 1.27 * f64::from(accumulator) + 1.67 * f64::from((ma + 1) * (mb + 1)) + 0.33 * f64::from(fixed) * depth;
    Mac { lut, accumulator, source: Source::Fitted }
}

/// Magnitude bits of an exact product in fixed point.
fn fixed_bits(a: Format, b: Format) -> u32 {
    let ((ea, ma), (eb, mb)) = (a.fields(), b.fields());
    let significand = |mantissa: u32| (1_u64 << (mantissa + 1)) - 1;
    let product = significand(ma) * significand(mb);
    (u64::BITS - product.leading_zeros()) + range(ea) + range(eb)
}

/// By how many places the exponent shifts at most.
fn range(exponent: u32) -> u32 {
    (1_u32 << exponent.min(16)).saturating_sub(2)
}

/// Bits of a product of significands, and positions that it may stand in.
fn shifts(a: Format, b: Format) -> (u32, u32) {
    let ((ea, ma), (eb, mb)) = (a.fields(), b.fields());
    (ma + mb + 2, range(ea) + range(eb) + 1)
}

/// What a minifloat costs over the integer of as many bits, inside the band that TCAD 2024 publishes (+20 % to +180 %).
pub fn ratio(format: Format) -> f64 {
    match format {
        Format::Int { .. } | Format::Float { exponent: 0 | 1, .. } => 1.0,
        Format::Float { exponent: 2, .. } => 1.2,
        Format::Float { exponent: 3, .. } => 1.5,
        Format::Float { exponent: 4, .. } => 2.2,
        Format::Float { .. } => 2.8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_rows_are_reproduced_in_both_orders() {
        for (a, b, row) in measured() {
            assert_eq!(mac(a, b), row, "{a} x {b}");
            assert_eq!(mac(b, a), row, "{b} x {a}");
        }
    }

    /// The exact width of the table's accumulators follows from the formats.
    #[test]
    fn accumulators_are_exact() {
        for (a, b, row) in measured() {
            let want = match (a, b) {
                (Format::Int { bits: x }, Format::Int { bits: y }) => x + y + TERMS_LOG2,
                _ => fixed_bits(a, b) + 1 + TERMS_LOG2,
            };
            // Where both have no fraction, the top product needs a bit less than the formula says.
            assert!(row.accumulator.abs_diff(want) <= 1, "{a} x {b}: {} and {want}", row.accumulator);
        }
    }

    #[test]
    fn fits_are_near_what_was_measured() {
        let mut worst = 0.0_f64;
        for (a, b, row) in measured().filter(|(a, b, _)| a.is_float() || b.is_float()) {
            let fixed = fixed_bits(a, b);
            let (significands, positions) = shifts(a, b);
            let ((_, ma), (_, mb)) = (a.fields(), b.fields());
            let lut = -1.7
                + 1.27 * f64::from(fixed + 11)
                + 1.67 * f64::from((ma + 1) * (mb + 1))
                + 0.33 * f64::from(fixed) * f64::from(significands.min(positions)).log2();
            worst = worst.max((lut / row.lut - 1.0).abs());
        }
        assert!(worst < 0.3, "{worst}");
    }

    /// Every pair of minifloats with tiny fields sums exactly in the fixed point that is counted, checked against whole numbers.
    #[test]
    fn fixed_point_holds_every_product() {
        let formats =
            [(2, 1), (3, 2), (4, 3), (2, 3), (5, 2)].map(|(exponent, mantissa)| Format::Float { exponent, mantissa });
        for (a, b) in formats.into_iter().flat_map(|a| formats.map(|b| (a, b))) {
            let largest = |format: Format| {
                let (exponent, mantissa) = format.fields();
                // In units of the smallest number: (2^(M+1) - 1) 2^(2^E - 2).
                f64::from((1_u32 << (mantissa + 1)) - 1).log2() + f64::from(range(exponent))
            };
            let bits = largest(a) + largest(b);
            assert!(bits <= f64::from(fixed_bits(a, b)), "{a} x {b}: {bits}");
            assert!(bits > f64::from(fixed_bits(a, b)) - 1.001, "{a} x {b} wastes bits: {bits}");
        }
    }
}
