"""The grading pool: hostile text, dying workers, threads, orphans, throughput."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_jax.errors import GrpoError
from grpo_jax.rewards.grading import worker_pool

HOSTILE = [
    "9^9^9^9",
    "10^{10^{10}}",
    "1000000000!",
    "(" * 300 + "1" + ")" * 300,
    "1" * 1_000_000,
    "\\frac{" * 300,
    "{" * 1999,
    "-" * 1999,
    "1," * 900,
    " " * 1990 + "a",
    "\\pm" * 300,
    "=" * 1500,
    "\\text{" * 300,
    "\\sqrt{" * 200 + "2" + "}" * 200,
]


@pytest.fixture(scope="module")
def pool():
    pool = worker_pool.WorkerPool(workers=1, seconds=2.0)
    assert pool.is_equal(r"\sqrt{8}", r"2\sqrt{2}")
    yield pool
    pool.close()


def process_of(pool):
    process = pool._workers[0].process
    assert process is not None
    return process


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
@pytest.mark.parametrize("reference", ["5", r"x > \sqrt{2}"])
def test_hostile_text_is_wrong_and_bounded(pool, text, reference, monkeypatch):
    monkeypatch.setattr(worker_pool, "shared_pool", lambda: pool)
    began = time.monotonic()
    assert worker_pool.grade_answers([text], [reference]) == [False]
    assert time.monotonic() - began < 5


def test_no_text_is_executed(pool, monkeypatch, tmp_path):
    monkeypatch.setattr(worker_pool, "shared_pool", lambda: pool)
    mark = tmp_path / "mark"
    for text in (
        f"__import__('os').system('touch {mark}')",
        f"\\int __import__('os').system('touch {mark}')",
        f"open('{mark}', 'w')",
        f"$x$ $$(lambda: __import__('pathlib').Path('{mark}').touch())()$$",
    ):
        assert worker_pool.grade_answers([text], [r"\sqrt{2}"]) == [False]
    assert not mark.exists()


def test_a_hung_worker_is_killed_and_replaced():
    pool = worker_pool.WorkerPool(workers=1, seconds=0.2)
    try:
        assert pool.is_equal(r"\sqrt{8}", r"2\sqrt{2}")
        process = process_of(pool)
        os.kill(process.pid, signal.SIGSTOP)  # it hangs
        began = time.monotonic()
        assert not pool.is_equal(r"\sqrt{8}", r"2\sqrt{2}")
        assert time.monotonic() - began < 5  # the limit by the clock, and a new start
        assert process.returncode == -signal.SIGKILL
        assert pool.is_equal(r"\sqrt{8}", r"2\sqrt{2}")
    finally:
        pool.close()


def test_a_worker_killed_between_pairs_is_replaced(pool):
    process = process_of(pool)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert pool.is_equal(r"\sqrt{8}", r"2\sqrt{2}")


def test_a_worker_that_waits_for_a_busy_cpu_is_not_out_of_time():
    pool = worker_pool.WorkerPool(workers=1, seconds=0.5)
    try:
        assert pool.is_equal(r"\sqrt{8}", r"2\sqrt{2}")
        process = process_of(pool)
        os.kill(process.pid, signal.SIGSTOP)
        later = threading.Timer(1.0, os.kill, (process.pid, signal.SIGCONT))
        later.start()
        assert pool.is_equal(r"\sqrt{12}", r"2\sqrt{3}")
        assert process_of(pool) is process
    finally:
        pool.close()


def test_a_worker_killed_at_its_pair_makes_no_right_answer_wrong(pool):
    process = process_of(pool)
    os.kill(process.pid, signal.SIGSTOP)
    later = threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL))
    later.start()
    assert pool.is_equal(r"\sqrt{20}", r"2\sqrt{5}")
    assert process_of(pool) is not process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_leaves_the_worker_to_its_parent(pool, number):
    process = process_of(pool)
    os.kill(process.pid, number)
    assert pool.is_equal(r"\sqrt{8}", r"2\sqrt{2}")
    assert process_of(pool) is process and process.poll() is None


def test_threads_share_the_pool(pool):
    found = {}

    def ask(n):
        found[n] = pool.is_equal(rf"\sqrt{{{n * n * 2}}}", rf"{n}\sqrt{{2}}")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == dict.fromkeys(range(2, 18), True)


def test_grade_keeps_the_order_and_counts_none_as_wrong():
    predictions = ["1", None, r"\sqrt{2}", "1", r"2^{1/2}", r"\sqrt{2}"]
    references = ["1", "1", r"\sqrt{2}", "2", r"\sqrt{2}", r"\sqrt{3}"]
    expected = [True, False, True, False, True, False]
    assert worker_pool.grade_answers(predictions, references) == expected


def test_grade_refuses_unequal_lengths():
    with pytest.raises(GrpoError, match="2 predictions for 1 references"):
        worker_pool.grade_answers(["1", "2"], ["1"])


def test_gsm8k_answers_pass_at_500_a_second():
    predictions = [f"${n:,}.00" for n in range(1000, 2000)]
    began = time.monotonic()
    assert all(
        worker_pool.grade_answers(predictions, [str(n) for n in range(1000, 2000)])
    )
    assert 1000 / (time.monotonic() - began) >= 500


SCRIPT = """
import os, signal, sys, time
# A shell starts background jobs with Ctrl-C ignored; a terminal does not.
signal.signal(signal.SIGINT, signal.default_int_handler)
print("imported", flush=True)          # once: workers must not run this file
from grpo_jax.rewards.grading import worker_pool
assert worker_pool.shared_pool().is_equal(r"\\sqrt{8}", r"2\\sqrt{2}")
(process,) = (w.process for w in worker_pool.shared_pool()._workers if w.process)
print(process.pid, flush=True)
maps = open(f"/proc/{process.pid}/maps").read()
assert "jaxlib" not in maps, "a worker imported jax"
if sys.argv[1] == "wait":
    time.sleep(60)
"""


def _gone(pid: int, seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
@pytest.mark.parametrize("end", ["exit", "kill -9", "Ctrl-C"])
def test_no_worker_outlives_a_script_without_a_main_guard(tmp_path, end):
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    root = str(Path(worker_pool.__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, str(script), "exit" if end == "exit" else "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
    )
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "imported\n"
    line = process.stdout.readline()
    assert line.strip().isdigit(), process.stderr.read()
    pid = int(line)
    if end == "kill -9":
        process.kill()
    elif end == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    rest, errors = process.communicate(timeout=30)
    assert rest == ""
    if end == "exit":
        assert process.returncode == 0, errors
    assert _gone(pid)
