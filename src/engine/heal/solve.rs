//! Systems of linear equations with a symmetric positive definite matrix, in float64, by Cholesky's factors. Blocks of
//! them are multiplied by candle's product, which knows the processor.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

/// Rows and columns of a block.
const BLOCK: usize = 64;
/// Rows of a product that are there at a time beside the sum.
const ROWS: usize = 512;

/// The matrix is not positive definite, or not by more than rounding.
#[derive(Debug)]
pub struct Singular;

/// Adds `a b`, for `a [n, k]` and `b [k, m]`, float64, to `sum`, row by row.
pub fn add_product(sum: &mut [f64], a: &Tensor, b: &Tensor) -> Result<()> {
    let (n, m) = (a.dim(0)?, b.dim(1)?);
    for first in (0..n).step_by(ROWS) {
        let product: Vec<f64> =
            a.narrow(0, first, ROWS.min(n - first))?.matmul(b)?.flatten_all()?.to_vec1()?;
        let sum = &mut sum[first * m..][..product.len()];
        sum.par_chunks_mut(m).zip(product.par_chunks(m)).for_each(|(sum, product)| {
            sum.iter_mut().zip(product).for_each(|(sum, product)| *sum += product);
        });
    }
    Ok(())
}

/// Solves `A x = b` for symmetric `a [n, n]` and `b [n, m]`, row by row: `b` becomes `x`, and `a` its factor.
///
/// # Errors
/// [`Singular`] when `a` is not positive definite.
///
/// # Panics
/// When the sizes do not fit.
pub fn solve(a: &mut [f64], b: &mut [f64], n: usize) -> std::result::Result<(), Singular> {
    assert!(a.len() == n * n && b.len().is_multiple_of(n), "equations that do not fit. This is a bug.");
    factor(a, n)?;
    let m = b.len() / n;
    let starts: Vec<usize> = (0..n).step_by(BLOCK).collect();
    // L y = b, from above.
    for start in &starts {
        let rows = *start..(start + BLOCK).min(n);
        let left: Vec<f64> = rows.clone().flat_map(|i| a[i * n..i * n + start].iter().copied()).collect();
        let (above, rest) = b.split_at_mut(start * m);
        let here = &mut rest[..rows.len() * m];
        subtract(here, &left, above, (rows.len(), *start, m));
        for (i, row) in rows.clone().enumerate() {
            let (done, here) = here.split_at_mut(i * m);
            let factors = &a[row * n + start..row * n + start + i];
            eliminate(&mut here[..m], factors.iter().zip(done.chunks(m)), a[row * n + row]);
        }
    }
    // Lᵀ x = y, from below.
    for start in starts.iter().rev() {
        let rows = *start..(start + BLOCK).min(n);
        let left: Vec<f64> = rows
            .clone()
            .flat_map(|i| (rows.end..n).map(move |j| (i, j)))
            .map(|(i, j)| a[j * n + i])
            .collect();
        let (rest, below) = b.split_at_mut(rows.end * m);
        let here = &mut rest[start * m..];
        subtract(here, &left, below, (rows.len(), n - rows.end, m));
        for (i, row) in rows.clone().enumerate().rev() {
            let (here, done) = here.split_at_mut((i + 1) * m);
            let factors: Vec<f64> = (row + 1..rows.end).map(|j| a[j * n + row]).collect();
            eliminate(&mut here[i * m..], factors.iter().zip(done.chunks(m)), a[row * n + row]);
        }
    }
    Ok(())
}

/// A row of unknowns, when others are known: `row ← (row − Σ factor · known) / pivot`.
fn eliminate<'a>(row: &mut [f64], known: impl Iterator<Item = (&'a f64, &'a [f64])>, pivot: f64) {
    for (factor, known) in known {
        row.iter_mut().zip(known).for_each(|(value, known)| *value -= factor * known);
    }
    row.iter_mut().for_each(|value| *value /= pivot);
}

