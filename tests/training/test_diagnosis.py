"""A run says why it does not learn: each cause is brought about in a run of its own."""

import json
import shutil

import jax
import pytest
from small_runs import dotted, small_config, write_questions

from grpo_jax.report import write_report
from grpo_jax.train import train_run
from grpo_jax.training.diagnosis import RULES, Diagnosis
from grpo_jax.training.rollout_pipeline import RolloutPipeline

REWARDS = """
import time

def constant(prompts, completions, **columns):
    return [0.25] * len(completions)

def failing(prompts, completions, **columns):
    return [None if i % 4 else float(i % 8) for i in range(len(completions))]

def slow(prompts, completions, **columns):
    time.sleep(0.3)

def long(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def digits(prompts, completions, **columns):
    return [float(sum(c == "4" for c in text[:6])) for text in completions]
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with questions, reward functions and a half-trained Instruct model."""
    folder = tmp_path_factory.mktemp("diagnosis")
    write_questions(folder / "sums.jsonl")
    (folder / "rewards.py").write_text(REWARDS)
    run(folder, "instruct", method="sft")
    return folder


def run(folder, name, **changes):
    """Runs RL from the Instruct model; returns its lines of metrics.jsonl."""
    questions = changes.pop("questions", str(folder / "sums.jsonl"))
    sums = str(folder / "sums.jsonl")
    data = {"data.train": questions, "data.sft": sums, "data.eval": sums}
    few = {"rl_steps": 6, "checkpoint_every": 50, "eval.questions": 1}
    config = small_config(data | few | dotted(changes))
    start = folder / "instruct" / "checkpoints" / "sft"
    own = folder / name / "checkpoints" / "sft"
    if start.exists() and config.sft_steps == 24 and not own.exists():
        shutil.copytree(start, own)
    train_run(config, folder / name)
    return rows(folder / name)


def rows(workdir, stage="rl"):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


def findings(lines):
    return [row["diagnosis"] for row in lines if "diagnosis" in row]


def only_finding(lines, name):
    """The one finding, of this name, and the step at which it was sure."""
    found = findings(lines)
    assert len(found) == 1 and found[0].startswith(f"{name}: "), found
    assert "\n" not in found[0]
    return found[0], [row["step"] for row in lines if "diagnosis" in row][0]


def reward(here, name):
    return {"rewards__functions": f"{here / 'rewards.py'}:{name}"}


def write_same(file, answer, solution):
    asked = [f"{a}+{b}=?" for a in range(1, 10) for b in range(1, 10)]
    lines = [
        json.dumps({"question": q, "answer": answer, "solution": solution})
        for q in asked
    ]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def test_a_healthy_run_has_no_finding(here, capfd):
    lines = run(here, "healthy", rl_steps=16)
    assert not findings(lines) and not findings(rows(here / "healthy", "sft"))
    first, last = (sum(r["reward"] for r in x) for x in (lines[:8], lines[8:]))
    assert last > first  # it does learn
    assert "step 1:" not in capfd.readouterr().out


def test_all_wrong(here, capfd):
    """On the screen, in metrics.jsonl, and on top of the report; once."""
    questions = write_same(here / "hard.jsonl", "777", "#### 4")
    text, step = only_finding(run(here, "wrong", questions=questions), "all wrong")
    assert step == 4 and "none of the last 128 outputs" in text
    assert "census" in text and "sft_steps" in text
    assert f"rl step 4: {text}" in capfd.readouterr().out
    page = write_report(here / "wrong").read_text()
    assert page.index("none of the last 128 outputs") < page.index("Comparison")


def test_all_right(here):
    questions = write_same(here / "easy.jsonl", "4", "#### 4")
    changes = {"data__sft": questions, "sft_steps": 40}
    lines = run(here, "right", questions=questions, **changes)
    assert lines[-1]["reward"] == 1
    text, _ = only_finding(lines, "all right")
    assert "harder questions" in text


def test_a_constant_reward(here):
    text, _ = only_finding(
        run(here, "constant", **reward(here, "constant")), "constant reward"
    )
    assert "constant gave 0.25" in text


def test_a_reward_that_mostly_has_no_value(here):
    text, _ = only_finding(
        run(here, "failing", **reward(here, "failing")), "failing reward"
    )
    assert "failing gave no value for 75%" in text


def test_rewards_that_take_too_long(here):
    lines = run(here, "slow", **reward(here, "slow"), rewards__timeout=0.05)
    assert any("rewards.timeout (0.05 s)" in text for text in findings(lines))


def test_outputs_that_never_end(here):
    lines = run(here, "endless", max_new_tokens=3, **reward(here, "long"))
    text = next(t for t in findings(lines) if "no end: " in t)
    assert "max_new_tokens (3)" in text and "template" in text


