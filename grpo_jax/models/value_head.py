"""The reward model r_φ and PPO's critic: a decoder's trunk with one score per token.

A reward model's score is the logit of "right". It is read at an output's last token
(outcome supervision, DeepSeekMath section 4.1.2) or at each step's last token (process
supervision, section 4.1.3). PPO's critic reads a value at every token. A score depends
only on its own token and those before it.

Axes: B rows, T positions, D width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.models.kernels.products import einsum


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """Scores tokens as a pure function of (params, tokens).

    It is hashable, so it can be a static argument of `jax.jit`.

    >>> from grpo_jax.models.config import ModelConfig
    >>> config = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2,
    ...                      head_dim=4, ffn=32)
    >>> model = RewardModel(Decoder(config))
    >>> params = model.init(jax.random.key(1), model.decoder.init(jax.random.key(0)))
    >>> model(params, jnp.array([[1, 2, 3]])).shape
    (1, 3)
    """

    decoder: Decoder

    def init(self, key: Array, decoder_params: Params) -> Params:
        """Returns a copy of a decoder's trunk with a small random head.

        Args:
          key: a JAX random key, for the head.
          decoder_params: the decoder's parameters.

        Returns:
          The decoder's tree without `unembed`, with `head` [D] and `head_bias` [].
        """
        trunk = {k: v for k, v in decoder_params.items() if k != "unembed"}
        width, dtype = self.decoder.config.width, trunk["norm"].dtype
        head = jax.random.normal(key, (width,)) / width  # scores near 0
        new = {"head": head.astype(dtype), "head_bias": jnp.zeros((), dtype)}
        return jax.tree.map(jnp.copy, trunk) | new

    def __call__(
        self, params: Params, tokens: Int[Array, "B T"], **kwargs
    ) -> Float[Array, "B T"]:
        """Returns the score of every token; arguments are as in `Decoder.hidden`."""
        hidden = self.decoder.hidden(params, tokens, **kwargs)
        head = params["head"].astype(hidden.dtype)
        scores = einsum("BTD,D->BT", hidden, head)
        return scores + params["head_bias"].astype(jnp.float32).reshape(1, 1)
