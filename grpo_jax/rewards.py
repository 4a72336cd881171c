r"""Reward functions and the safe way to call them.

In: prompts, completions and the data set's other columns, N values each. Out: one
float a completion from each function, and their weighted sum (`score`).

A reward function has TRL's signature, sync or `async def`:
`reward(prompts, completions, **columns) -> list[float | None]`. None means that the
function has nothing to say about that sample (DeepSeekMath section 4.1 uses one
outcome reward; several may be mixed with weights).
"""

import asyncio
import importlib
import importlib.util
import inspect
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax import answers, hosts
from grpo_jax.errors import GrpoError
from grpo_jax.grading import workers

log = logging.getLogger(__name__)
Reward = Callable[..., Any]


def rule_reward(
    prompts: Sequence,
    completions: Sequence,
    *,
    answer: Sequence[str],
    language: Sequence[str | None] | None = None,
    **columns,
) -> list[float]:
    r"""1.0 where the completion's final answer equals the reference, else 0.0.

    language: in which each one's numbers are written; without it, English.

    >>> rule_reward(["1+1?"] * 2, [r"so \boxed{2}", "it is 3."], answer=["2", "2"])
    [1.0, 0.0]
    """
    texts = [_text(completion) for completion in completions]
    languages = [name or "en" for name in language or [None] * len(texts)]
    found = [answers.extract(*pair) for pair in zip(texts, languages, strict=True)]
    return [float(same) for same in workers.grade(found, [str(a) for a in answer])]


def format_reward(prompts: Sequence, completions: Sequence, **columns) -> list[float]:
    r"""1.0 where the completion holds exactly one \boxed{…} and it is not empty.

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
    """A completion's text; TRL passes chats as lists of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def resolve(name: str) -> Reward:
    """The function of that name: rule, format, module:function or file.py:function.

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
    """What `score` returns, for N samples.

    rewards: float32 [N], the weighted sum over the functions that gave a value, NaN
    where none did (`group_advantages` leaves such samples out). by_function: float32
    [N] each, unweighted, NaN where the function gave none. failures: samples without
    a value, by function. timeouts: calls that ran out of time (0.0 for all samples).
    errors: calls that raised, by function.
    """

    rewards: np.ndarray
    by_function: dict[str, np.ndarray]
    failures: dict[str, int]
    timeouts: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def take(self, indices: Sequence[int]) -> "Scores":
        """The scores of some of the samples; counts of calls stay the whole batch's."""
        rows = list(indices)
        by_function = {name: x[rows] for name, x in self.by_function.items()}
        failures = {name: int(np.isnan(x).sum()) for name, x in by_function.items()}
        return replace(
            self, rewards=self.rewards[rows], by_function=by_function, failures=failures
        )

    @staticmethod
    def join(parts: "Sequence[Scores]") -> "Scores":
        """The scores of several batches as those of one."""
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
        """The scores of all processes, each of which has graded its share."""
        arrays = {"rewards": self.rewards, **self.by_function}
        mine = {name: x.tolist() for name, x in arrays.items()}
        parts = []
        for lists, counts in hosts.exchange(
            (mine, (self.failures, self.timeouts, self.errors))
        ):
            by = {name: np.array(x, np.float32) for name, x in lists.items()}
            parts.append(Scores(by.pop("rewards"), by, *counts))
        return Scores.join(parts)


class _Call:
    """One reward function running in a daemon thread, which exit does not wait for."""

    def __init__(self, function: Reward, arguments: dict[str, Any]):
        self.function, self.arguments = function, arguments
        self.value: Any = None
        self.error: Exception | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            value = self.function(**self.arguments)
            self.value = (
                asyncio.run(self._wait(value)) if inspect.isawaitable(value) else value
            )
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # a SystemExit is the function's failure too
            self.error = error if isinstance(error, Exception) else RuntimeError(error)
        finally:
            self.done.set()

    async def _wait(self, value: Any) -> Any:
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        return await value

    def cancel(self) -> None:
        if self.loop is not None and self.task is not None and self.loop.is_running():
            self.loop.call_soon_threadsafe(self.task.cancel)


@dataclass
class Calls:
    """What a run remembers of its reward calls, to refuse past a share that raised."""

    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=100))

    def add(self, raised: bool) -> float:
        """Records one call; the share of the recent calls that raised."""
        self.recent.append(raised)
        return sum(self.recent) / len(self.recent)


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
    r"""Calls every reward function at once and adds up what they return.

    None, NaN, infinity or another type than a number is no value: that sample's total
    leaves the function out, and it is counted. A function that raises gives no value
    for the batch and is logged with one sample. One that is not back after `timeout`
    seconds counts as wrong (0.0) and training goes on without waiting for it.

    Args:
      weights: one a function.
      prompts, completions: N each; columns: N values each, passed by name.
      timeout: seconds for the slowest function.
      max_failures: the share of calls that may raise.
      calls: the run's record of calls; without it, only this call's count.

    Raises:
      GrpoError: unequal lengths, a column that a function lacks, a wrong number of
        values, or more than `max_failures` of the calls raised.

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
    n = len(completions)
    for column, values in {"prompts": prompts, **columns}.items():
        if len(values) != n:
            raise GrpoError(
                f"rewards: {column} has {len(values)} values for {n} completions"
            )
    arguments = {"prompts": prompts, "completions": completions, **columns}
    for name, function in zip(names, functions, strict=True):
        _check_signature(name, function, arguments)
    until = time.monotonic() + timeout
    running = [_Call(function, dict(arguments)) for function in functions]
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
        share = calls.add(call.error is not None)
        if call.error is None:
            by_function[name] = _values(name, call.value, n)
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


def _check_signature(name: str, function: Reward, arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise GrpoError(
            f"reward {name}: {error}; it is called with"
            f" {', '.join(arguments)} by name, take the rest as **columns"
        ) from None


def _values(name: str, returned: Any, n: int) -> np.ndarray:
    """[N] floats from what a function returned, NaN for what is not a number."""
    sized = hasattr(returned, "__len__") and hasattr(returned, "__iter__")
    if not sized or isinstance(returned, (str, bytes, Mapping)):
        raise GrpoError(
            f"reward {name}: returned {type(returned).__name__}, not {n} values"
        )
    if len(returned) != n:
        raise GrpoError(
            f"reward {name}: returned {len(returned)} values for {n} completions"
        )
    return np.array([_number(value) for value in returned], np.float32)


def _number(value: Any) -> float:
    if value is None or isinstance(value, (str, bytes)):
        return math.nan
    try:
        number = float(np.float32(value))  # also 0-d arrays of any library
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
