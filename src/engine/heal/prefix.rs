//! The frozen layers below all that is trained: what leaves them is the same in every epoch, so it is computed in the
//! first and kept.

use candle_core::Tensor;

use super::backward::Entering;
use super::windows::Windows;
use crate::engine::Result;
use crate::engine::model::streams::Streams;
use crate::engine::model::{Batch, Decoder};

/// The streams of all windows entering one layer, each computed when it is asked for first, by itself: a run that was
/// killed and computes it again comes to the same.
pub struct Prefix {
    layer: usize,
    streams: Streams,
    kept: Vec<bool>,
}

impl Prefix {
    /// Room for the streams entering `layer`.
    pub fn new(decoder: &Decoder, layer: usize, windows: &Windows) -> Result<Self> {
        let rows = windows.train.iter().map(Vec::len);
        let streams = Streams::new(rows, decoder.config().hidden_size, decoder.compute())?;
        Ok(Self { layer, streams, kept: vec![false; windows.train.len()] })
    }

    /// The streams of the windows with these numbers, one behind the other.
    pub fn entering<'a>(
        &mut self,
        decoder: &Decoder,
        windows: impl Iterator<Item = (usize, &'a [u32])>,
    ) -> Result<Entering> {
        let one = |(number, window): (usize, &[u32])| {
            if !self.kept[number] {
                let batch = Batch::of(&[window]);
                let x = decoder.embed(&batch)?;
                let x = decoder.layers(x, &decoder.pass(&batch), 0..self.layer, |_, _| Ok(()))?;
                self.streams.set(number, &x)?;
                self.kept[number] = true;
            }
            self.streams.get(number)
        };
        let streams: Vec<Tensor> = windows.map(one).collect::<Result<_>>()?;
        Ok(Entering { layer: self.layer, stream: Tensor::cat(&streams, 0)? })
    }
}
