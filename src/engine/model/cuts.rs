//! Several cuts of one model in one walk: what they have in common is computed once.
//!
//! Two cuts go the same way up to the first layer that one leaves out and the other does not. So streams run
//! through each layer once for all cuts that still agree, and part where they do not: of a greedy step's
//! candidates only the layers behind the one left out are computed for each.

use super::Decoder;
use super::layer::Pass;
use super::streams::Streams;
use crate::engine::Result;

/// Cuts of one model.
#[derive(Clone, Copy)]
pub struct Cuts<'a> {
    /// The layers that each leaves out.
    pub left_out: &'a [&'a [u32]],
    /// By layer: what the stream is multiplied by where the layer is left out, so that it has the size it should have
    /// behind it; nothing is done about it when absent.
    pub growth: Option<&'a [f64]>,
}

impl<'a> Cuts<'a> {
    /// These, and nothing done about them.
    pub fn plain(left_out: &'a [&'a [u32]]) -> Self {
        Self { left_out, growth: None }
    }
}

/// Takes `streams`, those entering layer 0, through the layers that each cut leaves. `each(which, streams)` sees the streams leaving the last layer for the cuts `which`, which
/// are alike; `check` is called between layers.
///
/// # Errors
/// Those of `each` and `check`, and of reading weights or streams.
pub fn carry_cuts(
    decoder: &Decoder,
    streams: Streams,
    passes: &[Pass],
    cuts: Cuts,
    check: &dyn Fn() -> Result<()>,
    each: &mut dyn FnMut(&[usize], &Streams) -> Result<()>,
) -> Result<()> {
    let all: Vec<usize> = (0..cuts.left_out.len()).collect();
    Walk { decoder, passes, cuts, check, each }.from(0, &all, streams)
}

struct Walk<'a> {
    decoder: &'a Decoder,
    passes: &'a [Pass],
    cuts: Cuts<'a>,
    check: &'a dyn Fn() -> Result<()>,
    each: &'a mut dyn FnMut(&[usize], &Streams) -> Result<()>,
}

impl Walk<'_> {
    /// Goes on from the seam before `layer` with the cuts `which`, which agree on all layers before it.
    fn from(&mut self, layer: usize, which: &[usize], mut streams: Streams) -> Result<()> {
        let layer_count = self.decoder.config().layer_count;
        let leaves_out = |cut: &usize, layer: usize| self.cuts.left_out[*cut].contains(&(layer as u32));
        let parting = |layer: &usize| which.iter().any(|cut| leaves_out(cut, *layer));
        let next = (layer..layer_count).find(parting);
        let alike: Vec<usize> = (layer..next.unwrap_or(layer_count)).collect();
        self.decoder.carry(&mut streams, self.passes, &alike, |_, _, _| (self.check)())?;
        let Some(next) = next else { return (self.each)(which, &streams) };
        let (without, with): (Vec<usize>, Vec<usize>) = which.iter().partition(|cut| leaves_out(cut, next));
        if with.is_empty() {
            return self.leave_out(next, &without, streams);
        }
        // Those that part first: behind them nobody needs the streams of this seam any more.
        self.leave_out(next, &without, streams.copy()?)?;
        self.decoder.carry(&mut streams, self.passes, &[next], |_, _, _| (self.check)())?;
        self.from(next + 1, &with, streams)
    }

    /// Goes on behind `layer` with cuts that leave it out.
    fn leave_out(&mut self, layer: usize, which: &[usize], mut streams: Streams) -> Result<()> {
        if let Some(growth) = self.cuts.growth {
            for i in 0..streams.len() {
                let x = (streams.get(i)? * growth[layer])?;
                streams.set(i, &x)?;
            }
        }
        self.from(layer + 1, which, streams)
    }
}
