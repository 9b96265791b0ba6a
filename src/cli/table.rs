//! A table for a terminal.

use std::fmt::Write;

/// Labels and cells in columns; all rows have as many cells as the first.
pub fn table(rows: &[(String, Vec<String>)]) -> String {
    let width = |text: &String| text.chars().count();
    let first = rows.iter().map(|(label, _)| width(label)).max().unwrap_or(0);
    let columns = rows.first().map_or(0, |(_, cells)| cells.len());
    let widths: Vec<usize> =
        (0..columns).map(|i| rows.iter().map(|(_, cells)| width(&cells[i])).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for (label, cells) in rows {
        write!(out, "{label:<first$}").ok();
        for (cell, width) in cells.iter().zip(&widths) {
            write!(out, "  {cell:>width$}").ok();
        }
        out.push('\n');
    }
    out
}
