//! The rules a spec must keep, beyond its shape.

use std::collections::BTreeMap;

use super::benchmark::Benchmark;
use super::complaint::Complaint;
use super::preset::ModelFacts;
use super::spec::{
    BaseBits, CalibrationSpec, Corpus, DamageSpec, Gates, GenerationSpec, HealMethod, JobSpec, ModelSource,
    PruneAmount, QloraSpec, Share, Strategy, TaskSpec, TrainingSpec,
};

/// Longest window and largest counts accepted: beyond any model in the field,
/// small enough that no product of them overflows.
const MAX_SEQ_LEN: u32 = 1 << 20;
const MAX_COUNT: u32 = 1 << 24;
const MAX_TEXT_BYTES: usize = 8 << 20;
const MAX_SHOTS: u32 = 64;
/// A year.
const MAX_DEADLINE_S: u32 = 366 * 24 * 3600;
const MAX_MEMORY_BYTES: u64 = 1 << 50;

impl JobSpec {
    /// All that is wrong with the spec and can be known without the model.
    #[must_use]
    pub fn validate(&self) -> Vec<Complaint> {
        let mut out = Complaints::default();
        self.check_names(&mut out);
        self.check_placement(&mut out);
        self.check_model(&mut out);
        let c = &self.calibration;
        check_corpus(&c.corpus, "/calibration/corpus", &mut out);
        out.range("/calibration/samples", c.samples, 1, MAX_COUNT);
        out.range("/calibration/seq_len", c.seq_len, 2, MAX_SEQ_LEN);
        out.range("/calibration/batch_size", c.batch_size, 1, 4096);
        check_criticality(c, &mut out);
        self.check_prune(&mut out);
        self.check_strategies(&mut out);
        check_damage(&self.prune.damage, &mut out);
        self.check_heal(&mut out);
        self.check_eval(&mut out);
        let gguf = &self.export.gguf;
        for (i, kind) in gguf.iter().enumerate().filter(|(i, kind)| gguf[..*i].contains(kind)) {
            out.add(&format!("/export/gguf/{i}"), format!("`{}` is there already", kind.name()));
        }
        if let Some(publish) = &self.publish {
            check_repo(&publish.repo, "main", "/publish", &mut out);
            if !publish.repo.contains('/') {
                out.add("/publish/repo", "must look like owner/name");
            }
        }
        out.0
    }

    /// All that is wrong with the spec for such a model.
    #[must_use]
    pub fn validate_for(&self, model: &ModelFacts) -> Vec<Complaint> {
        let mut out = Complaints::default();
        let layer_count = model.layer_count;
        for (i, refused) in self.heal.iter().enumerate().filter_map(|(i, h)| Some((i, h.refused_for(model)?)))
        {
            out.add(&format!("/heal/{i}/method"), refused);
        }
        for (i, method) in self.heal.iter().enumerate() {
            match method {
                HealMethod::Qlora(QloraSpec { rank: Some(rank), .. }) => {
                    out.range(&format!("/heal/{i}/rank"), *rank, 1, model.hidden_size);
                }
                HealMethod::Partial(spec) => {
                    out.range(&format!("/heal/{i}/layers"), spec.layers, 1, layer_count);
                }
                HealMethod::Qlora(_)
                | HealMethod::Rescale(_)
                | HealMethod::LeastSquares(_)
                | HealMethod::Reconstruct(_)
                | HealMethod::Full(_) => {}
            }
        }
        if let (false, Some(why)) = (self.export.gguf.is_empty(), &model.no_gguf) {
            out.add("/export/gguf", why.clone());
        }
        let p = &self.prune;
        if let (Strategy::Explicit, Some(layers)) = (p.strategy, &p.layers) {
            for (i, l) in layers.iter().enumerate().filter(|(_, l)| **l >= layer_count) {
                out.add(
                    &format!("/prune/layers/{i}"),
                    format!("layer {l} does not exist: the model has layers 0 to {}", layer_count - 1),
                );
            }
            if layers.len() >= layer_count as usize {
                out.add(
                    "/prune/layers",
                    format!("at least one of the model's {layer_count} layers must stay"),
                );
            }
        }
        let bound = p.strategy != Strategy::Explicit || !p.compare.is_empty();
        if let (true, Some(n)) = (bound, p.layers_to_drop(layer_count)) {
            let (first, last, most) = (p.keep_first, p.keep_last, p.most_layers(layer_count));
            if p.rounds > n && p.rounds > 1 {
                out.add(
                    "/prune/rounds",
                    format!("is {}, but only {n} layers go; a round takes at least one", p.rounds),
                );
            }
            if n > most {
                let at = if p.strategy == Strategy::Explicit { "/prune/compare" } else { "/prune/amount" };
                out.add(
                    at,
                    format!(
                        "asks for {n} layers, but of the model's {layer_count} at most {most} may go \
                         (keep_first {first}, keep_last {last})"
                    ),
                );
            }
        }
        out.0
    }

