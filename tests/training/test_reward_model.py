"""The reward model: its loss, its scores wherever they are packed, what it learns."""

import dataclasses
import functools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import prmbench
import pytest
from auc import auc, auc_interval
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.algorithms.reward_model_losses import reward_loss
from grpo_jax.config import Config, ModelSettings
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.files import write_json
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.metrics_writer import Recorder
from grpo_jax.training.packing import pack
from grpo_jax.training.reward_model.labels import LabelledSequence
from grpo_jax.training.reward_model.scoring import (
    make_reward_scorer,
    reward_objective,
    reward_sample,
    score_samples,
)
from grpo_jax.training.reward_model.training import (
    RewardModelTraining,
    load_reward_model,
    train_reward_model,
)
from grpo_jax.training.run import Run
from grpo_jax.training.setup import make_model
from grpo_jax.training.train_step import accumulate_gradients
from grpo_jax.training.work_directory import WorkDirectoryClaim

MODEL = RewardModel(
    Decoder(
        ModelConfig(
            vocab_size=12,
            width=16,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=4,
            ffn=32,
        )
    )
)
POLICY = MODEL.decoder.init(jax.random.key(0))
PARAMS = MODEL.init(jax.random.key(1), POLICY)
FORWARD = jax.jit(MODEL)


# -- the loss ----------------------------------------------------------------------


