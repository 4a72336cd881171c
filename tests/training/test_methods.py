"""Every row of the table of methods as a whole run, and what makes each row itself."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import SMALL, dotted, small_config, write_questions

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import Config, RewardSettings
from grpo_jax.rewards.reward_functions import RewardScores
from grpo_jax.train import train_run
from grpo_jax.training import credit, rollouts
from grpo_jax.training.metrics_writer import Recorder
from grpo_jax.training.reward_model import labels
from grpo_jax.training.rl_programs import BatchLayout, make_objective
from grpo_jax.training.rl_step import by_output
from grpo_jax.training.run import load_run, open_run
from grpo_jax.training.run_rewards import Rewards
from grpo_jax.training.train_step import accumulate_gradients, make_scorer

STEPS = 4
SIZES = SMALL | {
    "rl_steps": STEPS,
    "optimizer.micro_rows": 8,
    "optimizer.row_length": 40,
    "checkpoint_every": 1,
    "reward_model.questions": 16,
    "reward_model.completions": 4,
    "reward_model.steps": 4,
    "reward_model.batch_size": 8,
    "eval.samples": 0,
}
# One method of each kind of credit or loss; the relatives are GRPO with other values.
ROWS = ["rft", "online_rft", "dpo", "ppo", "grpo_process", "grpo_iterative", "dapo"]
ROWS += ["rloo", "reinforce_pp"]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A folder with questions a tiny model half learns, and the Instruct stage."""
    folder = tmp_path_factory.mktemp("methods")
    write_questions(folder / "sums.jsonl", two_ways=True)
    run(folder, "instruct", "sft")
    return folder


def run(folder: Path, name: str, method: str, **changes) -> Path:
    """The method's run in this process, from the same Instruct checkpoint."""
    questions = str(folder / "sums.jsonl")
    data = {"data.train": questions, "data.sft": questions, "data.eval": questions}
    config = small_config(SIZES | data | {"method": method} | dotted(changes))
    start = folder / "instruct" / "checkpoints" / "sft"
    if start.exists() and not (folder / name / "checkpoints" / "sft").exists():
        shutil.copytree(start, folder / name / "checkpoints" / "sft")
    train_run(config, folder / name)
    return folder / name


def metrics(workdir: Path, stage: str = "rl") -> list[dict]:
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def weights(workdir: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(load_run(workdir)[1])]


def differ(a: Path, b: Path) -> bool:
    pairs = zip(weights(a), weights(b), strict=True)
    return any((x != y).any() for x, y in pairs)


@pytest.mark.parametrize("method", ROWS)
def test_every_row_runs_to_its_table(instruct, method, capsys):
    workdir = run(instruct, method, method)
    table = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    assert table[0] == "| set | n | greedy: instruct → rl |" and len(table) == 3
    rows = metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert differ(workdir, instruct / "instruct")
    results = json.loads((workdir / "results.json").read_text())
    assert results["method"] == method and results["models"] == ["instruct", "rl"]


def test_the_reference_follows_the_policy_where_the_method_iterates(instruct):
    """KL is 0 at the first step of an iteration, when π_ref is π_θ, and only there."""
    changes = dict(learning_rate=1e-2, iterations=3, rl_steps=6)
    workdir = run(instruct, "iterates", "grpo_iterative", **changes)
    kl = [row["kl"] for row in metrics(workdir)]
    assert max(kl[0], kl[2], kl[4]) < 1e-6
    assert min(kl[1], kl[3], kl[5]) > 1e-5
    # and the reward model was trained on: new labels, more steps, other weights
    assert [row["step"] for row in metrics(workdir, "reward-2")] == [1, 2, 3, 4]
    first, second = (labels.read_labels(workdir / f"labels-{i}.jsonl") for i in (1, 2))
    assert len(first) == len(second) == 16 and first != second


@pytest.mark.parametrize("method", ["ppo", "grpo_iterative"])
def test_a_stopped_run_goes_on_to_the_same_bits(instruct, method, monkeypatch):
    """Stopped at the boundary of two iterations, and after it."""
    straight = run(instruct, f"{method}-straight", method)
    write, stops = Recorder.write, iter((2, 3))

    def interrupted(self, stage, step, values):
        write(self, stage, step, values)
        if stage == "rl" and step == state["at"]:
            state["at"] = next(stops, None)
            raise KeyboardInterrupt

    state: dict[str, int | None] = {"at": next(stops)}
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "write", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(instruct, f"{method}-stopped", method)
    stopped = run(instruct, f"{method}-stopped", method)
    assert not differ(straight, stopped)
    for a, b in zip(metrics(straight), metrics(stopped), strict=True):
        assert {k: v for k, v in a.items() if "time" not in k} == {
            k: v for k, v in b.items() if "time" not in k
        }