    fn check_names(&self, out: &mut Complaints) {
        if self.name.as_ref().is_some_and(|n| n.is_empty() || n.chars().count() > 200) {
            out.add("/name", "must have 1 to 200 characters");
        }
        check_labels(&self.labels, "/labels", out);
    }

    fn check_placement(&self, out: &mut Complaints) {
        let limits = [("max_queue_s", self.deadlines.max_queue_s), ("max_run_s", self.deadlines.max_run_s)];
        for (name, seconds) in limits {
            if let Some(seconds) = seconds {
                out.range(&format!("/deadlines/{name}"), seconds, 1, MAX_DEADLINE_S);
            }
        }
        check_labels(&self.resources.labels, "/resources/labels", out);
        if self.resources.min_memory_bytes.is_some_and(|bytes| bytes > MAX_MEMORY_BYTES) {
            out.add("/resources/min_memory_bytes", "is more than any machine has");
        }
    }

    fn check_model(&self, out: &mut Complaints) {
        match &self.model {
            ModelSource::Hub { repo, revision } => check_repo(repo, revision, "/model", out),
            ModelSource::Path { path } => check_path(path, "/model/path", out),
            ModelSource::S3 { .. } => out.add(
                "/model/from",
                "models from S3 are not available in this version; use \"hub\", \"path\" or \"job\"",
            ),
            ModelSource::Job { .. } => {}
        }
    }

    fn check_prune(&self, out: &mut Complaints) {
        let p = &self.prune;
        match (p.strategy, &p.layers, p.amount) {
            (Strategy::Explicit, None, _) => {
                out.add("/prune/layers", "name the layers to drop, e.g. [20, 21, 22]");
            }
            (Strategy::Explicit, Some(layers), amount) => {
                let mut unique = layers.clone();
                unique.sort_unstable();
                unique.dedup();
                if layers.is_empty() {
                    out.add("/prune/layers", "name at least one layer");
                } else if unique.len() != layers.len() {
                    out.add("/prune/layers", "names a layer twice");
                }
                if amount.is_some() {
                    out.add("/prune/amount", "leave it out: with \"explicit\", `layers` says how many");
                }
            }
            (_, Some(_), _) => out.add("/prune/layers", "only with \"strategy\": \"explicit\""),
            (_, None, None) => {
                out.add(
                    "/prune/amount",
                    "required: {\"layers\": n}, {\"fraction\": 0.0 to 1.0} or {\"budget\": {…}}",
                );
            }
            (_, None, Some(PruneAmount::Layers(0))) => {
                out.add("/prune/amount/layers", "must be at least 1");
            }
            (_, None, Some(PruneAmount::Fraction(f))) if !(f > 0.0 && f < 1.0) => {
                out.add("/prune/amount/fraction", "must be more than 0 and less than 1");
            }
            (_, None, Some(PruneAmount::Budget(budget))) => out.0.extend(budget.check(&self.eval)),
            (_, None, Some(_)) => {}
        }
        out.range("/prune/rounds", p.rounds, 1, MAX_COUNT);
        if p.rounds > 1 && p.strategy == Strategy::Explicit {
            out.add("/prune/rounds", "leave it out: with \"explicit\" there is nothing to choose anew");
        }
        out.range("/prune/keep_first", p.keep_first, 0, MAX_COUNT);
        out.range("/prune/keep_last", p.keep_last, 0, MAX_COUNT);
    }

