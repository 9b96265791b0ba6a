//! What a job will take, reckoned before it is paid for: layers and bytes, work and memory of each stage.
//!
//! Products are counted as two operations for each weight that a token meets, as usual (arXiv 2001.08361, table 1);
//! training adds those of the gradients. Decoding one token at a time is bound by reading the weights.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::heal::{HealMethod, HealSettings, WholeSettings};
use super::preset::ModelFacts;
use super::progress::Stage;
use super::spec::{Corpus, JobSpec, Strategy, TaskSpec};
use super::training::{BaseBits, Training};

/// What a plan must know of the base model, besides [`ModelFacts`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anatomy {
    pub size_bytes: u64,
    pub parameters: u64,
    /// Of embedding, learned positions and head.
    pub embedding_parameters: u64,
    /// Of each layer.
    pub layer_parameters: Vec<u64>,
    pub layer_bytes: Vec<u64>,
}

/// What a job will take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// Layers that go, at least and at most: a budget leaves it open.
    pub least_layers: u32,
    pub most_layers: u32,
    pub base: Footprint,
    /// With the most layers left that the job may leave.
    pub pruned: Footprint,
    pub stages: Vec<StagePlan>,
    /// Peak of the stage that takes most, with all weights in memory. `--memory-limit` does with less, and longer.
    pub memory_bytes: u64,
    /// What the job writes.
    pub disk_bytes: u64,
    /// What could not be reckoned, and other things to know.
    pub notes: Vec<String>,
}

/// A checkpoint in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Footprint {
    pub layer_count: u32,
    pub parameters: u64,
    /// Of the weight files.
    pub size_bytes: u64,
}

/// What a stage will take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StagePlan {
    pub stage: Stage,
    /// Floating-point operations of products.
    pub flops: f64,
    /// Weights read to decode token by token.
    pub read_bytes: f64,
    pub memory_bytes: u64,
    /// Written to disk.
    pub disk_bytes: u64,
    /// How long it takes on the machine that was asked about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Machine {
    /// In a product of frozen weights with many rows.
    pub flops_per_s: f64,
    /// Of weights, in a product with one row.
    pub bytes_per_s: f64,
}

/// Of English in the vocabularies of the field.
const BYTES_PER_TOKEN: f64 = 4.2;
/// What the rest of a layer and of the machine takes beside products of many rows, by measure on small and large models.
const EFFICIENCY: f64 = 0.85;
/// Writing, digesting and reading back what was written.
const DISK_BYTES_PER_S: f64 = 4e8;
/// The program, a tokenizer and what it works in.
const PROGRAM_BYTES: u64 = 128 << 20;
/// Texts decoded at once.
const DECODED_AT_ONCE: f64 = 64.0;
/// Windows that judge each method of healing, before and after.
const HELD_OUT: f64 = 16.0;
/// Tokens that are in the middle of a layer at once.
const ROWS: u64 = 1024;

impl Plan {
    /// The plan of `spec`. `bytes_of` tells how large a text is, where that can be known.
    #[must_use]
    pub fn of(
        spec: &JobSpec,
        facts: &ModelFacts,
        anatomy: &Anatomy,
        bytes_of: &dyn Fn(&Corpus) -> Option<u64>,
    ) -> Self {
        let mut planner = Planner { spec, facts, anatomy, bytes_of, notes: Vec::new() };
        let (least_layers, most_layers) = planner.layers();
        let middle = least_layers.midpoint(most_layers);
        let stages = vec![
            planner.profile(),
            planner.select(middle),
            planner.prune(middle),
            planner.heal(middle),
            planner.export(middle),
            planner.eval(middle),
        ];
        let stages = planner.as_often(stages, most_layers - least_layers);
        let base = Footprint {
            layer_count: facts.layer_count,
            parameters: anatomy.parameters,
            size_bytes: anatomy.size_bytes,
        };
        Self {
            least_layers,
            most_layers,
            base,
            pruned: planner.left(least_layers),
            memory_bytes: stages.iter().map(|stage| stage.memory_bytes).max().unwrap_or(0),
            disk_bytes: stages.iter().map(|stage| stage.disk_bytes).sum(),
            stages,
            notes: planner.notes,
        }
    }

    /// The same with the time each stage takes on `machine`.
    #[must_use]
    pub fn on(mut self, machine: Machine) -> Self {
        for stage in &mut self.stages {
            let products = stage.flops / (EFFICIENCY * machine.flops_per_s.max(1.0));
            let reading = stage.read_bytes / machine.bytes_per_s.max(1.0);
            stage.seconds = Some(products + reading + stage.disk_bytes as f64 / DISK_BYTES_PER_S);
        }
        self
    }

