"""Completions that are the EOS alone: nothing is said, and that is learned from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import ROOT, small_config, write_questions

from grpo_jax.checkpoints.huggingface.weights import save_pretrained
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.train import train_run
from grpo_jax.training.batch import Sample
from grpo_jax.training.packing import pack
from grpo_jax.training.run import load_run
from grpo_jax.training.train_step import TrainState, make_grpo_step

ALPHABET = "0123456789+=?# \n"
EOS = 2
REWARDS = """
def turns(prompts, completions, **columns):
    assert set(completions) == {""}
    return [float(i % 2) for i in range(len(completions))]
"""


def small_model(vocab_size: int) -> Decoder:
    config = ModelConfig(
        vocab_size=vocab_size, width=16, layers=1, heads=2, kv_heads=2, head_dim=8,
        ffn=16, tied=False,
    )  # fmt: skip
    return Decoder(config)


@pytest.mark.parametrize("aggregate", ["sequence_mean", "token_mean"])
def test_the_eos_is_trained_on(aggregate):
    """With advantages of 1 and -1 the loss is 0 at the start, and its gradient that of
    log P(EOS | one prompt) against log P(EOS | the other), by hand."""
    model = small_model(23)
    params = model.init(jax.random.key(0))
    prompts, signs = ([5, 6, 7], [8, 9]), (1.0, -1.0)
    samples = [
        Sample(tokens=[*prompt, EOS], mask=[0] * len(prompt) + [1], advantages=sign)
        for prompt, sign in zip(prompts, signs, strict=True)
    ]

    def by_hand(params):
        ends = [
            jax.nn.log_softmax(model.logits(params, jnp.array([prompt]))[0, -1])[EOS]
            for prompt in prompts
        ]
        return (ends[1] - ends[0]) / 2

    rate = 0.1
    expected = jax.tree.map(
        lambda p, g: p - rate * g, params, jax.grad(by_hand)(params)
    )
    before = by_hand(params)
    optimizer = optax.sgd(rate)
    step = make_grpo_step(model, optimizer, kl_coef=0.0, aggregate=aggregate)
    state = TrainState.create(params, optimizer)
    state, metrics = step(state, None, pack(samples, length=16, rows=1))
    assert abs(float(metrics["loss"])) < 1e-6
    for ours, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert by_hand(state.params) < before


def test_a_run_whose_every_completion_is_empty(tmp_path, monkeypatch):
    """A model that ends at once: finite metrics, and weights that can be read."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    tokenizer = Tokenizer.from_alphabet(ALPHABET)
    model = small_model(tokenizer.vocab_size)
    params = model.init(jax.random.key(1))
    # The first feature is large in every token, and says EOS.
    params["embed"] = params["embed"].at[:, 0].set(30.0)
    params["unembed"] = params["unembed"].at[EOS, 0].set(10.0)
    save_pretrained(model, params, tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "rewards.py").write_text(REWARDS)
    questions = write_questions(tmp_path / "sums.jsonl")
    sizes = {f"model.{name}": 0 for name in ("layers", "width", "heads", "ffn")}
    settings = sizes | {
        "model.path": str(tmp_path / "model"),
        "data.train": questions,
        "data.eval": questions,
        "sft_steps": 0,
        "rl_steps": 2,
        "rewards.functions": f"rule,{tmp_path / 'rewards.py'}:turns",
        "rewards.weights": "1,1",
        "eval.samples": 0,
    }
    train_run(small_config(settings), tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if row["stage"] == "rl"]
    assert len(rows) == 2
    for row in rows:
        assert row["completions/max_length"] == 1
        assert row["completions/clipped_ratio"] == 0
        assert row["reward"] == 0.5  # the rule gives nothing for nothing
        assert np.isfinite([row["loss"], row["grad_norm"], row["kl"]]).all()
    _, trained, _ = load_run(tmp_path / "run")
    for leaf in jax.tree.leaves(trained):
        assert np.isfinite(leaf).all()
