"""Attention over packed rows, with the kernel chosen by platform.

- TPU: splash attention, which skips blocks in which no token may attend (`tpu.py`).
- GPU: cuDNN's flash attention, for bfloat16 and float16 (`gpu.py`).
- CPU, and wherever no other kernel fits: blocks by XLA or C++ (`xla.py`, `cpu/`).

Axes: B rows, T positions, N query heads, K key heads, H head width.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from grpo_jax.distributed import sharding
from grpo_jax.models.kernels import gpu, tpu
from grpo_jax.models.kernels.mask import AttentionMask
from grpo_jax.models.kernels.xla import padded_block_attention

log = logging.getLogger(__name__)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rows: AttentionMask,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k / √H) v over the allowed positions.

    The result is that of `xla.dense_attention(q, k, v, rows.allowed())`, computed by
    the platform's kernel.

    Args:
      q: queries, [B, T, N, H].
      k, v: keys and values, [B, T, K, H]; K divides N.
      rows: metadata that defines the attention mask.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    kernel, where = padded_block_attention, sharding.platform()
    if where == "tpu" and tpu.supports(q):
        kernel = tpu.splash_attention
    if where == "gpu" and gpu.supports(q):
        kernel = gpu.cudnn_attention
    if kernel is not padded_block_attention and not sharding.layout_is_known():
        warn_without_kernel(where, jax.device_count())
        kernel = padded_block_attention
    return on_each_device(kernel, q, k, v, rows)


@functools.cache
def warn_without_kernel(where: str, devices: int) -> None:
    """Warns once that the slow attention is used, and says how to get the fast one."""
    log.warning(
        "attention: %d %s devices and no mesh, so its fast kernel is not used; run "
        "under jax.set_mesh(grpo_jax.distributed.sharding.make_mesh(devices=…))",
        devices,
        where.upper(),
    )


def on_each_device(
    kernel: Callable[..., Array], q: Array, k: Array, v: Array, rows: AttentionMask
) -> Float[Array, "B T N H"]:
    """Runs the kernel on each device's own rows and heads.

    XLA cannot partition the inside of a kernel, so a shard_map does. Within an outer
    shard_map, the axes that are still free are mapped even if their size is 1, because
    a TPU kernel is refused while XLA may split any axis.

    Args:
      kernel: (q, k, v, rows) → the attention output.
      q, k, v, rows: as in `attend`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = set(sharding.AXES) <= set(mesh.axis_names)
    one_device = mesh.size == 1 and not mesh.manual_axes
    if not ours or one_device or not sharding.free_axes(mesh):
        return kernel(q, k, v, rows)
    batch = None if q.shape[0] % sharding.rows_multiple(mesh) else sharding.BATCH[0]
    heads = None if k.shape[2] % sharding.size_of(mesh, "tensor") else "tensor"
    whole = sharding.without_manual_axes(sharding.P(batch, None, heads), mesh)
    return jax.shard_map(
        kernel,
        in_specs=(whole, whole, whole, sharding.P(*whole[:1])),
        out_specs=whole,
        axis_names=sharding.free_axes(mesh),
        check_vma=False,  # kernels do not say how their outputs vary over the mesh
    )(q, k, v, rows)
