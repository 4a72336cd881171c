"""Watches a stage's metrics, and says in one line why nothing is learned.

A `Diagnosis` reads the rows that go to metrics.jsonl and nothing else, so that a
resumed run, which reads them again, says the same. Each finding is reported once in a
stage: its figure, the likely cause, and the setting to change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import Config, flatten_config
from grpo_jax.models import lora
from grpo_jax.training.optimizers import MasterWeights
from grpo_jax.training.train_step import TrainState

Row = Mapping[str, Any]
WINDOW = 4  # the fewest steps in a row that a finding must hold for
OUTPUTS = 64  # and the fewest outputs in them
FIRST = 5  # the steps at a stage's start, with which later ones are compared


class History:
    """What the rules see of a stage: its first rows, its last ones, and the config.

    It does not grow with the stage.
    """

    def __init__(self, config: Config):
        self.config = config
        # How many steps a finding must hold for.
        outputs = config.questions_per_step * config.group_size
        self.window = max(WINDOW, -(-OUTPUTS // outputs))
        self.count = 0
        self.early: list[Row] = []
        self.recent: deque[Row] = deque(maxlen=self.window)
        self.some_ended = False  # whether any output of the stage has ended

    def add(self, row: Row) -> None:
        """Adds the row of the next step."""
        self.count += 1
        if len(self.early) < FIRST:
            self.early.append(row)
        self.recent.append(row)
        self.some_ended |= row.get("completions/clipped_ratio") != 1

    def last(self, name: str) -> list[float]:
        """Returns a metric's values in the last `window` steps; [] if one lacks it."""
        numbers = _numbers(self.recent, name)
        return numbers if len(numbers) == self.window else []

    def always(self, name: str, holds: Callable[[float], bool]) -> bool:
        """Returns whether a metric holds in each of the last `window` steps."""
        values = self.last(name)
        return bool(values) and all(holds(x) for x in values)

    def first(self, name: str) -> float | None:
        """Returns the mean of a metric over the stage's first steps.

        None while the last `window` steps are not all after them.
        """
        numbers = _numbers(self.early, name)
        if self.count < FIRST + self.window or not numbers:
            return None
        return float(np.mean(numbers))

    def mean(self, name: str) -> float:
        """Returns the mean of a metric over the last `window` steps."""
        return float(np.mean(self.last(name)))


def _numbers(rows: Iterable[Row], name: str) -> list[float]:
    found = [row.get(name) for row in rows]
    return [float(x) for x in found if isinstance(x, int | float)]


class Diagnosis:
    """Takes a stage's rows one by one; returns what a new row shows, or "".

    Args:
      config: the run's config.
      stage: "sft", "rl" or another stage; only "rl" is watched.

    >>> config = Config(questions_per_step=4, group_size=8, max_new_tokens=64)
    >>> watch = Diagnosis(config, "rl")
    >>> row = {"reward": 0.0, "frac_reward_zero_std": 1.0,
    ...        "rewards/rule_reward/mean": 0.0, "rewards/rule_reward/std": 0.0}
    >>> [watch(row)[:9] for step in range(5)]
    ['', '', '', 'all wrong', '']
    """

    def __init__(self, config: Config, stage: str):
        self.history = History(config)
        self.rules = dict(RULES) if stage == "rl" else {}  # not reported yet

    def __call__(self, row: Row) -> str:
        self.history.add(row)
        found = {name: rule(self.history) for name, rule in self.rules.items()}
        found = {name: text for name, text in found.items() if text}
        for name in found:
            del self.rules[name]
        return "; ".join(f"{name}: {text}" for name, text in found.items())


# -- the rules: History → one line, or "" ----------------------------------------------


def _each_output_got(h: History, reward: int) -> bool:
    return h.always("frac_reward_zero_std", lambda x: x == 1) and h.always(
        "rewards/rule_reward/mean", lambda x: x == reward
    )


def all_wrong(h: History) -> str:
    """No output is right, so no group has a signal."""
    if not _each_output_got(h, 0):
        return ""
    return (
        f"none of the last {_outputs(h)} outputs got a reward, so no group teaches "
        "anything. The questions are too hard for this model, or its answers are not "
        "found: look at samples.jsonl, train with sft_steps first, take easier "
        "questions (python -m grpo_jax.census), or raise group_size or max_new_tokens"
    )


def all_right(h: History) -> str:
    """Every output is right, so no group has a signal."""
    if METHODS[h.config.method].coefficient in ("indicator", "critic", "returns"):
        return ""  # no group is needed there
    if not _each_output_got(h, 1):
        return ""
    return (
        f"each of the last {_outputs(h)} outputs was right, so no group teaches "
        "anything. Take harder questions (data.train; python -m grpo_jax.census)"
    )


