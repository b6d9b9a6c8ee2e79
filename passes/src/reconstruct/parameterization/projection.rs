//! Gradients of a matrix in the subspace where most of them lie.

use crate::encoding::Encoding;
use crate::grad::gemm::{Matrix, multiply};
use crate::grid;
use crate::reconstruct::ledger::Ledger;
use crate::seed;
use crate::tensor::Tensor;

/// Steps between two bases, at first.
const GAP: u32 = 25;
/// So many bases in a row that hardly turned, in the mean of the share that both have in common, double the gap.
const PATIENCE: usize = 5;
const ALIKE: f32 = 0.4;
/// Products with the gradient, there and back, that find a basis.
const ROUNDS: usize = 3;

/// Orthonormal vectors along the smaller side of a matrix of `rows` × `columns`, kept in 4 bits with a scale each: those along which the
/// gradient was largest when they were found.
///
/// Source: Zhang et al. 2024 (Q-GaLore), arXiv:2407.08296, section 3; the share that two subspaces have in common, ‖P Qᵀ‖² / rank, which does
/// not depend on signs and order of the vectors, instead of the cosine of the first ones, and iterated subspaces instead of a
/// decomposition, ours.
#[derive(Debug)]
pub(super) struct Projection {
    rows: usize,
    columns: usize,
    rank: usize,
    seed: u64,
    /// \[rank, smaller side\]; `None` before the first gradient.
    basis: Option<(Encoding, Tensor)>,
    gap: u32,
    /// Steps since the basis was found.
    age: u32,
    /// What the last bases had in common with those before.
    common: Vec<f32>,
}

impl Projection {
    /// Without a basis; `rank` is no larger than either side.
    pub(super) fn new((rows, columns): (usize, usize), rank: usize, seed: u64) -> Self {
        Self { rows, columns, rank, seed, basis: None, gap: GAP, age: 0, common: Vec::new() }
    }

    /// Shows what steps change.
    pub(super) fn show(&mut self, ledger: &mut Ledger<'_>) {
        if let Ledger::Count(bytes) = ledger {
            // As many as there ever are: the first gradient finds a basis, and each further one adds to what bases have in common.
            let lists = 4 * PATIENCE + 4 * self.rank + (self.rank * self.side()).div_ceil(2);
            *bytes += 5 * 8 + lists as u64;
            return;
        }
        let (mut gap, mut age) = (u64::from(self.gap), u64::from(self.age));
        [&mut gap, &mut age].into_iter().for_each(|number| ledger.whole(number));
        (self.gap, self.age) = (u32::try_from(gap).unwrap_or(u32::MAX), u32::try_from(age).unwrap_or(u32::MAX));
        let mut common = self.common.iter().flat_map(|share| share.to_le_bytes()).collect();
        ledger.bytes(&mut common);
        self.common = common.as_chunks::<4>().0.iter().map(|share| f32::from_le_bytes(*share)).collect();
        let scales = |(encoding, _): &(Encoding, Tensor)| encoding.scale.iter().flat_map(|s| s.to_le_bytes()).collect();
        let mut scales = self.basis.as_ref().map(scales).unwrap_or_default();
        let mut codes = self.basis.as_ref().map(|(_, codes)| codes.bytes().to_vec()).unwrap_or_default();
        [&mut scales, &mut codes].into_iter().for_each(|bytes| ledger.bytes(bytes));
        if let Ledger::Read(rest) = ledger {
            let is_found = !scales.is_empty() || !codes.is_empty();
            self.basis = is_found.then(|| put_back(&scales, codes, self.rank, self.side())).flatten();
            if is_found && self.basis.is_none() {
                *rest = None;
            }
        }
    }

    /// How many numbers a gradient is in the subspace.
    pub(super) fn len(&self) -> usize {
        self.rank * self.rows.max(self.columns)
    }

    fn side(&self) -> usize {
        self.rows.min(self.columns)
    }

