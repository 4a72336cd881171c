r"""The built-in reward functions, and `score`, which calls reward functions safely.

A reward function has TRL's signature, sync or `async def`:
`reward(prompts, completions, **columns) -> list[float | None]`. Each argument has N
values, and the columns are the dataset's other fields. None means that the function
does not apply to that sample. `score` returns the weighted sum of all functions;
DeepSeekMath (section 4.1) uses a single reward.
"""

import importlib
import importlib.util
import inspect
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.rewards import answers
from grpo_jax.rewards.grading import worker_pool
from grpo_jax.rewards.reward_calls import LARGEST, Call, Calls, Reward, WrongCount

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
    texts = [_text(completion) for completion in completions]
    languages = [name or "en" for name in language or [None] * len(texts)]
    found = [answers.extract(*pair) for pair in zip(texts, languages, strict=True)]
    return [float(same) for same in worker_pool.grade(found, [str(a) for a in answer])]


def format_reward(prompts: Sequence, completions: Sequence, **columns) -> list[float]:
    r"""Returns 1.0 if a completion has exactly one non-empty \boxed{…}, else 0.0.

    >>> format_reward(["q"] * 3, [r"\boxed{2}", r"\boxed{2} \boxed{3}", r"\boxed{2"])
    [1.0, 0.0, 0.0]
    """
    scores = []
    for completion in completions:
        text = _text(completion)
        text = answers.final_part(text)
        boxes = answers.boxed(text)
        one = text.count(r"\boxed") == text.count(r"\boxed{") == len(boxes) == 1
        scores.append(float(one and bool(boxes[0].strip())))
    return scores