def test_dynamic_sampling_leaves_no_tied_group(instruct, tmp_path):
    """Questions with an odd first term tie all their outputs: they are replaced."""
    (tmp_path / "mine.py").write_text(
        "def mine(prompts, completions, **columns):\n"
        "    return [0.0 if int(p[0]) % 2 else float(i)\n"
        "            for i, p in enumerate(prompts)]\n"
    )
    reward = f"{tmp_path / 'mine.py'}:mine"
    dynamic = run(instruct, "dynamic", "dapo", rewards__functions=reward, rl_steps=1)
    (row,) = metrics(dynamic)
    assert row["frac_reward_zero_std"] == 0.0
    assert row["dynamic/rollouts"] > 1 and 0.2 < row["dynamic/tied"] < 0.8
    plain = run(
        instruct,
        "static",
        "dapo",
        rewards__functions=reward,
        rl_steps=1,
        dynamic_sampling=0,
    )
    (row,) = metrics(plain)
    assert row["frac_reward_zero_std"] > 0.2
    tied = row["frac_reward_zero_std"] * 32
    assert row["samples/taught"] <= 32 - tied  # β = 0: tied outputs cost no pass


def test_dynamic_sampling_counts_right_outputs_and_not_their_length(instruct, tmp_path):
    """A punishment of length unties groups that are all right or all wrong: 0 < number
    right < G is of the reward before it (DAPO)."""
    (tmp_path / "mine.py").write_text(
        "def mine(prompts, completions, **columns):\n"
        "    return [0.0 if int(p[0]) % 2 else float(i % 2)\n"
        "            for i, p in enumerate(prompts)]\n"
    )
    changes = {
        "method": "dapo",
        "rewards__functions": f"{tmp_path / 'mine.py'}:mine",
        "overlong_buffer": 12,
        "rl_steps": 1,
    }
    workdir = run(instruct, "punished", **changes)
    (row,) = metrics(workdir)
    assert row["rewards/overlong/std"] > 0.05  # or there were nothing to be misled by
    assert row["dynamic/rollouts"] > 1 and 0.2 < row["dynamic/tied"] < 0.8
    here = open_run(workdir)
    source = rollouts.RolloutSource(here)
    policy = load_run(instruct / "instruct")[1]
    with jax.set_mesh(here.mesh):
        rollout = source.sample_rollout(0, policy)
        _, scores, _ = source.score_rollout(0, rollouts.read_outputs(rollout), policy)
    groups = scores.by_function["mine"].reshape(-1, 4)
    assert (groups.min(1) == 0).all() and (groups.max(1) == 1).all()


def test_the_rule_alone_tells_right_from_wrong(instruct):
    """Of several functions; a group whose format alone differs is all wrong."""
    config = open_run(instruct / "instruct").config
    config = dataclasses.replace(
        config,
        method="dapo",
        overlong_buffer=4,
        rewards=RewardSettings(functions="rule,format"),
    )
    rewards = Rewards(config, [])
    given = {
        "rule_reward": np.array([0, 0, 1, np.nan], np.float32),
        "format_reward": np.array([0, 1, 1, 1], np.float32),
        "overlong": np.array([0, -0.3, -0.1, 0], np.float32),
    }
    total = np.array([0, 0.7, 1.9, 1], np.float32)
    scores = RewardScores(total, given)
    np.testing.assert_array_equal(rewards.correctness(scores), given["rule_reward"])
    del given["rule_reward"]
    other = dataclasses.replace(config, rewards=RewardSettings(functions="format"))
    scores = RewardScores(total, given)
    np.testing.assert_array_equal(Rewards(other, []).correctness(scores), [0, 1, 1, 1])


