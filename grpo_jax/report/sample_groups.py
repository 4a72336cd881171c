"""Groups of samples.jsonl → what the page shows of them.

In: objects as `experience.show` writes them: a question and its completions, some with
their tokens and what is known of each. Out: the same, checked, shortened and in order,
small enough for a page.

Beside tokens may stand, one a token: logps, ref_logps, old_logps, advantage (or one
number for all), and mask: 0 where a tool wrote the token and not the model. calls and
failures count a completion's programs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpo_jax.report.safe_text import number, script_json, visible

COMPLETIONS = 16  # of a group
TOKENS = 2_000  # of a completion
CHARACTERS = 20_000  # of a completion
BYTES = 2_500_000  # of all groups
_PER_TOKEN = ("logps", "ref_logps", "old_logps", "advantage", "mask")


def show_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups as the page's script reads them; fewer, where all are too much.

    >>> group = {"completions": [{"reward": 1.0}, {"reward": 0.0}], "step": 3}
    >>> [c["reward"] for c in show_groups([group])[0]["completions"]]
    [0.0, 1.0]
    """
    shown = [_group(group) for group in groups]
    sizes = [len(script_json(group).encode("utf-8", "replace")) for group in shown]
    while sum(sizes) > BYTES and len(shown) > 1:
        # Every other one, the newest among them.
        keep = slice(1 - len(shown) % 2, None, 2)
        shown, sizes = shown[keep], sizes[keep]
    return shown


def _group(group: dict[str, Any]) -> dict[str, Any]:
    found = [c for c in group["completions"] if isinstance(c, dict)]
    rewards = [number(c.get("reward")) for c in found]
    scored = [r for r in rewards if r is not None]
    completions = [_completion(c) for c in found]
    completions.sort(key=lambda c: ("tokens" not in c, _failure(c)))
    return {
        "step": number(group.get("step")),
        "stage": visible(group.get("stage"), 40),
        "question": visible(group.get("question"), 4000),
        "answer": visible(group.get("answer"), 400),
        "of": len(found),
        "failed": sum(r is None or r <= 0 for r in rewards),
        "reward": sum(scored) / len(scored) if scored else None,
        "completions": sorted(completions[:COMPLETIONS], key=_failure),
    }


def _failure(completion: dict[str, Any]) -> tuple[bool, float]:
    """What has no reward comes first, then what has the least."""
    reward = completion["reward"]
    return reward is not None, reward or 0.0


def _completion(given: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "reward": number(given.get("reward")),
        "finished": given.get("finished") is not False,
    }
    for name in ("calls", "failures"):
        if (count := number(given.get(name))) is not None:
            shown[name] = count
    tokens = given.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        shown["text"] = visible(given.get("completion"), CHARACTERS)
        shown["advantage"] = number(given.get("advantage"))
        return shown
    texts: list[str] = []
    room = CHARACTERS
    for token in tokens[:TOKENS]:
        texts.append(visible(token, 400))
        room -= len(texts[-1])
        if room < 0:
            break
    shown |= {"tokens": texts, "cut": len(tokens) - len(texts)}
    for name in _PER_TOKEN:
        values = given.get(name)
        if isinstance(values, list) and len(values) == len(tokens):
            shown[name] = [number(x) for x in values[: len(texts)]]
        elif name == "advantage":
            shown[name] = number(values)
    return shown
