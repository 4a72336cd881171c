"""The decode loop: each turn writes one token in every slot that has a row.

A slot is a place in the batch; a row is a completion. `sampler.py` fills the slots from
a queue of prompts, and `continuation.py` starts the loop from slots that are filled.
All functions are pure.

Axes: N rows, W slots, C new positions, T appended positions, S prompt positions, X + 1
blocks of B columns each (`kv_cache.py`), K key heads, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from grpo_jax.distributed import sharding
from grpo_jax.generation.cache_attention import ROWS_PER_PRODUCT, make_attention
from grpo_jax.generation.kv_cache import (
    Cache,
    join_blocks,
    next_column,
    select_slots,
    split_into_blocks,
)
from grpo_jax.generation.token_sampling import Sampling
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.models.kernels.decode import decode_kernels
from grpo_jax.models.kernels.xla import dense_attention, mark_nonfinite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """N completions, grouped by prompt. Positions after a row's end hold 0."""

    tokens: Any  # [N, C] int32
    logps: Any  # [N, C] float32, in nats, under the sampled distribution
    mask: Any  # [N, C] bool, True on sampled tokens, EOS included
    lengths: Any  # [N] int32
    finished: Any  # [N] bool, ended with EOS or a stop string, not cut off
    occupancy: Any = None  # [] float32, share of slots × turns that decoded a row
    cache: Any = None  # `Cache`, if it was kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """State of the decode loop."""

    offered: Array  # [] slots × turns so far
    used: Array  # [] those of them that decoded a row
    queue: Array  # [] the next row to get a slot
    row: Array  # [W] the row that the slot decodes; N if none
    recent: Array  # [W, longest stop sequence] the row's last tokens, padded with -1
    matched: Array  # [W] state of the row's text in the `stop_table`
    cache: Cache
    out: Rollouts


_OF_ROW = ("row", "recent", "matched")


@dataclasses.dataclass(frozen=True)
class StopConditions:
    """What ends a row: an EOS token, a stop sequence of token ids, or the limit.

    The tokens that end a row belong to it.
    """

    eos: tuple[int, ...]
    stop: tuple[tuple[int, ...], ...]
    limit: int  # C

    def reached(self, recent: Int[Array, "W R"]) -> Bool[Array, "W"]:
        """Returns whether each row's last R tokens end in EOS or a stop sequence."""
        ended = jnp.isin(recent[:, -1], jnp.array(self.eos, jnp.int32))
        for s in self.stop:
            ended |= (recent[:, -len(s) :] == jnp.array([s], jnp.int32)).all(1)
        return ended


def _layers(model: Decoder, params: Params) -> list[Params]:
    """Returns each layer's weights, sliced once: indexing in a loop would copy them."""
    return [
        jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(model.config.layers)
    ]


