"""Renders chats with a model's own template, in a process with limits.

`render_marked` returns `Rendered` chats: the text, and the positions that the text
alone does not tell. These are special tokens that the data itself contains, the ends of
the assistant's messages, and the {% generation %} blocks.

Marks find these positions. They are noncharacters of Unicode, which no valid text
contains. The messages carry them through the template, and then they are removed.
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
# Tokens of the model's own that a worked answer may contain, special or not.
_THOUGHTS = ("<think>", "</think>")

Message = Mapping[str, str]  # role, content


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A chat's text without marks; all positions are indices into the text."""

    text: str
    quotes: frozenset[int]  # starts of special tokens that the data wrote
    ends: tuple[int, ...]  # ends of marked assistant messages
    blocks: tuple[tuple[int, int], ...]  # (start, end) of {% generation %} blocks

    @classmethod
    def read(cls, marked: str) -> Rendered:
        """Parses the output of a template: removes its marks and records them.

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


def quote_special_tokens(message: Message, special: re.Pattern[str]) -> dict[str, str]:
    """Returns a message whose special tokens are marked as the data's own text.

    Args:
      message: a dict with `role` and `content`.
      special: matches the texts of the special tokens.
    """

    def mark(found: re.Match[str]) -> str:
        thought = message["role"] == "assistant" and found[0] in _THOUGHTS
        return found[0] if thought else _QUOTE + found[0]

    return {**message, "content": special.sub(mark, remove_marks(message["content"]))}


def remove_marks(text: str) -> str:
    """Returns the text without marks."""
    return _MARKS.sub("", text)


def mark_end(message: Message, *, before_spaces: bool = False) -> dict[str, str]:
    """Returns a message with a mark at its end.

    Args:
      message: a dict with `role` and `content`.
      before_spaces: put the mark before trailing white space.
    """
    content = message["content"]
    end = len(content.rstrip()) if before_spaces else len(content)
    return {**message, "content": content[:end] + _END + content[end:]}


def render_marked(
    template: str,
    special_tokens: Mapping[str, str],
    chats: Sequence[tuple[Sequence[Message], bool]],
    now: datetime.datetime,
) -> list[Rendered]:
    """Renders each chat with the template.

    Args:
      template: the jinja2 source.
      special_tokens: eos_token, bos_token … as text; the template may use them.
      chats: pairs of messages and `add_generation_prompt`. If that is true, the text
        ends where the assistant's answer starts.
      now: the time that the template's clock shows.

    Raises:
      GrpoError: the template raises an error, or needs more memory or time than
        `chat_template_worker.py` allows.
    """
    request = {
        "template": template,
        "special_tokens": dict(special_tokens),
        "chats": chats,
        "now": now.isoformat(),
    }
    line = json.dumps(request).encode() + b"\n"
    reply = _request_reply(line) or _request_reply(
        line
    )  # ask again if something else killed it
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
_process: tuple[int, subprocess.Popen[bytes]] | None = None  # with the parent's pid


def _request_reply(request: bytes) -> dict | None:
    """Returns the reply; None if the process ended without one."""
    with _lock:
        process = _running_process()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(request)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        except BaseException:  # Ctrl-C: the next reply would belong to this request
            _close()
            raise
        if reply.endswith(b"\n"):
            return json.loads(reply)
        code = process.wait()
        _close()
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        return {"error": "it takes too long to render; does it loop?"}
    return None


def _running_process() -> subprocess.Popen[bytes]:
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
    """Ends the worker, unless it belongs to the parent of a forked process."""
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
