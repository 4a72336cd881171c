"""How well scores tell right from wrong: the area under the ROC curve.

In: scores and hard labels; for an interval, the group (question) that each belongs to.
Out: the probability that a right one scores above a wrong one, ties counting half.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def auc(scores: Any, labels: Any, weights: Any = None) -> float:
    """P(s⁺ > s⁻) + ½ P(s⁺ = s⁻); NaN where all labels are the same.

    scores, labels [N]; weights [N]: how often each counts (1).

    >>> auc([0.1, 0.4, 0.4, 0.8], [0, 1, 0, 1])
    0.875
    """
    values, rank = np.unique(np.asarray(scores, np.float64), return_inverse=True)
    right = np.asarray(labels) > 0.5
    weights = np.ones(len(right)) if weights is None else np.asarray(weights)
    above = np.bincount(rank, weights * right, len(values))
    below = np.bincount(rank, weights * ~right, len(values))
    pairs = above.sum() * below.sum()
    if not pairs:
        return float("nan")
    beaten = np.cumsum(below) - below / 2  # wrong ones under each value, ties half
    return float((above * beaten).sum() / pairs)


def auc_interval(
    scores: Any,
    labels: Any,
    groups: Any,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % bootstrap interval of `auc`, drawing whole groups with replacement.

    Steps of one question resemble each other: drawing steps would make it too narrow.

    >>> auc_interval([0.1, 0.4, 0.4, 0.8], [0, 1, 0, 1], ["a", "a", "b", "b"])
    (0.875, 1.0)
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count = group.max() + 1
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(samples):
        times = np.bincount(generator.integers(0, count, count), minlength=count)
        found.append(auc(scores, labels, times[group]))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def measure(scores: Any, labels: Any, groups: Any) -> dict[str, Any]:
    """The figures to report: auc, ci95, n and how many of n are right."""
    return {
        "auc": auc(scores, labels),
        "ci95": auc_interval(scores, labels, groups),
        "n": len(labels),
        "right": int((np.asarray(labels) > 0.5).sum()),
    }