def test_outputs_that_are_mostly_cut_off(here):
    """An untrained model ends with one token in 26, by chance."""
    lines = run(
        here,
        "cut",
        sft_steps=1,
        sft__learning_rate=1e-9,
        max_new_tokens=1,
        learning_rate=1e-5,
        group_size=8,
        **reward(here, "digits"),
    )
    text, _ = only_finding(lines, "cut off")
    assert "Raise max_new_tokens (1)" in text


def test_kl_that_runs_away(here):
    changes = {"rl_steps": 14, "learning_rate": 1e-2, "kl_coef": 1e-6}
    lines = run(here, "kl", **changes, **reward(here, "digits"))
    assert any(text.startswith("KL runs away: ") for text in findings(lines))


def test_ratios_that_are_clipped(here):
    changes = {"updates_per_rollout": 8, "learning_rate": 5e-2, "clip_low": 0.001}
    lines = run(here, "clipped", **changes, clip_high=0.001, **reward(here, "digits"))
    assert any("clipped and give no gradient" in text for text in findings(lines))


def test_entropy_that_collapses(here):
    changes = {"rl_steps": 24, "learning_rate": 2e-2, "kl_coef": 0.0}
    lines = run(here, "entropy", **changes, **reward(here, "digits"))
    found = [t for t in findings(lines) if "entropy collapsed" in t]
    assert found and "temperature" in found[0]


def test_lengths_that_explode(here):
    changes = {"rl_steps": 24, "learning_rate": 1e-2, "max_new_tokens": 40}
    lines = run(here, "long", **changes, kl_coef=0.0, **reward(here, "long"))
    found = [t for t in findings(lines) if "lengths explode" in t]
    assert found and "no reward pays for length" in found[0]


def test_a_sampler_apart_from_the_trainer(here, monkeypatch):
    take = RolloutPipeline.take_rollout

    def from_others(self, step, params):
        keys = iter(jax.random.split(jax.random.key(0), 99))
        noise = lambda x: jax.random.normal(next(keys), x.shape)  # noqa: E731
        return take(self, step, jax.tree.map(lambda x: x + 0.5 * noise(x), params))

    monkeypatch.setattr(RolloutPipeline, "take_rollout", from_others)
    lines = run(here, "apart", optimizer__max_sampling_gap=100.0)
    assert any("sampler and trainer differ" in text for text in findings(lines))


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_learning_rate_that_moves_nothing(here, stage):
    """In the first row, before a hundred steps are lost."""
    name = {"sft": "sft.learning_rate", "rl": "learning_rate"}[stage]
    steps = {"sft_steps": 2} if stage == "sft" else {"rl_steps": 2}
    run(here, f"rate-{stage}", **{name.replace(".", "__"): 1e-12}, **steps)
    lines = rows(here / f"rate-{stage}", stage)
    text, step = only_finding(lines, "rate too small")
    assert step == 1 and text.endswith(f"Raise {name}")


def test_no_answer_in_thoughts_that_are_not_closed():
    from grpo_jax.data.example import Example
    from grpo_jax.training.credit import Output
    from grpo_jax.training.run_rewards import share_without_answer

    def output(text):
        fields = dict(prompt=[3], tokens=[4], logps=[0.0], finished=True, text=text)
        return Output(example=Example("1+1"), **fields)

    texts = ["<think>1+1 is 2, so", "so 2", "no number", ""]
    assert share_without_answer([output(text) for text in texts]) == 1 / 3
    config = small_config({})
    watch = Diagnosis(config, "rl")
    found = [watch({"completions/no_answer": 0.95}) for _ in range(5)]
    assert found[3].startswith("no answer: ") and "95%" in found[3]
    assert not any(found[:3] + found[4:])


def test_a_resumed_run_does_not_say_it_again(here, capfd):
    """The rows before step 4, which were sure, are read again from metrics.jsonl."""
    questions = write_same(here / "hard.jsonl", "777", "#### 4")
    changes = {"questions": questions, "checkpoint_every": 4, "rl_steps": 8}
    first = run(here, "resumed", **changes)
    shutil.rmtree(here / "resumed/checkpoints/rl/8")
    assert capfd.readouterr().out.count("all wrong") == 1
    again = run(here, "resumed", **changes)
    assert "rl: resumed at step 4 of 8" in (said := capfd.readouterr().out)
    assert "all wrong" not in said
    assert findings(again) == findings(first) and len(again) == 8


def test_each_rule_needs_its_steps():
    """No rule speaks on an empty row, or before its window is full."""
    config = small_config({})
    for name in RULES:
        watch = Diagnosis(config, "rl")
        assert not any(watch({}) for _ in range(20)), name
        assert len(watch.history.early) + len(watch.history.recent) < 20
