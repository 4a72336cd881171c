"""Resumes rollouts after tokens that the model did not write, such as a tool's output.

The KV cache of the earlier turns is reused: only the appended tokens are prefilled
before sampling goes on.

Axes: N rows, W slots (one per row), T appended positions, C new positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from grpo_jax.arguments import check_request, check_token_ids
from grpo_jax.errors import GrpoError
from grpo_jax.generation.decode_loop import (
    Rollouts,
    StopConditions,
    initial_state,
    prefill_tokens,
    run_decode_loop,
)
from grpo_jax.generation.kv_cache import Cache, grow
from grpo_jax.generation.rollout_shapes import (
    as_stop_sequences,
    as_token_ids,
    bucket_length,
    pad_token_lists,
)
from grpo_jax.generation.sampler import first_rows
from grpo_jax.generation.token_sampling import Sampling
from grpo_jax.models.decoder import Decoder, Params


def continue_tokens(
    model: Decoder,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "W T"],
    lengths: Int[Array, "W"],
    *,
    key: Array,
    sampling: Sampling,
    ends: StopConditions,
    stop_table: Array | None = None,
) -> Rollouts:
    """Jittable core of `continue_rollouts`.

    Args:
      model: the decoder.
      params: its parameters.
      cache: the cache of the earlier turns, one slot per row.
      tokens: [W, T] int32, the tokens to append, padded on the right.
      lengths: [W] int32, how many of them are real; -1 leaves the row as it is.
      key: PRNG key of this turn's draws.
      sampling: temperature and filters.
      ends: what ends a row, and the limit C on new tokens.
      stop_table: [V, S] table of `stop_strings.make_stop_table`, or None.

    Returns:
      Rollouts of width T + C with the new cache. A row holds its appended tokens, where
      the mask is False, and then the sampled ones.
    """
    max_new_tokens = ends.limit
    rows, width = tokens.shape
    live, lengths = lengths >= 0, jnp.maximum(lengths, 0)
    cache = grow(cache, width + max_new_tokens)
    cache = prefill_tokens(model, params, cache, tokens, lengths)
    row = jnp.where(live, jnp.arange(rows, dtype=jnp.int32), rows)
    state = run_decode_loop(
        model,
        params,
        initial_state(cache, row, rows, ends),
        lambda state: state,
        jnp.int32(0),
        key=key,
        sampling=sampling,
        ends=ends,
        widths=(rows,),
        stop_table=stop_table,
    )
    at = jnp.arange(width + max_new_tokens)[None] - lengths[:, None]
    given = at < 0

    def behind(sampled: Array) -> Array:  # [W, C] -> [W, T + C], padded with 0
        index = jnp.clip(at, 0, max_new_tokens - 1)
        moved = jnp.take_along_axis(sampled, index, 1)
        return jnp.where((at >= 0) & (at < max_new_tokens), moved, 0)

    out = state.out
    appended = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)))
    return Rollouts(
        tokens=jnp.where(given, appended, behind(out.tokens)),
        logps=behind(out.logps),
        mask=behind(out.mask) != 0,
        lengths=out.lengths + lengths,
        finished=out.finished,
        occupancy=out.occupancy,
        cache=state.cache,
    )


_jitted = jax.jit(
    continue_tokens,
    static_argnames=("model", "sampling", "ends"),
)


def continue_rollouts(
    model: Decoder,
    params: Params,
    rollouts: Rollouts,
    appended: Sequence[Sequence[int] | None],
    *,
    key: Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_id: int | Sequence[int],
    stop: Sequence[Sequence[int]] = (),
    stop_table: ArrayLike | None = None,
) -> Rollouts:
    """Appends tokens, such as a tool's output, to kept rollouts and samples on.

    Args:
      model: the decoder that sampled the rollouts.
      params: its parameters.
      rollouts: the result of `generate(…, keep=True)` or of this function, with N rows.
        Use the cache of the result from then on.
      appended: for each of the N rows the token ids to append, or None to leave the row
        as it is.
      key: PRNG key; use a new one for every call.
      max_new_tokens: the limit C on the tokens sampled in this turn.
      temperature, top_k, top_p, min_p, eos_id, stop, stop_table: as in `generate`.

    Returns:
      Rollouts of this turn only, with a cache. A row begins with its appended tokens,
      whose mask is False and whose log-probabilities are 0.

    Raises:
      GrpoError: the rollouts have no cache, `appended` has not N entries, or an option
        or a token id is out of range.

    >>> from grpo_jax.models.config import ModelConfig
    >>> config = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2,
    ...                      head_dim=4, ffn=32)
    >>> model = Decoder(config)
    >>> from grpo_jax.generation.sampler import generate
    >>> params = model.init(jax.random.key(0))
    >>> options = dict(max_new_tokens=4, eos_id=0)
    >>> out = generate(model, params, [[1, 2], [3]], key=jax.random.key(1), keep=True,
    ...                **options)
    >>> more = continue_rollouts(model, params, out, [[7, 8], None],
    ...                          key=jax.random.key(2), **options)
    >>> more.tokens[0, :2].tolist(), more.mask[0, :3].tolist(), int(more.lengths[1])
    ([7, 8], [False, False, True], 0)
    """
    if rollouts.cache is None:
        raise GrpoError("continue_rollouts: no cache was kept; generate(…, keep=True)")
    rows = rollouts.tokens.shape[0]
    if len(appended) != rows:
        raise GrpoError(
            f"continue_rollouts: {len(appended)} lists of tokens for {rows} rows; "
            "give None for a row that is left alone"
        )
    vocab_size = model.config.vocab_size
    check_request("continue_rollouts", vocab_size, max_new_tokens, eos_id)
    lists = [[] if ids is None else ids for ids in appended]
    check_token_ids("continue_rollouts", lists, vocab_size, what="row")
    longest = max(map(len, lists))
    width = bucket_length(longest) if longest else 0
    slots = rollouts.cache.token.shape[0]
    tokens, mask = pad_token_lists(lists, slots, width)
    lengths = np.full(slots, -1, np.int32)
    lengths[:rows] = [-1 if ids is None else len(ids) for ids in appended]
    out = _jitted(
        model,
        params,
        rollouts.cache,
        tokens,
        lengths,
        key=key,
        sampling=Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        ),
        ends=StopConditions(
            as_token_ids(eos_id), as_stop_sequences(stop), max_new_tokens
        ),
        stop_table=stop_table,
    )
    return first_rows(out, rows)
