//! Reading a spec so that a person hears *all* that is wrong with it at once,
//! each with the place.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::shape::{Shapes, escaped};
use super::spec::{JobSpec, TaskSpec};

/// One thing that is wrong with a spec, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Complaint {
    /// JSON pointer (RFC 6901) into the spec.
    #[schema(example = "/prune/amount")]
    pub pointer: String,
    #[schema(
        example = "asks for 30 layers, but of the model's 30 at most 29 may go (keep_first 0, keep_last 1)"
    )]
    pub message: String,
}

impl std::fmt::Display for Complaint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", if self.pointer.is_empty() { "/" } else { &self.pointer }, self.message)
    }
}

/// More complaints than this help nobody.
const MAX_COMPLAINTS: usize = 50;

impl JobSpec {
    /// The shape of a spec, as the OpenAPI document publishes it.
    pub fn shapes() -> &'static Shapes {
        static SHAPES: LazyLock<Shapes> = LazyLock::new(Shapes::of::<JobSpec>);
        &SHAPES
    }

    /// Reads and validates a spec.
    ///
    /// # Errors
    /// Every complaint about the spec: first those about its shape, then the
    /// broken rules.
    pub fn read(mut value: Value) -> Result<Self, Vec<Complaint>> {
        let mut complaints = Self::shapes().check("JobSpec", &mut value);
        let spec = match parse(&value) {
            Ok(mut spec) => {
                spec.tasks_mut().for_each(TaskSpec::settle);
                spec
            }
            Err(complaint) => {
                // The schema says yes and serde no: only serde knows why.
                complaints.push(complaint);
                return Err(complaints);
            }
        };
        let rules = spec.validate();
        let fresh =
            rules.into_iter().filter(|rule| !complaints.iter().any(|c| explains(&c.pointer, &rule.pointer)));
        let fresh: Vec<Complaint> = fresh.collect();
        complaints.extend(fresh);
        complaints.truncate(MAX_COMPLAINTS);
        if complaints.is_empty() { Ok(spec) } else { Err(complaints) }
    }
}

/// Whether a broken rule at `rule` may come only from what was put in where
/// the shape at `shape` was wrong.
fn explains(shape: &str, rule: &str) -> bool {
    let below =
        |a: &str, b: &str| b.strip_prefix(a).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    // What may be said of amount, layers and tasks hangs on the strategies.
    let strategy = shape == "/prune/strategy" || below("/prune/compare", shape);
    let seq_len = shape == "/eval/seq_len" && rule == "/eval/stride";
    below(shape, rule) || below(rule, shape) || strategy && below("/prune", rule) || seq_len
}

