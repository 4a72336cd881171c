"""The compiled training step: (state, frozen reference, batch) → (state, metrics).

`make_step` compiles any `Objective`; `make_grpo_step` builds GRPO's from any model
`apply(params, tokens, *, positions, segment_ids)`. A model that returns the pair
(hidden [B, T, D], unembed [D, V]) instead of logits never needs [B, T, V] in memory.

Gradients of the micro-batches are summed in float32 under one normaliser, so that
accumulation never changes the loss. A step whose gradient is not finite, or whose batch
has no training signal, leaves parameters and optimiser state unchanged.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.algorithms.policy_losses import IMPORTANCE, KL_ESTIMATORS, SURROGATES
from grpo_jax.algorithms.reductions import AGGREGATES
from grpo_jax.arguments import check_choice, check_number
from grpo_jax.errors import GrpoError
from grpo_jax.models import lora
from grpo_jax.training.batch import Batch
from grpo_jax.training.objectives import (
    Apply,
    Metrics,
    Objective,
    batch_logprobs,
    grpo_objective,
)

Array = jax.Array
# The options of `make_grpo_step`: numbers with their minimum, and choices.
_NUMBERS = {"temperature": 1e-4, "clip_low": 0, "clip_high": 0, "delta": 0}
_NUMBERS |= {"entropy_coef": -math.inf, "importance_cap": 0, "max_length": 1}
_CHOICES = {
    "kl_estimator": KL_ESTIMATORS,
    "aggregate": AGGREGATES,
    "importance": IMPORTANCE,
    "surrogate": SURROGATES,
}
# Metrics that micro-batches add up; the others are means over tokens, /min or /max.
_SUMS = ("loss", "policy_loss", "value_loss", "num_tokens", "rewards/")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from one update to the next.

    Attributes:
      params: the model's parameters; with LoRA, the base and the adapters.
      opt_state: the optimiser's state of the trained parameters.
      step: int32 [], updates done.
      skipped: int32 [], the last updates in a row whose gradient was not finite.
    """

    params: Any
    opt_state: Any
    step: Array
    skipped: Array

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
        """Returns the state at step 0."""
        trained, _ = lora.split_adapters(params)
        return cls(params, optimizer.init(trained), jnp.int32(0), jnp.int32(0))


def _sum_metrics(total: Metrics, part: Metrics, share: Array) -> Metrics:
    """Adds losses and counts, keeps extremes, weights means by their tokens."""

    def merge(name, a, b):
        if name.endswith("/max"):
            return jnp.maximum(a, b)
        if name.endswith("/min"):
            return jnp.where(share > 0, jnp.minimum(a, b), a)  # 0: no token in it
        return a + (b if name.startswith(_SUMS) else b * share)

    return {name: merge(name, total[name], part[name]) for name in total}


def accumulate_gradients(
    objective: Objective, params: Any, reference: Any, batch: Batch
) -> tuple[Any, Metrics]:
    """Returns (gradients in float32, metrics) of a batch, one micro-batch at a time.

    Args:
      objective: the loss of a micro-batch, under the whole batch's normaliser.
      params: the parameters; with LoRA, only the adapters get gradients.
      reference: π_ref's parameters, or None.
      batch: [A, B, T]; only its first `used` micro-batches are computed.
    """
    tokens = batch.mask.sum() if batch.loss_tokens is None else batch.loss_tokens
    trained, frozen = lora.split_adapters(params)

    def of_trained(trained, *arguments):
        return objective(lora.join_adapters(trained, frozen), *arguments)

    def micro_gradients(index):
        micro = batch.micro_batch(index)
        (loss, metrics), gradients = jax.value_and_grad(of_trained, has_aux=True)(
            trained, reference, micro, batch.sequences, tokens
        )
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        share = micro.mask.sum() / jnp.maximum(batch.mask.sum(), 1)
        return gradients, metrics | {"loss": loss}, share

    def add(index, carry):
        gradients, metrics = carry
        more, part, share = micro_gradients(index)
        gradients = jax.tree.map(jnp.add, gradients, more)
        return gradients, _sum_metrics(metrics, part, share)

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_gradients, 0)[:2]
    )
    lowest = {k: x + jnp.inf for k, x in zeros[1].items() if k.endswith("/min")}
    zero = (zeros[0], zeros[1] | lowest)
    # The bound is a value, not a shape, so that empty micro-batches cost nothing.
    with jax.named_scope("micro_batches"):
        return jax.lax.fori_loop(0, batch.used, add, zero)


def has_tokens(batch: Batch) -> Array:
    """Returns whether any token is in the loss."""
    return batch.mask.any()


