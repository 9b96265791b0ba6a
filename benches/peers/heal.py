#!/usr/bin/env python3
"""What healing brings back, beside QLoRA as peft and bitsandbytes do it: the same cut, the same tokens, the same judge.

    cargo build --release
    PYTHON benches/peers/heal.py --model DIR --train ROWS.jsonl --judge A.txt --judge B.jsonl --drop 3,6,9 --seeds 0,1

PYTHON is one that has torch, transformers, peft and bitsandbytes: `make bench-peers` makes it in the cache. Every
method gets the same windows of the text to train on; all checkpoints, the peer's merged one among them, are judged by
`secateur run` on the same texts. Prints a line of JSON a row: perplexities, and the share of the lost log-perplexity
that came back.
"""
import argparse
import json
import math
import pathlib
import random
import subprocess
import sys
import tempfile
import time

TRAINING = {"steps": 60, "batch_size": 4, "seq_len": 256, "learning_rate": 5e-4, "warmup_steps": 3}
RANK, DROPOUT, WEIGHT_DECAY = 16, 0.05, 0.01
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# secateur keeps as many apart to judge the healing by; the peer does not see them either.
HELD_OUT = 16


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, type=pathlib.Path)
    p.add_argument("--binary", default="target/release/secateur", type=pathlib.Path)
    p.add_argument("--train", required=True, type=pathlib.Path, help='JSONL of {"text"}')
    p.add_argument("--judge", required=True, type=pathlib.Path, action="append", help="text that judges; again for more")
    p.add_argument("--drop", default="3,6,9")
    p.add_argument("--heals", default="qlora;least_squares, qlora;reconstruct, qlora;peft", help="some of these, by semicolon")
    p.add_argument("--seeds", default="0,1")
    p.add_argument("--threads", default=2, type=int)
    return p.parse_args()


def corpus(path):
    return {"from": "path", "path": str(path.resolve())}


class Bench:
    def __init__(self, args, scratch):
        self.args, self.scratch = args, scratch
        self.rows = scratch / "rows.jsonl"

    def write_rows(self):
        """Windows in the order of the text: as many as the training sees, and those that judge it."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.args.model)
        texts = (json.loads(line)["text"] for line in self.args.train.open())
        length, count = TRAINING["seq_len"], TRAINING["steps"] * TRAINING["batch_size"] + HELD_OUT
        ids, rows = [], []
        for text in texts:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"] + tokenizer("\n\n")["input_ids"]
            while len(ids) >= length and len(rows) < count:
                rows.append(ids[:length])
                ids = ids[length:]
            if len(rows) == count:
                break
        assert len(rows) == count, f"{self.args.train} gives {len(rows)} of {count} windows"
        self.rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        return rows[:-HELD_OUT]

    def spec(self, model, prune, heal, seed):
        return {
            "model": {"from": "path", "path": str(model.resolve())},
            "calibration": {"corpus": corpus(self.args.train), "samples": 64, "seq_len": 256},
            "prune": prune, "heal": heal, "seed": seed,
            "eval": {"perplexity": [corpus(path) for path in self.args.judge], "speed": False, "generation": None,
                     "seq_len": 512},
        }

    def run(self, name, spec, until="eval"):
        """Runs a job in a workspace of that name; gives its evaluation and how long it took."""
        path, workspace = self.scratch / f"{name}.json", self.scratch / name
        path.write_text(json.dumps(spec))
        start = time.monotonic()
        subprocess.run([self.args.binary, "run", path, "--workspace", workspace, "--until", until, "--threads",
                        str(self.args.threads), "--records", self.scratch / "records"], check=True, stdout=sys.stderr)
        scores = json.loads((workspace / "eval.json").read_text()) if until == "eval" else None
        return workspace, scores, time.monotonic() - start

    def judged(self, checkpoint, name):
        """The losses of a checkpoint that another program wrote: as the base of a job."""
        _, scores, _ = self.run(name, self.spec(checkpoint, {"amount": {"layers": 1}, "strategy": "deepest"}, [], 0))
        return losses(scores["base"])


def losses(scores):
    return [text["nll_per_token"] for text in scores["perplexity"]]


def qlora(rows):
    return {"method": "qlora", "corpus": corpus(rows), "rank": RANK, "alpha": RANK, "dropout": DROPOUT, "targets": ["all"],
            "bits": 4, "weight_decay": WEIGHT_DECAY, **TRAINING}


def peer(pruned, rows, seed, out):
    """QLoRA over NF4 with double quantisation, products in bfloat16, merged into the 16-bit weights."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_cosine_schedule_with_warmup

    torch.manual_seed(seed)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                   bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16, quantization_config=quantised)
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=DROPOUT, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, TRAINING["warmup_steps"], TRAINING["steps"])
    order = random.Random(seed).sample(rows, len(rows))
    start = time.monotonic()
    for step in range(TRAINING["steps"]):
        batch = torch.tensor(order[step * TRAINING["batch_size"]:][:TRAINING["batch_size"]])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.monotonic() - start
    adapter = out.with_name(out.name + "-adapter")
    model.save_pretrained(adapter)
    whole = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16)
    PeftModel.from_pretrained(whole, adapter).merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(pruned).save_pretrained(out)
    return seconds


def main():
    args = arguments()
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(args, pathlib.Path(directory))
        rows = bench.write_rows()
        ours = {"qlora": [], "least_squares, qlora": [{"method": "least_squares", "corpus": corpus(bench.rows)}],
                "reconstruct, qlora": [{"method": "reconstruct", "corpus": corpus(bench.rows), "learning_rate": 1e-3}]}
        heals = args.heals.split(";")
        for drop in map(int, args.drop.split(",")):
            prune = {"amount": {"layers": drop}, "strategy": "block_endpoint", "keep_first": 1}
            workspace, scores, _ = bench.run(f"cut-{drop}", bench.spec(args.model, prune, [], 0))
            base, cut = losses(scores["base"]), losses(scores["pruned"])
            tell = lambda heal, seed, found, seconds: print(json.dumps({
                "drop": drop, "heal": heal, "seed": seed, "seconds": round(seconds, 1),
                "perplexity": [round(math.exp(loss), 2) for loss in found],
                "recovered": [round((c - f) / (c - b), 3) for b, c, f in zip(base, cut, found)]}), flush=True)
            tell("intact", None, base, 0)
            tell("none", None, cut, 0)
            for seed in map(int, args.seeds.split(",")):
                for name, before in ((name, ours[name]) for name in heals if name in ours):
                    spec = bench.spec(args.model, prune, [*before, qlora(bench.rows)], seed)
                    _, scores, seconds = bench.run(f"ours-{drop}-{seed}-{len(name)}", spec)
                    tell(name, seed, losses(scores["healed"]), seconds)
                if "peft" not in heals:
                    continue
                out = bench.scratch / f"peft-{drop}-{seed}"
                seconds = peer(workspace / "pruned", rows, seed, out)
                tell("peft", seed, bench.judged(out, f"judged-{drop}-{seed}"), seconds)


if __name__ == "__main__":
    main()