    /// `gradient` with the smaller side as columns.
    fn upright<'a>(&self, gradient: &'a [f32]) -> Matrix<'a, f32> {
        let gradient = Matrix::new(gradient, self.rows, self.columns);
        if self.rows >= self.columns { gradient } else { gradient.t() }
    }

    /// `gradient` in the subspace, \[larger side, rank\]. The basis is found anew where it is old.
    pub(super) fn down(&mut self, gradient: &[f32]) -> Vec<f32> {
        if self.basis.is_none() || self.age >= self.gap {
            self.refresh(gradient);
        }
        self.age += 1;
        let mut low = vec![0.0; self.len()];
        multiply(&mut low, self.upright(gradient), Matrix::new(&self.decoded(), self.rank, self.side()).t(), false);
        low
    }

    /// The matrix, \[rows, columns\], that `low` is in the subspace.
    pub(super) fn up(&self, low: &[f32]) -> Vec<f32> {
        let basis = self.decoded();
        let low = Matrix::new(low, self.rows.max(self.columns), self.rank);
        let basis = Matrix::new(&basis, self.rank, self.side());
        let mut matrix = vec![0.0; self.rows * self.columns];
        if self.rows >= self.columns {
            multiply(&mut matrix, low, basis, false);
        } else {
            multiply(&mut matrix, basis.t(), low.t(), false);
        }
        matrix
    }

    /// The vectors, as their codes have them; zeros where there are none.
    fn decoded(&self) -> Vec<f32> {
        let decoded = self.basis.as_ref().and_then(|(encoding, codes)| encoding.decode(codes).ok());
        decoded.unwrap_or_else(|| vec![0.0; self.rank * self.side()])
    }

    fn refresh(&mut self, gradient: &[f32]) {
        let old = self.basis.is_some().then(|| self.decoded());
        let new = self.subspace(gradient, old.as_deref());
        if let Some(old) = old {
            self.common.push(common(&old, &new, self.rank, self.side()));
            let last = &self.common[self.common.len().saturating_sub(PATIENCE)..];
            if last.len() == PATIENCE && last.iter().sum::<f32>() / PATIENCE as f32 >= ALIKE {
                self.gap = self.gap.saturating_mul(2);
            }
            self.common.drain(..self.common.len().saturating_sub(PATIENCE));
        }
        self.basis = in_four_bits(&new, self.rank, self.side());
        self.age = 0;
    }

    /// Orthonormal vectors, \[rank, smaller side\], near to those along which `gradient` is largest, from `start` on.
    fn subspace(&self, gradient: &[f32], start: Option<&[f32]>) -> Vec<f32> {
        let (rank, side, larger) = (self.rank, self.side(), self.rows.max(self.columns));
        let drawn = || (0..rank * side).map(|i| draw(self.seed, i)).collect();
        let mut vectors = start.map_or_else(drawn, <[f32]>::to_vec);
        orthonormalize(&mut vectors, side, self.seed);
        let mut low = vec![0.0; rank * larger];
        for _ in 0..ROUNDS {
            multiply(&mut low, self.upright(gradient), Matrix::new(&vectors, rank, side).t(), false);
            if !scale_to_one(&mut low) {
                break; // nothing to follow
            }
            multiply(&mut vectors, Matrix::new(&low, larger, rank).t(), self.upright(gradient), false);
            scale_to_one(&mut vectors);
            orthonormalize(&mut vectors, side, self.seed);
        }
        vectors
    }

    /// What it takes.
    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        self.basis.as_ref().map_or(0, |(encoding, codes)| codes.bytes().len() + 8 * encoding.scale.len())
    }
}

/// Divides `values` by the largest magnitude among them, so that their squares can be summed; `false` where there is none.
fn scale_to_one(values: &mut [f32]) -> bool {
    let largest = values.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
    let is_usable = largest.is_normal();
    if is_usable {
        values.iter_mut().for_each(|v| *v /= largest);
    }
    is_usable
}

/// A number between −1 and 1.
#[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
fn draw(seed: u64, i: usize) -> f32 {
    (2.0 * seed::uniform(seed::mixed(seed) ^ i as u64) - 1.0) as f32
}

