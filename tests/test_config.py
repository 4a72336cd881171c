"""Every wrong config is refused in one line that names the key (faults 1-6)."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import (
    Config,
    DataSettings,
    EvalSettings,
    ModelSettings,
    flatten_config,
    from_dict,
)
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.files import to_json
from grpo_jax.training import setup
from grpo_jax.training.config_checks import validate_config

ROOT = Path(__file__).parent.parent
GOOD = Config(
    sft_steps=1,
    data=DataSettings(sft="sums/chain"),
    model=ModelSettings(layers=1, width=16, heads=2, ffn=16),
)


def changed(name, value):
    """GOOD with one field changed, by its dotted name."""
    values = dataclasses.asdict(GOOD)
    *path, last = name.split(".")
    inner = values
    for key in path:
        inner = inner[key]
    inner[last] = value
    return from_dict(values)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("method", "gprpo", "did you mean grpo"),
        ("rl_steps", -1, "0 or more"),
        ("clip_low", 0.0, "above 0"),
        ("kl_coef", float("nan"), "NaN"),
        ("group_size", 1, "2 or more"),
        ("temperature", 0.0, "0.01 or more"),
        ("surrogate", "cispo", "clip_high"),
        ("max_staleness", 2, "not one of 0, 1"),
        ("data.template", "chatt", "did you mean chat"),
        ("data.sft", "", "name the worked examples"),
        ("model.width", 18, "not a multiple"),
        ("sft_steps", 0, "random weights"),
        ("rewards.weights", "1.0,2.0", "2 for 1 functions"),
        ("rewards.weights", "a", "not numbers"),
        ("eval.samples", -2, "0 or more"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value, message):
    validate_config(GOOD)
    with pytest.raises(GrpoError, match=message) as caught:
        validate_config(changed(name, value))
    text = str(caught.value)
    assert text.startswith("config.") and "\n" not in text


def test_what_a_method_would_ignore_is_refused():
    for name, default in METHODS["grpo"].fields.items():
        value = {"delta": 2.0, "mask_truncated": True}.get(name, default or 1)
        config = changed(name, value)
        with pytest.raises(GrpoError, match=f"config.{name}: method sft would ignore"):
            validate_config(dataclasses.replace(config, method="sft"))


def test_a_methods_own_fields_have_the_papers_values():
    assert GOOD.kl_coef is None and GOOD.method_value("kl_coef") == 0.04
    assert changed("kl_coef", 0.0).method_value("kl_coef") == 0.0
    assert GOOD.method_value("updates_per_rollout") == 1


def test_config_json_reads_back_as_it_was():
    import json

    config = changed("eval.questions", 7)
    assert from_dict(json.loads(to_json(dataclasses.asdict(config)))) == config
    assert flatten_config(config)["eval.questions"] == 7


def test_every_config_file_is_valid_with_every_method_it_names():
    for file in sorted((ROOT / "configs").glob("*.py")):
        config = runpy.run_path(str(file))["get_config"]()
        assert validate_config(config) is config, file
        assert config.name == file.stem
    tiny = runpy.run_path(str(ROOT / "configs/tiny.py"))["get_config"]
    for method in METHODS:
        validate_config(dataclasses.replace(tiny(), method=method))


def test_eval_settings_take_zero_for_all():
    assert validate_config(dataclasses.replace(GOOD, eval=EvalSettings(questions=0)))


@pytest.mark.parametrize(
    "name, text",
    [
        (
            "7b",
            "6.91 B parameters in float32, 82.9 GB with the optimiser's, 10.4 GB on",
        ),
        ("qwen25_gsm8k", "0.51 B parameters in bfloat16, 1.2 GB"),
    ],
)
def test_the_state_of_a_large_config_is_built_from_shapes(name, text):
    """Three float32 numbers a parameter; with LoRA two bytes and the adapters."""
    file = ROOT / "configs" / f"{name}.py"
    config = runpy.run_path(str(file))["get_config"]()
    assert text in setup.describe_state(config, sharding.make_mesh(fsdp=-1))
