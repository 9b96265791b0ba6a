//! The report as one page: no script, nothing loaded from anywhere.

use super::budget::{rounds, search};
use super::choice::{criticality, logit_lens, strategies, zone_name};
use super::evaluation::{changes, texts, verdict};
use super::plot::{Figure, STYLE as PLOTS};
use super::svg::{heat_map, layers_text, least, loss_curve, profile_curve, runs_text, unit};
use super::{amount, columns, comparison, contiguous, exports, summary};
use crate::job::heal::HealSettings;
use crate::job::report::{
    Ablation, Compared, Considered, HealReport, LensReading, Repaired, Report, StageSummary,
};
use crate::job::spec::DamageMeasure;
use crate::job::training::Training;

/// The whole page.
pub fn page(report: &Report, stages: &[StageSummary]) -> String {
    let name = report.spec.name.clone().unwrap_or_else(|| "Pruning report".into());
    let said = summary(report);
    // A number and its sign stay on one line.
    let mut out = opened(&name, &said[0].replace(" %", "\u{a0}%"));
    for sentence in &said[1..] {
        put(&mut out, &format!("<p>{}</p>", escape(sentence)));
    }
    put(&mut out, "</header>");
    verdict(&mut out, report);
    list(&mut out, "Before you use it", &report.remarks);
    comparison_table(&mut out, report);
    exports_table(&mut out, report);
    changes(&mut out, report);
    texts(&mut out, report);
    search(&mut out, report);
    rounds(&mut out, report);
    profile_figures(&mut out, report);
    choice(&mut out, report);
    criticality_figure(&mut out, report);
    lens_figure(&mut out, report);
    for heal in &report.heal {
        heal_figure(&mut out, heal);
    }
    stage_table(&mut out, stages);
    provenance(&mut out, report);
    put(
        &mut out,
        &format!("<footer>secateur {}</footer></main></body></html>\n", escape(&report.secateur_version)),
    );
    out
}

/// How a page called `name` begins: up to its heading.
pub(super) fn opened(name: &str, heading: &str) -> String {
    format!(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>\
         <meta name='viewport' content='width=device-width, initial-scale=1'><title>{0}</title>\
         <style>{STYLE}{PLOTS}</style></head><body><main><header><p class='kicker'>{0}</p><h1>{1}</h1>",
        escape(name),
        escape(heading)
    )
}

/// Text made safe inside elements and quoted attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

pub(super) fn put(out: &mut String, piece: &str) {
    out.push_str(piece);
}

pub(super) fn list(out: &mut String, title: &str, items: &[String]) {
    if items.is_empty() {
        return;
    }
    put(out, &format!("<section class='remarks'><h2>{}</h2><ul>", escape(title)));
    for item in items {
        put(out, &format!("<li>{}</li>", escape(item)));
    }
    put(out, "</ul></section>");
}

/// A table; the first column heads its rows.
pub(super) fn table(out: &mut String, head: &[&str], rows: &[Vec<String>]) {
    put(out, "<div class='scroll'><table><thead><tr>");
    for cell in head {
        put(out, &format!("<th scope='col'>{}</th>", escape(cell)));
    }
    put(out, "</tr></thead><tbody>");
    for row in rows {
        put(out, "<tr>");
        for (i, cell) in row.iter().enumerate() {
            let cell = escape(cell);
            put(
                out,
                &if i == 0 { format!("<th scope='row'>{cell}</th>") } else { format!("<td>{cell}</td>") },
            );
        }
        put(out, "</tr>");
    }
    put(out, "</tbody></table></div>");
}

fn comparison_table(out: &mut String, report: &Report) {
    put(
        out,
        "<section><h2>Before and after</h2><div class='scroll'><table class='wide'><thead><tr><td></td>",
    );
    for column in columns(&report.eval) {
        put(out, &format!("<th scope='col'>{}</th>", escape(column)));
    }
    put(out, "</tr></thead><tbody>");
    for row in comparison(&report.eval) {
        put(out, &format!("<tr><th scope='row'>{}</th>", escape(&row.label)));
        for cell in row.cells {
            let ratio = cell.ratio.map_or(String::new(), |r| format!(" <small>×{r:.2}</small>"));
            put(out, &format!("<td>{}{ratio}</td>", escape(&cell.text)));
        }
        put(out, "</tr>");
    }
    put(out, "</tbody></table></div></section>");
}

