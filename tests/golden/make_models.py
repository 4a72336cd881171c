"""Makes tests/golden/families and tests/golden/bin with torch and transformers.

Run it where torch and transformers 5 are installed (not a dependency of the project):

    python tests/golden/make_models.py

Each folder is a random model saved by transformers, reloaded from disk, with its
float32 logits in golden.npz: tokens [3, 20]; logits without padding; and logits_left,
where the row r has r · 4 padding tokens on the left (mask_left). bin/ holds files of
torch.save: the weights of llama_old_keys as pytorch_model*.bin, all kinds of numbers,
and the format before torch 1.6.
"""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch  # type: ignore
import transformers as tf  # type: ignore
from safetensors.torch import load_file

HERE = Path(__file__).parent / "families"
SMALL = dict(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    initializer_range=0.4,  # logits of order 1 to 10, so that 1e-4 means something
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=1000.0, factor=4.0)

# name: (config, keys to write the old way, dtype of the file, largest shard)
MODELS = {
    "llama_old_keys": (
        tf.LlamaConfig(
            **SMALL,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
        dict(rope_theta=500.0, rope_scaling=None),
        torch.float32,
        "1GB",
    ),
    "llama3_rope": (
        tf.LlamaConfig(**SMALL, num_key_value_heads=1, rope_parameters=LLAMA3),
        None,
        torch.float32,
        "1GB",
    ),
    "linear_rope_biases": (
        tf.LlamaConfig(
            **SMALL, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR
        ),
        dict(rope_theta=1000.0, rope_scaling=dict(type="linear", factor=4.0)),
        torch.float32,
        "1GB",
    ),
    "deepseek": (
        tf.LlamaConfig(**SMALL, num_key_value_heads=4),
        dict(rope_theta=10000.0, rope_scaling=None),
        torch.bfloat16,
        "6KB",
    ),
    "mistral": (
        tf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5),
        None,
        torch.float16,
        "1GB",
    ),
    "qwen2": (
        tf.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
        None,
        torch.float32,
        "1GB",
    ),
    "qwen3": (
        tf.Qwen3Config(
            **SMALL,
            num_key_value_heads=2,
            head_dim=6,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=0,
        ),
        None,
        torch.float32,
        "1GB",
    ),
}


def make_bin() -> None:
    """The tensors of one model as views, transposes and parameters, in two shards."""
    folder = HERE.parent / "bin"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source = HERE / "llama_old_keys"
    shutil.copy(source / "config.json", folder)
    state = load_file(source / "model.safetensors")
    first, second, flat = {}, {}, []
    for i, (name, value) in enumerate(sorted(state.items())):
        shard = second if "layers.1" in name else first
        if value.ndim == 2 and i % 2:
            shard[name] = value.t().contiguous().t()  # column-major
        elif value.ndim == 2:
            shard[name] = torch.nn.Parameter(value)
        else:
            flat.append((shard, name, value))
    whole = torch.cat([value for _, _, value in flat])  # one storage, many views
    for (shard, name, _), view in zip(flat, whole.split(16), strict=True):
        shard[name] = view
    embed = first["model.embed_tokens.weight"]
    first["lm_head.weight"] = embed  # tied: the same storage
    first["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    where = {}
    for i, shard in enumerate((first, second)):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save(OrderedDict(shard), folder / file)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1))
    numbers = torch.arange(-6, 6).reshape(3, 4) / 4
    kinds = {str(kind): numbers.to(kind) for kind in (torch.bfloat16, torch.float16)}
    kinds |= {"torch.float64": numbers.double()[1:, ::2], "empty": torch.zeros(0, 3)}
    torch.save(kinds, folder / "kinds.pt")
    old = dict(_use_new_zipfile_serialization=False)
    torch.save({"a": torch.ones(2)}, folder / "legacy.pt", **old)
    torch.save({"a": torch.arange(3)}, folder / "integers.pt")


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    for name, (config, old, dtype, shard) in MODELS.items():
        torch.manual_seed(len(name))
        model = tf.AutoModelForCausalLM.from_config(config)
        for key, value in model.named_parameters():
            if "norm" in key:
                torch.nn.init.uniform_(value, 0.5, 1.5)
            if key.endswith("bias"):
                torch.nn.init.normal_(value, std=0.5)
        folder = HERE / name
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        (folder / "generation_config.json").unlink()
        if old is not None:
            file = folder / "config.json"
            fields = json.loads(file.read_text())
            fields.pop("rope_parameters")
            fields["torch_dtype"] = fields.pop("dtype")
            file.write_text(json.dumps(fields | old, indent=2) + "\n")
        kwargs = dict(dtype=torch.float32, attn_implementation="eager")
        model = tf.AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
        tokens = torch.randint(0, 61, (3, 20))
        left = torch.arange(20)[None] >= 4 * torch.arange(3)[:, None]
        positions = (left.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(tokens).logits
            logits_left = model(
                tokens, attention_mask=left.long(), position_ids=positions
            ).logits
        np.savez_compressed(
            folder / "golden.npz",
            tokens=tokens.numpy().astype(np.int16),
            logits=logits.numpy(),
            mask_left=left.numpy(),
            logits_left=torch.where(left[..., None], logits_left, 0).numpy(),
        )
        print(name, float(logits.abs().max()), logits.std().item())
    make_bin()


if __name__ == "__main__":
    main()
