"""A run refuses at its start what it can know there: before a model is made."""

import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from small_runs import ROOT, small_config, write_questions

from grpo_jax.errors import GrpoError
from grpo_jax.train import train_run
from grpo_jax.training import setup
from grpo_jax.training.reward_model import labels
from grpo_jax.training.reward_model.labels import LabelledSequence

FIRST_WITHOUT = 1  # a seed whose first SFT batch does not have the last row
NUMBERS = itertools.count()
BOXED = {"question": "1+1=?", "answer": "4", "solution": "#### 4"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with questions; weights are never made in it."""

    def never(*arguments):
        raise AssertionError("weights were made")

    monkeypatch.setattr(setup, "initial_params", never)
    write_questions(tmp_path / "sums.jsonl")
    (tmp_path / "rewards.py").write_text(
        "def needs(prompts, completions, difficulty): return [1.0] * len(prompts)\n"
        "def takes_no_more(prompts, completions, answer): return [1.0] * len(prompts)\n"
    )
    return tmp_path


def refused(here, message, **changes):
    """The one line that a run with these changes ends with, before any weights."""
    questions = str(here / "sums.jsonl")
    data = {"data.train": questions, "data.sft": questions, "data.eval": questions}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config = small_config(data | changes)
    workdir = here / f"run-{next(NUMBERS)}"
    with pytest.raises(GrpoError, match=message) as caught:
        train_run(config, workdir)
    assert "\n" not in str(caught.value)
    assert not (workdir / "checkpoints").exists()


def add_rows(here, *rows):
    with open(here / "sums.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["completions", "prompts"])
def test_a_column_that_would_replace_the_models_output(here, name):
    add_rows(here, BOXED | {name: r"\boxed{4}"})
    refused(here, f"rewards: the data has a column '{name}'.*rename the column")


def test_a_reward_function_that_lacks_a_column_or_takes_too_few(here):
    file = here / "rewards.py"
    refused(here, "reward needs: .*'difficulty'", rewards__functions=f"{file}:needs")
    add_rows(here, BOXED | {"level": 3})  # of one row, which step 40 might have had
    function = f"{file}:takes_no_more"
    refused(here, "reward takes_no_more: .*'level'", rewards__functions=function)


def test_an_sft_example_that_fits_no_row(here):
    """Whichever step would take it; one that no step takes is not looked at."""
    add_rows(here, BOXED | {"id": "long", "solution": "1+" * 60 + "1"})
    message = "data 'long': 12[0-9] tokens are more than sft.row_length 64"
    sizes = {"method": "sft", "sft__row_length": 64, "sft__batch_size": 41}
    refused(here, message, **sizes, sft_steps=24)
    with pytest.raises(AssertionError, match="weights were made"):
        refused(here, message, **sizes, sft_steps=1, seed=FIRST_WITHOUT)


def test_sft_examples_that_are_left_out(here, capsys):
    """The first rows have 6 + 6 tokens and an end; one is longer than a row."""
    add_rows(here, BOXED | {"solution": "1+" * 60 + "1"})
    sizes = {"method": "sft", "sft__row_length": 64}
    with pytest.raises(AssertionError, match="weights were made"):
        refused(here, "weights", **sizes, sft__max_tokens=60)
    assert (
        "sft: 1 of 82 examples have more than sft.max_tokens 60"
        in capsys.readouterr().out
    )
    refused(
        here, "sft.max_tokens: 5; all 82 examples have more", **sizes, sft__max_tokens=5
    )


def test_a_row_that_the_longest_output_would_not_fit(here):
    message = "optimizer.row_length: 15; a prompt of 5 tokens and an output of 12 .* 16"
    refused(here, message, optimizer__row_length=15)


def test_labels_that_are_too_few_or_too_long(here):
    process = {"method": "grpo_process", "reward_model__batch_size": 64}
    message = "batch_size: 82, but 81 questions with 1 output"
    refused(
        here,
        message,
        **process | {"reward_model__batch_size": 82},
        reward_model__questions=100,
    )
    # a row that holds the policy's longest sample, but not the reward model's
    refused(here, "row_length: 16; .* take 17", **process, optimizer__row_length=16)
    item = LabelledSequence(tokens=(3, 4, 5), prompt=1, ends=(2,), labels=(1.0,))
    labels.write_labels(here / "labels.jsonl", [item] * 63)
    own = process | {"reward_model__labels": str(here / "labels.jsonl")}
    refused(here, "has 63 sequences; lower it", **own)
    long = LabelledSequence(tokens=(3,) * 41, prompt=1, ends=(2,), labels=(1.0,))
    labels.write_labels(here / "labels.jsonl", [item] * 63 + [long])
    refused(here, "of 41 tokens fits no row of 40", **own, optimizer__row_length=40)


def test_a_vocabulary_that_a_new_model_would_ignore(here):
    refused(here, "vocab_size: 7; a new model has its tokenizer's", model__vocab_size=7)


def test_a_mesh_that_does_not_divide_one_device(tmp_path):
    """As with several devices: on one it was ignored."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "device_count" not in flag]
    done = subprocess.run(
        [sys.executable, "train.py", "--config=configs/tiny.py"]
        + [f"--workdir={tmp_path / 'run'}", "--config.mesh.decode_tensor=3"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": " ".join(kept)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    message = "error: mesh.decode_tensor: 3 does not divide the number of devices, 1"
    assert (done.returncode, done.stderr.strip()) == (1, message)


def test_gradients_that_are_never_finite_end_the_run(tmp_path, monkeypatch):
    """After optimizer.max_skipped in a row; the parameters are as they were."""
    make = setup.initial_params

    def broken(*arguments):
        return jax.tree.map(lambda x: x * jnp.nan, make(*arguments))

    monkeypatch.setattr(setup, "initial_params", broken)
    questions = write_questions(tmp_path / "sums.jsonl")
    config = small_config(
        {
            "method": "sft",
            "data.sft": questions,
            "data.eval": questions,
            "optimizer.max_skipped": 3,
            "checkpoint_every": 100,  # parameters that are not finite are not saved
        }
    )
    message = r"sft: step 3: the gradient was not finite 3 times .*max_skipped"
    with pytest.raises(GrpoError, match=message):
        train_run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["update/nonfinite"] for row in rows][:2] == [1.0, 1.0]
