"""One token a row from its logits: temperature, top-k, top-p, min-p; or greedy.

In: logits [N, V], a key and a turn a row. Out: tokens and the log-probabilities of
what was really sampled: the distribution after temperature and filters, renormalised.

Sorting a vocabulary is slow everywhere; thresholds are found by bisection instead, and
draws invert the cumulated mass, so that two random numbers a row suffice.

Axes: N rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.arguments import check_number, check_whole
from grpo_jax.errors import GrpoError

LEAST = 1e-4  # of a temperature: a logit of 1e30 is the largest that it may divide
_BLOCK = 256  # tokens of the vocabulary summed at once when one is drawn
_ONE = 0x3F800000  # the bits of 1.0f; those of numbers in [0, 1] grow with them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; filters apply after the temperature, in this order."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # the k most likely; 0: all
    top_p: float = 1.0  # the fewest most likely that hold this mass together
    min_p: float = 0.0  # those at least this many times as likely as the best

    def __post_init__(self):
        check_number("generate", temperature=self.temperature)
        if 0 < self.temperature < LEAST:
            raise GrpoError(
                f"generate: temperature = {self.temperature}; 0 is greedy, and between "
                f"it and {LEAST:g} logits divided by it leave float32"
            )
        check_whole("generate", least=0, top_k=self.top_k)
        check_number("generate", most=1, top_p=self.top_p, min_p=self.min_p)
        if self.top_p == 0:
            raise GrpoError("generate: top_p = 0; no token has so little mass")

    def __call__(
        self, logits: Float[Array, "N V"], keys: Array, turns: Array
    ) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
        """(token, log-probability) a row; a row's draw depends on (key, turn) alone.

        Greedy log-probabilities are those at temperature 1, unfiltered.

        >>> logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
        >>> keys, turns = jax.random.split(jax.random.key(0), 1), jnp.zeros(1, int)
        >>> token, logp = Sampling(top_k=1)(logits, keys, turns)
        >>> int(token[0]), float(logp[0])
        (3, 0.0)
        """
        if self.temperature == 0:
            token = logits.argmax(-1).astype(jnp.int32)
            best = jnp.take_along_axis(logits, token[:, None], 1)
            return token, -jnp.log(jnp.exp(logits - best).sum(-1))
        return draw(logits, keys, turns, self.temperature, self.keep)

    def keep(self, weights: Float[Array, "N V"]) -> Float[Array, "N V"]:
        """Weights (the best one's is 1) with those of the ruled-out tokens 0.

        Tokens as likely as the last one kept are kept too.

        >>> Sampling(top_p=0.7).keep(jnp.array([[0.1, 1.0, 0.5, 0.4]])).tolist()
        [[0.0, 1.0, 0.5, 0.0]]
        """
        if 0 < self.top_k < weights.shape[1]:
            least = _threshold(weights, jnp.ones_like(weights), self.top_k)
            weights = jnp.where(weights >= least, weights, 0)
        if self.top_p < 1:
            mass = self.top_p * weights.sum(-1, keepdims=True)
            least = _threshold(weights, weights, mass)
            weights = jnp.where(weights >= least, weights, 0)
        if self.min_p > 0:
            weights = jnp.where(weights >= self.min_p, weights, 0)
        return weights


def _threshold(
    weights: Float[Array, "N V"], measure: Array, least: Any
) -> Float[Array, "N 1"]:
    """The largest t for which the measure of all weights ≥ t is at least `least`."""

    def halve(_, bounds):
        low, high = bounds  # holds at low, fails at high
        middle = (low + high) // 2
        t = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.where(weights >= t, measure, 0).sum(-1, keepdims=True) >= least
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((weights.shape[0], 1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, _ONE + 1)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def draw(
    logits: Float[Array, "N V"],
    keys: Array,
    turns: Array | int,
    temperature: Any,
    keep=lambda weights: weights,
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
    # The maximum, as XLA's CPU does not put it into one operation with the product
    # that gives the logits: that one takes three times as long from 96 rows on.
    top = -(-z).min(-1, keepdims=True)
    weights = keep(jnp.exp(z - top))
    blocks = jnp.pad(weights, ((0, 0), (0, -z.shape[1] % _BLOCK)))
    blocks = blocks.reshape(z.shape[0], -1, _BLOCK)
    mass = blocks.sum(-1)
    turns = jnp.broadcast_to(turns, z.shape[:1])
    u = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t), (2,)))(
        keys, turns
    )
    block = _invert(mass, u[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    token = block * _BLOCK + _invert(inside, u[:, 1])
    at_token = (jnp.take_along_axis(z, token[:, None], 1) - top)[:, 0]
    return token, at_token - jnp.log(mass.sum(-1))


def _invert(mass: Float[Array, "N X"], u: Float[Array, "N"]) -> Int[Array, "N"]:
    """The first index whose cumulated mass exceeds u of the total; never one of 0."""
    cumulated = jnp.cumsum(mass, axis=-1)
    total = cumulated[:, -1]
    threshold = jnp.minimum(u * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(cumulated > threshold[:, None], axis=-1).astype(jnp.int32)
