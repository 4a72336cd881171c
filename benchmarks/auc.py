"""How well scores tell right from wrong: the area under the ROC curve.

In: scores and hard labels; for an interval, the group (question) that each belongs to.
Out: the probability that a right one scores above a wrong one, ties counting half.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats


def auc(scores: Any, labels: Any) -> float:
    """P(s⁺ > s⁻) + ½ P(s⁺ = s⁻), from ranks; NaN where all labels are the same.

    scores, labels [N].

    >>> auc([0.1, 0.4, 0.4, 0.8], [0, 1, 0, 1])
    0.875
    """
    right = np.asarray(labels) > 0.5
    n = right.sum()
    pairs = n * (len(right) - n)
    above = scipy.stats.rankdata(scores)[right].sum() - n * (n + 1) / 2
    return float(above / pairs) if pairs else float("nan")


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
    scores, labels = np.asarray(scores), np.asarray(labels)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    ends = np.cumsum(np.bincount(group))
    members = np.split(np.argsort(group, kind="stable"), ends[:-1])
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(samples):
        drawn = generator.integers(0, len(members), len(members))
        rows = np.concatenate([members[i] for i in drawn])
        found.append(auc(scores[rows], labels[rows]))
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