def constant_reward(h: History) -> str:
    """A reward function returns the same number for every output."""
    if any(h.last("rewards/timeouts")):
        return ""  # failing_reward
    for name in _reward_functions(h):
        key = f"rewards/{name}"
        if name == "rule_reward" and h.mean(f"{key}/mean") in (0, 1):
            continue  # all_wrong or all_right
        same = set(h.last(f"{key}/mean"))
        if len(same) == 1 and h.always(f"{key}/std", lambda x: x == 0):
            return (
                f"{name} gave {same.pop():g} to each of the last {_outputs(h)} "
                "outputs. Look whether it reads what it is given (the columns of the "
                "data, the text's form); rewards.functions names it"
            )
    return ""


def failing_reward(h: History) -> str:
    """A reward function mostly has no value, or takes too long."""
    outputs = h.config.questions_per_step * h.config.group_size
    for name in _reward_functions(h):
        if h.always(f"rewards/{name}/failures", lambda x: x > outputs / 2):
            share = h.mean(f"rewards/{name}/failures") / outputs
            return (
                f"{name} gave no value for {share:.0%} of the last {_outputs(h)} "
                "outputs, which it leaves out. The log above shows what it raised; "
                "None and NaN count too"
            )
    if h.always("rewards/timeouts", lambda x: x > 0):
        return (
            f"reward functions ran out of time in each of the last {h.window} steps, "
            "and counted as 0. Raise rewards.timeout "
            f"({h.config.rewards.timeout:g} s), or make them faster"
        )
    return ""


def cut_off(h: History) -> str:
    """Nearly all outputs reach the limit, though some have ended."""
    if not h.always("completions/clipped_ratio", lambda x: x >= 0.9):
        return ""
    if h.mean("completions/clipped_ratio") == 1:
        return ""  # no_end
    return (
        f"{h.mean('completions/clipped_ratio'):.0%} of the last {_outputs(h)} outputs "
        "were cut off before they ended. Raise max_new_tokens "
        f"({h.config.max_new_tokens}), or train with sft_steps on shorter solutions"
    )


def no_end(h: History) -> str:
    """No output of the stage has ended."""
    if h.some_ended or not h.last("completions/clipped_ratio"):
        return ""
    return (
        f"no output has ended yet: all {_outputs(h)} of the last {h.window} steps went "
        f"on to max_new_tokens ({h.config.max_new_tokens}). The end token is never "
        "drawn: the model may need another data.template, SFT (sft_steps), or another "
        "eos_token_id in its generation_config.json; or the limit is much too low"
    )


def no_answer(h: History) -> str:
    """The rule finds no answer where there are numbers."""
    if not h.always("completions/no_answer", lambda x: x >= 0.9):
        return ""
    return (
        f"no answer was found in {h.mean('completions/no_answer'):.0%} of the last "
        f"outputs, though there are numbers in them. Look at samples.jsonl: thoughts "
        "that are not closed need a higher max_new_tokens, another form needs another "
        f"data.template ({h.config.data.template}) or data.instruction "
        f"({h.config.data.instruction})"
    )


def kl_runs_away(h: History) -> str:
    """The policy leaves the reference."""
    start = h.first("kl")
    if start is None or not h.always("kl", lambda x: x > max(1.0, 10 * start)):
        return ""
    return (
        f"the KL to the reference is {h.mean('kl'):.3g} nats a token, and was "
        f"{start:.3g} at first. Lower learning_rate ({h.config.learning_rate:g}), or "
        f"raise kl_coef ({h.config.method_value('kl_coef'):g})"
    )


def ratios_clipped(h: History) -> str:
    """The policy moves so far in one rollout that ratios are clipped."""
    if not h.always("clip_ratio/region_mean", lambda x: x > 0.25):
        return ""
    return (
        f"{h.mean('clip_ratio/region_mean'):.0%} of the tokens' ratios are clipped and "
        "give no gradient: the policy moves too far in one rollout. Lower "
        f"learning_rate ({h.config.learning_rate:g}) or updates_per_rollout"
    )


def entropy_collapsed(h: History) -> str:
    """The outputs of a group are the same, and not right."""
    start = h.first("entropy")
    if start is None or not h.always("entropy", lambda x: x < start / 20):
        return ""
    if not h.always("frac_reward_zero_std", lambda x: x >= 0.9):
        return ""
    if h.always("rewards/rule_reward/mean", lambda x: x >= 0.9):
        return ""  # it has learned what there was
    return (
        f"the entropy fell from {start:.3g} to {h.mean('entropy'):.3g} nats a token, "
        f"and {h.mean('frac_reward_zero_std'):.0%} of the groups hold equal rewards: "
        "the outputs of a group are the same. Lower learning_rate "
        f"({h.config.learning_rate:g}), or raise kl_coef, temperature or entropy_coef"
    )


