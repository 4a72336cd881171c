"""A worker process that renders chat templates, with limits on memory and time.

A chat template is a program that comes with a model. jinja2's sandbox blocks Python's
attributes and files, but not `'a' * 10**10` or endless loops. Only a separate process
can stop these. `chat_templates.py` starts this file as a script. It imports jinja2 and
nothing from the package.

It reads one request per line of JSON, {template, special_tokens, chats, now}, and
replies with a line of JSON, {"texts": [...]} or {"error": "..."}. The kernel kills the
process if a request takes too long.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import random
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY = 1 << 29  # bytes of address space
SECONDS = 5  # of CPU time per request; a usual one takes milliseconds
WAIT = 60  # seconds of wall time per request
CHARACTERS = 1 << 24  # in all texts of a request
# Noncharacters of Unicode that enclose the text of a {% generation %} block.
BLOCK, BLOCK_END = "\ufdd2", "\ufdd3"


class _Generation(jinja2.ext.Extension):
    """Parses {% generation %}…{% endgeneration %}, in which templates put answers."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(text: str) -> jinja2.nodes.Node:
            return jinja2.nodes.Output([jinja2.nodes.TemplateData(text)], lineno=line)

        return [mark(BLOCK), *body, mark(BLOCK_END)]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.lru_cache(8)
def _compile(template: str) -> jinja2.Template:
    """Compiles a template with the functions and filters that transformers offers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json  # jinja2's filter escapes HTML
    return environment.from_string(template, {"raise_exception": _raise})


def render(
    template: str,
    special_tokens: dict[str, str],
    chats: list[tuple[list[dict[str, str]], bool]],
    now: str,
) -> list[str]:
    """Returns the text of each chat.

    Args:
      template: the jinja2 source.
      special_tokens: eos_token, bos_token … as text.
      chats: pairs of messages and `add_generation_prompt`.
      now: the time that the template's clock shows, in ISO format.

    Raises:
      ValueError: the texts have more than `CHARACTERS` characters.
    """
    moment = datetime.datetime.fromisoformat(now)
    compiled = _compile(template)
    texts, left = [], CHARACTERS
    for messages, add_generation_prompt in chats:
        random.seed(0)  # keeps jinja2's `random` filter reproducible
        text = compiled.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=moment.strftime,
            **special_tokens,
        )
        left -= len(text)
        if left < 0:
            raise ValueError(f"it writes more than {CHARACTERS} characters")
        texts.append(text)
    return texts


def _answer(line: bytes) -> dict[str, Any]:
    try:
        return {"texts": render(**json.loads(line))}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # a template is a program and can raise anything
        return {"error": str(error)[:1000] or type(error).__name__}


def main() -> None:
    """Sets the limits, then answers requests from stdin until it closes."""
    # The parent handles signals that go to the whole process group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # kills the process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        reply = json.dumps(_answer(line)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(reply + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
