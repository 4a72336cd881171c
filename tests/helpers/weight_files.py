"""torch .bin and GGUF files, made on the spot."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.checkpoints.formats.torch_bin import read_bin
from grpo_jax.checkpoints.huggingface.safetensors_files import StoredTensor

WORDS = ["a", "b", "1", "2", "Ġ", "Ċ", "ab", "Ġab", "12", "<|im_start|>", "<|im_end|>"]
WORDS += ["ba"]  # that no merge makes
TYPES = [1] * 9 + [3, 3, 1]
SHAPES = {  # of a Llama with 4 heads of width 4, 2 key heads
    "token_embd": (len(WORDS), 16),
    "output_norm": (16,),
    "blk.0.attn_norm": (16,),
    "blk.0.ffn_norm": (16,),
    "blk.0.attn_q": (16, 16),
    "blk.0.attn_k": (8, 16),
    "blk.0.attn_v": (8, 16),
    "blk.0.attn_output": (16, 16),
    "blk.0.ffn_gate": (32, 16),
    "blk.0.ffn_up": (32, 16),
    "blk.0.ffn_down": (16, 32),
}


def opcodes(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls module.name on a storage's tuple and numbers."""
    pid = "(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
    body = f"(dS'w'\nc{module}\n{name}\n({pid}{''.join(arguments)}tRs."
    return body.encode()


def rebuilt(tmp_path: Path, *arguments: str) -> dict[str, StoredTensor]:
    file = tmp_path / "w.bin"
    with zipfile.ZipFile(file, "w") as archive:
        data = opcodes("torch._utils", "_rebuild_tensor_v2", *arguments)
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())
    return read_bin(file)


def write_gguf(file: Path, *, pre="smollm", arch="llama", quantised=(), **more):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(["a b", "Ġ ab", "1 2"])
    writer.add_bos_token_id(9)
    writer.add_eos_token_id(10)
    writer.add_pad_token_id(10)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in more.items():
        writer.add_bool("tokenizer.ggml." + key, value)
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in SHAPES.items():
        array = tensors[name] = random.normal(size=shape).astype(np.float32)
        if name in quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(array, kind)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
