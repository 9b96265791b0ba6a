#!/usr/bin/env python3
"""The work of benches/engine.rs in PyTorch: python3 benches/engine_torch.py MODEL_DIR [float32|bfloat16]

Needs torch, transformers and peft. Two threads, best of three after one run to warm up.
"""
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

torch.set_num_threads(2)
directory, dtype = sys.argv[1], getattr(torch, sys.argv[2] if len(sys.argv) > 2 else "float32")
model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
vocab = model.config.vocab_size


def report(what, tokens, work):
    work()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    print(f"{what}: {best:.3f} s, {tokens / best:.0f} tokens/s", flush=True)


@torch.inference_mode()
def forward_and_decode():
    ids = torch.randint(0, vocab, (4, 512))
    report("forward 4 x 512, body", 2048, lambda: model.model(ids, use_cache=False))
    for batch, steps in [(1, 32), (64, 16)]:
        def decode():
            cache, token = None, torch.zeros((batch, 1), dtype=torch.long)
            for _ in range(steps):
                out = model(token, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
        report(f"decode {steps} tokens, batch {batch}", steps * batch, decode)


def training_step():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=targets)).train()
    ids = torch.randint(0, vocab, (4, 256))

    def step():
        adapted.zero_grad()
        adapted(ids, labels=ids).loss.backward()
    report("LoRA step 4 x 256, r 8, all linears, no checkpointing", 1024, step)


forward_and_decode()
training_step()