    fn check_strategies(&self, out: &mut Complaints) {
        let p = &self.prune;
        for (i, strategy) in p.compare.iter().enumerate() {
            let at = format!("/prune/compare/{i}");
            if *strategy == Strategy::Explicit {
                out.add(&at, "chooses nothing; name it as `strategy` and compare others with it");
            } else if p.compare[..i].contains(strategy) {
                out.add(&at, format!("`{}` is there already; name each strategy once", strategy.name()));
            }
        }
        if p.measures_accuracy() && p.damage.tasks.is_empty() {
            out.add(
                "/prune/damage/tasks",
                "\"task_accuracy\" needs items to answer, e.g. \
                 [{\"task\": \"boolq\", \"items\": {\"from\": \"path\", \"path\": \"boolq.jsonl\"}}]",
            );
        }
    }

    fn check_heal(&self, out: &mut Complaints) {
        for (i, method) in self.heal.iter().enumerate() {
            let at = format!("/heal/{i}");
            check_corpus(method.corpus(), &format!("{at}/corpus"), out);
            if let Some(training) = method.training() {
                check_training(training, &at, out);
            }
            let (samples, seq_len) = match method {
                HealMethod::Qlora(spec) => {
                    check_qlora(spec, &at, out);
                    continue;
                }
                HealMethod::Partial(spec) => {
                    out.range(&format!("{at}/layers"), spec.layers, 1, MAX_COUNT);
                    continue;
                }
                HealMethod::Full(_) => continue,
                HealMethod::Rescale(spec) => (spec.samples, spec.seq_len),
                HealMethod::LeastSquares(spec) => {
                    if !(spec.ridge.is_finite() && spec.ridge >= 0.0) {
                        out.add(&format!("{at}/ridge"), "must be 0 or more, e.g. 0.01");
                    }
                    self.check_below_cut("least_squares", out);
                    (spec.samples, spec.seq_len)
                }
                HealMethod::Reconstruct(spec) => {
                    out.range(&format!("{at}/epochs"), spec.epochs, 1, MAX_COUNT);
                    out.positive(&format!("{at}/learning_rate"), Some(spec.learning_rate), 1.0);
                    self.check_below_cut("reconstruct", out);
                    (spec.samples, spec.seq_len)
                }
            };
            out.range(&format!("{at}/samples"), samples, 1, MAX_COUNT);
            out.range(&format!("{at}/seq_len"), seq_len, 2, MAX_SEQ_LEN);
        }
    }

    /// `method` changes the layer below each cut: there must be one.
    fn check_below_cut(&self, method: &str, out: &mut Complaints) {
        let why = format!("{method} changes the layer below the cut");
        let p = &self.prune;
        let named = p.layers.iter().flatten().position(|layer| *layer == 0);
        if let (Strategy::Explicit, Some(i)) = (p.strategy, named) {
            out.add(
                &format!("/prune/layers/{i}"),
                format!("{why}, and below layer 0 there is none; keep layer 0"),
            );
        } else if p.strategy != Strategy::Explicit && p.keep_first == 0 {
            out.add("/prune/keep_first", format!("{why}: give at least 1, so that one stays there"));
        }
    }

    fn check_eval(&self, out: &mut Complaints) {
        out.range("/eval/seq_len", self.eval.seq_len, 2, MAX_SEQ_LEN);
        if let Some(stride) = self.eval.stride {
            out.range("/eval/stride", stride, 1, self.eval.seq_len);
        }
        for (i, corpus) in self.eval.perplexity.iter().enumerate() {
            let at = format!("/eval/perplexity/{i}");
            check_corpus(corpus, &at, out);
            if matches!(corpus, Corpus::Mix { .. }) {
                out.add(&at, "a mixture gives no perplexity that means something; name its texts one by one");
            }
            self.check_leak(corpus, &at, out);
        }
        check_tasks(&self.eval.tasks, "/eval/tasks", out);
        if let Some(generation) = &self.eval.generation {
            check_generation(generation, out);
        }
        check_gates(&self.eval.gates, out);
    }

