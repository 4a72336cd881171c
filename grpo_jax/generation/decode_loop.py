"""Decoding: the slots, their cache, and the loop that writes a token a turn.

In: a model, its parameters, a `State` and what refills its slots. Out: the state when
every row has ended. Pure; `rollout.py` and `continuation.py` start and read it.

Axes: N rows, W slots, C new positions, T appended positions, S positions of a prompt,
X + 1 blocks of columns, B columns of one, K key heads, H head width.
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
from grpo_jax.generation.kv_cache import (
    TOGETHER,
    Cache,
    joined,
    next_column,
    of_slots,
    parted,
    seeing,
)
from grpo_jax.generation.token_sampling import Sampling
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.models.kernels.decode import decode_kernels
from grpo_jax.models.kernels.products import widened
from grpo_jax.models.kernels.xla import dense_attention, marked


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "logps",
        "mask",
        "lengths",
        "finished",
        "occupancy",
        "cache",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions, grouped by prompt; what follows a row's end is 0."""

    tokens: Any  # [N, C] int32
    logps: Any  # [N, C] float32, of the distribution that was sampled, in nats
    mask: Any  # [N, C] bool: sampled, the EOS token included
    lengths: Any  # [N] int32
    finished: Any  # [N] bool: ended with EOS or a stop sequence, not cut off
    occupancy: Any = None  # [] float32, the share of slots × turns that decoded
    cache: Any = None  # `Cache`, where it was kept


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "offered",
        "used",
        "queue",
        "row",
        "recent",
        "matched",
        "cache",
        "out",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    offered: Array  # [] slots × turns so far
    used: Array  # [] those that decoded a row
    queue: Array  # [] the next row to be given a slot
    row: Array  # [W] the row that a slot decodes; N: none
    recent: Array  # [W, longest stop sequence] its last tokens, -1 before them
    matched: Array  # [W] the state of its text in a `stop_table`
    cache: Cache
    out: Rollouts


_OF_ROW = ("row", "recent", "matched")


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends a row; sequences of token ids, all of whose tokens belong to it."""

    eos: tuple[int, ...]
    stop: tuple[tuple[int, ...], ...]
    limit: int  # C

    def reached(self, recent: Int[Array, "W R"]) -> Bool[Array, "W"]:
        ended = jnp.isin(recent[:, -1], jnp.array(self.eos, jnp.int32))
        for s in self.stop:
            ended |= (recent[:, -len(s) :] == jnp.array([s], jnp.int32)).all(1)
        return ended


def _layers(model: Decoder, params: Params) -> list[Params]:
    """A layer's weights, taken apart once; indexing in the loop would copy them."""
    return [
        jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(model.config.layers)
    ]


