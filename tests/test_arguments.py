"""Public functions refuse, in one line and before compiling, what makes no sense."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax
from grpo_jax.environments.tool_rollouts import generate_with_tools
from grpo_jax.errors import GrpoError
from grpo_jax.generation.token_sampling import Sampling
from grpo_jax.training.optimizers import make_optimizer

# Odd values go in, which the types forbid.
api: Any = grpo_jax
NAN, INF = math.nan, math.inf
SIZES: dict[str, Any] = dict(
    vocab_size=11, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=32
)
MODEL = api.Decoder(api.ModelConfig(**SIZES))
REWARD_MODEL = api.RewardModel(MODEL)
HIDDEN, UNEMBED = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
SAMPLE = api.Sample(tokens=[1, 2, 3], mask=[0, 1, 1], advantages=1.0)


def generate(**changes):
    given = dict(key=jax.random.key(0), max_new_tokens=2, eos_id=0, prompts=[[1, 2]])
    return api.generate(MODEL, None, **(given | changes))


def generate_tokens(**changes):
    given = dict(key=jax.random.key(0), max_new_tokens=2, eos_id=0)
    return api.generate_tokens(
        MODEL, None, np.ones((1, 2), int), np.ones((1, 2)), **(given | changes)
    )


def make_step(**options):
    return api.make_grpo_step(MODEL, optax.sgd(1.0), **options)


def optimizer(**changes):
    given: dict[str, Any] = dict(learning_rate=1e-3, steps=3)
    return make_optimizer(**(given | changes))


def pack(**changes):
    given: dict[str, Any] = dict(samples=[SAMPLE], length=8)
    return api.pack(**(given | changes))


def samples(**changes):
    """Packs SAMPLE and one with other lists."""
    given = dict(tokens=[1, 2, 3], mask=[0, 1, 1], advantages=1.0)
    return api.pack([SAMPLE, api.Sample(**(given | changes))], length=8)


def score(sequences=([1, 2],), **changes):
    return api.score_samples(
        REWARD_MODEL, None, sequences, **(dict(length=4) | changes)
    )


def tools(**changes):
    given: dict[str, Any] = dict(key=jax.random.key(0), max_new_tokens=2)
    given |= dict(interpreter=None, params=None)
    tokenizer = api.Tokenizer.from_alphabet("`output12345"[:8])
    return generate_with_tools(
        MODEL, tokenizer=tokenizer, prompts=[[1]], **(given | changes)
    )


CASES = [
    (generate, "max_new_tokens", [0, -1, 10**12, 2.0, "2", None, True, NAN]),
    (generate, "samples", [0, -1, 10**12, 1.0, True, None]),
    (generate, "slots", [0, -3, 1.5, 2**31]),
    (generate, "prompts", [["text"], "text", [1, 2], [[[1]]], [[1.5]], [["1"]], []]),
    (generate, "temperature", [INF, -INF, NAN, -1.0, 1e-30]),
    (generate, "top_k", [-1, 1.5, 2**31]),
    (generate, "top_p", [0, -0.1, 1.1, NAN]),
    (generate, "min_p", [-0.1, 1.1, NAN]),
    (generate, "eos_id", [None, "x", [], [0, "x"], 11, 2**40, -2]),
    (generate, "stop", ["ab", ["x"], [[]], [[11]], [[-1]]]),
    (generate, "cache_dtype", ["int8", "float16", 3]),
    (generate, "stop_table", [np.zeros((3, 3), int), np.zeros(11, int)]),
    (generate_tokens, "max_new_tokens", [0, 10**12]),
    (generate_tokens, "samples", [0, -1]),
    (generate_tokens, "slots", [-3]),
    (tools, "generations", [0, -1, 1.5]),
    (tools, "rows", [-1, 0.5]),
    (make_step, "kl_coef", [-1, NAN, INF, None]),
    (make_step, "temperature", [0, -1, NAN, INF, 1e-30]),
    (make_step, "clip_low", [-0.1, NAN, INF]),
    (make_step, "clip_high", [-1, NAN]),
    (make_step, "entropy_coef", [NAN, INF]),
    (make_step, "importance_cap", [-1, NAN]),
    (make_step, "aggregate", ["mean", "constant", 3]),
    (make_step, "kl_estimator", ["k4"]),
    (make_step, "importance", ["tokens"]),
    (make_step, "surrogate", ["cispo", "clipp"]),
    (make_step, "clip_hgih", [0.2]),
    (optimizer, "learning_rate", [INF, NAN, -1.0]),
    (optimizer, "steps", [-1, 1.5]),
    (optimizer, "warmup_steps", [-1]),
    (optimizer, "schedule", ["linaer"]),
    (optimizer, "b1", [1.0, -0.1, NAN]),
    (optimizer, "b2", [1.0, 7]),
    (optimizer, "weight_decay", [-1, NAN, INF]),
    (optimizer, "max_grad_norm", [0, -1, NAN]),
    (pack, "length", [0, -1, 8.0, 10**12]),
    (pack, "rows", [0, -1]),
    (pack, "together", [0, 2]),
    (samples, "mask", [[1], [0, 1], [0, 1, 1, 1], []]),
    (samples, "advantages", [[1.0], [0.0, 1.0], None]),
    (samples, "logps", [[0.0] * 3, [0.0]]),
    (samples, "returns", [[0.0] * 3]),
    (score, "length", [0, -1]),
    (score, "rows", [0]),
    (score, "capacity", [0, -1]),
    (score, "sequences", ["ab", ["ab"], [[11]], [[-1]]]),
]


@pytest.mark.parametrize(
    "function, name, value",
    [(f, name, value) for f, name, values in CASES for value in values],
    ids=lambda x: getattr(x, "__name__", None) or str(x)[:24],
)
def test_an_argument_is_refused_by_its_name(function, name, value):
    with pytest.raises(GrpoError) as caught:
        function(**{name: value})
    text = str(caught.value)
    shown = name.removesuffix("s") if name in ("prompts", "sequences") else name
    assert shown.replace("_", " ") in text.replace("_", " "), text
    assert "\n" not in text and len(text) < 200


@pytest.mark.parametrize("token", [-1, 11, 2**31])
def test_a_prompt_has_only_tokens_of_the_model(token):
    """JAX takes the last row of the embedding for what it does not have."""
    with pytest.raises(GrpoError, match=f"prompt 1 has the token {token}; .* 0 to 10"):
        generate(prompts=[[1, 2], [3, token]])


def test_a_mask_of_one_value_never_counts_for_all():
    """It was broadcast: five tokens and a mask of two made all of them count."""
    with pytest.raises(GrpoError, match="sample 0 has 5 tokens and 2 values of mask"):
        api.pack([api.Sample(tokens=[1, 2, 3, 4, 5], mask=[0, 1])], length=8)


@pytest.mark.parametrize("temperature", [0, -1.0, NAN, INF])
def test_log_probabilities_have_a_temperature(temperature):
    with pytest.raises(ValueError, match="no finite number above 0"):
        api.token_logprobs(
            HIDDEN, UNEMBED, jnp.zeros((2, 3), int), temperature=temperature
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kv_heads=3), "kv_heads = 3 does not divide"),
        (dict(head_dim=7), "head_dim = 7 is odd"),
        (dict(heads=0), "heads: 0 is out"),
        (dict(layers=-1), "layers: -1 is out"),
        (dict(vocab_size=0), "vocab_size: 0 is out"),
        (dict(width=1.5), "width: 1.5 is float"),
        (dict(ffn=2**40), "ffn: 1099511627776 is out"),
    ],
)
def test_a_model_has_sizes_that_fit(changes, message):
    with pytest.raises(GrpoError, match=message):
        api.ModelConfig(**(SIZES | changes))


@pytest.mark.parametrize(
    "changes", [dict(dtype="float16"), dict(remat="all"), dict(decode_tensor=-1)]
)
def test_a_decoder_has_a_dtype_and_a_remat(changes):
    with pytest.raises(GrpoError, match=f"Decoder: {next(iter(changes))}: "):
        api.Decoder(MODEL.config, **changes)


def test_the_coldest_temperature_still_gives_numbers():
    """At its least a temperature's logits are finite; below, they were NaN."""
    logits = jnp.array([[1e30, 0.0, -1e30]])
    token, logp = Sampling(temperature=1e-4)(
        logits, jax.random.split(jax.random.key(0), 1), jnp.zeros(1, int)
    )
    assert int(token[0]) == 0 and float(logp[0]) == 0.0


def test_a_step_takes_every_option_of_the_loss_that_is_no_array():
    """Else a misspelt list here would refuse what the loss offers."""
    make_step(
        kl_coef=0.1,
        temperature=0.7,
        clip_low=0.1,
        clip_high=0.3,
        delta=2.0,
        entropy_coef=-0.1,
        importance_cap=2.0,
        max_length=8,
        kl_estimator="k1",
        aggregate="constant",
        importance="sequence",
        surrogate="cispo",
    )
    assert optimizer(max_grad_norm=INF, b1=0, steps=0)
