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
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.algorithms.policy_losses import IMPORTANCE, KL_ESTIMATORS, SURROGATES
from grpo_jax.algorithms.reductions import AGGREGATES
from grpo_jax.arguments import check_choice, check_number, check_whole
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
_BELOW_1 = math.nextafter(1.0, 0.0)  # a decay of 1 would divide by 0
# Metrics that micro-batches add up; the others are means over tokens, /min or /max.
_SUMS = ("loss", "policy_loss", "value_loss", "num_tokens", "rewards/")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "opt_state", "step", "skipped"],
    meta_fields=[],
)
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
    step: Array  # int32 []: updates done
    skipped: Array  # int32 []: updates in a row that were not finite

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
        """Returns the state at step 0."""
        trained, _ = lora.split(params)
        return cls(params, optimizer.init(trained), jnp.int32(0), jnp.int32(0))


def make_optimizer(
    learning_rate: float,
    *,
    steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    master: bool = True,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns AdamW with global-norm clipping, and its learning-rate schedule.

    Args:
      learning_rate: the peak rate.
      steps: updates of the whole stage, including the warm-up.
      schedule: "constant", "linear" or "cosine"; the latter two fall to 0.
      warmup_steps: updates until the peak rate is reached.
      b1: decay of the first moment, below 1.
      b2: decay of the second moment, below 1.
      weight_decay: AdamW's decoupled decay.
      max_grad_norm: the bound on the gradient's norm; infinity does not clip.
      master: keep float32 copies of weights below float32, and their moments in
        float32. False keeps moments in the dtype of the weights.

    Returns:
      (the optimiser, the schedule: update → learning rate).

    Raises:
      GrpoError: an argument is out of range.
    """
    where = "make_optimizer"
    check_whole(where, least=0, steps=steps, warmup_steps=warmup_steps)
    check_number(where, learning_rate=learning_rate, weight_decay=weight_decay)
    check_number(where, most=_BELOW_1, b1=b1, b2=b2)
    check_choice(f"{where}: schedule", schedule, ("constant", "linear", "cosine"))
    if not max_grad_norm > 0:  # infinity clips nothing
        raise GrpoError(f"{where}: max_grad_norm = {max_grad_norm} is not above 0")
    decay = max(steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(learning_rate, decay),
    }[schedule]
    # Warm-up starts at 1/(w+1) of the rate: at 0 the first rollout would be wasted.
    first = learning_rate / (warmup_steps + 1)
    warmup = optax.linear_schedule(first, learning_rate, max(warmup_steps, 1))
    rate = optax.join_schedules([warmup, after], [warmup_steps])
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    if not master:
        adamw = keep_dtype(adamw)
    chain = optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)
    return (keep_master(chain) if master else chain), rate


def keep_dtype(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimiser with its moments in the dtype of the weights."""

    def update(gradients, state, params=None):
        gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)
        return inner.update(gradients, state, params)

    return optax.GradientTransformation(inner.init, update)  # type: ignore[bad-argument-type]


class Master(NamedTuple):
    """Optimiser state with float32 copies of weights too coarse for the updates."""

    weights: Any  # float32
    inner: Any  # the optimiser's state for the copies


def keep_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimiser on float32 master copies of the weights.

    The weights are set to the rounded copies after each update. bfloat16 has 8
    significant bits, so an update below 2^-9 of a weight would round to nothing, and so
    would a hundred of them. If all weights are float32, there are no copies.

    >>> optimizer = keep_master(optax.sgd(1.0))
    >>> weight = jnp.ones(1, jnp.bfloat16)
    >>> state = optimizer.init(weight)
    >>> for _ in range(8):
    ...     move, state = optimizer.update(jnp.array([-0.001]), state, weight)
    ...     weight = optax.apply_updates(weight, move)
    >>> weight.tolist(), (jnp.ones(1, jnp.bfloat16) + jnp.bfloat16(0.001)).tolist()
    ([1.0078125], [1.0])
    """

    def widen(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        if all(x.dtype == jnp.float32 for x in jax.tree.leaves(params)):
            return inner.init(params)
        weights = widen(params)
        return Master(weights, inner.init(weights))

    def update(gradients, state, params=None):
        if not isinstance(state, Master):
            return inner.update(gradients, state, params)
        moves, after = inner.update(gradients, state.inner, state.weights)
        weights = optax.apply_updates(state.weights, moves)
        moves = jax.tree.map(jnp.subtract, weights, widen(params))
        return moves, Master(weights, after)

    return optax.GradientTransformation(init, update)  # type: ignore[bad-argument-type]


def _sum_metrics(total: Metrics, part: Metrics, share: Array) -> Metrics:
    """Adds losses and counts, keeps extremes, weights means by their tokens."""

    def merge(name, a, b):
        if name.endswith("/max"):
            return jnp.maximum(a, b)
        if name.endswith("/min"):
            return jnp.where(share > 0, jnp.minimum(a, b), a)  # 0: no token in it
        return a + (b if name.startswith(_SUMS) else b * share)

    return {name: merge(name, total[name], part[name]) for name in total}


def accumulate(
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
    trained, frozen = lora.split(params)

    def of_trained(trained, *arguments):
        return objective(lora.join(trained, frozen), *arguments)

    def micro_gradients(index):
        micro = batch.micro(index)
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

    like, metrics, _ = jax.eval_shape(micro_gradients, 0)
    nothing = {k: jnp.inf if k.endswith("/min") else 0.0 for k in metrics}
    zero = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like),
        {k: jnp.full(x.shape, nothing[k], x.dtype) for k, x in metrics.items()},
    )
    # The bound is a value, not a shape, so that empty micro-batches cost nothing.
    with jax.named_scope("micro_batches"):
        return jax.lax.fori_loop(0, batch.used, add, zero)


def has_tokens(batch: Batch) -> Array:
    """Whether any token is in the loss."""
    return batch.mask.any()


def has_advantages(batch: Batch) -> Array:
    """Whether any token in the loss has an advantage that is not 0."""
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
        gradients, metrics = accumulate(objective, state.params, reference, batch)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        signal = has_signal(batch)
        trained, frozen = lora.split(state.params)

        def apply_update(_):
            updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state

        trained, opt_state = jax.lax.cond(
            finite & signal,
            apply_update,
            lambda _: (trained, state.opt_state),
            None,
        )
        metrics |= {
            "grad_norm": norm,
            "update/nonfinite": (~finite).astype(jnp.float32),
            "update/no_signal": (~signal).astype(jnp.float32),
            "update/padding": batch.padding,
        }
        skipped = jnp.where(finite, 0, state.skipped + 1)
        params = lora.join(trained, frozen)
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
      parameters have LoRA adapters (`lora.begin`), only these are trained, and
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

    def score(params, batch):
        def one(index, logps):
            micro = batch.micro(index)
            now, _ = batch_logprobs(apply, params, micro, temperature)
            return logps.at[index].set(jnp.where(micro.mask, now, 0))

        zero = jnp.zeros(batch.tokens.shape, jnp.float32)
        with jax.named_scope("micro_batches"):
            return jax.lax.fori_loop(0, batch.used, one, zero)

    return jax.jit(score)