def decode(
    model: Decoder,
    params: Params,
    state: State,
    refill: Callable[[State], State],
    rows: Array,
    *,
    key: Array,
    sampling: Sampling,
    ends: Ends,
    widths: Sequence[int],
    first: Any = 0,
    any_group: Callable[[Array], Array] = lambda more: more,
    stop_table: Array | None = None,
) -> State:
    """Turns until the queue is empty and every row has ended.

    A row's draws are those of number `first` + its own. Where several groups of devices
    have such a loop each, any_group(more) says whether any of them has to go on: all
    do then, so that none waits for another in the middle of something else.

    When the queue is empty and few slots have a row left, narrower loops go on with
    those: the last rows do not pay for slots that stand idle.
    """
    layers, window = _layers(model, params), model.config.sliding_window
    none, prefixes = state.out.tokens.shape[0], state.cache.prefixes
    together = max(1, min(TOGETHER, none // len(prefixes.lengths)))
    kernels = decode_kernels(model.dtype, prefixes.layers, state.cache.layers)

    # Looked up: XLA would make them again in each layer, and for each head.
    longest = prefixes.layers[0][1].shape[2] + state.cache.columns
    rotations = model.rotation(jnp.arange(longest)[None])

    def step(state: State) -> State:
        if len(state.row) == widths[0]:  # afterwards the queue is empty
            state = refill(state)
        live = state.row < none
        cache = next_column(state.cache, live)
        if kernels.attention is None:
            see = seeing(cache, live, together, window)
        else:
            given = dict(cache=cache, live=live, window=window)
            see = functools.partial(kernels.attention, **given)
        x, new = model.embed(params, cache.token[:, None]), []
        rotation = jax.tree.map(lambda x: x[0, cache.position, None], rotations)
        tables = zip(layers, cache.layers, prefixes.layers, strict=True)
        for layer, blocks, prefix in tables:

            def look(q, k, v, blocks=blocks, prefix=prefix):
                return see(q, *marked(k, v), prefix, blocks)

            x, blocks = model.block(layer, x, rotation, look, kernels.product)
            new.append(blocks)
        hidden = model.finish(params, x)[:, 0]
        factors = widened(model.unembed(params).T, hidden)
        logits = kernels.product(*factors, preferred_element_type=jnp.float32)
        # A matrix split by vocabulary gives each device some logits of every row; the
        # draw takes all logits of some rows. Said in two steps: logits travel then, and
        # not the matrix.
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
        return State(
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
            return any_group(_more(state, rows, least))

        with jax.named_scope("turns" if width == widths[0] else "last_turns"):
            state = jax.lax.while_loop(go_on, step, state)
    occupancy = state.used / jnp.maximum(state.offered, 1)
    out = dataclasses.replace(state.out, occupancy=occupancy.astype(jnp.float32))
    return dataclasses.replace(state, out=out)


def _more(state: State, rows: Array, least: int) -> Bool[Array, ""]:
    """Whether to go on with these slots: rows wait, or enough are being decoded."""
    live = (state.row < state.out.tokens.shape[0]).sum()
    return (live > least) | (state.queue < rows)


def _narrow(state: State, width: int) -> State:
    """The slots that decode a row, moved into `width` slots."""
    if width == len(state.row):
        return state
    order = jnp.argsort(state.row, stable=True)[:width]  # those without one are last
    of_row = {name: getattr(state, name)[order] for name in _OF_ROW}
    return dataclasses.replace(state, cache=of_slots(state.cache, order), **of_row)


def start(cache: Cache, row: Array, rows: int, ends: Ends) -> State:
    shape = (rows, ends.limit)
    longest = max([1, *map(len, ends.stop)])
    return State(
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


def append(
    model: Decoder, params: Params, cache: Cache, tokens: Array, lengths: Array
) -> Cache:
    """tokens [W, T], of which [W] are real, after what the slots hold.

    The columns must reach that far (`grow`): they are not used in a circle here.
    """
    tokens = jnp.concatenate([cache.token[:, None], tokens], 1)
    token = jnp.take_along_axis(tokens, lengths[:, None], 1)[:, 0]
    step = jnp.arange(tokens.shape[1] - 1)
    columns = cache.turn + step
    positions = cache.position[:, None] + step[None]
    at = jnp.where(step[None] < lengths[:, None], positions, -1)
    count, turn = len(cache.places), cache.turn + len(step)
    places = joined(cache.places, cache.turn, 1).at[:, columns].set(at)
    prefixes, own = cache.prefixes, cache.prompt
    distance = positions[:, :, None] - places[:, None]  # [W, T, X·B]
    allowed = (places[:, None] >= 0) & (distance >= 0)
    index = jnp.arange(prefixes.layers[0][1].shape[2])[None, None]
    of_prompt = positions[:, :, None] - index  # [W, T, S]
    seen = jnp.broadcast_to(
        index < prefixes.lengths[own][:, None, None], of_prompt.shape
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
            keys, values = joined(keys, cache.turn, 3), joined(values, cache.turn, 2)
            k, v = marked(k, v)
            k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # from [W, T, K, H]
            keys = keys.at[..., columns].set(k.astype(keys.dtype))
            values = values.at[:, :, columns].set(v.astype(values.dtype))
            keys_of = jnp.concatenate([prefix[0][own], keys], 3).transpose(0, 3, 1, 2)
            values_of = jnp.concatenate([prefix[1][own], values], 2).swapaxes(1, 2)
            back = parted(keys, count, turn, 3), parted(values, count, turn, 2)
            seen_by_all = keys_of.astype(q.dtype), values_of.astype(q.dtype)
            out = dense_attention(q, *seen_by_all, allowed)
            return out, tuple(zip(*back, strict=True))

        x, blocks = model.block(layer, x, rotation, look)
        new.append(blocks)
    *others, last = parted(places, count, turn, 1)
    number = jnp.maximum(turn - 1, 0) // cache.block  # where the last block came from
    others = [jnp.where(number == i, -1, x) for i, x in enumerate(others)]
    return dataclasses.replace(
        cache,
        turn=turn,
        token=token,
        position=cache.position + lengths,
        places=(*others, last),
        layers=tuple(new),
    )
