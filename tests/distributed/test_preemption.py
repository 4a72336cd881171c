"""A run of two processes that is stopped again and again ends in the same bits.

SIGTERM to one of them, at a moment of each kind: both save the same step and exit 0.
Where one is killed and there is no time for that, the last checkpoint stands.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_processes import finish, free_port, launch
from small_runs import ROOT, SMALL, write_questions

SFT_STEPS, RL_STEPS, EVALUATED = 4, 9, 8
SIZES = SMALL | {
    "sft_steps": SFT_STEPS,
    "rl_steps": RL_STEPS,
    "checkpoint_every": 2,
    "questions_per_step": 4,
    "max_new_tokens": 8,
    "eval.questions": 8,
    "eval.batch": 2,  # an evaluation asks after each of four parts whether to stop
    "eval.every": EVALUATED,
    "optimizer.micro_rows": 2,
    "sft.micro_rows": 2,
    "mesh.data": 2,
}
# train.py, in which STOP="module function call signal" has the process send itself a
# signal in that call of that function, and gives the notice time to reach all.
RUN = """
import os, signal, sys, time
from importlib import import_module
from grpo_jax import train
if "STOP" in os.environ:
    module, name, call, what = os.environ["STOP"].split()
    module = import_module("grpo_jax." + module)
    real, calls = getattr(module, name), []
    def stopped(*arguments, **options):
        calls.append(name)
        if len(calls) == int(call):
            os.kill(os.getpid(), getattr(signal, what))
            time.sleep(2)
        return real(*arguments, **options)
    setattr(module, name, stopped)
sys.argv[0] = "train.py"
train.main()
"""
STOPS = [  # the process and its signal, the stage that stops and from which step on
    (0, "training.sft pack_sft_batch 2 SIGTERM", "sft", 2),
    (1, "training.rollouts generate 1 SIGTERM", "rl", 1),  # in the rollout
    (0, "training.rl_step check_gap 1 SIGTERM", "rl", 2),  # in the update
    (
        1,
        "checkpoints.run_checkpoints checksum_leaves 3 SIGTERM",
        "rl",
        4,
    ),  # a save, after two checks of saved
    (0, "training.run_comparison evaluate_set 1 SIGTERM", "rl", EVALUATED),
]
KILL = {
    0: "training.rollouts generate 2 SIGTERM",
    1: "training.rollouts generate 2 SIGKILL",
}


def start(folder: Path, name: str, stop: dict[int, str]) -> list[SimpleNamespace]:
    """Both processes, until their end."""
    questions = str(folder / "sums.jsonl")
    data = dict.fromkeys(("data.train", "data.sft", "data.eval"), questions)
    command = ["-c", RUN, "--config", str(ROOT / "configs/tiny.py")]
    command += ["--workdir", str(folder / name), "--heartbeat=8"]
    command += [f"--config.{k}={v}" for k, v in (SIZES | data).items()]
    command += [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    told = [{"STOP": stop[i]} if i in stop else {} for i in range(2)]
    ranks = [[*command, f"--process_id={i}"] for i in range(2)]
    return finish([launch(ranks[i], 2, ROOT, **told[i]) for i in range(2)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work directories: of a run without a stop, and of one with all of them."""
    folder = tmp_path_factory.mktemp("stops")
    write_questions(folder / "sums.jsonl")
    for process in start(folder, "whole", {}):
        assert process.code == 0, process.err
    for number, where, stage, step in STOPS:
        done = start(folder, "stopped", {number: where})
        assert [p.code for p in done] == [0, 0], [p.err for p in done]
        saved = newest(folder, stage)
        assert f"{stage}: stopped after step {saved}; the same command" in done[0].out
        assert step <= saved  # the notice takes a second or two
        if "check_gap" in where:
            lose_a_process(folder, saved)
    for process in start(folder, "stopped", {}):
        assert process.code == 0, process.err
    return folder


def lose_a_process(folder: Path, saved: int) -> None:
    """SIGTERM to one as the other is killed: no time to save, and nothing is lost."""
    first, second = start(folder, "stopped", KILL)
    assert second.code == -9 and first.code not in (0, None), first.err
    assert saved <= newest(folder, "rl") <= saved + 1  # of the interval


def newest(folder: Path, stage: str, name: str = "stopped") -> int:
    """The newest finished checkpoint."""
    names = os.listdir(folder / name / "checkpoints" / stage)
    return max(int(name) for name in names if name.isdigit())


def leaves(folder: Path, name: str, stage: str) -> dict[str, list]:
    """Of each leaf its kind and checksum: parameters, optimiser state, step."""
    step = newest(folder, stage, name)
    file = folder / name / "checkpoints" / stage / str(step) / "_CHECKPOINT_METADATA"
    return json.loads(file.read_text())["custom_metadata"]["record"]["leaves"]


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    """What a step gave and its evaluation, without times."""
    rows = map(json.loads, (folder / name / "metrics.jsonl").open())
    unlike = ("time", "step_time")
    return [{k: v for k, v in row.items() if not k.startswith(unlike)} for row in rows]


def test_stops_at_any_moment_change_nothing(runs):
    for stage, steps in (("sft", SFT_STEPS), ("rl", RL_STEPS)):
        assert newest(runs, stage) == newest(runs, stage, "whole") == steps
        found = leaves(runs, "stopped", stage)
        assert found == leaves(runs, "whole", stage) and len(found) > 30
    assert metrics(runs, "stopped") == metrics(runs, "whole")
    assert len(metrics(runs, "whole")) == SFT_STEPS + RL_STEPS
    names = {name.partition("/")[0] for name in metrics(runs, "stopped")[-2]}
    assert "eval" in names  # of the step whose evaluation was stopped
