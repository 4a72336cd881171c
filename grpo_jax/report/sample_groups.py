"""Prepares the groups of samples.jsonl for the page: checked, sorted, shortened.

A group is a question with its completions. Beside a completion's tokens may stand
`logps`, `ref_logps`, `old_logps`, `advantage` (or one number for all tokens) and `mask`
(0 where a tool wrote the token), each with one value a token. `calls` and `failures`
count a completion's programs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpo_jax.report.safe_text import finite_number, make_visible, script_json

MAX_COMPLETIONS = 16  # of a group
MAX_TOKENS = 2_000  # of a completion
MAX_CHARACTERS = 20_000  # of a completion
MAX_BYTES = 2_500_000  # of all groups
_PER_TOKEN = ("logps", "ref_logps", "old_logps", "advantage", "mask")


def prepare_sample_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the groups as the page's script reads them, failures first in each.

    If they are larger than `MAX_BYTES` together, every other one is left out until they
    fit; the newest always stays.

    >>> group = {"completions": [{"reward": 1.0}, {"reward": 0.0}], "step": 3}
    >>> [c["reward"] for c in prepare_sample_groups([group])[0]["completions"]]
    [0.0, 1.0]
    """
    prepared = [_prepare_group(group) for group in groups]
    sizes = [len(script_json(group).encode("utf-8", "replace")) for group in prepared]
    while sum(sizes) > MAX_BYTES and len(prepared) > 1:
        kept = slice(1 - len(prepared) % 2, None, 2)
        prepared, sizes = prepared[kept], sizes[kept]
    return prepared


def _prepare_group(group: dict[str, Any]) -> dict[str, Any]:
    given = [c for c in group["completions"] if isinstance(c, dict)]
    rewards = [finite_number(c.get("reward")) for c in given]
    known = [r for r in rewards if r is not None]
    completions = [_prepare_completion(c) for c in given]
    completions.sort(key=lambda c: ("tokens" not in c, _failures_first(c)))
    return {
        "step": finite_number(group.get("step")),
        "stage": make_visible(group.get("stage"), 40),
        "question": make_visible(group.get("question"), 4000),
        "answer": make_visible(group.get("answer"), 400),
        "of": len(given),
        "failed": sum(r is None or r <= 0 for r in rewards),
        "reward": sum(known) / len(known) if known else None,
        "completions": sorted(completions[:MAX_COMPLETIONS], key=_failures_first),
    }


def _failures_first(completion: dict[str, Any]) -> tuple[bool, float]:
    """Sorts completions without a reward first, then by reward."""
    reward = completion["reward"]
    return reward is not None, reward or 0.0


def _prepare_completion(given: dict[str, Any]) -> dict[str, Any]:
    prepared: dict[str, Any] = {
        "reward": finite_number(given.get("reward")),
        "finished": given.get("finished") is not False,
    }
    for name in ("calls", "failures"):
        if (count := finite_number(given.get(name))) is not None:
            prepared[name] = count
    tokens = given.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        prepared["text"] = make_visible(given.get("completion"), MAX_CHARACTERS)
        prepared["advantage"] = finite_number(given.get("advantage"))
        return prepared
    texts: list[str] = []
    room = MAX_CHARACTERS
    for token in tokens[:MAX_TOKENS]:
        texts.append(make_visible(token, 400))
        room -= len(texts[-1])
        if room < 0:
            break
    prepared |= {"tokens": texts, "cut": len(tokens) - len(texts)}
    for name in _PER_TOKEN:
        values = given.get(name)
        if isinstance(values, list) and len(values) == len(tokens):
            prepared[name] = [finite_number(x) for x in values[: len(texts)]]
        elif name == "advantage":
            prepared[name] = finite_number(values)
    return prepared
