//! The decoder: a loop over layers that we own. Between two layers lies one
//! tensor, the residual stream; everything else in the house happens there.

use std::ops::Range;

use candle_core::Tensor;

use super::batch::{Batch, InCommon, batches, beginning, nothing};
use super::cache::{KvCache, Slot};
use super::checkpoint::Checkpoint;
pub use super::head::HeadLoss;

use super::Compute;
use super::head::Head;
use super::kernel::attention::Sequence;
use super::kernel::map::Map;
use super::kernel::rows::{Likelihood, Odds, SoftTarget};
use super::layer::{Layer, Pass};
use super::streams::Streams;
use super::weight::Weight;
use crate::checkpoint::Config;
use crate::engine::{Error, Result};
use crate::job::spec::BaseFormat;

/// A decoder ready to run. On the processor its weights stay in the mapped files; on another device, layers
/// that do not fit in memory together are read when their turn comes.
pub struct Decoder {
    checkpoint: Checkpoint,
    compute: Compute,
    /// `[vocab, h]`.
    embedding: Weight,
    /// Learned positions, `[max_position_embeddings, h]`.
    positions: Option<Tensor>,
    head: Head,
    layers: Vec<Stored>,
    /// The mapped weights do not stay in memory: what was used is let go of.
    streamed: bool,
}

/// How a layer's weights are kept between uses.
enum Stored {
    /// Ready to run.
    Resident(Box<Layer>),
    /// Quantised, its codes in a file of our own.
    Spilled(Box<Layer>, Map),
    /// In the mapped file only.
    OnDisk,
}

/// Rows that go through a layer at once.
const MOST_ROWS: usize = 1024;
const LEAST_ROWS: usize = 64;

/// Tokens sent through a checkpoint that was just written.
const PROOF_TOKENS: usize = 8;

impl Decoder {
    /// Opens a decoder for inference: resident if it fits in memory, else streamed layer by layer.
    pub fn open(checkpoint: &Checkpoint, compute: &Compute) -> Result<Self> {
        let resident = compute.native() || !compute.device.is_cpu() || {
            let needed = checkpoint.parameters() as usize * compute.dtype.size_in_bytes();
            needed <= compute.memory.share(3, 4)
        };
        Self::with_layers(checkpoint, compute, |index| {
            Ok(if resident {
                Stored::Resident(Box::new(Layer::load(checkpoint, index, compute)?))
            } else {
                Stored::OnDisk
            })
        })
    }

    /// Sends a few tokens through the checkpoint called `name`: it must give numbers.
    ///
    /// # Errors
    /// A model error when it does not.
    pub fn prove(&self, name: &str) -> Result<()> {
        let config = self.config();
        let len = PROOF_TOKENS.min(config.max_position_embeddings);
        let tokens: Vec<u32> = (0..len).map(|i| (i * 7919 % config.vocab_size) as u32).collect();
        let x = self.forward(&Batch::of(&[&tokens]))?;
        let sum = self.logits(&x)?.sum_all()?.to_scalar::<f32>()?;
        if sum.is_finite() {
            return Ok(());
        }
        Err(Error::model(format!(
            "{name}: the first tokens sent through it give numbers that are not finite; its values overflow in this \
             precision (try --precision f32), or the base is damaged"
        )))
    }

    /// Opens a decoder whose linear layers have the values that `format` leaves them, and are kept so: in
    /// memory if they fit, else in a file.
    pub fn open_frozen(checkpoint: &Checkpoint, compute: &Compute, format: BaseFormat) -> Result<Self> {
        let mut room = compute.memory.share(1, 4) as u64;
        let bits = match format {
            BaseFormat::Sixteen => 16,
            BaseFormat::Int8 => 8,
            BaseFormat::Four(_) => 4,
        };
        let each = checkpoint.layer_bytes() / 16 * bits;
        Self::with_layers(checkpoint, compute, |index| {
            if format == BaseFormat::Sixteen && !compute.native() {
                return Ok(Stored::OnDisk);
            }
            let layer = Layer::load(checkpoint, index, compute)?;
            if format == BaseFormat::Sixteen {
                return Ok(Stored::Resident(Box::new(layer)));
            }
            let config = checkpoint.config();
            let linears = config.linears(index);
            let layer = layer.quantised(format, compute, |i| {
                checkpoint.release(&format!("{}.weight", config.in_layer(index, linears[i].name)));
            })?;
            if room < each && compute.native() {
                let (layer, map) = layer.spilled(&compute.memory)?;
                map.release(0..map.len());
                return Ok(Stored::Spilled(Box::new(layer), map));
            }
            room = room.saturating_sub(each);
            Ok(Stored::Resident(Box::new(layer)))
        })
    }

