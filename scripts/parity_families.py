#!/usr/bin/env python3
"""Compares secateur with transformers on random models of every family: other sizes, flags and seeds each time.

    python3 scripts/parity_families.py --binary target/release/secateur [--seed 1] [--rounds 2] [--families gemma2,phi]

Each model is saved by transformers, in float32, bfloat16 or float16, in one file or in shards, then profiled, cut and measured by
secateur. Compared are: the profile in every cell, the perplexity of base and pruned checkpoint, and what transformers says when it
loads the pruned checkpoint (no missing and no unexpected tensors). Needs torch and transformers 5.
"""
import argparse
import contextlib
import json
import math
import pathlib
import random
import subprocess
import sys
import tempfile

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(2)

VOCAB, WINDOW, WINDOWS = 300, 40, 4
CELL, PERPLEXITY = 1e-4, 1e-3


def plain(rng, **more):
    return dict(rope_type="default", rope_theta=rng.choice([100.0, 10000.0, 500000.0]), **more)


def rope(rng, partial=None):
    more = {} if partial is None else dict(partial_rotary_factor=partial)
    theta = rng.choice([100.0, 10000.0])
    return rng.choice([
        plain(rng, **more),
        dict(rope_type="linear", factor=2.5, rope_theta=theta, **more),
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16, rope_theta=theta, **more),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=theta, **more),
    ])


def shape(rng):
    heads, kv = rng.choice([(4, 4), (4, 2), (4, 1), (6, 3), (3, 1)])
    return dict(vocab_size=VOCAB, hidden_size=heads * rng.choice([8, 12, 16]), intermediate_size=rng.choice([40, 72]),
                num_hidden_layers=rng.choice([5, 7, 9]), num_attention_heads=heads, num_key_value_heads=kv,
                max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def flags(kind, rng, s):
    flip = lambda: rng.random() < 0.5
    layers = s["num_hidden_layers"]
    kinds = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]
    window = dict(sliding_window=rng.choice([5, 17, None]))
    qwen = dict(use_sliding_window=flip(), sliding_window=7, max_window_layers=rng.choice([0, 2, 4]), rope_parameters=rope(rng), tie_word_embeddings=flip())
    head_dim = dict(head_dim=rng.choice([8, 10, 24]))
    return {
        "llama": lambda: dict(rope_parameters=rope(rng), attention_bias=flip(), mlp_bias=flip(), tie_word_embeddings=flip(), **(head_dim if flip() else {})),
        "mistral": lambda: window | head_dim | dict(rope_parameters=rope(rng)),
        "mixtral": lambda: window | dict(num_local_experts=rng.choice([3, 8]), num_experts_per_tok=rng.choice([1, 2])),
        "qwen2": lambda: qwen,
        "qwen3": lambda: qwen | head_dim | dict(attention_bias=flip()),
        "qwen3_moe": lambda: dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=flip(), decoder_sparse_step=rng.choice([1, 2, 3]),
                                  mlp_only_layers=rng.sample(range(layers), 2), use_sliding_window=flip(), sliding_window=9, attention_bias=flip(), **head_dim),
        "gemma": lambda: head_dim | dict(attention_bias=flip()),
        "gemma2": lambda: head_dim | dict(sliding_window=rng.choice([4, 16]), query_pre_attn_scalar=rng.choice([8, 30]), attn_logit_softcapping=rng.choice([None, 5.0, 50.0]),
                                          final_logit_softcapping=rng.choice([None, 10.0]), **(dict(layer_types=kinds) if flip() else {})),
        "gemma3_text": lambda: head_dim | dict(sliding_window=rng.choice([4, 16]), query_pre_attn_scalar=rng.choice([8, 30]), final_logit_softcapping=rng.choice([None, 10.0]),
                                               **(dict(layer_types=kinds) if flip() else {})),
        "phi": lambda: dict(qk_layernorm=flip(), rope_parameters=plain(rng, partial_rotary_factor=rng.choice([0.5, 0.25])), hidden_act=rng.choice(["gelu_new", "gelu", "relu"])),
        "phi3": lambda: window | dict(rope_parameters=plain(rng, partial_rotary_factor=rng.choice([0.5, 1.0]))),
        "gpt2": lambda: dict(n_inner=rng.choice([None, 56]), scale_attn_weights=flip(), activation_function=rng.choice(["gelu_new", "gelu", "relu"])),
        "gpt_neox": lambda: dict(use_parallel_residual=flip(), attention_bias=flip(), rope_parameters=plain(rng, partial_rotary_factor=rng.choice([0.25, 0.5, 1.0])), tie_word_embeddings=flip()),
        "olmo2": lambda: dict(attention_bias=flip(), rope_parameters=rope(rng)),
        "smollm3": lambda: dict(use_sliding_window=flip(), sliding_window=6, no_rope_layer_interval=rng.choice([2, 3, 4]), rope_parameters=rope(rng), attention_bias=flip(), mlp_bias=flip()),
        "granite": lambda: dict(embedding_multiplier=rng.choice([1.0, 6.0]), residual_multiplier=rng.choice([1.0, 0.3]), attention_multiplier=rng.choice([0.1, 0.3]), logits_scaling=rng.choice([1.0, 4.0]),
                                attention_bias=flip(), mlp_bias=flip(), rope_parameters=rope(rng)),
        "starcoder2": lambda: window | dict(use_bias=flip(), rope_parameters=rope(rng)),
        "stablelm": lambda: dict(use_parallel_residual=flip(), qk_layernorm=flip(), use_qkv_bias=flip(), rope_parameters=plain(rng, partial_rotary_factor=rng.choice([0.25, 0.5]))),
    }[kind]()


FAMILIES = ("llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox olmo2 smollm3 granite starcoder2 stablelm").split()


