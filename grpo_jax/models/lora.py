"""LoRA (Hu et al. 2021): low-rank adapters in the model's own parameter tree.

Each target matrix W gets two matrices A and B beside it: y = W x + α/r · B (A x). Only
A and B are trained, and they can be merged into W afterwards.

The base does not change, bit for bit. So π_ref is the same parameters without their
adapters, and no second copy of the base is held. Each stage trains adapters of its own.
When a stage begins, the previous stage's adapters are merged into the base. The
reference of RL after SFT is therefore the SFT model: the base with SFT's adapters.

Adapters and their optimiser state are float32, whatever the base's dtype, because
bfloat16 would round their small updates away.

Axes: L layers, R rank r, D a matrix's inputs, F its outputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from grpo_jax.errors import GrpoError

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Params = dict[str, Any]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
A, B = "_lora_a", "_lora_b"  # [L, R, D] and [L, F, R], after the matrix's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Settings of the adapters: which matrices have them, and of what size."""

    rank: int = 0  # r; 0: no adapters
    alpha: float = 16.0  # α
    targets: tuple[str, ...] = TARGETS

    def delta(
        self, x: Float[Array, "*B D"], a: Float[Array, "R D"], b: Float[Array, "F R"]
    ) -> Float[Array, "*B F"]:
        """Returns α/r · B (A x), in the dtype of x."""
        low = jnp.einsum("...D,RD->...R", x, a.astype(x.dtype))
        return jnp.einsum("...R,FR->...F", low * self.scale(a), b.astype(x.dtype))

    def scale(self, a: Array) -> float:
        """Returns α/r.

        Raises:
          GrpoError: A has another rank than this model's settings, so α is not its own.
        """
        if a.shape[-2] != self.rank:
            raise GrpoError(
                f"lora: the parameters' adapters have rank {a.shape[-2]}, the model's "
                f"lora.rank is {self.rank}; give the model the rank it was trained with"
            )
        return self.alpha / self.rank


def split_adapters(params: Any) -> tuple[Any, Any]:
    """Returns (trained, frozen) parts of the parameters.

    With adapters, these are the adapters (and PPO's critic, "value") and the base.
    Without, all parameters are trained and the frozen part is empty.

    >>> split_adapters({"norm": 1, "layers": {"q_proj": 2, "q_proj_lora_a": 3}})
    ({'layers': {'q_proj_lora_a': 3}}, {'norm': 1, 'layers': {'q_proj': 2}})
    >>> split_adapters({"norm": 1, "layers": {"q_proj": 2}})
    ({'norm': 1, 'layers': {'q_proj': 2}}, {})
    """
    adapters, base = _divide(params) if isinstance(params, dict) else ({}, params)
    return (adapters, base) if adapters.keys() - {"value"} else (params, {})


def _divide(tree: Params) -> tuple[Params, Params]:
    adapters, base = {}, {}
    for name, value in tree.items():
        if name == "value":  # PPO's critic trains as a whole
            adapters[name] = value
        elif isinstance(value, dict):
            inner, base[name] = _divide(value)
            if inner:
                adapters[name] = inner
        elif isinstance(name, str) and name.endswith((A, B)):
            adapters[name] = value
        else:
            base[name] = value
    return adapters, base


def join_adapters(trained: Any, frozen: Any) -> Any:
    """Returns the whole tree from the two parts that `split_adapters` returned.

    >>> join_adapters({"layers": {"b": 1}}, {"a": 2, "layers": {"c": 3}})
    {'a': 2, 'layers': {'c': 3, 'b': 1}}
    """
    if not isinstance(frozen, dict) or not frozen:
        return trained
    whole = dict(frozen)
    for name, value in trained.items():
        whole[name] = join_adapters(value, frozen[name]) if name in frozen else value
    return whole


def base_params(params: Any) -> Any:
    """Returns π_ref, the parameters without their adapters; no array is copied.

    Raises:
      GrpoError: there are no adapters, so this would be the policy itself.
    """
    _, frozen = split_adapters(params)
    if not frozen:
        raise GrpoError(
            "reference: None, and the parameters hold no LoRA adapters to leave out; "
            "pass the reference's parameters"
        )
    return frozen


def merge_lora(lora: Lora, params: Params) -> Params:
    """Returns the parameters with each adapted W replaced by W + α/r · B A.

    The sum is computed in float32 and rounded to the dtype of W. Parameters without
    adapters are returned as they are.

    >>> layers = {"o_proj": jnp.zeros((1, 2, 2)), "o_proj_lora_a": jnp.ones((1, 1, 2)),
    ...           "o_proj_lora_b": jnp.array([[[1.0], [2.0]]])}
    >>> merged = merge_lora(Lora(rank=1, alpha=3.0), {"layers": layers})
    >>> merged["layers"]["o_proj"].tolist()
    [[[3.0, 3.0], [6.0, 6.0]]]
    """
    adapters, frozen = split_adapters(params)
    if not frozen:
        return params
    layers = dict(frozen["layers"])
    for name in layers:
        if name + A in adapters["layers"]:
            a, b = (adapters["layers"][name + end] for end in (A, B))
            layers[name] = merge_matrix(lora, layers[name], a, b)
    return {**frozen, "layers": layers}


def merge_matrix(
    lora: Lora, w: Float[Array, "*L F D"], a: Float[Array, "*L R D"], b: Array
) -> Float[Array, "*L F D"]:
    """Returns W + α/r · B A in the dtype of W, for one layer or for stacked layers."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    product = jnp.matmul(b, a, precision="highest")
    return (w.astype(jnp.float32) + lora.scale(a) * product).astype(w.dtype)


def begin_stage(lora: Lora, params: Params, key: Array) -> Params:
    """Returns the parameters with which a stage starts.

    The previous stage's adapters are merged, and new ones are added unless the rank is
    0. A is normal with variance 1/D and B is zero, so the model starts as the merged
    one, bit for bit.

    Args:
      lora: the adapters' settings.
      params: the previous stage's parameters, with adapters or without.
      key: a JAX random key, for A.
    """
    params = merge_lora(lora, params)
    if not lora.rank:
        return params
    layers = dict(params["layers"])
    shapes = {name: layers[name].shape for name in lora.targets}
    sizes = [n * lora.rank * d for n, _, d in shapes.values()]
    # One random vector for all, as in `Decoder.init`: one program to compile.
    noise, start = jax.random.normal(key, (sum(sizes),)), 0
    for (name, (n, f, d)), size in zip(shapes.items(), sizes, strict=True):
        a = noise[start : start + size].reshape(n, lora.rank, d) / math.sqrt(d)
        layers |= {name + A: a, name + B: jnp.zeros((n, f, lora.rank))}
        start += size
    return {**params, "layers": layers}


def stack_adapters(
    lora: Lora, stages: list[Params]
) -> tuple[Lora, dict[str, tuple[Array, Array]]]:
    """Joins the adapters of several stages: B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2].

    Args:
      lora: the settings that all stages share.
      stages: the parameters of each stage.

    Returns:
      The joined settings, with the sum of the ranks and the same α/r, and {matrix: (A
      [L, R, D], B [L, F, R])}.
    """
    joined = {}
    for name in lora.targets:
        a, b = ([p["layers"][name + end] for p in stages] for end in (A, B))
        joined[name] = jnp.concatenate(a, axis=-2), jnp.concatenate(b, axis=-1)
    n = len(stages)
    grown = dataclasses.replace(lora, rank=n * lora.rank, alpha=n * lora.alpha)
    return grown, joined
