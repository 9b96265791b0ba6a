#!/usr/bin/env python3
"""Makes the goldens of tests/it/parity.rs: tiny random models of every family, run by transformers in float32.

    python3 tests/golden/make_golden.py [NAME…]        (torch, transformers 5, safetensors, numpy)

Each case is one safetensors file: the weights as transformers saves them, in 16 bits (the values it ran with), and under
`golden.` the token ids, the residual stream at every seam, the logits and the greedy continuation. Beside it lies the
config.json as this transformers writes it, and the same in the older form of transformers 4.
"""
import json
import pathlib
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT2 = dict(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16, rope_theta=500.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1000.0, beta_fast=2.0)
LONG = dict(rope_type="longrope", rope_theta=1000.0, short_factor=[1.0, 1.1, 1.3], long_factor=[1.0, 2.0, 4.0])
SLIDING, FULL = "sliding_attention", "full_attention"


def plain(theta, **more):
    return dict(rope_type="default", rope_theta=theta, **more)


# name: (model_type, changes of the config, type of the weights)
CASES = {
    "llama3": ("llama", dict(rope_parameters=LLAMA3), "bf16"),
    "llama_head_dim": ("llama", dict(tie_word_embeddings=True, head_dim=12), "bf16"),
    "llama_bias": ("llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=dict(plain(100.0), rope_type="linear", factor=2.0)), "f16"),
    "llama_yarn": ("llama", dict(rope_parameters=YARN, hidden_act="relu"), "bf16"),
    "mistral_window": ("mistral", dict(sliding_window=7, rope_parameters=plain(100.0)), "bf16"),
    "mixtral": ("mixtral", dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=9), "bf16"),
    "qwen2_bias": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=plain(1000.0)), "f16"),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=2), "bf16"),
    "qwen3": ("qwen3", dict(head_dim=10, attention_bias=True), "bf16"),
    "qwen3_moe": ("qwen3_moe", dict(head_dim=8, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12,
                                    mlp_only_layers=[1], norm_topk_prob=True), "bf16"),
    "qwen3_moe_step": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=2), "bf16"),
    "gemma": ("gemma", dict(head_dim=12, num_key_value_heads=1), "bf16"),
    "gemma2": ("gemma2", dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=6, attn_logit_softcapping=4.0,
                              final_logit_softcapping=3.0), "bf16"),
    "gemma3": ("gemma3_text", dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=10,
                                   layer_types=[SLIDING, SLIDING, FULL, SLIDING],
                                   rope_parameters={SLIDING: plain(50.0), FULL: dict(plain(5000.0), rope_type="linear", factor=4.0)}), "bf16"),
    "phi": ("phi", dict(num_key_value_heads=4), "f16"),
    "phi_qk_norm": ("phi", dict(qk_layernorm=True, rope_parameters=plain(1000.0, partial_rotary_factor=0.25)), "bf16"),
    "phi3_long": ("phi3", dict(rope_parameters=dict(LONG, partial_rotary_factor=0.75), original_max_position_embeddings=16,
                               sliding_window=20), "bf16"),
    "gpt2": ("gpt2", dict(), "f16"),
    "gpt2_inner": ("gpt2", dict(n_inner=24, scale_attn_weights=False, activation_function="gelu"), "bf16"),
    "gpt_neox": ("gpt_neox", dict(), "f16"),
    "gpt_neox_serial": ("gpt_neox", dict(use_parallel_residual=False, attention_bias=False, rope_parameters=plain(500.0, partial_rotary_factor=1.0)), "bf16"),
    "olmo2": ("olmo2", dict(), "bf16"),
    "smollm3": ("smollm3", dict(use_sliding_window=True, sliding_window=5, no_rope_layers=[1, 0, 1, 0]), "bf16"),
    "granite": ("granite", dict(embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=5.0), "bf16"),
    "starcoder2": ("starcoder2", dict(sliding_window=8), "bf16"),
    "stablelm": ("stablelm", dict(use_qkv_bias=True), "f16"),
    "stablelm_parallel": ("stablelm", dict(use_parallel_residual=True, qk_layernorm=True, rope_parameters=plain(100.0, partial_rotary_factor=0.5)), "bf16"),
}
TOKENS, SEQUENCES, WRITTEN = 24, 2, 12
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def older_form(config):
    """The same config as transformers 4 wrote it."""
    config = dict(config)
    kind = config["model_type"]
    rope = config.pop("rope_parameters", None)
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if kind == "gemma3_text":
        config["rope_theta"] = rope[FULL].pop("rope_theta")
        config["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
        config["rope_scaling"] = rope[FULL]
    elif rope:
        theta, partial = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
        config["rope_theta" if kind != "gpt_neox" else "rotary_emb_base"] = theta
        if partial is not None:
            config["partial_rotary_factor" if kind != "gpt_neox" else "rotary_pct"] = partial
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if kind in ("qwen2", "qwen3", "gemma2", "smollm3"):
        config.pop("layer_types")
    if kind == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    if kind.startswith("gemma") and config.get("tie_word_embeddings"):
        config.pop("tie_word_embeddings")  # the old default was not written
    return config


def build(kind, changes):
    shape = dict(GPT2 if kind == "gpt2" else SHAPE)
    if kind == "gpt_neox":
        shape.pop("num_key_value_heads")
    config = transformers.CONFIG_MAPPING[kind](**{**shape, **changes})
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def randomise(model, kind, dtype):
    plus_one = kind.startswith("gemma")
    for name, p in model.named_parameters():
        leaf = name.split(".")[-1]
        # Wide enough that a wrong mask, angle or bias shows in every number.
        if p.dim() == 1 and leaf == "weight":
            value = (0 if plus_one else 1) + 0.2 * torch.randn_like(p)
        elif p.dim() == 1:
            value = 0.3 * torch.randn_like(p)
        else:
            value = 0.25 * torch.randn_like(p)
        p.copy_(value.to(dtype).float())


def seams(model, ids):
    """The residual stream entering every layer, and the one leaving the last."""
    base = model.base_model
    layers = base.h if hasattr(base, "h") else base.layers
    last = next(getattr(base, n) for n in ("norm", "ln_f", "final_layernorm", "final_layer_norm") if hasattr(base, n))
    streams = []
    def keep(_, args, kw):
        streams.append((args or (kw["hidden_states"],))[0])

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in [*layers, last]]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return streams, logits


