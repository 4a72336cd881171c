"""Measures of an evaluation: intervals, pass@k and maj@k.

In: which of a question's samples are right, and what they answer. Out: numbers in
[0, 1]. Pure functions, without jax.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np


def wilson(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion measured on n questions.

    >>> [round(x, 3) for x in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    z = 1.959964
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    spread = math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    spread *= z / (1 + z * z / n)
    return max(0.0, center - spread), min(1.0, center + spread)


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Mean over questions of 1 - C(n-c, k) / C(n, k): unbiased, c of n samples right.

    >>> pass_at_k([1, 0], samples=2, k=1), pass_at_k([1, 0], samples=2, k=2)
    (0.25, 0.5)
    """
    total = math.comb(samples, k)
    return float(np.mean([1 - math.comb(samples - int(c), k) / total for c in correct]))


def majority(predictions: Sequence[str | None], right: Sequence[bool]) -> bool:
    """maj@k: is the answer given most often right? The first one wins a tie.

    >>> majority(["4", "5", "5", None], [True, False, False, False])
    False
    """
    votes = collections.Counter(p for p in predictions if p is not None)
    if not votes:
        return False
    return right[predictions.index(votes.most_common(1)[0][0])]


def maj_at_k(predictions: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """maj@k of one question: the mean over as many separate sets of k as there are.

    >>> maj_at_k(["4", "4", "5", "5"], [True, True, False, False], k=2)
    0.5
    """
    starts = range(0, len(predictions) - k + 1, k)
    votes = [majority(predictions[i : i + k], right[i : i + k]) for i in starts]
    return float(np.mean(votes))