/// The encoding and the codes of `vectors`, a scale each.
fn in_four_bits(vectors: &[f32], rank: usize, side: usize) -> Option<(Encoding, Tensor)> {
    let integers = grid::find("int4")?;
    let scale = |vector: &[f32]| vector.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs() / 7.0));
    let encoding = Encoding::per_axis(integers, 0, vectors.chunks(side.max(1)).map(scale).collect());
    let codes = encoding.encode(vectors, &[rank, side]).ok()?;
    Some((encoding, codes))
}

/// What [`in_four_bits`] made, from the bytes of scales and codes; `None` where they are not of that size.
fn put_back(scales: &[u8], codes: Vec<u8>, rank: usize, side: usize) -> Option<(Encoding, Tensor)> {
    let (scales, []) = scales.as_chunks::<4>() else { return None };
    let scales: Vec<f32> = scales.iter().map(|scale| f32::from_le_bytes(*scale)).collect();
    let (_, like) = in_four_bits(&vec![0.0; rank * side], rank, side)?;
    let codes = Tensor::new(like.dtype(), vec![rank, side], codes.into()).ok()?;
    (scales.len() == rank).then(|| Some((Encoding::per_axis(grid::find("int4")?, 0, scales), codes)))?
}

/// ‖P Qᵀ‖² / rank: 1 for the same subspace, and near to rank / side for two that have nothing to do with each other.
fn common(p: &[f32], q: &[f32], rank: usize, side: usize) -> f32 {
    let mut products = vec![0.0; rank * rank];
    multiply(&mut products, Matrix::new(p, rank, side), Matrix::new(q, rank, side).t(), false);
    products.iter().map(|product| product * product).sum::<f32>() / rank.max(1) as f32
}

/// Makes `vectors`, each of `side` numbers, orthonormal one after the other, twice each; what depends on those before is drawn anew.
///
/// Source: Giraud et al. 2005, "The loss of orthogonality in the Gram-Schmidt orthogonalization process": twice is enough.
fn orthonormalize(vectors: &mut [f32], side: usize, seed: u64) {
    for k in 0..vectors.len() / side.max(1) {
        let (done, rest) = vectors.split_at_mut(k * side);
        let vector = &mut rest[..side];
        for attempt in 0..=side {
            let before = norm(vector);
            (0..2).for_each(|_| without(vector, done, k));
            let after = norm(vector);
            if after > 1e-4 * before && after.is_normal() {
                vector.iter_mut().for_each(|v| *v /= after);
                break;
            }
            let at = seed::mixed(seed ^ (k as u64) << 32 ^ attempt as u64);
            vector.iter_mut().enumerate().for_each(|(i, v)| *v = draw(at, i));
        }
    }
}

/// Takes off `vector` what it has in common with the `k` orthonormal vectors `done`.
fn without(vector: &mut [f32], done: &[f32], k: usize) {
    let side = vector.len();
    let mut shares = vec![0.0; k];
    multiply(&mut shares, Matrix::new(vector, 1, side), Matrix::new(done, k, side).t(), false);
    shares.iter_mut().for_each(|share| *share = -*share);
    multiply(vector, Matrix::new(&shares, 1, k), Matrix::new(done, k, side), true);
}

