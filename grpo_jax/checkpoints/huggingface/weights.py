"""Loads Hugging Face folders into parameters, and saves parameters as such folders.

Weights are streamed tensor by tensor, and each device reads only its own shard.
Matrices keep their layout [out, in]; layers are stacked on a leading axis L. Errors in
a folder raise a GrpoError of one line.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from grpo_jax.arguments import check_whole
from grpo_jax.checkpoints.huggingface import config as hf_config
from grpo_jax.checkpoints.huggingface.folders import find_folder, new_folder
from grpo_jax.checkpoints.huggingface.safetensors_files import (
    StoredTensor,
    read_safetensors_folder,
    write_folder,
)
from grpo_jax.data.tokenizer_files import open_tokenizer
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError, one_line
from grpo_jax.files import read_json, write_json
from grpo_jax.models import lora
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, Params

# Our names of a layer's weights -> Hugging Face's, after "model.layers.{i}."
LAYER = {
    "input_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    **{
        ours: f"{module}.{ours.removesuffix('_bias')}."
        + ("bias" if ours.endswith("_bias") else "weight")
        for module, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in names
        for ours in (f"{name}_proj", f"{name}_proj_bias")
    },
}
TOP = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "unembed": "lm_head.weight",
}
BLOCK = 1 << 22  # numbers read at a time
COPIED = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md")


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    revision: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Decoder, Params]:
    """Loads the model of a Hugging Face folder and its parameters.

    Each process and device reads only its own slices. Numbers are converted to `dtype`
    while they are read, and are checked to be finite.

    Args:
      path: a folder with config.json and *.safetensors, or a name on the hub
        ("org/name"; needs the package huggingface_hub).
      dtype: dtype of the parameters and of the computation, "float32" or "bfloat16".
      revision: revision of the hub's repository; ignored for a local folder.
      mesh: the mesh of the parameters; None for the default device.

    Returns:
      The decoder and its parameters.

    Raises:
      GrpoError: a file or tensor is missing, broken, unknown or of the wrong shape, the
        weights hold NaN or infinity, or the tokenizer has more tokens than the
        embedding has rows.

    >>> import tempfile
    >>> config = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2,
    ...                      head_dim=4, ffn=32)
    >>> model = Decoder(config)
    >>> plan = abstract_params(config)
    >>> params = jax.tree.map(lambda x: jax.numpy.ones(x.shape), plan)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(model, params, folder + "/hf")
    ...     again, same = load_pretrained(folder + "/hf")
    >>> again == model, bool((same["embed"] == params["embed"]).all())
    (True, True)
    """
    if dtype not in ("float32", "bfloat16"):
        raise GrpoError(f"dtype={dtype!r} is not one of float32, bfloat16")
    folder = find_folder(path, revision)
    config = model_config(folder)
    stored = read_safetensors_folder(folder)
    check_names(folder, config, stored)
    _check_tokenizer(folder, config)
    here = SingleDeviceSharding(jax.devices()[0])

    def load(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = _hf_names(_leaf_path(keys), config)
        parts: dict[Any, np.ndarray] = {}  # devices may hold the same part

        def read(index: Any) -> np.ndarray:
            pairs = zip(index, leaf.shape, strict=True)
            ends = tuple(s.indices(size)[:2] for s, size in pairs)
            if ends not in parts:
                parts[ends] = part = np.empty([b - a for a, b in ends], leaf.dtype)
                (first, last), inner = ends[0], ends[1:]
                if _leaf_path(keys) in TOP:
                    _read_part(part, names[0], stored[names[0]], ends)
                else:
                    for i, name in enumerate(names[first:last]):
                        _read_part(part[i], name, stored[name], inner)
            return parts[ends]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding or here, read)

    abstract = abstract_params(config, mesh, dtype)
    return Decoder(config, dtype), jax.tree_util.tree_map_with_path(load, abstract)


def model_config(
    path: str | os.PathLike[str], revision: str | None = None
) -> ModelConfig:
    """Returns the ModelConfig of a folder or hub name; reads only config.json."""
    file = find_folder(path, revision, only="config.json") / "config.json"
    return hf_config.config_from_hf(read_json(file), str(file))


def abstract_params(
    config: ModelConfig, mesh: Mesh | None = None, dtype: str = "float32"
) -> Params:
    """Returns the parameters' shapes, dtypes and, on a mesh, shardings.

    >>> config = ModelConfig(vocab_size=102400, width=4096, layers=30, heads=32,
    ...                      kv_heads=32, head_dim=128, ffn=11008)
    >>> abstract_params(config, dtype="bfloat16")["layers"]["down_proj"]
    ShapeDtypeStruct(shape=(30, 4096, 11008), dtype=bfloat16)
    """
    init = lambda key: Decoder(config).init(key, dtype)  # noqa: E731
    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((), jax.random.key(0).dtype))
    return shapes if mesh is None else sharding.abstract_arrays(shapes, mesh)


def _leaf_path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _hf_names(path: str, config: ModelConfig) -> list[str]:
    """Returns the names of a leaf's tensors in the folder: one, or one per layer."""
    if path in TOP:
        return [TOP[path]]
    name = LAYER[path.removeprefix("layers/")]
    return [f"model.layers.{i}.{name}" for i in range(config.layers)]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of each tensor in a folder of this model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        shape = leaf.shape if _leaf_path(keys) in TOP else leaf.shape[1:]
        shapes |= dict.fromkeys(_hf_names(_leaf_path(keys), config), shape)
    return shapes


