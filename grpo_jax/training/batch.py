"""A sequence with what belongs to each of its tokens, and a batch of packed rows.

Position t of a row holds the token that goes in (`tokens`) and the one to be predicted
from it (`targets`); everything else in the batch is about the prediction.

Axes: A micro-batches, B rows, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.errors import GrpoError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence for `pack`; all per-token lists are as long as `tokens`."""

    tokens: Sequence[int]
    mask: Sequence[int]  # 1 if the token counts in the loss; 0 for the prompt
    prompt: int = 0  # how many tokens are the prompt; 0: it is not shared
    advantages: Sequence[float] | float | None = None  # Â, or one for every token
    logps: Sequence[float] | None = None  # the sampler's
    labels: Sequence[float] | None = None  # targets of a reward model
    returns: Sequence[float] | None = None  # targets of PPO's critic
    values: Sequence[float] | None = None  # the critic's values before the update

    @classmethod
    def from_output(
        cls,
        prompt: Sequence[int],
        tokens: Sequence[int],
        *,
        logps: Sequence[float] | None = None,
        advantages: Sequence[float] | float | None = None,
        mask: Sequence[int] | None = None,
    ) -> Sample:
        """Returns the sample of a prompt and an output; only the output is in the loss.

        Args:
          prompt: token ids.
          tokens: the output's token ids, its EOS token included; C of them.
          logps: [C] their log-probabilities when they were sampled, in nats.
          advantages: Â of the output, or of each of its tokens [C].
          mask: [C] 0 where a tool wrote the token; None: the policy sampled all.

        >>> Sample.from_output([7, 8], [9, 2], advantages=0.5).mask
        [0, 0, 1, 1]
        """
        before = len(prompt)
        zeros = [0.0] * before
        if advantages is not None:
            values = np.asarray(advantages).tolist()
            advantages = zeros + values if np.ndim(values) else values
        return cls(
            tokens=[*map(int, prompt), *map(int, tokens)],
            mask=[0] * before + [int(m) for m in mask or [1] * len(tokens)],
            logps=None if logps is None else zeros + [float(x) for x in logps],
            advantages=advantages,
            prompt=before,
        )


# Per-token numbers of a Batch → the field of Sample that holds them.
FROM_SAMPLE = {
    "advantages": "advantages",
    "sampler_logps": "logps",
    "labels": "labels",
    "returns": "returns",
    "old_values": "values",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows, [A, B, T] unless said otherwise; None: the loss does not use it."""

    tokens: Any  # int32
    targets: Any  # int32, the token after each of `tokens`
    positions: Any  # int32, from 0 in each segment
    segment_ids: Any  # int32, from 1 in each row; 0 is padding
    mask: Any  # bool: the target counts in the loss
    advantages: Any = None  # float32
    sampler_logps: Any = None  # float32, log-probabilities when the target was sampled
    old_logps: Any = None  # float32, log π_old; None: ρ = 1
    ref_logps: Any = None  # float32, log π_ref; None: computed in the step
    labels: Any = None  # float32, of a reward model
    returns: Any = None  # float32, of PPO's critic
    old_values: Any = None  # float32, V(s_t) when the outputs were sampled
    used: Any = None  # int32 []: micro-batches that hold anything
    sequences: Any = None  # int32 []: samples in the whole batch
    loss_tokens: Any = None  # int32 []: unmasked tokens in the whole batch

    def micro_batch(self, index: Any) -> Batch:
        """Returns micro-batch number `index`, whose arrays are [B, T]."""
        return jax.tree.map(lambda x: x[index] if np.ndim(x) == 3 else x, self)

    @property
    def padding(self) -> Any:
        """The share of empty positions in the used micro-batches; 1 if none is used."""
        _, rows, length = self.tokens.shape
        places = (self.used + (self.used == 0)) * rows * length
        return 1 - (self.segment_ids > 0).sum() / places

    def with_capacity(self, capacity: int) -> Batch:
        """Returns the batch padded to `capacity` micro-batches.

        Every batch of a run then has the same shape.

        Raises:
          GrpoError: the batch has more micro-batches than `capacity`.
        """
        missing = capacity - self.tokens.shape[0]
        if missing < 0:
            raise GrpoError(f"pack: {self.tokens.shape[0]} micro-batches > {capacity}")

        def pad(x):
            return np.pad(x, ((0, missing), (0, 0), (0, 0))) if np.ndim(x) == 3 else x

        return jax.tree.map(pad, self)
