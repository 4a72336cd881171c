"""LoRA: adapters that alone are trained, beside a base that nothing moves or copies."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from small_runs import small_config

from grpo_jax import export
from grpo_jax.checkpoints.huggingface.weights import load_pretrained, save_pretrained
from grpo_jax.config import Config, DataSettings, ModelSettings
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.generation.sampler import generate
from grpo_jax.models import lora
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.lora import Lora
from grpo_jax.train import train_run
from grpo_jax.training.batch import Sample
from grpo_jax.training.config_checks import validate_config
from grpo_jax.training.packing import pack
from grpo_jax.training.run import load_run, open_run, stage_params
from grpo_jax.training.setup import initial_params
from grpo_jax.training.train_step import (
    TrainState,
    accumulate_gradients,
    grpo_objective,
    make_grpo_step,
    make_scorer,
)

CONFIG = ModelConfig(
    vocab_size=32, width=16, layers=2, heads=4, kv_heads=4, head_dim=4, ffn=24,
    mlp_bias=True,
)  # fmt: skip
LORA = Lora(rank=4, alpha=6.0)
MODEL = Decoder(CONFIG, lora=LORA)
# Compiled as a whole: many small programs would take longer.
begin = jax.jit(lora.begin_stage, static_argnums=0)
merge = jax.jit(lora.merge_lora, static_argnums=0)
logits = jax.jit(Decoder.logits, static_argnums=0)
BASE = jax.jit(MODEL.init)(jax.random.key(0))
START = begin(LORA, BASE, jax.random.key(1))
TOKENS = np.random.default_rng(2).integers(0, 32, (2, 9))
LAYOUTS = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def noisy(params, key=3):
    """Adapters as they are after training: B is not 0."""
    trained, frozen = lora.split_adapters(params)
    rng = np.random.default_rng(key)

    def add(x):
        return jnp.asarray(x + np.float32(0.2) * rng.normal(size=x.shape).astype("f"))

    return lora.join_adapters(jax.tree.map(add, jax.device_get(trained)), frozen)


TRAINED = noisy(START)


def samples(n=16):
    rng = np.random.default_rng(0)
    return [
        Sample(
            tokens=rng.integers(0, 32, 10).tolist(),
            mask=[0] * 4 + [1] * 6,
            advantages=float(rng.normal()),
        )
        for _ in range(n)
    ]


BATCH = pack(samples(), length=10, rows=8)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_new_adapters_change_no_bit():
    same_bits(lora.base_params(START), BASE)
    same_bits(logits(MODEL, START, TOKENS), logits(Decoder(CONFIG), BASE, TOKENS))
    a = START["layers"]["down_proj_lora_a"]
    assert a.shape == (2, 4, 24) and not START["layers"]["down_proj_lora_b"].any()
    every = np.concatenate([v.ravel() for k, v in START["layers"].items() if "_a" in k])
    np.testing.assert_allclose(a.std() * 24**0.5, 1, atol=0.15)  # variance 1 / in
    assert np.unique(every).size > 0.99 * every.size  # no two share their numbers


def test_the_adapters_are_what_the_paper_says():
    """h = W x + α/r · B A x, in one matrix, by hand."""
    model = Decoder(CONFIG, lora=Lora(rank=4, alpha=6.0, targets=("o_proj",)))
    params = noisy(begin(model.lora, BASE, jax.random.key(1)))
    assert set(lora.split_adapters(params)[0]["layers"]) == {
        "o_proj_lora_a",
        "o_proj_lora_b",
    }
    layers = params["layers"]
    w = layers["o_proj"] + 1.5 * np.einsum(
        "LFR,LRD->LFD", layers["o_proj_lora_b"], layers["o_proj_lora_a"]
    )
    by_hand = {**BASE, "layers": {**BASE["layers"], "o_proj": w}}
    got, expected = logits(MODEL, params, TOKENS), logits(MODEL, by_hand, TOKENS)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(got - logits(MODEL, BASE, TOKENS)).max() > 0.1


def test_merged_is_unmerged():
    merged = merge(LORA, TRAINED)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)
    close(logits(MODEL, merged, TOKENS), logits(MODEL, TRAINED, TOKENS), atol=1e-5)
    same_bits(merge(LORA, BASE), BASE)
    again = begin(LORA, TRAINED, jax.random.key(5))  # as at a stage's boundary
    same_bits(lora.base_params(again), merged)
    assert not again["layers"]["q_proj_lora_b"].any()


def test_two_stages_are_one_adapter_of_twice_the_rank():
    second = noisy(begin(LORA, TRAINED, jax.random.key(5)), key=6)
    both, pairs = lora.stack_adapters(LORA, [TRAINED, second])
    layers = dict(BASE["layers"])
    for name, (a, b) in pairs.items():
        layers |= {name + lora.A: a, name + lora.B: b}
    assert both.rank == 8
    whole = merge(both, {**BASE, "layers": layers})
    close(whole, merge(LORA, second), atol=1e-5)


def test_the_sampler_and_the_scorer_use_the_adapters():
    prompts = [[1, 2, 3], [4, 5]]
    draw = functools.partial(
        generate, prompts=prompts, samples=2, max_new_tokens=6, eos_id=0
    )
    out = draw(MODEL, TRAINED, key=jax.random.key(0))
    merged = draw(Decoder(CONFIG), merge(LORA, TRAINED), key=jax.random.key(0))
    np.testing.assert_array_equal(out.tokens, merged.tokens)
    np.testing.assert_allclose(out.logps, merged.logps, atol=1e-5)
    batch = pack(
        [
            Sample(
                tokens=[*prompts[i // 2], *out.tokens[i, :n].tolist()],
                mask=[0] * len(prompts[i // 2]) + [1] * int(n),
                logps=[0.0] * len(prompts[i // 2]) + out.logps[i, :n].tolist(),
            )
            for i, n in enumerate(out.lengths)
        ],
        length=10,
        rows=1,
    )
    assert batch.sampler_logps is not None
    scored = make_scorer(MODEL)(TRAINED, batch)
    mask = batch.mask
    np.testing.assert_allclose(scored[mask], batch.sampler_logps[mask], atol=1e-5)


def test_gradients_of_a_and_b_are_the_chain_rules():
    """dA = α/r Bᵀ dW and dB = α/r dW Aᵀ, with dW of the merged matrix."""
    step = jax.jit(accumulate_gradients, static_argnums=0)
    objective = grpo_objective(MODEL, kl_coef=0.1)
    gradients, _ = step(objective, TRAINED, BASE, BATCH)
    merged, _ = step(objective, merge(LORA, TRAINED), BASE, BATCH)
    assert set(gradients) == {"layers"} and len(gradients["layers"]) == 14
    for name in lora.TARGETS:
        a, b = (TRAINED["layers"][name + end] for end in (lora.A, lora.B))
        dw, scale = merged["layers"][name], 6.0 / 4
        expected = {
            name + lora.A: scale * np.einsum("LFR,LFD->LRD", b, dw),
            name + lora.B: scale * np.einsum("LFD,LRD->LFR", dw, a),
        }
        close({k: gradients["layers"][k] for k in expected}, expected, atol=2e-5)


@jax.jit
def kl_by_hand(params, reference):
    """k3 against explicit parameters, from whole logits, without packing."""
    tokens = jnp.array([s.tokens for s in samples()])

    def logps(p):
        log_p = jax.nn.log_softmax(logits(MODEL, p, tokens[:, :-1]))
        return jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[:, 3:, 0]

    difference = logps(reference) - logps(params)
    return (jnp.exp(difference) - difference - 1).mean()


def test_steps_move_the_adapters_alone_and_kl_is_against_the_base():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-2))
    step = make_grpo_step(MODEL, optimizer, kl_coef=0.1)
    state = TrainState.create(jax.tree.map(jnp.copy, START), optimizer)
    sizes = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
    count = sum(x.size for x in jax.tree.leaves(lora.split_adapters(START)[0]))
    assert sum(sizes) == 2 * count  # AdamW's two moments, of the adapters alone
    for number in range(3):
        before = jax.device_get(state.params)
        state, metrics = step(state, None, BATCH)
        same_bits(lora.base_params(state.params), BASE)
        if number == 0:
            assert metrics["kl"] == 0
        else:
            expected = kl_by_hand(before, BASE)
            assert metrics["kl"] > 1e-3
            np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-3)
    after, start = (
        jax.device_get(lora.split_adapters(p)[0]) for p in (state.params, START)
    )
    moved = jax.tree.map(lambda x, y: (x != y).any(), after, start)
    assert all(jax.tree.leaves(moved))


def test_nothing_is_kept_for_gradients_that_are_not_wanted():
    """The compiled step's arguments and temporaries, against those of all weights."""
    config = ModelConfig(
        vocab_size=32, width=128, layers=6, heads=4, kv_heads=4, head_dim=32, ffn=256
    )
    optimizer = optax.adamw(1e-3)

    def memory(model):
        base = jax.eval_shape(model.init, jax.random.key(0))
        params = jax.eval_shape(functools.partial(begin, model.lora), base, KEY)
        create = functools.partial(TrainState.create, optimizer=optimizer)
        state = jax.eval_shape(create, params)
        reference = None if model.lora.rank else base
        jitted: Any = make_grpo_step(model, optimizer)
        step = jitted.lower(state, reference, BATCH)
        size = sum(x.size * 4 for x in jax.tree.leaves(base))
        return step.compile().memory_analysis(), size

    small, size = memory(Decoder(config, lora=LORA))
    whole, _ = memory(Decoder(config))
    # parameters, two moments and a reference, against the parameters alone
    assert whole.argument_size_in_bytes > 4 * size
    assert small.argument_size_in_bytes < 1.3 * size
    assert small.temp_size_in_bytes < whole.temp_size_in_bytes - 1.5 * size
    # and what goes in is what comes out, in place
    assert small.alias_size_in_bytes > size


