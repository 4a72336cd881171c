"""Samples completions of prompts, with their log-probabilities.

Each prompt is prefilled once, however many samples are drawn from it. Then one jitted
while_loop (`decode_loop.py`) decodes W slots at a time, one token per turn. When a row
ends, its slot takes the next (prompt, sample) pair of the queue.

A row's random numbers depend only on the key, its row number and how many tokens it
has. In float32 the same key therefore gives the same tokens for any number of slots,
except where rounding decides a draw. In bfloat16 that happens more often: 79 % of 128
rows of up to 32 tokens were equal with 16 and with 128 slots
(`tests/models/kernels/test_bfloat16.py`).

Axes: P prompts, M samples of each, N = P·M rows, W slots, S prompt positions, C new
positions, K key heads, H head width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from grpo_jax.arguments import check_request, check_token_ids
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.generation.decode_loop import (
    DecodeState,
    StopConditions,
    initial_state,
    run_decode_loop,
)
from grpo_jax.generation.decode_loop import Rollouts as Rollouts
from grpo_jax.generation.kv_cache import Prefixes, make_empty_cache
from grpo_jax.generation.reshard import reshard_for_decoding
from grpo_jax.generation.rollout_shapes import (
    RolloutShape,
    as_stop_sequences,
    as_token_ids,
    default_slots,
    pad_token_lists,
    rollout_shape,
)
from grpo_jax.generation.token_sampling import Sampling
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.models.kernels.tuning import loop_widths
from grpo_jax.models.kernels.xla import mark_nonfinite


def generate_tokens(
    model: Decoder,
    params: Params,
    tokens: Int[Array, "P S"],
    mask: Array,
    *,
    key: Array,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_id: int | tuple[int, ...],
    stop: tuple[tuple[int, ...], ...] = (),
    slots: int | None = None,
    cache_dtype: str | None = None,
    keep: bool = False,
    groups: tuple[str, ...] = (),
    stop_table: Array | None = None,
) -> Rollouts:
    """Jittable core of `generate`; every argument that is no array is static.

    Args:
      model: the decoder.
      params: its parameters.
      tokens: [P, S] int32. Prompts without a real token only fill the shape, and must
        be the last ones.
      mask: [P, S], nonzero on real tokens; padding may be on either side.
      key: PRNG key.
      samples, max_new_tokens, temperature, top_k, top_p, min_p, eos_id, stop, slots,
        cache_dtype, keep, stop_table: as in `generate`.
      groups: axes of the shard_map around this call, if there is one; `tokens` are then
        one group's prompts.

    Returns:
      Rollouts of N = P·samples rows.

    Raises:
      GrpoError: an option is out of range.
    """
    request = max_new_tokens, eos_id, samples, slots, cache_dtype
    check_request("generate_tokens", model.config.vocab_size, *request)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ends = StopConditions(as_token_ids(eos_id), stop, max_new_tokens)
    mask, total = mask != 0, tokens.shape[0] * samples
    slots = total if keep else min(total, slots or default_slots(total))
    order = jnp.argsort(~mask, axis=1, stable=True)  # padding goes to the right
    tokens = jnp.take_along_axis(tokens, order, 1)
    lengths = mask.sum(1, dtype=jnp.int32)
    mask = jnp.arange(mask.shape[1])[None] < lengths[:, None]
    _, kept = model.hidden(params, tokens, mask=mask, keep_cache=True)
    keys, values = mark_nonfinite(*kept)
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], 1)[:, 0]

    def table(x: Array, *axes: int) -> Array:  # of [P, S, K, H]
        x = x.transpose(axes).astype(cache_dtype or x.dtype)
        return sharding.constrain(x, sharding.P(*sharding.BATCH, "tensor"))

    depth = model.config.layers
    prefixes = Prefixes(
        jnp.maximum(lengths - 1, 0),
        tuple(
            (table(keys[i], 0, 2, 3, 1), table(values[i], 0, 2, 1, 3))
            for i in range(depth)
        ),
    )
    rows = lengths.astype(bool).sum() * samples

    def refill(state: DecodeState) -> DecodeState:
        """Gives the next rows of the queue to the free slots."""
        cache, free = state.cache, state.row == total
        row = state.queue + jnp.cumsum(free) - 1
        taken = free & (row < rows)
        prompt = jnp.where(taken, row // samples, cache.prompt)
        return dataclasses.replace(
            state,
            queue=state.queue + taken.sum(),
            row=jnp.where(taken, row, state.row),
            recent=jnp.where(taken[:, None], -1, state.recent),
            matched=jnp.where(taken, 0, state.matched),
            cache=dataclasses.replace(
                cache,
                token=jnp.where(taken, last[prompt], cache.token),
                position=jnp.where(taken, prefixes.lengths[prompt], cache.position),
                began=jnp.where(taken, cache.turn, cache.began),
                prompt=prompt,
                places=tuple(jnp.where(taken[:, None], -1, x) for x in cache.places),
            ),
        )

    cache = make_empty_cache(slots, max_new_tokens, slots < total, prefixes)
    state = run_decode_loop(
        model,
        params,
        initial_state(cache, jnp.full(slots, total, jnp.int32), total, ends),
        refill,
        rows,
        key=key,
        sampling=sampling,
        ends=ends,
        widths=(slots,) if keep else loop_widths(slots),
        first=jax.lax.axis_index(groups) * total if groups else 0,
        any_group=(lambda more: jax.lax.pmax(more, groups)) if groups else lambda x: x,
        stop_table=stop_table,
    )
    return dataclasses.replace(state.out, cache=state.cache if keep else None)


def generate_tokens_on_mesh(
    model: Decoder,
    params: Params,
    tokens: Int[Array, "P S"],
    mask: Array,
    *,
    key: Array,
    stop_table: Array | None = None,
    **options: Any,
) -> Rollouts:
    """Runs `generate_tokens` on the mesh in use, split over groups of devices.

    Along "data" and "fsdp" each group has its own prompts, slots and cache; groups only
    tell each other whether they are done. Along "tensor" the devices of a group share
    matrices and heads.

    Args:
      model, params, tokens, mask, key, stop_table: as in `generate_tokens`; P is a
        multiple of the number of groups.
      **options: further options of `generate_tokens`; `slots` counts one group's slots.

    Returns:
      Rollouts of all groups, with the mean of their occupancies.
    """

    def of_group(params, tokens, mask, key, stop_table):
        out = generate_tokens(
            model,
            params,
            tokens,
            mask,
            key=key,
            groups=groups,
            stop_table=stop_table,
            **options,
        )
        return dataclasses.replace(out, occupancy=out.occupancy[None])

    groups = sharding.AXES[:2]
    rows, every = sharding.BATCH, sharding.P()
    out = jax.shard_map(
        of_group,
        in_specs=(every, rows, rows, every, every),
        out_specs=rows,
        axis_names=set(groups),
        check_vma=False,  # a group's loops start from constants
    )(params, tokens, mask, key, stop_table)
    return dataclasses.replace(out, occupancy=out.occupancy.mean())


_STATIC = ("model", "max_new_tokens", "temperature", "top_k", "top_p", "min_p")
_STATIC += ("eos_id", "stop", "samples", "slots", "cache_dtype", "keep")
_jitted = jax.jit(generate_tokens, static_argnames=_STATIC)
_spread = jax.jit(generate_tokens_on_mesh, static_argnames=_STATIC)


def make_sampler(
    shape: RolloutShape, *, spread: bool, **options: Any
) -> functools.partial:
    """Returns the jitted sampler, a function (model, params, tokens, mask, key=…).

    Args:
      shape: the request's shape.
      spread: whether it is split over the groups of the mesh in use.
      **options: static options of `generate_tokens`.
    """
    options |= {"samples": shape.samples, "slots": shape.slots}
    return functools.partial(_spread if spread else _jitted, **options)


def first_rows(out: Rollouts, rows: int) -> Rollouts:
    """Returns the rollouts without the rows that only fill the shape."""
    if out.tokens.shape[0] == rows:
        return out
    names = ("tokens", "logps", "mask", "lengths", "finished")
    return dataclasses.replace(out, **{n: getattr(out, n)[:rows] for n in names})


def generate(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    key: Array,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_id: int | Sequence[int],
    stop: Sequence[Sequence[int]] = (),
    slots: int | None = None,
    cache_dtype: str | None = None,
    keep: bool = False,
    stop_table: ArrayLike | None = None,
) -> Rollouts:
    """Samples completions of each prompt.

    Args:
      model: the decoder.
      params: its parameters, on one device or on the training mesh.
      prompts: token ids of each prompt, none of them empty.
      key: PRNG key; use a new one for every call (jax.random.fold_in(key, step)).
      samples: completions of each prompt, the G of GRPO (section 4.1).
      max_new_tokens: the limit C on the tokens of a completion.
      temperature: 0 is greedy; log-probabilities are then those at temperature 1.
      top_k, top_p, min_p: filters, applied in this order (`Sampling`).
        Log-probabilities are those of the distribution after filtering.
      eos_id: one token id or several; the EOS token belongs to the completion.
      stop: sequences of token ids that end a completion and belong to it.
      slots: rows decoded at a time, `default_slots` if None. Results depend on it only
        by rounding, which in bfloat16 changes the tokens of some rows.
      cache_dtype: dtype of the cached keys and values; the model's if None.
      keep: keep the cache for `continue_rollouts`; every row then has its own slot.
      stop_table: [V, S] from `stop_strings.make_stop_table`: strings that end it too.

    Returns:
      Rollouts of N = prompts × samples rows, [N, max_new_tokens]. The rows of a prompt
      are contiguous.

    Raises:
      GrpoError: there are no prompts, one is empty, or an option is out of range.

    >>> from grpo_jax.models.config import ModelConfig
    >>> config = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2,
    ...                      head_dim=4, ffn=32)
    >>> model = Decoder(config)
    >>> out = generate(model, model.init(jax.random.key(0)), [[1, 2], [3]],
    ...                key=jax.random.key(1), samples=2, max_new_tokens=4, eos_id=0)
    >>> out.tokens.shape, bool((out.mask.sum(1) == out.lengths).all())
    ((4, 4), True)
    """
    vocab_size = model.config.vocab_size
    request = max_new_tokens, eos_id, samples, slots, cache_dtype
    check_request("generate", vocab_size, *request)
    if not len(prompts):
        raise GrpoError("generate: no prompts")
    check_token_ids("generate", prompts, vocab_size)
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise GrpoError(f"generate: prompt {empty[0]} is empty")
    # Built here only to check the options before anything is traced.
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    stop = as_stop_sequences(stop)
    check_token_ids("generate", stop, vocab_size, what="stop sequence")
    if stop_table is not None and np.shape(stop_table)[:-1] != (vocab_size,):
        raise GrpoError(
            f"generate: stop_table has shape {np.shape(stop_table)}; a row for each of "
            f"the {vocab_size} tokens is needed"
        )
    layout, params = reshard_for_decoding(model, params)
    groups = sharding.rows_multiple(layout) if layout else 1
    shape = rollout_shape(
        len(prompts), max(map(len, prompts)), samples, groups=groups, slots=slots
    )
    lists = [ids for ids in prompts for _ in range(shape.copies)]
    tokens, mask = pad_token_lists(lists, shape.prompts, shape.width)
    if layout is not None:
        rows = sharding.batch_sharding(layout)
        tokens, mask = (sharding.place_on_devices(x, rows) for x in (tokens, mask))
    sample = make_sampler(
        shape,
        # A kept cache must be one cache, not one per group.
        spread=layout is not None and not keep,
        max_new_tokens=max_new_tokens,
        temperature=float(temperature),
        top_k=top_k,
        top_p=float(top_p),
        min_p=float(min_p),
        eos_id=as_token_ids(eos_id),
        stop=stop,
        cache_dtype=cache_dtype,
        keep=keep,
    )
    with jax.set_mesh(layout) if layout else contextlib.nullcontext():
        out = sample(model, params, tokens, mask, key=key, stop_table=stop_table)
    return first_rows(out, len(prompts) * samples)
