"""A whole run as a stranger sees it: train.py, killed, stopped, moved, exported.

One run goes straight through on one device; the others must come to the same bits, or
say in one line why not. Runs of one device are processes of their own, those of eight
run in here.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from report_cases import Page
from small_runs import ROOT, SMALL, dotted, small_config, write_questions
from tensorboardX.proto import event_pb2
from xla_flags import xla_flags

from grpo_jax import evaluate, export
from grpo_jax.distributed.folder_lock import lock_folder
from grpo_jax.errors import GrpoError
from grpo_jax.train import train_run
from grpo_jax.training.run import load_run

CACHE = str(ROOT / ".pytest_cache" / "jax")  # as in conftest.py
SFT_STEPS, RL_STEPS = 24, 4
SIZES = SMALL | {
    "sft_steps": SFT_STEPS,
    "sft.schedule": "constant",
    "rl_steps": RL_STEPS,
    "rewards.weights": "1.0,0.1",
}
# Rewards that a user wrote, in a file of their own. SEND=SIGNAL@CALL sends the run a
# signal in the middle of a step, as the terminal or the scheduler would.
REWARDS = """
import os

calls = 0

def length(prompts, completions, answer, **columns):
    global calls
    calls += 1
    signal, _, call = os.environ.get("SEND", "").partition("@")
    if call and calls == int(call):
        os.killpg(os.getpgrp(), int(signal))
    return [len(completion) / 10 for completion in completions]

def broken(prompts, completions, **columns):
    return 1 / 0

def short(prompts, completions, **columns):
    return [1.0]
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of the runs: questions that a tiny model can learn, and rewards."""
    folder = tmp_path_factory.mktemp("runs")
    write_questions(folder / "sums.jsonl")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def overrides(here: Path) -> dict[str, object]:
    questions = str(here / "sums.jsonl")
    return SIZES | {
        "data.train": questions,
        "data.sft": questions,
        "data.eval": f"{questions}+sums/chain",
        "rewards.functions": f"rule,{here / 'rewards.py'}:length",
    }


def start(here: Path, name: str, *flags: str, **environment: str) -> subprocess.Popen:
    """train.py on one device, as a process (group) of its own."""
    environment |= {
        "XLA_FLAGS": xla_flags(),
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    settings = [f"--config.{k}={v}" for k, v in overrides(here).items()]
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", *settings]
    return subprocess.Popen(
        [*command, "--workdir", str(here / name), *flags],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell that runs pytest in the background has it ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen) -> SimpleNamespace:
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def train_here(here: Path, workdir: Path, accept: bool = False, **changes) -> None:
    """The same run in this process, on eight devices; `changes`: name__inner=value."""
    config = small_config(overrides(here) | dotted(changes))
    train_run(config, workdir, accept_changes=accept)


@pytest.fixture(autouse=True)
def no_cache_at_home(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)


@pytest.fixture(scope="module")
def straight(here):
    """The run that nothing disturbs."""
    run = finish(start(here, "straight"))
    assert run.code == 0, run.err
    run.dir = here / "straight"
    return run


def copy(straight, workdir: Path, *, rl: bool = True) -> Path:
    """The straight run's directory; without `rl`, as it was after the Instruct stage.

    results.json stays, so that nothing is evaluated again.
    """
    shutil.copytree(straight.dir, workdir)
    if not rl:
        shutil.rmtree(workdir / "checkpoints/rl")
    return workdir


def lines(workdir: Path, file: str = "metrics.jsonl", stage: str = "") -> list[dict]:
    rows = [json.loads(line) for line in (workdir / file).read_text().splitlines()]
    return [row for row in rows if stage in ("", row["stage"])]


def timeless(rows: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in r.items() if k != "step_time" and not k.startswith("time/")}
        for r in rows
    ]


def digest(workdir: Path) -> str:
    """SHA-256 of the newest model's parameters."""
    _, params, _ = load_run(workdir)
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sha.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


