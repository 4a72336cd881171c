"""RL with tools: the model of `recital.py` as the policy of a run, on one device."""

import contextlib
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted_policy import SCRIPTS, learn, make_tokenizer
from small_runs import SMALL, dotted, small_config

from grpo_jax import report, sandbox
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError, Preempted
from grpo_jax.report.comparison import accuracy_table
from grpo_jax.report.tables import to_markdown
from grpo_jax.rewards.reward_functions import RewardScores
from grpo_jax.training import (
    credit,
    rl,
    rl_programs,
    rl_step,
    run_comparison,
)
from grpo_jax.training.batch import Sample
from grpo_jax.training.metrics_writer import Recorder
from grpo_jax.training.optimizers import rl_optimizer
from grpo_jax.training.rollouts import RolloutSource, read_outputs
from grpo_jax.training.run import Run
from grpo_jax.training.train_step import TrainState, make_scorer, make_step
from grpo_jax.training.work_directory import WorkDirectoryClaim

TOKENIZER = make_tokenizer()
STEPS, HALF = 4, 0.92
ANSWERS = {"a": "42", "c": "7", "e": "7", "b": "6"}
SIZES = SMALL | {
    "data.template": "plain",
    "data.max_prompt_tokens": 8,
    "tools.generations": 2,
    "max_new_tokens": 64,
    "optimizer.row_length": 0,
    "questions_per_step": 4,
    "group_size": 4,
    "rl_steps": STEPS,
    "learning_rate": 1e-3,
    "eval.questions": 4,
    "eval.samples": 0,
}
MODEL = {"model.layers": 2, "model.width": 48, "model.heads": 4, "model.ffn": 96}


@pytest.fixture(scope="module")
def recital():
    """It knows its scripts but half by heart, so that the outputs of a group differ."""
    model, params = learn(TOKENIZER, SCRIPTS)
    return model, jax.tree.map(lambda x: HALF * x, params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    rows = [json.dumps({"question": q, "answer": a}) for q, a in ANSWERS.items()]
    (folder / "questions.jsonl").write_text("\n".join(rows))
    return folder


@contextlib.contextmanager
def opened(folder: Path, recital, name: str, **changes):
    questions = str(folder / "questions.jsonl")
    data = {"data.train": questions, "data.sft": questions, "data.eval": questions}
    config = small_config(SIZES | MODEL | data | dotted(changes))
    (folder / name).mkdir(exist_ok=True)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), Recorder(folder / name) as recorder:
        claim = WorkDirectoryClaim(config, folder / name)
        yield Run(config, folder / name, mesh, recital[0], TOKENIZER, recorder, claim)


def teach(folder: Path, recital, name: str, **changes):
    """The RL stage: its parameters."""
    with opened(folder, recital, name, **changes) as run:
        start = jax.tree.map(jnp.copy, recital[1])
        return rl.train_rl(run, lambda: start, *rl.prepare_rl(run))


def taught(sample) -> Any:
    return sample.advantages


def lines(file: Path) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if "time" not in k} for row in rows]


@pytest.fixture(scope="module")
def straight(folder, recital):
    return teach(folder, recital, "straight")


def test_a_run_calls_the_interpreter_and_learns_from_what_it_sampled(folder, straight):
    rows = lines(folder / "straight" / "metrics.jsonl")
    assert len(rows) == STEPS
    for row in rows:
        assert 0.1 < row["tools/call_frequency"] <= 2
        assert 0 <= row["tools/failure_frequency"] < 1
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert 0 < row["reward"] < 1 and row["grad_norm"] > 0
        assert row["completions/max_length"] <= 2 * 64
    assert any(row["tools/failure_frequency"] for row in rows)  # script c
    moved = [row["kl"] for row in rows]
    assert abs(moved[0]) < 1e-6 < moved[-1]