def test_a_reference_must_come_from_somewhere():
    objective = grpo_objective(MODEL, kl_coef=0.1)
    with pytest.raises(GrpoError, match="no LoRA adapters to leave out"):
        jax.eval_shape(
            functools.partial(accumulate_gradients, objective), BASE, None, BATCH
        )


def test_adapters_of_another_rank_are_refused():
    with pytest.raises(GrpoError, match="have rank 4, the model's lora.rank is 0"):
        logits(Decoder(CONFIG), TRAINED, TOKENS)


def test_a_bfloat16_base_keeps_float32_adapters():
    model = Decoder(CONFIG, dtype="bfloat16", lora=LORA)
    base = jax.tree.map(lambda x: x.astype("bfloat16"), jax.device_get(BASE))
    params = noisy(begin(LORA, base, KEY))
    kinds = jax.tree.map(lambda x: str(x.dtype), params)
    trained, frozen = lora.split_adapters(kinds)
    assert set(jax.tree.leaves(trained)) == {"float32"}
    assert set(jax.tree.leaves(frozen)) == {"bfloat16"}
    hidden, _ = jax.eval_shape(model, params, TOKENS)
    assert hidden.dtype == jnp.bfloat16
    merged = merge(LORA, params)
    assert merged["layers"]["q_proj"].dtype == jnp.bfloat16
    close(logits(model, merged, TOKENS), logits(model, params, TOKENS), atol=0.15)
    without = logits(model, lora.base_params(params), TOKENS)
    assert np.abs(logits(model, params, TOKENS) - without).max() > 0.5


