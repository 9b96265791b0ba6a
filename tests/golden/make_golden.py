#!/usr/bin/env python3
"""Makes the goldens of tests/it/parity.rs: tiny random models run by transformers in float32.

    python3 tests/golden/make_golden.py        (torch, transformers, safetensors, numpy)

Each case is one safetensors file: the weights under their own names, and under `golden.` the token
ids, the residual stream at every seam, the logits and the greedy continuation. Beside it lies the
config.json as this transformers writes it, and the same in the older form with `rope_theta`.
"""
import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
CASES = {
    "llama3": ("llama", dict(tie_word_embeddings=False), dict(LLAMA3, rope_theta=500.0)),
    "mistral_window": ("mistral", dict(tie_word_embeddings=False, sliding_window=7), dict(rope_type="default", rope_theta=100.0)),
    "qwen2_bias": ("qwen2", dict(tie_word_embeddings=True), dict(rope_type="default", rope_theta=1000.0)),
    "llama_head_dim": ("llama", dict(tie_word_embeddings=True, head_dim=12), dict(rope_type="default", rope_theta=10000.0)),
}
TOKENS, SEQUENCES, WRITTEN = 40, 2, 12


def older_form(config):
    """The same config as transformers 4 wrote it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


def make(name, family, changes, rope):
    torch.manual_seed(sum(map(ord, name)))
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[family]
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **changes, rope_parameters=rope)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            # Wide enough that a wrong mask, angle or bias shows in every number.
            if key.endswith("norm.weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.3 if key.endswith("bias") else 0.25))
        ids = torch.randint(3, SHAPE["vocab_size"], (SEQUENCES, TOKENS))
        streams = []
        hooks = [layer.register_forward_pre_hook(lambda _, args, kw: streams.append((args or (kw["hidden_states"],))[0]), with_kwargs=True)
                 for layer in model.model.layers]
        hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0])))
        logits = model(ids).logits
        for hook in hooks:
            hook.remove()
        greedy = ids[:1, :8]
        for _ in range(WRITTEN):
            greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], 1)
    state = model.state_dict()
    tensors = {k: v.clone().contiguous() for k, v in state.items() if not (changes["tie_word_embeddings"] and k == "lm_head.weight")}
    tensors |= {"golden.ids": ids.to(torch.int32), "golden.logits": logits, "golden.greedy": greedy[0].to(torch.int32)}
    tensors |= {f"golden.stream.{i}": x.clone() for i, x in enumerate(streams)}
    save_file(tensors, HERE / f"{name}.safetensors", metadata={"format": "pt"})
    written = json.loads(config.to_json_string(use_diff=False))
    newer = {k: v for k, v in written.items() if k in {*SHAPE, *changes, "model_type", "rope_parameters", "hidden_act",
             "attention_bias", "mlp_bias", "head_dim", "layer_types", "sliding_window", "use_sliding_window",
             "max_window_layers"}}
    assert "rope_parameters" in newer
    (HERE / f"{name}.json").write_text(json.dumps({"newer": newer, "older": older_form(newer)}, indent=1) + "\n")
    print(name, len(streams), "streams", [k for k in newer])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        make(name, *case)