    /// Healing on the text that judges the healing would flatter it.
    fn check_leak(&self, corpus: &Corpus, at: &str, out: &mut Complaints) {
        let healed_on = self.heal.iter().any(|method| method.corpus().texts().contains(&corpus));
        if healed_on && !matches!(corpus, Corpus::Model { .. }) {
            out.add(at, "is the text the job heals on; measure on text that healing never sees");
        }
    }
}

#[derive(Default)]
struct Complaints(Vec<Complaint>);

impl Complaints {
    fn add(&mut self, pointer: &str, message: impl Into<String>) {
        self.0.push(Complaint { pointer: pointer.into(), message: message.into() });
    }

    fn range(&mut self, pointer: &str, value: u32, low: u32, high: u32) {
        if !(low..=high).contains(&value) {
            self.add(pointer, format!("must be from {low} to {high}, not {value}"));
        }
    }

    fn positive(&mut self, pointer: &str, value: Option<f64>, high: f64) {
        if value.is_some_and(|v| !(v > 0.0 && v <= high)) {
            self.add(pointer, format!("must be more than 0 and at most {high}"));
        }
    }
}

/// Labels of a job, or of the workers it may run on.
fn check_labels(labels: &BTreeMap<String, String>, at: &str, out: &mut Complaints) {
    if labels.len() > 64 {
        out.add(at, "at most 64 labels");
    }
    for (key, value) in labels {
        if key.is_empty() || key.len() > 64 || value.len() > 256 {
            let key = key.replace('~', "~0").replace('/', "~1");
            out.add(&format!("{at}/{key}"), "a key has 1 to 64 bytes, a value at most 256");
        }
    }
}

fn check_criticality(c: &CalibrationSpec, out: &mut Complaints) {
    if c.confidence.is_some_and(|c| !(c > 0.5 && c < 1.0)) {
        out.add("/calibration/confidence", "must be more than 0.5 and less than 1, e.g. 0.95");
    }
    let z = &c.zones;
    if !(z.needed.is_finite() && z.redundant.is_finite()) || z.redundant > z.needed {
        out.add(
            "/calibration/zones",
            format!("`redundant` ({}) must not be more than `needed` ({})", z.redundant, z.needed),
        );
    }
}

fn check_damage(d: &DamageSpec, out: &mut Complaints) {
    let at = |name: &str| format!("/prune/damage/{name}");
    if let Some(corpus) = &d.corpus {
        check_corpus(corpus, &at("corpus"), out);
    }
    let counts = [
        ("samples", Some(d.samples), 1, MAX_COUNT),
        ("seq_len", d.seq_len, 2, MAX_SEQ_LEN),
        ("top_k", Some(d.top_k), 1, MAX_COUNT),
        ("max_evaluations", d.max_evaluations, 1, u32::MAX),
        ("beam", Some(d.beam), 1, 4096),
        ("layers_per_round", Some(d.layers_per_round), 1, MAX_COUNT),
        ("population", Some(d.population), 1, 4096),
        ("generations", Some(d.generations), 1, MAX_COUNT),
    ];
    for (name, value, low, high) in counts {
        if let Some(value) = value {
            out.range(&at(name), value, low, high);
        }
    }
    if d.max_tokens == Some(0) {
        out.add(&at("max_tokens"), "must be at least 1");
    }
    check_tasks(&d.tasks, &at("tasks"), out);
}

fn check_generation(g: &GenerationSpec, out: &mut Complaints) {
    const AT: &str = "/eval/generation";
    if let Some(prompts) = &g.prompts {
        check_corpus(prompts, &format!("{AT}/prompts"), out);
    }
    out.range(&format!("{AT}/samples"), g.samples, 1, 4096);
    out.range(&format!("{AT}/prompt_tokens"), g.prompt_tokens, 2, MAX_SEQ_LEN);
    out.range(&format!("{AT}/tokens"), g.tokens, 1, MAX_SEQ_LEN);
    out.positive(&format!("{AT}/temperature"), Some(g.temperature), 100.0);
}

