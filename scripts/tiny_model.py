"""A model of a few hundred kilobytes with random weights: enough to try a service on. Standard library only."""

import json
import pathlib
import random
import struct

END = 256
HIDDEN, INNER, LAYERS, HEADS, KV = 32, 64, 6, 4, 2


def tokenizer():
    """Bytes, and nothing merged."""
    vocab, beyond = {}, 256
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte:
            code = byte
        else:
            code, beyond = beyond, beyond + 1
        vocab[chr(code)] = byte
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": END, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": []}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}


def shapes():
    kv = HIDDEN // HEADS * KV
    yield "model.embed_tokens.weight", (END + 1, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, shape in [("self_attn.q_proj", (HIDDEN, HIDDEN)), ("self_attn.k_proj", (kv, HIDDEN)), ("self_attn.v_proj", (kv, HIDDEN)),
                            ("self_attn.o_proj", (HIDDEN, HIDDEN)), ("mlp.gate_proj", (INNER, HIDDEN)), ("mlp.up_proj", (INNER, HIDDEN)),
                            ("mlp.down_proj", (HIDDEN, INNER)), ("input_layernorm", (HIDDEN,)), ("post_attention_layernorm", (HIDDEN,))]:
            yield f"{at}{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)


def write(directory):
    """Writes the model and gives its directory."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV, "vocab_size": END + 1,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
        "tie_word_embeddings": True, "torch_dtype": "float32", "bos_token_id": END, "eos_token_id": END,
    }
    draw, header, data = random.Random(7), {}, bytearray()
    for name, shape in shapes():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = [1.0] * count if len(shape) == 1 else [draw.gauss(0, 0.08) for _ in range(count)]
        begin = len(data)
        data += struct.pack(f"<{count}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    for name, value in [("config.json", config), ("tokenizer.json", tokenizer()), ("generation_config.json", {"eos_token_id": END}),
                        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})]:
        (directory / name).write_text(json.dumps(value))
    return str(directory)