    fn with_layers(
        checkpoint: &Checkpoint,
        compute: &Compute,
        mut store: impl FnMut(usize) -> Result<Stored>,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let names = config.family.names;
        if compute.device.is_cpu() {
            compute.memory.check(checkpoint.layer_bytes())?;
        }
        let read = |name: String| checkpoint.tensor(&name, compute.dtype, &compute.device);
        let embedding = Weight::load_vocabulary(checkpoint, &config.embedding(), compute)?;
        let head = Head::load(checkpoint, &embedding, compute)?;
        Ok(Self {
            embedding,
            positions: names.positions.map(|name| read(config.tensor(name))).transpose()?,
            head,
            layers: (0..config.layer_count).map(&mut store).collect::<Result<_>>()?,
            streamed: checkpoint.size_bytes() > compute.memory.share(1, 2) as u64,
            checkpoint: checkpoint.clone(),
            compute: compute.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        self.checkpoint.config()
    }

    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// Layer `index`, its weights ready to use. Dropping it frees them unless they are resident.
    pub fn layer(&self, index: usize) -> Result<Layer> {
        match &self.layers[index] {
            Stored::Resident(layer) | Stored::Spilled(layer, _) => Ok(Layer::clone(layer)),
            Stored::OnDisk => Layer::load(&self.checkpoint, index, &self.compute),
        }
    }

    /// Whether the weights are too many for the memory, so that each layer is read when its turn comes.
    pub fn streamed(&self) -> bool {
        self.streamed
    }

    /// Has a layer's weights read from the disk while other things are done.
    pub fn read_ahead(&self, index: usize) {
        match self.layers.get(index) {
            None => {}
            Some(Stored::Spilled(_, map)) => map.read_ahead(0..map.len()),
            Some(Stored::Resident(_) | Stored::OnDisk) if self.streamed => self.checkpoint.read_ahead(index),
            Some(Stored::Resident(_) | Stored::OnDisk) => {}
        }
    }

    /// Lets go of a layer's weights for now, where they do not stay in memory.
    pub fn release(&self, index: usize) {
        match &self.layers[index] {
            Stored::Spilled(_, map) => map.release(0..map.len()),
            Stored::Resident(_) | Stored::OnDisk if self.streamed => self.checkpoint.release_layer(index),
            Stored::Resident(_) | Stored::OnDisk => {}
        }
    }

    /// The same for the embedding and the head.
    fn release_vocabulary(&self) {
        if self.streamed {
            let config = self.config();
            self.checkpoint.release(&config.embedding());
            self.checkpoint.release(&format!("{}.weight", config.family.names.head));
        }
    }

    /// Memory that a training step may keep activations in, instead of computing them again: a third of a
    /// step's time is worth memory that nobody uses, but not much of it.
    pub fn room_bytes(&self) -> usize {
        self.compute.memory.share(1, 24)
    }

    /// Rows that go through a layer at once: as many as make good use of it, fewer where what it computes
    /// would take too much memory.
    pub fn rows_at_once(&self) -> usize {
        let config = self.config();
        let widths =
            8 * config.hidden_size + 4 * config.intermediate_size + 2 * config.head_count * config.head_dim;
        (self.compute.memory.share(1, 8) / (widths * size_of::<f32>())).clamp(LEAST_ROWS, MOST_ROWS)
    }

    /// Positions and texts of the rows of `batch`.
    pub fn pass(&self, batch: &Batch) -> Pass {
        self.pass_from(Vec::new(), batch)
    }

    /// The same for texts of which a cache holds the beginning, each in a slot.
    fn pass_from(&self, slots: Vec<Slot>, batch: &Batch) -> Pass {
        Pass::new(self.config(), batch, slots, self.compute.dtype, &self.compute.device)
    }

    /// The stream entering layer 0, `[rows, h]`.
    pub fn embed(&self, batch: &Batch) -> Result<Tensor> {
        self.embed_from(&[], batch)
    }

    /// The same for texts of which a cache holds the beginning.
    fn embed_from(&self, slots: &[Slot], batch: &Batch) -> Result<Tensor> {
        let mut x = self.embedding.rows(&batch.tokens, self.compute.dtype, &self.compute.device)?;
        if self.config().embedding_scale != 1.0 {
            x = (x * self.config().embedding_scale)?;
        }
        if let Some(positions) = &self.positions {
            let most = positions.dim(0)?;
            let of = |(i, text): (usize, &Sequence)| {
                let first = slots.get(i).map_or(0, |slot| slot.read) + text.past();
                first..first + text.queries.len()
            };
            let places = batch.sequences.iter().enumerate().flat_map(of);
            let places: Vec<u32> = places.map(|place| place as u32).collect();
            if let Some(last) = places.iter().find(|place| **place as usize >= most) {
                return Err(Error::spec(format!(
                    "a text of {} tokens or more, but the model has learned {most} positions",
                    last + 1
                )));
            }
            x = (x + positions.index_select(&Tensor::new(places, &self.compute.device)?, 0)?)?;
        }
        Ok(x)
    }

    /// Runs layers `range` on the stream `x [rows, h]`; `visit(l, stream)` sees the stream entering
    /// layer `l` for each seam `l` behind a layer run: `range.start + 1 ..= range.end`.
    pub fn layers(
        &self,
        x: Tensor,
        pass: &Pass,
        range: Range<usize>,
        mut visit: impl FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let mut x = x;
        for index in range {
            self.read_ahead(index + 1);
            x = self.layer(index)?.forward(&x, pass, None)?;
            self.release(index);
            visit(index + 1, &x)?;
        }
        Ok(x)
    }

    /// Takes the streams of many batches through `layers`, all of them through one before the next, so that
    /// each layer's weights are read once. `visit(layer, batch, stream)` sees what leaves each layer.
    pub fn carry(
        &self,
        streams: &mut Streams,
        passes: &[Pass],
        layers: &[usize],
        mut visit: impl FnMut(usize, usize, &Tensor) -> Result<()>,
    ) -> Result<()> {
        self.carry_by(streams, layers, |layer, index, batch, x| {
            let x = layer.forward(x, &passes[batch], None)?;
            visit(index, batch, &x)?;
            Ok(x)
        })
    }

    /// The same with a layer's work done by `run(layer, its index, batch, stream)`.
    pub fn carry_by(
        &self,
        streams: &mut Streams,
        layers: &[usize],
        mut run: impl FnMut(&Layer, usize, usize, &Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        for (i, index) in layers.iter().enumerate() {
            let layer = self.layer(*index)?;
            if let Some(next) = layers.get(i + 1) {
                self.read_ahead(*next);
            }
            for batch in 0..streams.len() {
                let x = run(&layer, *index, batch, &streams.get(batch)?)?;
                streams.set(batch, &x)?;
            }
            self.release(*index);
        }
        Ok(())
    }

    /// Texts packed into batches of at most `at_most`: their positions, and their streams entering layer 0.
    pub fn packed(&self, texts: &[&[u32]], at_most: usize) -> Result<(Vec<Pass>, Streams)> {
        let parts = batches(texts, self.rows_at_once(), at_most, nothing);
        let batches: Vec<Batch> = parts.into_iter().map(|part| Batch::of(&texts[part])).collect();
        Ok((batches.iter().map(|batch| self.pass(batch)).collect(), self.streams(&batches)?))
    }

    /// The streams of `batches` entering layer 0.
    pub fn streams(&self, batches: &[Batch]) -> Result<Streams> {
        let rows = batches.iter().map(|batch| batch.tokens.len());
        let mut streams = Streams::new(rows, self.config().hidden_size, &self.compute)?;
        for (i, batch) in batches.iter().enumerate() {
            streams.set(i, &self.embed(batch)?)?;
        }
        self.release_vocabulary();
        Ok(streams)
    }

    /// The stream leaving the last layer, `[rows, h]`, before the final norm.
    pub fn forward(&self, batch: &Batch) -> Result<Tensor> {
        self.layers(self.embed(batch)?, &self.pass(batch), 0..self.config().layer_count, |_, _| Ok(()))
    }

    /// An empty cache for `slots` texts of at most `capacity` tokens.
    pub fn cache(&self, slots: usize, capacity: usize) -> Result<KvCache> {
        KvCache::new(self.config(), slots, capacity, self.compute.dtype, &self.compute.device)
    }

    /// The place in a text of `len` tokens from where on it must be read, with what `cache` holds of it in
    /// `slot`. Usually the end of that; but some rotations turn all tokens anew when a text outgrows a length,
    /// and then the slot is emptied.
    pub fn unread(&self, cache: &mut KvCache, slot: usize, len: usize) -> usize {
        let read = &mut cache.read[slot];
        if *read > 0 && self.config().ropes.iter().any(|rope| rope.changes(*read, len)) {
            *read = 0;
        }
        *read
    }

    /// The stream for the next tokens of texts whose beginnings are in these `slots` of `cache`, in the order of
    /// the batch; as [`Self::forward`]. Texts may differ in length.
    pub fn step(&self, batch: &Batch, slots: &[usize], cache: &mut KvCache) -> Result<Tensor> {
        let places: Vec<Slot> = slots.iter().map(|slot| cache.slot(*slot)).collect();
        let mut x = self.embed_from(&places, batch)?;
        let pass = self.pass_from(places, batch);
        for (index, cache) in cache.layers.iter_mut().enumerate() {
            self.read_ahead(index + 1);
            x = self.layer(index)?.forward(&x, &pass, Some(cache))?;
            self.release(index);
        }
        for (slot, text) in slots.iter().zip(&batch.sequences) {
            cache.read[*slot] += text.queries.len();
        }
        Ok(x)
    }

    /// What [`Batch::sharing`] may take as common to neighbours of `texts`: what they begin with, unless the model
    /// turns long texts otherwise than short ones.
    pub fn in_common(&self, texts: &[&[u32]]) -> InCommon {
        let lengths = texts.iter().map(|text| text.len());
        let (least, most) = (lengths.clone().min().unwrap_or(0), lengths.max().unwrap_or(0));
        let turns = self.config().ropes.iter().any(|rope| rope.changes(least, most));
        if turns { nothing } else { beginning }
    }

    /// Final norm and head: streams `[n, h]` to logits `[n, vocab]`, float32.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.at_head(|head| head.logits(x))
    }

    /// What `of(row, logarithms of the probabilities of all tokens)` makes of each row of `x [n, h]`.
    pub fn each_prediction<T: Send>(
        &self,
        x: &Tensor,
        of: impl Fn(usize, &[f32]) -> T + Sync,
    ) -> Result<Vec<T>> {
        self.at_head(|head| head.each_prediction(x, of))
    }

    /// How likely `targets[i]` is after the stream `x[i]`, for `x [n, h]` as [`Self::forward`] gives it.
    pub fn likelihoods(&self, x: &Tensor, targets: &[u32]) -> Result<Vec<Likelihood>> {
        Ok(self.odds(x, targets)?.iter().map(Odds::likelihood).collect())
    }

    /// The same, and which token is the likeliest.
    pub fn odds(&self, x: &Tensor, targets: &[u32]) -> Result<Vec<Odds>> {
        self.at_head(|head| head.odds(x, targets))
    }

    /// Cross-entropy of `targets[i]` and what is predicted after the stream `x[i]`, for `x [n, h]` as
    /// [`Self::forward`] gives it, and the gradients of `scale` times their sum; with a `trained` weight
    /// `[vocab, h]` in the place of the head's.
    pub fn token_nll_backward(
        &self,
        x: &Tensor,
        targets: &[SoftTarget],
        scale: f64,
        trained: Option<&Tensor>,
    ) -> Result<HeadLoss> {
        let of_trained = trained.map(|weight| self.head.trained(weight, &self.compute)).transpose()?;
        self.at_head(|head| of_trained.as_ref().unwrap_or(head).backward(x, targets, scale))
    }

    fn at_head<T>(&self, work: impl FnOnce(&Head) -> Result<T>) -> Result<T> {
        let out = work(&self.head);
        self.release_vocabulary();
        out
    }
}