KEY = jax.random.key(4)


def numbers(mesh):
    """(loss, gradients) of a LoRA step on a mesh."""
    with jax.set_mesh(mesh):
        params = jax.device_put(TRAINED, sharding.shardings(TRAINED, mesh))
        batch = sharding.batch_placer(mesh)(BATCH)
        step = jax.jit(accumulate_gradients, static_argnums=0)
        gradients, metrics = step(
            grpo_objective(MODEL, kl_coef=0.1), params, None, batch
        )
    return jax.device_get((metrics["loss"], gradients))


@pytest.fixture(scope="module")
def alone():
    return numbers(sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_one_devices_numbers(layout, alone):
    loss, gradients = numbers(sharding.make_mesh(*layout))
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    close(gradients, alone[1], atol=1e-5)


def test_the_adapters_are_split_as_their_matrices():
    mesh = sharding.make_mesh(1, 2, 4)
    spec = {k: s.spec for k, s in sharding.shardings(START, mesh)["layers"].items()}
    for name in lora.TARGETS:
        _, out, into = spec[name]
        assert spec[name + lora.A] == jax.P(None, None, into), name
        assert spec[name + lora.B] == jax.P(None, out), name


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(lora_rank=-1), "model.lora_rank: -1 is out of range; 0 or more"),
        (dict(lora_rank=8, lora_alpha=0.0), "model.lora_alpha: 0.0 is out of range"),
        (dict(lora_rank=8, lora_targets="q,kv"), "'kv' is not one of q, k, v, o"),
        (dict(lora_rank=8, lora_targets=" "), "lora_targets: empty"),
        (
            dict(lora_targets="q"),
            "lora_targets: without adapters it would be ignored",
        ),
        (dict(lora_alpha=4.0), "lora_alpha: without adapters it would be ignored"),
    ],
)
def test_what_makes_no_adapter_is_refused(settings, message):
    model = ModelSettings(layers=1, width=16, heads=2, ffn=16, **settings)
    with pytest.raises(GrpoError) as error:
        validate_config(
            Config(model=model, sft_steps=1, data=DataSettings(sft="gsm8k"))
        )
    text = str(error.value)
    assert message in text and "\n" not in text