def test_cross_entropy_by_hand():
    """σ(log 3) = 3/4: right costs log 4/3, wrong log 4, a soft ½ the mean of both."""
    scores = jnp.full((1, 4), jnp.log(3.0))
    costs = {1.0: np.log(4 / 3), 0.0: np.log(4), 0.5: np.log(4 / 3) / 2 + np.log(4) / 2}
    for label, cost in costs.items():
        loss, _ = reward_loss(scores, jnp.full((1, 4), label), jnp.ones((1, 4)))
        assert float(loss) == pytest.approx(cost, rel=1e-6)
    labels, mask = jnp.array([[1.0, 0.0, 0.5, 7.0]]), jnp.array([[1, 1, 1, 0]])
    loss, metrics = reward_loss(scores, labels, mask)
    assert float(loss) == pytest.approx(sum(costs.values()) / 3, rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(1 / 3)
    assert float(metrics["label"]) == pytest.approx(0.5)
    assert float(metrics["score"]) == pytest.approx(np.log(3), rel=1e-6)
    assert float(metrics["num_tokens"]) == 3


def test_a_sure_score_keeps_the_digits_of_its_small_cost():
    """-log σ(s) and its gradient, of both signs, against float64."""
    scores = np.array([[4.0, 9.0, 17.0, 40.0, -4.0, -9.0, -17.0, -40.0]])
    labels = (scores > 0).astype(float)

    def costs(scores):
        each = jax.vmap(lambda s, y: reward_loss(s, y, jnp.ones((1, 1)))[0])
        return each(scores.T[:, None], jnp.asarray(labels, jnp.float32).T[:, None])

    given = jnp.asarray(scores, jnp.float32)
    rare = np.exp(-np.abs(scores[0]))
    np.testing.assert_allclose(costs(given), np.log1p(rare), rtol=1e-6)
    slopes = jax.grad(lambda s: costs(s).sum())(given)[0]
    expected = -np.sign(scores[0]) * rare / (1 + rare)
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


def test_its_gradient_is_the_error_at_the_marks_alone():
    """∂loss/∂s = (σ(s) - y) / n; what is masked may be NaN, a score enormous."""
    scores = jnp.array([[jnp.nan, 1e4, -1e4, 0.0], [0.0, jnp.inf, 1.0, jnp.nan]])
    labels = jnp.array([[jnp.nan, 1.0, 0.25, 1.0], [0.0, 0.0, 0.5, 1.0]])
    mask = jnp.array([[0, 1, 1, 1], [1, 0, 1, 0]])
    loss, metrics = reward_loss(scores, labels, mask)
    assert all(np.isfinite(x) for x in (loss, *metrics.values()))
    gradient = jax.grad(lambda s: reward_loss(s, labels, mask)[0])(scores)
    errors = [[0, 0, -0.25, -0.5], [0.5, 0, 1 / (1 + np.exp(-1)) - 0.5, 0]]
    np.testing.assert_allclose(gradient, np.array(errors) / 5, atol=1e-7)


def test_parts_sum_to_the_whole_under_one_normalizer():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(4, 6)), rng.random((4, 6))
    mask = rng.random((4, 6)) < 0.4
    whole, _ = reward_loss(*map(jnp.asarray, (scores, labels, mask)))
    rows = zip(scores, labels, mask, strict=True)
    parts = [
        reward_loss(*(jnp.asarray(x)[None] for x in row), normalizer=mask.sum())[0]
        for row in rows
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
    loss, _ = reward_loss(*map(jnp.asarray, (scores, labels, np.zeros((4, 6)))))
    assert float(loss) == 0  # nothing is marked
    with pytest.raises(ValueError, match=r"labels has shape \(4, 5\)"):
        reward_loss(jnp.asarray(scores), jnp.asarray(labels[:, 1:]), jnp.asarray(mask))


# -- the scores --------------------------------------------------------------------


def sequences_of(n, longest=14, seed=0):
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(n)]
    return [[rng.randrange(1, 12) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def alone():
    """Each sequence by itself, without packing or padding on its left."""
    found = []
    for tokens in sequences_of(11):
        padded = jnp.zeros((1, 14), int).at[0, : len(tokens)].set(jnp.array(tokens))
        found.append(np.asarray(FORWARD(PARAMS, padded)[0, : len(tokens)]))
    return found


@pytest.mark.parametrize(
    "options", [dict(length=14), dict(length=40, rows=3, capacity=5)]
)
def test_packed_scores_are_those_of_each_sequence_alone(alone, options):
    """The last token's too, whatever stands after it."""
    found = score_samples(MODEL, PARAMS, sequences_of(11), **options)
    for mine, expected in zip(found, alone, strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-6)
    assert np.std([values[-1] for values in alone]) > 1e-2  # there is something to see


def test_padding_on_the_left_is_not_seen(alone):
    tokens = sequences_of(11)[0]
    room = 20 - len(tokens)
    padded = jnp.array([[3] * room + tokens])
    mask = jnp.array([[0] * room + [1] * len(tokens)])
    scores = FORWARD(PARAMS, padded, mask=mask)
    np.testing.assert_allclose(scores[0, room:], alone[0], atol=2e-6)


def test_a_score_depends_on_the_tokens_up_to_it():
    tokens = jnp.arange(14)[None] % 12
    later = FORWARD(PARAMS, tokens.at[0, 3].set(9)) - FORWARD(PARAMS, tokens)
    np.testing.assert_array_equal(later[0, :3], 0)
    assert (jnp.abs(later[0, 3:]) > 1e-6).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(GrpoError, match="sample 1 has 6 tokens; 2 to 5 fit"):
        score_samples(MODEL, PARAMS, [[1], [2] * 5], length=4)
    with pytest.raises(GrpoError, match="2 micro-batches > 1"):
        score_samples(MODEL, PARAMS, [[1] * 4] * 2, length=4, capacity=1)
    assert score_samples(MODEL, PARAMS, [], length=4) == []


def test_it_starts_as_the_policys_trunk_and_a_small_head():
    assert set(PARAMS) == (set(POLICY) - {"unembed"}) | {"head", "head_bias"}
    trunk = {k: PARAMS[k] for k in PARAMS if not k.startswith("head")}
    jax.tree.map(np.testing.assert_array_equal, trunk, {k: POLICY[k] for k in trunk})
    tokens = jnp.arange(14)[None] % 12
    hidden = jax.jit(MODEL.decoder.hidden)(POLICY, tokens)
    expected = hidden @ PARAMS["head"].reshape(-1, 1)
    scores = FORWARD(PARAMS, tokens)
    np.testing.assert_allclose(scores[..., None], expected, atol=1e-6)
    assert jnp.abs(scores).max() < 2
    buffers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(POLICY)}
    assert not buffers & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(PARAMS)}


def labelled_of(sequences):
    rng = random.Random(1)
    samples = []
    for tokens in sequences:
        ends = sorted(rng.sample(range(len(tokens)), min(2, len(tokens))))
        samples.append(reward_sample(tokens, ends, [rng.random() for _ in ends]))
    return samples


def test_every_mesh_gives_one_devices_scores_and_gradients():
    batch = pack(labelled_of(sequences_of(30)), length=16, rows=4)
    gradients = functools.partial(accumulate_gradients, reward_objective(MODEL))
    expected = jax.jit(gradients)(PARAMS, None, batch)
    scores = make_reward_scorer(MODEL)(PARAMS, batch)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, sharding.shardings(PARAMS, mesh))
        assert params["head"].sharding.is_fully_replicated
        placed = sharding.batch_placer(mesh)(batch)
        found = jax.block_until_ready(jax.jit(gradients)(params, None, placed))
        scored = make_reward_scorer(MODEL)(params, placed)
    close = dict(atol=2e-6, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **close), found, expected
    )
    np.testing.assert_allclose(scored, scores, **close)


