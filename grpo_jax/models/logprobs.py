"""Token log-probabilities and entropy from hidden states, without [B, T, V].

Both passes compute logits for one chunk of positions and one tile of the vocabulary at
a time, with a running softmax over the tiles. Memory never holds all logits. All
functions are pure.

Axes: B rows, T positions, C positions of a row in one chunk, M = B·C, D width,
V vocabulary, v tokens of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from grpo_jax.distributed import sharding
from grpo_jax.models.kernels import tuning
from grpo_jax.models.kernels.products import product

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Int


def token_logprobs(
    hidden: Float[Array, "... D"],
    unembed: Float[Array, "D V"],
    targets: Int[Array, "..."],
    *,
    temperature: ArrayLike = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns log softmax(hidden · unembed / temperature) at the targets, and entropy.

        logps = z_target - log Σ_v e^{z_v}      entropy = -Σ_v π_v log π_v

    Args:
      hidden: [..., D], the decoder's hidden states after its last norm.
      unembed: [D, V], the output matrix.
      targets: [...], the next token at each position (already shifted).
      temperature: the sampling temperature. Use the same one for π_θ, π_old and π_ref.
      chunk: how many positions of a row have logits at the same time. None: chosen so
        that a device holds at most about 2^24 logits, or 2^26 on GPUs and TPUs.

    Returns:
      (logps, entropy), both [...] float32, in nats. They support first-order
      reverse-mode differentiation in hidden, unembed and temperature; gradients are
      accumulated in float32.

    Raises:
      ValueError: shapes that disagree, a chunk below 1, or a temperature that is not a
        finite number above 0.

    >>> hidden, unembed = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
    >>> logps, entropy = token_logprobs(hidden, unembed, jnp.zeros((2, 3), int))
    >>> bool(jnp.allclose(-logps, jnp.log(8))), bool(jnp.allclose(entropy, jnp.log(8)))
    (True, True)
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"hidden {hidden.shape} and targets {targets.shape} disagree")
    if hidden.shape[-1] != unembed.shape[0]:
        raise ValueError(f"hidden {hidden.shape} and unembed {unembed.shape} disagree")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} is below 1")
    if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} is no finite number above 0")
    lead = targets.shape
    length = lead[-1] if lead else 1
    rows = math.prod(lead[:-1])
    hidden = hidden.reshape(rows, length, hidden.shape[-1])
    targets = targets.reshape(rows, length)
    mesh, tile = sharding.mesh_in_use(), unembed.shape[1]
    split = mesh is not None and sharding.size_of(mesh, "tensor") > 1
    devices = sharding.rows_multiple(mesh) if mesh else 1
    if devices == 1 or rows % devices:
        mesh, devices = None, 1
    if chunk is None:
        if not split:  # a vocabulary split over devices has no common tiles
            tile = tuning.vocabulary_tile(tile)
        elements = rows // devices * tile
        most = max(1, tuning.logits_at_once() // max(elements, 1))
        count = -(-max(length, 1) // most)
        chunk = -(-max(length, 1) // count)  # equal chunks: little padding in the last
    chunk = min(chunk, max(length, 1))
    temperature = jnp.asarray(temperature, jnp.float32)
    compute = functools.partial(_compiled, tiles=_Tiles(chunk, tile, unembed.shape[1]))
    if mesh is not None:
        compute = _on_each_device(compute, unembed, mesh)
    logps, entropy = compute(hidden, unembed, targets, temperature)
    return logps.reshape(lead), entropy.reshape(lead)


def _on_each_device(compute, unembed: Array, mesh: Any):
    """Wraps `compute` in a shard_map, so that each device works on its own rows.

    The output matrix is then gathered, and its gradient summed over the devices, once.
    XLA's partitioner would do both in every chunk.
    """
    axes = sharding.free_axes(mesh) - {"tensor"}  # the partitioner splits "tensor" well
    whole = unembed.shape[0] % sharding.size_of(mesh, "fsdp")
    split = None if whole or "fsdp" not in axes else "fsdp"
    rows, P = sharding.without_manual_axes(sharding.BATCH, mesh), sharding.P

    def on_one(hidden, unembed, targets, temperature):
        if split:
            unembed = jax.lax.all_gather(unembed, split, axis=0, tiled=True)
        return compute(hidden, unembed, targets, temperature)

    return jax.shard_map(
        on_one,
        in_specs=(rows, P(split), rows, P()),
        out_specs=rows,
        axis_names=axes,
    )


def _chunks(x: Array, chunk: int) -> Array:
    """[B, T, ...] -> [T / C, B · C, ...]; zeros pad the last chunk."""
    padding = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    count = x.shape[1] // chunk
    x = x.reshape(x.shape[0], count, chunk, *x.shape[2:])
    # XLA's CPU backend reduces and multiplies fastest with one axis of positions.
    return jnp.moveaxis(x, 1, 0).reshape(count, x.shape[0] * chunk, *x.shape[3:])


def _unchunk(x: Array, chunk: int, rows: int, length: int) -> Array:
    """Undoes `_chunks`: [T / C, B · C, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x.reshape(x.shape[0], rows, chunk, *x.shape[2:]), 0, 1)
    return x.reshape(rows, x.shape[1] * chunk, *x.shape[3:])[:, :length]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Logits exist for `chunk` positions of a row and `tile` tokens at a time.

    If the tile does not divide the vocabulary, the last tile overlaps the one before
    it. Tokens in the overlap count only in the earlier tile.
    """

    chunk: int
    tile: int
    size: int  # V

    @property
    def count(self) -> int:
        """The number of tiles."""
        return -(-self.size // self.tile)

    def start(self, number: Any) -> Any:
        """Returns the first token of a tile."""
        if self.count == 1:
            return 0
        return jnp.minimum(number * self.tile, self.size - self.tile)

    def rows(self, table: Array, number: Any) -> Float[Array, "v D"]:
        """Returns a tile's rows of a table [V, D]."""
        if self.count == 1:
            return table
        return jax.lax.dynamic_slice_in_dim(table, self.start(number), self.tile)

    def put(self, table: Array, rows: Array, number: Any) -> Float[Array, "V D"]:
        """Returns the table [V, D] with a tile's rows replaced."""
        if self.count == 1:
            return rows
        start = self.start(number)
        return jax.lax.dynamic_update_slice_in_dim(table, rows, start, 0)

    def index(self, tokens: Int[Array, "M"], number: Any) -> Int[Array, "M"]:
        """Returns the tokens' places in a tile, -1 for tokens of other tiles."""
        index = tokens - self.start(number)
        here = (tokens >= number * self.tile) & (index < self.tile)
        return jnp.where(here, index, -1)

    def logits(self, h, rows, temperature, number: Any) -> Float[Array, "M v"]:
        """Returns a chunk's logits of a tile, -1e30 for tokens of an earlier tile."""
        z = product(h, rows)
        z = z / temperature
        if self.size % self.tile:
            again = self.start(number) + jnp.arange(self.tile) < number * self.tile
            z = jnp.where(again[None], -1e30, z)
        return z


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_logprobs(hidden, table, targets, temperature, tiles):
    return _forward(hidden, table, targets, temperature, tiles)[0]


