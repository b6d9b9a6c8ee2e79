//! Accuracy over cost, for every pair of formats: what is worth building.

use std::path::Path;

use plotters::prelude::*;

/// One pair of formats.
#[derive(Clone, Debug)]
pub struct Point {
    /// As `--scheme` takes it.
    pub scheme: String,
    /// Whether its numbers are small floats.
    pub float: bool,
    /// Lookup tables of all layers.
    pub lut: f64,
    /// Bits of all weights.
    pub weight_bits: u64,
    /// Decibels of the outputs over their error.
    pub sqnr_db: f64,
}

/// The schemes of a sweep: integers of `low` to `high` bits for weights and activations, and small floats of as many bits for both.
pub fn schemes(low: u32, high: u32) -> Vec<String> {
    let integers = (low..=high).flat_map(|w| (low..=high).map(move |a| format!("w{w}a{a}")));
    let floats = (low.max(4)..=high).flat_map(|bits| {
        (2..=4).filter(move |exponent| bits > exponent + 1).map(move |exponent| {
            let mantissa = bits - 1 - exponent;
            format!("we{exponent}m{mantissa}ae{exponent}m{mantissa}")
        })
    });
    integers.chain(floats).collect()
}

/// Whether no other point is at least as good in both and better in one.
pub fn is_on_front(point: &Point, all: &[Point]) -> bool {
    !all.iter().any(|other| {
        let as_good = other.lut <= point.lut && other.sqnr_db >= point.sqnr_db;
        as_good && (other.lut < point.lut || other.sqnr_db > point.sqnr_db)
    })
}

/// Draws `points` to an SVG file at `path`.
///
/// # Errors
/// What the drawing library says.
pub fn draw(points: &[Point], title: &str, path: &Path) -> Result<(), String> {
    let root = SVGBackend::new(path, (860, 520)).into_drawing_area();
    drawn(&root, points, title).map_err(|e| e.to_string())
}

fn drawn<B: DrawingBackend>(
    root: &DrawingArea<B, plotters::coord::Shift>,
    points: &[Point],
    title: &str,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>>
where
    B::ErrorType: 'static,
{
    root.fill(&WHITE)?;
    let ends = |of: fn(&Point) -> f64| {
        let values = points.iter().map(of);
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
    };
    let ((left, right), (bottom, top)) = (ends(|p| p.lut / 1000.0), ends(|p| p.sqnr_db));
    let mut chart = ChartBuilder::on(root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(left * 0.95..right * 1.05, bottom - 1.0..top + 2.0)?;
    chart.configure_mesh().x_desc("thousand lookup tables").y_desc("output SQNR, dB").light_line_style(WHITE).draw()?;
    let mut front: Vec<&Point> = points.iter().filter(|point| is_on_front(point, points)).collect();
    front.sort_by(|a, b| a.lut.total_cmp(&b.lut));
    chart
        .draw_series(LineSeries::new(front.iter().map(|p| (p.lut / 1000.0, p.sqnr_db)), BLACK.mix(0.5)))?
        .label("front");
    for (float, color, name) in
        [(false, RGBColor(31, 119, 180), "integers"), (true, RGBColor(214, 39, 40), "minifloats")]
    {
        let mine = points.iter().filter(|point| point.float == float);
        chart
            .draw_series(mine.map(|p| Circle::new((p.lut / 1000.0, p.sqnr_db), 4, color.filled())))?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 8, y), 4, color.filled()));
    }
    let label = |p: &&Point| Text::new(p.scheme.clone(), (p.lut / 1000.0, p.sqnr_db), ("sans-serif", 11));
    chart.draw_series(front.iter().map(label))?;
    chart.configure_series_labels().position(SeriesLabelPosition::LowerRight).border_style(BLACK.mix(0.3)).draw()?;
    root.present()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_front_has_nothing_above_and_left_of_it() {
        let point =
            |lut: f64, sqnr_db: f64| Point { scheme: String::new(), float: false, lut, weight_bits: 0, sqnr_db };
        let points = [point(1.0, 10.0), point(2.0, 9.0), point(2.0, 12.0), point(3.0, 12.0)];
        let front: Vec<bool> = points.iter().map(|p| is_on_front(p, &points)).collect();
        assert_eq!(front, [true, false, true, false]);
    }

    #[test]
    fn schemes_of_a_sweep_are_schemes() {
        let all = schemes(3, 8);
        assert_eq!(all.iter().filter(|s| !s.contains('e')).count(), 36);
        assert!(all.iter().all(|text| passes::target::Scheme::parse(text).is_some()), "{all:?}");
        assert!(all.contains(&"we2m1ae2m1".to_owned()) && all.contains(&"we4m3ae4m3".to_owned()));
    }
}
