"""The sizes and options that distinguish one model of the family from another.

Axes: H head width.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.arguments import check_whole
from grpo_jax.errors import GrpoError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretches rotary frequencies for longer contexts; kind: "linear" or "llama3"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and variants that define one model of the family.

    Raises:
      GrpoError: a size is not a positive whole number, kv_heads does not divide heads,
        or head_dim is odd.
    """

    vocab_size: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    ffn: int  # F
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False  # the output matrix is the embedding
    qkv_bias: bool = False  # Qwen2; Llama's attention_bias
    out_bias: bool = False  # Llama's attention_bias
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3
    sliding_window: int | None = None  # Mistral 7B v0.1
    max_positions: int = 4096

    def __post_init__(self):
        names = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim")
        sizes = {name: getattr(self, name) for name in (*names, "ffn")}
        check_whole("ModelConfig", **sizes)
        if self.heads % self.kv_heads:
            raise GrpoError(
                f"ModelConfig: kv_heads = {self.kv_heads} does not divide the heads, "
                f"{self.heads}"
            )
        if self.head_dim % 2:
            raise GrpoError(f"ModelConfig: head_dim = {self.head_dim} is odd")


def rotary_frequencies(config: ModelConfig) -> Float[Array, "H/2"]:
    """Returns the rotary angle per position, [H/2] float32, with scaling applied."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: stretches long wavelengths, keeps short ones, and blends in between.
    wavelength = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
