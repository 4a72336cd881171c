"""One call of a reward function, whatever the function does, and what it returned.

In: a function, prompts, completions and columns. Out: N floats, NaN where there is no
value; or the error that it raised. `Calls` remembers a run's calls, to refuse functions
that go on failing.
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
# A larger reward is no value, and a larger sum is refused: float32, in which advantages
# are computed, could not hold the square of it, summed over a batch.
LARGEST = 1e15
SILENT_CALLS = 10  # without one value, after which a function is refused


class Call:
    """One reward function running in a daemon thread, which exit does not wait for."""

    def __init__(self, name: str, function: Reward, arguments: Mapping[str, Any]):
        self.name, self.function = name, function
        self.size = len(arguments["completions"])
        # Lists of its own: what it does to them is not for the others to see.
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
            # Here, as what was returned may run code of its own to say what it holds.
            self.values = values_of(self.name, value, self.size)
        except asyncio.CancelledError:
            self.error = RuntimeError("it was cancelled")
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
    """What a run remembers of its reward calls, to refuse a function that fails.

    recent: whether each of the last 100 calls raised. silent: by function, the calls in
    a row that returned without any value, and the samples in them.
    """

    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=100))
    silent: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, raised: bool) -> float:
        """Records one call; the share of the recent calls that raised."""
        self.recent.append(raised)
        return sum(self.recent) / len(self.recent)

    def hear(self, name: str, values: np.ndarray) -> None:
        """Records what a call returned.

        Raises:
          GrpoError: it is the last of `SILENT_CALLS` in a row without any value.
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
    """A function returned something else than a value for each sample."""


def values_of(name: str, returned: Any, n: int) -> np.ndarray:
    """[N] floats from what a function returned, NaN for what is not a number."""
    sized = hasattr(returned, "__len__") and hasattr(returned, "__iter__")
    if getattr(returned, "ndim", 1) == 0:
        sized = False  # an array of no axis has both, and neither works
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
    if value is None or isinstance(value, (str, bytes)):
        return math.nan
    try:
        number = float(np.float32(value))  # also 0-d arrays of any library
    except Exception:  # a class of somebody else's may raise what it likes
        return math.nan
    return number if abs(number) <= LARGEST else math.nan