def lengths_explode(h: History) -> str:
    """Outputs grow without becoming right."""
    start, right = h.first("completions/mean_length"), "rewards/rule_reward/mean"
    if start is None:
        return ""
    long = max(3 * start, h.config.max_new_tokens / 2)
    if not h.always("completions/mean_length", lambda x: x > long):
        return ""
    before = h.first(right)
    if before is not None and h.mean(right) > before:
        return ""
    gain = "" if before is None else ", and not more of them are right"
    return (
        f"outputs have {h.mean('completions/mean_length'):.0f} tokens, and had "
        f"{start:.0f} at first{gain}. Set aggregate to token_mean, set "
        "overlong_buffer, or raise kl_coef; see that no reward pays for length"
    )


def sampler_apart(h: History) -> str:
    """Sampler and trainer disagree about the same tokens."""
    if h.config.max_staleness or (h.config.updates_per_rollout or 1) > 1:
        return ""  # they differ on purpose
    name = "sampling/sampling_logp_difference/mean"
    if not h.always(name, lambda x: x > 0.1):
        return ""
    return (
        f"sampler and trainer differ by {h.mean(name):.2g} nats a token on average. "
        "Set model.dtype to float32, or correct it by importance_cap"
    )


Rule = Callable[[History], str]
RULES: dict[str, Rule] = {
    "all wrong": all_wrong,
    "all right": all_right,
    "constant reward": constant_reward,
    "failing reward": failing_reward,
    "cut off": cut_off,
    "no end": no_end,
    "no answer": no_answer,
    "KL runs away": kl_runs_away,
    "ratios clipped": ratios_clipped,
    "entropy collapsed": entropy_collapsed,
    "lengths explode": lengths_explode,
    "sampler apart": sampler_apart,
}


def _outputs(h: History) -> int:
    return h.window * h.config.questions_per_step * h.config.group_size


def _reward_functions(h: History) -> Iterator[str]:
    for name in h.recent[-1]:
        if name.startswith("rewards/") and name.endswith("/mean"):
            name = name.removeprefix("rewards/").removesuffix("/mean")
            if name != "overlong" and h.last(f"rewards/{name}/mean"):
                yield name


# -- before the first step -------------------------------------------------------------


def share_that_moves(opt_state: Any, trained: Any, rate: float) -> float:
    """Returns the share of weights that an update of size `rate` would change.

    AdamW's first updates have about the size of the learning rate. A weight w with
    fl(w + rate) = w in its dtype stays as it is, however often it is updated.

    Args:
      opt_state: the optimiser's state; its float32 master weights count, if it has any.
      trained: the trained parameters.
      rate: the learning rate.

    >>> weights = jnp.array([1.0, 0.01])
    >>> [share_that_moves((), {"w": weights.astype(t)}, 1e-4)
    ...  for t in ("float32", "bfloat16")]
    [1.0, 0.5]
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, MasterWeights))
    masters = [node.weights for node in nodes if isinstance(node, MasterWeights)]
    leaves = jax.tree.leaves(masters or trained)
    return float(_share_that_moves(leaves, jnp.float32(rate)))


@jax.jit
def _share_that_moves(leaves: list[jax.Array], rate: jax.Array) -> jax.Array:
    moved = [((x + rate.astype(x.dtype)) != x).mean(dtype=jnp.float32) for x in leaves]
    sizes = np.array([x.size for x in leaves], np.float32)
    return jnp.dot(jnp.stack(moved), sizes / sizes.sum())


def find_small_rate(config: Config, stage: str, state: TrainState) -> str:
    """Returns a finding if updates are rounded away, before a stage's first step."""
    names = {"sft": "sft.learning_rate", "rl": "learning_rate"}
    name = names.get(stage, "reward_model.learning_rate")
    rate = flatten_config(config)[name]
    share = share_that_moves(
        state.opt_state, lora.split_adapters(state.params)[0], rate
    )
    if share >= 0.1:
        return ""
    remedy = f"Raise {name}"
    if config.model.dtype == "bfloat16" and not config.optimizer.master:
        remedy += ", or set optimizer.master, which keeps float32 copies"
    return (
        f"rate too small: an update of {rate:g} changes {share:.1%} of the weights, "
        f"and is rounded away in the others. {remedy}"
    )
