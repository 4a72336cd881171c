"""The decoder: Llama, DeepSeek (Llama architecture), Mistral, Qwen2 and Qwen3.

`Decoder` computes hidden states, logits and, for the sampler, keys and values.
Parameters are a plain nested dict: matrices keep Hugging Face's layout [out, in], and
layers are stacked on a leading axis. No other module imports flax.

Axes: L layers, B rows, T positions, S positions attended to, N query heads, K key
heads, G query heads per key head, H head width, D width, F feed-forward width,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.arguments import check_choice, check_whole
from grpo_jax.distributed import sharding
from grpo_jax.models.config import ModelConfig, rotary_frequencies
from grpo_jax.models.kernels import attention, tuning
from grpo_jax.models.kernels.mask import AttentionMask
from grpo_jax.models.kernels.products import KEPT, einsum, linear
from grpo_jax.models.lora import A, B, Lora

Params = dict[str, Any]
_INPUT = "layer_input"
_policies = jax.checkpoint_policies
# What each policy keeps of a layer besides its input; the backward pass recomputes
# the rest. `kernels/xla.py` names its results "attention"; the GPU and TPU kernels do
# not name theirs.
REMAT = {
    "none": _policies.everything_saveable,
    "matmuls": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,  # their outputs
        _policies.save_only_these_names("attention", KEPT),
    ),
    "ffn": _policies.save_only_these_names("attention", "ffn"),  # two widest
    "full": _policies.save_only_these_names("attention"),
    "offload": _policies.save_and_offload_only_these_names(  # input kept on the host
        names_which_can_be_saved=["attention"],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
Rotation = tuple[Array, Array]  # cosines and sines, [B, T, 1, H/2]
# (q, k, v) -> the attention output and the layer's cache
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
Product = Callable[[Array, Array], Array]  # (x [M, D], weight [F, D]) -> [M, F]


def apply_rotary_embedding(x: Float[Array, "B T N H"], rotation: Rotation) -> Array:
    """Applies rotary position embedding.

    The halves (a, b) of a head become (a cos - b sin, b cos + a sin).

    Args:
      x: queries or keys, [B, T, N, H].
      rotation: cosines and sines, [B, T, 1, H/2] float32, from `Decoder.rotation`.

    Returns:
      [B, T, N, H] in the dtype of x; the arithmetic is in float32.
    """
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.astype(x.dtype)


class Block(nn.Module):
    """One transformer layer; the caller passes the function that attends."""

    config: ModelConfig
    lora: Lora = Lora()
    product: Product = linear

    def weight(self, name: str, *shape: int) -> Array:
        """Declares a parameter; `Decoder.init` sets the values of all parameters."""
        return self.param(name, nn.initializers.zeros, shape)

    def linear(self, x: Array, name: str, out: int, bias: bool = False) -> Array:
        """Returns x Wᵀ of the matrix `name`, plus its LoRA delta and bias if any.

        Args:
          x: [B, T, D].
          name: the matrix, a parameter [out, D].
          out: output width.
          bias: whether the layer has a vector `name`_bias.

        Returns:
          [B, T, out] in the dtype of x.
        """
        weight = self.weight(name, out, x.shape[-1]).astype(x.dtype)
        # With two position axes, XLA's CPU backward pass transposes operands that it
        # has not computed yet, one element at a time. One axis avoids that.
        y = self.product(x.reshape(-1, x.shape[-1]), weight).astype(x.dtype)
        y = y.reshape(*x.shape[:-1], out)
        a = self.get_variable("params", name + A)  # None: no adapter, or merged
        if a is not None:
            y += self.lora.delta(x, a, self.get_variable("params", name + B))
        if bias:
            bias_vector = self.weight(name + "_bias", out).astype(x.dtype)
            y += bias_vector.reshape(1, 1, out)
        return y

    def norm(self, x: Array, name: str) -> Array:
        """Returns `rms_norm` of x with the scale parameter `name`."""
        return rms_norm(x, self.weight(name, x.shape[-1]), self.config.norm_eps)

    @nn.compact
    def __call__(self, x: Array, rotation: Rotation, attend: Attend):
        """Returns the layer's output [B, T, D] and the cache that `attend` returns."""
        c = self.config
        heads = (*x.shape[:2], -1, c.head_dim)
        h = self.norm(x, "input_norm")
        q = self.linear(h, "q_proj", c.heads * c.head_dim, c.qkv_bias).reshape(heads)
        k = self.linear(h, "k_proj", c.kv_heads * c.head_dim, c.qkv_bias).reshape(heads)
        v = self.linear(h, "v_proj", c.kv_heads * c.head_dim, c.qkv_bias).reshape(heads)
        if c.qk_norm:
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        q, k = apply_rotary_embedding(q, rotation), apply_rotary_embedding(k, rotation)
        out, cache = attend(q, k, v)
        out = out.reshape(*x.shape[:2], -1)
        x = x + self.linear(out, "o_proj", c.width, c.out_bias)
        h = self.norm(x, "ffn_norm")
        gate = self.linear(h, "gate_proj", c.ffn, c.mlp_bias)
        up = self.linear(h, "up_proj", c.ffn, c.mlp_bias)
        gate, up = (checkpoint_name(x, "ffn") for x in (gate, up))
        h = nn.silu(gate) * up
        return x + self.linear(h, "down_proj", c.width, c.mlp_bias), cache


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Returns x / √(mean(x²) + ε) · scale, with the mean in float32.

    Args:
      x: [..., D].
      scale: [D].
      eps: ε.

    Returns:
      [..., D] in the dtype of x.
    """
    h = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # one axis: see `Block.linear`
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + eps)
    return (h.astype(x.dtype) * scale.astype(x.dtype)[None]).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The model as pure functions of (params, tokens).

    It is hashable, so it can be a static argument of `jax.jit`.

    >>> config = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2,
    ...                      head_dim=4, ffn=32)
    >>> model = Decoder(config)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> model.logits(params, jnp.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """

    config: ModelConfig
    dtype: str = "float32"  # of the computation; logits and softmax are float32
    remat: str = "none"  # a key of REMAT: what the backward pass recomputes
    lora: Lora = Lora()  # describes adapters in the parameters, if any
    decode_tensor: int = 0  # devices that share a matrix in decoding; 0: as in training

    def __post_init__(self):
        check_choice("Decoder: dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("Decoder: remat", self.remat, tuple(REMAT))
        check_whole("Decoder", least=0, decode_tensor=self.decode_tensor)

    def init(self, key: Array, dtype: str = "float32") -> Params:
        """Returns fresh parameters.

        Matrices are normal with variance 1 / fan-in, norms 1, biases 0. All matrices
        are cut from one random vector, because one random program per matrix would
        take long to compile.

        Args:
          key: a JAX random key.
          dtype: of the parameters.

        Returns:
          {embed [V, D], layers {name: [L, …]}, norm [D], unembed [V, D] unless tied}.
        """
        c = self.config
        attend: Attend = lambda q, k, v: (q, None)  # noqa: E731
        block = functools.partial(Block(c).init, attend=attend)
        x, half = jnp.zeros((1, 1, c.width)), jnp.zeros((1, 1, 1, c.head_dim // 2))
        layer = jax.eval_shape(block, key, x, (half, half))["params"]
        shapes = {f"layers/{k}": (c.layers, *leaf.shape) for k, leaf in layer.items()}
        shapes |= {"embed": (c.vocab_size, c.width), "norm": (c.width,)}
        if not c.tied:
            shapes["unembed"] = (c.vocab_size, c.width)
        sizes = {k: 0 if is_vector(k) else math.prod(s) for k, s in shapes.items()}
        noise = jax.random.normal(key, (sum(sizes.values()),))
        params: Params = {"layers": {}}
        start = 0
        for path, shape in sorted(shapes.items()):
            if is_vector(path):
                value = jnp.full(shape, 0.0 if path.endswith("bias") else 1.0)
            else:
                value = noise[start : start + sizes[path]].reshape(shape)
                value /= math.sqrt(shape[-1])
                start += sizes[path]
            inner = params["layers"] if path.startswith("layers/") else params
            inner[path.removeprefix("layers/")] = value.astype(dtype)
        return params

    def unembed(self, params: Params) -> Float[Array, "D V"]:
        """Returns the output matrix; inside jit the transpose is a view, not a copy."""
        matrix = params["embed"] if self.config.tied else params["unembed"]
        return matrix.T.astype(self.dtype)

    def embed(self, params: Params, tokens: Int[Array, "B T"]) -> Array:
        """Returns the token embeddings, [B, T, D] in the model's dtype."""
        return sharding.rows_of_table(params["embed"], tokens).astype(self.dtype)

    def final_norm(self, params: Params, x: Array) -> Array:
        """Returns x after the last norm, [B, T, D]."""
        return rms_norm(x, params["norm"], self.config.norm_eps)

    def rotation(self, positions: Int[Array, "B T"]) -> Rotation:
        """Returns cosines and sines for `apply_rotary_embedding`, for all layers."""
        angles = positions[..., None, None].astype(jnp.float32)
        angles = angles * rotary_frequencies(self.config)[None, None, None]
        return jnp.cos(angles), jnp.sin(angles)

    def block(
        self,
        layer: Params,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        attend: Attend,
        product: Product = linear,
    ) -> tuple[Array, Any]:
        """Applies one layer.

        Args:
          layer: the layer's parameters, without the leading L axis.
          x: the layer's input.
          rotation: from `rotation`.
          attend: maps (q, k, v) to the attention output and the layer's cache.
          product: returns x weightᵀ; a decode step has its own (`decode_kernels`).

        Returns:
          The layer's output, [B, T, D], and the cache that `attend` returns.
        """
        x, cache = Block(self.config, self.lora, product).apply(
            {"params": layer}, x, rotation, attend
        )
        return sharding.constrain(x, sharding.BATCH), cache

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        mask: Array | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        keep_cache: bool = False,
    ) -> Any:
        """Returns the hidden states after the last norm.

        Args:
          params: as `init` returns them, with LoRA adapters or without.
          tokens: [B, T]; padding may hold any token in range.
          mask: [B, T], 1 for real tokens; None: all. Padding may be on either side.
          positions: [B, T]; None: counted from 0 over the real tokens of each sequence.
          segment_ids: [B, T], for packed rows: a token attends to its own segment and
            to the prompt that the segment shares (`kernels/mask.py`).
          keep_cache: whether to return the keys and values too.

        Returns:
          [B, T, D] in the model's dtype; with keep_cache (hidden, (keys, values)), the
          keys and values each [L, B, T, K, H].
        """
        real = jnp.ones(tokens.shape, bool) if mask is None else mask != 0
        if positions is None:
            positions = default_positions(real, segment_ids)
        rows = AttentionMask(real, segment_ids, positions, self.config.sliding_window)
        rotation = self.rotation(positions)

        def attend(q, k, v):
            return attention.attend(q, k, v, rows), (k, v) if keep_cache else None

        def layer(x, weights):
            x = checkpoint_name(x, _INPUT)
            return self.block(weights, x, rotation, attend)

        if self.remat != "none":
            policy = REMAT[self.remat]
            layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
        x = sharding.constrain(self.embed(params, tokens), sharding.BATCH)
        few = tuning.unrolls_layers(self.config.layers)
        x, cache = jax.lax.scan(layer, x, params["layers"], unroll=few)
        hidden = self.final_norm(params, x)
        return (hidden, cache) if keep_cache else hidden

    def __call__(
        self, params: Params, tokens: Array, **kwargs
    ) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """Returns hidden states and the output matrix, so no [B, T, V] is ever made.

        This is the `apply` of the training step. Keyword arguments are as in `hidden`.
        """
        return self.hidden(params, tokens, **kwargs), self.unembed(params)

    def logits(
        self, params: Params, tokens: Int[Array, "B T"], **kwargs
    ) -> Float[Array, "B T V"]:
        """Returns next-token logits in float32; arguments are as in `hidden`."""
        return self.project_to_vocabulary(params, self.hidden(params, tokens, **kwargs))

    def project_to_vocabulary(
        self, params: Params, hidden: Array
    ) -> Float[Array, "... V"]:
        """Returns float32 logits [..., V] of hidden states [..., D]."""
        return einsum("...D,DV->...V", hidden, self.unembed(params))


def is_vector(path: str) -> bool:
    """Returns whether the parameter at this path is a norm's scale or a bias."""
    return path.endswith(("norm", "bias"))


def default_positions(
    real: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """Returns positions 0, 1, 2, … over the real tokens of each sequence.

    Args:
      real: True where a token is not padding.
      segment_ids: which sequence a token belongs to; None: one sequence a row.

    >>> real = jnp.array([[False, True, True, True]])
    >>> default_positions(real, None).tolist()
    [[0, 0, 1, 2]]
    >>> default_positions(real, jnp.array([[1, 1, 2, 2]])).tolist()
    [[0, 0, 0, 1]]
    """
    before = jnp.cumsum(real, axis=1) - real  # real tokens before this one
    if segment_ids is not None:
        first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        at_start = jnp.where(first, before, 0)
        before = before - jax.lax.cummax(at_start, axis=1)
    return before
