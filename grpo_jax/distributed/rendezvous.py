"""Checks, before jax starts, that all processes are there, with flags that agree.

jax itself waits for as many processes as process 0 was told, and takes two processes
with one number for one that has restarted. A run with a wrong flag then hangs, or ends
in a C++ error. Here process 0 first listens at the coordinator's address, and every
process gets the same message if one is missing or has a wrong flag. When all have come,
jax takes the address over.
"""

from __future__ import annotations

import contextlib
import socket
import time

from grpo_jax.errors import GrpoError

_OURS = "grpo_jax"  # first word of every message, to recognise our own processes


def wait_for_processes(
    coordinator: str, processes: int, number: int, *, bind: str, wait: float
) -> None:
    """Returns when all processes are there.

    Args:
      coordinator: host:port of process 0, as the others reach it.
      processes: how many processes there are.
      number: the number of this process, from 0.
      bind: host:port where process 0 listens.
      wait: seconds to wait for all processes.

    Raises:
      GrpoError: a process is missing, two have the same number, two were told different
        counts, or process 0 does not answer or has begun its run.
    """
    deadline = time.monotonic() + wait
    if number == 0:
        _gather(bind, processes, wait, deadline)
    else:
        _join(coordinator, processes, number, wait, deadline)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _gather(bind: str, processes: int, wait: float, deadline: float) -> None:
    """Process 0: waits for all others, then tells them to begin, or why not."""
    joined: dict[int, socket.socket] = {}
    rejected: list[socket.socket] = []  # with a wrong flag
    error = ""
    with _listen(bind) as listener, contextlib.ExitStack() as open_sockets:
        while len(joined) < processes - 1 or not all(map(_is_there, joined.values())):
            peer = _accept(listener, deadline)
            joined = {i: x for i, x in joined.items() if _is_there(x)}
            if peer is None:
                missing = [i for i in range(1, processes) if i not in joined]
                error = error or (
                    f"not all processes came within {wait:g} s (--wait): "
                    f"{_numbers(missing)} of {processes} did not; look at their logs, "
                    "and at --coordinator, --num_processes and --process_id"
                )
                break
            open_sockets.enter_context(peer)
            hello = _receive_hello(peer)
            if hello is None:
                continue
            number, count = hello
            wrong = ""
            if count != processes:
                wrong = (
                    f"process {number} was told --num_processes {count}, and process 0 "
                    f"{processes}; give all the same"
                )
            elif number == 0 or number in joined:
                wrong = (
                    f"--process_id {number} was given to two processes; give each of "
                    f"the {processes} its own, from 0 to {processes - 1}"
                )
            if wrong:
                rejected.append(peer)
                if not error:  # processes about to come get the message too
                    deadline = min(deadline, time.monotonic() + 2)
                error = error or wrong
            else:
                joined[number] = peer
        for peer in [*joined.values(), *rejected]:
            with contextlib.suppress(OSError):
                peer.sendall(f"{_OURS} {error}\n".encode())
    if error:
        raise GrpoError(error)


def _listen(bind: str) -> socket.socket:
    host, port = _split(bind)
    everywhere = host in ("", "::")
    try:
        if everywhere and socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512
            )
        host = "" if everywhere else host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        why = str(error.strerror or error).partition(" (while")[0]
        raise GrpoError(
            f"process 0 cannot listen at {bind} ({why}); end what does (another "
            "process 0?), or take another port in --coordinator"
        ) from None


def _accept(listener: socket.socket, deadline: float) -> socket.socket | None:
    try:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        return listener.accept()[0]
    except TimeoutError:
        return None


def _receive_hello(peer: socket.socket) -> tuple[int, int] | None:
    """Returns a process's number and its count; None if the peer is not one of ours."""
    try:
        word, number, count = _line(peer, 2.0).split()
        hello = int(number), int(count)
        return hello if word == _OURS and 0 <= hello[0] < hello[1] else None
    except (OSError, ValueError):
        return None


def _line(peer: socket.socket, seconds: float) -> str:
    """Reads a line of at most 1,000 bytes; "" if the other side has closed."""
    peer.settimeout(max(0.01, seconds))
    with peer.makefile("rb") as file:
        return file.readline(1000).decode("utf-8", "replace")


def _is_there(peer: socket.socket) -> bool:
    """Returns whether the peer still waits; a process that was restarted does not."""
    peer.setblocking(False)
    try:
        return bool(peer.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        peer.setblocking(True)


def _join(
    coordinator: str, processes: int, number: int, wait: float, deadline: float
) -> None:
    """Every other process: connects to process 0 and waits for its answer."""
    answer, there = "", False
    while not answer and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            there = False
            with socket.create_connection(_split(coordinator), timeout=5) as peer:
                there = True
                peer.sendall(f"{_OURS} {number} {processes}\n".encode())
                # A little longer than process 0, whose message says who is missing.
                answer = _line(peer, deadline + 1 - time.monotonic())
        if not answer:
            time.sleep(0.2)
    word, _, error = answer.strip().partition(" ")
    if word == _OURS:
        if error:
            raise GrpoError(error)
        return
    if answer:
        raise GrpoError(
            f"--coordinator {coordinator}: its run has begun without this process, or "
            f"another program answers there; is --process_id {number} given twice?"
        )
    who = "not all processes" if there else "no process 0"
    raise GrpoError(
        f"{who} came within {wait:g} s (--wait); look at the others' logs, and at "
        f"--coordinator ({coordinator}), --num_processes and --process_id"
    )


def _numbers(missing: list[int]) -> str:
    shown = ", ".join(map(str, missing[:8])) + ", …" * (len(missing) > 8)
    return f"process{'es' * (len(missing) > 1)} {shown}"
