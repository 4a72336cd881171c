"""A run of two processes that is stopped again and again ends in the same bits.

SIGTERM to one of them, at a moment of each kind: both save the same step and exit 0.
Where there is no time for that, the last interval's checkpoint stands.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import finish, free_port, launch
from small_runs import ROOT, SMALL, write_questions

SFT_STEPS, RL_STEPS, EVALUATED = 4, 7, 6
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
STOPS = [  # the signals by process, and the steps of SFT and RL that are then saved
    ({0: "sft lay_out 2 SIGTERM"}, (2, None)),
    ({1: "experience draw 1 SIGTERM"}, (SFT_STEPS, 1)),  # in the rollout
    ({0: "rl check_gap 1 SIGTERM"}, (SFT_STEPS, 2)),  # in the update
    ({1: "checkpoint _describe 1 SIGTERM"}, (SFT_STEPS, 5)),  # as step 4 is saved
    ({0: "comparison evaluate_set 1 SIGTERM"}, (SFT_STEPS, EVALUATED)),
]
LATE = {0: "experience draw 4 SIGTERM", 1: "experience draw 4 SIGKILL"}


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
    for stop, saved in STOPS:
        done = start(folder, "stopped", stop)
        assert [p.code for p in done] == [0, 0], [p.err for p in done]
        stage = "sft" if saved[1] is None else "rl"
        (line,) = [x for x in done[0].out.splitlines() if "; the same command" in x]
        assert line.startswith(f"{stage}: stopped after step {newest(folder, stage)};")
        assert tuple(newest(folder, stage) for stage in ("sft", "rl")) == saved
    for process in start(folder, "stopped", {}):
        assert process.code == 0, process.err
    return folder


def newest(folder: Path, stage: str, name: str = "stopped") -> int | None:
    steps = folder / name / "checkpoints" / stage
    return max(map(int, os.listdir(steps))) if steps.exists() else None


def leaves(folder: Path, name: str, stage: str) -> dict[str, list]:
    """Of each leaf its kind and checksum: parameters, optimiser state, step."""
    step = newest(folder, stage, name)
    file = folder / name / "checkpoints" / stage / str(step) / "_CHECKPOINT_METADATA"
    return json.loads(file.read_text())["custom_metadata"]["record"]["leaves"]


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    """What a step gave; without times, and an evaluation, which a stop cuts off."""
    rows = map(json.loads, (folder / name / "metrics.jsonl").open())
    unlike = ("time", "step_time", "eval")
    return [{k: v for k, v in row.items() if not k.startswith(unlike)} for row in rows]


def test_stops_at_any_moment_change_nothing(runs):
    for stage, steps in (("sft", SFT_STEPS), ("rl", RL_STEPS)):
        assert newest(runs, stage) == newest(runs, stage, "whole") == steps
        found = leaves(runs, "stopped", stage)
        assert found == leaves(runs, "whole", stage) and len(found) > 30
    assert metrics(runs, "stopped") == metrics(runs, "whole")
    assert len(metrics(runs, "whole")) == SFT_STEPS + RL_STEPS


def test_a_stop_without_time_to_save_loses_no_checkpoint(runs):
    """SIGTERM to one process as the other is killed: then they go on from step 2."""
    first, second = start(runs, "late", LATE)
    assert second.code == -9 and first.code not in (0, None), first.err
    assert newest(runs, "rl", "late") == 2
    again = start(runs, "late", {})
    assert [p.code for p in again] == [0, 0], [p.err for p in again]
    assert "rl: resumed at step 2 of" in again[0].out
    assert leaves(runs, "late", "rl") == leaves(runs, "whole", "rl")
    assert metrics(runs, "late") == metrics(runs, "whole")
