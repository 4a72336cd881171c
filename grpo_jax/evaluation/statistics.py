"""Statistics of an evaluation: intervals, pass@k, maj@k, and paired tests.

Wilson's interval and McNemar's test are scipy's. The bootstrap is written here, since
drawing equal values together makes it about a hundred times as fast.
"""

import collections
import math
from collections.abc import Hashable, Sequence

import numpy as np
import scipy.stats


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """Returns Wilson's 95 % confidence interval of a proportion measured on n items.

    >>> [round(x, 3) for x in wilson_interval(0.5, 100)]
    [0.404, 0.596]
    """
    test = scipy.stats.binomtest(round(accuracy * n), n)
    interval = test.proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


RESAMPLES = 10_000  # draws of a bootstrap; its bounds then vary by a few parts in 1000


def bootstrap_means(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Returns the means [R] of R = `RESAMPLES` bootstrap samples of n values.

    Equal values are drawn together, since their counts are multinomial.

    Args:
      values: [n].
      seed: of the draws.

    >>> round(float(bootstrap_means(np.arange(100.0)).std()), 1)  # 28.9 / 10
    2.9
    """
    distinct, counts = np.unique(np.asarray(values, float), return_counts=True)
    n, rng = counts.sum(), np.random.default_rng(seed)
    return rng.multinomial(n, counts / n, size=RESAMPLES) @ distinct / n


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of a mean over questions.

    If every question has the same value, 0 or 1, all samples are equal; the interval is
    then Wilson's.

    >>> (bootstrap_interval(np.ones(50))[0] < 0.95,
    ...  bootstrap_interval(np.arange(2.0).repeat(200))[1] < 0.56)
    (True, True)
    """
    values = np.asarray(values, float)
    if values.min() == values.max() and values[0] in (0.0, 1.0):
        return wilson_interval(float(values[0]), len(values))
    low, high = np.quantile(bootstrap_means(values), (0.025, 0.975))
    return float(low), float(high)


def mcnemar_p_value(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Returns p of the exact two-sided McNemar test of two models' accuracies.

    Under the null hypothesis, each of the m questions that only one model gets right is
    equally likely to be either's: p = min(1, 2 P[Binomial(m, 1/2) <= smaller count]).

    Args:
      first: whether the first model gets each question right.
      second: the same for the second model.

    >>> mcnemar_p_value([True] * 5 + [False], [False] * 6)
    0.0625
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    one, other = int((a & ~b).sum()), int((b & ~a).sum())
    if not one + other:
        return 1.0
    return float(scipy.stats.binomtest(one, one + other).pvalue)


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray
) -> tuple[float, float, float]:
    """Returns (low, high, p) of the mean difference second - first.

    The 95 % interval is the bootstrap's. p is twice the share of bootstrap means on the
    other side of 0, and at least 2/(R+1), the resolution of R samples.

    Args:
      first: [questions], the first model's accuracy on each question.
      second: [questions], the second model's, on the same questions.

    >>> paired_bootstrap(np.zeros(40), np.tile([0.0, 1.0], 20))[2] < 0.001
    True
    """
    difference = np.asarray(second, float) - np.asarray(first, float)
    means = bootstrap_means(difference)
    low, high = np.quantile(means, (0.025, 0.975))
    beyond = min((means <= 0).sum(), (means >= 0).sum()) + 1
    return float(low), float(high), min(1.0, float(2 * beyond / (RESAMPLES + 1)))


def pass_at_k_by_question(correct: Sequence[int], samples: int, k: int) -> list[float]:
    """Returns pass@k of every question, 1 - C(n-c, k) / C(n, k).

    This estimate from c right ones of n samples is unbiased (Chen et al. 2021).

    Args:
      correct: c of each question.
      samples: n.
      k: at most n.

    >>> (pass_at_k_by_question([1, 0], samples=2, k=1),
    ...  pass_at_k_by_question([1, 0], samples=2, k=2))
    ([0.5, 0.0], [1.0, 0.0])
    """
    total = math.comb(samples, k)
    return [1 - math.comb(samples - int(c), k) / total for c in correct]


def majority_is_right(predictions: Sequence[Hashable], right: Sequence[bool]) -> bool:
    """Returns whether the most frequent answer is right; the first one wins a tie.

    Args:
      predictions: the votes; None casts none.
      right: whether each is right.

    >>> majority_is_right(["4", "5", "5", None], [True, False, False, False])
    False
    """
    votes = collections.Counter(p for p in predictions if p is not None)
    if not votes:
        return False
    return right[predictions.index(votes.most_common(1)[0][0])]


def maj_at_k(predictions: Sequence[Hashable], right: Sequence[bool], k: int) -> float:
    """Returns maj@k of one question, averaged over its disjoint sets of k samples.

    >>> maj_at_k(["4", "4", "5", "5"], [True, True, False, False], k=2)
    0.5
    """
    starts = range(0, len(predictions) - k + 1, k)
    votes = [
        majority_is_right(predictions[i : i + k], right[i : i + k]) for i in starts
    ]
    return float(np.mean(votes))
