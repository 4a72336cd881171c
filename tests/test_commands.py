"""The commands have one style of flags, which --help shows."""

import re

import pytest
from test_config_values import TINY, fresh_flags, parsed

from grpo_jax import census, convert, evaluate, export, train
from grpo_jax.evaluation.flags import parse_flags
from grpo_jax.plan.__main__ import main as plan

COMMANDS = {
    "train": (lambda words: train.main(["train.py", *words]), "--accept_changes"),
    "census": (lambda words: census.main(["census", *words]), "--accept_changes"),
    "evaluate": (evaluate.main, "--max_new_tokens"),
    "export": (export.main, "--adapter"),
    "convert": (convert.main, "--package"),
    "plan": (lambda words: plan(["plan", *words]), "--mean_output"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_a_commands_own_usage_and_flags(name, capsys):
    command, own = COMMANDS[name]
    with pytest.raises(SystemExit) as stop:
        command(["--help"])
    text = capsys.readouterr().out
    flags = set(re.findall(r"--[\w.-]+", text))
    assert stop.value.code == 0 and own in flags and "--help" in flags
    assert re.match(rf"usage: python (-m grpo_jax\.)?{name}", text)
    assert not [flag for flag in flags if "-" in flag[2:]]


def test_dashes_in_flags_are_understood():
    words = "--models a --sets gsm8k --out a-b --max-new-tokens 5 --process-id=3"
    flags = parse_flags([*words.split()])
    assert (flags.max_new_tokens, flags.process_id, flags.out) == (5, 3, "a-b")
    config = parsed(TINY, "--config.learning-rate=2e-3", "--config.name=a-b")
    assert (config.learning_rate, config.name) == (2e-3, "a-b")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "usage: python train.py --config"),
        ([TINY, "--config.group_sise=4"], "did you mean config.group_size"),
        ([TINY, "--config.mesh.tensor=3"], "not the number of devices"),
        ([TINY, "--workdir=gs://bucket"], "--workdir: gs://bucket: name a folder"),
    ],
)
def test_the_command_line_refuses_in_one_line(words, message, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    with pytest.raises(SystemExit) as stop, fresh_flags():
        train.main(["train.py", *words])
    error = str(stop.value.code)
    assert error.startswith("error: ") and message in error and "\n" not in error