def test_micro_batches_sum_to_one_batch():
    samples = labelled_of(sequences_of(30))
    gradients = jax.jit(
        functools.partial(accumulate_gradients, reward_objective(MODEL))
    )
    small, large = (pack(samples, length=20, rows=rows) for rows in (2, 16))
    assert small.used > 1 == large.used
    first, metrics = gradients(PARAMS, None, small)
    second, expected = gradients(PARAMS, None, large)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert metrics.keys() == expected.keys()
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)


# -- what it learns ----------------------------------------------------------------


def start_run(workdir, recorder):
    model = ModelSettings(layers=1, width=32, heads=2, ffn=64)
    config = Config(name="test", checkpoint_every=20, model=model)
    write_json(workdir / "config.json", dataclasses.asdict(config))
    decoder, tokenizer = make_model(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    claim = WorkDirectoryClaim(config, workdir)
    return Run(config, workdir, mesh, decoder, tokenizer, recorder, claim)


def toy(n, seed):
    """Steps of four digits; right while no 7 (token 10) has come, however long ago."""
    rng, items = random.Random(seed), []
    for i in range(n):
        tokens = [3] + [rng.choice([4, 5, 6, 7, 8, 10]) for _ in range(12)]
        ends = (4, 8, 12)
        labels = tuple(float(10 not in tokens[: end + 1]) for end in ends)
        items.append(
            LabelledSequence(
                tokens=tuple(tokens), prompt=1, ends=ends, labels=labels, id=str(i)
            )
        )
    return items


SETTINGS = RewardModelTraining(
    steps=60, batch_size=32, learning_rate=1e-2, micro_rows=16, row_length=32
)


def learn(workdir, **changes):
    workdir.mkdir(exist_ok=True)
    with Recorder(workdir) as recorder:
        run = start_run(workdir, recorder)
        model = RewardModel(run.model)

        def start():
            policy = run.model.init(jax.random.key(0))
            return run.new_reward_model(jax.random.key(1), policy)

        with jax.set_mesh(run.mesh):
            settings = dataclasses.replace(SETTINGS, **changes)
            params = train_reward_model(run, "reward", start, toy(400, 0), settings)
    return model, params


def scores_of(model, params, items):
    scores = score_samples(
        model, params, [item.tokens for item in items], length=32, rows=16
    )
    return [s[list(item.ends)] for s, item in zip(scores, items, strict=True)]


@pytest.mark.parametrize("kind", ["process", "outcome"])
def test_it_learns_what_is_right(tmp_path, kind):
    model, params = learn(tmp_path / kind, kind=kind)
    items = toy(200, 1)
    found = scores_of(model, params, items)
    last = auc([s[-1] for s in found], [item.labels[-1] for item in items])
    assert last > 0.95
    if kind == "process":
        labels = np.concatenate([item.labels for item in items])
        assert auc(np.concatenate(found), labels) > 0.95
    rows = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
    first, final = json.loads(rows[0]), json.loads(rows[-1])
    assert first["stage"] == "reward" and final["step"] == 60
    assert final["loss"] < 0.6 * first["loss"] and final["accuracy"] > 0.9
    assert first["num_tokens"] == 32 * (3 if kind == "process" else 1)


def test_a_resumed_run_is_the_same_run(tmp_path):
    _, straight = learn(tmp_path / "straight", steps=8)
    learn(tmp_path / "resumed", steps=3)
    model, resumed = learn(tmp_path / "resumed", steps=8)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    loaded, params, tokenizer = load_reward_model(tmp_path / "resumed")
    jax.tree.map(np.testing.assert_array_equal, params, straight)
    assert loaded == model and tokenizer.encode("1") == [4]
    with pytest.raises(GrpoError, match="reward-2: no such folder"):
        load_reward_model(tmp_path / "resumed", "reward-2")


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(GrpoError, match="kind 'both' is not one of process, outcome"):
        learn(tmp_path / "both", kind="both")


# -- AUC ---------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_auc_counts_the_pairs(items):
    """P(right above wrong), ties half: over all pairs."""
    right = [s for s, y in items if y]
    wrong = [s for s, y in items if not y]
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    found = auc(*zip(*items, strict=True))
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)


