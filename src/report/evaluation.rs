//! The verdict, what changed and what was written, as parts of the page.

use super::html::{escape, put, table};
use crate::job::report::{Estimate, Flaw, Generation, Report, WrittenText};

/// Prompts whose texts are shown.
const SHOWN: usize = 8;

pub fn verdict(out: &mut String, report: &Report) {
    let Some(verdict) = &report.verdict else { return };
    let name = verdict.decision.name();
    let reasons = verdict.reasons.iter().map(|reason| format!("<li>{}</li>", escape(reason)));
    put(
        out,
        &format!(
            "<section class='verdict {name}'><h2>Verdict on the {} checkpoint: {name}</h2><ul>{}</ul></section>",
            escape(&verdict.checkpoint),
            reasons.collect::<String>()
        ),
    );
}

/// Each cut checkpoint beside the base model, with intervals.
pub fn changes(out: &mut String, report: &Report) {
    let eval = &report.eval;
    if eval.compared.is_empty() {
        return;
    }
    let confidence = 100.0 * report.spec.eval.gates.confidence;
    put(
        out,
        &format!(
            "<section><h2>What is left, and how sure that is</h2><p>Against the base model on the same windows, items \
             and prompts, with the middle {confidence:.0} % of a paired bootstrap; speed with its least and most of \
             all rounds.</p>"
        ),
    );
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut add = |label: String, of: &dyn Fn(usize) -> Option<String>| {
        let cells: Vec<Option<String>> = (0..eval.compared.len()).map(of).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells.into_iter().map(|cell| cell.unwrap_or_else(|| "–".into()));
            rows.push(std::iter::once(label).chain(cells).collect());
        }
    };
    let compared = &eval.compared;
    add("accuracy above chance left, all tasks".into(), &|c| compared[c].retention.map(percent));
    for (i, task) in eval.base.tasks.iter().enumerate() {
        let change = |c: usize| compared[c].tasks.get(i);
        add(format!("above chance left, {}", task.task), &|c| change(c)?.retention.map(percent));
        add(format!("accuracy, change in points, {}", task.task), &|c| {
            change(c).map(|t| points(t.difference))
        });
        add(format!("probability that it got worse, {}", task.task), &|c| {
            change(c).map(|t| format!("{:.3}", t.worse))
        });
    }
    for (i, text) in eval.base.perplexity.iter().enumerate() {
        add(format!("perplexity ratio, {}", text.corpus), &|c| {
            compared[c].perplexity.get(i).map(|p| times(p.ratio))
        });
    }
    add("texts broken that are sound with the base model".into(), &|c| compared[c].broken.map(percent));
    add("prefill speed".into(), &|c| compared[c].prefill_speedup.map(times));
    add("decode speed".into(), &|c| compared[c].decode_speedup.map(times));
    let head: Vec<&str> = std::iter::once("").chain(compared.iter().map(|c| c.checkpoint.as_str())).collect();
    table(out, &head, &rows);
    put(out, "</section>");
}

fn percent(e: Estimate) -> String {
    format!("{:.1} % ({:.1} to {:.1})", 100.0 * e.value, 100.0 * e.low, 100.0 * e.high)
}

fn points(e: Estimate) -> String {
    format!("{:+.1} ({:+.1} to {:+.1})", 100.0 * e.value, 100.0 * e.low, 100.0 * e.high)
}

fn times(e: Estimate) -> String {
    format!("×{:.3} ({:.3} to {:.3})", e.value, e.low, e.high)
}

/// What the checkpoints wrote after the same prompts, side by side.
pub fn texts(out: &mut String, report: &Report) {
    let eval = &report.eval;
    let all: Vec<(&str, &Generation)> =
        [("base", Some(&eval.base)), ("pruned", Some(&eval.pruned)), ("healed", eval.healed.as_ref())]
            .into_iter()
            .filter_map(|(name, scores)| Some((name, scores?.generation.as_ref()?)))
            .collect();
    let Some((_, base)) = all.first() else { return };
    put(out, "<section><h2>What they write</h2>");
    for (sampled, title) in [(false, "The likeliest token each time"), (true, "Sampled")] {
        let places: Vec<usize> =
            (0..base.texts.len()).filter(|i| base.texts[*i].sampled == sampled).take(SHOWN).collect();
        put(out, &format!("<details{}><summary>{title}</summary>", if sampled { "" } else { " open" }));
        put(out, "<div class='scroll'><table class='wide texts'><thead><tr><th scope='col'>prompt</th>");
        all.iter().for_each(|(name, _)| put(out, &format!("<th scope='col'>{name}</th>")));
        put(out, "</tr></thead><tbody>");
        for i in places {
            put(out, &format!("<tr><td>{}</td>", escape(&base.texts[i].prompt)));
            for text in all.iter().filter_map(|(_, written)| written.texts.get(i)) {
                put(out, &format!("<td>{}{}</td>", escape(&text.text), flaw(text)));
            }
            put(out, "</tr>");
        }
        put(out, "</tbody></table></div></details>");
    }
    put(out, "</section>");
}

fn flaw(text: &WrittenText) -> String {
    let said = match text.flaw {
        None => return String::new(),
        Some(Flaw::Empty) => "empty",
        Some(Flaw::Repetitive) => "repetitive",
        Some(Flaw::Drifted) => "another script",
        Some(Flaw::Unlikely) => "unlikely to the base model",
    };
    format!(" <small>[{said}]</small>")
}
