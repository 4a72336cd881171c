"""Progress bars, drawn by the first process of a run alone."""

from __future__ import annotations

import io
import sys

import tqdm

from grpo_jax.distributed import processes


def progress(stage: str, start: int, steps: int, unit: str = "step") -> tqdm.tqdm:
    """A bar with the time left; in a log a line every ten seconds and at the end."""
    screen = sys.stderr.isatty()
    return tqdm.tqdm(
        desc=stage,
        initial=start,
        total=steps,
        unit=unit,
        disable=not processes.first(),
        dynamic_ncols=screen,
        mininterval=0.2 if screen else 10.0,
        delay=0 if screen else 1e-9,  # no line at 0 %
        file=sys.stderr if screen else _Lines(),
    )


class _Lines(io.StringIO):
    """What tqdm draws over and over in one line, as lines; each count once."""

    count = ""

    def write(self, text: str) -> int:
        shown = text.replace("\x1b[A", "").strip()
        count = shown.partition(" [")[0]  # behind it stand times
        if shown and count != self.count:
            print(shown, file=sys.stderr, flush=True)
            self.count = count
        return len(text)
