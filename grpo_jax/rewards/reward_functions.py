r"""The built-in reward functions, and `compute_rewards`, which calls all of a run's.

A reward function has TRL's signature, sync or `async def`:
`reward(prompts, completions, **columns) -> list[float | None]`. Each argument has N
values, and the columns are the dataset's other fields. None means that the function
does not apply to that sample. `compute_rewards` returns the weighted sum of all
functions; DeepSeekMath (section 4.1) uses a single reward.
"""

import importlib
import importlib.util
import inspect
import logging
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.rewards import answers
from grpo_jax.rewards.grading import worker_pool
from grpo_jax.rewards.reward_calls import (
    LARGEST,
    CallRecord,
    Reward,
    WrongCount,
    start_call,
)

log = logging.getLogger(__name__)
RESERVED = ("prompts", "completions")  # names that no data column may have


def rule_reward(
    prompts: Sequence,
    completions: Sequence,
    *,
    answer: Sequence[str],
    language: Sequence[str | None] | None = None,
    **columns,
) -> list[float]:
    r"""Returns 1.0 if a completion's final answer equals the reference, else 0.0.

    Args:
      prompts: not used.
      completions: texts, or chats as lists of messages.
      answer: the reference answers, one per completion.
      language: the language in which the numbers of each completion are written; by
        default English. See `answers.extract`.

    >>> rule_reward(["1+1?"] * 2, [r"so \boxed{2}", "it is 3."], answer=["2", "2"])
    [1.0, 0.0]
    """
    languages = language or [None] * len(completions)
    found = [
        answers.extract(_text(completion), name or "en")
        for completion, name in zip(completions, languages, strict=True)
    ]
    return [
        float(same)
        for same in worker_pool.grade_answers(found, [str(a) for a in answer])
    ]


def format_reward(prompts: Sequence, completions: Sequence, **columns) -> list[float]:
    r"""Returns 1.0 if a completion has exactly one non-empty \boxed{…}, else 0.0.

    >>> format_reward(["q"] * 3, [r"\boxed{2}", r"\boxed{2} \boxed{3}", r"\boxed{2"])
    [1.0, 0.0, 0.0]
    """
    scores = []
    for completion in completions:
        text = answers.final_part(_text(completion))
        boxes = answers.find_boxed(text)
        one = text.count(r"\boxed") == text.count(r"\boxed{") == len(boxes) == 1
        scores.append(float(one and bool(boxes[0].strip())))
    return scores