def build(kind, rng):
    s = shape(rng)
    changes = flags(kind, rng, s)
    if kind in ("phi", "gpt_neox", "stablelm") and s["hidden_size"] // s["num_attention_heads"] % 8:
        s["hidden_size"] = s["num_attention_heads"] * 16
    if kind == "gpt2":
        s = dict(vocab_size=VOCAB, n_embd=s["hidden_size"], n_layer=s["num_hidden_layers"], n_head=s["num_attention_heads"], n_positions=64, bos_token_id=1, eos_token_id=2)
    if kind == "gpt_neox":
        s.pop("num_key_value_heads")
    if kind == "stablelm" and changes["qk_layernorm"] is None:
        changes.pop("qk_layernorm")
    if changes.get("head_dim") and changes.get("rope_parameters", {}).get("partial_rotary_factor"):
        changes.pop("head_dim")
    config = transformers.CONFIG_MAPPING[kind](**{**s, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(rng.randrange(1 << 30))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            one = 0.0 if kind.startswith("gemma") else 1.0
            norm = p.dim() == 1 and name.endswith("weight")
            p.copy_(one + 0.2 * torch.randn_like(p) if norm else torch.randn_like(p) * (0.2 if p.dim() == 1 else 1.2 / p.shape[-1] ** 0.5))
    return config, model, changes


def tokenizer(path):
    vocab = {chr(0x4E00 + i): i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(vocab, unk_token=chr(0x4E00)))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    made.save(str(path))


@torch.no_grad()
def streams(model, ids):
    base = model.base_model
    layers = base.h if hasattr(base, "h") else base.layers
    last = next(getattr(base, n) for n in ("norm", "ln_f", "final_layernorm", "final_layer_norm") if hasattr(base, n))
    kept = []

    def keep(_, args, kw):
        kept.append((args or (kw["hidden_states"],))[0])

    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in [*layers, last]]
    model(ids)
    for hook in hooks:
        hook.remove()
    return kept


def profile(model, ids):
    """Mean angular distance at the last token, by length and start."""
    ends = [x[:, -1].double() for x in streams(model, ids)]
    unit = [x / x.norm(dim=-1, keepdim=True) for x in ends]
    count = len(unit) - 1
    angle = lambda a, b: ((a * b).sum(-1).clamp(-1, 1).arccos() / math.pi).mean().item()
    return [[angle(unit[l], unit[l + n]) for l in range(count - n + 1)] for n in range(1, count + 1)]


@torch.no_grad()
def perplexity(model, ids):
    logits = model(ids).logits[:, :-1].double().log_softmax(-1)
    return math.exp(-logits.gather(-1, ids[:, 1:, None]).mean().item())


def load(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    said = {k: sorted(v) for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return model.eval(), said


def check(kind, seed, binary, keep):
    rng = random.Random(f"{kind}{seed}")
    config, model, changes = build(kind, rng)
    wrong = []
    with contextlib.ExitStack() as stack:
        work = pathlib.Path(tempfile.mkdtemp(prefix=kind) if keep else stack.enter_context(tempfile.TemporaryDirectory()))
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        model.to(dtype).save_pretrained(work / "base", max_shard_size=rng.choice(["20KB", "1GB"]))
        tokenizer(work / "base" / "tokenizer.json")
        model, _ = load(work / "base")
        torch.manual_seed(seed)
        ids = torch.randint(3, VOCAB, (WINDOWS, WINDOW))
        rows = work / "ids.jsonl"
        rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
        layers = config.num_hidden_layers
        dropped = sorted(rng.sample(range(layers), rng.choice([1, 2, 3])))
        corpus = {"from": "path", "path": str(rows)}
        spec = {"model": {"from": "path", "path": str(work / "base")}, "calibration": {"corpus": corpus, "samples": WINDOWS, "seq_len": WINDOW},
                "prune": {"strategy": "explicit", "layers": dropped}, "heal": [], "eval": {"perplexity": [corpus], "speed": False}}
        (work / "spec.json").write_text(json.dumps(spec))
        run = subprocess.run([binary, "run", work / "spec.json", "--workspace", work / "out", "--precision", "f32"], capture_output=True, text=True)
        if run.returncode != 0:
            wrong.append(run.stderr.strip().splitlines()[-1])
        else:
            found = json.loads((work / "out/profile.json").read_text())["by_len"]
            cell = max(abs(a - b) for x, y in zip(found, profile(model, ids)) for a, b in zip(x, y))
            measured = json.loads((work / "out/eval.json").read_text())
            pruned, said = load(work / "out/pruned")
            pairs = [(measured[which]["perplexity"][0]["value"], perplexity(m, ids)) for which, m in (("base", model), ("pruned", pruned))]
            off = max(abs(a / b - 1) for a, b in pairs)
            if said:
                wrong.append(f"loading the pruned checkpoint: {said}")
            if not cell < CELL:
                wrong.append(f"profile differs by {cell:.1e}")
            if not off < PERPLEXITY:
                wrong.append(f"perplexity {pairs}")
            # Layer by layer: what the pruned one computes is what the base computes without those layers.
            if not wrong:
                print(f"ok    {kind} {seed}: cell {cell:.1e}, perplexity {off:.1e}, -{len(dropped)} of {layers}, {str(dtype)[6:]}")
    for line in wrong:
        print(f"WRONG {kind} {seed}: {line}\n      {changes} dropped {dropped}")
    return not wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default="target/release/secateur")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--keep", action="store_true", help="keep the files")
    args = parser.parse_args()
    results = [check(kind, seed, args.binary, args.keep) for seed in range(args.seed, args.seed + args.rounds) for kind in args.families.split(",")]
    print(f"{sum(results)} of {len(results)} agree")
    sys.exit(not all(results))
