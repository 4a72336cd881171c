"""Several processes are one run: what they tell each other, what they make together.

Each process here is a real one, with CPU devices of its own, over loopback.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
from run_processes import TALK, finish, free_port, launch, slurm_of, start_as, talk
from small_runs import ROOT, SMALL, write_questions

from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError

# -- shares ---------------------------------------------------------------------------


@pytest.mark.parametrize("items, group, of", [(64, 8, 3), (64, 64, 4), (7, 1, 2)])
def test_shares_are_everything_once_and_nearly_equal(items, group, of):
    parts = [processes.share_of(items, group, i, of) for i in range(of)]
    assert [i for p in parts for i in range(items)[p]] == list(range(items))
    sizes = [p.stop - p.start for p in parts]
    whole = items // group >= of
    assert max(sizes) - min(sizes) <= (group if whole else 1)
    assert not whole or all(p.start % group == 0 for p in parts)


# -- what processes tell each other, and their end ------------------------------------

TELL = """
asked = []
def work(items):
    asked.extend(items)
    return [i * i for i in items]
print(processes.all_gather({"n": number, "x": float("nan") if number else 0.1}))
print(processes.map_divided(work, list(range(7))), asked)
print(processes.broadcast(lambda: ["of", number]))
for i in range(50):
    assert processes.all_gather(i * number) == [i * k for k in range(count)]
processes.check_equal("data", {"rows": [1, 2], "name": "a"})
processes.print_once("once")
processes.check_equal("data", {"rows": [1, 2 + (number == 2)], "name": "a"})
"""
AWAY = """
processes.all_gather("here")
if number == 1:
    os.kill(os.getpid(), 9)
processes.all_gather("and now")
"""


def test_processes_exchange_divide_and_agree():
    """Three of them, and what the third one has is not what the first has."""
    found = finish(talk(TELL, 3))
    for i, process in enumerate(found):
        lines = process.out.splitlines()
        assert lines[0] == (
            "[{'n': 0, 'x': 0.1}, {'n': 1, 'x': nan}, {'n': 2, 'x': nan}]"
        )
        mine = [[0, 1], [2, 3], [4, 5, 6]][i]
        assert lines[1] == f"{[n * n for n in range(7)]} {mine}"
        assert lines[2] == "['of', 0]"
        assert lines[3:] == ["once"] * (i == 0)
        assert process.code == 1
        told = "error: data: process 2 has not what process 0 has (rows); start all"
        assert process.err.count(told) == 1, process.err


def test_the_end_of_one_is_the_end_of_all():
    """A process that raises, one that is killed, one that never comes: all at once."""
    began = time.monotonic()
    raises = talk(
        "processes.all_gather(1)\n1 / (1 - number)\nprocesses.all_gather(2)", 2
    )
    killed, alone = talk(AWAY, 2), talk("print('started')", 2, numbers=[1])
    waits, divides = finish(raises)
    for process in (waits, divides):
        assert process.code == 1
        line = "process 1 of 2: ZeroDivisionError: division by zero"
        assert process.err.count(line) == 1
    assert "Traceback" in divides.err and "Traceback" not in waits.err
    left, gone = finish(killed)
    assert gone.code == -9 and left.code not in (0, None)
    assert "stopped sending heartbeats" in left.err or "process 0 of 2" in left.err
    (late,) = finish(alone)
    assert late.code == 1 and "started" not in late.out
    assert re.match(r"error: no process 0 came within 8 s", late.err), late.err
    assert time.monotonic() - began < 60


def test_a_cluster_says_which_process_is_which():
    """SLURM's own variables, no flags; without them a process is alone."""
    command = [
        "-c",
        TALK,
        "",
        "0",
        "0",
        "print(processes.all_gather(processes.process_index()))",
    ]
    two = [launch(command, 1, ROOT, **one) for one in slurm_of(2)]
    (alone,) = finish([launch(command, devices=1)])
    assert (alone.code, alone.out) == (0, "[0]\n"), alone.err
    for process in finish(two):
        assert (process.code, process.out) == (0, "[0, 1]\n"), process.err


def test_wrong_counts_and_numbers_end_in_one_line():
    """Two counts, one number twice, two processes 0: none hangs, none ends in C++."""
    what = "print(processes.all_gather(processes.process_index()))"
    counts = start_as(what, [(2, 0), (3, 1)])
    twice = start_as(what, [(3, 0), (3, 1), (3, 1)])
    firsts = start_as(what, [(2, 0), (2, 0)])
    for process in finish(counts):
        line = "error: process 1 was told --num_processes 3, and process 0 2; give all"
        assert process.err.startswith(line) and process.err.count("\n") == 1
        assert (process.code, process.out) == (1, "")
    for process in finish(twice):
        line = "error: --process_id 1 was given to two processes; give each of the 3"
        assert process.err.startswith(line) and process.err.count("\n") == 1
        assert (process.code, process.out) == (1, "")
    told = [process.err for process in finish(firsts)]
    assert all(line.count("\n") == 1 for line in told)
    assert sum("process 0 cannot listen at 127.0.0.1:" in line for line in told) == 1
    assert sum("within 8 s (--wait): process 1 of 2 did not" in x for x in told) == 1