def run_decode_loop(
    model: Decoder,
    params: Params,
    state: DecodeState,
    refill: Callable[[DecodeState], DecodeState],
    rows: Array,
    *,
    key: Array,
    sampling: Sampling,
    ends: StopConditions,
    widths: Sequence[int],
    first: Any = 0,
    any_group: Callable[[Array], Array] = lambda more: more,
    stop_table: Array | None = None,
) -> DecodeState:
    """Decodes until the queue is empty and every row has ended.

    When the queue is empty and few slots still have a row, the loop continues with
    fewer slots, so that the last rows do not pay for idle ones.

    Args:
      model: the decoder.
      params: its parameters.
      state: the state to start from.
      refill: gives rows of the queue to the free slots; called before every turn while
        the loop has all slots.
      rows: [] how many rows the queue holds.
      key: PRNG key; a row's draws depend on its number + `first`, and on how many
        tokens it has.
      sampling: temperature and filters.
      ends: what ends a row.
      widths: how many slots each loop in turn has; the first is W.
      first: number of this group's first row among the rows of all groups.
      any_group: maps "this group has more to do" to "any group has". If devices run
        this loop in groups, all groups take the same number of turns, as a collective
        of one would otherwise wait for another that has left the loop.
      stop_table: [V, S] table of `stop_strings.make_stop_table`, or None.

    Returns:
      The state after the last turn; its `out` holds the rollouts.
    """
    layers, window = _layers(model, params), model.config.sliding_window
    none, prefixes = state.out.tokens.shape[0], state.cache.prefixes
    together = max(1, min(ROWS_PER_PRODUCT, none // len(prefixes.lengths)))
    product, attention = decode_kernels(
        model.dtype, prefixes.layers, state.cache.layers
    )

    # A table to look up: XLA would compute the angles again in each layer and head.
    longest = prefixes.layers[0][1].shape[2] + state.cache.columns
    rotations = model.rotation(jnp.arange(longest)[None])

    def step(state: DecodeState) -> DecodeState:
        if len(state.row) == widths[0]:  # in narrower loops the queue is empty
            state = refill(state)
        live = state.row < none
        cache = next_column(state.cache, live)
        if attention is None:
            see = make_attention(cache, live, together, window)
        else:
            see = functools.partial(attention, cache=cache, live=live, window=window)
        x, new = model.embed(params, cache.token[:, None]), []
        rotation = jax.tree.map(lambda x: x[0, cache.position, None], rotations)
        tables = zip(layers, cache.layers, prefixes.layers, strict=True)
        for layer, blocks, prefix in tables:

            def look(q, k, v, blocks=blocks, prefix=prefix):
                return see(q, *mark_nonfinite(k, v), prefix, blocks)

            x, blocks = model.block(layer, x, rotation, look, product)
            new.append(blocks)
        hidden = model.final_norm(params, x)[:, 0]
        logits = product(hidden, model.unembed(params).T)
        # With a matrix split by vocabulary, each device computes some logits of every
        # row, but the draw needs all logits of some rows. With both layouts named, XLA
        # moves the logits and not the matrix.
        for spec in (sharding.P(*sharding.BATCH, "tensor"), sharding.P(sharding.AXES)):
            logits = sharding.constrain(logits, spec)

        out, row = state.out, state.row
        at = out.lengths.at[row].get(mode="fill", fill_value=0)
        row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(first + row)
        token, logp = sampling(logits, row_keys, at)
        token = jnp.where(live, token, cache.token)
        recent = jnp.concatenate([state.recent[:, 1:], token[:, None]], 1)
        ended, matched = ends.reached(recent), state.matched
        if stop_table is not None:
            matched = stop_table[token, matched]
            ended |= matched == stop_table.shape[1] - 1

        def put(table, value):
            return table.at[row, at].set(value, mode="drop")

        out = dataclasses.replace(
            out,
            tokens=put(out.tokens, token),
            logps=put(out.logps, logp),
            mask=put(out.mask, True),
            lengths=out.lengths.at[row].add(1, mode="drop"),
            finished=out.finished.at[row].set(ended, mode="drop"),
        )
        return DecodeState(
            offered=state.offered + live.size,
            used=state.used + live.sum(),
            queue=state.queue,
            row=jnp.where(ended | (at + 1 >= ends.limit), none, row),
            recent=recent,
            matched=matched,
            cache=dataclasses.replace(
                cache,
                turn=cache.turn + 1,
                token=token,
                position=cache.position + live,
                layers=tuple(new),
            ),
            out=out,
        )

    for width, least in zip(widths, (*widths[1:], 0), strict=True):
        state = _narrow(state, width)

        def go_on(state, least=least):
            return any_group(_has_more_to_do(state, rows, least))

        with jax.named_scope("turns" if width == widths[0] else "last_turns"):
            state = jax.lax.while_loop(go_on, step, state)
    occupancy = state.used / jnp.maximum(state.offered, 1)
    out = dataclasses.replace(state.out, occupancy=occupancy.astype(jnp.float32))
    return dataclasses.replace(state, out=out)


def _has_more_to_do(state: DecodeState, rows: Array, least: int) -> Bool[Array, ""]:
    """Returns whether rows are waiting, or more than `least` slots still decode one."""
    live = (state.row < state.out.tokens.shape[0]).sum()
    return (live > least) | (state.queue < rows)


def _narrow(state: DecodeState, width: int) -> DecodeState:
    """Moves the slots that decode a row into a state of `width` slots."""
    if width == len(state.row):
        return state
    order = jnp.argsort(state.row, stable=True)[:width]  # slots without a row are last
    of_row = {name: getattr(state, name)[order] for name in _OF_ROW}
    return dataclasses.replace(state, cache=select_slots(state.cache, order), **of_row)


def initial_state(
    cache: Cache, row: Array, rows: int, ends: StopConditions
) -> DecodeState:
    """Returns the state before the first turn.

    Args:
      cache: the cache of W slots.
      row: [W] int32, the row of each slot; `rows` for a slot without one.
      rows: N, how many rows there are.
      ends: what ends a row.
    """
    shape = (rows, ends.limit)
    longest = max([1, *map(len, ends.stop)])
    return DecodeState(
        offered=jnp.int32(0),
        used=jnp.int32(0),
        queue=jnp.int32(0),
        row=row,
        recent=jnp.full((len(row), longest), -1, jnp.int32),
        matched=jnp.zeros(len(row), jnp.int32),
        cache=cache,
        out=Rollouts(
            tokens=jnp.zeros(shape, jnp.int32),
            logps=jnp.zeros(shape, jnp.float32),
            mask=jnp.zeros(shape, bool),
            lengths=jnp.zeros(rows, jnp.int32),
            finished=jnp.zeros(rows, bool),
        ),
    )


def prefill_tokens(
    model: Decoder, params: Params, cache: Cache, tokens: Array, lengths: Array
) -> Cache:
    """Prefills tokens behind those that the slots hold, and returns the new cache.

    Args:
      model: the decoder.
      params: its parameters.
      cache: a cache whose columns were written once and have room for T more (`grow`).
      tokens: [W, T] int32, padded on the right.
      lengths: [W] int32, how many of a slot's tokens are real.

    Returns:
      The cache with these tokens, all but each slot's last.
    """
    tokens = jnp.concatenate([cache.token[:, None], tokens], 1)
    token = jnp.take_along_axis(tokens, lengths[:, None], 1)[:, 0]
    step = jnp.arange(tokens.shape[1] - 1)
    columns = cache.turn + step
    positions = cache.position[:, None] + step[None]
    at = jnp.where(step[None] < lengths[:, None], positions, -1)
    count, turn = len(cache.places), cache.turn + len(step)
    places = join_blocks(cache.places, cache.turn, 1).at[:, columns].set(at)
    prefixes, prompt = cache.prefixes, cache.prompt
    distance = positions[:, :, None] - places[:, None]  # [W, T, X·B]
    allowed = (places[:, None] >= 0) & (distance >= 0)
    index = jnp.arange(prefixes.layers[0][1].shape[2])[None, None]
    of_prompt = positions[:, :, None] - index  # [W, T, S]
    seen = jnp.broadcast_to(
        index < prefixes.lengths[prompt][:, None, None], of_prompt.shape
    )
    if model.config.sliding_window is not None:
        allowed &= distance < model.config.sliding_window
        seen &= of_prompt < model.config.sliding_window
    allowed = jnp.concatenate([seen, allowed], 2)
    x, new = model.embed(params, tokens[:, :-1]), []
    rotation = model.rotation(positions)
    tables = zip(_layers(model, params), cache.layers, prefixes.layers, strict=True)
    for layer, blocks, prefix in tables:

        def look(q, k, v, blocks=blocks, prefix=prefix):
            keys, values = zip(*blocks, strict=True)
            keys = join_blocks(keys, cache.turn, 3)
            values = join_blocks(values, cache.turn, 2)
            k, v = mark_nonfinite(k, v)
            k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # from [W, T, K, H]
            keys = keys.at[..., columns].set(k.astype(keys.dtype))
            values = values.at[:, :, columns].set(v.astype(values.dtype))
            keys_of = jnp.concatenate([prefix[0][prompt], keys], 3).transpose(
                0, 3, 1, 2
            )
            values_of = jnp.concatenate([prefix[1][prompt], values], 2).swapaxes(1, 2)
            back = (
                split_into_blocks(keys, count, turn, 3),
                split_into_blocks(values, count, turn, 2),
            )
            seen_by_all = keys_of.astype(q.dtype), values_of.astype(q.dtype)
            out = dense_attention(q, *seen_by_all, allowed)
            return out, tuple(zip(*back, strict=True))

        x, blocks = model.block(layer, x, rotation, look)
        new.append(blocks)
    *others, last = split_into_blocks(places, count, turn, 1)
    number = jnp.maximum(turn - 1, 0) // cache.block  # the last block's place
    others = [jnp.where(number == i, -1, x) for i, x in enumerate(others)]
    return dataclasses.replace(
        cache,
        turn=turn,
        token=token,
        position=cache.position + lengths,
        places=(*others, last),
        layers=tuple(new),
    )