METRICS = """
    loss policy_loss reward reward_std rewards/rule_reward/mean rewards/length/mean
    frac_reward_zero_std kl entropy clip_ratio/low_mean clip_ratio/high_mean
    clip_ratio/region_mean completions/mean_length completions/min_length
    completions/max_length completions/clipped_ratio num_tokens step_time grad_norm
    learning_rate sampling/sampling_logp_difference/mean
    sampling/sampling_logp_difference/max update/padding
""".split()


def zip_known(completion):
    return zip(completion["logps"], completion["ref_logps"], strict=True)


def test_a_run_leaves_a_report(straight):
    page = Page((straight.dir / "report.html").read_text(encoding="utf-8"))
    rewards = [row["reward"] for row in lines(straight.dir, stage="rl")]
    drawn = page.data["charts"][0]["lines"][0]
    assert drawn["label"] == "reward" and drawn["y"] == pytest.approx(rewards, rel=1e-5)
    assert [g["step"] for g in page.data["groups"]] == [1, 2, 3, 4]
    accuracy = re.findall(r"[\d.]+ ± [\d.]+", table(straight.out)[2])
    assert set(accuracy) <= {" ".join(cell.split()) for cell in page.cells}


def test_a_run_writes_down_what_it_did(straight, here):
    """Every step of both stages once, in order; what was learnt shows."""
    rows = lines(straight.dir)
    order = [("sft", s + 1) for s in range(SFT_STEPS)]
    order += [("rl", s + 1) for s in range(RL_STEPS)]
    assert [(r["stage"], r["step"]) for r in rows] == order
    sft, rl = rows[:SFT_STEPS], rows[SFT_STEPS:]
    assert sft[-1]["loss"] < 0.5 * sft[0]["loss"]
    for row in rl:
        missing = [name for name in METRICS if not isinstance(row.get(name), float)]
        assert not missing
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        rule, length = row["rewards/rule_reward/mean"], row["rewards/length/mean"]
        assert row["reward"] == pytest.approx(rule + 0.1 * length, abs=1e-6)
    assert abs(rl[0]["kl"]) < 1e-9 < rl[-1]["kl"]  # π_θ leaves π_ref
    assert max(row["reward_std"] for row in rl) > 0  # the test run is not a trivial one

    samples = lines(straight.dir, "samples.jsonl")
    assert [s["step"] for s in samples] == [1, 2, 3, 4]
    assert len(samples[0]["completions"]) == SIZES["group_size"]
    for sample in samples:
        for c in sample["completions"]:
            n = len(c["tokens"])
            assert "".join(c["tokens"]).removesuffix("<eos>") == c["completion"]
            assert n == len(c["logps"]) == len(c["ref_logps"])
            assert c["finished"] == (c["tokens"][-1] == "<eos>")
    gaps = [
        max(abs(a - b) for c in s["completions"] for a, b in zip_known(c))
        for s in (samples[0], samples[-1])
    ]
    assert gaps[0] <= 0.001 < gaps[1]  # the sampler, then the policy, leaves π_ref

    config = json.loads((straight.dir / "config.json").read_text())
    assert config["rl_steps"] == RL_STEPS and config["mesh"]["fsdp"] == -1
    kept = {s: os.listdir(straight.dir / "checkpoints" / s) for s in ("sft", "rl")}
    assert {s: sorted(map(int, names)) for s, names in kept.items()} == {
        "sft": [SFT_STEPS - 2, SFT_STEPS],
        "rl": [RL_STEPS - 2, RL_STEPS],
    }


def test_tensorboard_can_read_the_run(straight):
    parse = vars(event_pb2)["Event"].FromString
    found: dict[str, list] = {}
    (file,) = (straight.dir / "tensorboard").iterdir()
    data = file.read_bytes()
    while data:  # records: length, its checksum, an event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event, data = parse(data[12 : 12 + size]), data[16 + size :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    rewards = {r["step"]: r["reward"] for r in lines(straight.dir, stage="rl")}
    assert dict(found["rl/reward"]) == pytest.approx(rewards)
    assert len(found["sft/loss"]) == SFT_STEPS


