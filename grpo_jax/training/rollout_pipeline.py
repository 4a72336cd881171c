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
      source: samples the rollouts.
      staleness: how many rollouts may be sampled ahead, 0 or 1.
      until: the first step whose rollout is not sampled ahead.
    """

    def __init__(self, source: RolloutSource, *, staleness: int, until: int):
        self.source, self.staleness, self.until = source, staleness, until
        self.ahead: PendingRollout | None = None

    def take_rollout(self, step: int, params: Params) -> tuple[PendingRollout, int]:
        """Returns (the step's rollout, its staleness).

        It is sampled from `params` now, with staleness 0, unless it is under way.
        """
        rollout, self.ahead = self.ahead, None
        if rollout is not None and rollout.step == step:
            return rollout, 1
        return self.source.sample_rollout(step, params), 0

    def start_rollout(self, step: int, params: Params) -> None:
        """Dispatches a step's rollout, if it may be sampled ahead."""
        if self.staleness and step < self.until:
            self.ahead = self.source.sample_rollout(step, params)

    def pending_state(self) -> dict[str, Any]:
        """Waits for the rollout that is under way and returns it as JSON values."""
        if self.ahead is None:
            return {}
        file, step = io.BytesIO(), self.ahead.step
        np.savez_compressed(file, **sharding.fetch_to_hosts(self.ahead.arrays))
        arrays = base64.b64encode(file.getvalue()).decode("ascii")
        of = self._request_checksum(step)
        return {"ahead": {"step": step, "of": of, "arrays": arrays}}

    def restore_pending(self, kept: Mapping[str, Any]) -> None:
        """Restores a pending state, unless the prompts of its step have changed."""
        saved = kept.get("ahead")
        if not self.staleness or not saved or saved["step"] >= self.until:
            return
        step = saved["step"]
        if saved["of"] == self._request_checksum(step):
            with np.load(io.BytesIO(base64.b64decode(saved["arrays"]))) as arrays:
                prompts = self.source.batches[0][step]
                self.ahead = PendingRollout(step, prompts, dict(arrays))

    def _request_checksum(self, step: int) -> int:
        """Returns a checksum of a step's prompts and of its rollout's shape."""
        config = self.source.run.config
        prompts = [ids for _, ids in self.source.batches[0][step]]
        request = [prompts, config.group_size, config.max_new_tokens]
        request.append(tool_generations(config))
        return zlib.crc32(json.dumps(request).encode())
