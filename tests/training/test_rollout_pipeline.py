"""What overlaps, and that it changes nothing it should not: runs on one device.

The reward function is in here. Each test hands it something to do while a step is
graded, and looks at what it was asked for.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import SMALL, dotted, small_config, write_questions

from grpo_jax.distributed import sharding
from grpo_jax.errors import Preempted
from grpo_jax.training import credit, rl, rl_programs, setup
from grpo_jax.training.metrics_writer import Recorder
from grpo_jax.training.objectives import grpo_objective
from grpo_jax.training.optimizers import rl_optimizer
from grpo_jax.training.rollout_pipeline import RolloutPipeline
from grpo_jax.training.rollouts import RolloutSource, read_outputs
from grpo_jax.training.run import Run
from grpo_jax.training.train_step import TrainState, make_step
from grpo_jax.training.work_directory import WorkDirectoryClaim

STEPS, CAP = 6, 2.0
SIZES = SMALL | {
    "rewards.functions": "test_rollout_pipeline:digits",
    "rl_steps": STEPS,
    "learning_rate": 1e-2,
    "max_new_tokens": 8,
}
calls: list[tuple[list[str], list[str]]] = []
meanwhile: list[Callable[[int], Any]] = []


def digits(prompts, completions, **columns):
    """The reward: how many digits. Some questions tie all their outputs."""
    calls.append((list(prompts), list(completions)))
    for act in [*meanwhile]:
        act(len(calls) - 1)
    pairs = zip(prompts, completions, strict=True)
    return [sum(c.isdigit() for c in text) * (q[0] > "3") for q, text in pairs]


@pytest.fixture(autouse=True)
def fresh():
    calls.clear(), meanwhile.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    write_questions(folder / "sums.jsonl")
    return folder


@contextlib.contextmanager
def opened(folder: Path, name: str, **changes):
    questions = str(folder / "sums.jsonl")
    data = {"data.train": questions, "data.sft": questions, "data.eval": questions}
    config = small_config(SIZES | data | dotted(changes))
    model, tokenizer = setup.make_model(config)
    (folder / name).mkdir(exist_ok=True)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), Recorder(folder / name) as recorder:
        claim = WorkDirectoryClaim(config, folder / name)
        yield Run(config, folder / name, mesh, model, tokenizer, recorder, claim)


def initial(run: Run):
    return setup.initial_params(run.config, run.model, run.mesh)


def learn(folder: Path, name: str, **changes):
    """The RL stage from random weights: its parameters."""
    with opened(folder, name, **changes) as run:
        start = initial(run)
        return rl.train_rl(run, lambda: start, *rl.prepare_rl(run))[1]


def metrics(workdir: Path) -> list[dict]:
    """Of each RL step, without the times."""
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "rl"]
    return [{k: v for k, v in row.items() if "time" not in k} for row in rows]


def one_after_the_other(run: Run, *, lag: int, cap: float | None):
    """GRPO with nothing at the same time as anything else, π_ref in the update."""
    config, source, reference = run.config, RolloutSource(run), initial(run)
    transformation, _ = rl_optimizer(config)
    objective = grpo_objective(run.model, importance_cap=cap)  # β = 0.04
    update = make_step(objective, transformation)
    policies = []
    state = TrainState.create(jax.tree.map(jnp.copy, reference), transformation)
    for step in range(STEPS):
        policies.append(jax.tree.map(jnp.copy, state.params))
        sampler = policies[max(step - lag, 0)]
        outputs = read_outputs(source.sample_rollout(step, sampler))
        outputs, scores, _ = source.score_rollout(step, outputs, sampler)
        samples = credit.assign_outcome_credit(
            outputs, scores, [1.0], config.group_size, scale="group", baseline="mean"
        )
        state, _ = update(
            state, reference, rl_programs.BatchLayout(run.config, run.mesh)(samples)
        )
    return state.params


def distance(a, b) -> float:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in leaves)


def test_a_reference_in_host_memory_changes_nothing(folder):
    short = {"rl_steps": 3}
    params = learn(folder, "device", **short)
    away = learn(folder, "host", model__reference_memory="host", **short)
    assert distance(params, away) == 0
    assert [r["kl"] for r in metrics(folder / "host")][1] > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_is_what_it_would_be_one_thing_after_the_other(lag, folder):
    """Step k's outputs are of the policy before `lag` updates, and weighted if it is 1;
    what its reward function sees are its own questions and outputs, and no others."""
    changed = {} if lag == 0 else {"max_staleness": 1}
    params = learn(folder, f"lag-{lag}", **changed)
    seen = [*calls]
    calls.clear()
    with opened(folder, "reference") as run:
        same = one_after_the_other(run, lag=lag, cap=CAP if lag else None)
        assert seen == calls
        assert distance(params, same) < 1e-5
        asked = RolloutSource(run).batches[0]
        for step, (prompts, _) in enumerate(seen):
            questions = [example.question for example, _ in asked[step]]
            assert prompts == [q for q in questions for _ in range(4)]
        # Neither agreement is an accident.
        other = one_after_the_other(run, lag=lag, cap=None if lag else 0.5)
        assert distance(params, other) > 1e-3
        calls.clear()
        one_after_the_other(run, lag=1 - lag, cap=None)
        assert [s == c for s, c in zip(seen, calls, strict=True)][:2] == [True, False]
    rows = metrics(folder / f"lag-{lag}")
    assert [r["sampling/staleness"] for r in rows] == [0.0] + [float(lag)] * (STEPS - 1)
    assert all(0 < r["sampling/occupancy"] <= 1 for r in rows)


def wait(array: Any) -> bool:
    """Whether the device gets there while the reward function keeps the host."""
    until = time.monotonic() + 60
    while not array.is_ready() and time.monotonic() < until:
        time.sleep(0.001)
    return array.is_ready()


def test_the_next_rollout_is_sampled_while_a_step_is_graded(folder, monkeypatch):
    start, ahead, done = RolloutPipeline.start_rollout, [], []

    def watched(self, step, params):
        start(self, step, params)
        ahead.append(self.ahead)

    def until_sampled(call):
        (*_, rollout) = ahead
        if rollout is not None:
            done.append((call, rollout.step, wait(rollout.arrays["tokens"])))

    monkeypatch.setattr(RolloutPipeline, "start_rollout", watched)
    meanwhile.append(until_sampled)
    learn(folder, "ahead", max_staleness=1)
    assert done == [(call, call + 1, True) for call in range(STEPS - 1)]


@pytest.mark.parametrize(
    "method, maker, changes, each",
    [
        ("grpo", "make_scorer", {}, 1),  # log π_ref
        ("gspo", "make_scorer", {"updates_per_rollout": 2, "entropy_coef": 0.01}, 1),
        ("ppo", "make_scorer", {"updates_per_rollout": 2}, 2),  # log π_old, log π_ref
        ("ppo", "make_reward_scorer", {}, 1),  # V
    ],
)
def test_passes_without_rewards_run_while_a_step_is_graded(
    method, maker, changes, each, folder, monkeypatch
):
    make, passes, done = getattr(rl_programs, maker), [], []

    def watched(*arguments, **options):
        score = make(*arguments, **options)

        def scored(params, batch):
            passes.append(score(params, batch))
            return passes[-1]

        return scored

    monkeypatch.setattr(rl_programs, maker, watched)
    meanwhile.append(lambda call: done.append((len(passes), wait(passes[-1]))))
    name = f"{method}-{maker}-{each}"
    learn(folder, name, method=method, rl_steps=2, **changes)
    assert done == [(each, True), (2 * each, True)]


def test_only_a_cpu_mesh_of_several_devices_waits_for_a_program():
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 3000, lambda i, x: jnp.sin(x @ x), x)

    x = jax.block_until_ready(slow(jnp.ones((128, 128))))  # compiled
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    assert not sharding.wait_on_cpu_mesh(alone, slow(x)).is_ready()
    several = sharding.make_mesh(fsdp=-1)
    assert several.size > 1 and sharding.wait_on_cpu_mesh(several, slow(x)).is_ready()


@pytest.mark.parametrize("method", ["grpo_iterative", "dapo", "ppo"])
def test_a_stopped_run_goes_on_to_the_same_bits(method, folder, monkeypatch):
    """Killed between two checkpoints, then preempted where none was due; the straight
    run saves at other steps. Where the reference changes, no rollout is older."""
    options = {"method": method, "max_staleness": 1}
    straight = learn(folder, f"{method}-straight", **options, checkpoint_every=4)
    name = f"{method}-stopped"
    options["checkpoint_every"] = 2
    write = Recorder.write

    def killed(self, stage, step, values):
        write(self, stage, step, values)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "write", killed)
        learn(folder, name, **options)

    def preempt(call):
        if len(metrics(folder / name)) == 4:  # while step 5 is graded
            meanwhile.clear()  # once: a second one ends the process
            os.kill(os.getpid(), signal.SIGTERM)

    meanwhile.append(preempt)
    with pytest.raises(Preempted, match="after step 5"):
        learn(folder, name, **options)
    assert distance(straight, learn(folder, name, **options)) == 0.0
    rows = metrics(folder / name)
    assert rows == metrics(folder / f"{method}-straight")
    restarts = (0, 3) if method == "grpo_iterative" else (0,)
    staleness = [float(step not in restarts) for step in range(STEPS)]
    assert [row["sampling/staleness"] for row in rows] == staleness
    if method == "dapo":  # tied groups made room for further rollouts, of now
        assert min(row["dynamic/rollouts"] for row in rows[1:]) > 1


def test_a_rollout_under_way_is_taken_up_by_the_run_that_asked_for_it(folder):
    """Not where the questions or the group were changed since, or staleness is off."""
    with opened(folder, "kept") as run:
        params = initial(run)
        source = RolloutSource(run)
        pipeline = RolloutPipeline(source, staleness=1, until=STEPS)
        assert pipeline.pending_state() == {}
        pipeline.start_rollout(3, params)
        kept = json.loads(json.dumps(pipeline.pending_state()))

        def resumed(staleness=1, until=STEPS, source=source):
            other = RolloutPipeline(source, staleness=staleness, until=until)
            other.restore_pending(kept)
            return other.take_rollout(3, params)

        rollout, staleness = resumed()
        assert staleness == 1
        for name, array in source.sample_rollout(3, params).arrays.items():
            assert np.asarray(array).tobytes() == rollout.arrays[name].tobytes(), name
        assert resumed(staleness=0)[1] == resumed(until=3)[1] == 0
        with opened(folder, "other", group_size=2) as other:
            assert resumed(source=RolloutSource(other))[1] == 0
        with opened(folder, "other", seed=1) as other:
            assert resumed(source=RolloutSource(other))[1] == 0