def _forward(hidden, table, targets, temperature, tiles):
    h, y = (_chunks(x, tiles.chunk) for x in (hidden, targets))

    def add(number, sums):  # a running softmax over the tiles
        rows = tiles.rows(table, number)

        def one(_, inputs):
            h, y, top, total, moment, at_target = inputs
            z = tiles.logits(h, rows, temperature, number)
            now = jnp.maximum(top, z.max(-1))
            below, fade = z - now[:, None], jnp.exp(top - now)
            exp = jnp.exp(below)
            # Σ e^(z - top) (z - top): with z in place of z - top, large logits would
            # leave no significant digits.
            moment = (moment + total * (top - now)) * fade + (exp * below).sum(-1)
            total = total * fade + exp.sum(-1)
            index = tiles.index(y, number)
            found = jnp.take_along_axis(z, jnp.maximum(index, 0)[:, None], -1)[:, 0]
            at_target = jnp.where(index >= 0, found, at_target)
            return None, (now, total, moment, at_target)

        return jax.lax.scan(one, None, (h, y, *sums))[1]

    zero = jnp.zeros_like(h[..., 0], jnp.float32)
    sums = (zero - 1e30, zero, zero, zero)
    top, total, moment, at_target = jax.lax.fori_loop(0, tiles.count, add, sums)
    log_total = jnp.log(total)
    entropy = log_total - moment / total
    # This order matters: top + log_total would lose the digits of large logits.
    logps = (at_target - top) - log_total
    logps, entropy, *sums = (
        _unchunk(x, tiles.chunk, *targets.shape)
        for x in (logps, entropy, top, log_total)
    )
    saved = (hidden, table, targets, temperature, entropy, *sums)
    return (logps, entropy), saved


