//! Random numbers that are the same in every run: from what they are for, not from when they are asked for.

/// A number that looks random, from `x`: the output function of `SplitMix64`.
///
/// Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
pub fn mixed(x: u64) -> u64 {
    let z = x.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number in \[0, 1) from `x`.
pub fn uniform(x: u64) -> f64 {
    (mixed(x) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spread_evenly() {
        let n = 4000_u64;
        let below = (0..n).filter(|&x| uniform(x) < 0.25).count();
        // A quarter, within four standard deviations of √(0.25 · 0.75 · 4000) = 27.
        assert!(below.abs_diff(1000) < 110, "{below}");
        assert!((0..n).all(|x| (0.0..1.0).contains(&uniform(x))));
    }
}
