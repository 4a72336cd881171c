"""Kept rows go on: tokens that others wrote are appended, and sampling resumes.

In: `Rollouts` with a cache, tokens for each row (a tool's output). Out: `Rollouts` of
the new turn. Keys and values of what was there are not computed again.

Axes: N rows, W slots (one a row), T appended positions, C new positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from grpo_jax.arguments import check_request, check_token_ids
from grpo_jax.errors import GrpoError
from grpo_jax.generation.decode_loop import Ends, Rollouts, append, decode, start
from grpo_jax.generation.kv_cache import Cache, grow
from grpo_jax.generation.sampler import (
    as_ids,
    as_stops,
    bucket,
    first_rows,
    ragged,
)
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
    ends: Ends,
    stop_table: Array | None = None,
) -> Rollouts:
    """The jittable core of `continue_rollouts`; lengths -1: the row is left alone.

    [W, T + C]: what was appended, outside the mask, then what was sampled.
    """
    max_new_tokens = ends.limit
    rows, width = tokens.shape
    live, lengths = lengths >= 0, jnp.maximum(lengths, 0)
    cache = grow(cache, width + max_new_tokens)
    cache = append(model, params, cache, tokens, lengths)
    row = jnp.where(live, jnp.arange(rows, dtype=jnp.int32), rows)
    state = decode(
        model,
        params,
        start(cache, row, rows, ends),
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

    def behind(sampled: Array) -> Array:  # [W, C] -> [W, T + C], 0 where none is
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
    """Go on with kept rows after tokens that others wrote, such as a tool's output.

    Args:
      rollouts: of `generate(…, keep=True)` or of this function; its cache is used up.
      appended: [N] token ids after a row's last one; None: the row is left alone.
      key, max_new_tokens, …: as in `generate`, for what is sampled now.

    Returns:
      Rollouts of this turn alone, with a cache: a row begins with its appended tokens,
      whose mask is False and whose log-probabilities are 0.

    >>> from grpo_jax.models.decoder import ModelConfig
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
    width = bucket(longest) if longest else 0
    slots = rollouts.cache.token.shape[0]
    tokens, mask = ragged(lists, slots, width)
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
        ends=Ends(as_ids(eos_id), as_stops(stop), max_new_tokens),
        stop_table=stop_table,
    )
    return first_rows(out, rows)