def check_names(
    folder: Path, config: ModelConfig, stored: dict[str, StoredTensor]
) -> None:
    """Checks a folder's tensors against the model.

    Args:
      folder: the folder, for errors.
      config: the model.
      stored: the folder's tensors by name.

    Raises:
      GrpoError: a tensor is missing, unknown or of the wrong shape.
    """
    expected = tensor_shapes(config)
    known = {*expected, TOP["unembed"]} if config.tied else set(expected)
    missing = [name for name in expected if name not in stored]
    unknown = [
        name
        for name in stored
        if name not in known and not name.endswith("rotary_emb.inv_freq")  # a constant
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(map(one_line, names[:5]))}"
        f"{', …' * (len(names) > 5)})"
        for names, what in ((missing, "missing"), (unknown, "unknown"))
        if names
    ]
    if faults:
        raise GrpoError(
            f"{folder}: tensors: {'; '.join(faults)}: are config.json and the weights "
            "of one model, and all its files here?"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise GrpoError(
                f"{stored[name].file}: {name} has shape {list(stored[name].shape)}, "
                f"config.json asks for {list(shape)}"
            )


def _check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Refuses token ids beyond the embedding, which would silently read other rows."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return
    vocabulary = open_tokenizer(file).get_vocab()
    if vocabulary and max(vocabulary.values()) >= config.vocab_size:
        token, highest = max(vocabulary.items(), key=lambda item: item[1])
        raise GrpoError(
            f"{file}: token {one_line(repr(token))} has id {highest}, the embedding "
            f"has only {config.vocab_size} rows; take the tokenizer of this model"
        )


def _read_part(
    out: np.ndarray, name: str, stored: StoredTensor, ends: Sequence[tuple[int, int]]
) -> None:
    """Reads the part between `ends` into `out`, a few rows at a time to save memory.

    NaN and infinity are refused; their exponent's bits are all set.
    """
    rows = max(1, BLOCK // max(1, out[:1].size))
    columns = [slice(*pair) for pair in ends[1:]]
    for at in range(0, len(out), rows):
        start = ends[0][0] + at
        block = stored[(slice(start, min(start + rows, ends[0][1])), *columns)]
        bits = block.view(f"u{block.itemsize}")
        exponent = np.array(np.inf, block.dtype).view(bits.dtype)
        if ((bits & exponent) == exponent).any():
            kind = "NaN" if np.isnan(block.astype(np.float64)).any() else "infinity"
            raise GrpoError(f"{stored.file}: {name} holds {kind}; download it again")
        out[at : at + rows] = block


def save_pretrained(
    model: Decoder,
    params: Params,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    source: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face folder that transformers and load_pretrained open.

    The folder is written under a temporary name and appears when it is complete.
    Weights keep their dtype, and LoRA adapters are merged into them. With several
    processes all must call this, and process 0 writes.

    Args:
      model: the decoder.
      params: its parameters.
      folder: the folder to create.
      tokenizer: a tokenizer whose method `save(folder)` adds its files, or None.
      source: the folder the model came from, or None. The other fields of its
        config.json, its generation_config.json and its licence are kept.
      max_shard_bytes: largest size of a file; a single larger tensor is not split.

    Raises:
      GrpoError: the folder exists and is not empty, or is not writable; or `source`
        holds another model.
    """
    check_whole("save_pretrained", most=2**63 - 1, max_shard_bytes=max_shard_bytes)
    config = hf_config.config_to_hf(model.config)
    kept = []
    if source is not None:
        kept = [file for name in COPIED if (file := Path(source) / name).exists()]
        if model_config(source) != model.config:
            raise GrpoError(f"{source}: its config.json is of another model")
        config = read_json(Path(source) / "config.json")
        config.pop("dtype", None)  # newer name of torch_dtype, which all releases read
    elif tokenizer is not None:
        eos = list(tokenizer.eos_ids)
        config["eos_token_id"] = eos[0] if len(eos) == 1 else eos
        config["bos_token_id"] = tokenizer.bos_id
        config["pad_token_id"] = tokenizer.pad_id
    config["torch_dtype"] = str(params["embed"].dtype)
    tensors = dict(_tensors_to_write(model, params))
    if jax.process_index() != 0:
        for tensor in tensors.values():
            tensor.read(...)  # takes part in the gather
        return
    with new_folder(folder) as temporary:
        for file in kept:
            shutil.copyfile(file, temporary / file.name)
        if tokenizer is not None:
            tokenizer.save(temporary)
        write_json(temporary / "config.json", config)
        write_folder(temporary, tensors, max_shard_bytes)


def _tensors_to_write(
    model: Decoder, params: Params
) -> Iterator[tuple[str, StoredTensor]]:
    """Yields the folder's tensors, which are fetched and merged one by one."""
    trained, frozen = lora.split_adapters(params)
    adapters = trained["layers"] if frozen else {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(frozen or params):
        names = _hf_names(_leaf_path(keys), model.config)
        ours = _leaf_path(keys).removeprefix("layers/")
        pair = [adapters[ours + x] for x in (lora.A, lora.B) if ours + x in adapters]
        stacked = ours not in TOP
        shape = leaf.shape[1:] if stacked else leaf.shape
        for i, name in enumerate(names):
            at = i if stacked else ...
            read = functools.partial(_read_merged, model.lora, [leaf, *pair], at)
            yield name, StoredTensor(Path(), np.dtype(leaf.dtype), shape, read)


def _read_merged(
    adapters: lora.Lora, leaves: list[jax.Array], at: Any, index: Any
) -> np.ndarray:
    """Returns a matrix with its LoRA adapter merged into it, if it has one."""
    matrix, *pair = (leaf if at is ... else leaf[at] for leaf in leaves)
    merged = lora.merge_matrix(adapters, matrix, *pair) if pair else matrix
    return _gather_rows(merged)[index]


def _gather_rows(matrix: jax.Array) -> np.ndarray:
    """Returns a matrix on the host, gathered a few rows at a time over processes."""
    rows = max(1, BLOCK // max(1, matrix[:1].size))
    if matrix.is_fully_addressable or len(matrix) <= rows:
        return sharding.fetch_to_hosts(matrix)
    out = np.empty(matrix.shape, matrix.dtype)
    for start in range(0, len(matrix), rows):
        start = min(start, len(matrix) - rows)  # equal sizes need one program
        part = jax.lax.dynamic_slice_in_dim(matrix, start, rows)
        out[start : start + rows] = sharding.fetch_to_hosts(part)
    return out
