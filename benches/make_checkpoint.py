#!/usr/bin/env python3
"""Writes a checkpoint of a well-known shape for measurements: sparse (all zeros, no disk) or with random weights.

    python3 benches/make_checkpoint.py llama2-70b DIR              # sparse: 138 GB that take a few MB
    python3 benches/make_checkpoint.py tinyllama-1.1b DIR --random # real bytes

Only the standard library is used; the weights are bfloat16 in shards of 5 GB.
"""
import argparse
import json
import os
import pathlib

# hidden, intermediate, layers, heads, key/value heads, vocabulary
SHAPES = {
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32000),
    "llama2-70b": (8192, 28672, 80, 64, 8, 32000),
}
SHARD = 5_000_000_000


def tensors(h, f, layers, heads, kv, vocab):
    d = h // heads
    yield "model.embed_tokens.weight", (vocab, h)
    for l in range(layers):
        at = f"model.layers.{l}."
        for name, shape in {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv * d, h), "self_attn.v_proj": (kv * d, h), "self_attn.o_proj": (h, h),
                            "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f), "input_layernorm": (h,), "post_attention_layernorm": (h,)}.items():
            yield f"{at}{name}.weight", shape
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (vocab, h)


def size(shape):
    n = 2
    for s in shape:
        n *= s
    return n


def small_floats(count):
    """`count` random bfloat16 values around 0.01, as bytes."""
    raw = bytearray(os.urandom(2 * count))
    # Sign and mantissa stay random, the exponent is that of 2^-7.
    raw[1::2] = bytes((b & 0x80) | 0x3C for b in raw[1::2])
    return bytes(raw)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--random", action="store_true")
    args = parser.parse_args()
    h, f, layers, heads, kv, vocab = SHAPES[args.shape]
    args.out.mkdir(parents=True)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=h, intermediate_size=f, num_hidden_layers=layers,
                  num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab, max_position_embeddings=4096, rms_norm_eps=1e-5,
                  hidden_act="silu", rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2)
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    shards, filled = [[]], 0
    for name, shape in tensors(h, f, layers, heads, kv, vocab):
        if filled and filled + size(shape) > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size(shape)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, shape in shard:
            header[name] = dict(dtype="BF16", shape=shape, data_offsets=[end, end + size(shape)])
            end += size(shape)
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(args.out / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if args.random:
                block = small_floats(1 << 22)
                for _ in range(end // len(block)):
                    out.write(block)
                out.write(block[: end % len(block)])
            out.truncate(8 + len(text) + end)
    (args.out / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))


if __name__ == "__main__":
    main()
