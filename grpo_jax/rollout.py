"""The sampler: prompts in, completions with their log-probabilities out.

In: model, parameters, prompts (lists of token ids), a key. Out: `Rollouts`.

A prompt is prefilled once, however many samples are drawn from it; its keys and
values are shared by them. Then one jitted while_loop decodes all rows, a token a turn,
until each has ended. State, step and loop are pure; the same key gives the same
tokens, and a row's draws depend on its own number alone.

Axes: P prompts, M samples of each, N = P·M rows, S prompt positions, C new positions,
K key heads, G query heads per key head, H head width, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.model import Decoder, Params

_BLOCK = 256  # tokens of the vocabulary summed at once when one is drawn


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "logps", "mask", "lengths", "finished"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions, grouped by prompt; what follows a row's end is 0."""

    tokens: Any  # [N, C] int32
    logps: Any  # [N, C] float32, of the distribution that was sampled, in nats
    mask: Any  # [N, C] bool, the EOS token included
    lengths: Any  # [N] int32
    finished: Any  # [N] bool: ended with EOS, not cut off


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["turn", "token", "done", "keys", "values", "out"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _State:
    turn: Array  # tokens written so far
    token: Array  # [N] the last one
    done: Array  # [N] rows that have ended
    keys: tuple[Array, ...]  # a layer: [N, K, C, H]
    values: tuple[Array, ...]
    out: Rollouts


def draw(
    logits: Float[Array, "N V"], row_keys: Array, turn: Array | int, temperature: Any
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """One token a row from softmax(logits / temperature), and its log-probability.

    Inverse CDF with two uniform numbers a row: the first picks a block of the
    vocabulary by its mass, the second a token inside it.

    >>> logits = jnp.array([[0.0, 50.0, 0.0]])
    >>> token, logp = draw(logits, jax.random.split(jax.random.key(0), 1), 0, 1.0)
    >>> int(token[0]), float(logp[0])
    (1, 0.0)
    """
    z = logits / temperature
    top = z.max(-1, keepdims=True)
    blocks = jnp.pad(jnp.exp(z - top), ((0, 0), (0, -z.shape[1] % _BLOCK)))
    blocks = blocks.reshape(z.shape[0], -1, _BLOCK)
    mass = blocks.sum(-1)
    u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, turn), (2,)))(
        row_keys
    )
    block = _invert(mass, u[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    token = block * _BLOCK + _invert(inside, u[:, 1])
    at_token = jnp.take_along_axis(z - top, token[:, None], 1)[:, 0]
    return token, at_token - jnp.log(mass.sum(-1))


def _invert(mass: Float[Array, "N X"], u: Float[Array, "N"]) -> Int[Array, "N"]:
    """The first index whose cumulated mass exceeds u of the total; never one of 0."""
    cumulated = jnp.cumsum(mass, axis=-1)
    total = cumulated[:, -1]
    threshold = jnp.minimum(u * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(cumulated > threshold[:, None], axis=-1).astype(jnp.int32)


def _best(logits: Float[Array, "N V"]) -> tuple[Array, Array]:
    token = logits.argmax(-1).astype(jnp.int32)
    log_p = jax.nn.log_softmax(logits)
    return token, jnp.take_along_axis(log_p, token[:, None], 1)[:, 0]


def _two_part_attention(q, prompt_k, prompt_v, k, v, prompt_mask, written):
    """A row's query over its prompt's keys [P, K, S, H] and its own [N, K, C, H]."""
    rows, prompts = q.shape[0], prompt_k.shape[0]
    kv_heads, head_dim = k.shape[1], k.shape[3]
    q = q.reshape(rows, kv_heads, -1, head_dim)
    f32 = dict(preferred_element_type=jnp.float32)

    def by_prompt(x):  # [N, K, G, *] -> [P, K, M G, *]
        x = x.reshape(prompts, -1, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(prompts, kv_heads, -1, x.shape[-1])

    def by_row(x):  # and back
        x = x.reshape(prompts, kv_heads, rows // prompts, -1, x.shape[-1])
        return x.swapaxes(1, 2).reshape(rows, kv_heads, -1, x.shape[-1])

    to_prompt = jnp.einsum("PKXH,PKSH->PKXS", by_prompt(q), prompt_k, **f32)
    to_prompt = jnp.where(prompt_mask[:, None, None], to_prompt, -jnp.inf)
    to_own = jnp.einsum("NKGH,NKCH->NKGC", q, k, **f32)
    to_own = jnp.where(written, to_own, -jnp.inf)
    scores = jnp.concatenate([by_row(to_prompt), to_own], -1) / math.sqrt(head_dim)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    on_prompt, on_own = jnp.split(weights, [prompt_k.shape[2]], axis=-1)
    out = jnp.einsum("PKXS,PKSH->PKXH", by_prompt(on_prompt), prompt_v)
    out = by_row(out) + jnp.einsum("NKGC,NKCH->NKGH", on_own, v)
    return out.reshape(rows, 1, -1, head_dim)


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
    eos_id: int | tuple[int, ...],
) -> Rollouts:
    """The jittable core of `generate`: all but params, tokens, mask and key is static.

    tokens [P, S], mask [P, S] = 1 on real tokens; padding may stand on either side.
    """
    greedy = temperature == 0
    eos = jnp.array((eos_id,) if isinstance(eos_id, int) else eos_id)
    mask = mask != 0
    rows = tokens.shape[0] * samples
    prompt_lengths = mask.sum(1)
    row_lengths = jnp.repeat(prompt_lengths, samples)
    window = model.config.sliding_window
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))

    def choose(logits, turn):
        return _best(logits) if greedy else draw(logits, row_keys, turn, temperature)

    def write(out: Rollouts, turn, token, logp, done) -> tuple[Rollouts, Array]:
        live = ~done
        ended = live & jnp.isin(token, eos)

        def put(table, column):
            column = jnp.where(live, column, 0).astype(table.dtype)[:, None]
            return jax.lax.dynamic_update_slice(table, column, (0, turn))

        out = Rollouts(
            tokens=put(out.tokens, token),
            logps=put(out.logps, logp),
            mask=put(out.mask, live),
            lengths=out.lengths + live,
            finished=out.finished | ended,
        )
        return out, done | ended

    # Prefill, once a prompt.
    hidden, (k, v) = model.hidden(params, tokens, mask=mask, keep_cache=True)
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]
    logits = jnp.repeat(model.project(params, hidden), samples, axis=0)
    prompt_k, prompt_v = (jnp.swapaxes(x, 2, 3) for x in (k, v))  # [L, P, K, S, H]
    real_positions = jnp.cumsum(mask, 1) - 1  # [P, S]

    # A layer's weights, taken apart once; indexing them in the loop would copy them.
    layers = [
        jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(model.config.layers)
    ]
    shape = (rows, max_new_tokens)
    out = Rollouts(
        tokens=jnp.zeros(shape, jnp.int32),
        logps=jnp.zeros(shape, jnp.float32),
        mask=jnp.zeros(shape, bool),
        lengths=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
    )
    token, logp = choose(logits, 0)
    out, done = write(out, 0, token, logp, jnp.zeros(rows, bool))
    kv_heads, head_dim = k.shape[3:]
    cache = jnp.zeros((rows, kv_heads, max_new_tokens, head_dim), k.dtype)
    caches = (sharding.constrain(cache, sharding.BATCH),) * model.config.layers
    start = _State(jnp.int32(1), token, done, caches, caches, out)

    def go_on(state: _State) -> Bool[Array, ""]:
        return (state.turn < max_new_tokens) & ~state.done.all()

    def step(state: _State) -> _State:
        at = state.turn - 1  # where the last token's keys go
        positions = (row_lengths + at)[:, None]
        written = jnp.arange(max_new_tokens) <= at
        prompt_mask = mask
        if window is not None:
            written &= at - jnp.arange(max_new_tokens) < window
            # all samples of a prompt are at the same position
            here = (prompt_lengths + at)[:, None]
            prompt_mask = mask & (here - real_positions < window)
        x = model.embed(params, state.token[:, None])
        keys, values = list(state.keys), list(state.values)
        for i, layer in enumerate(layers):

            def attend(q, k, v, i=i):
                # [N, 1, K, H] -> [N, K, 1, H]: an update in place, then a clean matmul
                put = functools.partial(
                    jax.lax.dynamic_update_slice, start_indices=(0, 0, at, 0)
                )
                keys[i] = put(keys[i], jnp.swapaxes(k, 1, 2))
                values[i] = put(values[i], jnp.swapaxes(v, 1, 2))
                prompt = (prompt_k[i], prompt_v[i])
                own = (keys[i], values[i])
                return _two_part_attention(q, *prompt, *own, prompt_mask, written), None

            x, _ = model.block(layer, x, positions, attend)
        logits = model.project(params, model.finish(params, x)[:, 0])
        token, logp = choose(logits, state.turn)
        out, done = write(state.out, state.turn, token, logp, state.done)
        return _State(state.turn + 1, token, done, tuple(keys), tuple(values), out)

    return jax.lax.while_loop(go_on, step, start).out


_jitted = jax.jit(
    generate_tokens,
    static_argnames=("model", "samples", "max_new_tokens", "temperature", "eos_id"),
)


def bucket(length: int, *, smallest: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, …: a run then compiles a handful of shapes.

    >>> [bucket(n) for n in (1, 17, 25, 100)]
    [16, 24, 32, 128]
    """
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def generate(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    key: Array,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_id: int | Sequence[int],
) -> Rollouts:
    """Sample completions: [N, max_new_tokens] with N = prompts × samples.

    Args:
      prompts: token ids on the host, none empty.
      key: fresh for every call (jax.random.fold_in(key, step)).
      samples: G, drawn from each prompt; the rows of a prompt are contiguous.
      temperature: 0 is greedy (log-probabilities are then those at temperature 1).
      eos_id: one token or several; it belongs to the completion and to the mask.

    Raises:
      GrpoError: no prompts, or an empty one.

    >>> from grpo_jax.model import ModelConfig
    >>> config = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2,
    ...                      head_dim=4, ffn=32)
    >>> model = Decoder(config)
    >>> out = generate(model, model.init(jax.random.key(0)), [[1, 2], [3]],
    ...                key=jax.random.key(1), samples=2, max_new_tokens=4, eos_id=0)
    >>> out.tokens.shape, bool((out.mask.sum(1) == out.lengths).all())
    ((4, 4), True)
    """
    if not prompts:
        raise GrpoError("generate: no prompts")
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise GrpoError(f"generate: prompt {empty[0]} is empty")
    mesh = sharding.mesh_of(params)
    multiple = sharding.rows_multiple(mesh) if mesh else 1
    padded = -(-len(prompts) // multiple) * multiple
    width = bucket(max(len(prompt) for prompt in prompts))
    tokens = np.zeros((padded, width), np.int32)
    mask = np.zeros((padded, width), bool)
    mask[len(prompts) :, 0] = True  # rows that only fill the mesh
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        mask[i, : len(prompt)] = True
    if mesh is not None:
        tokens, mask = jax.device_put((tokens, mask), sharding.batch_sharding(mesh))
    eos = (eos_id,) if isinstance(eos_id, int | np.integer) else eos_id
    out = _jitted(
        model,
        params,
        tokens,
        mask,
        key=key,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=float(temperature),
        eos_id=tuple(int(e) for e in eos),
    )
    rows = len(prompts) * samples
    return out if padded == len(prompts) else jax.tree.map(lambda x: x[:rows], out)