@torch.no_grad()
def make(name, kind, changes, dtype):
    torch.manual_seed(sum(map(ord, name)))
    model = build(kind, changes)
    randomise(model, kind, TYPES[dtype])
    ids = torch.randint(3, 64, (SEQUENCES, TOKENS))
    streams, logits = seams(model, ids)
    greedy = ids[:1, :8]
    for _ in range(WRITTEN):
        greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], 1)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        config = json.loads((pathlib.Path(saved) / "config.json").read_text())
        weights = load_file(pathlib.Path(saved) / "model.safetensors")
    tensors = {k: v.to(TYPES[dtype]).contiguous() for k, v in weights.items()}
    tensors |= {"golden.ids": ids.to(torch.int32), "golden.logits": logits, "golden.greedy": greedy[0].to(torch.int32)}
    tensors |= {f"golden.stream.{i}": x.clone().contiguous() for i, x in enumerate(streams)}
    save_file(tensors, HERE / f"{name}.safetensors", metadata={"format": "pt"})
    config["dtype"] = {"bf16": "bfloat16", "f16": "float16"}[dtype]
    forms = {"newer": config, "older": older_form(json.loads(json.dumps(config)))}
    (HERE / f"{name}.json").write_text(json.dumps(forms, indent=1) + "\n")
    print(name, len(streams), "streams, logits of size", round(float(logits.abs().mean()), 2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        make(name, *CASES[name])
