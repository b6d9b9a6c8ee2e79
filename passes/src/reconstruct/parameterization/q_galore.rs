//! The weight itself in 8 bits, with the moments of gradients in a subspace.

use super::bytes::Bytes;
use super::chance::Chance;
use super::projection::Projection;
use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;

static ABOUT: About = About {
    name: "q-galore",
    doc: "As latent, in a third of the memory: w in 8-bit codes around the points that were chosen, into which steps are rounded by \
          chance, and Adam's moments of the gradient in a subspace of a quarter of the smaller side, whose basis is kept in 4 bits and \
          found anew as long as it turns. Weights with a side of less than 4, vectors among them, keep all moments.",
    source: "Zhang et al. 2024 (Q-GaLore), arXiv:2407.08296, section 3; moments in f32, and codes around points, ours",
};

/// The size of the first steps, in grid steps.
const RATE: f32 = 1e-3;
/// The rank, as a share of the smaller side; weights with a smaller side than that keep all moments.
const SHARE: usize = 4;
/// The size of steps in the subspace: √[`SHARE`], so that a weight moves as far as without one.
const SCALE: f32 = 2.0;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct QGalore;

/// What the optimizer keeps.
#[derive(Debug)]
enum Moments {
    Whole(Adam),
    Within(Projection, Adam),
}

#[derive(Debug)]
struct Lean {
    /// How far every weight is from its point, in gaps to its neighbor.
    offsets: Bytes,
    moments: Moments,
    chance: Chance,
}

impl Lean {
    fn new(weight: &Weight, seed: u64) -> Self {
        let reached = weight.within_reach();
        let offset = |(i, w): (usize, f32)| (w - weight.points[i]) / gap(weight, i);
        let (rows, columns) = (weight.rows, weight.points.len() / weight.rows);
        let moments = match rows.min(columns) / SHARE {
            0 => Moments::Whole(Adam::new(weight.points.len())),
            rank => {
                let projection = Projection::new((rows, columns), rank, seed);
                let adam = Adam::new(projection.len());
                Moments::Within(projection, adam)
            }
        };
        Self { offsets: Bytes::of(reached.into_iter().enumerate().map(offset)), moments, chance: Chance::new(seed) }
    }
}

/// From the point of element `i` to its neighbor.
fn gap(weight: &Weight, i: usize) -> f32 {
    weight.neighbor(i) - weight.points[i]
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for QGalore {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// A byte, two moments for a quarter of the elements, and of square matrices an eighth of a byte for the basis. Where a side has fewer
    /// than 4 it is 9: such weights are small.
    fn bytes_per_weight(&self) -> u64 {
        4
    }

    fn start(&self, weight: &Weight, seed: u64) -> Box<dyn Learned> {
        Box::new(Lean::new(weight, seed))
    }
}

impl Learned for Lean {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.hard(weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, weight: &Weight) {
        let rate = RATE * rate * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        let mut moved = match &mut self.moments {
            Moments::Whole(adam) => {
                let mut moved = vec![0.0; gradient.len()];
                adam.step(&mut moved, gradient, rate);
                moved
            }
            Moments::Within(projection, adam) => {
                let low = projection.down(gradient);
                let mut moved = vec![0.0; low.len()];
                adam.step(&mut moved, &low, SCALE * rate);
                projection.up(&moved)
            }
        };
        moved.iter_mut().enumerate().for_each(|(i, moved)| *moved /= gap(weight, i));
        self.chance.advance();
        self.offsets.add(&moved, &self.chance);
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        self.offsets.show(ledger);
        self.chance.show(ledger);
        match &mut self.moments {
            Moments::Whole(adam) => adam.show(ledger),
            Moments::Within(projection, adam) => {
                projection.show(ledger);
                adam.show(ledger);
            }
        }
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        let latent = |(i, offset)| weight.points[i] + offset * gap(weight, i);
        weight.rounded(&self.offsets.values().enumerate().map(latent).collect::<Vec<f32>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::Encoding;
    use crate::tensor::Tensor;

    /// A weight on 8-bit integers.
    fn weight(rows: u16, columns: u16) -> Weight {
        let n = rows * columns;
        let float: Vec<f32> = (0..n).map(|i| (f32::from(i) * 0.7).sin()).collect();
        let encoding = Encoding::per_tensor(crate::grid::find("int8").unwrap(), 0.05, 0);
        let shape = [usize::from(rows), usize::from(columns)];
        let codes = encoding.encode(&float, &shape).unwrap();
        Weight::new(&Tensor::of(shape, float), &encoding, &codes).unwrap()
    }

    /// Points that lie off those of `weight` by a matrix of rank one.
    fn target(weight: &Weight) -> Vec<f32> {
        let columns = weight.points.len() / weight.rows;
        let part = |i: usize| (i as f32 * 0.9).cos() + 0.2;
        let off = |i: usize| (6.0 * part(i / columns) * part(i % columns)).round();
        weight.points.iter().enumerate().map(|(i, point)| point + off(i)).collect()
    }

    /// Half of the squares of what is missing after 300 steps, over that at the start; and the points.
    fn descended(weight: &Weight, seed: u64) -> (f32, Vec<f32>) {
        let target = target(weight);
        let mut learned = Lean::new(weight, seed);
        let loss = |units: &[f32]| units.iter().zip(&target).map(|(u, t)| (u - t).powi(2)).sum::<f32>();
        let start = loss(&learned.soft(0.0, weight));
        for step in 0..300_u16 {
            let progress = f32::from(step) / 300.0;
            let units = learned.soft(progress, weight);
            let gradient: Vec<f32> = units.iter().zip(&target).map(|(u, t)| u - t).collect();
            learned.step(&gradient, progress, 60.0, weight);
        }
        let points = learned.hard(weight);
        (loss(&points) / start, points)
    }

    #[test]
    fn a_quadratic_loss_falls_whatever_the_shape() {
        for (rows, columns) in [(64, 48), (48, 64), (40, 40), (8, 100), (3, 50), (1, 60), (60, 1)] {
            let weight = weight(rows, columns);
            let (left, points) = descended(&weight, 7);
            assert!(left < 0.25, "{rows} × {columns}: {left} of the loss is left");
            assert_eq!(points, weight.rounded(&points));
            assert_eq!(descended(&weight, 7).1, points, "the same seed");
        }
    }

    /// What is said of memory holds for every matrix whose moments are projected.
    #[test]
    fn memory_is_what_is_said() {
        let said = QGalore.bytes_per_weight() as f64;
        for (rows, columns) in [(128, 128), (256, 64), (64, 256), (16, 144), (9, 64), (4, 200)] {
            let weight = weight(rows, columns);
            let mut learned = Lean::new(&weight, 7);
            learned.step(&weight.points, 0.0, 1.0, &weight);
            let Moments::Within(projection, adam) = &learned.moments else { panic!("{rows} × {columns}") };
            let bytes = learned.offsets.size() + projection.size() + adam.size();
            let each = bytes as f64 / f64::from(rows * columns);
            assert!(each <= said, "{rows} × {columns}: {each} bytes");
        }
        let vector = Lean::new(&weight(1, 300), 7);
        assert!(matches!(&vector.moments, Moments::Whole(adam) if adam.size() == 2400), "{vector:?}");
    }
}
