r"""The interpreter's loop: what runs, what is appended, what is sampled, and by whom.

The model of these tests recites scripts (`recital.py`), greedily, so that every turn of
the loop is a real one: sampler, cache, sandbox and encoding.
"""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_processes import finish, free_port, launch
from scripted_policy import SCRIPTS, P, ids_of, learn, make_tokenizer

from grpo_jax import sandbox
from grpo_jax.data import chain_sums
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import sharding
from grpo_jax.environments.interpreter import (
    OUTPUT_TOKENS,
    Interpreter,
    output_text,
    output_tokens,
    program_to_run,
)
from grpo_jax.environments.tool_rollouts import decode_output, generate_with_tools
from grpo_jax.errors import GrpoError
from grpo_jax.generation.sampler import generate
from grpo_jax.generation.stop_strings import make_stop_table
from grpo_jax.models.logprobs import token_logprobs
from grpo_jax.rewards import answers
from grpo_jax.sandbox import ProgramResult, Sandbox, SandboxError

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def recital():
    return learn(TOKENIZER, SCRIPTS)


@pytest.fixture(scope="module")
def interpreter():
    return Interpreter()


@pytest.fixture(scope="module")
def solved(recital, interpreter):
    """Two samples of each script, three generations."""
    return run(recital, interpreter, generations=3)


def run(recital, interpreter, names="abcdefgh", samples=2, **options: Any):
    model, params = recital
    given: Any = dict(max_new_tokens=64, temperature=0.0) | options
    return generate_with_tools(
        model,
        params,
        TOKENIZER,
        [TOKENIZER.encode(name) for name in names],
        interpreter=interpreter,
        key=jax.random.key(0),
        samples=samples,
        **given,
    )


def expected(name: str, turns: int = 99) -> tuple[list[int], list[bool]]:
    """The ids and the mask of a script, up to so many turns of either side."""
    tokens: list[int] = []
    mask: list[bool] = []
    for i, parts in enumerate(SCRIPTS[name][:turns]):
        ids = ids_of(TOKENIZER, parts)
        tokens, mask = tokens + ids, mask + [i % 2 == 0] * len(ids)
    return tokens, mask


def row_of(solved, i: int) -> tuple[list[int], list[bool]]:
    n = solved.lengths[i]
    assert not solved.tokens[i, n:].any() and not solved.mask[i, n:].any()
    return solved.tokens[i, :n].tolist(), solved.mask[i, :n].tolist()


def test_every_row_is_its_script_token_by_token(solved):
    """Also the tokens that no encoding of the text gives: none is made again. Rows that
    call stand beside rows that do not, end early, or call again."""
    for i, name in enumerate("aabbccddeeffgghh"):
        turns = 6 if name == "h" else 99  # three generations, and the last one's output
        assert row_of(solved, i) == expected(name, turns), name
    finished = [name in "acdef" for name in "aabbccddeeffgghh"]
    assert solved.finished.tolist() == finished
    assert [len(c) for c in solved.calls[::2]] == [1, 0, 2, 1, 0, 0, 0, 3]
    failed = [[call.failed for call in calls] for calls in solved.calls[::2]]
    assert failed[2] == [True, False] and not any(failed[7])


# As one of two processes: what it solved, and which programs it ran itself.
SHARED = """
import json, pickle, sys
sys.path[:0] = ["tests/helpers", "tests/environments"]
import jax
from grpo_jax.distributed import processes, sharding
from grpo_jax.environments.interpreter import Interpreter
from grpo_jax.sandbox import shared_sandbox
from test_tool_rollouts import row_of, run
class Watched:
    ran = []
    def run_programs(self, programs, **limits):
        self.ran += programs
        return shared_sandbox().run_programs(programs, **limits)
port, number, file = sys.argv[1:]
with processes.connect_processes(f"127.0.0.1:{port}", 2, int(number)):
    model, params = pickle.load(open(file, "rb"))
    where = sharding.shardings(params, sharding.make_mesh(2, 1, 1))
    params = jax.tree.map(sharding.place_on_devices, params, where)
    solved = run((model, params), Interpreter(sandbox=Watched()), generations=3)
    rows = [row_of(solved, i) for i in range(16)]
    calls = [[call.program for call in row] for row in solved.calls]
    print("told", json.dumps([rows, calls, Watched.ran]))
"""


