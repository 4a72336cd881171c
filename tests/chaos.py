"""Kills a run at random moments and compares what it ends with: `make chaos`.

    PYTHONPATH=tests/helpers python tests/chaos.py [--kills 20] [--processes 2]

In: a config, a number of kills and a seed. Out: whether the run that was killed (-9)
and started again each time has the same SHA-256 over parameters, optimiser state and
step as one that nothing disturbed, and wrote the same lines and results.

A kill comes a random while after the n-th time that a process says it enters a phase:
an SFT step, a rollout, the rewards, an update, a save, an evaluation. Of two processes
one is killed, whose end must be the other's too, or both are at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from run_processes import CACHE, free_port
from small_runs import ROOT

PHASES = ("sft", "save", "rollout", "reward", "update", "evaluation")
WITHIN = 3600.0  # seconds until a run reaches what it is to be killed in
# train.py, which says in a pipe of its own what it is about to do.
TELLING = """
import os
from grpo_jax.training import rl_programs, rollout_pipeline, run_comparison, sft
from grpo_jax.checkpoints.run_checkpoints import CheckpointDirectory
from grpo_jax.training.rollouts import RolloutSource
from grpo_jax.train import main

def tell(owner, name, phase, when=lambda *a, **k: True):
    inner = getattr(owner, name)
    def outer(*arguments, **options):
        if when(*arguments, **options):
            os.write(int(os.environ["TELL"]), phase.encode() + b"\\n")
        return inner(*arguments, **options)
    setattr(owner, name, outer)

tell(sft, "pack_sft_batch", "sft")
tell(CheckpointDirectory, "save", "save",
     lambda self, step, *_, force=False: force or step % self._every == 0)
tell(rollout_pipeline.RolloutPipeline, "take_rollout", "rollout")
tell(RolloutSource, "score_rollout", "reward")
tell(rl_programs.BatchLayout, "__call__", "update")
tell(run_comparison, "measure_set", "evaluation")
main()
"""
# The demo with fewer and smaller steps, and with saves and evaluations that come often.
TINY: dict[str, Any] = {
    "sft_steps": 60,
    "rl_steps": 60,
    "questions_per_step": 16,
    "optimizer.micro_rows": 16,
    "checkpoint_every": 5,
    "data.eval": "sums/chain+sums/zh",
    "eval.every": 10,
    "eval.questions": 64,
    "eval.batch": 64,
    "eval.samples": 0,
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """Of one process, or of all: so long after a phase has begun for the n-th time."""

    phase: str
    number: int
    share: float  # of the phase's usual time
    victim: int | None  # None is all of them
    warned: bool = False  # SIGTERM comes first, too late for a step to end and be saved


def plan(kills: int, processes: int, seed: int, steps: Mapping[str, int]) -> list[Kill]:
    """The kills in the order of a run: SFT, then RL, then the comparison.

    steps: of each phase, how often a start may enter it before it is killed.
    """
    rng = random.Random(seed)
    first, last = max(1, kills // 6), max(1, kills // 6)
    phases = [("sft", "save")[i % 2] for i in range(first)]
    middle = kills - first - last
    phases += [("rollout", "save", "reward", "update")[i % 4] for i in range(middle)]
    phases += ["evaluation"] * last
    victims: list[int | None] = [*range(processes), None] if processes > 1 else [None]
    return [
        Kill(phase, rng.randint(1, steps[phase]), rng.random(), rng.choice(victims))
        for phase in phases
    ]


class Start:
    """One start of the run: its processes, and what they say they are doing."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], processes: int):
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-c", TELLING, "--config=configs/tiny.py", *flags]
        command += [f"--workdir={folder}"]
        if processes > 1:
            where = f"127.0.0.1:{free_port()}"
            command += [f"--coordinator={where}", f"--num_processes={processes}"]
            command += ["--heartbeat=10", "--wait=120"]
        flags = os.environ.get("XLA_FLAGS", "").split()  # those of pytest compile fast
        flags = [flag for flag in flags if "device_count" not in flag]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": " ".join(flags),
            "JAX_COMPILATION_CACHE_DIR": CACHE,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.pipes: list[int] = []
        self.processes: list[subprocess.Popen] = []
        names = [f"{folder.name}.{i}.log" for i in range(processes)]
        self.logs = [folder.with_name(name) for name in names]
        for i, log in enumerate(self.logs):
            read, write = os.pipe()
            more = [f"--process_id={i}"] if processes > 1 else []
            with open(log, "ab") as said:
                process = subprocess.Popen(
                    [*command, *more],
                    cwd=ROOT,
                    env=environment | {"TELL": str(write)},
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=[write],
                    start_new_session=True,
                )
            os.close(write)
            self.pipes.append(read)
            self.processes.append(process)

    def phases(self, number: int, within: float = WITHIN):
        """(time, phase) as that process enters them, to its end."""
        end = time.monotonic() + within
        rest = b""
        while True:
            ready, _, _ = select.select([self.pipes[number]], [], [], 1.0)
            if ready:
                told = os.read(self.pipes[number], 65536)
                now = time.monotonic()
                if not told:
                    return
                *lines, rest = (rest + told).split(b"\n")
                yield from ((now, line.decode()) for line in lines)
            elif time.monotonic() > end:
                self.close()
                raise AssertionError(f"nothing within {within} s: {self.tail()}")

    def close(self, within: float = 0.0) -> list[int]:
        """The exit codes; after `within` seconds without an end it is made one."""
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(within))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        for pipe in self.pipes:
            os.close(pipe)
        self.pipes = []
        return codes

    def tail(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in self.logs)