def _forward_if(hidden, table, targets, temperature, tiles):
    """`_forward` that also records whether the temperature needs a gradient.

    Its gradient and the entropy's each cost a pass over all logits, and most losses
    need neither.
    """
    inputs = (hidden, table, targets, temperature)
    out, saved = _forward(*(x.value for x in inputs), tiles=tiles)
    return out, (saved, () if temperature.perturbed else None)


def _backward(tiles, residuals, cotangents):
    (hidden, table, targets, temperature, entropy, top, log_total), warm = residuals
    g_logps, g_entropy = (
        None if isinstance(g, SymbolicZero) else g for g in cotangents
    )
    inputs = (hidden, targets, entropy, top, log_total, g_logps, g_entropy)
    inputs = tuple(x if x is None else _chunks(x, tiles.chunk) for x in inputs)
    like: tuple[Any, ...] = (table, inputs[0], temperature)

    def add(number, carry):
        d_table, d_hidden, d_temperature = carry
        rows = tiles.rows(table, number)

        def one(carry, inputs):
            d_rows, d_temperature = carry
            d_h, h, y, entropy, top, log_total, g_logps, g_entropy = inputs
            z = tiles.logits(h, rows, temperature, number)
            log_p = z - top[:, None] - log_total[:, None]
            p = jnp.exp(log_p)
            # ∂log π_y/∂z_v = 1[v = y] - π_v,  ∂H/∂z_v = -π_v (log π_v + H)
            d_z = jnp.zeros_like(z)
            if g_logps is not None:
                hit = jnp.arange(tiles.tile)[None] == tiles.index(y, number)[:, None]
                d_z += jnp.where(hit, 1 - p, -p) * g_logps[:, None]
            if g_entropy is not None:
                d_z -= p * (g_entropy[:, None] * (log_p + entropy[:, None]))
            if warm is not None:  # log_p replaces z: Σ_v d_z = 0
                d_temperature -= (d_z * log_p).sum() / temperature
            d_z = (d_z / temperature).astype(table.dtype)
            d_h += product(d_z, rows, b_along=False)
            d_rows += product(d_z, h, a_along=False, b_along=False)
            return (d_rows, d_temperature), d_h

        carry = (tiles.rows(d_table, number), d_temperature)
        carry, d_hidden = jax.lax.scan(one, carry, (d_hidden, *inputs))
        d_rows, d_temperature = carry
        return tiles.put(d_table, d_rows, number), d_hidden, d_temperature

    start = tuple(jnp.zeros_like(x, jnp.float32) for x in like)
    found = jax.lax.fori_loop(0, tiles.count, add, start)
    d_table, d_hidden, d_temperature = found
    d_hidden = _unchunk(d_hidden, tiles.chunk, *targets.shape).astype(hidden.dtype)
    return d_hidden, d_table.astype(table.dtype), None, d_temperature


_token_logprobs.defvjp(_forward_if, _backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=4)  # outside jit a scan recompiles each time
def _compiled(hidden, unembed, targets, temperature, tiles):
    # Under shard_map a custom gradient must vary over the mesh axes of its input. So
    # every input is made to vary over the axes of all inputs: the gradient of a shared
    # input, such as unembed, is then summed over the devices. XLA drops the constant
    # selects.
    every = jax.lax.stop_gradient((hidden, unembed, targets, temperature))
    one = sum((x.sum().astype(jnp.float32) for x in every), jnp.zeros(()))

    def like_all(x):
        return jnp.where(False, one.astype(x.dtype), x)

    hidden, unembed, temperature = map(like_all, (hidden, unembed, temperature))
    # Transposed to [V, D], as embeddings are stored: otherwise a loop over chunks would
    # copy the matrix to transpose it.
    return _token_logprobs(hidden, unembed.T, targets, temperature, tiles)


def logprobs_from_logits(
    logits: Float[Array, "... V"],
    targets: Int[Array, "..."],
    *,
    temperature: ArrayLike = 1.0,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns what `token_logprobs` does, for a model that returns logits.

    Args:
      logits: [..., V]; -inf rules a token out.
      targets: [...], the next token at each position.
      temperature: the sampling temperature.

    Returns:
      (logps, entropy), both [...] float32, in nats.

    >>> logps, entropy = logprobs_from_logits(jnp.zeros((1, 4)), jnp.array([2]))
    >>> round(float(logps[0]), 4), round(float(entropy[0]), 4)
    (-1.3863, 1.3863)
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    possible = log_p > -jnp.inf  # 0 · log 0 counts as 0
    entropy = -(jnp.exp(log_p) * jnp.where(possible, log_p, 0)).sum(-1)
    return jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], entropy