def test_auc_by_hand():
    assert auc([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert auc([1, 2, 3, 4], [1, 1, 0, 0]) == 0
    assert auc([5, 5, 5], [1, 0, 0]) == 0.5
    # right: 2, 3; wrong: 1, 2, 3: (1 + ½ + 0) + (1 + 1 + ½) of 6 pairs
    assert auc([2, 3, 1, 2, 3], [1, 1, 0, 0, 0]) == pytest.approx(4 / 6)


def test_the_interval_draws_questions():
    """Ten copies of each step tell nothing new: the interval must not shrink."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores, groups = rng.normal(size=60) + labels, np.arange(60)
    once = auc_interval(scores, labels, groups, samples=200)
    tenfold = [np.repeat(x, 10) for x in (scores, labels, groups)]
    assert auc_interval(*tenfold, samples=200) == pytest.approx(once)
    assert once[0] < auc(scores, labels) < once[1] and once[1] - once[0] > 0.1


# -- PRMBench ----------------------------------------------------------------------

ROW = {
    "original_question": "1+1?",
    "modified_question": "1+1, now?",
    "original_process": ["1. Add.", "2. It is 2."],
    "modified_process": ["1. Add.", "2. It is 3.", "3. So 3."],
    "error_steps": [2, 3],
    "classification": "circular",
    "idx": "a",
}


def write_rows(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_prmbench_rows(tmp_path):
    rows = [ROW, ROW | {"classification": "deception"}, ROW | {"error_steps": [4]}]
    bench = prmbench.read(write_rows(tmp_path / "bench.jsonl", *rows))
    (original,), (first, second) = bench.original, bench.modified
    assert original.question == "1+1?" and original.labels == (1, 1)
    assert first.question == "1+1, now?" and first.labels == (1, 0, 0)
    assert bench.kinds == ["circular", "deception"] and bench.dropped == 1
    assert {s.id for s in (original, first, second)} == {"a"}
    broken = {k: v for k, v in ROW.items() if k != "error_steps"}
    with pytest.raises(GrpoError, match=r"bench.jsonl:2: not a row.*error_steps"):
        prmbench.read(write_rows(tmp_path / "bench.jsonl", ROW, broken))
    with pytest.raises(GrpoError, match=r"none.jsonl: cannot be read"):
        prmbench.read(tmp_path / "none.jsonl")


def test_prmbench_figures_of_a_known_scorer(tmp_path):
    rows = [ROW, ROW | {"idx": "b"}, ROW | {"idx": "c", "error_steps": []}]
    bench = prmbench.read(write_rows(tmp_path / "bench.jsonl", *rows))

    def perfect(solutions):
        return [np.array(s.labels) for s in solutions]

    result = prmbench.evaluate(perfect, bench)
    assert result["steps"]["auc"] == result["solutions"]["auc"] == 1
    assert (result["steps"]["n"], result["steps"]["right"]) == (9, 5)
    # the three rows share one original; with the third row's, two are right
    assert (result["solutions"]["n"], result["solutions"]["right"]) == (4, 2)
    blind = prmbench.evaluate(lambda s: [0 * x for x in perfect(s)], bench)
    assert blind["steps"]["auc"] == blind["solutions"]["auc"] == 0.5
    assert "| steps | 1.000 | 1.000 to 1.000 | 9 | 5 |" in prmbench.report(result)


def test_prmbench_scores_stand_at_the_steps_ends(tmp_path):
    bench = prmbench.read(write_rows(tmp_path / "bench.jsonl", ROW))
    texts = [f"{s.question} {' '.join(s.steps)}" for s in bench.modified]
    tokenizer = prmbench.learn_tokenizer(texts, 300)
    decoder = Decoder(
        dataclasses.replace(MODEL.decoder.config, vocab_size=tokenizer.vocab_size)
    )
    model = RewardModel(decoder)
    params = model.init(jax.random.key(0), decoder.init(jax.random.key(1)))
    (found,) = prmbench.scorer(model, params, tokenizer)(bench.modified)
    text = ["1+1, now?\n", "1. Add.\n", "2. It is 3.\n", "3. So 3.\n"]
    for i in range(3):  # each prefix alone, read at its last token
        tokens = [t for part in text[: i + 2] for t in tokenizer.encode(part)]
        padded = jnp.zeros((1, 64), int).at[0, : len(tokens)].set(jnp.array(tokens))
        alone = jax.jit(model)(params, padded)[0, len(tokens) - 1]
        assert found[i] == pytest.approx(float(alone), abs=2e-6)


def test_the_published_prmbench(data_dir):
    bench = prmbench.read(data_dir / "prm/prmbench_all.jsonl")
    assert len(bench.modified) == 6216 - 100 and bench.dropped == 100
    assert len(set(bench.kinds)) == 9 and len({s.id for s in bench.modified}) == 758
    assert all(min(s.labels) == 1 for s in bench.original)
    wrong = [s for s in bench.modified if min(s.labels) == 0]
    assert len(bench.modified) - len(wrong) == 165  # other right ways (multi_solutions)
    held_out = bench.part(prmbench.is_held_out)
    trained = bench.part(lambda s: not prmbench.is_held_out(s))
    assert len(held_out.modified) + len(trained.modified) == len(bench.modified)
    assert not {s.id for s in held_out.modified} & {s.id for s in trained.modified}
    assert 0.2 < len(held_out.modified) / len(bench.modified) < 0.3