    /// Time of all stages, where it is known.
    #[must_use]
    pub fn seconds(&self) -> Option<f64> {
        self.stages.iter().map(|stage| stage.seconds).sum()
    }
}

struct Planner<'a> {
    spec: &'a JobSpec,
    facts: &'a ModelFacts,
    anatomy: &'a Anatomy,
    bytes_of: &'a dyn Fn(&Corpus) -> Option<u64>,
    notes: Vec<String>,
}

/// Tokens that go through layers and through the head.
#[derive(Clone, Copy, Default)]
struct Tokens {
    through: f64,
    head: f64,
}

impl Tokens {
    const fn all(n: f64) -> Self {
        Self { through: n, head: n }
    }
}

impl Planner<'_> {
    fn layers(&self) -> (u32, u32) {
        let prune = &self.spec.prune;
        if let Some(n) = prune.layers_to_drop(self.facts.layer_count) {
            return (n, n);
        }
        let most = prune.most_layers(self.facts.layer_count).max(1);
        let limit = prune.budget().and_then(|budget| budget.max_size_bytes);
        let least = limit.and_then(|limit| (1..=most).find(|n| self.left(*n).size_bytes <= limit));
        (least.unwrap_or(1), most)
    }

    /// A budget has the job walk the road several times: as often as halving `range` takes.
    fn as_often(&mut self, mut stages: Vec<StagePlan>, range: u32) -> Vec<StagePlan> {
        if self.facts.experts {
            let note = "layers with experts are reckoned as if every token met every expert: it will be less";
            self.notes.push(note.into());
        }
        let Some(budget) = self.spec.prune.budget() else { return stages };
        let halvings = f64::from(range + 1).log2().ceil();
        // Golden sections take half as many again.
        let times = match (budget.weigh, budget.costs().is_empty()) {
            (Some(_), _) => 1.5 * halvings + 1.0,
            (None, true) => halvings.max(1.0),
            (None, false) => 1.0,
        };
        for stage in stages.iter_mut().skip(1) {
            stage.flops *= times;
            stage.read_bytes *= times;
        }
        self.notes.push(format!("the budget is searched: some {times:.0} numbers of layers are tried"));
        stages
    }

    /// What is left with the `n` largest layers gone.
    fn left(&self, n: u32) -> Footprint {
        let largest = |of: &[u64]| {
            let mut sizes = of.to_vec();
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            sizes.iter().take(n as usize).sum::<u64>()
        };
        Footprint {
            layer_count: self.facts.layer_count - n.min(self.facts.layer_count),
            parameters: self.anatomy.parameters.saturating_sub(largest(&self.anatomy.layer_parameters)),
            size_bytes: self.anatomy.size_bytes.saturating_sub(largest(&self.anatomy.layer_bytes)),
        }
    }

    /// Share of the layers that is left without `n`.
    fn share(&self, n: u32) -> f64 {
        1.0 - f64::from(n) / f64::from(self.facts.layer_count.max(1))
    }

    fn in_layers(&self) -> f64 {
        self.anatomy.layer_parameters.iter().sum::<u64>() as f64
    }

    fn in_head(&self) -> f64 {
        f64::from(self.facts.vocab_size) * f64::from(self.facts.hidden_size)
    }

    /// Operations to send tokens through this share of the layers, and what belongs to it through the head.
    fn forward(&self, tokens: Tokens, share: f64) -> f64 {
        2.0 * (tokens.through * share * self.in_layers() + tokens.head * self.in_head())
    }

    /// Of streams of so many tokens.
    fn stream_bytes(&self, tokens: f64) -> u64 {
        (tokens * f64::from(self.facts.hidden_size) * 4.0) as u64
    }

    /// All weights in memory, and a batch in the middle of a layer.
    fn forward_bytes(&self, share: f64) -> u64 {
        let size = self.anatomy.size_bytes as f64;
        let layers = self.anatomy.layer_bytes.iter().sum::<u64>() as f64;
        let inside = ROWS * u64::from(self.facts.hidden_size) * 4 * 20;
        (size - (1.0 - share) * layers) as u64 + inside + PROGRAM_BYTES
    }

    /// What the base model reads to write so many tokens, and the operations of it.
    fn written(&self, texts: f64, tokens: f64, share: f64) -> (f64, f64) {
        let batches = (texts / DECODED_AT_ONCE).ceil();
        let read = batches * tokens * self.anatomy.size_bytes as f64 * share;
        (read, self.forward(Tokens::all(texts * tokens), share))
    }

    /// Tokens of a text, of which at most so many are used; what the model writes itself costs besides.
    fn tokens(&mut self, corpus: &Corpus, at_most: f64, what: &str) -> f64 {
        if matches!(corpus, Corpus::Model { .. } | Corpus::Mix { .. }) {
            return at_most;
        }
        match (self.bytes_of)(corpus) {
            Some(bytes) => at_most.min(bytes as f64 / BYTES_PER_TOKEN),
            None => {
                self.notes.push(format!("how much text {what} has is not known before it is fetched"));
                at_most.min(1e5)
            }
        }
    }

    fn stage(stage: Stage, flops: f64, memory_bytes: u64) -> StagePlan {
        StagePlan { stage, flops, read_bytes: 0.0, memory_bytes, disk_bytes: 0, seconds: None }
    }

    fn profile(&mut self) -> StagePlan {
        let c = &self.spec.calibration;
        let seq_len = f64::from(c.seq_len.min(self.facts.max_position_embeddings));
        let asked = f64::from(c.samples) * seq_len;
        let tokens = self.tokens(&c.corpus, asked, "the calibration");
        let mut flops = self.forward(Tokens { through: tokens, head: 0.0 }, 1.0);
        if c.logit_lens {
            flops +=
                self.forward(Tokens { through: 0.0, head: 1024.0 * f64::from(self.facts.layer_count) }, 0.0);
        }
        if c.ablation {
            flops += self.damage(f64::from(self.facts.layer_count), 0.5);
        }
        let memory = self.forward_bytes(1.0) + self.stream_bytes(tokens);
        let mut stage = Self::stage(Stage::Profile, flops, memory);
        if matches!(c.corpus, Corpus::Model { .. }) {
            let (read, written) = self.written(f64::from(c.samples), seq_len, 1.0);
            (stage.read_bytes, stage.flops) = (read, stage.flops + written);
        }
        stage
    }

    /// So many cuts measured, each of which needs this share of the layers anew.
    fn damage(&mut self, sets: f64, share: f64) -> f64 {
        let d = &self.spec.prune.damage;
        let seq_len =
            d.seq_len.unwrap_or(self.spec.calibration.seq_len).min(self.facts.max_position_embeddings);
        let corpus = d.corpus.as_ref().unwrap_or(&self.spec.calibration.corpus);
        let asked = f64::from(d.samples) * f64::from(seq_len);
        let tokens = self.tokens(corpus, asked, "prune.damage");
        let sets = d.max_evaluations.map_or(sets, |most| sets.min(f64::from(most)));
        sets * self.forward(Tokens::all(tokens), share)
    }

    fn select(&mut self, n: u32) -> StagePlan {
        let all = self.spec.prune.strategies();
        let flops = all.into_iter().map(|strategy| self.search(strategy, n)).sum();
        let measured = self.spec.prune.measures_damage() || self.spec.prune.measures_accuracy();
        let memory = if measured { self.forward_bytes(1.0) } else { PROGRAM_BYTES };
        Self::stage(Stage::Select, flops, memory)
    }

    fn search(&mut self, strategy: Strategy, n: u32) -> f64 {
        let (layers, n) = (f64::from(self.facts.layer_count), f64::from(n));
        let d = &self.spec.prune.damage;
        let (beam, rounds) = (f64::from(d.beam), (n / f64::from(d.layers_per_round.max(1))).ceil());
        let evolved = f64::from(d.population) * f64::from(d.generations);
        // Each round tries every layer that is left; what lies before the first cut is shared.
        let tried = |rounds: f64| rounds * (layers - n / 2.0);
        match strategy {
            Strategy::Auto => self.damage(8.0, 0.6),
            Strategy::OneShotDamage => self.damage(layers, 0.5),
            Strategy::GreedyDamage => self.damage(tried(n), 0.5),
            Strategy::IterativeDamage => self.damage(tried(rounds), 0.5),
            Strategy::BeamDamage => self.damage(beam * tried(n), 0.5),
            // Most of them are weighed on a part of the text.
            Strategy::EvolutionaryDamage => self.damage(evolved, 0.35),
            Strategy::TaskAccuracy => {
                let tasks = self.spec.prune.damage.tasks.clone();
                let tokens = self.items(&tasks);
                tried(n) * self.forward(Tokens { through: tokens, head: tokens / 4.0 }, 0.5)
            }
            Strategy::BlockEndpoint
            | Strategy::BlockSum
            | Strategy::BlockInfluence
            | Strategy::RelativeMagnitude
            | Strategy::CrossAxis
            | Strategy::Deepest
            | Strategy::Explicit => 0.0,
        }
    }

    fn prune(&mut self, n: u32) -> StagePlan {
        let disk_bytes = self.left(n).size_bytes;
        let memory = self.forward_bytes(self.share(n));
        StagePlan { disk_bytes, ..Self::stage(Stage::Prune, 0.0, memory) }
    }

    fn heal(&mut self, n: u32) -> StagePlan {
        let mut all = Self::stage(Stage::Heal, 0.0, PROGRAM_BYTES);
        let methods = &self.spec.heal;
        for (i, method) in methods.iter().enumerate() {
            let settings = method.settings(self.spec.preset, self.facts, n);
            let seq_len = f64::from(settings.seq_len());
            let asked = settings.windows() as f64 * seq_len;
            let what = format!("heal {i}");
            let text = self.tokens(method.corpus(), asked, &what);
            if matches!(method.corpus(), Corpus::Model { .. }) {
                let (read, written) = self.written(text / seq_len.max(1.0), seq_len, 1.0);
                (all.read_bytes, all.flops) = (all.read_bytes + read, all.flops + written);
            }
            // Each method begins and ends with the loss on held-out windows.
            all.flops += self.forward(Tokens::all(2.0 * HELD_OUT * seq_len), self.share(n));
            let (flops, memory) = match &settings {
                HealSettings::Qlora(q) => self.adapters(method, q.rank, q.bits, &q.training, n),
                HealSettings::Whole(w) => self.whole(method, w, text, n),
                HealSettings::Rescale(_) => self.beside(text, n, 2, 0.0),
                HealSettings::LeastSquares(_) => self.beside(text, n, 3, 0.0),
                HealSettings::Reconstruct(r) => {
                    let one = self.in_layers() / f64::from(self.facts.layer_count.max(1));
                    self.beside(text, n, 3, 6.0 * one * text * f64::from(r.epochs))
                }
            };
            all.flops += flops;
            all.memory_bytes = all.memory_bytes.max(memory);
            all.disk_bytes += self.left(n).size_bytes;
        }
        all
    }

    /// Adapters over frozen weights: forward, and back through all weights.
    fn adapters(&self, method: &HealMethod, rank: u32, bits: BaseBits, t: &Training, n: u32) -> (f64, u64) {
        let share = self.share(n);
        let tokens = t.windows() as f64 * f64::from(t.seq_len);
        let flops = 2.0 * self.forward(Tokens::all(tokens), share) + self.taught(method, tokens);
        let layers = self.in_layers() * share;
        let width = match bits {
            BaseBits::Four => 0.53,
            BaseBits::Eight => 1.02,
            BaseBits::Sixteen => 2.0,
        };
        // The matrices of the MLP are a few times as wide as the stream; a parameter has two moments.
        let of_layer = f64::from(rank) * f64::from(self.facts.hidden_size) * 11.0;
        let trained = f64::from(self.facts.layer_count.saturating_sub(n)) * of_layer;
        let size = layers * width + 2.0 * self.in_head() + 12.0 * trained;
        (flops, size as u64 + self.logits_bytes() + self.training_bytes(t, n))
    }

    /// Weights as they are: gradients of those that are trained, and back to the lowest of them.
    /// A `text` that is gone through several times goes through the layers below once, and is kept there.
    fn whole(&self, method: &HealMethod, w: &WholeSettings, text: f64, n: u32) -> (f64, u64) {
        let t = &w.training;
        let tokens = t.windows() as f64 * f64::from(t.seq_len);
        let trained = f64::from(w.last_layers) / f64::from(self.facts.layer_count.max(1));
        let below = Tokens { through: tokens.min(text), head: 0.0 };
        let through = self.forward(below, self.share(n) - trained);
        let trains = 3.0 * self.forward(Tokens::all(tokens), trained);
        let weights = self.in_layers() * trained + if w.head { self.in_head() } else { 0.0 };
        let kept = if text < tokens { self.stream_bytes(text) } else { 0 };
        let size = (weights * 16.0) as u64 + kept;
        (through + trains + self.taught(method, tokens), size + self.training_bytes(t, n))
    }

    /// What the base model says to the text, where it is the teacher.
    fn taught(&self, method: &HealMethod, tokens: f64) -> f64 {
        let taught = method.training().is_some_and(|t| t.distill.is_some());
        if taught { self.forward(Tokens::all(tokens), 1.0) } else { 0.0 }
    }

    /// Of a micro-batch; the gradient takes their place.
    fn logits_bytes(&self) -> u64 {
        ROWS * u64::from(self.facts.vocab_size) * 4
    }

    /// Pruned and healed checkpoint, mapped as they are read, and of a micro-batch the stream at every seam, the logits
    /// and what is in the middle of a layer.
    fn training_bytes(&self, t: &Training, n: u32) -> u64 {
        let rows = (f64::from(t.batch_size) * f64::from(t.seq_len)).min(ROWS as f64);
        let seams = self.stream_bytes(rows) * u64::from(self.facts.layer_count.saturating_sub(n) + 2);
        2 * self.left(n).size_bytes + seams + self.logits_bytes() + PROGRAM_BYTES
    }

    /// Base and healed model on the same text, from cut to cut, so many streams of it at once, and `more` operations.
    fn beside(&self, tokens: f64, n: u32, streams: u64, more: f64) -> (f64, u64) {
        let both = self.forward(Tokens { through: tokens, head: 0.0 }, 1.0 + self.share(n));
        (
            0.6 * both + more,
            self.forward_bytes(1.0) + self.left(n).size_bytes + streams * self.stream_bytes(tokens),
        )
    }

    /// Each file is written, and its weights once more in float32 while it is measured.
    fn export(&self, n: u32) -> StagePlan {
        let parameters = self.left(n).parameters as f64;
        let bytes = self.spec.export.gguf.iter().map(|kind| parameters * kind.bits_per_weight() / 8.0);
        let written: f64 = bytes.sum();
        let measured = if written > 0.0 { 4.0 * parameters } else { 0.0 };
        StagePlan {
            disk_bytes: (written + measured) as u64,
            ..Self::stage(Stage::Export, 0.0, PROGRAM_BYTES)
        }
    }

    fn items(&mut self, tasks: &[TaskSpec]) -> f64 {
        tasks.iter().fold(0.0, |sum, task| {
            let what = format!("the task {}", task.task);
            let all = self.tokens(&task.items, f64::INFINITY, &what);
            // An item takes some hundred tokens, choices included.
            sum + task.limit.map_or(all, |limit| all.min(150.0 * f64::from(limit)))
        })
    }

    fn eval(&mut self, n: u32) -> StagePlan {
        let e = &self.spec.eval;
        let (texts, tasks) = (e.perplexity.clone(), e.tasks.clone());
        let overlap = e.stride.map_or(1.0, |stride| f64::from(e.seq_len) / f64::from(stride.max(1)));
        let mut text = 0.0;
        let mut stage = Self::stage(Stage::Eval, 0.0, 0);
        for corpus in &texts {
            let written = 16.0 * f64::from(e.seq_len.min(self.facts.max_position_embeddings));
            let at_most = if matches!(corpus, Corpus::Model { .. }) { written } else { f64::INFINITY };
            text += self.tokens(corpus, at_most, "eval.perplexity");
            if at_most.is_finite() {
                let (read, flops) = self.written(16.0, written / 16.0, 1.0);
                (stage.read_bytes, stage.flops) = (stage.read_bytes + read, stage.flops + flops);
            }
        }
        let items = self.items(&tasks);
        let tokens = Tokens { through: overlap * text + items, head: overlap * text + items / 4.0 };
        let healed = !self.spec.heal.is_empty();
        let shares = [Some(1.0), Some(self.share(n)), healed.then_some(self.share(n))];
        for _ in &self.spec.export.gguf {
            // A file's weights are measured on the texts alone.
            stage.flops += self.forward(Tokens::all(overlap * text), self.share(n));
        }
        for share in shares.into_iter().flatten() {
            stage.flops += self.forward(tokens, share);
            if let Some(g) = &self.spec.eval.generation {
                let (read, flops) = self.written(2.0 * f64::from(g.samples), f64::from(g.tokens), share);
                stage.read_bytes += read;
                // What was written is read by the base model, too.
                let judged = 2.0 * f64::from(g.samples) * f64::from(g.tokens + g.prompt_tokens);
                stage.flops += flops + self.forward(Tokens::all(judged), 1.0);
            }
            if self.spec.eval.speed {
                let size = self.anatomy.size_bytes as f64 * share;
                stage.flops += 5.0 * self.forward(Tokens { through: 256.0, head: 1.0 }, share);
                stage.read_bytes += 5.0 * 42.0 * size;
            }
        }
        let kept = self.stream_bytes(text.min(64.0 * 1024.0));
        stage.memory_bytes = self.forward_bytes(1.0) + kept;
        stage
    }
}
