"""Calls of reward functions, which may hang, fail or return anything.

A `Call` runs one function and holds N floats, with NaN for no value, or the exception
that the function raised. `Calls` records the calls of a run, so that the run stops if a
function keeps failing.
"""

import asyncio
import copy
import inspect
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.errors import GrpoError

Reward = Callable[..., Any]
# A larger reward counts as no value, and a larger sum is an error. Advantages are
# computed in float32, in which the sum of larger squares over a batch could overflow.
LARGEST = 1e15
SILENT_CALLS = 10  # calls without any value after which a function is refused


class Call:
    """Runs a reward function in a daemon thread, which does not delay exit.

    Args:
      name: the function's name, for messages.
      function: the reward function, sync or async.
      arguments: the arguments by name; each is a sequence of N values.

    Attributes:
      done: set when the call has ended.
      values: float32 [N], NaN for no value; None before the end and after an error.
      error: the exception that the call raised, if any.
    """

    def __init__(self, name: str, function: Reward, arguments: Mapping[str, Any]):
        self.name, self.function = name, function
        self.size = len(arguments["completions"])
        # Copies, so that a function that changes its lists does not affect others.
        self.arguments = {k: copy.copy(values) for k, values in arguments.items()}
        self.values: np.ndarray | None = None  # [N], NaN where there is no value
        self.error: Exception | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            value = self.function(**self.arguments)
            if inspect.isawaitable(value):
                value = asyncio.run(self._wait(value))
            # In this thread, as reading the returned object may run its own code.
            self.values = values_of(self.name, value, self.size)
        except asyncio.CancelledError:
            self.error = RuntimeError("it was cancelled")
        except BaseException as error:  # a SystemExit counts as a failure too
            self.error = error if isinstance(error, Exception) else RuntimeError(error)
        finally:
            self.done.set()

    async def _wait(self, value: Any) -> Any:
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        return await value

    def cancel(self) -> None:
        """Cancels an async function; a sync one keeps running in its thread."""
        if self.loop is not None and self.task is not None and self.loop.is_running():
            self.loop.call_soon_threadsafe(self.task.cancel)


@dataclass
class Calls:
    """A run's record of reward calls, used to refuse functions that keep failing.

    Attributes:
      recent: whether each of the last 100 calls raised an exception.
      silent: by function, the number of consecutive calls without any value, and the
        number of samples in them.
    """

    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=100))
    silent: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, raised: bool) -> float:
        """Records a call, and returns the share of recent calls that raised."""
        self.recent.append(raised)
        return sum(self.recent) / len(self.recent)

    def hear(self, name: str, values: np.ndarray) -> None:
        """Records the values of a call.

        Args:
          name: the function's name.
          values: float32 [N], NaN for no value.

        Raises:
          GrpoError: this is the `SILENT_CALLS`-th call in a row without any value.
        """
        if not len(values) or not np.isnan(values).all():
            self.silent[name] = (0, 0)
            return
        calls, samples = self.silent.get(name, (0, 0))
        calls, samples = calls + 1, samples + len(values)
        self.silent[name] = (calls, samples)
        if calls >= SILENT_CALLS:
            raise GrpoError(
                f"reward {name}: None, or no finite number, for all {samples} samples "
                f"of the last {calls} calls; mend the function or leave it out"
            )


class WrongCount(GrpoError):
    """Raised if a function does not return one value per sample."""


def values_of(name: str, returned: Any, n: int) -> np.ndarray:
    """Converts what a reward function returned to an array.

    Args:
      name: the function's name, for messages.
      returned: what it returned: a sequence or array of N values.
      n: the number of samples.

    Returns:
      float32 [N], NaN for each item that is not a number.

    Raises:
      WrongCount: it is not a sequence of N values.
    """
    sized = hasattr(returned, "__len__") and hasattr(returned, "__iter__")
    if getattr(returned, "ndim", 1) == 0:
        sized = False  # a 0-d array has both, but neither works
    if not sized or isinstance(returned, (str, bytes, Mapping)):
        raise WrongCount(
            f"reward {name}: returned {type(returned).__name__}, not {n} values"
        )
    length = len(returned)
    if length != n:
        raise WrongCount(f"reward {name}: returned {length} values for {n} completions")
    values = list(itertools.islice(iter(returned), n + 1))
    if len(values) != n:
        found = "more" if len(values) > n else len(values)
        raise WrongCount(
            f"reward {name}: returned {type(returned).__name__} that says it has {n} "
            f"values and gives {found}"
        )
    return np.array([number_of(value) for value in values], np.float32)


def number_of(value: Any) -> float:
    """Returns a reward as a float; NaN if it is no number, or beyond ±`LARGEST`."""
    if value is None or isinstance(value, (str, bytes)):
        return math.nan
    try:
        number = float(np.float32(value))  # also 0-d arrays of any library
    except Exception:  # a user's class may raise anything
        return math.nan
    return number if abs(number) <= LARGEST else math.nan
