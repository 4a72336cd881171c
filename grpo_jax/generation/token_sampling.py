"""Samples one token per row from its logits: greedy, or temperature and filters.

Log-probabilities are those of the distribution that was sampled: after temperature and
top-k, top-p and min-p, renormalised. Sorting a vocabulary is slow on every platform, so
the filters find their thresholds by bisection. Draws invert the cumulative distribution
and need two random numbers per row.

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

LEAST = 1e-4  # least temperature above 0; below it logits could overflow float32
_BLOCK = 256  # vocabulary entries per block of a draw
_ONE = 0x3F800000  # bits of 1.0f; floats in [0, 1] are ordered as their bits are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. Filters apply after the temperature, in this order."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of likely tokens with this mass
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the best one

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
        """Samples a token for each row.

        A row's draw depends only on its key and its turn.

        Args:
          logits: [N, V] float32.
          keys: [N] PRNG keys.
          turns: [N] int32, folded into the keys.

        Returns:
          [N] int32 tokens, and their [N] float32 log-probabilities in nats. Greedy
          log-probabilities are those at temperature 1 without filters.

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
        return draw_tokens(logits, keys, turns, self.temperature, self.keep)

    def keep(self, weights: Float[Array, "N V"]) -> Float[Array, "N V"]:
        """Returns the weights with 0 for tokens that are filtered out.

        Tokens that tie with the last one kept are kept too.

        Args:
          weights: [N, V] float32, each token's probability over the best token's.

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
    """Returns the largest t for which the measure of all weights ≥ t is ≥ `least`."""

    def halve(_, bounds):
        low, high = bounds  # holds at low, fails at high
        middle = (low + high) // 2
        t = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.where(weights >= t, measure, 0).sum(-1, keepdims=True) >= least
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((weights.shape[0], 1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, _ONE + 1)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def draw_tokens(
    logits: Float[Array, "N V"],
    keys: Array,
    turns: Array | int,
    temperature: Any,
    keep=lambda weights: weights,
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """Samples a token for each row from softmax(logits / temperature).

    The inverse CDF takes two uniform numbers per row: the first picks a block of the
    vocabulary by its mass, the second a token inside the block.

    Args:
      logits: [N, V] float32.
      keys: [N] PRNG keys.
      turns: [N] int32 or one integer, folded into the keys.
      temperature: above 0.
      keep: filter of [N, V] weights, as `Sampling.keep`.

    Returns:
      [N] int32 tokens, and their [N] float32 log-probabilities in nats.

    >>> logits = jnp.array([[0.0, 50.0, 0.0]])
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> token, logp = draw_tokens(logits, keys, 0, 1.0)
    >>> int(token[0]), float(logp[0])
    (1, 0.0)
    """
    z = logits / temperature
    # The maximum, written so that XLA on CPU does not fuse it with the product that
    # gives the logits: the fused product takes three times as long from 96 rows on.
    top = -(-z).min(-1, keepdims=True)
    weights = keep(jnp.exp(z - top))
    blocks = jnp.pad(weights, ((0, 0), (0, -z.shape[1] % _BLOCK)))
    blocks = blocks.reshape(z.shape[0], -1, _BLOCK)
    mass = blocks.sum(-1)
    turns = jnp.broadcast_to(turns, z.shape[:1])
    u = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t), (2,)))(
        keys, turns
    )
    block = _invert_cdf(mass, u[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    token = block * _BLOCK + _invert_cdf(inside, u[:, 1])
    at_token = (jnp.take_along_axis(z, token[:, None], 1) - top)[:, 0]
    return token, at_token - jnp.log(mass.sum(-1))


def _invert_cdf(mass: Float[Array, "N X"], u: Float[Array, "N"]) -> Int[Array, "N"]:
    """Returns the first index whose cumulative mass exceeds u of the total."""
    cumulated = jnp.cumsum(mass, axis=-1)
    total = cumulated[:, -1]
    threshold = jnp.minimum(u * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(cumulated > threshold[:, None], axis=-1).astype(jnp.int32)