/// `a = L Lᵀ`: the lower triangle of `a` becomes `L`.
fn factor(a: &mut [f64], n: usize) -> std::result::Result<(), Singular> {
    // Less than this of a diagonal element is rounding.
    let least: Vec<f64> = (0..n).map(|i| a[i * n + i] * n as f64 * f64::EPSILON).collect();
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        for j in start..end {
            for i in j..end {
                let known: f64 = (start..j).map(|k| a[i * n + k] * a[j * n + k]).sum();
                let value = a[i * n + j] - known;
                if i > j {
                    a[i * n + j] = value / a[j * n + j];
                } else if value > least[j] {
                    a[j * n + j] = value.sqrt();
                } else {
                    return Err(Singular);
                }
            }
        }
        let (done, below) = a.split_at_mut(end * n);
        below.par_chunks_mut(n).for_each(|row| {
            for j in start..end {
                let of_j = &done[j * n..];
                let known: f64 = row[start..j].iter().zip(&of_j[start..j]).map(|(a, b)| a * b).sum();
                row[j] = (row[j] - known) / of_j[j];
            }
        });
        // What is left, block row by block row: its lower triangle only.
        let panel: Vec<f64> = below.chunks(n).flat_map(|row| row[start..end].iter().copied()).collect();
        let width = end - start;
        below.chunks_mut(ROWS * n).enumerate().for_each(|(i, rows)| {
            let (first, count) = (i * ROWS, rows.len() / n);
            let upto = first + count;
            let turned = transposed(&panel[..upto * width], width);
            let mut part: Vec<f64> =
                rows.chunks(n).flat_map(|row| row[end..end + upto].iter().copied()).collect();
            subtract(&mut part, &panel[first * width..upto * width], &turned, (count, width, upto));
            for (row, part) in rows.chunks_mut(n).zip(part.chunks(upto)) {
                row[end..end + upto].copy_from_slice(part);
            }
        });
    }
    Ok(())
}

/// `[rows, width]` as `[width, rows]`.
fn transposed(values: &[f64], width: usize) -> Vec<f64> {
    (0..width).flat_map(|column| values[column..].iter().step_by(width).copied()).collect()
}

/// `sum − a b`, for `a [n, k]` and `b [k, m]`.
fn subtract(sum: &mut [f64], a: &[f64], b: &[f64], (n, k, m): (usize, usize, usize)) {
    if k == 0 || n == 0 {
        return;
    }
    let product = || -> Result<Vec<f64>> {
        let (a, b) =
            (Tensor::from_slice(a, (n, k), &Device::Cpu)?, Tensor::from_slice(b, (k, m), &Device::Cpu)?);
        a.matmul(&b)?.flatten_all()?.to_vec1()
    };
    let product = product().expect("a product of two matrices that fit. This is a bug.");
    sum.par_chunks_mut(4096).zip(product.par_chunks(4096)).for_each(|(sum, product)| {
        sum.iter_mut().zip(product).for_each(|(sum, product)| *sum -= product);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::chance::unit;

    #[test]
    fn a_solution_solves_whatever_the_size() {
        for n in [1, 5, 64, 65, 200, 700] {
            let m = 3;
            // Rows of noise, and a little more on the diagonal.
            let noise: Vec<f64> = (0..n * n).map(|i| unit(1, i as u64) - 0.5).collect();
            let mut a = vec![0.0; n * n];
            for i in 0..n {
                for j in 0..n {
                    a[i * n + j] = (0..n).map(|k| noise[i * n + k] * noise[j * n + k]).sum::<f64>();
                }
                a[i * n + i] += 0.1;
            }
            let x: Vec<f64> = (0..n * m).map(|i| unit(2, i as u64) - 0.5).collect();
            let mut b = vec![0.0; n * m];
            for (i, j) in (0..n).flat_map(|i| (0..m).map(move |j| (i, j))) {
                b[i * m + j] = (0..n).map(|k| a[i * n + k] * x[k * m + j]).sum();
            }
            solve(&mut a, &mut b, n).unwrap();
            let worst = b.iter().zip(&x).map(|(b, x)| (b - x).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-9, "{n}: {worst}");
        }
    }

    #[test]
    fn a_matrix_without_a_solution_is_told() {
        let mut a = vec![1.0, 2.0, 2.0, 4.0];
        assert!(solve(&mut a, &mut [1.0, 1.0], 2).is_err());
        let mut negative = vec![-1.0];
        assert!(solve(&mut negative, &mut [1.0], 1).is_err());
    }
}
