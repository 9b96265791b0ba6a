#!/usr/bin/env python3
"""Trains the same adapters with secateur and with peft + transformers and compares the loss of every optimizer step.

    cargo build --release
    python3 scripts/parity_training.py --model DIR --text FILE.txt [--bits 4]

Same cut, same windows, same fresh adapters, same optimizer and schedule, float32 around a base in 16 or 4 bits (NF4 of
bitsandbytes). Every step takes all windows, so that no order matters. Exits with 1 when a loss is off by more than
one per cent, or the adapter that secateur leaves gives other logits in peft. Needs torch, transformers, peft and numpy,
and bitsandbytes for 4 bits.
"""
import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 0.01  # relative, of the loss of each step
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 7


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, type=pathlib.Path)
    p.add_argument("--binary", default="target/release/secateur", type=pathlib.Path)
    p.add_argument("--text", required=True, type=pathlib.Path, help="plain text")
    p.add_argument("--bits", default=16, type=int, choices=[4, 16])
    p.add_argument("--drop", default=6, type=int, help="layers to drop")
    p.add_argument("--steps", default=20, type=int)
    p.add_argument("--windows", default=9, type=int, help="windows of a step; one more is held out")
    p.add_argument("--seq-len", default=128, type=int)
    p.add_argument("--learning-rate", default=1e-3, type=float)
    p.add_argument("--threads", default=2, type=int)
    return p.parse_args()


def run_secateur(args, rows, workspace):
    corpus = workspace / "rows.jsonl"
    corpus.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    other = {"from": "text", "text": args.text.read_text()[:20_000]}
    heal = {
        "method": "qlora", "corpus": {"from": "path", "path": str(corpus)}, "rank": 8, "alpha": 16, "dropout": 0.0,
        "targets": ["all"], "bits": args.bits, "learning_rate": args.learning_rate, "warmup_steps": 4,
        "steps": args.steps, "batch_size": args.windows, "seq_len": args.seq_len, "weight_decay": 0.01,
    }
    spec = {
        "model": {"from": "path", "path": str(args.model.resolve())},
        "calibration": {"corpus": other, "samples": 4, "seq_len": 64},
        "prune": {"amount": {"layers": args.drop}, "strategy": "block_endpoint", "keep_first": 1},
        "heal": [heal], "seed": SEED,
    }
    path = workspace / "spec.json"
    path.write_text(json.dumps(spec))
    command = [args.binary, "run", path, "--workspace", workspace / "run", "--until", "heal", "--precision", "f32",
               "--events", "jsonl"]
    out = subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    events = [json.loads(line) for line in out.splitlines()]
    return [e["value"] for e in events if e.get("name") == "loss"], workspace / "run"


def mix(x):
    """The finaliser of SplitMix64, as in src/engine/chance.rs."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def stream_key(parts):
    key = np.uint64(0)
    for part in parts:
        key = mix(key ^ mix(np.uint64(part)))
    return key


def fresh_a(seed_key, layer, index, rank, inputs):
    """The `A` of a new adapter, drawn as secateur draws it."""
    key = stream_key([seed_key, layer, index])
    bits = mix(key ^ mix(np.arange(rank * inputs, dtype=np.uint64)))
    unit = (bits >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    return torch.tensor((unit * 2 - 1) / math.sqrt(inputs), dtype=torch.float32).reshape(rank, inputs)


def base_model(path, bits):
    if bits == 16:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)


def train_peer(args, pruned, rows):
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base_model(pruned, args.bits), config)
    key = stream_key([SEED, 1])
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            index = TARGETS.index(name.split(".lora_A")[0].split(".")[-1])
            parameter.data = fresh_a(key, layer, index, *parameter.shape)
        elif "lora_B" in name:
            parameter.data = torch.zeros_like(parameter, dtype=torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.01)
    from transformers import get_cosine_schedule_with_warmup

    schedule = get_cosine_schedule_with_warmup(optimizer, 4, args.steps)
    batch = torch.tensor(rows)
    losses = []
    for _ in range(args.steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def adapter_differences(run, row):
    """How far logits are from those of the pruned model with the adapter, in peft, by root mean squares: of the healed
    files, and of what peft makes of the same adapter when it merges it and rounds to the checkpoint's 16 bits."""
    ids = torch.tensor([row])

    def load(name, dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained(run / name, dtype=dtype)

    adapted = PeftModel.from_pretrained(load("pruned"), run / "adapter")
    wanted = adapted(ids).logits
    merged = adapted.merge_and_unload().to(load("pruned", "auto").dtype).float()

    def off(logits):
        return ((wanted - logits).square().mean() / wanted.square().mean()).sqrt().item()

    return off(load("healed")(ids).logits), off(merged(ids).logits)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text(), add_special_tokens=False)["input_ids"]
    start = len(ids) // 2
    rows = [ids[start + i * args.seq_len:][:args.seq_len] for i in range(args.windows + 1)]
    with tempfile.TemporaryDirectory() as directory:
        ours, run = run_secateur(args, rows, pathlib.Path(directory))
        theirs = train_peer(args, run / "pruned", rows[:args.windows])
        off = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
        for step, (a, b) in enumerate(zip(ours, theirs)):
            print(f"step {step:3}  secateur {a:.5f}  peft {b:.5f}")
        healed, merged = adapter_differences(run, rows[-1])
    print(f"largest difference of a step's loss: {100 * max(off):.4f} %")
    print(f"adapter against merged files: logits differ by {100 * healed:.3f} %, by {100 * merged:.3f} % if peft merges")
    # Rounding to 16 bits is what merging costs, whoever does it.
    good = max(off) < TOLERANCE and healed < 1.2 * merged + 1e-4
    print("agrees" if good else "DISAGREES")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
