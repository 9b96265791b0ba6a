//! Cut and quantisation together: base, the checkpoint to ship, and its files of fewer bits.

use super::{bytes, columns, shipped};
use crate::job::report::{EvalReport, Perplexity, TaskScore};

/// The table of exported files: its head, and a row for the base model, one for the checkpoint to ship and one for each
/// file. Empty where nothing was exported.
pub fn exports(eval: &EvalReport) -> (Vec<String>, Vec<Vec<String>>) {
    if eval.gguf.is_empty() {
        return (Vec::new(), Vec::new());
    }
    let mut head: Vec<String> = ["", "size", "smaller", "bits per weight"].map(String::from).to_vec();
    head.extend(eval.base.perplexity.iter().map(|text| format!("perplexity, {}", text.corpus)));
    head.extend(eval.base.tasks.iter().map(|task| format!("accuracy, {}", task.task)));
    let base = &eval.base;
    let row = |name: String, size: u64, bits: f64, texts: &[Perplexity], tasks: &[TaskScore]| {
        let smaller = base.size_bytes as f64 / size.max(1) as f64;
        let mut cells = vec![name, bytes(size as f64), format!("×{smaller:.2}"), format!("{bits:.2}")];
        cells.extend(texts.iter().zip(&base.perplexity).map(|(text, before)| {
            format!("{:.2} (×{:.3})", text.value, text.value / before.value.max(f64::MIN_POSITIVE))
        }));
        cells.extend(tasks.iter().map(|task| format!("{:.3} ± {:.3}", task.acc, task.stderr)));
        cells
    };
    let of = |name: &str, scores: &crate::job::report::Scores| {
        let bits = 8.0 * scores.size_bytes as f64 / scores.parameters.max(1) as f64;
        row(name.to_owned(), scores.size_bytes, bits, &scores.perplexity, &scores.tasks)
    };
    let name = columns(eval).last().copied().unwrap_or_default();
    let mut rows = vec![of("base", base), of(name, shipped(eval))];
    rows.extend(eval.gguf.iter().map(|one| {
        let name = format!("{name}, {}", one.file.kind.name());
        row(name, one.file.size_bytes, one.file.bits_per_weight, &one.perplexity, &one.tasks)
    }));
    (head, rows)
}