fn check_gates(g: &Gates, out: &mut Complaints) {
    const AT: &str = "/eval/gates";
    for (name, limit, most) in [
        ("min_retention", g.min_retention, 10.0),
        ("max_perplexity_ratio", g.max_perplexity_ratio, 1e9),
        ("min_speedup", g.min_speedup, 1e3),
        ("max_latency_ms", g.max_latency_ms, 1e6),
    ] {
        out.positive(&format!("{AT}/{name}"), limit, most);
    }
    if g.max_broken.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
        out.add(&format!("{AT}/max_broken"), "must be from 0 to 1");
    }
    if !(g.confidence >= 0.5 && g.confidence < 1.0) {
        out.add(&format!("{AT}/confidence"), "must be at least 0.5 and less than 1, e.g. 0.95");
    }
}

fn check_tasks(tasks: &[TaskSpec], at: &str, out: &mut Complaints) {
    for (i, task) in tasks.iter().enumerate() {
        let at = format!("{at}/{i}");
        if task.task.is_empty() || task.task.len() > 100 {
            out.add(&format!("{at}/task"), "must have 1 to 100 characters");
        }
        if tasks[..i].iter().any(|t| t.task == task.task) {
            out.add(&format!("{at}/task"), format!("`{}` is there already; names must differ", task.task));
        }
        out.positive(&format!("{at}/min_retention"), task.min_retention, 10.0);
        if task.limit == Some(0) {
            out.add(&format!("{at}/limit"), "must be at least 1");
        }
        check_items(&task.items, &format!("{at}/items"), out);
        match (&task.shots_from, task.shots) {
            (Some(corpus), 1..=MAX_SHOTS) => check_items(corpus, &format!("{at}/shots_from"), out),
            (None, 1..=MAX_SHOTS) => {
                out.add(&format!("{at}/shots_from"), "name the solved questions that `shots` are taken from");
            }
            (None, 0) => {}
            (Some(_), 0) => out.add(&format!("{at}/shots"), "must be at least 1 where `shots_from` is given"),
            (_, _) => out.add(&format!("{at}/shots"), format!("must be at most {MAX_SHOTS}")),
        }
    }
}

fn check_training(t: &TrainingSpec, at: &str, out: &mut Complaints) {
    let counts = [
        ("steps", t.steps, 1, MAX_COUNT),
        ("batch_size", t.batch_size, 1, 4096),
        ("seq_len", t.seq_len, 2, MAX_SEQ_LEN),
        ("checkpoint_every", t.checkpoint_every, 1, MAX_COUNT),
        ("warmup_steps", t.warmup_steps, 0, MAX_COUNT),
    ];
    for (name, value, low, high) in counts {
        if let Some(value) = value {
            out.range(&format!("{at}/{name}"), value, low, high);
        }
    }
    if let (Some(warmup), Some(steps)) = (t.warmup_steps, t.steps)
        && warmup > steps
    {
        out.add(
            &format!("{at}/warmup_steps"),
            format!("is {warmup}, but the training has only {steps} steps"),
        );
    }
    out.positive(&format!("{at}/learning_rate"), t.learning_rate, 1.0);
    out.positive(&format!("{at}/eps"), t.eps, 1.0);
    out.positive(&format!("{at}/max_gradient_norm"), t.max_gradient_norm, 1e9);
    if t.weight_decay.is_some_and(|d| !(0.0..=1.0).contains(&d)) {
        out.add(&format!("{at}/weight_decay"), "must be from 0 to 1");
    }
    for (name, beta) in [("beta1", t.beta1), ("beta2", t.beta2)] {
        if beta.is_some_and(|beta| !(0.0..1.0).contains(&beta)) {
            out.add(&format!("{at}/{name}"), "must be at least 0 and less than 1");
        }
    }
    if let Some(distill) = &t.distill {
        out.positive(&format!("{at}/distill/weight"), Some(distill.weight), 1.0);
        out.range(&format!("{at}/distill/top_k"), distill.top_k, 1, 4096);
        if !(0.0..=1e6).contains(&distill.seam) {
            out.add(&format!("{at}/distill/seam"), "must be from 0 to 1000000");
        }
    }
}

