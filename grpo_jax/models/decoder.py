"""The decoder: Llama, DeepSeek (Llama architecture), Mistral, Qwen2 and Qwen3.

In: parameters, a plain nested dict whose matrices keep Hugging Face's layout
[out, in], layers stacked on a leading axis; and tokens. Out: hidden states, logits,
and for the sampler the keys and values. The only file that imports flax.

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
from grpo_jax.errors import GrpoError
from grpo_jax.models.kernels import attention, tuning
from grpo_jax.models.kernels.mask import AttentionMask
from grpo_jax.models.kernels.products import KEPT, einsum, linear
from grpo_jax.models.lora import A, B, Lora

Params = dict[str, Any]
_INPUT = "layer_input"
_policies = jax.checkpoint_policies
# What the backward pass recomputes of a layer, by what is kept beside its input.
# "attention" is what XLA's way of computing it gives; kernels keep none of that name.
REMAT = {
    "none": _policies.everything_saveable,
    "matmuls": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,  # their results
        _policies.save_only_these_names("attention", KEPT),
    ),
    "ffn": _policies.save_only_these_names("attention", "ffn"),  # the two widest
    "full": _policies.save_only_these_names("attention"),
    "offload": _policies.save_and_offload_only_these_names(  # its input in host memory
        names_which_can_be_saved=["attention"],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
Rotation = tuple[Array, Array]  # cosines and sines, [B, T, 1, H/2]
# keys, values -> what the queries take from them, and the layer's cache
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
Product = Callable[[Array, Array], Array]  # weight [F, D], x [B, D] -> [B, F]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts ("linear", "llama3")."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What distinguishes one model of the family from another."""

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
    """Angles per position, [H/2], float32; long-context scaling applied."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: long wavelengths are stretched, short ones kept, those between blended.
    wavelength = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Array:
    """Rotary position embedding: halves (a, b) -> (a cos - b sin, b cos + a sin)."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.astype(x.dtype)


class Block(nn.Module):
    """One layer; `attend` decides what its queries see."""

    config: ModelConfig
    lora: Lora = Lora()
    product: Product | None = None  # how x of one position is multiplied

    def weight(self, name: str, *shape: int) -> Array:
        """Declares a parameter; `Decoder.init` gives all of them their values."""
        return self.param(name, nn.initializers.zeros, shape)

    def linear(self, x: Array, name: str, out: int, bias: bool = False) -> Array:
        weight = self.weight(name, out, x.shape[-1]).astype(x.dtype)
        if self.product is not None:
            y = self.product(weight, x[:, 0])[:, None]
        else:
            # One axis of positions: over two of them XLA's CPU backward pass transposes
            # what is still to be computed, element by element.
            flat = x.reshape(-1, x.shape[-1])
            y = linear(flat, weight).reshape(*x.shape[:-1], out)
        a = self.get_variable("params", name + A)  # not there: the base, or merged
        if a is not None:
            y += self.lora.delta(x, a, self.get_variable("params", name + B))
        if bias:
            y += over(y, self.weight(name + "_bias", out).astype(x.dtype))
        return y

    def norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.weight(name, x.shape[-1]), self.config.norm_eps)

    @nn.compact
    def __call__(self, x: Array, rotation: Rotation, attend: Attend):
        c = self.config
        heads = (*x.shape[:2], -1, c.head_dim)
        h = self.norm(x, "input_norm")
        q = self.linear(h, "q_proj", c.heads * c.head_dim, c.qkv_bias).reshape(heads)
        k = self.linear(h, "k_proj", c.kv_heads * c.head_dim, c.qkv_bias).reshape(heads)
        v = self.linear(h, "v_proj", c.kv_heads * c.head_dim, c.qkv_bias).reshape(heads)
        if c.qk_norm:
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        q, k = rotate(q, rotation), rotate(k, rotation)
        out, cache = attend(q, k, v)
        out = out.reshape(*x.shape[:2], -1)
        x = x + self.linear(out, "o_proj", c.width, c.out_bias)
        h = self.norm(x, "ffn_norm")
        gate = self.linear(h, "gate_proj", c.ffn, c.mlp_bias)
        up = self.linear(h, "up_proj", c.ffn, c.mlp_bias)
        gate, up = (checkpoint_name(x, "ffn") for x in (gate, up))
        h = nn.silu(gate) * up
        return x + self.linear(h, "down_proj", c.width, c.mlp_bias), cache


