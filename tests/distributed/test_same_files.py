"""Processes that read other files are refused before anything is trained on them.

Two real processes, each in a folder of its own, where a file of the same name differs.
"""

import json
import shutil

import pytest
from run_processes import finish, talk
from small_runs import ROOT, write_questions

MODEL = ROOT / "tests/golden/families/qwen2"
REWARD = "def mine(prompts, completions, **columns): return [{}] * len(prompts)\n"
# Each of these refuses in both processes; what is not refused is said too.
TRY = """
import os, sys
from pathlib import Path
os.chdir(f"{folder}/{{number}}")
from small_runs import small_config
from grpo_jax import evaluate
from grpo_jax.evaluation.flags import parse_flags
from grpo_jax.training import rollouts, run_comparison, setup, sft
from grpo_jax.training.run import Run

def refused(function, *arguments):
    try:
        function(*arguments)
        print("fine")
    except GrpoError as error:
        print(error)

same = {{f"data.{{k}}": "same.jsonl" for k in ("sft", "train", "eval")}}
model, tokenizer = setup.make_model(small_config(same))

def run(**other):
    config = small_config(same | {{k.replace("__", "."): v for k, v in other.items()}})
    return Run(config, Path("w"), None, model, tokenizer, None, None)

for name in ("same", "middle", "column"):
    refused(rollouts.load_questions, run(data__train=f"{{name}}.jsonl"))
    refused(run_comparison.check_sets, run(data__eval=f"{{name}}.jsonl"))
refused(sft.train_sft, run(data__sft="middle.jsonl"), None)
for settings in (
    {{}},
    {{"rewards__functions": "rule,mine.py:mine", "rewards__weights": "1.0,1.0"}},
    {{"reward_model__labels": "labels.jsonl"}},
    {{"model__path": "model"}},
):
    refused(setup.agree_on_files, run(**settings).config)
words = ["--models", "given.jsonl", "--sets", "same.jsonl", "--out", "out"]
refused(evaluate.check_inputs, parse_flags(words))
"""
SAID = [
    ("fine", ""),  # data.train, the same in both
    ("fine", ""),  # data.eval
    ("data.train: process 1 has not what process 0 has", "rows, prompts"),
    ("set middle.jsonl: process 1 has not what process 0 has", "rows"),  # not asked
    ("data.train: process 1 has not what process 0 has", "rows"),
    ("set column.jsonl: process 1 has not what process 0 has", "rows"),
    ("data.sft: process 1 has not what process 0 has", "rows"),
    ("fine", ""),
    ("rewards: process 1 has not what process 0 has", "mine.py"),
    ("rewards: process 1 has not what process 0 has", "labels.jsonl"),
    ("model: process 1 has not what process 0 has", "model.safetensors"),
    ("given.jsonl: process 1 has not what process 0 has", "completions"),
]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[list[str]]:
    """What each process said, line by line."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(2):
        here = folder / str(number)
        here.mkdir()
        write_questions(here / "same.jsonl")
        rows = [json.loads(line) for line in (here / "same.jsonl").open()]
        for name in ("middle", "column"):
            mine = [dict(row) for row in rows]
            if name == "middle" and number:
                mine[40]["question"] = mine[40]["question"].replace("+", "-")
            mine[40]["level"] = number if name == "column" else 0
            write_rows(here / f"{name}.jsonl", mine)
        (here / "mine.py").write_text(REWARD.format(number))
        write_rows(here / "labels.jsonl", [{"label": number}])
        answers = [{"index": i, "completion": str(number)} for i in range(len(rows))]
        write_rows(here / "given.jsonl", answers)
        shutil.copytree(MODEL, here / "model")
    weights = folder / "1" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = finish(talk(TRY.format(folder=folder), 2))
    assert [process.code for process in done] == [0, 0], done[0].err
    return [process.out.splitlines() for process in done]


def write_rows(file, rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_file_that_differs_is_named_and_refused_on_all(said):
    assert len(said[0]) == len(said[1]) == len(SAID)
    for line, other, (begin, names) in zip(*said, SAID, strict=True):
        end = f" ({names}); start all processes with the same command, files and"
        assert line.startswith(begin + end if names else begin), line
        assert line == other
