//! Why these layers, as plots: damage measured layer by layer, strategy by strategy, and what the head reads.

use super::plot::{BOTTOM, Figure, LEFT, Plot, TOP, WIDTH, tick_text, ticks};
use crate::job::report::{Compared, LayerProfile, LayerSelection, Step, Zone};
use crate::job::spec::{DamageMeasure, Zones};

const HEIGHT: f64 = 340.0;
/// Width of the bounds' names beside the bars.
const BOUNDS: f64 = 136.0;

/// Damages differ by powers of ten and may lie below zero: straight near zero, logarithmic far from it.
#[derive(Clone, Copy)]
struct Squeezed {
    /// Where the one turns into the other.
    unit: f64,
}

impl Squeezed {
    fn at(self, damage: f64) -> f64 {
        (damage / self.unit).asinh()
    }

    /// Round damages in a range, in the order of their worth for a reader, none nearer to another than `gap`.
    fn ticks(self, (low, high): (f64, f64), gap: f64) -> Vec<(f64, String)> {
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

/// Damage of leaving out each layer by itself, by zone, with two standard errors to either side.
pub fn criticality(profile: &LayerProfile, zones: &Zones, selection: &LayerSelection) -> Figure {
    let scale = Squeezed { unit: zones.redundant.abs().max(1e-3) };
    let heights: Vec<f64> = profile.ablation.iter().map(|a| scale.at(a.damage)).collect();
    let error = |errors: f64| profile.ablation.iter().map(move |a| scale.at(a.damage + errors * a.stderr));
    let high = error(2.0).chain([scale.at(zones.needed)]).fold(0.0, f64::max);
    let low = error(-2.0).fold(0.0, f64::min);
    let margin = (high - low) * 0.05;
    // Room above the bars for what the colours mean.
    let (low, high) = (if low < 0.0 { low - margin } else { low }, high + 4.0 * margin);
    let mut plot = Plot::new(HEIGHT, (-0.5, heights.len() as f64 - 0.5), (low, high)).beside(BOUNDS);
    let x_ticks = whole((0.0, heights.len() as f64 - 1.0));
    plot.axes_at(
        &x_ticks,
        &scale.ticks((low, high - 3.0 * margin), (high - low) / 13.0),
        "layer left out",
        "damage, nats per token",
    );
    for (layer, (ablation, height)) in profile.ablation.iter().zip(&heights).enumerate() {
        let x = layer as f64;
        let (left, right) = (plot.px(x - 0.36), plot.px(x + 0.36));
        let (top, bottom) = (plot.py(height.max(0.0)), plot.py(height.min(0.0)));
        let class = zone_name(ablation.zone);
        plot.add(&format!(
            "<rect class='{class}' x='{left:.1}' y='{top:.1}' width='{:.1}' height='{:.1}'>\
             <title>layer {layer}: {:.4} ± {:.4} nats per token, {class}</title></rect>",
            right - left,
            (bottom - top).max(1.0),
            ablation.damage,
            ablation.stderr
        ));
        if ablation.stderr > 0.0 {
            let reach = 2.0 * ablation.stderr;
            plot.error_bar(x, scale.at(ablation.damage - reach), scale.at(ablation.damage + reach));
        }
        if selection.dropped.contains(&(layer as u32)) {
            plot.add(&format!(
                "<rect class='gone' x='{left:.1}' y='{:.1}' width='{:.1}' height='5'/>",
                HEIGHT - BOTTOM - 1.0,
                right - left
            ));
        }
    }
    for (damage, text) in [(zones.needed, "needed from"), (zones.redundant, "redundant to")] {
        let y = plot.py(scale.at(damage));
        let end = WIDTH - BOUNDS;
        for class in ["halo", "bound"] {
            plot.line_at(class, (LEFT, y), (end, y));
        }
        let (x, y) = (end + 6.0, y + 4.0);
        plot.add(&format!("<text x='{x}' y='{y:.1}'>{text} {}</text>", tick_text(damage)));
    }
    zone_key(&mut plot, profile);
    plot.figure("criticality", "Damage of leaving out one layer, by zone, with two standard errors")
}

fn zone_key(plot: &mut Plot, profile: &LayerProfile) {
    let mut x = LEFT + 4.0;
    for zone in [Zone::Needed, Zone::Mixed, Zone::Redundant] {
        let (name, count) = (zone_name(zone), profile.ablation.iter().filter(|a| a.zone == zone).count());
        plot.add(&format!(
            "<rect class='{name}' x='{x}' y='{}' width='13' height='11'/><text x='{}' y='{}'>{name}: {count}</text>",
            TOP + 2.0,
            x + 19.0,
            TOP + 12.0
        ));
        x += 130.0;
    }
    plot.add(&format!(
        "<rect class='gone' x='{x}' y='{}' width='13' height='5'/><text x='{}' y='{}'>cut</text>",
        TOP + 5.0,
        x + 19.0,
        TOP + 12.0
    ));
}

pub const fn zone_name(zone: Zone) -> &'static str {
    match zone {
        Zone::Needed => "needed",
        Zone::Mixed => "mixed",
        Zone::Redundant => "redundant",
    }
}

/// Width of the names beside the strategies' lines.
const NAMES: f64 = 190.0;
const COLOURS: usize = 7;
const DASHES: usize = 4;
const SIGNS: usize = 4;

/// Damage by layers cut, a line for each strategy.
pub fn strategies(compared: &[Compared], measure: DamageMeasure) -> Figure {
    let steps = || compared.iter().flat_map(|c| &c.path);
    let most = steps().map(|s| s.dropped.len()).max().unwrap_or(1) as f64;
    let high = steps().map(|s| s.damage).fold(0.0, f64::max);
    let low = steps().map(|s| s.damage).fold(0.0, f64::min);
    // Where the worst is far off the best, the good ones would lie on the axis together.
    let best = compared.iter().filter_map(|c| c.damage).fold(f64::INFINITY, f64::min);
    let far = high > 12.0 * best;
    let scale = Squeezed { unit: if far { best.max(high / 1000.0) } else { 100.0 * high.max(1e-9) } };
    let margin = (scale.at(high) - scale.at(low)).max(1e-9) * 0.05;
    let range = (scale.at(low) - if low < 0.0 { margin } else { 0.0 }, scale.at(high) + margin);
    let mut plot = Plot::new(HEIGHT + 40.0, (1.0 - 0.02 * most, most), range).beside(NAMES);
    let y_ticks = if far {
        scale.ticks(range, (range.1 - range.0) / 11.0)
    } else {
        ticks((low, high)).into_iter().map(|t| (scale.at(t), tick_text(t))).collect()
    };
    let name = match measure {
        DamageMeasure::Loss => "damage: loss, nats per token",
        DamageMeasure::Kl => "damage: KL, nats per token",
    };
    plot.axes_at(&whole((1.0, most)), &y_ticks, "layers cut", name);
    let point = |step: &Step| (step.dropped.len() as f64, scale.at(step.damage));
    let mut ends: Vec<(f64, usize)> = Vec::new();
    for (i, strategy) in compared.iter().enumerate() {
        plot.line(&look(i), strategy.path.iter().map(point));
        for step in &strategy.path {
            let (x, y) = (plot.px(point(step).0), plot.py(point(step).1));
            let name = strategy.strategy.name();
            let what =
                format!("{name}, {} layers: {:.4} ± {:.4}", step.dropped.len(), step.damage, step.stderr);
            plot.add(&sign(i, x, y, &what));
        }
        if let Some(last) = strategy.path.last() {
            ends.push((plot.py(point(last).1), i));
        }
    }
    names(&mut plot, compared, ends);
    plot.figure("strategies", "Damage by layers cut, a line for each strategy")
}

/// The names of the lines, each as near to its line's end as the others let it.
fn names(plot: &mut Plot, compared: &[Compared], mut ends: Vec<(f64, usize)>) {
    const GAP: f64 = 19.0;
    ends.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let last = ends.len().saturating_sub(1) as f64;
    let mut free = TOP + 6.0;
    for (i, (y, series)) in ends.iter().enumerate() {
        let below = (last - i as f64) * GAP;
        let at = y.min(HEIGHT + 40.0 - BOTTOM - below).max(free);
        free = at + GAP;
        let x = WIDTH - NAMES;
        plot.add(&format!(
            "<line class='leader' x1='{:.1}' x2='{:.1}' y1='{y:.1}' y2='{at:.1}'/>",
            x + 6.0,
            x + 16.0
        ));
        plot.line_at(&look(*series), (x + 18.0, at), (x + 42.0, at));
        let strategy = compared[*series].strategy.name();
        plot.add(&sign(*series, x + 30.0, at, strategy));
        plot.add(&format!("<text x='{:.1}' y='{:.1}'>{strategy}</text>", x + 47.0, at + 4.0));
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
    let colour = series % COLOURS;
    format!("<path class='sign c{colour}' d='M{x:.1} {y:.1}{outline}'><title>{what}</title></path>")
}

/// What the head reads from the stream at every seam: its loss, and how often it is of the whole model's mind.
pub fn logit_lens(profile: &LayerProfile) -> Figure {
    let lens = &profile.logit_lens;
    let last = lens.len().saturating_sub(1) as f64;
    let x_ticks = whole((0.0, last));
    let texts = |range| ticks(range).into_iter().map(|t| (t, tick_text(t))).collect::<Vec<_>>();
    // The first seams read hundreds of nats where the last ones read three.
    let scale = Squeezed { unit: lens.iter().map(|r| r.loss).fold(f64::INFINITY, f64::min).max(0.1) };
    let range = (0.0, scale.at(lens.iter().map(|r| r.loss).fold(0.0, f64::max)) * 1.05);
    let mut loss = Plot::new(230.0, (0.0, last), range);
    loss.axes_at(&[], &scale.ticks(range, range.1 / 8.0), "", "loss, nats per token");
    let mut agreement = Plot::new(230.0, (0.0, last), (0.0, 1.0));
    agreement.axes_at(
        &x_ticks,
        &texts((0.0, 1.0)),
        "stream entering layer (last: leaving the model)",
        "top-1 agreement",
    );
    loss.line("curve", lens.iter().enumerate().map(|(l, r)| (l as f64, scale.at(r.loss))));
    agreement.line("curve", lens.iter().enumerate().map(|(l, r)| (l as f64, r.agreement)));
    for (l, reading) in lens.iter().enumerate() {
        for (plot, value, height, name) in [
            (&mut loss, reading.loss, scale.at(reading.loss), "nats per token"),
            (&mut agreement, reading.agreement, reading.agreement, "agree"),
        ] {
            let (x, y) = (plot.px(l as f64), plot.py(height));
            plot.add(&format!(
                "<circle class='dot' cx='{x:.1}' cy='{y:.1}' r='2.5'><title>seam {l}: {value:.4} {name}</title></circle>"
            ));
        }
    }
    Figure::stacked(loss, agreement, "logit-lens", "The head, read from the stream at every seam")
}

/// Round numbers that are whole.
fn whole(range: (f64, f64)) -> Vec<(f64, String)> {
    let ticks = ticks(range).into_iter().filter(|t| t.fract() == 0.0);
    ticks.map(|t| (t, tick_text(t))).collect()
}
