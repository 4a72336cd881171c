"""Packed scoring and training of a reward model: its samples, objective and scorer.

In a packed batch position t holds token t as input, so that marks and labels stand
where their token goes in. Each sequence ends with one further token, which is there
only to make the last real one an input.

Axes: A micro-batches, B rows, T positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from grpo_jax.algorithms.reward_model_losses import reward_loss
from grpo_jax.arguments import check_token_ids, check_whole
from grpo_jax.distributed import sharding
from grpo_jax.models.decoder import Params
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.packing import Batch, Sample, pack, unpack
from grpo_jax.training.train_step import Metrics, Objective

Scorer = Callable[[Params, Batch], Array]


def reward_sample(
    tokens: Sequence[int], ends: Sequence[int] = (), labels: Sequence[float] = ()
) -> Sample:
    """A sequence for `pack`, with the labels at the tokens whose indices are `ends`.

    >>> sample = reward_sample([5, 6, 7], [1, 2], [1.0, 0.0])
    >>> batch = pack([sample], length=3)
    >>> batch.tokens.tolist(), batch.mask.astype(int).tolist(), batch.labels.tolist()
    ([[[5, 6, 7]]], [[[0, 1, 1]]], [[[0.0, 1.0, 0.0]]])
    """
    # One further on than the token: `pack` puts mask and labels beside the token
    # before, from which a policy would predict it.
    mask, marked = [0] * (len(tokens) + 1), [0.0] * (len(tokens) + 1)
    for end, label in zip(ends, labels, strict=True):
        mask[end + 1], marked[end + 1] = 1, float(label)
    return Sample(tokens=[*tokens, 0], mask=mask, labels=marked)


def reward_objective(model: Callable[..., Array]) -> Objective:
    """Cross-entropy with the labels of packed rows, for `update.make_step`."""

    def objective(params, reference, micro, sequences, tokens) -> tuple[Array, Metrics]:
        scores = _score(model, params, micro)
        return reward_loss(scores, micro.labels, micro.mask, normalizer=tokens)

    return objective


def _score(model: Callable[..., Array], params: Params, micro: Batch) -> Array:
    return model(
        params, micro.tokens, positions=micro.positions, segment_ids=micro.segment_ids
    )


@functools.cache
def make_reward_scorer(model: Callable[..., Array]) -> Scorer:
    """(params, batch) → the score at each position's input token, [A, B, T]."""

    def score(params, batch):
        def one(index, scores):
            return scores.at[index].set(_score(model, params, batch.micro(index)))

        zero = jnp.zeros(batch.tokens.shape, jnp.float32)
        with jax.named_scope("micro_batches"):
            return jax.lax.fori_loop(0, batch.used, one, zero)

    return jax.jit(score)


def score_samples(
    model: RewardModel,
    params: Params,
    sequences: Sequence[Sequence[int]],
    *,
    length: int,
    rows: int = 1,
    capacity: int | None = None,
    place: Callable[[Batch], Any] = lambda batch: batch,
) -> list[np.ndarray]:
    """The score at every token of every sequence, packed: [n] each, on the host.

    Args:
      sequences: token ids, none empty.
      length: T of a row, at least the longest sequence.
      rows: B of a micro-batch, what is in memory at a time.
      capacity: micro-batches of the one shape that is compiled; by default enough for
        any `len(sequences)` sequences, so that calls with as many share a program.
      place: puts a batch on the mesh (`sharding.batch_placer`).

    Raises:
      GrpoError: an empty sequence, one that is longer than a row, too many.

    >>> from grpo_jax.models.decoder import Decoder, ModelConfig
    >>> config = ModelConfig(vocab_size=11, width=16, layers=1, heads=2, kv_heads=2,
    ...                      head_dim=8, ffn=32)
    >>> model = RewardModel(Decoder(config))
    >>> params = model.init(jax.random.key(1), model.decoder.init(jax.random.key(0)))
    >>> [len(s) for s in score_samples(model, params, [[1, 2], [3]], length=4)]
    [2, 1]
    """
    if not sequences:
        return []
    vocab_size = model.decoder.config.vocab_size
    check_token_ids("score_samples", sequences, vocab_size, what="sequence")
    check_whole("score_samples", length=length, rows=rows)
    capacity = -(-len(sequences) // rows) if capacity is None else capacity
    check_whole("score_samples", capacity=capacity)
    samples = [reward_sample(tokens) for tokens in sequences]
    batch = pack(samples, length=length, rows=rows)
    batch = place(batch.with_capacity(capacity))
    scores = make_reward_scorer(model)(params, batch)
    return unpack(sharding.to_hosts(scores), samples)