fn exports_table(out: &mut String, report: &Report) {
    let (head, rows) = exports(&report.eval);
    if rows.is_empty() {
        return;
    }
    put(
        out,
        "<section><h2>Cut and quantised</h2><p>Each GGUF file was measured by its own weights, in the same decoder, on \
         the same text. How many times smaller it is counts from the base model's weight files.</p>",
    );
    table(out, &head.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
    put(out, "</section>");
}

fn profile_figures(out: &mut String, report: &Report) {
    let (profile, selection) = (&report.profile, &report.selection);
    put(
        out,
        &format!(
            "<section><h2>Where the cut went</h2><p>Cut: <strong>{}</strong>, counted from 0. The distance says how far \
             a block of layers turns the stream that passes it ({}), over {} windows, {} tokens. \
             A block that hardly turns it is hardly missed.</p>",
            escape(&runs_text(&selection.dropped)),
            unit(&profile.unit),
            profile.samples,
            profile.tokens
        ),
    );
    figure(
        out,
        &heat_map(profile, selection),
        "Every block of every length; each row has its own scale. Dots mark the nearest block of each length, the \
         frame the cut.",
    );
    let mut head = vec!["layers in the block", "nearest block", "distance", "standard error"];
    let mut rows: Vec<Vec<String>> =
        profile.by_len.iter().enumerate().map(|(i, row)| best_of(i + 1, row, &profile.stderr[i])).collect();
    if !profile.confidence.is_empty() {
        head.push("confidence");
        for (row, confidence) in rows.iter_mut().zip(&profile.confidence) {
            row.push(format!("{:.1} %", 100.0 * confidence));
        }
    }
    details(out, "The nearest block of each length, as a table", &head, &rows);
    figure(
        out,
        &profile_curve(profile, selection),
        "Distance with a band of two standard errors; the mark is the cut.",
    );
    let n = contiguous(&selection.dropped).map_or(1, |b| b.len as usize);
    let rows: Vec<Vec<String>> = profile.by_len[n - 1]
        .iter()
        .zip(&profile.stderr[n - 1])
        .enumerate()
        .map(|(l, (d, e))| vec![layers_text(l, n), format!("{d:.4}"), format!("{e:.4}")])
        .collect();
    details(out, "The curve as a table", &["block", "distance", "standard error"], &rows);
    put(out, "</section>");
}

fn best_of(n: usize, distances: &[f64], stderr: &[f64]) -> Vec<String> {
    let best = least(distances);
    vec![
        n.to_string(),
        layers_text(best, n),
        format!("{:.4}", distances[best]),
        format!("{:.4}", stderr[best]),
    ]
}

/// Why these layers: what `auto` weighed, and what other strategies would have done.
fn choice(out: &mut String, report: &Report) {
    let (selection, settings) = (&report.selection, &report.spec.prune.damage);
    if selection.compared.is_empty() {
        return;
    }
    let what = match settings.measure {
        DamageMeasure::Loss => "the loss per token above the intact model's",
        DamageMeasure::Kl => "the divergence per token from the intact model's prediction",
    };
    let when = if selection.mended {
        "with what the cut takes from the size of the stream made up for, but before any other healing"
    } else {
        "before any healing"
    };
    put(
        out,
        &format!(
            "<section class='words'><h2>Why these layers</h2><p><code>{}</code> decided. Damage is {what}, in nats, {when}: \
             0.1 is a tenth more perplexity. Behind ± stands its standard error over windows.</p>",
            selection.strategy.name()
        ),
    );
    if !selection.considered.is_empty() {
        let row = |c: &Considered| {
            let strategies: Vec<&str> = c.strategies.iter().map(|s| s.name()).collect();
            vec![strategies.join(", "), runs_text(&c.dropped), damage_text(c.damage, c.stderr), c.why.clone()]
        };
        let rows: Vec<Vec<String>> = selection.considered.iter().map(row).collect();
        table(out, &["cut of", "layers", "damage", "why"], &rows);
    }
    if selection.compared.iter().any(|c| c.path.len() > 1) {
        figure(
            out,
            &strategies(&selection.compared, settings.measure),
            "What each strategy would have damaged, by layers cut. Where it searches for all layers at once there is \
             one point.",
        );
    }
    let row = |c: &Compared| {
        let searched = if c.budget_exhausted { "ended with its budget" } else { "to its end" };
        let cost = match c.cost.evaluations {
            0 => "nothing".to_owned(),
            sets => format!("{sets} cuts, {} tokens", amount(c.cost.tokens as f64)),
        };
        let damage = damage_text(c.damage, c.stderr);
        vec![c.strategy.name().into(), runs_text(&c.dropped), damage, cost, searched.into()]
    };
    let rows: Vec<Vec<String>> = selection.compared.iter().map(row).collect();
    table(out, &["strategy", "layers", "damage", "measured to choose", "search"], &rows);
    put(out, "</section>");
}

fn damage_text(damage: Option<f64>, stderr: f64) -> String {
    damage.map_or("–".into(), |d| format!("{d:.4}\u{a0}±\u{a0}{stderr:.4}"))
}

fn criticality_figure(out: &mut String, report: &Report) {
    let (profile, zones) = (&report.profile, &report.spec.calibration.zones);
    if profile.ablation.is_empty() {
        return;
    }
    put(out, "<section><h2>How much each layer is missed</h2>");
    figure(
        out,
        &criticality(profile, zones, &report.selection),
        "Each layer left out by itself, with two standard errors over windows. The scale is straight near zero and \
         logarithmic above.",
    );
    let row = |(layer, a): (usize, &Ablation)| {
        let cut = if report.selection.dropped.contains(&(layer as u32)) { "cut" } else { "" };
        let (damage, stderr) = (format!("{:.4}", a.damage), format!("{:.4}", a.stderr));
        vec![layer.to_string(), damage, stderr, zone_name(a.zone).into(), cut.into()]
    };
    let rows: Vec<Vec<String>> = profile.ablation.iter().enumerate().map(row).collect();
    details(out, "The damages as a table", &["layer", "damage", "standard error", "zone", ""], &rows);
    put(out, "</section>");
}

fn lens_figure(out: &mut String, report: &Report) {
    let profile = &report.profile;
    if profile.logit_lens.is_empty() {
        return;
    }
    put(out, "<section><h2>What the head reads on the way</h2>");
    figure(
        out,
        &logit_lens(profile),
        "Final norm and head applied to the stream at every seam: how likely it finds the text (logarithmic above the \
         least loss), and how often its likeliest next token is that of the whole model.",
    );
    let row = |(seam, r): (usize, &LensReading)| {
        vec![seam.to_string(), format!("{:.4}", r.loss), format!("{:.1} %", 100.0 * r.agreement)]
    };
    let rows: Vec<Vec<String>> = profile.logit_lens.iter().enumerate().map(row).collect();
    details(out, "The readings as a table", &["seam", "loss", "top-1 agreement"], &rows);
    put(out, "</section>");
}

fn heal_figure(out: &mut String, heal: &HealReport) {
    let outcome = if heal.reverted {
        "It did not lower the held-out loss and was thrown away."
    } else if heal.passed_over {
        "Another method lowered it more and was kept instead."
    } else {
        "It was kept."
    };
    let how = how(heal);
    put(
        out,
        &format!(
            "<section><h2>Healing by {}</h2><p>{how} Held-out loss went from {:.3} to {:.3} nats per token. {outcome}</p>",
            escape(&heal.method),
            heal.held_out_before,
            heal.held_out_after
        ),
    );
    if !heal.repaired.is_empty() {
        let row = |r: &Repaired| {
            let layers: Vec<u32> = r.block.layers().collect();
            let percent = |error: f64| format!("{:.2} %", 100.0 * error);
            vec![
                runs_text(&layers),
                format!("{:.4}", r.factor),
                percent(r.error_before),
                percent(r.error_after),
            ]
        };
        let rows: Vec<Vec<String>> = heal.repaired.iter().map(row).collect();
        table(out, &["cut", "factor", "stream lacked before", "and after"], &rows);
    }
    if heal.curve.is_empty() {
        return put(out, "</section>");
    }
    figure(out, &loss_curve(heal), "Loss of each step (thin) and its running mean.");
    let every = heal.curve.len().div_ceil(100);
    let rows: Vec<Vec<String>> = heal
        .curve
        .iter()
        .step_by(every)
        .map(|p| vec![p.step.to_string(), format!("{:.4}", p.loss), format!("{:.2e}", p.learning_rate)])
        .collect();
    details(out, "The loss as a table", &["step", "loss", "learning rate"], &rows);
    put(out, "</section>");
}

/// What a method did, in a sentence.
fn how(heal: &HealReport) -> String {
    let trained = |t: &Training| {
        format!(
            "{} trained parameters, {} tokens, {} steps of {} windows; learning rate {}",
            amount(heal.trainable_parameters as f64),
            heal.tokens,
            t.steps,
            t.batch_size,
            t.learning_rate,
        )
    };
    let how = match &heal.settings {
        HealSettings::Qlora(s) => {
            format!(
                "{}, rank {}, alpha {}, {} bits.",
                trained(&s.training),
                s.rank,
                s.alpha,
                u8::from(s.bits)
            )
        }
        HealSettings::Whole(s) => {
            let head = if s.head { " and the head" } else { "" };
            format!("{}, the last {} layers{head}.", trained(&s.training), s.last_layers)
        }
        HealSettings::Reconstruct(s) => format!(
            "The layer below each cut was trained to give the stream behind it: {} trained parameters, {} tokens in \
             {} epochs; learning rate {}.",
            amount(heal.trainable_parameters as f64),
            heal.tokens,
            s.epochs,
            s.learning_rate
        ),
        HealSettings::Rescale(_) => format!(
            "Nothing trained: what the layers behind each cut add to the stream was divided by the factor it had \
             become too small by, measured on {} tokens.",
            heal.tokens
        ),
        HealSettings::LeastSquares(s) => format!(
            "Nothing trained: a linear map in place of the layers that went was fitted on {} tokens (ridge {}) and \
             put into the MLP below each cut.",
            heal.tokens, s.ridge
        ),
    };
    match heal.diverged_at {
        None => how,
        Some(step) => format!("{how} It diverged at step {step}; what is judged is from before."),
    }
}

fn stage_table(out: &mut String, stages: &[StageSummary]) {
    if stages.is_empty() {
        return;
    }
    put(out, "<section><h2>The road</h2>");
    let row = |s: &StageSummary| {
        let origin = if s.reused { "an earlier run's record" } else { "this run" };
        vec![s.stage.name().to_owned(), format!("{:.1} s", s.duration_ms as f64 / 1000.0), origin.to_owned()]
    };
    table(out, &["stage", "time", "done by"], &stages.iter().map(row).collect::<Vec<_>>());
    put(out, "</section>");
}

fn provenance(out: &mut String, report: &Report) {
    let spec = serde_json::to_string_pretty(&report.spec).unwrap_or_default();
    put(
        out,
        &format!(
            "<section><h2>How to get the same again</h2><p>Base model, BLAKE3 over its content: <code>{}</code></p>\
             <details><summary>The spec</summary><pre>{}</pre></details>",
            escape(&report.model_digest),
            escape(&spec)
        ),
    );
    let rows: Vec<Vec<String>> =
        report.files.iter().map(|(path, digest)| vec![path.clone(), digest.clone()]).collect();
    details(out, "Files and their sha256", &["file", "sha256"], &rows);
    put(out, "</section>");
}

pub(super) fn figure(out: &mut String, figure: &Figure, caption: &str) {
    let svg = figure.inline();
    put(out, &format!("<figure>{svg}<figcaption>{}</figcaption></figure>", escape(caption)));
}

pub(super) fn details(out: &mut String, summary: &str, head: &[&str], rows: &[Vec<String>]) {
    put(out, &format!("<details><summary>{}</summary>", escape(summary)));
    table(out, head, rows);
    put(out, "</details>");
}

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1c1d1f;--soft:#63676d;--paper:#fdfcf9;--rule:#dfdcd4;--accent:#9c3d1f;--leaf:#2f6f4f;--wash:#f4f1e9}
@media(prefers-color-scheme:dark){:root{--ink:#e9e7e1;--soft:#a3a6ab;--paper:#17181a;--rule:#36383c;--accent:#f0936f;--leaf:#7cc4a0;--wash:#202225}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif}
main{max-width:54rem;margin:0 auto;padding:2.5rem 1.25rem}
h1{font-size:2rem;line-height:1.2;margin:.2em 0 .5em;text-wrap:balance}
h2{font-size:1.2rem;margin:2.4em 0 .6em}
p{margin:.35em 0;max-width:44rem}
.kicker{color:var(--soft);font-size:.9rem;overflow-wrap:anywhere}
.verdict{border-left:6px solid var(--soft);padding:.1rem 1.1rem .6rem;margin:1.4rem 0}
.verdict.ship{border-color:var(--leaf)}
.verdict.reject{border-color:var(--accent)}
.verdict h2{margin:.4em 0 .2em}
.verdict ul{margin:0;padding-left:1.1em}
.texts td{text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere;min-width:12rem}
.remarks{background:var(--wash);border-left:3px solid var(--accent);padding:.3rem 1.1rem .8rem;margin-top:1.6rem}
.remarks h2{margin:.6em 0 .3em;font-size:1rem}
.remarks ul{margin:0;padding-left:1.1em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.94rem}
table.wide{width:100%}
th,td{padding:.36rem .8rem .36rem 0;border-bottom:1px solid var(--rule);text-align:right;vertical-align:baseline}
th:first-child,td:first-child{text-align:left}
tbody th{font-weight:400}
thead th{font-weight:600;color:var(--soft)}
.words th,.words td{text-align:left}
small{color:var(--soft)}
figure{margin:1.4rem 0 .6rem}
figcaption{color:var(--soft);font-size:.88rem}
svg{width:100%;height:auto;display:block}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--soft)}
code,pre{font:.86rem/1.5 ui-monospace,'DejaVu Sans Mono',Menlo,monospace;overflow-wrap:anywhere}
pre{background:var(--wash);padding:1rem;overflow-x:auto;white-space:pre-wrap}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
@media print{:root{--ink:#000;--soft:#444;--paper:#fff;--rule:#bbb;--wash:#f6f6f6}main{max-width:none;padding:0}p,figure,table,li{break-inside:avoid}h2,h2+p{break-after:avoid}details:not([open]){display:none}rect{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
";