def over(x: Array, vector: Array) -> Array:
    """A vector over the last axis of x, with the rank of x."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / √(mean x² + ε) · scale, the mean in float32."""
    h = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # as in `Block.linear`
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + eps)
    return (h.astype(x.dtype) * scale.astype(x.dtype)[None]).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The model as pure functions of (params, tokens); hashable, so static under jit.

    >>> config = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2,
    ...                      head_dim=4, ffn=32)
    >>> model = Decoder(config)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> model.logits(params, jnp.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """

    config: ModelConfig
    dtype: str = "float32"  # of the computation; logits and softmax stay float32
    remat: str = "none"  # a row of REMAT: what the backward pass recomputes
    lora: Lora = Lora()  # of the adapters that the parameters may hold
    decode_tensor: int = 0  # devices that share matrices to decode; 0: as parameters do

    def __post_init__(self):
        check_choice("Decoder", "dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("Decoder", "remat", self.remat, tuple(REMAT))
        check_whole("Decoder", least=0, decode_tensor=self.decode_tensor)

    def init(self, key: Array, dtype: str = "float32") -> Params:
        """Fresh parameters: embed, layers {name: [L, …]}, norm, unembed unless tied.

        Matrices are normal with variance 1 / fan-in, norms 1, biases 0. All come from
        one vector of random numbers: a program for each matrix would take long to
        compile.
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
        """The output matrix; a transposed view inside jit, never a copy."""
        matrix = params["embed"] if self.config.tied else params["unembed"]
        return matrix.T.astype(self.dtype)

    def embed(self, params: Params, tokens: Int[Array, "B T"]) -> Array:
        return sharding.rows_of_table(params["embed"], tokens).astype(self.dtype)

    def finish(self, params: Params, x: Array) -> Array:
        return rms_norm(x, params["norm"], self.config.norm_eps)

    def rotation(self, positions: Int[Array, "B T"]) -> Rotation:
        """What `rotate` takes, once for all layers."""
        angles = positions[..., None, None].astype(jnp.float32)
        angles = angles * rotary_frequencies(self.config)[None, None, None]
        return jnp.cos(angles), jnp.sin(angles)

    def block(
        self,
        layer: Params,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        attend: Attend,
        product: Product | None = None,
    ) -> tuple[Array, Any]:
        """One layer on its own parameters (without the leading L axis)."""
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
        """[B, T, D] after the last norm.

        Args:
          tokens: padding may hold any token in range.
          mask: 1 for real tokens (None: all). Padding may stand on either side.
          positions: None: counted from 0 over the real tokens of each sequence.
          segment_ids: packed rows: tokens see only their own segment.
          keep_cache: return (hidden, (keys, values)), each [L, B, T, K, H], as well.
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
        hidden = self.finish(params, x)
        return (hidden, cache) if keep_cache else hidden

    def __call__(
        self, params: Params, tokens: Array, **kwargs
    ) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """`apply` for the compiled step: (hidden, unembed), so no [B, T, V] exists."""
        return self.hidden(params, tokens, **kwargs), self.unembed(params)

    def logits(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Next-token logits, float32; arguments as in `hidden`."""
        hidden = self.hidden(
            params, tokens, mask=mask, positions=positions, segment_ids=segment_ids
        )
        return self.project(params, hidden)

    def project(self, params: Params, hidden: Array) -> Float[Array, "... V"]:
        return einsum("...D,DV->...V", hidden, self.unembed(params))


def is_vector(path: str) -> bool:
    """Whether a parameter is a norm's scale or a bias, by its path."""
    return path.endswith(("norm", "bias"))


def default_positions(
    real: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """0, 1, 2, … over the real tokens of each sequence.

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
