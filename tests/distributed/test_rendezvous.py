"""Processes meet, each a thread here, over loopback: all begin, or all hear why not."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from run_processes import free_port

from grpo_jax.distributed.rendezvous import wait_for_processes
from grpo_jax.errors import GrpoError


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


def all_of(address: str, told: list[tuple[int, int]], wait: float = 5) -> list[str]:
    """What each process hears that was told so many and its number; "": to begin."""

    def one(count: int, number: int) -> str:
        try:
            wait_for_processes(address, count, number, bind=address, wait=wait)
        except GrpoError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(told)) as threads:
        return list(threads.map(lambda pair: one(*pair), told))


def connect(address: str) -> socket.socket:
    """As soon as process 0 is there."""
    host, port = address.split(":")
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)))
        time.sleep(0.01)
    raise AssertionError("process 0 did not come")


@pytest.mark.parametrize("count", [1, 2, 16])
def test_all_begin_and_leave_the_address_to_jax(address, count):
    for _ in range(2):  # the second time as after a restart, on the same port
        assert all_of(address, [(count, i) for i in range(count)]) == [""] * count
    assert all_of("localhost:" + address.split(":")[1], [(2, 0), (2, 1)]) == ["", ""]


def test_those_who_are_away_are_named(address):
    found = all_of(address, [(12, 0), (12, 11), (12, 2)], wait=1)
    line = "within 1 s (--wait): processes 1, 3, 4, 5, 6, 7, 8, 9, … of 12 did not;"
    assert all(line in text for text in found)
    began = time.monotonic()
    (alone,) = all_of(address, [(2, 1)], wait=1)
    assert alone.startswith("no process 0 came within 1 s") and address in alone
    assert time.monotonic() - began < 3


def test_all_hear_of_a_wrong_count_and_of_a_number_given_twice(address):
    found = all_of(address, [(4, 0), (4, 1), (3, 2), (4, 3)])
    assert set(found) == {
        "process 2 was told --num_processes 3, and process 0 4; give all the same"
    }
    found = all_of(address, [(4, 0), (4, 1), (4, 3), (4, 1)])
    assert set(found) == {
        "--process_id 1 was given to two processes; give each of the 4 its own, from 0 "
        "to 3"
    }


def test_a_process_that_was_started_again_is_not_two(address):
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(all_of, address, [(3, 0)])
        with connect(address) as stopped:
            stopped.sendall(b"grpo_jax 1 3\n")
            time.sleep(0.2)
        others = threads.submit(all_of, address, [(3, 1), (3, 2)])
        assert first.result() + others.result() == [""] * 3


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\xff" * 500, b"grpo_jax"]
)
def test_strangers_are_passed_over(address, said):
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(all_of, address, [(2, 0)])
        with connect(address) as stranger:
            stranger.sendall(said)
            if said:
                stranger.shutdown(socket.SHUT_WR)
            assert all_of(address, [(2, 1)]) + first.result() == ["", ""]


def test_an_address_that_another_program_has_is_refused(address):
    """Another process 0, or jax's own server of a run that has begun."""
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:
        (first,) = all_of(address, [(2, 0)])
        assert first.startswith(f"process 0 cannot listen at {address} (Address")

        def answer():
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"\0\0\x12\4\0\0\0\0\0\0\3\x7f\xff\xff\xff\0\4\n")
                peer.recv(100)

        thread = threading.Thread(target=answer)
        thread.start()
        (second,) = all_of(address, [(2, 1)])
        thread.join()
        assert "its run has begun without this process" in second
