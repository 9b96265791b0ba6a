//! Why these layers, as plots: damage measured layer by layer, strategy by strategy, and what the head reads.

use super::lines::{Point, Series, Squeezed, lines, whole};
use super::plot::{BOTTOM, Figure, LEFT, Plot, TOP, WIDTH, tick_text, ticks};
use crate::job::report::{Compared, LayerProfile, LayerSelection, Step, Zone};
use crate::job::spec::{DamageMeasure, Zones};

const HEIGHT: f64 = 340.0;
/// Width of the bounds' names beside the bars.
const BOUNDS: f64 = 136.0;

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

/// Damage by layers cut, a line for each strategy.
pub fn strategies(compared: &[Compared], measure: DamageMeasure) -> Figure {
    let name = match measure {
        DamageMeasure::Loss => "damage: loss, nats per token",
        DamageMeasure::Kl => "damage: KL, nats per token",
    };
    let series = compared.iter().map(|strategy| {
        let point = |step: &Step| Point {
            x: step.dropped.len() as f64,
            y: step.damage,
            what: format!("{} layers: {:.4} ± {:.4}", step.dropped.len(), step.damage, step.stderr),
        };
        Series {
            name: strategy.strategy.name().to_owned(),
            points: strategy.path.iter().map(point).collect(),
            joined: true,
        }
    });
    lines(&series.collect::<Vec<_>>(), ("layers cut", name))
        .figure("strategies", "Damage by layers cut, a line for each strategy")
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
