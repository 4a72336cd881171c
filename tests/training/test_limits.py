"""What a run says where memory runs out, and where sampler and trainer drift apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["model.layers=1", "model.width=16", "model.heads=2", "model.ffn=16"]
SMALL += ["sft_steps=1", "sft.warmup_steps=0", "rl_steps=1", "group_size=2"]
SMALL += ["questions_per_step=2", "max_new_tokens=4", "optimizer.warmup_steps=0"]
SMALL += ["sft.batch_size=2", "sft.micro_rows=2", "optimizer.micro_rows=2"]


def train(workdir: Path, *settings: str) -> str:
    """The one line with which a run that cannot go on ends."""
    flags = [f"--config.{setting}" for setting in (*SMALL, *settings)]
    command = [sys.executable, "train.py", "--config=configs/tiny.py"]
    done = subprocess.run(
        [*command, f"--workdir={workdir}", *flags],
        env={**os.environ, "XLA_FLAGS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and line.startswith("error: "), done.stderr
    return line


@pytest.mark.parametrize(
    "setting, asked",
    [
        # more than any machine can address: the device's allocator, and NumPy's
        ("model.width=262144", "Out of memory allocating"),
        (
            "sft.row_length=1048576 sft.micro_rows=1048576",
            "Unable to allocate 4.00 TiB",
        ),
    ],
)
def test_out_of_memory_is_one_line_with_the_size(setting, asked, tmp_path):
    line = train(tmp_path / "run", *setting.split())
    assert f"error: out of memory ({asked}" in line.replace("INTERNAL: ", "").replace(
        "Error dispatching computation: ", ""
    ).replace("RESOURCE_EXHAUSTED: ", "")
    assert "Lower optimizer.micro_rows (2)" in line


def test_a_sampler_that_drifts_from_the_trainer_ends_the_run(tmp_path):
    """In bfloat16 the two really differ; the limit is below what rounding gives."""
    drift = ("model.dtype=bfloat16", "optimizer.max_sampling_gap=1e-7")
    line = train(tmp_path / "run", *drift)
    assert "rl: sampler and trainer differ by 0.0" in line
    assert "over optimizer.max_sampling_gap 1e-07; the last checkpoint stands" in line
