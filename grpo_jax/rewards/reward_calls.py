"""Calls of reward functions, which may hang, fail or return anything.

`start_call` runs one function; its future holds N floats, with NaN for no value, or the
exception that the function raised. `CallRecord` records the calls of a run, so that the
run stops if a function keeps failing.
"""

import asyncio
import copy
import inspect
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sized
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.errors import GrpoError

Reward = Callable[..., Any]
# A larger reward counts as no value, and a larger sum is an error. Advantages are
# computed in float32, in which the sum of larger squares over a batch could overflow.
LARGEST = 1e15
SILENT_CALLS = 10  # calls without any value after which a function is refused


def start_call(
    name: str, function: Reward, arguments: Mapping[str, Any], seconds: float
) -> Future[np.ndarray]:
    """Starts a reward function in a daemon thread, which does not delay exit.

    Args:
      name: the function's name, for messages.
      function: the reward function, sync or async.
      arguments: the arguments by name; each is a sequence of N values.
      seconds: how long its caller waits. An async function is cancelled after that; a
        sync one keeps running.

    Returns:
      A future of float32 [N], NaN for no value, or of an `Exception`.
    """
    future: Future[np.ndarray] = Future()
    # Copies, so that a function that changes its lists does not affect others.
    arguments = {k: copy.copy(values) for k, values in arguments.items()}
    size = len(arguments["completions"])

    def run() -> None:
        try:
            value = function(**arguments)
            if inspect.isawaitable(value):
                # Cancelled a little after the caller has counted it as late.
                value = asyncio.run(asyncio.wait_for(value, seconds + 0.5))
            # In this thread, as reading the returned object may run its own code.
            future.set_result(rewards_as_array(name, value, size))
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:  # SystemExit and a cancellation are failures too
            future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))

    threading.Thread(target=run, daemon=True).start()
    return future


@dataclass
class CallRecord:
    """A run's record of reward calls, used to refuse functions that keep failing.

    Attributes:
      recent: whether each of the last 100 calls raised an exception.
      silent: by function, the number of consecutive calls without any value, and the
        number of samples in them.
    """

    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=100))
    silent: dict[str, tuple[int, int]] = field(default_factory=dict)

    def record_values(self, name: str, values: np.ndarray) -> None:
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


def rewards_as_array(name: str, returned: Any, n: int) -> np.ndarray:
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
    scalar = getattr(returned, "ndim", 1) == 0  # has a length and an iterator that fail
    sized = isinstance(returned, Sized) and isinstance(returned, Iterable)
    if scalar or not sized or isinstance(returned, (str, bytes, Mapping)):
        raise WrongCount(
            f"reward {name}: returned {type(returned).__name__}, not {n} values"
        )
    if (length := len(returned)) != n:
        raise WrongCount(f"reward {name}: returned {length} values for {n} completions")
    values = list(itertools.islice(returned, n + 1))
    if len(values) != n:
        found = "more" if len(values) > n else len(values)
        raise WrongCount(
            f"reward {name}: returned {type(returned).__name__} that says it has {n} "
            f"values and gives {found}"
        )
    return np.array([reward_as_float(value) for value in values], np.float32)


def reward_as_float(value: Any) -> float:
    """Returns a reward as a float; NaN if it is no number, or beyond ±`LARGEST`."""
    if value is None or isinstance(value, (str, bytes)):
        return math.nan
    try:
        number = float(np.float32(value))  # also 0-d arrays of any library
    except Exception:  # a user's class may raise anything
        return math.nan
    return number if abs(number) <= LARGEST else math.nan
