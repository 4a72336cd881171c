"""Saves LoRA adapters as a folder that the package peft opens.

The folder has adapter_config.json and adapter_model.safetensors, with PEFT's names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.checkpoints.huggingface.folders import new_folder
from grpo_jax.checkpoints.huggingface.safetensors_files import StoredTensor, write_file
from grpo_jax.checkpoints.huggingface.weights import LAYER
from grpo_jax.distributed.sharding import fetch_to_hosts
from grpo_jax.files import write_json
from grpo_jax.models.lora import Lora, stack_adapters


def save_adapter(
    lora: Lora, stages: list[Any], base: str, folder: str | os.PathLike[str]
) -> None:
    """Writes the adapters of a run's stages as one adapter of their base model.

    Each stage has its own adapters on top of the merged adapters of earlier stages, so
    two stages make one adapter of twice the rank. All processes must call this, and
    process 0 writes.

    Args:
      lora: rank, scale and targets of a stage's adapters.
      stages: the parameters of each stage, from which the adapters are taken.
      base: folder or name of the base model, for adapter_config.json; "" for none.
      folder: the folder to create.

    Raises:
      GrpoError: the folder exists and is not empty, or is not writable.
    """
    lora, adapters = stack_adapters(lora, stages)
    tensors = {}
    for ours, pair in adapters.items():
        module = LAYER[ours].removesuffix(".weight")
        for side, leaf in zip(("lora_A", "lora_B"), pair, strict=True):
            for i in range(leaf.shape[0]):
                name = f"base_model.model.model.layers.{i}.{module}.{side}.weight"

                def read(index: Any, leaf=leaf, i=i) -> np.ndarray:
                    return fetch_to_hosts(leaf[i])[index]

                dtype, shape = np.dtype(leaf.dtype), leaf.shape[1:]
                tensors[name] = StoredTensor(Path(), dtype, shape, read)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if jax.process_index() != 0:
        for tensor in tensors.values():
            tensor.read(...)  # takes part in the gather
        return
    with new_folder(folder) as temporary:
        write_json(temporary / "adapter_config.json", config)
        write_file(temporary / "adapter_model.safetensors", tensors)