def test_two_processes_run_half_of_the_programs_each(recital, solved, tmp_path):
    """Each of a turn's programs in one of them; the rows are those of one process."""
    (tmp_path / "recital").write_bytes(pickle.dumps(jax.device_get(recital)))
    port = str(free_port())
    words = ["-c", SHARED, port]
    two = finish([launch([*words, n, str(tmp_path / "recital")], 1) for n in "01"])
    ran = []
    for process in two:
        assert process.code == 0, process.err
        (line,) = [x for x in process.out.splitlines() if x.startswith("told ")]
        rows, calls, own = json.loads(line[5:])
        assert rows == [list(row_of(solved, i)) for i in range(16)]
        assert calls == [[call.program for call in row] for row in solved.calls]
        ran.append(own)
    assert sorted(ran[0] + ran[1]) == sorted({p for row in calls for p in row})
    assert [len(own) for own in ran] == [3, 4]  # of 4, 2 and 1 in the three turns


def test_generations_are_capped_and_the_last_program_still_runs(recital, interpreter):
    for generations in (1, 2):
        solved = run(recital, interpreter, "hc", 1, generations=generations)
        for i, name in enumerate("hc"):
            assert row_of(solved, i) == expected(name, 2 * generations)
        assert not solved.finished.any()
        assert [len(calls) for calls in solved.calls] == [generations] * 2


