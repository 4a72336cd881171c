"""Reward functions: the built-in ones, resolving names, and faults 49 to 52."""

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithms.advantages import group_advantages
from grpo_jax.errors import GrpoError
from grpo_jax.rewards import reward_functions

PROMPTS = ["1+1?", "2+2?", "3+3?"]
COMPLETIONS = [r"It is \boxed{2}.", r"\boxed{5}", "so the answer is 6."]
COLUMNS = {"answer": ["2", "4", "6"]}


def good(prompts, completions, **columns):
    return [1.0, 2.0, 3.0]


def score(functions, weights=None, **options):
    weights = [1.0] * len(functions) if weights is None else weights
    timeout = options.pop("timeout", 20.0)
    return reward_functions.compute_rewards(
        functions, weights, PROMPTS, COMPLETIONS, COLUMNS, timeout=timeout, **options
    )


def test_rule_and_format_rewards_are_weighted_and_added():
    out = score(
        [reward_functions.rule_reward, reward_functions.format_reward], [1.0, 0.25]
    )
    np.testing.assert_array_equal(out.by_function["rule_reward"], [1, 0, 1])
    np.testing.assert_array_equal(out.by_function["format_reward"], [1, 1, 0])
    np.testing.assert_array_equal(out.rewards, [1.25, 0.25, 1.0])
    assert out.rewards.dtype == np.float32
    assert out.failures == {"rule_reward": 0, "format_reward": 0}
    assert out.timeouts == 0


def test_chats_are_read_by_their_content():
    chat = [[{"role": "assistant", "content": r"\boxed{2}"}]]
    assert reward_functions.rule_reward(["q"], chat, answer=["2"]) == [1.0]
    assert reward_functions.format_reward(["q"], chat) == [1.0]


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
    assert reward_functions.format_reward(["q"], [text]) == [value]


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
    assert out.failures == {"good": 0, "bad": 3}
    np.testing.assert_array_equal(out.rewards, [1, 2, 3])
    (record,) = caplog.records
    assert "no such file" in record.getMessage() and "1+1?" in record.getMessage()


def test_past_the_share_of_failing_calls_it_refuses():
    with pytest.raises(
        GrpoError, match=r"reward bad: RuntimeError: no such file.*100%"
    ):
        score([bad])
    calls = reward_functions.CallRecord()
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
        "from grpo_jax.rewards.reward_functions import compute_rewards\n"
        "def hang(prompts, completions): threading.Event().wait()\n"
        "print(compute_rewards([hang], [1], ['q'], ['c'], {}, timeout=0.1).timeouts)\n"
    )
    root = Path(reward_functions.__file__).parents[2]
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
        reward_functions.compute_rewards(
            [good], [1], ["q"] * 2, ["c"] * 2, {"answer": ["1"]}, timeout=1
        )
    with pytest.raises(GrpoError, match="reward rule_reward.*'answer'"):
        reward_functions.compute_rewards(
            [reward_functions.rule_reward], [1], ["q"], ["c"], {}, timeout=1
        )


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
    assert reward_functions.find_reward_function(f"{file}:length")([], []) == [7.0]
    assert (
        reward_functions.find_reward_function(
            "grpo_jax.rewards.reward_functions:format_reward"
        )
        is reward_functions.format_reward
    )
    assert (
        reward_functions.find_reward_function("format")
        is reward_functions.format_reward
    )


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
        reward_functions.find_reward_function(name)
    assert "\n" not in str(caught.value)


# -- what a call uses itself, and functions that do what they like ---------------------


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_a_column_never_replaces_what_the_run_passes(name):
    """A row's own "completions" was once graded in the place of the model's."""
    columns = COLUMNS | {name: [r"\boxed{2}", r"\boxed{4}", r"\boxed{6}"]}
    message = f"the data has a column '{name}'.*rename"
    with pytest.raises(GrpoError, match=message):
        reward_functions.compute_rewards(
            [reward_functions.rule_reward],
            [1.0],
            PROMPTS,
            COMPLETIONS,
            columns,
            timeout=9,
        )
    with pytest.raises(GrpoError, match=message):
        reward_functions.check_signatures([reward_functions.rule_reward], columns)


def test_a_function_cannot_change_what_another_one_sees():
    seen = {}

    def spoils(prompts, completions, answer):
        completions[:] = [r"\boxed{0}"] * 3
        answer.clear()
        done.set()
        return [0.0] * 3

    def reads(prompts, completions, answer):
        done.wait(9)
        seen.update(completions=completions, answer=answer)
        return [1.0] * 3

    done = threading.Event()
    score([spoils, reads])
    assert seen == {"completions": COMPLETIONS, "answer": ["2", "4", "6"]}