fn norm(vector: &[f32]) -> f32 {
    vector.iter().map(|v| v * v).sum::<f32>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How far P Pᵀ is from the identity, at most.
    fn away(vectors: &[f32], rank: usize, side: usize) -> f32 {
        let mut products = vec![0.0; rank * rank];
        multiply(&mut products, Matrix::new(vectors, rank, side), Matrix::new(vectors, rank, side).t(), false);
        (0..rank).for_each(|k| products[k * rank + k] -= 1.0);
        products.iter().fold(0.0, |most, v| most.max(v.abs()))
    }

    /// A matrix of rank `of` and size `rows` × `columns`, times `size`.
    fn of_rank(of: usize, (rows, columns): (usize, usize), size: f32) -> Vec<f32> {
        let draws = |n: usize, seed: u64| (0..n).map(|i| draw(seed, i)).collect::<Vec<f32>>();
        let mut matrix = vec![0.0; rows * columns];
        let (left, right) = (draws(rows * of, 1), draws(of * columns, 2));
        multiply(&mut matrix, Matrix::new(&left, rows, of), Matrix::new(&right, of, columns), false);
        matrix.iter_mut().for_each(|v| *v *= size);
        matrix
    }

    #[test]
    fn vectors_are_orthonormal_before_they_are_rounded_and_nearly_so_after() {
        for sides in [(300, 256), (256, 300), (256, 256)] {
            for gradient in [of_rank(256, sides, 1.0), of_rank(3, sides, 1e-20), vec![0.0; sides.0 * sides.1]] {
                let projection = Projection::new(sides, 32, 7);
                let vectors = projection.subspace(&gradient, None);
                assert!(away(&vectors, 32, 256) < 1e-5, "{sides:?}: {}", away(&vectors, 32, 256));
                let (encoding, codes) = in_four_bits(&vectors, 32, 256).unwrap();
                let rounded = encoding.decode(&codes).unwrap();
                assert!(away(&rounded, 32, 256) < 0.08, "{sides:?}: {}", away(&rounded, 32, 256));
            }
        }
    }

    #[test]
    fn a_basis_that_does_not_fit_is_told() {
        let state = |rank: usize| {
            let mut projection = Projection::new((96, 64), rank, 7);
            projection.down(&of_rank(4, (96, 64), 1.0));
            let mut out = Ledger::Write(Vec::new());
            projection.show(&mut out);
            let Ledger::Write(state) = out else { panic!("{out:?}") };
            state
        };
        let fits = |state: &[u8]| {
            let mut back = Ledger::Read(Some(state));
            let mut projection = Projection::new((96, 64), 16, 7);
            projection.show(&mut back);
            matches!(back, Ledger::Read(Some([]))) && projection.basis.is_some()
        };
        assert!(fits(&state(16)));
        assert!(!fits(&state(15)), "another rank");
        // Neither bases before nor scales, and codes of nine bytes.
        let codes = [0_u64, 0, 0, 0, 9, 0].into_iter().flat_map(u64::to_le_bytes).chain([0]);
        assert!(!fits(&codes.collect::<Vec<u8>>()), "codes without scales");
    }

    /// What lies in the subspace comes back out of it, but for what 4 bits lose.
    #[test]
    fn gradients_of_low_rank_survive() {
        for (sides, size) in [((96, 64), 1e-3), ((64, 96), 1e-3), ((64, 96), 1e-30)] {
            let gradient = of_rank(4, sides, size);
            let mut projection = Projection::new(sides, 16, 7);
            let low = projection.down(&gradient);
            assert_eq!(low.len(), 16 * 96);
            let back = projection.up(&low);
            let error: Vec<f32> = back.iter().zip(&gradient).map(|(a, b)| a - b).collect();
            let [lost, all] =
                [error, gradient].map(|values| norm(&values.iter().map(|v| v / size).collect::<Vec<_>>()));
            assert!(lost < 0.25 * all, "{sides:?} {size}: {lost} of {all}");
        }
    }

    /// A gradient that keeps its direction is asked less and less often, one that turns every time is not.
    #[test]
    fn bases_are_found_anew_as_long_as_they_turn() {
        let sides = (96, 64);
        let gaps = |gradient: &dyn Fn(usize) -> Vec<f32>| {
            let mut projection = Projection::new(sides, 8, 7);
            let mut found = 0;
            for step in 0..400 {
                assert_eq!(projection.down(&gradient(step)).len(), 8 * 96);
                found += usize::from(projection.age == 1);
            }
            (projection.gap, found)
        };
        let steady = of_rank(8, sides, 1.0);
        let (gap, found) = gaps(&|_| steady.clone());
        assert!(gap >= 4 * GAP && found <= 400 / GAP as usize - 4, "{gap} {found}");
        let turning =
            |step: usize| (0..96 * 64).map(|i| draw(step as u64 / u64::from(GAP) + 100, i)).collect::<Vec<f32>>();
        assert_eq!(gaps(&turning), (GAP, 400 / GAP as usize));
    }
}
