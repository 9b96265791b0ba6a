//! Lines of points with names beside them, told apart without colour.

use super::html::escape;
use super::plot::{BOTTOM, Plot, TOP, WIDTH, tick_text, ticks};

const HEIGHT: f64 = 380.0;
/// Width of the names beside the lines.
const NAMES: f64 = 190.0;
const COLOURS: usize = 7;
const DASHES: usize = 4;
const SIGNS: usize = 4;

/// Numbers such as damages differ by powers of ten and may lie below zero: straight near zero, logarithmic far from it.
#[derive(Clone, Copy)]
pub struct Squeezed {
    /// Where the one turns into the other.
    pub unit: f64,
}

impl Squeezed {
    pub fn at(self, damage: f64) -> f64 {
        (damage / self.unit).asinh()
    }

    /// Round damages in a range, in the order of their worth for a reader, none nearer to another than `gap`.
    pub fn ticks(self, (low, high): (f64, f64), gap: f64) -> Vec<(f64, String)> {
        let tens = (-4..4).map(|power| 10f64.powi(power));
        let sizes: Vec<f64> = tens.clone().chain(tens.flat_map(|ten| [5.0 * ten, 2.0 * ten])).collect();
        let mut found: Vec<(f64, String)> = Vec::new();
        for damage in std::iter::once(0.0).chain(sizes.iter().flat_map(|size| [*size, -size])) {
            let at = self.at(damage);
            let near = found.iter().any(|(there, _)| (there - at).abs() < gap);
            if (low..=high).contains(&at) && !near {
                found.push((at, tick_text(damage)));
            }
        }
        found
    }
}

/// A line of points, from left to right.
pub struct Series {
    pub name: String,
    pub points: Vec<Point>,
    /// The points are joined.
    pub joined: bool,
}

pub struct Point {
    pub x: f64,
    pub y: f64,
    /// What it says when it is pointed at.
    pub what: String,
}

/// The series in one plot; the scale is squeezed where the worst is far off the best.
pub fn lines(series: &[Series], (x_name, y_name): (&str, &str)) -> Plot {
    let points = || series.iter().flat_map(|s| &s.points);
    let (left, right) =
        points().fold((f64::INFINITY, 1.0), |(a, b): (f64, f64), point| (a.min(point.x), b.max(point.x)));
    let high = points().map(|p| p.y).fold(0.0, f64::max);
    let low = points().map(|p| p.y).fold(0.0, f64::min);
    // Where the worst is far off the best, the good ones would lie on the axis together.
    let ends = series.iter().filter_map(|s| s.points.last());
    let best = ends.map(|p| p.y).fold(f64::INFINITY, f64::min);
    let far = high > 12.0 * best;
    let scale = Squeezed { unit: if far { best.max(high / 1000.0) } else { 100.0 * high.max(1e-9) } };
    let margin = (scale.at(high) - scale.at(low)).max(1e-9) * 0.05;
    let range = (scale.at(low) - if low < 0.0 { margin } else { 0.0 }, scale.at(high) + margin);
    let left = left.min(right);
    let mut plot = Plot::new(HEIGHT, (left - 0.02 * right, right), range).beside(NAMES);
    let y_ticks = if far {
        scale.ticks(range, (range.1 - range.0) / 11.0)
    } else {
        ticks((low, high)).into_iter().map(|t| (scale.at(t), tick_text(t))).collect()
    };
    let x_ticks = if points().all(|p| p.x.fract() == 0.0) {
        whole((left, right))
    } else {
        ticks((left, right)).into_iter().map(|t| (t, tick_text(t))).collect()
    };
    plot.axes_at(&x_ticks, &y_ticks, x_name, y_name);
    let mut ends: Vec<(f64, usize)> = Vec::new();
    for (i, line) in series.iter().enumerate() {
        if line.joined {
            plot.line(&look(i), line.points.iter().map(|point| (point.x, scale.at(point.y))));
        }
        for point in &line.points {
            let (x, y) = (plot.px(point.x), plot.py(scale.at(point.y)));
            plot.add(&sign(i, x, y, &format!("{}, {}", line.name, point.what)));
        }
        if let Some(last) = line.points.last() {
            ends.push((plot.py(scale.at(last.y)), i));
        }
    }
    names(&mut plot, series, ends);
    plot
}

/// The names of the lines, each as near to its line's end as the others let it.
fn names(plot: &mut Plot, series: &[Series], mut ends: Vec<(f64, usize)>) {
    const GAP: f64 = 19.0;
    ends.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let last = ends.len().saturating_sub(1) as f64;
    let mut free = TOP + 6.0;
    for (i, (y, of)) in ends.iter().enumerate() {
        let below = (last - i as f64) * GAP;
        let at = y.min(HEIGHT - BOTTOM - below).max(free);
        free = at + GAP;
        let x = WIDTH - NAMES;
        let line = &series[*of];
        if line.joined {
            plot.add(&format!(
                "<line class='leader' x1='{:.1}' x2='{:.1}' y1='{y:.1}' y2='{at:.1}'/>",
                x + 6.0,
                x + 16.0
            ));
            plot.line_at(&look(*of), (x + 18.0, at), (x + 42.0, at));
        }
        plot.add(&sign(*of, x + 30.0, at, &line.name));
        plot.add(&format!("<text x='{:.1}' y='{:.1}'>{}</text>", x + 47.0, at + 4.0, escape(&line.name)));
    }
}

fn look(series: usize) -> String {
    format!("series c{} d{}", series % COLOURS, series % DASHES)
}

/// A circle, square, triangle or diamond that tells the series apart without colour.
fn sign(series: usize, x: f64, y: f64, what: &str) -> String {
    let outline = match series % SIGNS {
        0 => "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        1 => "m-3.4 -3.4h6.8v6.8h-6.8z",
        2 => "m0 -4.4l4.4 7.4h-8.8z",
        _ => "m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z",
    };
    let (colour, what) = (series % COLOURS, escape(what));
    format!("<path class='sign c{colour}' d='M{x:.1} {y:.1}{outline}'><title>{what}</title></path>")
}

/// Round numbers that are whole.
pub fn whole(range: (f64, f64)) -> Vec<(f64, String)> {
    let ticks = ticks(range).into_iter().filter(|t| t.fract() == 0.0);
    ticks.map(|t| (t, tick_text(t))).collect()
}
