//! Choosing one point per row so that costs and losses, which add up, are well spent.

/// What the choices of one row cost, and what they lose: (cost, loss), costs ascending.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row(pub(super) Vec<(f64, f64)>);

/// Where to stop.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Limits {
    /// The most that all rows together may cost.
    pub(super) cost: Option<f64>,
    /// No more is spent once all rows together lose no more than this.
    pub(super) loss: Option<f64>,
    /// The choice that rows take which lose nothing that could be measured, as far as the cost allows.
    pub(super) usual: usize,
}

/// A step of one row along its hull.
struct Step {
    row: usize,
    to: usize,
    cost: f64,
    gain: f64,
}

/// The choice of every row. All start with the cheapest; steps along the lower convex hulls follow in the order of loss saved per
/// cost, to the first that does not fit. So a higher limit takes every step that a lower one takes.
///
/// # Errors
/// The least that all rows together cost, when that is over the limit.
pub(super) fn allocate(rows: &[Row], limits: Limits) -> Result<Vec<usize>, f64> {
    let mut steps: Vec<Step> = Vec::new();
    for (row, points) in rows.iter().enumerate() {
        let hull = lower_hull(&points.0);
        steps.extend(hull.windows(2).map(|pair| {
            let (from, to) = (points.0[pair[0]], points.0[pair[1]]);
            Step { row, to: pair[1], cost: to.0 - from.0, gain: from.1 - to.1 }
        }));
    }
    // Along a hull gains per cost fall, and the sort is stable: no row takes its second step before its first.
    steps.sort_by(|a, b| (b.gain / b.cost).total_cmp(&(a.gain / a.cost)));
    let mut chosen = vec![0; rows.len()];
    let mut cost: f64 = rows.iter().map(|row| row.0[0].0).sum();
    let mut loss: f64 = rows.iter().map(|row| row.0[0].1).sum();
    let most = limits.cost.unwrap_or(f64::INFINITY) * (1.0 + 1e-12);
    if cost > most {
        return Err(cost);
    }
    for step in steps {
        if limits.loss.is_some_and(|enough| loss <= enough) || cost + step.cost > most {
            break;
        }
        chosen[step.row] = step.to;
        cost += step.cost;
        loss -= step.gain;
    }
    for (choice, row) in chosen.iter_mut().zip(rows) {
        let usual = limits.usual.min(row.0.len() - 1);
        let more = row.0[usual].0 - row.0[*choice].0;
        let idle = row.0[0].1 <= 0.0;
        if idle && *choice < usual && limits.loss.is_none() && cost + more <= most {
            *choice = usual;
            cost += more;
        }
    }
    Ok(chosen)
}

