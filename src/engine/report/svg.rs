//! Plots as inline SVG: no script, no font, no file from elsewhere. Colours of
//! axes and text come from the page, so that they follow its theme.

use std::fmt::Write;

use super::contiguous;
use super::html::escape;
use crate::job::report::{HealReport, LayerProfile, LayerSelection};

const WIDTH: f64 = 720.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 44.0;

/// The frame of a plot and where numbers lie in it.
struct Plot {
    height: f64,
    x: (f64, f64),
    y: (f64, f64),
    body: String,
}

impl Plot {
    fn new(height: f64, x: (f64, f64), y: (f64, f64)) -> Self {
        let widen = |(low, high): (f64, f64)| if high > low { (low, high) } else { (low - 0.5, low + 0.5) };
        Self { height, x: widen(x), y: widen(y), body: String::new() }
    }

    fn px(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }

    fn py(&self, y: f64) -> f64 {
        self.height - BOTTOM - (y - self.y.0) / (self.y.1 - self.y.0) * (self.height - TOP - BOTTOM)
    }

    fn add(&mut self, piece: &str) {
        self.body.push_str(piece);
    }

    fn points(&self, points: impl Iterator<Item = (f64, f64)>) -> String {
        points.fold(String::new(), |mut out, (x, y)| {
            write!(out, "{:.1},{:.1} ", self.px(x), self.py(y)).expect("writing to a text. This is a bug.");
            out
        })
    }

    fn line(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>) {
        let points = self.points(points);
        self.add(&format!("<polyline class='{class}' points='{}'/>", points.trim_end()));
    }

    fn axes(&mut self, x_label: &str, y_label: &str) {
        let (bottom, right) = (self.height - BOTTOM, WIDTH - RIGHT);
        for tick in ticks(self.y) {
            let y = self.py(tick);
            self.add(&format!(
                "<line class='grid' x1='{LEFT}' x2='{right}' y1='{y:.1}' y2='{y:.1}'/>\
                 <text class='end' x='{:.1}' y='{:.1}'>{}</text>",
                LEFT - 8.0,
                y + 4.0,
                tick_text(tick)
            ));
        }
        for tick in ticks(self.x) {
            let x = self.px(tick);
            let text = tick_text(tick);
            self.add(&format!("<text class='mid' x='{x:.1}' y='{:.1}'>{text}</text>", bottom + 18.0));
        }
        self.labels(x_label, y_label);
    }

    fn labels(&mut self, x_label: &str, y_label: &str) {
        let (middle, bottom) = (f64::midpoint(LEFT, WIDTH), self.height - 6.0);
        let half = f64::midpoint(TOP, self.height - BOTTOM);
        self.add(&format!(
            "<text class='mid' x='{middle}' y='{bottom}'>{}</text>\
             <text class='mid' transform='translate(14 {half}) rotate(-90)'>{}</text>",
            escape(x_label),
            escape(y_label)
        ));
    }

    fn svg(self, id: &str, title: &str) -> String {
        format!(
            "<svg role='img' aria-labelledby='{id}' viewBox='0 0 {WIDTH} {}'><title id='{id}'>{}</title>{}</svg>",
            self.height,
            escape(title),
            self.body
        )
    }
}

/// Round numbers inside a range, about five of them.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