fn parse(value: &Value) -> Result<JobSpec, Complaint> {
    serde_path_to_error::deserialize(value).map_err(|e| {
        use serde_path_to_error::Segment;
        let path = e.path().iter().filter_map(|segment| match segment {
            Segment::Seq { index } => Some(format!("/{index}")),
            Segment::Map { key } => Some(format!("/{}", escaped(key))),
            Segment::Enum { .. } | Segment::Unknown => None,
        });
        Complaint { pointer: path.collect(), message: e.inner().to_string() }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Every field of every shape once.
    fn full() -> Value {
        json!({
            "name": "n", "labels": {"team": "nlp"}, "preset": "seed", "seed": 7,
            "priority": -3, "deadlines": {"max_queue_s": 60, "max_run_s": 3600},
            "resources": {"labels": {"gpu": "a100"}, "min_memory_bytes": 1000, "in_memory": true},
            "model": {"from": "hub", "repo": "org/name", "revision": "main"},
            "calibration": {
                "corpus": {"from": "hub", "repo": "allenai/c4", "file": "a/b.jsonl", "revision": "main"},
                "samples": 4, "seq_len": 16, "position": "mean", "distance": "cosine", "batch_size": 2,
                "confidence": 0.95, "ablation": true, "zones": {"needed": 3.5, "redundant": 0.01}, "logit_lens": true
            },
            "prune": {
                "amount": {"fraction": 0.3}, "strategy": "block_sum", "compare": ["task_accuracy"], "keep_first": 1,
                "keep_last": 2,
                "damage": {
                    "corpus": {"from": "text", "text": "words"}, "samples": 4, "seq_len": 16, "measure": "kl", "top_k": 8,
                    "max_evaluations": 50, "max_tokens": 5000, "beam": 2, "layers_per_round": 3, "population": 4,
                    "generations": 5, "tasks": [{"task": "a", "items": {"from": "path", "path": "i.jsonl"}, "limit": 3}]
                }
            },
            "heal": [{
                "method": "qlora", "corpus": {"from": "model", "tokens": 5}, "rank": 8, "alpha": 8.5, "dropout": 0.1,
                "targets": ["up_proj"], "bits": 4, "format": "q4_0", "learning_rate": 1e-4, "schedule": "linear", "warmup_steps": 1,
                "steps": 10, "batch_size": 2, "seq_len": 16, "weight_decay": 0.1, "checkpoint_every": 5,
                "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "moment_bits": 8, "max_gradient_norm": 2.0,
                "distill": {"weight": 0.3, "top_k": 5, "seam": 0.1}
            }, {"method": "qlora"}, {
                "method": "partial", "layers": 2, "head": false, "steps": 3,
                "corpus": {"from": "mix", "of": [
                    {"corpus": {"from": "hub", "repo": "a/b", "file": "c.txt"}, "weight": 2.0}, {"corpus": {"from": "model"}}
                ]}
            }, {"method": "full", "learning_rate": 1e-5}, {"method": "reconstruct", "samples": 5, "seq_len": 9,
                "epochs": 2, "learning_rate": 1e-3}],
            "compare_heals": true,
            "eval": {
                "perplexity": [{"from": "text", "text": "words"}, {"from": "path", "path": "x.txt"}],
                "tasks": [{
                    "task": "a", "items": {"from": "path", "path": "i.jsonl"}, "limit": 3, "min_retention": 0.7,
                    "format": "mmlu", "shots": 5, "shots_from": {"from": "path", "path": "dev.jsonl"}
                }],
                "speed": false, "seq_len": 32, "stride": 16, "overlap": "refuse", "on_reject": "fail",
                "generation": {
                    "prompts": {"from": "text", "text": "words"}, "samples": 8, "prompt_tokens": 8, "tokens": 16,
                    "temperature": 0.5
                },
                "gates": {
                    "min_retention": 0.9, "max_perplexity_ratio": 1.5, "min_speedup": 1.1, "max_size_bytes": 500,
                    "max_broken": 0.1, "confidence": 0.9
                }
            },
            "export": {"dtype": "f16"}
        })
    }

    fn pointers(spec: Value) -> Vec<String> {
        JobSpec::read(spec).unwrap_err().into_iter().map(|c| c.pointer).collect()
    }

    /// All places in `value`, the whole of it first.
    fn places(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_string());
        match value {
            Value::Object(map) => {
                map.iter().for_each(|(key, v)| places(v, &format!("{at}/{}", escaped(key)), found));
            }
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(i, v)| places(v, &format!("{at}/{i}"), found));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn the_least_spec_and_the_fullest_are_accepted_and_come_back_the_same() {
        JobSpec::read(json!({"model": {"from": "path", "path": "m"}, "prune": {"amount": {"layers": 1}}}))
            .unwrap();
        let spec = JobSpec::read(full()).unwrap();
        assert_eq!(JobSpec::read(serde_json::to_value(&spec).unwrap()).unwrap(), spec);
    }

    #[test]
    fn a_wrong_value_anywhere_is_complained_of_at_its_own_place_and_nowhere_else() {
        let mut all = Vec::new();
        places(&full(), "", &mut all);
        assert!(all.len() > 60);
        // No field takes an array of booleans; every other kind of value fits somewhere.
        for at in all {
            let mut spec = full();
            *spec.pointer_mut(&at).unwrap() = json!([true]);
            let expected = match at.as_str() {
                "/eval/perplexity"
                | "/eval/tasks"
                | "/heal"
                | "/heal/0/targets"
                | "/heal/2/corpus/of"
                | "/prune/compare"
                | "/prune/damage/tasks" => format!("{at}/0"),
                _ => at,
            };
            assert_eq!(pointers(spec), [expected]);
        }
    }

    #[test]
    fn shape_and_serde_agree_on_every_small_change_of_a_spec() {
        let mut all = Vec::new();
        places(&full(), "", &mut all);
        let values = [
            json!(null),
            json!(true),
            json!(0),
            json!(3),
            json!(-1),
            json!(1.5),
            json!(5_000_000_000_u64),
            json!(""),
            json!("main"),
            json!([]),
            json!([1]),
            json!({}),
            json!({"from": "model"}),
            json!({"layers": 2}),
            json!({"method": "qlora", "from": 1}),
            json!({"from": "job", "job_id": "no"}),
        ];
        let mut accepted = 0;
        for at in &all {
            for value in &values {
                let mut spec = full();
                *spec.pointer_mut(at).unwrap() = value.clone();
                let shape = JobSpec::shapes().check("JobSpec", &mut spec.clone());
                // serde takes an array for a struct; we do not.
                let positional =
                    value.is_array() && shape.iter().any(|c| c.message.contains("must be an object"));
                if !positional {
                    assert_eq!(parse(&spec).is_ok(), shape.is_empty(), "{at} = {value}: {shape:?}");
                }
                accepted += usize::from(shape.is_empty());
                let mut mended = spec;
                JobSpec::shapes().check("JobSpec", &mut mended);
                parse(&mended).unwrap();
            }
        }
        assert!(accepted > 50, "the changes are too wild to mean anything: {accepted}");
    }

    #[test]
    fn unknown_fields_at_every_depth_are_all_named_at_once() {
        let mut spec = full();
        let objects = [
            "",
            "/model",
            "/calibration",
            "/calibration/corpus",
            "/calibration/zones",
            "/prune",
            "/prune/damage",
            "/prune/damage/corpus",
            "/prune/damage/tasks/0",
            "/heal/0",
            "/heal/0/corpus",
            "/heal/1",
            "/heal/0/distill",
            "/heal/2",
            "/heal/2/corpus",
            "/heal/2/corpus/of/0",
            "/heal/2/corpus/of/0/corpus",
            "/heal/3",
            "/heal/4",
            "/eval",
            "/eval/perplexity/0",
            "/eval/perplexity/1",
            "/eval/tasks/0",
            "/eval/tasks/0/items",
            "/eval/generation",
            "/eval/generation/prompts",
            "/eval/gates",
            "/export",
        ];
        for at in objects {
            spec.pointer_mut(at).unwrap()["un/known"] = json!(1);
        }
        let mut found = pointers(spec);
        let mut expected: Vec<_> = objects.iter().map(|at| format!("{at}/un~1known")).collect();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn missing_fields_are_named_where_they_should_stand() {
        assert_eq!(pointers(json!({})), ["/model", "/prune"]);
        assert_eq!(pointers(json!({"model": {}, "prune": {}})), ["/model/from", "/prune/amount"]);
        let spec = json!({
            "model": {"from": "path"}, "prune": {"amount": {}},
            "eval": {"tasks": [{}, {"task": "b", "items": {"from": "text"}}]}
        });
        let expected = [
            "/model/path",
            "/prune/amount",
            "/eval/tasks/0/task",
            "/eval/tasks/1/items/text",
            // A rule: a task that is called after a benchmark needs none.
            "/eval/tasks/0/items",
        ];
        assert_eq!(pointers(spec), expected);
    }

    #[test]
    fn an_error_in_a_list_does_not_shift_the_place_of_the_next() {
        let spec = json!({
            "model": {"from": "path", "path": "m"}, "prune": {"amount": {"layers": 1}},
            "heal": [{"method": "magic"}, {"method": "qlora", "rank": "a"}, {"method": "qlora", "bits": 5}, {"rank": 1}],
            "eval": {"perplexity": [{"from": "moon"}, {"from": "text", "text": ""}]}
        });
        let expected = [
            "/heal/0/method",
            "/heal/1/rank",
            "/heal/2/bits",
            "/heal/3/method",
            "/eval/perplexity/0/from",
            "/eval/perplexity/1/text",
        ];
        assert_eq!(pointers(spec), expected);
    }

    #[test]
    fn broken_rules_are_told_together_with_wrong_shapes() {
        let spec = json!({
            "name": "", "model": {"from": "path", "path": 5}, "prune": {"amount": {"layers": 0}, "strategi": "x"},
            "calibration": {"samples": 0, "seq_len": "long"}
        });
        let expected = [
            "/model/path",
            "/prune/strategi",
            "/calibration/seq_len",
            "/name",
            "/calibration/samples",
            "/prune/amount/layers",
        ];
        let mut found = pointers(spec);
        let mut expected: Vec<_> = expected.map(String::from).into();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn an_unknown_strategy_brings_no_complaint_about_the_layers_it_may_have_meant() {
        let spec =
            json!({"model": {"from": "path", "path": "m"}, "prune": {"strategy": "expicit", "layers": [1]}});
        assert_eq!(pointers(spec), ["/prune/strategy"]);
    }

    #[test]
    fn an_amount_is_layers_or_fraction_and_never_both() {
        for (amount, at) in [
            (json!({"layers": 1, "fraction": 0.1}), "/prune/amount"),
            (json!({"percent": 3}), "/prune/amount/percent"),
            (json!({"layers": 1.5}), "/prune/amount/layers"),
            (json!({"fraction": 1.0}), "/prune/amount/fraction"),
            (json!("all"), "/prune/amount"),
        ] {
            let spec = json!({"model": {"from": "path", "path": "m"}, "prune": {"amount": amount}});
            assert_eq!(pointers(spec), [at], "{amount}");
        }
    }

    #[test]
    fn text_that_no_database_keeps_is_refused_at_its_place() {
        let mut spec = full();
        spec["name"] = json!("a\0b");
        spec["labels"] = json!({"k\0": "v", "team": "\0"});
        spec["eval"]["perplexity"][0]["text"] = json!("words\0");
        let mut found = pointers(spec);
        found.sort();
        assert_eq!(found, ["/eval/perplexity/0/text", "/labels/k\0", "/labels/team", "/name"]);
    }

    #[test]
    fn messages_stay_short_whatever_is_sent() {
        let long = "x".repeat(1 << 20);
        let complaints =
            JobSpec::read(json!({"model": {"from": long}, "prune": long, "preset": long})).unwrap_err();
        assert!(complaints.iter().all(|c| c.message.len() < 300), "{complaints:?}");
        let many: serde_json::Map<_, _> = (0..1000).map(|i| (format!("f{i}"), json!(i))).collect();
        assert_eq!(JobSpec::read(Value::Object(many)).unwrap_err().len(), MAX_COMPLAINTS);
    }
}