def test_log_probabilities_are_those_of_the_training_forward(recital, solved):
    """With a tool's tokens in the middle, which are seen and have none of their own."""
    model, params = recital
    for i in range(0, 16, 2):
        tokens, mask = row_of(solved, i)
        whole = jnp.array([TOKENIZER.encode("abcdefgh"[i // 2]) + tokens])
        hidden = model.hidden(params, whole)[:, :-1]
        logps, _ = token_logprobs(hidden, model.unembed(params), whole[:, 1:])
        wanted = np.where(mask, logps[0], 0.0)
        found = solved.logps[i, : len(tokens)]
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_sampled_rows_have_the_trainers_log_probabilities(recital, interpreter):
    """At temperature 1, where rows of one prompt part; the same key, the same rows."""
    model, params = recital
    # Calls come from what it learnt, draws from what it did not.
    params = jax.tree.map(lambda x: 0.9 * x, params)
    options: Any = dict(samples=8, generations=2, temperature=1.0)
    solved = run((model, params), interpreter, "ac", **options)
    calls = [len(calls) for calls in solved.calls]
    assert len(set(map(tuple, solved.tokens.tolist()))) > 4 and sum(calls) >= 4
    for i in range(16):
        tokens, mask = row_of(solved, i)
        whole = jnp.array([TOKENIZER.encode("ac"[i // 8]) + tokens])
        padded = jnp.pad(whole, ((0, 0), (0, 200 - whole.shape[1])))
        hidden = model.hidden(params, padded)[:, :-1]
        logps, _ = token_logprobs(hidden, model.unembed(params), padded[:, 1:])
        wanted = np.where(mask, logps[0, : len(tokens)], 0.0)
        np.testing.assert_allclose(solved.logps[i, : len(tokens)], wanted, atol=1e-4)
    again = run((model, params), interpreter, "ac", **options)
    for name in ("tokens", "logps", "mask", "lengths"):
        np.testing.assert_array_equal(getattr(solved, name), getattr(again, name))


def test_a_row_that_is_cut_off_at_its_program_still_calls(recital, interpreter):
    program = P + "print(6*7)\n```"
    limit = len(TOKENIZER.encode(program))
    solved = run(recital, interpreter, "a", 1, generations=1, max_new_tokens=limit)
    tokens, mask = row_of(solved, 0)
    assert TOKENIZER.decode(tokens) == f"{program}\n```output\n42\n```\n"
    assert mask.index(False) == limit and not solved.finished[0]
    cut = run(recital, interpreter, "a", 1, generations=2, max_new_tokens=limit - 1)
    assert not cut.calls[0] and cut.lengths[0] == limit - 1  # it does not go on


def test_rows_kept_a_few_at_a_time_or_on_many_devices_are_the_same(recital, solved):
    """Greedy: 16 rows at once on a device; 4 at a time; on a mesh of 2 × 2 × 2."""
    interpreter = Interpreter()
    few = run(recital, interpreter, generations=3, rows=4)
    model, params = recital
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(params, mesh))
        spread = run((model, placed), interpreter, generations=3)
    for other in (few, spread):
        for i in range(16):
            assert row_of(other, i) == row_of(solved, i)
        assert other.calls == solved.calls


def test_what_is_told_of_an_output(solved):
    texts = [decode_output(TOKENIZER, *row_of(solved, i)) for i in range(0, 16, 2)]
    assert texts[0] == f"{P}print(6*7)\n```\n```output\n42\n```\nso 42"
    assert texts[1] == "It is 5.\n"  # a faked output is no part of it
    assert texts[6] == f"{P}print(1)\n```\n"
    assert texts[7].endswith("```output\n5\n```\n")
    assert [answers.printed_answer(text) for text in texts[:3]] == ["42", None, "7"]
    assert [answers.printed_answer(text) for text in texts[6:]] == [None, "5"]


# -- the text that stops, however it is tokenised --------------------------------------


def test_a_stop_string_is_found_in_any_tokenisation():
    """SmolLM2's vocabulary: texts split at random, found where the decoded text has
    it; so a sequence of ids is not enough."""
    if not SMOLLM2.is_dir():
        pytest.skip("make smollm2 fetches the tokenizer")
    check_splits(Tokenizer.from_folder(SMOLLM2), count=600)


def test_a_stop_string_is_found_in_any_tokenisation_of_a_small_vocabulary():
    check_splits(TOKENIZER, count=300)


def check_splits(tokenizer: Tokenizer, count: int) -> None:
    rng, stop = random.Random(0), "```output"
    table = make_stop_table(tokenizer, (stop,))
    found = table.shape[1] - 1
    by_text: dict[str, list[int]] = {}
    for i, text in enumerate(tokenizer.token_texts()):
        by_text.setdefault(text, []).append(i)
    del by_text[""]
    ways = set()
    for _ in range(count):
        before = rng.choice(["", "a```\n", "``", "x`", "```out", "``````", "```outpu"])
        core = rng.choice([stop, stop, "```outpt", "```Output", "``output"])
        text, ids, at = before + core + rng.choice(["", "\n1", "s of", "put"]), [], 0
        while at < len(text):
            sizes = [n for n in range(1, 12) if text[at : at + n] in by_text]
            size = rng.choice(sizes)
            ids.append(rng.choice(by_text[text[at : at + size]]))
            at += size
        ways.add(tuple(ids))
        state = 0
        for n, i in enumerate(ids, start=1):
            state = table[i, state]
            assert (state == found) == (stop in tokenizer.decode(ids[:n])), ids
    assert len(ways) > count // 3


def test_several_stop_strings_and_tokens_without_a_text():
    tokenizer = Tokenizer.from_alphabet("abc")
    a, b, c, eos = *tokenizer.encode("abc"), tokenizer.eos_id
    table = make_stop_table(tokenizer, ("abab", "ba", "cc"), rows=20)
    assert table.shape == (20, 7)  # "", a, b, c, ab, aba; found
    for ids, stops in (([a, b, a], True), ([a, a, c, c], True), ([a, b, b, c], False)):
        state = 0
        for i in [eos, *ids, 19]:
            state = table[i, state]
        assert (state == table.shape[1] - 1) == stops


def test_the_sampler_stops_rows_by_text_and_slots_start_anew(recital):
    """Five rows through two slots: a slot's next row has nothing of the one before."""
    model, params = recital
    table = make_stop_table(TOKENIZER, ("```output",), model.config.vocab_size)
    options: Any = dict(
        max_new_tokens=64, temperature=0.0, eos_id=TOKENIZER.eos_ids, stop_table=table
    )
    prompts = [TOKENIZER.encode(name) for name in "abeag"]
    out = generate(model, params, prompts, key=jax.random.key(0), slots=2, **options)
    for i, name in enumerate("abeag"):
        n = int(out.lengths[i])
        assert out.tokens[i, :n].tolist() == expected(name, 1)[0]
        assert out.finished[i]


# -- programs and what is said of them -------------------------------------------------


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("a\n```python\nprint(1)\n```", "print(1)"),
        ("a\n```python\nprint(1)\n``` \n\n", "print(1)"),
        ("```python\nprint(1)\n```\nso", None),  # it does not end with it
        ("```python\nprint(1)\n", None),  # not closed
        ("```\nprint(1)\n```", None),  # not python
        ("```python\n \n```", None),
        ("```", None),
        # two in a turn: the first one's prints are gone, what is indented stays
        (
            "```python\nimport math\ndef f(x):\n    print(x)\nprint(2)\ny=1;print(y)\n"
            "```\nand\n```python\nprint(f(1))\n```",
            "import math\ndef f(x):\n    print(x)\nprint(f(1))",
        ),
    ],
)
def test_the_program_of_a_text(text, program):
    assert program_to_run([], text) == program


def test_what_the_interpreter_says():
    def result(status: Any = "ok", out="", err=""):
        return ProgramResult(status, out, err, 0.1)

    assert output_text(result(out=" 3\n4\n")) == "3\n4"
    assert output_text(result(out="x" * 100)) == "x" * 100
    assert output_text(result(out="a" * 60 + "b" * 60)) == "a" * 50 + "..." + "b" * 50
    trace = "Traceback (most recent call last):\n  File …\nValueError: no\n"
    assert (
        output_text(result("error", "5\n", trace)) == "Runtime errors: ValueError: no"
    )
    assert output_text(result("timeout", "5\n")) == "Runtime errors: Timeout Error"
    assert output_text(result()) == "Runtime errors:"
    assert output_text(result("output_limit", "y" * 999)) == "y" * 50 + "..." + "y" * 50


def test_the_appended_tokens():
    """Only the interpreter's text is encoded, behind what stands there; what the
    vocabulary does not have is replaced, and special tokens are plain text."""
    decode = TOKENIZER.decode
    tokens = output_tokens
    assert decode(tokens(TOKENIZER, "```output", "42")) == "\n42\n```\n"
    assert decode(tokens(TOKENIZER, "```output\n", "42")) == "42\n```\n"
    assert decode(tokens(TOKENIZER, "```", "42")) == "\n```output\n42\n```\n"
    assert decode(tokens(TOKENIZER, "```\n", "42")) == "```output\n42\n```\n"
    ids = tokens(TOKENIZER, "```output", "é<eos>\ud800")
    assert decode(ids) == "\n?<eos>?\n```\n" and TOKENIZER.eos_id not in ids
    bare = Tokenizer.from_alphabet("0123456789\n`output")
    assert bare.decode(tokens(bare, "```output", "4é2")) == "\n42\n```\n"
    if SMOLLM2.is_dir():
        smol = Tokenizer.from_folder(SMOLLM2)
        ids = tokens(smol, "```output", "😀" * 50 + "..." + "𝔸" * 50)
        assert len(ids) <= OUTPUT_TOKENS and smol.decode(ids).endswith("\n```\n")
        whole = smol.encode("```output\n42\n```\n")
        assert smol.encode("```output") + tokens(smol, "```output", "42") == whole


def test_equal_programs_run_once_and_a_hostile_one_says_no_more_than_a_line():
    program = "import os\nprint(os.getppid())\nraise OSError('\\x00```')"
    calls = Interpreter()([program, program])
    assert calls[0] is calls[1] and calls[0].failed
    assert calls[0].output == "Runtime errors: OSError: \x00```"


def test_the_embedded_task_is_solved_by_its_programs():
    """What its solutions say of the output is what the sandbox says."""
    interpreter = Interpreter()
    tokenizer = Tokenizer.from_alphabet(chain_sums.TOOL_ALPHABET)
    for name in ("chain", "long", "words", "zh"):
        plain, tool = (
            chain_sums.load_chain_sums(f"sums/{k}{name}", "train")
            for k in ("", "tool-")
        )
        for i in range(3):
            text = tool[i].solution
            assert tool[i].question == plain[i].question
            asked, _, told = text.partition("```output")
            (call,) = interpreter([program_to_run([], asked) or ""])
            assert told.startswith(f"\n{call.output}\n```\n")
            assert call.output == tool[i].answer == plain[i].answer
            assert tokenizer.decode(tokenizer.encode(text)) == text


class Broken(Sandbox):
    """A sandbox whose server cannot be started any more."""

    def _running_server(self):
        raise SandboxError("sandbox: a program could not be run: no more processes")


def test_a_sandbox_that_fails_is_no_wrong_answer():
    with Broken.__new__(Broken) as broken:
        broken._server, broken._lock = None, __import__("threading").Lock()
        with pytest.raises(GrpoError, match="no output was counted as wrong"):
            Interpreter(sandbox=broken)(["print(1)"])


def test_without_a_sandbox_nothing_starts(monkeypatch):
    sandbox._sandbox_of.cache_clear()
    monkeypatch.setattr(sandbox.mechanisms, "MECHANISMS", {})
    with pytest.raises(GrpoError, match="no way to confine a program"):
        Interpreter()