def test_an_address_in_parts_is_refused():
    for given in [("h:1", 2, None), ("h:1", None, None), (None, 2, 0)]:
        with (
            pytest.raises(GrpoError, match="give all three"),
            processes.connect_processes(*given),
        ):
            pass
    for given in [("h:1", 2, 2), ("h", 2, 0), ("h:1", 2, -1)]:
        with (
            pytest.raises(GrpoError, match="host:port"),
            processes.connect_processes(*given),
        ):
            pass


# -- a run -----------------------------------------------------------------------------

SFT_STEPS, RL_STEPS = 6, 4
SIZES = SMALL | {
    "sft_steps": SFT_STEPS,
    "rl_steps": RL_STEPS,
    "max_new_tokens": 8,
    "eval.questions": 8,
    "eval.batch": 8,
    "eval.every": 4,
    "optimizer.micro_rows": 2,
    "sft.micro_rows": 2,
    "mesh.data": 2,
    "checkpoint_every": 100,  # only where a stage stops
}
# A user's reward, which writes down what it sees. STOP=CALL: at that call the process
# is sent SIGTERM, as by a scheduler.
REWARDS = """
import json, os, signal
calls = 0

def length(prompts, completions, **columns):
    global calls
    calls += 1
    if os.environ.get("STOP") == str(calls):
        os.kill(os.getpid(), signal.SIGTERM)
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps([prompts, completions]) + "\\n")
    return [len(completion) / 10 for completion in completions]
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    write_questions(folder / "sums.jsonl")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def start(
    here: Path,
    name: str,
    count: int,
    *flags: str,
    stop: Mapping[int, int] = MappingProxyType({}),
    own: Mapping[int, list[str]] = MappingProxyType({}),
    folders: Mapping[int, Path] = MappingProxyType({}),
) -> list[subprocess.Popen]:
    """train.py as `count` processes with four devices in all.

    By process: at which reward call it is told to stop, flags and folder of its own.
    """
    questions = str(here / "sums.jsonl")
    settings = SIZES | {
        "data.train": questions,
        "data.sft": questions,
        "data.eval": questions,
        "rewards.functions": f"rule,{here / 'rewards.py'}:length",
        "rewards.weights": "1.0,0.1",
    }
    command = [str(ROOT / "train.py"), "--config", str(ROOT / "configs/tiny.py")]
    command += ["--workdir", str(here / name)]
    command += [f"--config.{k}={v}" for k, v in settings.items()]
    if count > 1:
        where = f"127.0.0.1:{free_port()}"
        command += [f"--coordinator={where}", f"--num_processes={count}"]
    started = []
    for i in range(count):
        more = [f"--process_id={i}"] if count > 1 else []
        more += [*flags, *own.get(i, ())]
        environment = {
            "SEEN": str(here / f"{name}.{i}.seen"),
            "STOP": str(stop.get(i, "")),
        }
        folder = folders.get(i, ROOT)
        started.append(launch([*command, *more], 4 // count, folder, **environment))
    return started


# What Gloo's threads say on the same pipe, their words between one another's.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |[\d\s]"
    r"|Expected number of connected peer ranks is : "
)


def lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps(workdir: Path, stage: str) -> list[int]:
    return sorted(map(int, os.listdir(workdir / "checkpoints" / stage)))


@pytest.fixture(scope="module")
def alone(here):
    """The run as one process with the same four devices."""
    (run,) = finish(start(here, "alone", 1))
    assert run.code == 0, run.err
    run.dir = here / "alone"
    return run


@pytest.fixture(scope="module")
def shared(here):
    """Two processes, of which one is told to stop; one goes on; then two again."""
    folder, ends = here / "shared", []
    for count, stop in ((2, {1: 1}), (1, {0: 1}), (2, {})):
        done = finish(start(here, "shared", count, stop=stop))
        assert [p.code for p in done] == [0] * count, [p.err for p in done]
        ends.append(SimpleNamespace(processes=done, rl=steps(folder, "rl")))
    return SimpleNamespace(dir=folder, ends=ends)


def test_sigterm_on_one_host_saves_the_same_step_on_all(shared, here):
    """Fault 38; and what two processes wrote, one reads, and two again (fault 17)."""
    first, second, last = shared.ends
    (step,) = first.rl  # of the signal, or the next if it took so long to all
    assert step in (1, 2)
    assert second.rl == [step, step + 1]
    assert f"rl: stopped after step {step};" in first.processes[0].out
    assert f"rl: resumed at step {step} of 4" in second.processes[0].out
    assert f"rl: resumed at step {step + 1} of 4" in last.processes[0].out


def test_two_processes_get_the_metrics_of_one(alone, shared):
    one, two = (lines(run.dir / "metrics.jsonl") for run in (alone, shared))
    where = [("sft", i + 1) for i in range(SFT_STEPS)]
    where += [("rl", i + 1) for i in range(RL_STEPS)]
    assert [(r["stage"], r["step"]) for r in one] == where
    assert [(r["stage"], r["step"]) for r in two] == where
    assert len({r["reward"] for r in one[SFT_STEPS:]}) > 1  # it is not a trivial run
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"step_time", "stage"}:
            if "time/" not in name:
                tight = dict(rel=1e-4, abs=2e-6)  # the order of sums
                assert b[name] == pytest.approx(a[name], **tight), name
    shown = [lines(run.dir / "samples.jsonl") for run in (alone, shared)]
    for a, b in zip(*shown, strict=True):
        texts = [[c["completion"] for c in row["completions"]] for row in (a, b)]
        assert texts[0] == texts[1]
    results = [
        json.loads((r.dir / "results.json").read_text()) for r in (alone, shared)
    ]
    assert results[0] == results[1]


def test_each_grades_its_own_and_the_first_alone_writes(alone, shared, here):
    """Of step 1, which both runs graded, a half for each, with its groups whole."""
    prompts, completions = lines(here / "alone.0.seen")[0]
    halves = [lines(here / f"shared.{i}.seen")[0] for i in range(2)]
    assert [len(half[0]) for half in halves] == [len(prompts) // 2] * 2
    assert halves[0][0] + halves[1][0] == prompts
    assert halves[0][1] + halves[1][1] == completions
    for end in shared.ends:
        for process in end.processes[1:]:
            assert GLOO.sub("", process.out) == ""
    board = list((shared.dir / "tensorboard").iterdir())
    assert len(board) == len(shared.ends)  # a file each start, of process 0


# STOP: the process is sent SIGTERM, as by a scheduler, after the first completions, and
# is slow enough for the others to hear of it before all is asked.
EVALUATE = """
import os, signal, time
from grpo_jax.evaluation import completion_files
from grpo_jax import evaluate
from grpo_jax.evaluation.completion_files import CompletionLog
append = CompletionLog.append
def and_stop(log, *batch, **about):
    append(log, *batch, **about)
    if os.environ.get("STOP"):
        time.sleep(0.3)
        if len(log.rows) < 10:
            os.kill(os.getpid(), signal.SIGTERM)
