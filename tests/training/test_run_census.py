"""The census before RL: what it writes, and that RL then trains on what teaches."""

import json
import shutil

import pytest
from small_runs import dotted, small_config, write_questions

from grpo_jax.census import take_census
from grpo_jax.data import datasets
from grpo_jax.errors import GrpoError
from grpo_jax.rewards.reward_functions import rule_reward
from grpo_jax.train import train_run
from grpo_jax.training import run_census as census
from grpo_jax.training.rollouts import RolloutSource

SIZES = {"census": True, "census_samples": 4, "rl_steps": 2, "eval.questions": 1}


def config_of(folder, **changes):
    questions = str(folder / "sums.jsonl")
    data = {"data.train": questions, "data.sft": questions, "data.eval": questions}
    return small_config(data | SIZES | dotted(changes))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with questions, and a run with a census."""
    folder = tmp_path_factory.mktemp("census")
    write_questions(folder / "sums.jsonl", two_ways=True)
    train_run(config_of(folder), folder / "run")
    return folder


def right_by_question(workdir):
    """How many of a question's kept completions end with the answer."""
    [file] = (workdir / "census").glob("*sums.jsonl.cot.sampled.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return {
        row["question"]: sum(
            rule_reward([""], [text], answer=[row["answer"]])[0]
            for text in row["completions"]
        )
        for row in rows
    }


def test_figures_and_file_follow_from_the_completions(here):
    right = right_by_question(here / "run")
    teaching = {question for question, n in right.items() if 0 < n < 4}
    assert 0 < len(teaching) < len(right) == 81
    written = datasets.load_dataset(str(here / "run/census" / census.TEACHING))
    assert {example.question for example in written} == teaching
    found = json.loads((here / "run/census/census.json").read_text())
    [figures] = [rows[0] for rows in found["sets"].values()]
    assert figures["sometimes"] == pytest.approx(len(teaching) / 81)
    assert figures["never"] == pytest.approx(sum(n == 0 for n in right.values()) / 81)
    assert figures["accuracy"] == pytest.approx(sum(right.values()) / 81 / 4)


def test_rl_asks_only_what_teaches(here, monkeypatch):
    asked = []
    sample = RolloutSource.sample_rollout

    def watched(self, step, params, round=1):
        asked.extend(e.question for e, _ in self.batches[round - 1][step])
        return sample(self, step, params, round)

    monkeypatch.setattr(RolloutSource, "sample_rollout", watched)
    shutil.copytree(here / "run", here / "again")
    shutil.rmtree(here / "again/checkpoints/rl")
    train_run(config_of(here), here / "again")  # its census is there already
    right = right_by_question(here / "again")
    assert len(asked) == 16 and all(0 < right[question] < 4 for question in asked)
    kept = [here / name / "metrics.jsonl" for name in ("run", "again")]
    first, second = (
        [json.loads(line).get("reward") for line in file.read_text().splitlines()]
        for file in kept
    )
    assert first == second


def test_the_command_gives_the_same_census(here, capsys):
    shutil.copytree(here / "run/checkpoints/sft", here / "alone/checkpoints/sft")
    take_census(config_of(here), here / "alone", accept_changes=True)
    files = [here / name / "census" / census.TEACHING for name in ("run", "alone")]
    assert files[0].read_text() == files[1].read_text()
    out = capsys.readouterr().out
    assert "census of the Instruct model" in out and "| never right |" in out
    assert "which data.train takes" in out
    assert not (here / "alone/config.json").exists()  # nothing is trained there


def test_a_census_without_a_model(here):
    with pytest.raises(GrpoError, match="has no Instruct model yet; train it first"):
        take_census(config_of(here), here / "none")


def test_a_census_with_tools_is_refused(here):
    with pytest.raises(GrpoError, match="census: outputs with tools"):
        train_run(config_of(here, tools__generations=2), here / "tools")


def test_too_few_questions_that_teach(here):
    """A constant answer is always right or never: no question teaches."""
    row = {"question": "1+1=?", "answer": "777", "solution": "#### 4"}
    hard = here / "hard.jsonl"
    hard.write_text(
        "".join(json.dumps(row | {"question": f"{i}+1=?"}) + "\n" for i in range(9))
    )
    shutil.copytree(here / "run/checkpoints/sft", here / "hard/checkpoints/sft")
    with pytest.raises(
        GrpoError, match="census: only 0 questions teach, and a step takes 8"
    ):
        train_run(config_of(here, data__train=str(hard)), here / "hard")


def test_a_question_after_other_turns_is_written_so_that_it_can_be_read(tmp_path):
    before = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
    ]
    chat = [*before, {"role": "user", "content": "1+1?"}]
    row = {"messages": chat, "answer": "2", "level": 3}
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(row) + "\n")
    [example] = datasets.load_dataset(str(file))
    file.write_text(json.dumps(census.example_as_row(example)) + "\n")
    [again] = datasets.load_dataset(str(file))
    assert again.question == example.question == "1+1?"
    assert again.columns == example.columns and again.answer == "2"