fn tick_text(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Yellow (near) to purple (far), the colours of the paper's figure 4.
fn colour(t: f64) -> String {
    const STOPS: [[f64; 3]; 5] = [
        [253.0, 231.0, 37.0],
        [94.0, 201.0, 98.0],
        [33.0, 145.0, 140.0],
        [59.0, 82.0, 139.0],
        [68.0, 1.0, 84.0],
    ];
    let at = t.clamp(0.0, 1.0) * 4.0;
    let (i, part) = ((at as usize).min(3), at - ((at as usize).min(3)) as f64);
    let mix = |c: usize| (STOPS[i][c] + part * (STOPS[i + 1][c] - STOPS[i][c])).round() as u8;
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

/// Distance by first layer and length of the block, each row on its own scale (paper, figure 4).
pub fn heat_map(profile: &LayerProfile, selection: &LayerSelection) -> String {
    let count = f64::from(profile.layer_count);
    let height = TOP + BOTTOM + (WIDTH - LEFT - RIGHT) * 0.62;
    let mut plot = Plot::new(height, (0.0, count), (0.5, count + 0.5));
    let (w, h) = (plot.px(1.0) - plot.px(0.0), plot.py(0.0) - plot.py(1.0));
    for (row, distances) in profile.by_len.iter().enumerate() {
        let n = row + 1;
        let least = distances.iter().copied().fold(f64::INFINITY, f64::min);
        let most = distances.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for (l, distance) in distances.iter().enumerate() {
            let t = if most > least { (distance - least) / (most - least) } else { 0.0 };
            let stderr = profile.stderr[row][l];
            plot.add(&format!(
                "<rect x='{:.2}' y='{:.2}' width='{w:.2}' height='{h:.2}' fill='{}'>\
                 <title>{}: {distance:.4} ± {stderr:.4}</title></rect>",
                plot.px(l as f64),
                plot.py(n as f64 + 0.5),
                colour(t),
                layers_text(l, n)
            ));
        }
    }
    let marked: Vec<(u32, u32)> = match contiguous(&selection.dropped) {
        Some(block) => vec![(block.start, block.len)],
        None => selection.dropped.iter().map(|l| (*l, 1)).collect(),
    };
    for (start, len) in marked {
        plot.add(&format!(
            "<rect class='chosen' x='{:.2}' y='{:.2}' width='{w:.2}' height='{h:.2}'/>",
            plot.px(f64::from(start)),
            plot.py(f64::from(len) + 0.5)
        ));
    }
    let bottom = height - BOTTOM;
    for tick in ticks((0.0, count - 1.0)).into_iter().filter(|t| t.fract() == 0.0) {
        plot.add(&format!(
            "<text class='mid' x='{:.1}' y='{:.1}'>{tick:.0}</text>",
            plot.px(tick + 0.5),
            bottom + 18.0
        ));
    }
    for tick in ticks((1.0, count)).into_iter().filter(|t| t.fract() == 0.0) {
        plot.add(&format!(
            "<text class='end' x='{:.1}' y='{:.1}'>{tick:.0}</text>",
            LEFT - 8.0,
            plot.py(tick) + 4.0
        ));
    }
    key(&mut plot);
    plot.labels("first layer of the block", "layers in the block");
    plot.svg("heat-map", "Distance across every block of layers; the block that was cut is framed")
}

/// What the colours mean, in the empty corner of the triangle.
fn key(plot: &mut Plot) {
    let x = WIDTH - RIGHT - 190.0;
    for i in 0..48 {
        let t = f64::from(i) / 47.0;
        plot.add(&format!(
            "<rect x='{:.1}' y='{}' width='4' height='12' fill='{}'/>",
            x + f64::from(i) * 3.9,
            TOP + 6.0,
            colour(t)
        ));
    }
    plot.add(&format!(
        "<text x='{x}' y='{0}'>nearest of its row</text><text class='end' x='{1}' y='{0}'>farthest</text>",
        TOP + 34.0,
        WIDTH - RIGHT
    ));
}

pub fn layers_text(start: usize, len: usize) -> String {
    if len == 1 { format!("layer {start}") } else { format!("layers {start} to {}", start + len - 1) }
}

/// Distance across a block of the chosen length, by where it starts.
pub fn profile_curve(profile: &LayerProfile, selection: &LayerSelection) -> String {
    let block = contiguous(&selection.dropped);
    let n = block.map_or(1, |b| b.len as usize);
    let (row, stderr) = (&profile.by_len[n - 1], &profile.stderr[n - 1]);
    let low = row.iter().zip(stderr).map(|(d, e)| d - 2.0 * e).fold(f64::INFINITY, f64::min).max(0.0);
    let high = row.iter().zip(stderr).map(|(d, e)| d + 2.0 * e).fold(0.0, f64::max);
    let margin = (high - low).max(1e-6) * 0.06;
    let mut plot = Plot::new(320.0, (0.0, (row.len() - 1) as f64), ((low - margin).max(0.0), high + margin));
    plot.axes(&format!("first layer of a block of {n}"), &format!("distance ({})", unit(&profile.unit)));
    let upper = row.iter().zip(stderr).enumerate().map(|(l, (d, e))| (l as f64, d + 2.0 * e));
    let lower =
        row.iter().zip(stderr).enumerate().rev().map(|(l, (d, e))| (l as f64, (d - 2.0 * e).max(0.0)));
    let band = plot.points(upper.chain(lower));
    plot.add(&format!("<polygon class='band' points='{}'/>", band.trim_end()));
    plot.line("curve", row.iter().enumerate().map(|(l, d)| (l as f64, *d)));
    let chosen = block.map_or_else(|| selection.dropped.clone(), |b| vec![b.start]);
    for start in chosen.iter().map(|s| *s as usize).filter(|s| *s < row.len()) {
        let (x, y) = (plot.px(start as f64), plot.py(row[start]));
        plot.add(&format!(
            "<line class='mark' x1='{x:.1}' x2='{x:.1}' y1='{TOP}' y2='{:.1}'/><circle class='dot' cx='{x:.1}' \
             cy='{y:.1}' r='5'><title>{}: {:.4} ± {:.4}</title></circle>",
            320.0 - BOTTOM,
            layers_text(start, n),
            row[start],
            stderr[start]
        ));
    }
    plot.svg(
        "profile-curve",
        "Distance by first layer of the block, with two standard errors; the cut is marked",
    )
}

pub fn unit(name: &str) -> &'static str {
    if name == "pi" { "angle / π" } else { "1 − cosine" }
}

/// Loss by optimizer step, with the held-out loss before and after.
pub fn loss_curve(heal: &HealReport) -> String {
    let losses: Vec<f64> = heal.curve.iter().map(|p| p.loss).filter(|l| l.is_finite()).collect();
    let all =
        losses.iter().copied().chain([heal.held_out_before, heal.held_out_after]).filter(|l| l.is_finite());
    let (low, high) = all.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), l| (a.min(l), b.max(l)));
    let margin = (high - low).max(1e-6) * 0.08;
    let last = heal.curve.last().map_or(1, |p| p.step);
    let mut plot = Plot::new(320.0, (0.0, f64::from(last)), (low - margin, high + margin));
    plot.axes("optimizer step", "loss, nats per token");
    plot.line("raw", heal.curve.iter().map(|p| (f64::from(p.step), p.loss)));
    // A running mean over a tenth of the steps shows the way through the noise.
    let reach = (heal.curve.len() / 20).max(1);
    let smooth = (0..heal.curve.len()).map(|i| {
        let near = &heal.curve[i.saturating_sub(reach)..(i + reach + 1).min(heal.curve.len())];
        (f64::from(heal.curve[i].step), near.iter().map(|p| p.loss).sum::<f64>() / near.len() as f64)
    });
    let smooth: Vec<(f64, f64)> = smooth.collect();
    plot.line("curve", smooth.into_iter());
    for (loss, text) in [(heal.held_out_before, "held out, before"), (heal.held_out_after, "held out, after")]
    {
        let y = plot.py(loss);
        plot.add(&format!(
            "<line class='mark' x1='{LEFT}' x2='{0}' y1='{y:.1}' y2='{y:.1}'/>\
             <text class='end' x='{0}' y='{1:.1}'>{text}: {loss:.3}</text>",
            WIDTH - RIGHT,
            y - 5.0
        ));
    }
    plot.svg("loss-curve", "Training loss by optimizer step, with the held-out loss before and after healing")
}