CompletionLog.append = and_stop
evaluate.main()
"""


def test_an_evaluation_stops_on_all_hosts_and_goes_on(shared, here):
    """Two processes as SLURM starts them, one of which is stopped; then one alone."""
    out = here / "evaluated"
    words = ["--models", str(shared.dir), "--sets", str(here / "sums.jsonl")]
    words += ["--questions", "48", "--max_new_tokens", "8", "--batch", "2"]
    command = ["-c", EVALUATE, *words, "--out", str(out)]
    first, second = slurm_of(2)
    two = finish(
        [launch(command, 2, ROOT, **e) for e in (first, second | {"STOP": "1"})]
    )
    for process in two:
        assert process.code == 143, process.err
    assert "stopped; the same command goes on from there" in two[0].out
    assert not (out / "results.json").exists()
    (file,) = out.rglob("*.greedy.jsonl")
    written = lines(file)
    assert 8 <= len(written) - 1 < 48
    (alone,) = finish([launch(command, 4)])
    assert alone.code == 0, alone.err
    rows = lines(file)
    assert rows[: len(written)] == written  # what two processes wrote, one goes on from
    assert sorted(row["index"] for row in rows[1:]) == list(range(48))
    (before,) = (shared.dir / "completions" / "rl").rglob("*.greedy.jsonl")
    told = {row["index"]: row["completions"] for row in rows[1:]}
    asked = lines(before)[1:]
    assert len(asked) == 8
    assert [told[row["index"]] for row in asked] == [r["completions"] for r in asked]
    results = json.loads((out / "results.json").read_text())
    ((_, row),) = results["sets"].items()
    assert row["shared"]["n"] == 48
    # All see what the first one wrote, also where nothing is left to ask.
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    numbers = [f"--process_id={i}" for i in range(2)]
    again = finish([launch([*command, *flags, number], 2) for number in numbers])
    for process in again:
        assert process.code == 0, process.err
    assert "| set |" in again[0].out and "| set |" not in again[1].out
    assert json.loads((out / "results.json").read_text()) == results


def test_hosts_that_do_not_match_are_refused(here, tmp_path):
    """Another config (fault 42), a disk of its own: by name, and nothing is trained."""
    rate = ["--config.learning_rate=1e-4"]
    other = start(here, "other", 2, own={1: rate})
    apart = start(here, "apart", 2, "--workdir=apart", folders={1: tmp_path})
    try:
        for process in finish(other):
            told = "config: process 1 has not what process 0 has (learning_rate); start"
            assert process.code == 1 and told in process.err, process.err
        assert not (here / "other").exists()
        for process in finish(apart):
            told = "workdir apart: process 1 does not see what process 0 writes there"
            assert process.code == 1 and told in process.err, process.err
    finally:
        shutil.rmtree(ROOT / "apart", ignore_errors=True)
