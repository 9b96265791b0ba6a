//! Products of a few rows: each row of the matrix is read once, as it is stored, and multiplied with all of
//! them. What takes the time is the memory.

use rayon::prelude::*;

use super::left::Form;
use super::matrix::Dot;
use super::product::{FEW, Out, Start, Term};

/// Results of one task.
const TASK: usize = 64;

/// As [`super::product::sum`], all matrices by their rows.
pub(super) fn sum(terms: &[Term], out: &Out, start: Start) {
    let results = terms.first().map_or(0, |term| term.right.rows);
    (0..results.div_ceil(TASK)).into_par_iter().for_each(|task| {
        for column in task * TASK..((task + 1) * TASK).min(results) {
            let (mut sums, add) = match start {
                Start::Zero => ([0f32; FEW], false),
                Start::Bias(bias) => ([bias[column]; FEW], false),
                Start::Target => ([0f32; FEW], true),
            };
            for term in terms {
                let Form::Floats(values) = &term.left.form else {
                    unreachable!("few rows are kept as floats. This is a bug.")
                };
                term.right.dot(column, Dot { values, rows: out.rows }, &mut sums);
            }
            for (row, sum) in sums.iter().enumerate().take(out.rows) {
                out.set(row, column, add, *sum);
            }
        }
    });
}