def test_only_sampled_tokens_are_taught_and_counted(folder, recital):
    """loss, KL and their number against sums over the sampled tokens by hand; the
    advantages and the other numbers of a tool's tokens may be anything."""
    model, params = recital
    with opened(folder, recital, "masked") as run:
        outputs = read_outputs(RolloutSource(run).sample_rollout(0, params))
        group = run.config.group_size
        rewards = np.arange(len(outputs)) % group / group
        scores = RewardScores(rewards, {"rule": rewards})
        samples = credit.assign_outcome_credit(
            outputs, scores, [1.0], group, scale="group", baseline="mean"
        )
        other = jax.tree.map(lambda x: 0.97 * x, params)
        lay_out, score = (
            rl_programs.BatchLayout(run.config, run.mesh),
            make_scorer(model),
        )
        batch = lay_out(samples)
        logps = rl_step.by_output(score(params, batch), outputs)
        ref = rl_step.by_output(score(other, batch), outputs)
        terms: list[list[float]] = [[], []]
        for o, s, new, old in zip(outputs, samples, logps, ref, strict=True):
            at = np.flatnonzero(o.sampled)
            gap = (old - new)[at]
            terms[1].append(float((np.exp(gap) - gap - 1).sum()))
            kl = (np.exp(gap) - gap - 1).mean()
            terms[0].append(float(0.04 * kl - taught(s)))
        told = [len(o.tokens) - sum(o.sampled) for o in outputs]
        assert max(told) > 10 and min(told) == 0
        optimizer, _ = rl_optimizer(run.config)
        step = make_step(rl_programs.make_objective(run.config, model), optimizer)
        metrics = []
        for noise in (0.0, 5.0):
            noisy = []
            for o, s in zip(outputs, samples, strict=True):
                hidden = np.array([1] * len(o.prompt) + [1 - m for m in o.sampled])
                given = np.full(len(s.tokens), taught(s)) + noise * hidden
                old = np.array(s.logps) + noise * hidden
                noisy.append(
                    Sample(
                        tokens=s.tokens,
                        mask=s.mask,
                        prompt=s.prompt,
                        advantages=given.tolist(),
                        logps=old.tolist(),
                    )
                )
            state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer)
            state, found = step(state, other, lay_out(noisy))
            metrics.append({k: float(v) for k, v in found.items()})
        count = sum(sum(o.sampled) for o in outputs)
        assert metrics[0]["num_tokens"] == count
        assert metrics[0]["loss"] == pytest.approx(np.mean(terms[0]), abs=1e-5)
        assert metrics[0]["kl"] == pytest.approx(sum(terms[1]) / count, rel=1e-4)
        for name, value in metrics[0].items():
            assert metrics[1][name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_stopped_run_goes_on_to_the_same_bits(staleness, folder, recital, straight):
    """Stopped after step 3, where no checkpoint was due: killed, then preempted."""
    options: Any = {"checkpoint_every": 2}
    if staleness:
        options["max_staleness"] = 1
        straight = teach(folder, recital, "ahead", max_staleness=1)
    name, write = f"stopped-{staleness}", Recorder.write

    def stopping(how):
        def watched(self, stage, step, values):
            write(self, stage, step, values)
            if step == 3:
                how()

        return watched

    def kill():
        raise KeyboardInterrupt

    def preempt():
        os.kill(os.getpid(), signal.SIGTERM)

    for how, error in ((kill, KeyboardInterrupt), (preempt, Preempted)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
            patch.setattr(Recorder, "write", stopping(how))
            teach(folder, recital, name, **options)
    resumed = teach(folder, recital, name, **options)
    for x, y in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        assert (x == y).all()
    kind = "ahead" if staleness else "straight"
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert lines(folder / name / file) == lines(folder / kind / file)


def test_the_comparison_of_a_run_runs_programs_too(folder, recital):
    """Of a, b, c and e all but b's 5 are right; a and c by a program. What is greedy
    needs no other rows beside it: two at a time give the same."""
    params = jax.tree.map(lambda x: x / HALF, recital[1])
    found = []
    for batch in (4, 2):
        with opened(folder, recital, f"by-{batch}", eval__batch=batch) as run:
            found.append(run_comparison.compare_run(run, {"rl": params}))
            now = run_comparison.evaluate_policy(run, params)
            name = f"eval/{run.config.data.eval}"
            assert now[f"{name}/greedy_accuracy"] == 0.75
            assert now[f"{name}/program_accuracy"] == 0.5
    (row,), (again,) = (results["sets"].values() for results in found)
    result = row["rl"]["tool_greedy"]
    assert result["accuracy"] == 0.75 and result["program"]["accuracy"] == 0.5
    assert result["cut_off"] == 0.5 and row["rl"] == again["rl"]  # b; c's third turn
    page = report.write_report(folder / "by-4").read_text()
    assert "with programs, greedy, its programs" in page and "<td>50.0 <" in page
    assert "with programs, greedy, its programs: rl |" in to_markdown(
        accuracy_table(found[0])
    )


def test_a_comparison_that_is_stopped_has_the_sets_that_are_to_come(
    folder, recital, monkeypatch
):
    """Without figures, whatever an earlier one found; and then it goes on to all."""
    names = [str(folder / "questions.jsonl"), str(folder / "others.jsonl")]
    (folder / "others.jsonl").write_text('{"question": "a", "answer": "1"}')
    measure, asked = run_comparison.measure_set, []

    def stopping(*arguments, **options):
        asked.append(arguments[3])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(run_comparison, "measure_set", stopping)
    with opened(folder, recital, "by-set", data__eval="+".join(names)) as run:
        whole = run_comparison.compare_run(run, {"rl": recital[1]})
        whole = json.loads(json.dumps(whole))  # lists, as in the file
        with pytest.raises(KeyboardInterrupt):
            run_comparison.compare_run(run, {"rl": recital[1]})
        found = json.loads((run.workdir / "results.json").read_text())
        assert found["sets"][names[0]] == whole["sets"][names[0]]
        assert list(found["sets"]) == names
        assert found["sets"][names[1]] == {"in_domain": False}
        assert "| – | – |" in to_markdown(accuracy_table(found))
        assert "others.jsonl" in report.write_report(run.workdir).read_text()
        run_comparison.compare_run(run, {"rl": recital[1]})
        assert json.loads((run.workdir / "results.json").read_text()) == whole


def test_the_report_tells_programs_from_their_outputs(folder, straight):
    (group, *_) = lines(folder / "straight" / "samples.jsonl")
    told = 0
    for completion in group["completions"]:
        pieces = zip(completion["mask"], completion["tokens"], strict=True)
        for sampled, run in itertools.groupby(pieces, key=lambda pair: pair[0]):
            text = "".join(piece for _, piece in run)
            if not sampled:
                told += 1
                assert text.startswith("\n") and text.endswith("\n```\n")
                assert text in completion["completion"]
    assert told
    page = report.write_report(folder / "straight").read_text()
    assert '"mask":[1.0,' in page and "tools/call_frequency" in page


# -- what is refused before a run ------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools.generations": -1}, "tools.generations: -1 is out of range"),
        ({"tools.timeout": 0.0}, "tools.timeout: 0.0 is out of range"),
        ({"rewards.functions": "rule,model"}, "trained on outputs without programs"),
        ({"method": "grpo_process"}, "trained on outputs without programs"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(GrpoError, match=message):
        small_config(SIZES | changes)


def test_refused_where_no_sandbox_works_or_an_output_fits_no_row(
    folder, recital, monkeypatch
):
    with opened(folder, recital, "rows", optimizer__row_length=300) as run:
        with pytest.raises(GrpoError, match="row_length: 300; a prompt of 1 tokens"):
            rl.prepare_rl(run)
    sandbox._sandbox_of.cache_clear()
    monkeypatch.setattr(sandbox.mechanisms, "MECHANISMS", {})
    with opened(folder, recital, "bare") as run:
        with pytest.raises(GrpoError, match="no way to confine a program"):
            rl.prepare_rl(run)