def test_the_comparison_is_printed_and_written(straight, here):
    results = json.loads((straight.dir / "results.json").read_text())
    assert results["models"] == ["instruct", "rl"]
    in_domain, other = str(here / "sums.jsonl"), "sums/chain"
    where = {name: row["in_domain"] for name, row in results["sets"].items()}
    assert where == {in_domain: True, other: False}
    accuracies = set()
    for row in results["sets"].values():
        for model, mode in itertools.product(("instruct", "rl"), ("greedy", "sampled")):
            assert row[model]["n"] == 16
            accuracy, (low, high) = (row[model][mode][k] for k in ("accuracy", "ci95"))
            assert low <= accuracy <= high
            assert (accuracy * 16).is_integer()
            accuracies.add(accuracy)
    assert len(accuracies) > 1  # the model can do something
    title, _, first, second = table(straight.out)
    assert title.startswith("| set | n | greedy: instruct → rl | temperature 1: inst")
    before, after = (
        f"{100 * results['sets'][in_domain][model]['greedy']['accuracy']:.1f} ± "
        for model in ("instruct", "rl")
    )
    assert first.startswith(f"| {in_domain} (in-domain) | 16 | {before}")
    assert f" → {after}" in first
    assert second.startswith(f"| {other} (out-of-domain) | 16 |")


def test_a_log_is_short(straight):
    """No page of warnings; whole lines of progress where there is no screen."""
    shown = straight.err.splitlines()
    assert all(
        re.match(r"(sft|rl|instruct|rl .*|instruct .*): +\d+%", s) for s in shown
    )
    ends = [s for s in shown if ": 100%" in s]
    assert len(ends) == 2 + 8  # two stages; two models on two sets in two modes
    counts = [s.partition(" [")[0] for s in shown]
    assert len(counts) == len(set(counts))  # none is told twice
    assert len(shown) < 2 * len(ends)  # one more wherever a busy machine is slow
    assert "\r" not in straight.err
    assert len(straight.out.splitlines()) <= 8


def test_the_same_command_again_does_nothing_again(straight, here):
    before = {
        file: (straight.dir / file).read_bytes()
        for file in ("metrics.jsonl", "samples.jsonl", "results.json", "config.json")
    }
    again = finish(start(here, "straight"))
    assert again.code == 0 and again.err == ""  # no bar: no step, no question
    assert table(again.out) == table(straight.out)
    for file, content in before.items():
        assert (straight.dir / file).read_bytes() == content, file


