"""Chats as text by a model's own template, in a process with limits.

In: a template, the special tokens it may name, and chats. Out: `Rendered`, the text
with the places that tokens cannot show: which special tokens are the data's own words,
where the assistant's messages end, what stands in {% generation %} blocks.

These places are found by marks, noncharacters of Unicode, which no text holds: they go
into the messages, come out of the template wherever it puts the text, and are removed.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo_jax.errors import GrpoError

_WORKER = Path(__file__).with_name("chat_template_worker.py")
_QUOTE, _END, _BLOCK, _BLOCK_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = re.compile(f"[{_QUOTE}{_END}{_BLOCK}{_BLOCK_END}]")
# The model's own tokens, which a worked answer may hold, special or not.
_THOUGHTS = ("<think>", "</think>")

Message = Mapping[str, str]  # role, content


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A chat's text without marks; all places are indices into it."""

    text: str
    quotes: frozenset[int]  # where a special token's text begins that the data wrote
    ends: tuple[int, ...]  # where an assistant's message ends
    blocks: tuple[tuple[int, int], ...]  # of {% generation %}

    @classmethod
    def read(cls, marked: str) -> Rendered:
        """What a template wrote, whose marks are taken out.

        >>> Rendered.read("a\\ufdd0<s>b\\ufdd1</s>").ends
        (5,)
        """
        places: dict[str, list[int]] = {mark: [] for mark in (_QUOTE, _END, _BLOCK)}
        blocks, text, at = [], [], 0
        for piece in re.split(f"({_MARKS.pattern})", marked):
            if piece in places:
                places[piece].append(at)
            elif piece == _BLOCK_END:
                if places[_BLOCK]:
                    blocks.append((places[_BLOCK].pop(), at))
            else:
                text.append(piece)
                at += len(piece)
        quotes, ends = frozenset(places[_QUOTE]), tuple(places[_END])
        return cls("".join(text), quotes, ends, tuple(sorted(blocks)))


def quoted(message: Message, special: re.Pattern[str]) -> dict[str, str]:
    """A message whose special tokens are marked as words of the data."""

    def mark(found: re.Match[str]) -> str:
        own = message["role"] == "assistant" and found[0] in _THOUGHTS
        return found[0] if own else _QUOTE + found[0]

    return {**message, "content": special.sub(mark, unmarked(message["content"]))}


def unmarked(text: str) -> str:
    return _MARKS.sub("", text)


def ended(message: Message, *, before_spaces: bool = False) -> dict[str, str]:
    """A message with a mark at its end, or before the white space there."""
    content = message["content"]
    end = len(content.rstrip()) if before_spaces else len(content)
    return {**message, "content": content[:end] + _END + content[end:]}


def render(
    template: str,
    special_tokens: Mapping[str, str],
    chats: Sequence[tuple[Sequence[Message], bool]],
    now: datetime.datetime,
) -> list[Rendered]:
    """Each chat by the template; with True up to where the assistant's answer starts.

    now: what the template's clock shows.
    Raises GrpoError where the template does, and where it takes more memory or time
    than `chat_template_worker.py` allows.
    """
    request = {
        "template": template,
        "special_tokens": dict(special_tokens),
        "chats": chats,
        "now": now.isoformat(),
    }
    line = json.dumps(request).encode() + b"\n"
    reply = _ask(line) or _ask(line)  # once more where something else ended it
    if reply is None:
        raise GrpoError(
            "chat template: the process that renders it ends without an answer; try "
            f"`python {_WORKER}`"
        )
    if "error" in reply:
        raise GrpoError(f"chat template: {' '.join(reply['error'].split())[:300]}")
    return [Rendered.read(text) for text in reply["texts"]]


# -- the process -------------------------------------------------------------------

_lock = threading.Lock()
_process: tuple[int, subprocess.Popen[bytes]] | None = None  # with its parent's id


def _ask(request: bytes) -> dict | None:
    """The answer; None where the process ended without one."""
    with _lock:
        process = _started()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(request)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        except BaseException:  # Ctrl-C: a later reply would be this request's
            _close()
            raise
        if reply.endswith(b"\n"):
            return json.loads(reply)
        code = process.wait()
        _close()
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        return {"error": "it takes too long to render; does it loop?"}
    return None


def _started() -> subprocess.Popen[bytes]:
    global _process
    if _process and _process[0] == os.getpid() and _process[1].poll() is None:
        return _process[1]
    _close()
    process = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    _process = os.getpid(), process
    return process


def _close() -> None:
    """Ends the process, if it is this one's own (a forked child's is its parent's)."""
    global _process
    owned, _process = _process, None
    if owned is None or owned[0] != os.getpid():
        return
    process = owned[1]
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


atexit.register(_close)