# A whole run: Instruct by LoRA, then RL by LoRA, in this process, on one device.

REWARDS = """
import jax

def length(prompts, completions, answer, **columns):
    held = sum(x.shape == (1, 56, 16) for x in jax.live_arrays())
    with open(__file__ + ".held", "a") as file:
        print(held, file=file)
    return [len(completion) / 10 for completion in completions]
"""


def start(folder: Path, workdir: Path, accept=False, **changes) -> None:
    questions = str(folder / "sums.jsonl")
    settings = {
        "model.ffn": 56, "model.lora_rank": 4, "model.lora_alpha": 8.0,
        "sft_steps": 4, "sft.micro_rows": 2, "sft.warmup_steps": 20,
        "learning_rate": 1e-2, "kl_coef": 0.1,
        "optimizer.schedule": "linear", "optimizer.warmup_steps": 10,
        "optimizer.micro_rows": 1, "checkpoints_kept": 4,
        "eval.questions": 8, "eval.batch": 8, "eval.samples": 0,
        "data.train": questions, "data.sft": questions, "data.eval": questions,
        "rewards.functions": f"{folder / 'rewards.py'}:length",
    }  # fmt: skip
    config = small_config(settings | changes)
    train_run(config, workdir, accept_changes=accept)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    row = {"question": "1+2=?", "answer": "3", "solution": "#### 3"}
    rows = [{**row, "question": f"{a}+2=?"} for a in range(1, 33)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "rewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        cache = Path(__file__).parents[2] / ".pytest_cache" / "jax"
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", one)
        start(folder, folder / "run")
        yield folder


def states(workdir: Path):
    run = open_run(workdir)
    return run, {stage: stage_params(run, stage) for stage in ("sft", "rl")}


def kls(workdir: Path) -> list[float]:
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["kl"] for row in map(json.loads, rows) if row["stage"] == "rl"]