def test_rloos_gradient_is_reinforce_by_hand(instruct):
    """Sampled once, taught once: Σ_i (R_i - mean of the others' R) ∇ log π(o_i|q) / N,
    with R_i = r_i - β (log π_θ - log π_ref) of the whole output."""
    workdir = run(instruct, "rloo-by-hand", "rloo", rl_steps=1, kl_coef=0.5)
    here = open_run(workdir)
    config, source = here.config, rollouts.RolloutSource(here)
    policy = load_run(instruct / "instruct")[1]
    noise = iter(jax.random.split(jax.random.key(5), 99))
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), policy
    )
    with jax.set_mesh(here.mesh):
        rollout = source.sample_rollout(0, moved)
        outputs, scores, _ = source.score_rollout(
            0, rollouts.read_outputs(rollout), moved
        )
        batch = BatchLayout(config, here.mesh)([o.sample for o in outputs])
        ref = make_scorer(here.model)(policy, batch)
        ref = by_output(ref, outputs)
        penalty = 0.5 * credit.log_ratio_sums(outputs, ref)
        graded = dataclasses.replace(scores, rewards=scores.rewards - penalty)
        options = dict(scale="none", baseline="leave_one_out")
        samples = credit.assign_outcome_credit(
            outputs, graded, [1.0], config.group_size, **options
        )
        batch = BatchLayout(config, here.mesh)(samples)
        objective = make_objective(config, here.model)
        step = jax.jit(lambda p, b: accumulate_gradients(objective, p, None, b)[0])
        ours = step(moved, batch)

    R = np.array([r - p for r, p in zip(scores.rewards, penalty, strict=True)])
    groups = R.reshape(-1, config.group_size)
    others = (groups.sum(1, keepdims=True) - groups) / (config.group_size - 1)
    weights = (groups - others).reshape(-1)

    longest = max(len(o.prompt) + len(o.tokens) for o in outputs)
    ids, chosen = np.zeros((2, len(outputs), longest), int)
    for i, o in enumerate(outputs):
        ids[i, : len(o.prompt) + len(o.tokens)] = [*o.prompt, *o.tokens]
        chosen[i, len(o.prompt) :][: len(o.tokens)] = 1

    @jax.jit
    def reinforce(params):
        logps = jax.nn.log_softmax(here.model.logits(params, jnp.asarray(ids)))
        own = jnp.take_along_axis(logps[:, :-1], jnp.asarray(ids)[:, 1:, None], 2)
        of_outputs = (own[..., 0] * chosen[:, 1:]).sum(1)
        return -(jnp.asarray(weights) * of_outputs).sum() / len(outputs)

    assert np.ptp(weights) > 0.5 and np.abs(penalty).max() > 0.05
    with jax.set_mesh(here.mesh):
        expected = jax.jit(jax.grad(reinforce))(moved)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        scale = float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4 * scale)


def test_rft_samples_from_the_instruct_model_all_along(instruct):
    """The outputs of a step are π_sft's, whatever was learned before it."""
    workdir = run(instruct, "rft-again", "rft", learning_rate=1e-1)
    here = open_run(workdir)
    source = rollouts.RolloutSource(here)
    sft = load_run(instruct / "instruct")[1]
    with jax.set_mesh(here.mesh):
        rollout = source.sample_rollout(STEPS - 1, sft)
        outputs, _, _ = source.score_rollout(
            STEPS - 1, rollouts.read_outputs(rollout), sft
        )
    lines = (workdir / "samples.jsonl").read_text().splitlines()
    shown = json.loads(lines[-1])["completions"]
    assert [c["completion"] for c in shown] == [o.text for o in outputs[:4]]


def test_truncated_outputs_are_masked_on_request(instruct):
    """Five new tokens cut most outputs off: those teach nothing, the rest as before."""
    limit = dict(max_new_tokens=5, rl_steps=1, kl_coef=0.0)
    masked = run(instruct, "masked", "grpo", mask_truncated=True, **limit)
    free = run(instruct, "unmasked", "grpo", **limit)
    (a,), (b,) = metrics(masked), metrics(free)
    assert a["completions/clipped_ratio"] == b["completions/clipped_ratio"] > 0.3
    assert a["num_tokens"] < b["num_tokens"]


def test_the_table_is_the_papers():
    sources = {name: method.source for name, method in METHODS.items()}
    assert {n for n, s in sources.items() if s == "instruct"} == {"rft", "dpo"}
    assert METHODS["grpo"].fields["kl_coef"] == 0.04
    for name, method in METHODS.items():
        assert dataclasses.is_dataclass(method), name
        assert set(method.fields) <= {f.name for f in dataclasses.fields(Config)}