def orphans(sessions: Sequence[int], within: float = 10.0) -> list[int]:
    """The processes that outlive the runs that started them."""
    end = time.monotonic() + within
    while True:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in sessions and fields[0] != "Z":
                found.append(int(entry.name))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.05)


def straight(folder: Path, settings: Mapping[str, Any], processes: int):
    """The run that nothing disturbs; returns how long each phase takes, usually."""
    start = Start(folder, settings, processes)
    told = list(start.phases(0))
    assert start.close(60) == [0] * processes, start.tail()
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for (begin, phase), (end, _) in zip(told, told[1:], strict=False):
        times[phase].append(end - begin)
    return {phase: statistics.median(found) for phase, found in times.items() if found}


def disturbed(
    folder: Path,
    settings: Mapping[str, Any],
    processes: int,
    kills: Sequence[Kill],
    usual: Mapping[str, float],
    say=print,
) -> int:
    """The same run, killed so often; how many of the kills met a run that went on."""
    met = 0
    for kill in kills:
        start = Start(folder, settings, processes)
        victims = range(processes) if kill.victim is None else [kill.victim]
        entered = 0
        for _, phase in start.phases(victims[0]):
            entered += phase == kill.phase
            if entered == kill.number:
                break
        time.sleep(kill.share * usual.get(kill.phase, 0.1))
        signals = [signal.SIGTERM] * kill.warned + [signal.SIGKILL]
        for number in signals:
            for victim in victims:
                start.processes[victim].send_signal(number)
            time.sleep(0.002)
        began = time.monotonic()
        sessions = [process.pid for process in start.processes]
        codes = start.close(90)
        killed = [codes[victim] == -signal.SIGKILL for victim in victims]
        met += any(killed)
        others = [code for i, code in enumerate(codes) if i not in victims]
        if any(killed):
            assert 0 not in others, f"one went on alone: {codes} {start.tail()}"
        left = orphans(sessions)
        assert not left, f"processes {left} outlive the run"
        rows = lines(folder, "metrics.jsonl", whole=False)
        at = f"{rows[-1]['stage']} {rows[-1]['step']}" if rows else "the start"
        say(
            f"kill {met}: {kill.phase} {kill.number}, process "
            f"{'all' if kill.victim is None else kill.victim}, after {at}; "
            f"codes {codes}, all gone in {time.monotonic() - began:.1f} s",
            flush=True,
        )
    start = Start(folder, settings, processes)
    list(start.phases(0))
    assert start.close(60) == [0] * processes, start.tail()
    return met


# -- what must be the same -------------------------------------------------------------


def digest(workdir: Path, stage: str) -> str:
    """SHA-256 over the newest checkpoint of a stage: parameters, optimiser, step."""
    import jax
    import numpy as np

    from grpo_jax.training.optimizers import stage_optimizer
    from grpo_jax.training.run import open_run

    run = open_run(workdir)
    optimizer, _ = stage_optimizer(stage, run.config)
    with run.checkpoints(stage, clean=False) as checkpoints:
        step, state, _ = checkpoints.restore(run.abstract_state(stage, optimizer))
    sha = hashlib.sha256(str(step).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        sha.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def lines(workdir: Path, file: str, *, whole: bool = True) -> list[dict[str, Any]]:
    """A file's lines without what they say of time; `whole`: none may be cut off."""
    path = workdir / file
    text = path.read_text() if path.exists() else ""
    assert text.endswith("\n") or not whole
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    return [
        {k: v for k, v in r.items() if k != "step_time" and not k.startswith("time/")}
        for r in rows
    ]


def compare(one: Path, other: Path) -> dict[str, str]:
    """Raises where two runs differ; returns their SHA-256 by stage."""
    for file in ("metrics.jsonl", "samples.jsonl"):
        pairs = [lines(workdir, file) for workdir in (one, other)]
        for a, b in zip(*pairs, strict=True):
            names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
            assert not names, f"{file}: {a['stage']} step {a['step']}: {names} differ"
    results = [(workdir / "results.json").read_text() for workdir in (one, other)]
    assert results[0] == results[1], "results.json differs"
    sums = [{s: digest(w, s) for s in ("sft", "rl")} for w in (one, other)]
    assert sums[0] == sums[1], f"the states differ: {sums}"
    return sums[0]


def chaos(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    processes: int,
    kills: Sequence[Kill],
    say=print,
) -> dict[str, str]:
    """Both runs and their comparison; every kill must have met a running process."""
    begin = time.monotonic()
    usual = straight(folder / "straight", settings, processes)
    times = ", ".join(f"{name} {1000 * t:.0f} ms" for name, t in usual.items())
    say(f"undisturbed: {time.monotonic() - begin:.0f} s ({times})", flush=True)
    met = disturbed(folder / "killed", settings, processes, kills, usual, say)
    assert met == len(kills), f"{len(kills) - met} kills met a run that had ended"
    return compare(folder / "straight", folder / "killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kills", type=int, default=20)
    add("--processes", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--out", default="runs/chaos", help="must be new")
    flags = parser.parse_args()
    folder = Path(flags.out).resolve() / f"{flags.processes}-processes-{flags.seed}"
    folder.mkdir(parents=True)
    settings = TINY | {"mesh.data": flags.processes}
    often = dict(sft=20, save=3, rollout=6, reward=6, update=6, evaluation=2)
    kills = plan(flags.kills, flags.processes, flags.seed, often)
    begin = time.monotonic()
    sums = chaos(folder, settings, processes=flags.processes, kills=kills)
    for stage, text in sums.items():
        print(f"{stage}: SHA-256 {text} in both")
    print(f"the same after {len(kills)} kills; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
