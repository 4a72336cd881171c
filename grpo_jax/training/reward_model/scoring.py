"""Scores packed sequences with a reward model, and defines its training objective.

A reward model is read at its input tokens, so masks and labels belong to position t's
input. `pack` drops a sequence's last token as input; each sequence therefore ends with
one more token, which makes the last real one an input.

Axes: A micro-batches, B rows, T positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from grpo_jax.algorithms.reward_model_losses import reward_loss
from grpo_jax.arguments import check_token_ids, check_whole
from grpo_jax.distributed import sharding
from grpo_jax.models.decoder import Params
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.batch import Batch, Sample
from grpo_jax.training.objectives import Metrics, Objective, apply_to
from grpo_jax.training.packing import pack, unpack
from grpo_jax.training.train_step import by_micro_batch


def reward_sample(
    tokens: Sequence[int], ends: Sequence[int] = (), labels: Sequence[float] = ()
) -> Sample:
    """Returns a sequence for `pack`, with labels at the tokens with indices `ends`.

    >>> sample = reward_sample([5, 6, 7], [1, 2], [1.0, 0.0])
    >>> batch = pack([sample], length=3)
    >>> batch.tokens.tolist(), batch.mask.astype(int).tolist(), batch.labels.tolist()
    ([[[5, 6, 7]]], [[[0, 1, 1]]], [[[0.0, 1.0, 0.0]]])
    """
    # Shifted by one: `pack` moves mask and labels to the position before, from which a
    # policy would predict the token.
    mask, marked = [0] * (len(tokens) + 1), [0.0] * (len(tokens) + 1)
    for end, label in zip(ends, labels, strict=True):
        mask[end + 1], marked[end + 1] = 1, float(label)
    return Sample(tokens=[*tokens, 0], mask=mask, labels=marked)


def reward_objective(model: Callable[..., Array]) -> Objective:
    """Returns the cross-entropy with the labels of packed rows, for `make_step`."""

    def objective(params, reference, micro, sequences, tokens) -> tuple[Array, Metrics]:
        scores = apply_to(model, params, micro)
        return reward_loss(scores, micro.labels, micro.mask, normalizer=tokens)

    return objective


@functools.cache
def make_reward_scorer(
    model: Callable[..., Array],
) -> Callable[[Params, Batch], Array]:
    """Returns a compiled (params, batch) → score of each input token, [A, B, T]."""
    return by_micro_batch(functools.partial(apply_to, model))


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
    """Returns a reward model's score at every token of every sequence.

    Args:
      model: the reward model.
      params: its parameters.
      sequences: token ids, none empty.
      length: T of a row, at least the length of the longest sequence.
      rows: B, the rows of a micro-batch, which are in memory at a time.
      capacity: A, the number of micro-batches that is compiled. The default is enough
        for any `len(sequences)` sequences, so that calls with as many share a program.
      place: puts a batch on the mesh (`sharding.batch_placer`).

    Returns:
      For each sequence of n tokens its scores before the sigmoid, [n], on the host.

    Raises:
      GrpoError: a sequence is empty or longer than a row, or there are too many.

    >>> import jax
    >>> from grpo_jax.models.decoder import Decoder
    >>> from grpo_jax.models.config import ModelConfig
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
    return unpack(sharding.fetch_to_hosts(scores), samples)