/// The points of the lower convex hull from the cheapest to the one that loses least; every step costs and gains something.
fn lower_hull(points: &[(f64, f64)]) -> Vec<usize> {
    let slope = |a: usize, b: usize| (points[b].1 - points[a].1) / (points[b].0 - points[a].0);
    let mut hull: Vec<usize> = vec![0];
    for next in 1..points.len() {
        let last = hull[hull.len() - 1];
        if points[next].1 >= points[last].1 || points[next].0 <= points[last].0 {
            continue;
        }
        while hull.len() > 1 && slope(hull[hull.len() - 1], next) <= slope(hull[hull.len() - 2], hull[hull.len() - 1]) {
            hull.pop();
        }
        hull.push(next);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    fn rows() -> Vec<Row> {
        vec![
            Row(vec![(2.0, 9.0), (4.0, 1.0), (8.0, 0.0)]),
            Row(vec![(2.0, 0.5), (4.0, 0.4), (8.0, 0.3)]),
            Row(vec![(20.0, 9.0), (40.0, 8.9), (80.0, 0.0)]),
        ]
    }

    fn spent(chosen: &[usize]) -> (f64, f64) {
        let points = || rows().into_iter().zip(chosen).map(|(row, &at)| row.0[at]);
        (points().map(|p| p.0).sum(), points().map(|p| p.1).sum())
    }

    #[test]
    fn points_above_the_hull_are_never_taken() {
        assert_eq!(lower_hull(&rows()[2].0), [0, 2]);
        assert_eq!(lower_hull(&[(1.0, 1.0), (2.0, 1.0), (3.0, 2.0)]), [0]);
    }

    #[test]
    fn budgets_hold_and_more_never_loses_more() {
        let mut last = f64::INFINITY;
        for budget in 24..=96 {
            let limits = Limits { cost: Some(f64::from(budget)), ..Limits::default() };
            let (cost, loss) = spent(&allocate(&rows(), limits).unwrap());
            assert!(cost <= f64::from(budget) && loss <= last, "{budget}: {cost} {loss}");
            last = loss;
        }
        assert!(last < 0.31);
        let too_little = Limits { cost: Some(23.0), ..Limits::default() };
        assert_eq!(allocate(&rows(), too_little), Err(24.0));
    }

    #[test]
    fn rows_that_lose_nothing_keep_the_usual_choice_where_it_fits() {
        let idle = vec![Row(vec![(4.0, 0.0), (8.0, 0.0)]), Row(vec![(4.0, 1.0), (8.0, 0.1)])];
        let within = |cost: f64| allocate(&idle, Limits { cost: Some(cost), loss: None, usual: 1 }).unwrap();
        assert_eq!((within(16.0), within(12.0), within(8.0)), (vec![1, 1], vec![0, 1], vec![0, 0]));
    }

    #[test]
    fn spending_stops_when_little_is_lost() {
        let limits = Limits { loss: Some(10.5), ..Limits::default() };
        assert_eq!(spent(&allocate(&rows(), limits).unwrap()), (26.0, 10.5));
    }

    /// Rows whose costs ascend and whose losses fall, stay, or are nothing at all.
    fn drawn(seed: u64) -> Vec<Row> {
        let row = |row: u64| {
            let random = |at: u64| uniform(seed << 32 | row << 16 | at);
            let mut point = (0.0, if random(0) < 0.3 { 0.0 } else { 10.0 * random(1) });
            let next = |i: u64| {
                let kept = if random(3 * i + 5) < 0.3 { 1.0 } else { random(3 * i + 4) };
                point = (point.0 + (1.0 + 9.0 * random(3 * i + 3)).floor(), point.1 * kept);
                point
            };
            Row((0..=mixed(seed ^ row << 8) % 5).map(next).collect())
        };
        (0..=mixed(seed) % 6).map(row).collect()
    }

    #[test]
    fn whatever_the_rows_budgets_hold_and_more_never_loses_more() {
        for seed in 0..100 {
            let rows = drawn(seed);
            let least: f64 = rows.iter().map(|row| row.0[0].0).sum();
            let most: f64 = rows.iter().map(|row| row.0[row.0.len() - 1].0).sum();
            for usual in 0..6 {
                let mut last = f64::INFINITY;
                for step in 0..=20 {
                    let budget = least + (most - least) * f64::from(step) / 20.0;
                    let chosen = allocate(&rows, Limits { cost: Some(budget), loss: None, usual }).unwrap();
                    let points = || rows.iter().zip(&chosen).map(|(row, &at)| row.0[at]);
                    let (cost, loss): (f64, f64) = (points().map(|p| p.0).sum(), points().map(|p| p.1).sum());
                    assert!(cost <= budget * (1.0 + 1e-9), "{seed}: {cost} over {budget} for {rows:?}");
                    assert!(loss <= last + 1e-9, "{seed}: {loss} after {last} within {budget} for {rows:?}");
                    last = loss;
                }
            }
            assert_eq!(allocate(&rows, Limits { cost: Some(least - 1.0), ..Limits::default() }), Err(least));
        }
    }
}