class Sized:
    """Says that it has `length` values and gives others."""

    def __init__(self, length, values):
        self.length, self.given = length, values

    def __len__(self):
        if isinstance(self.length, Exception):
            raise self.length
        return self.length

    def __iter__(self):
        if isinstance(self.given, Exception):
            raise self.given
        return iter(self.given)


class Odd:
    def __float__(self):
        raise ZeroDivisionError("odd")


@pytest.mark.parametrize(
    "returned, message",
    [
        (np.array(1.0), "returned ndarray, not 3 values"),
        (np.float32(1.0), "returned float32, not 3 values"),
        (jnp.array(1.0), "returned ArrayImpl, not 3 values"),
        (Sized(3, [1.0, 2.0]), "says it has 3 values and gives 2"),
        (Sized(3, itertools.count()), "says it has 3 values and gives more"),
        (Sized(2, [1.0] * 3), "returned 2 values for 3 completions"),
        (iter([1.0] * 3), "not 3 values"),
    ],
)
def test_a_length_that_lies_is_refused(returned, message):
    with pytest.raises(GrpoError, match=f"reward odd: .*{message}") as caught:
        score([good, named("odd", returned)])
    assert "\n" not in str(caught.value)


def named(name, returned):
    def function(prompts, completions, **columns):
        return returned

    function.__name__ = name
    return function


@pytest.mark.parametrize(
    "returned",
    [Sized(ZeroDivisionError("odd"), []), Sized(3, ZeroDivisionError("odd"))],
    ids=["len", "iter"],
)
def test_a_result_that_raises_is_a_function_that_raises(returned, caplog):
    out = score([good, named("odd", returned)])
    assert out.failures == {"good": 0, "odd": 3}
    np.testing.assert_array_equal(out.rewards, [1, 2, 3])
    assert "reward odd: ZeroDivisionError: odd" in caplog.text


def test_values_that_raise_or_are_too_large_are_no_values():
    huge = [3e38, 10**400, -1e16, 1e15]
    for value, expected in zip([Odd(), *huge], [np.nan] * 4 + [1e15], strict=True):
        out = score([named("odd", [value, 1.0, np.array(2.0)])])
        np.testing.assert_array_equal(
            out.by_function["odd"], np.array([expected, 1, 2], np.float32)
        )
        assert out.failures == {"odd": int(np.isnan(expected))}


def test_a_sum_that_float32_cannot_square_is_refused():
    """Two of 3e38 came to infinity, which the advantages took for "not scored"."""
    functions = [named(name, [0.0, 9e14, 1.0]) for name in ("one", "two")]
    with pytest.raises(GrpoError, match=r"sum of one, two is 1\.8e\+15 for sample 1"):
        score(functions)
    with pytest.raises(GrpoError, match="beyond"):
        score([good], [1e20])
    with pytest.raises(GrpoError, match="not all finite"):
        score([good, good], [1.0, float("nan")])
    most = np.full(1024, reward_functions.LARGEST, np.float32)
    most[::2] *= -1
    with jax.debug_nans(True):
        advantages = group_advantages(jnp.asarray(most), 1024)
    np.testing.assert_allclose(np.abs(advantages), 1, rtol=1e-3)


def test_a_function_that_never_has_a_value_is_refused_with_the_counts():
    def shy(prompts, completions, **columns):
        return [None] * 3

    calls = reward_functions.CallRecord()
    for _ in range(9):
        out = score([good, shy], calls=calls)
        assert out.failures == {"good": 0, "shy": 3}
    with pytest.raises(GrpoError, match="reward shy: .* all 30 samples .* 10 calls"):
        score([good, shy], calls=calls)

    def once(prompts, completions, **columns):
        return [None, None, 1.0 if len(seen) == 5 else None]

    calls, seen = reward_functions.CallRecord(), []
    for i in range(14):
        seen.append(i)
        score([once], calls=calls)  # the fifth call's value starts the count again
    with pytest.raises(GrpoError, match="30 samples"):
        score([once], calls=calls)


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), 0.0, -1.0, 1e300])
def test_a_timeout_that_nobody_can_wait_for_is_refused(timeout):
    with pytest.raises(GrpoError, match="timeout .* is no number of seconds"):
        score([good], timeout=timeout)


def test_a_function_that_cancels_itself_has_raised():
    async def gone(prompts, completions, **columns):
        raise asyncio.CancelledError

    out = score([good, gone])
    assert out.failures == {"good": 0, "gone": 3}
