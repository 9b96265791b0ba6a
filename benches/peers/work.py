#!/usr/bin/env python3
"""One piece of work as our peers do it, told as one line of JSON. `run.py` starts one process for each.

The clock starts when everything is imported: who starts a process anew for every job pays a few seconds more,
which `run.py` tells as the time of the whole process. `check` is what must come out as with us.
"""
import argparse
import json
import math
import pathlib
import statistics
import time

# More sequences at a time than we take: what the peers are fastest with here.
EVAL_BATCH = 16
PROFILE_BATCH = 8
DECODED = 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(args, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype_of(args), **options).eval()


def dtype_of(args):
    import torch

    return {"bf16": torch.bfloat16, "f32": torch.float32}[args.dtype]


def windows(model, count, length):
    """Any tokens, the same as in benches/engine.rs."""
    import torch

    vocab = model.config.vocab_size
    return torch.tensor([[(n * 31 + i * 7919) % vocab for i in range(length)] for n in range(count)])


def timed(work):
    start = time.perf_counter()
    value = work()
    return time.perf_counter() - start, value


def repeated(args, tokens, work):
    """As `report` in benches/engine.rs: the first run, which warms up, apart from the others."""
    first, value = timed(work)
    seconds = []
    for _ in range(args.repeats):
        duration, value = timed(work)
        seconds.append(duration)
    assert math.isfinite(value), "numbers that are not finite may be fast for that reason"
    return {"tokens": tokens, "first_s": first, "seconds": seconds, "check": {args.check: value}}


def forward(args):
    import torch

    model = load(args)
    ids = windows(model, 4, 512)

    @torch.inference_mode()
    def work():
        last = model.model(ids, use_cache=False).last_hidden_state[-1:, -1:]
        return model.lm_head(last).max().item()

    return repeated(args, ids.numel(), work)


def decode(args):
    import torch

    model = load(args)

    @torch.inference_mode()
    def work():
        token, cache = torch.zeros((args.batch, 1), dtype=torch.long), None
        for _ in range(DECODED):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        return out.logits.max().item()

    return repeated(args, DECODED * args.batch, work)


def step(args):
    """Loss and gradients, as with us: without the optimizer, which has the same little work everywhere."""
    import torch
    from peft import LoraConfig, get_peft_model

    options = {}
    if args.nf4:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype_of(args))
    model = load(args, **options)
    ids = windows(model, 4, 256)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS)).train()
    if args.checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run = torch.compile(adapted) if args.compile else adapted

    def work():
        adapted.zero_grad()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item()

    return repeated(args, ids.numel(), work)


def rows_of(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def distance(a, b):
    import torch

    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    return cosine.clamp(-1, 1).arccos() / math.pi


def profile(args):
    """One pass, with hooks that keep the last token's stream before every layer, then all pairs."""
    import torch
    import transformers  # noqa: F401

    ids = torch.tensor([row["input_ids"] for row in rows_of(args.windows)])

    @torch.inference_mode()
    def work():
        body = load(args).model
        seen = []
        keep = lambda _, given, named: seen.append((given[0] if given else named["hidden_states"])[:, -1].clone())
        for module in [*body.layers, body.norm]:
            module.register_forward_pre_hook(keep, with_kwargs=True)
        batches = []
        for batch in ids.split(PROFILE_BATCH):
            seen.clear()
            body(batch, use_cache=False)
            batches.append(torch.stack(seen))
        streams = torch.cat(batches, 1)
        layers = len(streams) - 1
        return [distance(streams[:-n], streams[n:]).mean(1).tolist() for n in range(1, layers + 1)]

    duration, by_len = timed(work)
    cells = [cell for row in by_len for cell in row]
    return {"tokens": ids.numel(), "seconds": [duration], "check": {args.check: statistics.fmean(cells)}}


def profile_per_n(args):
    """A pass over everything for each block length, logits included, as PruneMe does. Two of the passes are
    run; the others cost the same, as no pass depends on n but for a few hundred cosines."""
    import torch
    import transformers  # noqa: F401

    ids = torch.tensor([row["input_ids"] for row in rows_of(args.windows)])
    loading, model = timed(lambda: load(args))
    layers = model.config.num_hidden_layers

    @torch.inference_mode()
    def one_length(n):
        means = []
        for batch in ids.split(PROFILE_BATCH):
            streams = model(batch, output_hidden_states=True, use_cache=False).hidden_states
            last = torch.stack([stream[:, -1] for stream in streams])
            means.append(distance(last[:-n], last[n:]).mean(1))
        return torch.stack(means).mean(0)

    passes = [timed(lambda: one_length(n))[0] for n in (1, layers // 2)]
    return {"tokens": ids.numel(), "seconds": [loading + layers * statistics.median(passes)], "passes_s": passes,
            "note": f"{len(passes)} of its {layers} passes were run, at {statistics.median(passes):.1f} s each; "
                    "the time is reckoned from them"}


def evaluate(args):
    """lm-evaluation-harness on the same items, each checkpoint in turn."""
    import logging

    import lm_eval.models.huggingface
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.disable(logging.WARNING)
    tasks = []
    for given in args.items:
        name, path = given.split("=", 1)
        tasks.append({
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": path}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    manager = TaskManager(include_defaults=False)

    def work():
        check = {}
        for which, path in [("base", args.model), ("pruned", args.pruned)]:
            model = lm_eval.models.huggingface.HFLM(
                pretrained=path, dtype=dtype_of(args), device="cpu", batch_size=EVAL_BATCH)
            found = simple_evaluate(model, tasks=[dict(task) for task in tasks], task_manager=manager,
                                    log_samples=False)["results"]
            for task in tasks:
                for metric in ("acc", "acc_norm"):
                    check[f"{which} {task['task']} {metric}"] = found[task["task"]][f"{metric},none"]
        return check

    duration, check = timed(work)
    return {"seconds": [duration], "check": check}


def merge(args):
    """mergekit's passthrough: what `secateur prune` does."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    first, last = args.drop
    layers = json.loads((pathlib.Path(args.model) / "config.json").read_text())["num_hidden_layers"]
    slices = [{"sources": [{"model": args.model, "layer_range": kept}]} for kept in ([0, first], [last + 1, layers])]
    text = yaml.dump({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"})
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions(lazy_unpickle=True, quiet=True)
    duration, _ = timed(lambda: run_merge(config, args.out, options=options))
    return {"seconds": [duration]}


PARTS = {part.__name__: part for part in (forward, decode, step, profile, profile_per_n, evaluate, merge)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", default="check", help="what the number to compare is called")
    parser.add_argument("--batch", type=int, default=1, help="decode: sequences")
    parser.add_argument("--nf4", action="store_true", help="step: bitsandbytes' base")
    parser.add_argument("--checkpointing", action="store_true", help="step: compute activations again")
    parser.add_argument("--compile", action="store_true", help="step: torch.compile")
    parser.add_argument("--windows", help="profile: JSONL of input_ids")
    parser.add_argument("--items", action="append", default=[], help="evaluate: TASK=FILE")
    parser.add_argument("--pruned", help="evaluate: the second checkpoint")
    parser.add_argument("--drop", nargs=2, type=int, help="merge: first and last layer to leave out")
    parser.add_argument("--out", help="merge: new directory")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    print(json.dumps(PARTS[args.part](args)), flush=True)


if __name__ == "__main__":
    main()
