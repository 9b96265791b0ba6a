//! The profile and the healing as plots.

use super::contiguous;
use super::plot::{BOTTOM, Figure, LEFT, Plot, RIGHT, TOP, WIDTH, ticks};
use crate::job::report::{Block, HealReport, LayerProfile, LayerSelection};

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
pub fn heat_map(profile: &LayerProfile, selection: &LayerSelection) -> Figure {
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
    let nearest: Vec<(f64, f64)> =
        profile.by_len.iter().enumerate().map(|(row, d)| (least(d) as f64 + 0.5, row as f64 + 1.0)).collect();
    for class in ["halo", "path"] {
        plot.line(class, nearest.iter().copied());
    }
    for (x, y) in nearest {
        let (x, y) = (plot.px(x), plot.py(y));
        plot.add(&format!("<circle class='least' cx='{x:.1}' cy='{y:.1}' r='{:.1}'/>", (h / 4.0).min(3.5)));
    }
    let marked: Vec<(u32, u32)> = match contiguous(&selection.dropped) {
        Some(block) => vec![(block.start, block.len)],
        None => selection.dropped.iter().map(|l| (*l, 1)).collect(),
    };
    for (start, len) in marked {
        let corner = (plot.px(f64::from(start)), plot.py(f64::from(len) + 0.5));
        frame(&mut plot, corner, (w, h));
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
    plot.figure("heat-map", "Distance across every block of layers; the layers that were cut are framed")
}

/// Where the least of these is, the first one on a tie.
pub fn least(values: &[f64]) -> usize {
    (0..values.len()).min_by(|a, b| values[*a].total_cmp(&values[*b])).unwrap_or(0)
}

/// A frame in two colours, one of which stands out from any cell for any eye.
fn frame(plot: &mut Plot, (x, y): (f64, f64), (w, h): (f64, f64)) {
    for class in ["behind", "chosen"] {
        plot.add(&format!("<rect class='{class}' x='{x:.2}' y='{y:.2}' width='{w:.2}' height='{h:.2}'/>"));
    }
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
    plot.add(&format!(
        "<circle class='least' cx='{0}' cy='{1}' r='3.5'/><text x='{2}' y='{3}'>nearest block of its length</text>\
         <text x='{2}' y='{4}'>cut</text>",
        x + 6.0,
        TOP + 53.0,
        x + 20.0,
        TOP + 57.0,
        TOP + 80.0
    ));
    frame(plot, (x, TOP + 71.0), (12.0, 10.0));
}

pub fn layers_text(start: usize, len: usize) -> String {
    if len == 1 { format!("layer {start}") } else { format!("layers {start} to {}", start + len - 1) }
}

/// Dropped layers in words, runs of them together.
pub fn runs_text(dropped: &[u32]) -> String {
    let text = |run: &Block| match run.len {
        1 => run.start.to_string(),
        len => format!("{} to {}", run.start, run.start + len - 1),
    };
    let texts: Vec<String> = Block::runs(dropped).iter().map(text).collect();
    format!("{} {}", if dropped.len() == 1 { "layer" } else { "layers" }, texts.join(", "))
}

/// Distance across a block of the chosen length, by where it starts.
pub fn profile_curve(profile: &LayerProfile, selection: &LayerSelection) -> Figure {
    let block = contiguous(&selection.dropped);
    let n = block.map_or(1, |b| b.len as usize);
    let (row, stderr) = (&profile.by_len[n - 1], &profile.stderr[n - 1]);
    let low = row.iter().zip(stderr).map(|(d, e)| d - 2.0 * e).fold(f64::INFINITY, f64::min).max(0.0);
    let high = row.iter().zip(stderr).map(|(d, e)| d + 2.0 * e).fold(0.0, f64::max);
    let margin = (high - low).max(1e-6) * 0.06;
    let mut plot = Plot::new(320.0, (0.0, (row.len() - 1) as f64), ((low - margin).max(0.0), high + margin));
    let x_label = if n == 1 { "layer".to_owned() } else { format!("first layer of a block of {n}") };
    plot.axes(&x_label, &format!("distance ({})", unit(&profile.unit)));
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
    plot.figure(
        "profile-curve",
        "Distance by first layer of the block, with two standard errors; the cut is marked",
    )
}

pub fn unit(name: &str) -> &'static str {
    if name == "pi" { "angle / π" } else { "1 − cosine" }
}

/// Loss by optimizer step, with the held-out loss before and after.
pub fn loss_curve(heal: &HealReport) -> Figure {
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
    plot.figure(
        "loss-curve",
        "Training loss by optimizer step, with the held-out loss before and after healing",
    )
}
