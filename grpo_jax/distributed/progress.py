"""Progress bars, drawn only by the first process of a run."""

from __future__ import annotations

import io
import sys

import tqdm

from grpo_jax.distributed import processes


def progress_bar(stage: str, start: int, steps: int, unit: str = "step") -> tqdm.tqdm:
    """Returns a bar on stderr with the time left.

    If stderr is no terminal, it prints a line every ten seconds and one at the end.

    Args:
      stage: the label before the bar.
      start: steps that are done already.
      steps: steps in total.
      unit: what a step is called.
    """
    screen = sys.stderr.isatty()
    return tqdm.tqdm(
        desc=stage,
        initial=start,
        total=steps,
        unit=unit,
        disable=not processes.is_first_process(),
        dynamic_ncols=screen,
        mininterval=0.2 if screen else 10.0,
        delay=0 if screen else 1e-9,  # no line at 0 %
        file=sys.stderr if screen else _Lines(),
    )


class _Lines(io.StringIO):
    """Writes the line that tqdm redraws as separate lines, each count once."""

    count = ""

    def write(self, text: str) -> int:
        shown = text.replace("\x1b[A", "").strip()
        count = shown.partition(" [")[0]  # the rest is times
        if shown and count != self.count:
            print(shown, file=sys.stderr, flush=True)
            self.count = count
        return len(text)