def test_a_run_that_is_killed_and_stopped_ends_with_the_same_bits(straight, here):
    """kill -9 in SFT and in RL, SIGTERM, Ctrl-C: the same command goes on each time."""
    workdir = here / "disturbed"
    first, saved = start(here, "disturbed"), workdir / "checkpoints/sft"
    while not any(saved.glob("[0-9]")):
        assert first.poll() is None, finish(first).err
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGKILL)
    assert finish(first).code == -signal.SIGKILL
    assert not list(saved.glob(f"{SFT_STEPS}*"))

    stopped = finish(start(here, "disturbed", SEND=f"{int(signal.SIGTERM)}@1"))
    assert stopped.code == 0, stopped.err
    assert "sft: resumed at step" in stopped.out
    assert "rl: stopped after step 1; the same command goes on" in stopped.out
    assert os.listdir(workdir / "checkpoints/rl") == ["1"]

    killed = finish(start(here, "disturbed", SEND=f"{int(signal.SIGKILL)}@3"))
    assert killed.code == -signal.SIGKILL
    assert "rl: resumed at step 1 of 4" in killed.out
    assert lines(workdir)[-1]["step"] == 3

    interrupted = finish(start(here, "disturbed", SEND=f"{int(signal.SIGINT)}@2"))
    # Step 2's save may or may not have been finished when the kill came.
    assert re.search("rl: resumed at step [12] of 4", interrupted.out)
    assert interrupted.code not in (0, -signal.SIGINT)
    assert "the same command goes on from the last checkpoint" in interrupted.err
    assert "Traceback" not in interrupted.err

    last = finish(start(here, "disturbed"))
    assert last.code == 0, last.err
    assert table(last.out) == table(straight.out)
    assert timeless(lines(workdir)) == timeless(lines(straight.dir))
    assert lines(workdir, "samples.jsonl") == lines(straight.dir, "samples.jsonl")
    for file in ("results.json", "config.json"):
        assert (workdir / file).read_text() == (straight.dir / file).read_text()
    assert digest(workdir) == digest(straight.dir)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_damaged_checkpoint_ends_the_run(straight, here, tmp_path):
    """Neither trained over nor passed over; the older steps are named."""
    workdir = copy(straight, tmp_path / "run")
    newest = workdir / f"checkpoints/rl/{RL_STEPS}"
    files = [file for file in newest.rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    with pytest.raises(GrpoError) as error:
        train_here(here, workdir)
    message = rf"step {RL_STEPS} is damaged .*\[{RL_STEPS - 2}\]"
    assert re.search(message, one_line(error))
    assert newest.exists()


def test_another_config_is_refused_unless_it_is_accepted(straight, here, tmp_path):
    workdir = copy(straight, tmp_path / "run")
    with pytest.raises(GrpoError) as error:
        train_here(here, workdir, learning_rate=0.5, eval__batch=8)
    assert "learning_rate 0.001 → 0.5, eval.batch 16 → 8" in one_line(error)
    assert "--accept_changes" in str(error.value)
    train_here(here, workdir, learning_rate=0.5, accept=True)
    assert json.loads((workdir / "config.json").read_text())["learning_rate"] == 0.5
    assert lines(workdir) == lines(straight.dir)


def test_a_work_directory_is_for_one_run_that_can_write(straight, here, tmp_path):
    workdir = copy(straight, tmp_path / "run")
    with lock_folder(workdir), pytest.raises(GrpoError) as error:
        train_here(here, workdir)
    assert f"in use by process {os.getpid()}" in one_line(error)
    (tmp_path / "file").write_text("")
    with pytest.raises(GrpoError) as error:
        train_here(here, tmp_path / "file" / "run")
    assert "cannot be written" in one_line(error)


MISTAKES = {
    "eval": ({"data__eval": "sums/chian"}, "sums/chian"),
    "train": ({"data__train": "gms8k"}, "did you mean 'gsm8k'"),
    "reward": ({"rewards__functions": "rule,ruel"}, "reward 'ruel'"),
    "few rows": ({"questions_per_step": 100}, "fewer than one batch of 100"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_later_stage_would_refuse_is_refused_at_the_start(name, here, tmp_path):
    changes, message = MISTAKES[name]
    with pytest.raises(GrpoError) as error:
        train_here(here, tmp_path / "run", False, **changes)
    assert message in one_line(error)
    assert not (tmp_path / "run/checkpoints").exists()


ALL_AXES = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


def assert_close(rows: list[dict], expected: list[dict]) -> None:
    for row, one in zip(timeless(rows), timeless(expected), strict=True):
        assert row.pop("stage") == one.pop("stage")
        # More devices have more rows, and the same tokens.
        assert row.pop("update/padding") >= one.pop("update/padding")
        assert row == pytest.approx(one, rel=1e-4, abs=1e-4)


def test_a_run_of_one_device_goes_on_on_eight(straight, here, tmp_path, capsys):
    """In the middle of RL, on the mesh (1, 8, 1): the next step is the one device's."""
    workdir = copy(straight, tmp_path / "run")
    shutil.rmtree(workdir / f"checkpoints/rl/{RL_STEPS}")
    train_here(here, workdir)
    assert f"rl: resumed at step {RL_STEPS - 2}" in capsys.readouterr().out
    rl, expected = lines(workdir, stage="rl"), lines(straight.dir, stage="rl")
    assert [row["step"] for row in rl] == [1, 2, 3, 4]
    assert_close(rl[:3], expected[:3])


def test_rl_on_all_axes_of_a_mesh(straight, here, tmp_path):
    """From the same Instruct model, the first RL step is the one device's."""
    workdir = copy(straight, tmp_path / "run", rl=False)
    train_here(here, workdir, accept=True, rl_steps=1, eval__samples=0, **ALL_AXES)
    assert_close(lines(workdir, stage="rl"), lines(straight.dir, stage="rl")[:1])


def test_the_instruct_stage_alone_on_eight_devices(straight, here, tmp_path, capsys):
    """The same steps as on one; the table has one model."""
    changes: dict[str, Any] = {"method": "sft", "data__eval": "sums/chain"}
    changes |= {"eval__samples": 0}
    changes |= {"rewards__functions": "", "rewards__weights": ""}
    train_here(here, tmp_path / "run", sft_steps=4, **changes, **ALL_AXES)
    assert_close(lines(tmp_path / "run"), lines(straight.dir, stage="sft")[:4])
    printed = table(capsys.readouterr().out)
    assert printed[0] == "| set | n | greedy: instruct |"


def test_several_updates_of_one_rollout(straight, here, tmp_path):
    """The second update has moved on from π_ref; an evaluation between the steps."""
    workdir = copy(straight, tmp_path / "run", rl=False)
    (workdir / "results.json").unlink()
    changes = {"updates_per_rollout": 2, "rl_steps": 1, "eval__every": 1}
    changes |= {"eval__samples": 0, "data__eval": "sums/chain"}
    train_here(here, workdir, accept=True, **changes)
    (row,) = lines(workdir, stage="rl")
    once = lines(straight.dir, stage="rl")[0]
    assert row["reward"] == once["reward"]  # the same rollouts
    assert row["kl"] > 1e-6 > abs(once["kl"])
    results = json.loads((workdir / "results.json").read_text())
    now = results["sets"]["sums/chain"]["rl"]["greedy"]["accuracy"]
    assert row["eval/sums/chain/greedy_accuracy"] == now


@pytest.mark.parametrize(
    "function, message",
    [
        ("broken", r"reward broken: ZeroDivisionError: .*100% of the reward calls"),
        ("short", r"reward short: returned 1 values for 32 completions"),
    ],
)
def test_a_reward_that_fails_ends_the_run(function, message, straight, here, tmp_path):
    workdir = copy(straight, tmp_path / "run", rl=False)
    rewards = f"{here / 'rewards.py'}:{function}"
    changes = {"rewards__functions": rewards, "rewards__weights": "1"}
    with pytest.raises(GrpoError) as error:
        train_here(here, workdir, accept=True, **changes)
    assert re.match(message, one_line(error))


def test_export_and_evaluate_give_the_runs_own_figures(straight, tmp_path, here):
    """An exported folder, the work directory and results.json are one model."""
    workdir = copy(straight, tmp_path / "run")
    live = workdir / "checkpoints/rl/9.orbax-checkpoint-tmp"  # a trainer is saving
    live.mkdir()
    folder, out = str(tmp_path / "hf"), tmp_path / "report"
    export.main(["--workdir", str(workdir), "--out", folder])
    assert live.exists()
    with pytest.raises(SystemExit, match="error: .*not empty"):
        export.main(["--workdir", str(workdir), "--out", folder])
    questions = str(here / "sums.jsonl")
    command = ["--models", folder, str(workdir), "--sets", questions, "--out", str(out)]
    command += "--questions 16 --max_new_tokens 12 --samples 1 --batch 16".split()
    evaluate.main([*command, "--template", "plain", "--instruction", "none"])
    results = json.loads((out / "results.json").read_text())
    own = json.loads((straight.dir / "results.json").read_text())
    row = results["sets"][questions]
    assert row["hf"] == row["run"] == own["sets"][questions]["rl"]
    assert "greedy: hf → run" in table((out / "results.md").read_text())[0]
    # a work directory remembers how it was asked
    evaluate.main(["--models", str(workdir), *command[3:], "--samples", "0"])
    results = json.loads((out / "results.json").read_text())
    assert results["sets"][questions]["run"]["greedy"] == row["run"]["greedy"]