fn check_qlora(q: &QloraSpec, at: &str, out: &mut Complaints) {
    if let Some(rank) = q.rank {
        out.range(&format!("{at}/rank"), rank, 1, 1024);
    }
    out.positive(&format!("{at}/alpha"), q.alpha, 65_536.0);
    if q.dropout.is_some_and(|d| !(0.0..1.0).contains(&d)) {
        out.add(&format!("{at}/dropout"), "must be at least 0 and less than 1");
    }
    if !q.format.is_nf4() && q.bits != BaseBits::Four {
        out.add(&format!("{at}/format"), "says what 4 bits mean; leave it out, or set `bits` to 4");
    }
    if q.targets.as_ref().is_some_and(Vec::is_empty) {
        out.add(&format!("{at}/targets"), "name at least one linear layer, e.g. \"down_proj\"");
    }
}

/// Items, or solved questions.
fn check_items(corpus: &Corpus, at: &str, out: &mut Complaints) {
    check_corpus(corpus, at, out);
    match corpus {
        Corpus::Mix { .. } => out.add(at, "evaluation items are not mixed; make each file a task of its own"),
        Corpus::Model { .. } => {
            let names = Benchmark::ALL.map(Benchmark::name).join(", ");
            out.add(
                at,
                format!(
                    "a model cannot write evaluation items; use \"path\" or \"text\", or leave `items` out and call \
                     the task after a benchmark that the Hub has: {names}"
                ),
            );
        }
        Corpus::Path { .. } | Corpus::Hub { .. } | Corpus::Upload { .. } | Corpus::Text { .. } => {}
    }
}

fn check_corpus(corpus: &Corpus, at: &str, out: &mut Complaints) {
    match corpus {
        Corpus::Path { path } => check_path(path, &format!("{at}/path"), out),
        Corpus::Hub { repo, revision, file } => {
            check_repo(repo, revision, at, out);
            if file.is_empty()
                || file.contains('\0')
                || file.split('/').any(|part| part.is_empty() || part == "..")
            {
                out.add(&format!("{at}/file"), "must be the path of a file inside the repository");
            }
        }
        Corpus::Text { text } if text.trim().is_empty() => out.add(&format!("{at}/text"), "is empty"),
        Corpus::Text { text } if text.len() > MAX_TEXT_BYTES => {
            out.add(&format!("{at}/text"), "is longer than 8 MiB; put it into a file");
        }
        Corpus::Model { tokens: Some(0) } => out.add(&format!("{at}/tokens"), "must be at least 1"),
        Corpus::Mix { of } => check_mix(of, at, out),
        // The service knows which uploads there are.
        Corpus::Text { .. } | Corpus::Model { .. } | Corpus::Upload { .. } => {}
    }
}

fn check_mix(of: &[Share], at: &str, out: &mut Complaints) {
    if of.is_empty() {
        out.add(&format!("{at}/of"), "name at least one text to mix");
    }
    for (i, share) in of.iter().enumerate() {
        let at = format!("{at}/of/{i}");
        out.positive(&format!("{at}/weight"), Some(share.weight), 1e6);
        if matches!(share.corpus, Corpus::Mix { .. }) {
            out.add(&format!("{at}/corpus/from"), "a mixture of mixtures; name all texts in one");
            continue;
        }
        check_corpus(&share.corpus, &format!("{at}/corpus"), out);
    }
}

fn check_path(path: &str, at: &str, out: &mut Complaints) {
    if path.is_empty() || path.contains('\0') {
        out.add(at, "must be the path of a file or directory");
    }
}

/// `owner/name` and a revision, in the Hub's own alphabet: nothing that could
/// climb out of a cache directory or change a URL.
fn check_repo(repo: &str, revision: &str, at: &str, out: &mut Complaints) {
    let plain = |s: &str| {
        !s.is_empty()
            && s.len() <= 96
            && !s.starts_with(['.', '-'])
            && !s.contains("..")
            && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let parts: Vec<&str> = repo.split('/').collect();
    if parts.len() > 2 || !parts.iter().all(|p| plain(p)) {
        out.add(&format!("{at}/repo"), "must look like owner/name");
    }
    if !revision.split('/').all(plain) {
        out.add(&format!("{at}/revision"), "must be a branch, a tag or a commit");
    }
}