def _text(completion: Any) -> str:
    """Returns a completion's text; TRL passes chats as lists of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def resolve(name: str) -> Reward:
    """Returns the reward function of a name.

    Args:
      name: "rule", "format", "module:function" or "file.py:function".

    Raises:
      GrpoError: the name has none of these forms, or the import fails.

    >>> resolve("rule") is rule_reward, resolve("math:fsum").__name__
    (True, 'fsum')
    >>> resolve("accuracy")
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: reward 'accuracy': not rule, format, module:function ...
    """
    built_in = {"rule": rule_reward, "format": format_reward}
    if name in built_in:
        return built_in[name]
    where, colon, function = name.rpartition(":")
    if not colon or not where or not function:
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
    found = vars(module).get(function)
    if not callable(found):
        raise GrpoError(f"reward {name!r}: {where} has no function {function!r}")
    return found


@dataclass(frozen=True)
class Scores:
    """The rewards of N samples, as returned by `score`.

    Attributes:
      rewards: float32 [N], the weighted sum over the functions that returned a value.
        NaN if none did; `group_advantages` leaves such samples out.
      by_function: unweighted rewards of each function, float32 [N]; NaN for no value.
      failures: the number of samples without a value, by function.
      timeouts: the number of calls that timed out, with 0.0 for all their samples.
      errors: the number of calls that raised an exception, by function.
    """

    rewards: np.ndarray
    by_function: dict[str, np.ndarray]
    failures: dict[str, int]
    timeouts: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def take(self, indices: Sequence[int]) -> "Scores":
        """Returns the scores of the samples at `indices`.

        `timeouts` and `errors` remain those of the whole batch.
        """
        rows = list(indices)
        by_function = {name: x[rows] for name, x in self.by_function.items()}
        failures = {name: int(np.isnan(x).sum()) for name, x in by_function.items()}
        return replace(
            self, rewards=self.rewards[rows], by_function=by_function, failures=failures
        )

    @staticmethod
    def join(parts: "Sequence[Scores]") -> "Scores":
        """Concatenates the scores of several batches.

        `timeouts` and `errors` are the largest of any batch.
        """
        names = list(parts[0].by_function)
        return Scores(
            rewards=np.concatenate([p.rewards for p in parts]),
            by_function={
                n: np.concatenate([p.by_function[n] for p in parts]) for n in names
            },
            failures={n: sum(p.failures[n] for p in parts) for n in names},
            timeouts=max(p.timeouts for p in parts),
            errors={n: max(p.errors[n] for p in parts) for n in parts[0].errors},
        )

    def gather(self) -> "Scores":
        """Returns the joined scores of all processes; each has graded its share."""
        arrays = {"rewards": self.rewards, **self.by_function}
        mine = {name: x.tolist() for name, x in arrays.items()}
        parts = []
        for lists, counts in processes.exchange(
            (mine, (self.failures, self.timeouts, self.errors))
        ):
            by = {name: np.array(x, np.float32) for name, x in lists.items()}
            parts.append(Scores(by.pop("rewards"), by, *counts))
        return Scores.join(parts)


def score(
    functions: Sequence[Reward],
    weights: Sequence[float],
    prompts: Sequence,
    completions: Sequence,
    columns: Mapping[str, Sequence],
    *,
    timeout: float,
    max_failures: float = 0.5,
    calls: Calls | None = None,
) -> Scores:
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
    >>> out = score([long, format_reward], [0.5, 2], ["q"] * 3,
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
    for column, values in {"prompts": prompts, **columns}.items():
        if len(values) != n:
            raise GrpoError(
                f"rewards: {column} has {len(values)} values for {n} completions"
            )
    check_calls(functions, columns)
    arguments = {**columns, "prompts": prompts, "completions": completions}
    until = time.monotonic() + timeout
    pairs = zip(names, functions, strict=True)
    running = [Call(name, function, arguments) for name, function in pairs]
    by_function: dict[str, np.ndarray] = {}
    errors = dict.fromkeys(names, 0)
    timeouts = 0
    calls = Calls() if calls is None else calls
    share, problem = 0.0, ""
    for name, call in zip(names, running, strict=True):
        if not call.done.wait(max(0.0, until - time.monotonic())):
            call.cancel()
            timeouts += 1
            share = calls.add(False)
            log.warning("reward %s: no answer in %g s, counted as wrong", name, timeout)
            by_function[name] = np.zeros(n, np.float32)
            continue
        if isinstance(call.error, WrongCount):
            raise call.error
        share = calls.add(call.error is not None)
        if call.values is not None:
            by_function[name] = call.values
            calls.hear(name, call.values)
            continue
        errors[name] = 1
        problem = f"reward {name}: {type(call.error).__name__}: {call.error}"
        problem = " ".join(problem.split())
        sample = (str(prompts[0])[:200], str(completions[0])[:200]) if n else ()
        log.warning("%s; for example on %r", problem, sample, exc_info=call.error)
        by_function[name] = np.full(n, np.nan, np.float32)
    if problem and share > max_failures:
        raise GrpoError(
            f"{problem} ({share:.0%} of the reward calls raised, above"
            f" {max_failures:.0%}); mend the function"
        )
    table = np.stack([*by_function.values()]) if functions else np.zeros((0, n))
    given = ~np.isnan(table)
    total = np.sum(
        np.where(given, table, 0.0) * np.asarray(weights, np.float64)[:, None], axis=0
    )
    large = np.flatnonzero(~(np.abs(total) <= LARGEST))
    if large.size:
        raise GrpoError(
            f"rewards: the sum of {', '.join(names)} is {total[large[0]]:g} for "
            f"sample {large[0]}, beyond ±{LARGEST:g}; make the rewards or the weights "
            "smaller"
        )
    return Scores(
        rewards=np.where(given.any(axis=0), total, np.nan).astype(np.float32),
        by_function=by_function,
        failures={name: int(np.isnan(v).sum()) for name, v in by_function.items()},
        timeouts=timeouts,
        errors=errors,
    )


def _names(functions: Sequence[Reward]) -> list[str]:
    names: list[str] = []
    for function in functions:
        name = (
            function.__name__
            if hasattr(function, "__name__")
            else type(function).__name__
        )
        again = sum(other.partition("#")[0] == name for other in names)
        names.append(f"{name}#{again + 1}" if again else name)
    return names


def check_calls(functions: Sequence[Reward], columns: Iterable[str]) -> None:
    """Checks that the functions can be called with these columns.

    Args:
      functions: the reward functions.
      columns: the names of the data's columns.

    Raises:
      GrpoError: a column's name is in `RESERVED`, or a function does not accept the
        columns or needs another one.
    """
    columns = list(columns)
    for name in RESERVED:
        if name in columns:
            raise GrpoError(
                f"rewards: the data has a column {name!r}, which is what the functions "
                f"get the run's own {name} by; rename the column"
            )
    arguments = dict.fromkeys([*RESERVED, *columns])
    for name, function in zip(_names(functions), functions, strict=True):
        _check_signature(name, function, arguments)


def _check_signature(name: str, function: Reward, arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise GrpoError(
            f"reward {name}: {error}; it is called with"
            f" {', '.join(arguments)} by name, take the rest as **columns"
        ) from None
