"""Reward functions: the built-in ones, resolving names, and faults 49 to 52."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import rewards
from grpo_jax.errors import GrpoError

PROMPTS = ["1+1?", "2+2?", "3+3?"]
COMPLETIONS = [r"It is \boxed{2}.", r"\boxed{5}", "so the answer is 6."]
COLUMNS = {"answer": ["2", "4", "6"]}


def good(prompts, completions, **columns):
    return [1.0, 2.0, 3.0]


def score(functions, weights=None, **options):
    weights = [1.0] * len(functions) if weights is None else weights
    timeout = options.pop("timeout", 20.0)
    return rewards.score(
        functions, weights, PROMPTS, COMPLETIONS, COLUMNS, timeout=timeout, **options
    )


def test_rule_and_format_rewards_are_weighted_and_added():
    out = score([rewards.rule_reward, rewards.format_reward], [1.0, 0.25])
    np.testing.assert_array_equal(out.by_function["rule_reward"], [1, 0, 1])
    np.testing.assert_array_equal(out.by_function["format_reward"], [1, 1, 0])
    np.testing.assert_array_equal(out.rewards, [1.25, 0.25, 1.0])
    assert out.rewards.dtype == np.float32
    assert out.failures == {"rule_reward": 0, "format_reward": 0}
    assert out.timeouts == 0


def test_chats_are_read_by_their_content():
    chat = [[{"role": "assistant", "content": r"\boxed{2}"}]]
    assert rewards.rule_reward(["q"], chat, answer=["2"]) == [1.0]
    assert rewards.format_reward(["q"], chat) == [1.0]


@pytest.mark.parametrize(
    "text, value",
    [
        (r"\boxed{2}", 1.0),
        (r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{1} and \boxed{2}", 0.0),
        (r"\boxed{2", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{1} \boxed{", 0.0),
        (r"\fbox{2}", 0.0),
        (r"\boxed 2", 0.0),
        ("2", 0.0),
    ],
)
def test_the_format_is_exactly_one_box(text, value):
    assert rewards.format_reward(["q"], [text]) == [value]


def test_values_that_are_not_numbers_are_left_out_and_counted():
    def odd(prompts, completions, **columns):
        return [None, float("nan"), "0.5"]

    def half(prompts, completions, **columns):
        return [np.float32(0.5), True, float("inf")]

    out = score([odd, half], [10.0, 2.0])
    assert np.isnan(out.by_function["odd"]).all()
    np.testing.assert_array_equal(out.by_function["half"], [0.5, 1.0, np.nan])
    np.testing.assert_array_equal(out.rewards, [1.0, 2.0, np.nan])
    assert out.failures == {"odd": 3, "half": 1}


def test_a_zero_weight_does_not_bring_a_missing_value_back():
    def none(prompts, completions, **columns):
        return [None] * 3

    np.testing.assert_array_equal(score([none, good], [0.0, 1.0]).rewards, [1, 2, 3])


def bad(prompts, completions, **columns):
    raise RuntimeError("no such\nfile")


def test_a_raising_function_is_logged_with_a_sample_and_counted(caplog):
    out = score([good, bad])
    assert out.errors == {"good": 0, "bad": 1}
    assert out.failures == {"good": 0, "bad": 3}
    np.testing.assert_array_equal(out.rewards, [1, 2, 3])
    (record,) = caplog.records
    assert "no such file" in record.getMessage() and "1+1?" in record.getMessage()


def test_past_the_share_of_failing_calls_it_refuses():
    with pytest.raises(
        GrpoError, match=r"reward bad: RuntimeError: no such file.*100%"
    ):
        score([bad])
    calls = rewards.Calls()
    for _ in range(9):
        score([good], calls=calls)
    assert np.isnan(score([bad], max_failures=0.1, calls=calls).rewards).all()
    with pytest.raises(GrpoError, match="18%"):  # 2 of 11
        score([bad], max_failures=0.1, calls=calls)


def test_a_hang_counts_as_wrong_and_training_goes_on():
    cancelled = []

    def hang(prompts, completions, **columns):
        time.sleep(3)
        return [1.0] * 3

    async def wait(prompts, completions, **columns):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return [1.0] * 3

    began = time.monotonic()
    out = score([hang, wait, good], [1.0, 1.0, 1.0], timeout=0.4)
    assert time.monotonic() - began < 1.5  # side by side, not one after the other
    assert out.timeouts == 2
    np.testing.assert_array_equal(out.by_function["hang"], [0, 0, 0])
    np.testing.assert_array_equal(out.rewards, [1, 2, 3])
    assert out.failures["hang"] == 0
    until = time.monotonic() + 2
    while not cancelled and time.monotonic() < until:
        time.sleep(0.02)
    assert cancelled


def test_a_hang_does_not_keep_the_interpreter():
    code = (
        "import threading\n"
        "from grpo_jax.rewards import score\n"
        "def hang(prompts, completions): threading.Event().wait()\n"
        "print(score([hang], [1], ['q'], ['c'], {}, timeout=0.1).timeouts)\n"
    )
    root = Path(rewards.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True,
        timeout=20,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.parametrize(
    "returned, message",
    [
        ([1.0], "returned 1 values for 3 completions"),
        ([1.0] * 4, "returned 4 values for 3 completions"),
        (1.0, "returned float, not 3 values"),
        (None, "returned NoneType, not 3 values"),
        ("abc", "returned str, not 3 values"),
    ],
)
def test_a_wrong_number_of_values_is_refused(returned, message):
    def wrong(prompts, completions, **columns):
        return returned

    with pytest.raises(GrpoError, match=f"reward wrong: {message}"):
        score([good, wrong])


def test_unequal_lengths_and_missing_columns_are_refused():
    with pytest.raises(GrpoError, match="2 weights for 1 functions"):
        score([good], [1.0, 2.0])
    with pytest.raises(GrpoError, match="answer has 1 values for 2 completions"):
        rewards.score([good], [1], ["q"] * 2, ["c"] * 2, {"answer": ["1"]}, timeout=1)
    with pytest.raises(GrpoError, match="reward rule_reward.*'answer'"):
        rewards.score([rewards.rule_reward], [1], ["q"], ["c"], {}, timeout=1)


async def slow(prompts, completions, answer, **columns):
    await asyncio.sleep(0.01)
    return [float(a) for a in answer]


def test_async_functions_run_with_and_without_a_running_loop():
    np.testing.assert_array_equal(score([slow]).rewards, [2, 4, 6])

    async def inside():
        return score([slow, good])

    np.testing.assert_array_equal(asyncio.run(inside()).rewards, [3, 6, 9])


def test_functions_of_one_name_keep_their_columns():
    def twice(value):
        return lambda prompts, completions, **columns: [value] * 3

    out = score([twice(1.0), twice(2.0)])
    assert [v[0] for v in out.by_function.values()] == [1.0, 2.0]
    np.testing.assert_array_equal(out.rewards, [3, 3, 3])


def test_resolve_finds_modules_and_files(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text("def length(prompts, completions): return [7.0]\n")
    assert rewards.resolve(f"{file}:length")([], []) == [7.0]
    assert rewards.resolve("grpo_jax.rewards:format_reward") is rewards.format_reward
    assert rewards.resolve("format") is rewards.format_reward


@pytest.mark.parametrize(
    "name, message",
    [
        ("accuracy", "not rule, format, module:function"),
        ("math:no_such", "math has no function 'no_such'"),
        ("math:pi", "math has no function 'pi'"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("/no/such/file.py:f", "cannot import /no/such/file.py"),
    ],
)
def test_resolve_says_in_one_line_what_is_wrong(name, message):
    with pytest.raises(GrpoError, match=message) as caught:
        rewards.resolve(name)
    assert "\n" not in str(caught.value)