def _text(completion: Any) -> str:
    """Returns a completion's text; TRL passes chats as lists of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def find_reward_function(name: str) -> Reward:
    """Returns the reward function of a name.

    Args:
      name: "rule", "format", "module:function" or "file.py:function".

    Raises:
      GrpoError: the name has none of these forms, or the import fails.

    >>> (find_reward_function("rule") is rule_reward,
    ...  find_reward_function("math:fsum").__name__)
    (True, 'fsum')
    >>> find_reward_function("accuracy")
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: reward 'accuracy': not rule, format, module:function ...
    """
    built_in = {"rule": rule_reward, "format": format_reward}
    if name in built_in:
        return built_in[name]
    where, _, function = name.rpartition(":")
    if not (where and function):
        raise GrpoError(
            f"reward {name!r}: not rule, format, module:function or file.py:function"
        )
    try:
        if where.endswith(".py"):
            path = Path(where).expanduser()
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise GrpoError(f"reward {name!r}: cannot import {where} ({problem})") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise GrpoError(f"reward {name!r}: {where} has no function {function!r}")
    return found


@dataclass(frozen=True)
class RewardScores:
    """The rewards of N samples, as returned by `compute_rewards`.

    Attributes:
      rewards: float32 [N], the weighted sum over the functions that returned a value.
        NaN if none did; `group_advantages` leaves such samples out.
      by_function: unweighted rewards of each function, float32 [N]; NaN for no value.
      timeouts: the number of calls that timed out, with 0.0 for all their samples.
    """

    rewards: np.ndarray
    by_function: dict[str, np.ndarray]
    timeouts: int = 0

    @property
    def failures(self) -> dict[str, int]:
        """The number of samples without a value, by function."""
        return {name: int(np.isnan(x).sum()) for name, x in self.by_function.items()}

    def take(self, indices: Sequence[int]) -> "RewardScores":
        """Returns the scores of the samples at `indices`.

        `timeouts` remains that of the whole batch.
        """
        rows = list(indices)
        by_function = {name: x[rows] for name, x in self.by_function.items()}
        return replace(self, rewards=self.rewards[rows], by_function=by_function)

    @staticmethod
    def join(parts: "Sequence[RewardScores]") -> "RewardScores":
        """Concatenates the scores of several batches.

        `timeouts` is the largest of any batch.
        """
        return RewardScores(
            np.concatenate([p.rewards for p in parts]),
            {
                name: np.concatenate([p.by_function[name] for p in parts])
                for name in parts[0].by_function
            },
            max(p.timeouts for p in parts),
        )

    def gather(self) -> "RewardScores":
        """Returns the joined scores of all processes; each has graded its share."""
        by_function = {name: x.tolist() for name, x in self.by_function.items()}
        mine = self.rewards.tolist(), by_function, self.timeouts
        return RewardScores.join(
            [
                RewardScores(
                    np.array(rewards, np.float32),
                    {name: np.array(x, np.float32) for name, x in by.items()},
                    timeouts,
                )
                for rewards, by, timeouts in processes.all_gather(mine)
            ]
        )


def compute_rewards(
    functions: Sequence[Reward],
    weights: Sequence[float],
    prompts: Sequence,
    completions: Sequence,
    columns: Mapping[str, Sequence],
    *,
    timeout: float,
    max_failures: float = 0.5,
    calls: CallRecord | None = None,
) -> RewardScores:
    r"""Calls all reward functions concurrently, and returns their weighted sum.

    None, NaN, infinity, a number beyond ±1e15 and anything that is not a number count
    as no value. The sum of that sample leaves the function out, and `failures` counts
    it. A function that raises an exception gives no value for the whole batch, and is
    logged with one sample. This includes an exception while its result is read. A
    function that has not returned after `timeout` seconds gets 0.0 for all samples,
    and training goes on without it.

    Args:
      functions: the reward functions.
      weights: one weight per function.
      prompts: N prompts.
      completions: N completions.
      columns: further fields, N values each, passed by name.
      timeout: seconds after which a call times out; all calls start together.
      max_failures: the largest share of calls that may raise an exception.
      calls: the run's record of calls; by default only this call counts.

    Raises:
      GrpoError: the lengths differ; a function needs a column that is missing, or does
        not accept one; a column's name is in `RESERVED`; a function returns the wrong
        number of values; a sum is beyond ±1e15; more than `max_failures` of the recent
        calls raised; or the last 10 calls of a function gave no value.

    >>> def long(prompts, completions, **columns):
    ...     return [len(c) if c else None for c in completions]
    >>> out = compute_rewards([long, format_reward], [0.5, 2], ["q"] * 3,
    ...             ["abc", "", r"\boxed{1}"], {}, timeout=10)
    >>> out.rewards, out.failures
    (array([1.5, 0. , 6.5], dtype=float32), {'long': 1, 'format_reward': 0})
    """
    names = _names(functions)
    if len(functions) != len(weights):
        raise GrpoError(
            f"rewards: {len(weights)} weights for {len(functions)} functions"
            f" ({', '.join(names)}); give one each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise GrpoError(f"rewards: the weights {list(weights)} are not all finite")
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise GrpoError(f"rewards: timeout {timeout} is no number of seconds to wait")
    n = len(completions)
    check_signatures(functions, columns)
    arguments = {**columns, "prompts": prompts, "completions": completions}
    for column, values in arguments.items():
        if len(values) != n:
            raise GrpoError(
                f"rewards: {column} has {len(values)} values for {n} completions"
            )
    pairs = zip(names, functions, strict=True)
    running = [start_call(*pair, arguments, timeout) for pair in pairs]
    futures.wait(running, timeout)
    by_function: dict[str, np.ndarray] = {}
    timeouts = 0
    calls = CallRecord() if calls is None else calls
    problem = ""
    for name, call in zip(names, running, strict=True):
        late = not call.done()
        error = None if late else call.exception()
        if isinstance(error, WrongCount):
            raise error
        calls.recent.append(error is not None)
        if late:
            timeouts += 1
            log.warning("reward %s: no answer in %g s, counted as wrong", name, timeout)
            by_function[name] = np.zeros(n, np.float32)
        elif error is None:
            by_function[name] = call.result()
            calls.record_values(name, by_function[name])
        else:
            problem = f"reward {name}: {type(error).__name__}: {error}"
            problem = " ".join(problem.split())
            sample = (str(prompts[0])[:200], str(completions[0])[:200]) if n else ()
            log.warning("%s; for example on %r", problem, sample, exc_info=error)
            by_function[name] = np.full(n, np.nan, np.float32)
    share = sum(calls.recent) / max(1, len(calls.recent))
    if problem and share > max_failures:
        raise GrpoError(
            f"{problem} ({share:.0%} of the reward calls raised, above"
            f" {max_failures:.0%}); mend the function"
        )
    table = np.reshape([*by_function.values()], (len(names), n))
    total = np.asarray(weights, np.float64) @ np.nan_to_num(table)
    large = np.flatnonzero(~(np.abs(total) <= LARGEST))
    if large.size:
        raise GrpoError(
            f"rewards: the sum of {', '.join(names)} is {total[large[0]]:g} for "
            f"sample {large[0]}, beyond ±{LARGEST:g}; make the rewards or the weights "
            "smaller"
        )
    return RewardScores(
        rewards=np.where(np.isnan(table).all(axis=0), np.nan, total).astype(np.float32),
        by_function=by_function,
        timeouts=timeouts,
    )


def _names(functions: Sequence[Reward]) -> list[str]:
    names = [getattr(f, "__name__", type(f).__name__) for f in functions]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{n}#{k + 1}" if k else n for n, k in zip(names, before, strict=True)]


def check_signatures(functions: Sequence[Reward], columns: Collection[str]) -> None:
    """Checks that the functions can be called with these columns.

    Args:
      functions: the reward functions.
      columns: the names of the data's columns.

    Raises:
      GrpoError: a column's name is in `RESERVED`, or a function does not accept the
        columns or needs another one.
    """
    for name in set(RESERVED) & set(columns):
        raise GrpoError(
            f"rewards: the data has a column {name!r}, which is what the functions "
            f"get the run's own {name} by; rename the column"
        )
    arguments = dict.fromkeys([*RESERVED, *columns])
    for name, function in zip(_names(functions), functions, strict=True):
        try:
            inspect.signature(function).bind(**arguments)
        except ValueError:  # some built-in functions have no signature
            continue
        except TypeError as error:
            raise GrpoError(
                f"reward {name}: {error}; it is called with"
                f" {', '.join(arguments)} by name, take the rest as **columns"
            ) from None
