"""Samples the next step's rollout while the current one is graded and trained on.

A rollout's staleness is the number of updates by which the policy that samples it lags
the policy that it trains. With max_staleness 1, the rollout of step k+1 is dispatched
before update k, from the same parameters. The device samples while the host decodes,
grades and packs the outputs of step k, and then runs update k. That update donates the
parameters; the runtime keeps them until the sampler has read them. Truncated importance
sampling corrects for the stale policy (`importance_cap`). The first step of a run, and
of each iteration, is sampled afresh, since no older policy has the same π_ref.

A rollout that is under way is saved in the checkpoint, so that a run ends with the same
bits wherever, and however often, it is saved and resumed.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax.config import tool_generations
from grpo_jax.distributed import sharding
from grpo_jax.models.decoder import Params
from grpo_jax.training.rollouts import PendingRollout, RolloutSource


class RolloutPipeline:
    """The rollouts of the steps before `until`.

    Args:
      experience: samples the rollouts.
      staleness: how many rollouts may be sampled ahead, 0 or 1.
      until: the first step whose rollout is not sampled ahead.
    """

    def __init__(self, experience: RolloutSource, *, staleness: int, until: int):
        self.experience, self.staleness, self.until = experience, staleness, until
        self.ahead: PendingRollout | None = None

    def take_rollout(self, step: int, params: Params) -> tuple[PendingRollout, int]:
        """Returns (the step's rollout, its staleness).

        It is sampled from `params` now, with staleness 0, unless it is under way.
        """
        drawn, self.ahead = self.ahead, None
        if drawn is not None and drawn.step == step:
            return drawn, 1
        return self.experience.sample_rollout(step, params), 0

    def start_rollout(self, step: int, params: Params) -> None:
        """Dispatches a step's rollout, if it may be sampled ahead."""
        if self.staleness and step < self.until:
            self.ahead = self.experience.sample_rollout(step, params)

    def pending_state(self) -> dict[str, Any]:
        """Waits for the rollout that is under way and returns it as JSON values."""
        if self.ahead is None:
            return {}
        file, step = io.BytesIO(), self.ahead.step
        np.savez_compressed(file, **sharding.fetch_to_hosts(self.ahead.arrays))
        arrays = base64.b64encode(file.getvalue()).decode("ascii")
        return {"ahead": {"step": step, "of": self._asked(step), "arrays": arrays}}

    def restore_pending(self, kept: Mapping[str, Any]) -> None:
        """Restores what `keep` returned, unless the step's prompts have changed."""
        saved = kept.get("ahead")
        if not self.staleness or not saved or saved["step"] >= self.until:
            return
        step = saved["step"]
        if saved["of"] == self._asked(step):
            with np.load(io.BytesIO(base64.b64decode(saved["arrays"]))) as arrays:
                prompts = self.experience.batches[0][step]
                self.ahead = PendingRollout(step, prompts, dict(arrays))

    def _asked(self, step: int) -> int:
        """A checksum of a step's prompts and of the shape of its rollout."""
        config = self.experience.run.config
        ids = [ids for _, ids in self.experience.batches[0][step]]
        asked = [
            ids,
            config.group_size,
            config.max_new_tokens,
            tool_generations(config),
        ]
        return zlib.crc32(json.dumps(asked).encode())
