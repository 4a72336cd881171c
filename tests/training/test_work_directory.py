"""A work directory: whose it is, what is in its lines, and disks that are full."""

import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import ROOT, dotted, small_config, write_questions

from grpo_jax import evaluate
from grpo_jax.checkpoints.run_checkpoints import CheckpointDirectory
from grpo_jax.config import Config, flatten_config
from grpo_jax.errors import GrpoError
from grpo_jax.train import train_run
from grpo_jax.training.metrics_writer import Recorder
from grpo_jax.training.optimizers import stage_optimizer
from grpo_jax.training.run import load_run, open_run, stage_params
from grpo_jax.training.work_directory import WorkDirectoryClaim

CACHE = str(ROOT / ".pytest_cache" / "jax")  # as in conftest.py


@pytest.fixture(autouse=True)
def no_cache_at_home(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workdirs")
    write_questions(folder / "sums.jsonl")
    return folder


SIZES = {
    "sft_steps": 4,
    "rl_steps": 2,
    "max_new_tokens": 4,
    "eval.questions": 4,
    "eval.samples": 0,
}


def config_of(here: Path, **changes):
    questions = str(here / "sums.jsonl")
    data = {"data.train": questions, "data.sft": questions, "data.eval": questions}
    return small_config(SIZES | data | dotted(changes))


@pytest.fixture(scope="module")
def done(here):
    """A whole run, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)
        train_run(config_of(here), here / "done")
    return here / "done"


def refusal(config, workdir: Path, **options) -> str:
    with pytest.raises(GrpoError) as error:
        train_run(config, workdir, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def steps(workdir: Path, stage: str) -> list[int]:
    return sorted(int(n) for n in os.listdir(workdir / "checkpoints" / stage))


# -- whose a directory is --------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake, message",
    [
        ({"rewards__functions": "rule,ruel"}, "reward 'ruel'"),
        ({"data__eval": "sums/chian"}, "sums/chian"),
        ({"questions_per_step": 100}, "fewer than one batch of 100"),
        ({"sft__batch_size": 100}, "fewer than one batch of 100"),
    ],
)
def test_a_start_that_failed_can_be_corrected(mistake, message, here, tmp_path):
    assert message in refusal(config_of(here, **mistake), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [".lock"]
    WorkDirectoryClaim(config_of(here), tmp_path / "run").check()


def test_a_reward_that_fails_in_the_first_step_can_be_corrected(here, done, tmp_path):
    """Also where an earlier stage is there: its config.json stands."""
    (tmp_path / "mine.py").write_text("def mine(**columns): return [1 / 0]")
    wrong = config_of(here, rewards__functions=f"{tmp_path / 'mine.py'}:mine")
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    shutil.copytree(done / "checkpoints/sft", workdir / "checkpoints/sft")
    assert "ZeroDivisionError" in refusal(wrong, workdir)
    assert not (workdir / "config.json").exists()
    train_run(config_of(here), workdir)
    assert (workdir / "config.json").read_text() == (done / "config.json").read_text()
    ((a, b),) = [[stage_params(open_run(w), "rl") for w in (workdir, done)]]
    jax.tree.map(lambda x, y: (x == y).all() or pytest.fail("another run"), a, b)


def test_the_config_is_there_before_the_first_line(here, tmp_path):
    config, workdir = config_of(here), tmp_path
    (workdir / ".lock").touch()
    claim = WorkDirectoryClaim(config, workdir)
    claim.check()
    with Recorder(workdir, config, claim.write) as recorder:
        assert not (workdir / "config.json").exists()
        recorder.write("sft", 1, {"loss": 1.0})
    assert json.loads((workdir / "config.json").read_text())["sft_steps"] == 4
    with pytest.raises(GrpoError, match=r"another config \(learning_rate 0.001 → 0.5"):
        WorkDirectoryClaim(config_of(here, learning_rate=0.5), workdir).check()


def test_a_process_on_another_disk_is_refused_before_it_trains(here, tmp_path):
    with pytest.raises(GrpoError, match="process 0 does not see what process 0 writes"):
        WorkDirectoryClaim(config_of(here), tmp_path).check()


@pytest.mark.parametrize("text", [b"{", b'{"name": "\xff"}', b"[" * 10**5, b"[1]"])
@pytest.mark.parametrize("file", ["config.json", "accepted.json"])
def test_a_damaged_file_of_the_directory_is_one_line(file, text, here, tmp_path):
    (tmp_path / file).write_bytes(text)
    with pytest.raises(GrpoError, match=f"{tmp_path / file}: not ") as error:
        WorkDirectoryClaim(config_of(here), tmp_path).check()
    assert "\n" not in str(error.value)


# -- where a checkpoint comes from -----------------------------------------------------


def copied(done: Path, workdir: Path, *, config: bool = True) -> Path:
    shutil.copytree(done, workdir)
    if not config:
        (workdir / "config.json").unlink()
    return workdir


def test_a_checkpoint_of_another_stage_is_refused(here, done, tmp_path):
    """SFT's under rl/ was trained on as if it were RL's, and exported as the model."""
    workdir = copied(done, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/rl")
    shutil.copytree(workdir / "checkpoints/sft", workdir / "checkpoints/rl")
    told = "is of the stage 'sft', not of 'rl'; move it away"
    assert told in refusal(config_of(here), workdir)
    assert told in refusal(config_of(here), workdir, accept_changes=True)
    with pytest.raises(GrpoError, match="step 4 is of the stage 'sft', not of 'rl'"):
        load_run(workdir)
    assert steps(workdir, "rl") == [2, 4]  # nothing is lost


def test_a_checkpoint_of_another_seed_or_config_is_refused(here, done, tmp_path):
    """With config.json deleted, or in the directory of another run."""
    workdir = copied(done, tmp_path / "run", config=False)
    other = config_of(here, seed=1)
    assert "step 4 was saved with another config (seed 0 → 1)" in refusal(
        other, workdir
    )
    assert not (workdir / "config.json").exists()
    told = refusal(config_of(here, learning_rate=0.5), workdir)
    assert (
        "rl: step 2 was saved with another config (learning_rate 0.001 → 0.5)" in told
    )
    elsewhere = tmp_path / "elsewhere"
    train_run(config_of(here, seed=1, rl_steps=0, method="sft"), elsewhere)
    shutil.copytree(done / "checkpoints/rl", elsewhere / "checkpoints/rl")
    (elsewhere / "config.json").unlink()
    assert "rl: step 2 was saved with another config (seed 0 → 1" in refusal(
        other, elsewhere
    )
    assert steps(elsewhere, "rl") == [2]


def goes_on(config, workdir: Path, done: Path, **options) -> None:
    """Trains there, and finds that nothing of the finished run is to be done again."""
    train_run(config, workdir, **options)
    assert (workdir / "config.json").read_text() == (done / "config.json").read_text()
    rows = [(w / "metrics.jsonl").read_text() for w in (workdir, done)]
    assert rows[0] == rows[1]
    assert [steps(workdir, s) for s in ("sft", "rl")] == [[2, 4], [2]]


def test_without_config_json_the_same_config_goes_on(here, done, tmp_path):
    """All that config.json said, the checkpoints say too."""
    goes_on(config_of(here), copied(done, tmp_path / "run", config=False), done)


def test_what_was_accepted_once_is_not_asked_for_again(here, done, tmp_path):
    workdir = copied(done, tmp_path / "run")
    changed = config_of(here, sft__learning_rate=0.5)
    assert "another config (sft.learning_rate 0.02 → 0.5)" in refusal(changed, workdir)
    train_run(changed, workdir, accept_changes=True)
    accepted = json.loads((workdir / "accepted.json").read_text())
    assert accepted == {"sft.learning_rate": [0.02]}
    train_run(changed, workdir)  # its SFT checkpoint still says 0.02
    told = refusal(config_of(here), workdir)  # and the way back is a change as well
    assert "config.json: this run was started with another config" in told
    load_run(workdir)


def as_before(workdir: Path, done: Path) -> Path:
    """A copy whose checkpoints say as little of where they come from as they did."""
    copied(done, workdir)
    run = open_run(done)
    for stage in ("sft", "rl"):
        optimizer, _ = stage_optimizer(stage, run.config)
        like = run.abstract_state(stage, optimizer)
        shutil.rmtree(workdir / "checkpoints" / stage)
        for step in steps(done, stage):
            with run.checkpoints(stage, clean=False) as checkpoints:
                _, state, _ = checkpoints.restore(like, step)
            with CheckpointDirectory(
                workdir / "checkpoints" / stage, every=1
            ) as checkpoints:
                if checkpoints.steps():
                    checkpoints.restore(like)
                checkpoints.save(step, state, {"stage": stage, "seed": 0})
    return workdir


def test_a_directory_of_an_earlier_version_goes_on(here, done, tmp_path):
    workdir = as_before(tmp_path / "run", done)
    goes_on(config_of(here), workdir, done)
    load_run(workdir)
    text = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    assert "(seed 0 → 1)" in refusal(config_of(here, seed=1), workdir)
    (workdir / "config.json").unlink()
    told = refusal(config_of(here), workdir)
    assert "does not say of which config it is, and config.json is gone" in told
    goes_on(config_of(here), workdir, done, accept_changes=True)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_run_that_diverges_saves_nothing_of_it(
    stage, here, done, tmp_path, monkeypatch
):
    """An infinite rate, which no config may hold: the parameters are NaN at once."""
    infinite = lambda rate: lambda count: jnp.inf  # noqa: E731
    monkeypatch.setattr(optax, "constant_schedule", infinite)
    workdir = tmp_path / "run"
    if stage == "rl":
        copied(done, workdir)
        shutil.rmtree(workdir / "checkpoints/rl")
    config = config_of(here)
    config.sft.warmup_steps = config.optimizer.warmup_steps = 0
    told = refusal(config, workdir, accept_changes=True)
    assert re.search(rf"{stage}: step 2 is not saved: params/\S+ .*is not finite", told)
    assert steps(workdir, stage) == []


# -- lines -----------------------------------------------------------------------------

GOOD = b'{"step": 1, "stage": "rl", "reward": 0.5}'
DAMAGED = {
    "NUL": b"\0\0\0\0" + GOOD,
    "bad UTF-8": GOOD.replace(b"0.5", b'"\xff\xfe"'),
    "a list": b'[{"step": 1, "stage": "rl"}]',
    "no stage": b'{"step": 1}',
    "no step": b'{"stage": "rl"}',
    "a step that is none": b'{"step": "1", "stage": "rl"}',
    "cut off": GOOD[:20],
    "nothing": b"",
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_set_aside(damage, file, tmp_path, capsys):
    later = GOOD.replace(b"1", b"3")
    other = GOOD.replace(b"rl", b"sft").replace(b"1", b"9")
    whole = [GOOD, DAMAGED[damage], other, later]
    (tmp_path / file).write_bytes(b"\n".join(whole) + b'\n{"step": 4, "st')
    with Recorder(tmp_path) as recorder:
        recorder.forget_after("rl", 2)
    assert (tmp_path / file).read_bytes() == GOOD + b"\n" + other + b"\n"
    aside = (tmp_path / f"{file}.damaged").read_bytes()
    assert aside == DAMAGED[damage] + b"\n"
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"{tmp_path / file}:2: not as a run writes it; moved to ")


@given(st.lists(st.one_of(st.binary(max_size=40), st.just(GOOD))), st.integers(0, 3))
def test_no_byte_of_a_file_is_lost_but_steps_done_again(tmp_path_factory, found, step):
    folder = tmp_path_factory.mktemp("lines")
    text = b"".join(line + b"\n" for line in found)
    (folder / "metrics.jsonl").write_bytes(text)
    with contextlib.redirect_stderr(None), Recorder(folder) as recorder:
        recorder.forget_after("rl", step)
        kept = (folder / "metrics.jsonl").read_bytes()
        recorder.forget_after("rl", step)
    assert (folder / "metrics.jsonl").read_bytes() == kept  # nothing to do again
    aside = folder / "metrics.jsonl.damaged"
    rest = kept + (aside.read_bytes() if aside.exists() else b"")
    lines = text.split(b"\n")[:-1]
    expected = [line for line in lines if not (line == GOOD and step < 1)]
    assert sorted(rest.split(b"\n")[:-1]) == sorted(expected)
    for line in kept.split(b"\n")[:-1]:
        assert json.loads(line)["stage"] is not None


def test_a_run_with_damaged_lines_goes_on(here, done, tmp_path, capsys):
    workdir = copied(done, tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_bytes().split(b"\n")
    before[1] = b"\0" * 30 + before[1]
    (workdir / "metrics.jsonl").write_bytes(b"\n".join(before))
    train_run(config_of(here), workdir)
    told = capsys.readouterr().err
    assert f"{workdir / 'metrics.jsonl'}:2: not as a run writes it" in told
    assert (workdir / "metrics.jsonl.damaged").read_bytes() == before[1] + b"\n"


# -- full disks ------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_over(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_a_line_that_does_not_fit_is_one_line(file, tmp_path):
    """And what comes to the recorder's end with it stays what ended the run."""
    long = {"completion": "x" * 5000}
    with Recorder(tmp_path) as recorder:
        recorder.write("rl", 1, {"reward": 1.0})
        recorder.write_samples("rl", 1, {"completion": "x"})
    before = (tmp_path / file).read_bytes()
    write = {"metrics.jsonl": Recorder.write, "samples.jsonl": Recorder.write_samples}
    with no_file_over(3000), pytest.raises(GrpoError) as error:
        with Recorder(tmp_path) as recorder:
            write[file](recorder, "rl", 2, long)
    told = f"{tmp_path / file}: cannot be written (File too large); the last checkpoint"
    assert str(error.value).startswith(told)
    with pytest.raises(KeyError, match="first"), Recorder(tmp_path) as recorder:
        recorder.write("rl", 2, {"reward": 1.0})
        with no_file_over(3000), contextlib.suppress(GrpoError):
            write[file](recorder, "rl", 3, long)
        raise KeyError("first")
    with Recorder(tmp_path) as recorder:
        recorder.forget_after("rl", 1)
    assert (tmp_path / file).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def train_in_a_process(
    here: Path, workdir: Path, memory: int | None = None, **changes
) -> subprocess.CompletedProcess:
    """train.py, with at most so many bytes of address space."""

    def limit():
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    plain, wanted = flatten_config(Config()), flatten_config(config_of(here, **changes))
    changed = {name: v for name, v in wanted.items() if v != plain[name]}
    flags = [f"--config.{name}={value}" for name, value in changed.items()]
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--config=configs/tiny.py", *flags]
        + [f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": CACHE,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of some size; a test that may not is skipped."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip("a file system cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_a_run_in_one_line(here, small_disk):
    """What was saved is there; with room the same command goes on."""
    disk, room = small_disk(2**21), 200_000
    filler = disk / "filler"
    filler.write_bytes(bytes(2**21 - room))
    full = train_in_a_process(here, disk / "run")
    assert full.returncode == 1, full.stderr
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device" in last
    assert "Traceback" not in full.stderr and len(full.stderr.splitlines()) < 6
    assert sorted((disk / "run/checkpoints").glob("*/[0-9]"))
    filler.unlink()
    again = train_in_a_process(here, disk / "run")
    assert again.returncode == 0, again.stderr
    assert "resumed at step" in again.stdout


def test_a_full_disk_ends_an_evaluation_in_one_line(here, done, tmp_path):
    words = ["--models", str(done), "--sets", str(here / "sums.jsonl"), "--batch", "2"]
    words += ["--questions", "24", "--max_new_tokens", "4", "--out", str(tmp_path)]
    with no_file_over(4000), pytest.raises(SystemExit) as error:
        evaluate.main(words)
    told = r"error: \S+: File too large; what was answered before is kept. Make room"
    assert re.match(told, str(error.value.code)), error.value.code
    (file,) = tmp_path.rglob("*.greedy.jsonl")
    before = file.read_bytes()
    assert before.count(b"\n") > 1  # its settings, and a question at least
    evaluate.main(words)
    assert file.read_bytes().startswith(before[: before.rfind(b"\n") + 1])


def test_no_memory_ends_a_run_in_one_line(here, tmp_path):
    """A matrix of 32 GiB in 16: the size, and what to turn down."""
    large = {"model__width": 2**13, "model__heads": 64, "model__ffn": 2**20}
    full = train_in_a_process(here, tmp_path / "run", memory=2**34, **large)
    assert full.returncode == 1
    told = r"error: out of memory \(.*allocating 34359738368 bytes.*\); .*Lower optim"
    assert re.search(told, full.stderr), full.stderr
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "run/config.json").exists()  # smaller, it may start there


# -- Weights & Biases ------------------------------------------------------------------

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed"
)


@needs_wandb
def test_a_resumed_run_is_the_same_wandb_run(here, tmp_path, monkeypatch):
    """The real package, offline: its files are read back."""
    monkeypatch.setenv("WANDB_PROJECT", "sums")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(here)
    for first in (1, 3):
        with Recorder(tmp_path, config) as recorder:
            recorder.forget_after("rl", first)
            for step in (first, first + 1):
                recorder.write("rl", step, {"reward": step / 10, "text": "x"})
    number = (tmp_path / "wandb_id").read_text()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [run.name.rpartition("-")[2] for run in runs] == [number] * 2
    files = [next(run.glob("*.wandb")) for run in runs]
    end = time.monotonic() + 30
    while not all(len(list(wandb_records(f))) == 2 for f in files):
        assert time.monotonic() < end, "W&B's own process has not written its file"
        time.sleep(0.1)
    told = [list(wandb_records(file)) for file in files]
    assert [r["rl/reward"] for r in told[0]] == [0.1, 0.2]
    assert [r["rl/reward"] for r in told[1]] == [0.3, 0.4]
    assert [r["rl/step"] for r in told[1]] == [3, 4]


def wandb_records(file: Path):
    """What a file of W&B's says of steps: a LevelDB log of one small block."""
    pb2 = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data = file.read_bytes()[7:]
    assert len(data) < 2**15 - 7
    while data:
        _, size, kind = struct.unpack("<IHB", data[:7])
        record, data = pb2.Record.FromString(data[7 : 7 + size]), data[7 + size :]
        assert kind == 1  # a whole one
        if record.WhichOneof("record_type") == "history":
            items = [(i.key or "/".join(i.nested_key), i) for i in record.history.item]
            yield {name: json.loads(item.value_json) for name, item in items}


def test_wandb_is_not_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_PROJECT", "sums")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Recorder(tmp_path) as recorder:
        recorder.write("rl", 1, {"reward": 1.0})
    assert "wandb is not installed" in capsys.readouterr().err
