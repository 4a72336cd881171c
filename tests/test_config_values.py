"""Every field of a config with every odd value: refused in one line, or meaningful."""

import contextlib
import dataclasses
import math
import re
import sys
from typing import Any, get_args, get_type_hints

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from hypothesis import given
from test_config import GOOD, ROOT, changed

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.algorithms.policy_losses import grpo_loss
from grpo_jax.arguments import check_value
from grpo_jax.config import Config, flatten_config, from_dict, unknown_field
from grpo_jax.config_fields import OTHER_NAMES
from grpo_jax.errors import GrpoError
from grpo_jax.models.logprobs import token_logprobs
from grpo_jax.train import USAGE
from grpo_jax.training import setup
from grpo_jax.training.command_line import parse_config
from grpo_jax.training.config_checks import validate_config
from grpo_jax.training.optimizers import make_stage_optimizer


def kinds(kind: Any = Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{"model.layers": (type, metadata)} of every field."""
    found = {}
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= kinds(hints[f.name], f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = (hints[f.name], f.metadata)
    return found


FIELDS = kinds()
INF, NAN = math.inf, math.nan
ODD = {
    int: [0, -1, 2**31, 2**63, 10**12, -(2**63), 10**400],
    float: [0.0, INF, -INF, NAN, -1.0, -0.5, 1e30, 1e300, 1e-400],
}
# What passes, and means something; everything else in ODD is refused.
ZERO = """
seed sft_steps rl_steps overlong_buffer dynamic_sampling max_staleness
kl_coef entropy_coef gae_gamma gae_lambda replay
model.vocab_size model.kv_heads model.lora_rank sft.warmup_steps sft.batch_rows
optimizer.warmup_steps optimizer.row_length optimizer.b1 optimizer.b2
optimizer.weight_decay tools.generations tools.rows eval.questions eval.samples
eval.every mesh.decode_tensor mesh.slots census_questions sft.max_tokens
""".split()
PASSES = {(name, 0) for name in ZERO} | {("seed", 2**31)}
PASSES |= {("mesh.fsdp", -1)}  # the rest; data and tensor too where fsdp is not


def with_value(name, value):
    """GOOD with the field set, and with a method that has it."""
    config = changed(name, value)
    config.rl_steps = value if name == "rl_steps" else 4
    if "." not in name and name != "method":
        rows = [m for m, row in METHODS.items() if name in row.fields]
        config.method = rows[-1] if rows else "grpo"
    if name == "clip_high":
        config.surrogate = "clip"
    if name == "sft_steps":
        config.model.path = "somewhere"
    return config


CASES = [
    (name, value)
    for name, (kind, _) in FIELDS.items()
    for numeric in (get_args(kind) or (kind,))[:1]
    for value in ODD.get(numeric, [])
]


def test_every_number_is_refused_or_means_something():
    assert len(CASES) > 400
    for name, value in CASES:
        try:
            config = validate_config(with_value(name, value))
        except GrpoError as error:
            assert (name, value) not in PASSES, error
            text = str(error)
            assert re.match(r"config\.[a-z0-9_.]+: ", text) and "\n" not in text, text
            assert len(text) < 250 and name.rpartition(".")[2] in text, (name, text)
        else:
            assert (name, value) in PASSES, (name, value)
            # what a run makes of it before the first step
            setup.make_step_key(config.seed, "rl", 1)
            own = dataclasses.replace(config, method=config.method)
            _, rate = make_stage_optimizer(own.optimizer, own.learning_rate, steps=4)
            assert 0 < np.asarray(rate(0)) <= 1


def test_every_choice_is_one_of_those_listed():
    for name, (_, metadata) in FIELDS.items():
        for choice in metadata.get("choices", ()):
            check_value(name, choice, [type(choice)], **metadata)
        if metadata.get("choices"):
            wrong = 7 if isinstance(metadata["choices"][0], int) else "somethink"
            with pytest.raises(GrpoError, match=f"config.{name}: .* is not one of"):
                validate_config(with_value(name, wrong))


@pytest.mark.parametrize("value", [1.5, "5", True, None, [1], {}, b"1"], ids=repr)
def test_a_wrong_type_is_refused_and_not_compared(value):
    """A config file writes what it likes: `Config(rl_steps="5")`."""
    for name in ("rl_steps", "model.layers", "eval.batch"):
        with pytest.raises(GrpoError, match=f"config.{name}: .*whole number is needed"):
            validate_config(changed(name, value))
    with pytest.raises(GrpoError, match=r"config\.model: .* is not a ModelSettings"):
        validate_config(dataclasses.replace(GOOD, model=value))
    with pytest.raises(GrpoError, match=r"config\.model: not an object of fields"):
        from_dict({"model": value if value != {} else 3})


def test_whole_numbers_are_numbers():
    assert validate_config(changed("learning_rate", 1)).learning_rate == 1


def test_extremes_that_pass_stay_finite():
    """At the bounds of what multiplies a loss, or divides logits, in float32."""
    most = {name: m["most"] for name, (_, m) in FIELDS.items() if "most" in m}
    rng = np.random.default_rng(0)
    logps = jnp.asarray(-rng.exponential(3, (4, 6)), jnp.float32)
    old, ref = (logps + jnp.float32(rng.normal(0, 9, (4, 6))) for _ in range(2))
    advantages = jnp.asarray(rng.normal(0, 9, 4), jnp.float32)

    def loss(x, surrogate):
        return grpo_loss(
            x,
            advantages,
            jnp.ones((4, 6)),
            old_logps=old,
            ref_logps=ref,
            sampler_logps=old - 20,
            entropy=-x,
            importance_cap=most["importance_cap"],
            entropy_coef=most["entropy_coef"],
            kl_coef=most["kl_coef"],
            clip_low=most["clip_low"],
            clip_high=most["clip_high"],
            delta=most["delta"],
            surrogate=surrogate,
        )[0]

    for surrogate in ("clip", "cispo"):
        value, gradient = jax.value_and_grad(loss)(logps, surrogate)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    hidden, unembed = rng.normal(0, 3, (1, 6, 8)), rng.normal(0, 3, (8, 11))
    for name in ("temperature", "eval.temperature"):
        for temperature in (FIELDS[name][1]["least"], FIELDS[name][1]["most"]):
            x, entropy = token_logprobs(
                jnp.asarray(hidden, jnp.float32),
                jnp.asarray(unembed, jnp.float32),
                jnp.zeros((1, 6), int),
                temperature=temperature,
            )
            assert np.isfinite(x).all() and np.isfinite(entropy).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.kv_heads": 3, "model.heads": 4}, "kv_heads: 3 does not divide"),
        ({"eval.every": 1, "data.eval": " , "}, "eval.every: 1, but data.eval names"),
        ({"rewards.weights": "nan"}, "finite numbers"),
        ({"rewards.weights": "inf"}, "finite numbers"),
        ({"rewards.weights": "-1e9"}, "finite numbers"),
        ({"rewards.weights": "0"}, "one of them not 0"),
        ({"max_new_tokens": 2**20, "group_size": 2**10}, "more than 2,147,483,647"),
        ({"rl_steps": 2**31 - 1, "updates_per_rollout": 2}, "updates in"),
        ({"method": "grpo_iterative", "iterations": 5}, "do not fit into 4 rl_steps"),
        ({"mesh.data": -1}, "one may be -1"),
        ({"mesh.tensor": 0}, "each is 1 or more"),
        (
            {"method": "grpo_process", "reward_model.questions": 63},
            "63 with 1 output.* fewer than reward_model.batch_size, 64",
        ),
        (
            {"method": "grpo_iterative", "reward_model.labels": "x.jsonl"}
            | {"reward_model.questions": 1},
            "fewer than reward_model.batch_size",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(GrpoError, match=message) as caught:
        validate_config(all_of({"rl_steps": 4} | changes))
    assert "\n" not in str(caught.value)


def all_of(changes):
    values = dataclasses.asdict(GOOD)
    for name, value in changes.items():
        outer, _, inner = name.rpartition(".")
        (values[outer] if outer else values)[inner] = value
    return from_dict(values)


def test_labels_of_a_file_need_no_questions():
    changes = {"method": "grpo_process", "reward_model.labels": "x.jsonl"}
    validate_config(all_of(changes | {"reward_model.questions": 1}))


# -- names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("beta", "kl_coef"),
        ("num_generations", "group_size"),
        ("lr", "learning_rate"),
        ("optimizer.lr", "learning_rate"),
        ("optimizer.learning_rate", "learning_rate"),
        ("sft.lr", "sft.learning_rate"),
        ("reward_model.lr", "reward_model.learning_rate"),
        ("epsilon", "clip_low"),
        ("epsilon_high", "clip_high"),
        ("per_device_train_batch_size", "questions_per_step"),
        ("num_iterations", "updates_per_rollout"),
        ("max_completion_length", "max_new_tokens"),
        ("loss_type", "aggregate"),
        ("scale_rewards", "advantage_scale"),
        ("temprature", "temperature"),
        ("MAX_STEPS", "rl_steps"),
        ("mesh.fdsp", "mesh.fsdp"),
    ],
)
def test_an_unknown_name_is_answered_with_the_one_that_was_meant(typed, meant):
    assert f"no such field; did you mean config.{meant}" in unknown_field(typed)


def test_what_has_no_field_is_explained():
    for name in ("top_p", "top_k", "min_p"):
        assert "the whole distribution" in unknown_field(name)
    assert "system message" in unknown_field("system")
    assert "--workdir" in unknown_field("output_dir")
    assert unknown_field("qqqq") == "config.qqqq: no such field"
    assert "such as config.model.path" in unknown_field("model")


def test_every_hint_names_a_field_and_no_field_is_explained_away():
    fields = flatten_config(Config())
    for typed, meant in OTHER_NAMES.items():
        assert meant in fields and typed not in fields, typed
        assert typed == typed.lower()


# -- the command line, in this process -------------------------------------------------


def parsed(*arguments: str) -> Config:
    with fresh_flags():
        return parse_config(["train.py", *arguments], USAGE)


@contextlib.contextmanager
def fresh_flags():
    """Forgets at the end what a command line has said."""
    try:
        yield
    finally:
        flags.FLAGS.unparse_flags()
        sys.modules.pop("config_config", None)  # the last config file's names
        for name in list(flags.FLAGS):  # those that a --config.name has defined
            if name.startswith("config."):
                delattr(flags.FLAGS, name)


TINY = f"--config={ROOT / 'configs/tiny.py'}"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("model.=3", "config.model.: no such field"),
        (".=3", "config..: no such field"),
        ("=3", "config.: no such field"),
        ("model=3", "set one of its fields, such as config.model.path"),
        ("model.path.x=3", "did you mean config.model.path"),
        ("rl_steps[0]=3", "did you mean config.rl_steps"),
        ("rl_steps\n=3", "no such field; did you mean config.rl_steps"),
        ("rl_steps=", "config.rl_steps=: invalid literal"),
        ("rl_steps=1e3", "invalid literal"),
        ("mesh.fdsp=4", "did you mean config.mesh.fsdp"),
        ("kl_coef=abc", "could not convert"),
        ("own=3", "no such field"),
        ("beta=3", "did you mean config.kl_coef"),
        ("max_new_tokens=1000000000000", "at most 1,048,576"),
        ("seed=99999999999999999999999", "at most 4,294,967,295"),
        ("rewards.timeout=inf", "infinity is not a value"),
        ("temperature=inf", "infinity is not a value"),
        ("optimizer.b2=7", "below 1"),
    ],
)
def test_a_command_line_is_refused_in_one_line(argument, message):
    with pytest.raises(GrpoError, match=re.escape(message)) as caught:
        parsed(TINY, f"--config.{argument}")
    assert "\n" not in str(caught.value)


def test_other_flags_are_refused_in_one_line():
    with pytest.raises(GrpoError, match="Unknown command line flag 'workdri'"):
        parsed(TINY, "--workdri=x")
    with pytest.raises(GrpoError, match="configs/nothing.py: no such file"):
        parsed("--config=configs/nothing.py")


NAMES = st.sampled_from(
    sorted(flatten_config(Config())) + ["model", "mesh.", ".", "x", ""]
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMBERS = st.one_of(st.integers(), st.floats()).map(str)


@given(NAMES, st.one_of(TEXTS, NUMBERS, st.just("")))
def test_any_value_on_the_command_line_is_taken_or_refused(name, value):
    try:
        config = parsed(TINY, f"--config.{name}={value}")
    except GrpoError as error:
        assert "\n" not in str(error)
    else:
        assert name in flatten_config(config)


FILES = {
    "unknown": ("return Config(beta=0.1)", ":3: config.beta: .*config.kl_coef"),
    "inner": ("return Config(\n mesh=MeshSettings(fdsp=2))", "config.mesh.fsdp"),
    "name": ("return nothing", ":3: NameError: name 'nothing' is not defined"),
    "syntax": ("return (", "SyntaxError"),
    "value": ("return int('x')", ":3: ValueError: invalid literal"),
    "import": ("import no_such_thing", "ModuleNotFoundError"),
    "none": ("pass", "must return a grpo_jax Config"),
    "type": ("return Config(rl_steps='5')", "config.rl_steps: '5' is str"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_a_config_file_is_one_line(case, tmp_path):
    body, message = FILES[case]
    file = tmp_path / "mine.py"
    file.write_text(f"from grpo_jax.config import *\ndef get_config():\n  {body}\n")
    with pytest.raises(GrpoError, match=message) as caught:
        parsed(f"--config={file}")
    assert "\n" not in str(caught.value)


def test_a_config_file_without_its_function_is_one_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    with pytest.raises(GrpoError, match=f"{file}.*get_config"):
        parsed(f"--config={file}")
