#!/usr/bin/env python3
"""Asks llama.cpp whether a GGUF file of every family computes what transformers computes, on the models of tests/golden.

    cargo build && python3 scripts/parity_gguf_families.py --binary target/debug/secateur

Every tiny golden model that can be written is exported as f16 and loaded by llama.cpp (see llama_cpp.mjs), whose negative
log-likelihood of the golden tokens must be that of transformers. Where a golden model has what llama.cpp does not know
beside what is to be compared, that is taken out of it. Texts are no longer than the window where layers see one. Exits
with 1 where something differs, or where nothing was compared. Needs torch, transformers and safetensors.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
# What goes beside what is compared: the rotation of the one, the norms of queries and keys of the other.
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CHANGED = {"llama_yarn": {"hidden_act": "silu", "rope_parameters": YARN}, "qwen3": {"attention_bias": False}}
TOLERANCE = 0.01  # nats per token; weights are rounded to f16, the cache to f16


def tokenizer(size):
    """Each byte is a token; text is not what this is about."""
    printable = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b]
    others = [b for b in range(256) if b not in printable]
    letters = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": {letters[b]: b for b in range(min(size, 256))}, "merges": []}}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--binary", default="target/release/secateur", type=pathlib.Path)
    args = p.parse_args()
    compared, good = 0, True
    for path in sorted(GOLDEN.glob("*.json")):
        weights = path.with_suffix(".safetensors")
        if not weights.exists():
            continue
        config = {**json.loads(path.read_text())["newer"], **CHANGED.get(path.stem, {})}
        golden = load_file(weights)
        ids = golden["golden.ids"].long()
        tensors = {k: v for k, v in golden.items() if not k.startswith("golden.")}
        if path.stem == "qwen3":
            tensors = {k: v for k, v in tensors.items() if not k.endswith("proj.bias")}
        if config.get("sliding_window"):
            ids = ids[:, :config["sliding_window"]]
        with tempfile.TemporaryDirectory() as dir:
            dir = pathlib.Path(dir)
            model = dir / "model"
            model.mkdir()
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
            (model / "config.json").write_text(json.dumps(config))
            (model / "tokenizer.json").write_text(json.dumps(tokenizer(config["vocab_size"])))
            out = dir / "model.gguf"
            done = subprocess.run([args.binary, "export", model, "--type", "f16", "--out", out],
                                  capture_output=True, text=True)
            if done.returncode:
                print(f"{path.stem}: refused: {done.stderr.strip().splitlines()[-1]}")
                continue
            theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
            with torch.no_grad():
                logs = torch.log_softmax(theirs(ids).logits.double(), -1)
            expected = -logs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1).mean(-1)
            asked = {"model": str(out), "windows": ids.tolist()}
            ran = subprocess.run(["node", ROOT / "scripts/llama_cpp.mjs"], input=json.dumps(asked), capture_output=True,
                                 text=True)
            if ran.returncode:
                print(f"{path.stem}: llama.cpp: {ran.stderr.strip().splitlines()[-1][:200]}")
                good = False
                continue
            found = torch.tensor(json.loads(ran.stdout)["nll"])
            worst = (found - expected).abs().max().item()
            verdict = "" if worst <= TOLERANCE else "  DIFFERS"
            print(f"{path.stem}: {config['model_type']}, {found.tolist()} nats, differs by at most {worst:.5f}{verdict}")
            good &= worst <= TOLERANCE
            compared += 1
    print(f"{compared} families and forms compared:", "all agree" if good and compared else "SOMETHING DISAGREES")
    return 0 if good and compared else 1


sys.exit(main())
