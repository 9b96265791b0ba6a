#!/usr/bin/env python3
"""Reads the GGUF files of a run with other people's programs and compares every number.

    secateur run SPEC --workspace DIR          # with "export": {"gguf": [...]}
    python3 scripts/parity_gguf.py --workspace DIR --text FILE.txt

The package gguf reads every tensor of every file, which is compared with the checkpoint's, and transformers computes with
what was read: the perplexity must be the one that the report tells. llama.cpp (through the npm package node-llama-cpp, see
llama_cpp.mjs) loads every file: it must cut texts into the same tokens as the tokenizer of the checkpoint, come to the
perplexity of transformers on the first windows, and, from the f16 file, write greedily what transformers writes. Exits
with 1 when anything disagrees. Needs transformers, torch, numpy, safetensors and gguf.
"""
import argparse
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

# Root mean square of the difference of a tensor, relative to its own.
TOLERANCE = {"F32": 1e-6, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01, "Q6_K": 0.025, "Q5_1": 0.06, "Q5_0": 0.06,
             "Q5_K": 0.05, "Q4_K": 0.1, "Q4_0": 0.12}
# Relative differences of perplexity: transformers computes as we do; llama.cpp with activations in 8 bits where
# weights have few.
OUR_TOLERANCE = 5e-3
LLAMA_CPP_TOLERANCE = {"f16": 2e-3, "bf16": 2e-3}
# llama.cpp gives the probabilities of the whole vocabulary, which takes its time.
LLAMA_CPP_WINDOWS = 3
TEXTS = [
    "Hello, world!", " leading", "trailing ", "12345 and 3.14", "tabs\tand\nnew\n\nlines", "don't I'll we've",
    "naïve café – “quotes”", "日本語のテキスト", "🙂👍🏽 family 👨‍👩‍👧", "x" * 50, "   spaces    between   ",
    "def f(x):\n    return x ** 2  # code\n", "<|im_start|>user\nHi<|im_end|>\n", "ÀÉÎÕÜ ß Ω ж", "\r\n mixed\r",
]


def hugging_face_name(name):
    tops = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight"}
    if name in tops:
        return tops[name]
    _, layer, part, suffix = name.split(".")
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    return f"model.layers.{layer}.{parts[part]}.{suffix}"


def halves(matrix, heads):
    """Undoes the order of rows that llama.cpp rotates in."""
    rows = matrix.shape[0]
    return matrix.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def tensors_agree(path, checkpoint, config, weights):
    worst = {}
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        for tensor in GGUFReader(path).tensors:
            found = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
            part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
            if part in heads:
                found = halves(found, heads[part])
            expected = stored.get_tensor(hugging_face_name(tensor.name)).float().numpy()
            weights[hugging_face_name(tensor.name)] = torch.from_numpy(found.copy())
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            kind = tensor.tensor_type.name
            worst[kind] = max(worst.get(kind, 0.0), float(error))
    print(f"{path.name}: tensors differ by at most", ", ".join(f"{k} {v:.4f}" for k, v in sorted(worst.items())))
    return all(error <= TOLERANCE[kind] for kind, error in worst.items())


def nll(model, windows):
    """Mean negative log-likelihood of the tokens of each window after its first."""
    out = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            logs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
            out.append(-logs.gather(-1, ids[0, 1:, None]).mean().item())
    return out


def perplexity(nll):
    return math.exp(sum(nll) / len(nll))


def llama_cpp(**asked):
    script = pathlib.Path(__file__).with_name("llama_cpp.mjs")
    out = subprocess.run(["node", script], input=json.dumps(asked), capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--workspace", required=True, type=pathlib.Path)
    p.add_argument("--text", required=True, type=pathlib.Path, help="the text of the run's perplexity")
    args = p.parse_args()
    report = json.loads((args.workspace / "report.json").read_text())
    checkpoint = args.workspace / ("healed" if (args.workspace / "healed").is_dir() else "pruned")
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    text = args.text.read_text()
    length = report["spec"]["eval"]["seq_len"]
    ids = encode(text)
    windows = [ids[i:i + length] for i in range(0, len(ids) - length + 1, length)]
    prompt = encode("The capital of France is")
    with torch.no_grad():
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0].tolist()[len(prompt):]
    texts = TEXTS + [line for line in text.splitlines() if line][:200]
    tokens = [encode(text) for text in texts]
    good = True
    for found in report["eval"]["gguf"]:
        path, kind = args.workspace / found["path"], found["type"]
        weights = {}
        good &= tensors_agree(path, checkpoint, config, weights)
        model.load_state_dict(weights, strict=False)
        reference = nll(model, windows)
        ours = found["perplexity"][0]["value"]
        of_ours = ours / perplexity(reference) - 1
        theirs = llama_cpp(model=str(path.resolve()), texts=texts, windows=windows[:LLAMA_CPP_WINDOWS], prompt=prompt,
                           tokens=32)
        of_theirs = perplexity(theirs["nll"]) / perplexity(reference[:LLAMA_CPP_WINDOWS]) - 1
        other = [t for t, a, b in zip(texts, tokens, theirs["tokens"]) if a != b]
        same = sum(a == b for a, b in zip(greedy, theirs["written"]))
        print(f"{path.name}: perplexity {perplexity(reference):.3f} by transformers on these weights, {ours:.3f} by secateur "
              f"({of_ours:+.3%}); llama.cpp on the first windows {of_theirs:+.3%}")
        print(f"    {len(texts) - len(other)} of {len(texts)} texts cut into the same tokens; {same} of {len(greedy)} "
              f"greedy tokens as the checkpoint in transformers: {tokenizer.decode(theirs['written'])!r}")
        good &= not other and abs(of_ours) <= OUR_TOLERANCE
        good &= abs(of_theirs) <= LLAMA_CPP_TOLERANCE.get(kind, 0.03)
        if kind in ("f16", "bf16"):
            good &= theirs["written"] == greedy
        for text in other[:5]:
            print("    other tokens:", repr(text[:60]))
    print("all agrees" if good else "SOMETHING DISAGREES")
    return 0 if good else 1


sys.exit(main())