def has_advantages(batch: Batch) -> Array:
    """Returns whether any token in the loss has an advantage that is not 0."""
    return (batch.mask & (batch.advantages != 0)).any()


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    has_signal: Callable[[Batch], Array] = has_tokens,
    state_shardings: Any = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Compiles an objective into a training step.

    Args:
      objective: the loss of a micro-batch.
      optimizer: any optax transformation.
      has_signal: whether a batch has a gradient; if not, the state is left unchanged.
        `has_advantages` is for losses that are proportional to the advantages.
      state_shardings: the state's shardings on a mesh, which the step keeps.

    Returns:
      step(state, reference, batch) → (state, metrics); the state is donated.
    """

    def step(state: TrainState, reference: Any, batch: Batch):
        gradients, metrics = accumulate_gradients(
            objective, state.params, reference, batch
        )
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        signal = has_signal(batch)
        trained, frozen = lora.split_adapters(state.params)

        def apply_update():
            updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state

        trained, opt_state = jax.lax.cond(
            finite & signal,
            apply_update,
            lambda: (trained, state.opt_state),
        )
        metrics |= {
            "grad_norm": norm,
            "update/nonfinite": (~finite).astype(jnp.float32),
            "update/no_signal": (~signal).astype(jnp.float32),
            "update/padding": batch.padding,
        }
        skipped = jnp.where(finite, 0, state.skipped + 1)
        params = lora.join_adapters(trained, frozen)
        return TrainState(params, opt_state, state.step + 1, skipped), metrics

    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def make_grpo_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    state_shardings: Any = None,
    kl_coef: float = 0.04,
    **options: Any,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Returns GRPO's compiled update for any pure `apply` (DeepSeekMath, section 4.1).

    Args:
      apply: apply(params, tokens [B, T], *, positions, segment_ids) → logits [B, T, V]
        or (hidden [B, T, D], unembed [D, V]).
      optimizer: any optax transformation.
      state_shardings: the state's shardings on a mesh, which the step keeps.
      kl_coef: β; 0 needs no reference pass. If entropy_coef is 0 too, a batch whose
        advantages are all 0 leaves the state unchanged, since AdamW would move the
        weights even on zero gradients.
      **options: temperature, and those of `grpo_loss`.

    Returns:
      step(state, reference, batch) → (state, metrics); the state is donated. If the
      parameters have LoRA adapters (`lora.begin_stage`), only these are trained, and
      reference None means the base without adapters.

    Raises:
      GrpoError: an option is unknown or its value is not allowed.

    >>> def apply(params, tokens, *, positions, segment_ids):
    ...     return params[tokens]                                   # a bigram model
    >>> from grpo_jax.training.packing import pack
    >>> from grpo_jax.training.batch import Sample
    >>> batch = pack([Sample(tokens=[0, 1], mask=[0, 1], advantages=1.0),
    ...               Sample(tokens=[0, 2], mask=[0, 1], advantages=-1.0)], length=4)
    >>> optimizer = optax.sgd(1.0)
    >>> step = make_grpo_step(apply, optimizer, kl_coef=0.0)
    >>> state, metrics = step(TrainState.create(jnp.zeros((3, 3)), optimizer), None,
    ...                       batch)
    >>> state.params[0].round(2).tolist()
    [0.0, 0.5, -0.5]
    """

    _check_options(apply, kl_coef, options)
    other_terms = bool(kl_coef or options.get("entropy_coef"))
    return make_step(
        grpo_objective(apply, kl_coef=kl_coef, **options),
        optimizer,
        has_signal=has_tokens if other_terms else has_advantages,
        state_shardings=state_shardings,
    )


def _check_options(apply: Any, kl_coef: Any, options: dict[str, Any]) -> None:
    """Raises here for options that would fail, or give NaN, in the first step."""
    where = "make_grpo_step"
    if not callable(apply):
        raise GrpoError(f"{where}: apply is {type(apply).__name__}, not a function")
    known = {*_NUMBERS, *_CHOICES}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise GrpoError(f"{where}: {name} is no option of grpo_loss{hint}")
    for name, choices in _CHOICES.items():
        if name in options:
            check_choice(f"{where}: {name}", options[name], choices)
    for name, least in _NUMBERS.items():
        if options.get(name) is not None:
            check_number(where, least=least, **{name: options[name]})
    check_number(where, kl_coef=kl_coef)
    if options.get("surrogate") == "cispo" and options.get("clip_high") is None:
        raise GrpoError(f"{where}: surrogate 'cispo' needs clip_high")
    if options.get("aggregate") == "constant" and options.get("max_length") is None:
        raise GrpoError(f"{where}: aggregate 'constant' needs max_length")


def make_scorer(
    apply: Apply, *, temperature: float = 1.0
) -> Callable[[Any, Batch], Array]:
    """Returns a compiled (params, batch) → log π of the targets, [A, B, T].

    It computes log π_ref, and log π_old where μ > 1.

    Args:
      apply: the model.
      temperature: of sampling; logits are divided by it.
    """

    def score(params, micro):
        logps, _ = batch_logprobs(apply, params, micro, temperature)
        return jnp.where(micro.mask, logps, 0)

    return by_micro_batch(score)


def by_micro_batch(
    score: Callable[[Any, Batch], Array],
) -> Callable[[Any, Batch], Array]:
    """Returns a compiled (params, batch) → `score` of each micro-batch, [A, B, T].

    Args:
      score: (params, micro-batch) → float32 [B, T]. It is not called for micro-batches
        without a sample; these get 0.
    """

    def scores(params, batch):
        def one(index, found):
            return found.at[index].set(score(params, batch.micro_batch(index)))

        zero = jnp.zeros(batch.tokens.shape, jnp.float32)
        with jax.named_scope("micro_batches"):
            return jax.lax.fori_loop(0, batch.used, one, zero)

    return jax.jit(scores)