def test_the_reference_of_rl_is_instruct(straight):
    run, params = states(straight / "run")
    initial = initial_params(run.config, run.model, run.mesh)
    same_bits(lora.base_params(params["sft"]), initial)
    same_bits(lora.base_params(params["rl"]), merge(run.model.lora, params["sft"]))
    kl = kls(straight / "run")
    assert kl[0] == 0 and all(x > 0 for x in kl[1:])
    assert set(json.loads((straight / "run/results.json").read_text())["models"]) == {
        "instruct",
        "rl",
    }


def test_one_copy_of_the_base_is_held_while_rl_runs(straight):
    """Counted in the middle of a step, where the rewards are asked for."""
    held = (straight / "rewards.py.held").read_text().split()
    assert held[:2] == ["2"] * 2  # gate_proj, up_proj; later a checkpoint is written


def test_a_run_that_goes_on_ends_with_the_same_bits(straight, tmp_path):
    shutil.copytree(straight / "run", tmp_path / "run")
    for step in ("3", "4"):
        shutil.rmtree(tmp_path / "run/checkpoints/rl" / step, ignore_errors=True)
    start(straight, tmp_path / "run")
    same_bits(load_run(tmp_path / "run")[1], load_run(straight / "run")[1])
    assert kls(tmp_path / "run") == kls(straight / "run")


def test_several_updates_of_a_rollout_have_the_base_as_reference(straight, tmp_path):
    shutil.copytree(straight / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/rl")
    start(straight, tmp_path / "run", True, updates_per_rollout=2, rl_steps=2)
    kl = kls(tmp_path / "run")
    assert 0 < kl[0] < kl[1]


def test_export_merges(straight, tmp_path):
    workdir, out = straight / "run", tmp_path / "hf"
    export.main(["--workdir", str(workdir), "--out", str(out)])
    _, params, _ = load_run(workdir)
    model, merged = load_pretrained(out)
    config = open_run(workdir).model
    assert jax.tree.structure(merged) == jax.tree.structure(lora.base_params(params))
    tokens = np.array([[1, 5, 2, 7]])
    merged, params = jax.device_get((merged, params))
    got, expected = logits(model, merged, tokens), logits(config, params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert (
        np.abs(expected - logits(config, lora.base_params(params), tokens)).max() > 1e-3
    )


def test_the_adapter_alone_leads_from_the_first_weights_to_the_last(straight, tmp_path):
    workdir, out = straight / "run", tmp_path / "adapter"
    export.main(["--workdir", str(workdir), "--out", str(out), "--adapter"])
    told = json.loads((out / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["peft_type"]) == (8, 16.0, "LORA")
    tensors = load_file(out / "adapter_model.safetensors")
    run, params = states(workdir)
    first = initial_params(run.config, run.model, run.mesh)["layers"]
    last = merge(run.model.lora, params["rl"])["layers"]
    modules = {"q": "self_attn.q_proj", "down": "mlp.down_proj"}
    for name, module in modules.items():
        stem = f"base_model.model.model.layers.0.{module}"
        a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        w = np.asarray(first[f"{name}_proj"][0]) + 2.0 * b @ a
        assert a.shape[0] == b.shape[1] == 8
        np.testing.assert_allclose(w, last[f"{name}_proj"][0], atol=1e-5)
    assert len(tensors) == 14


def test_an_adapter_needs_a_run_with_adapters(straight, tmp_path):
    shutil.copytree(straight / "run", tmp_path / "run")
    file = tmp_path / "run/config.json"
    told = json.loads(file.read_text())
    told["model"] |= {"lora_rank": 0, "lora_alpha": 16.0}
    file.write_text(json.dumps(told))
    with pytest.raises(SystemExit, match="no adapters .model.lora_rank is 0."):
        export.main(["--workdir", str(file.parent), "--out", "x", "--adapter"])


def test_saving_merges_by_itself(tmp_path):
    save_pretrained(MODEL, TRAINED, tmp_path / "hf")
    _, merged = load_pretrained(tmp_path / "hf")
    close(merged, merge(LORA, TRAINED), atol=1e-6)
