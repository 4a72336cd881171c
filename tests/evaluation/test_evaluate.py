"""The measures, by hand; an evaluation stopped and continued; files made elsewhere."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import evaluate
from grpo_jax.checkpoints.huggingface.weights import save_pretrained
from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError
from grpo_jax.evaluation import (
    completion_files,
    generate_answers,
    metrics,
    published_figures,
    statistics,
)
from grpo_jax.evaluation.completion_files import Completion
from grpo_jax.evaluation.statistics import (
    majority_is_right,
    mcnemar_p_value,
    pass_at_k_by_question,
    wilson_interval,
)
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.report.comparison import (
    accuracy_table,
    comparison_remarks,
    paired_table,
    published_tables,
)
from grpo_jax.report.tables import to_markdown
from grpo_jax.rewards.grading import kinds

CACHE = str(Path(__file__).parents[2] / ".pytest_cache" / "jax")


# -- measures --------------------------------------------------------------------------


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    right = [True, False, False, True, False]
    for k in (1, 2, 3, 5):
        choices = list(itertools.combinations(right, k))
        by_hand = sum(any(c) for c in choices) / len(choices)
        assert pass_at_k_by_question([2], 5, k) == pytest.approx([by_hand])
    assert pass_at_k_by_question([0, 5], 5, 3) == [0, 1]


def test_majority_counts_answers_and_not_completions_without_one():
    assert majority_is_right(["7", None, None, None], [True, False, False, False])
    assert not majority_is_right([None, None], [False, False])
    assert majority_is_right(["7", "8"], [True, False])  # a tie: the first


def test_the_interval_is_wilsons():
    """Against the values of R's binom.confint(…, method="wilson")."""
    assert wilson_interval(0.0, 50) == pytest.approx((0.0, 0.07135), abs=1e-4)
    assert wilson_interval(0.9, 1000) == pytest.approx((0.87984, 0.91711), abs=1e-4)


@pytest.mark.parametrize("one, other", [(0, 0), (3, 3), (7, 1), (2, 9), (12, 0)])
def test_mcnemar_counts_all_ways_the_coins_can_fall(one, other):
    first = [True] * one + [False] * other + [True] * 5
    second = [False] * one + [True] * other + [True] * 5
    m, fewer = one + other, min(one, other)
    falls = [sum(coins) for coins in itertools.product((0, 1), repeat=m)]
    extreme = sum(heads <= fewer or heads >= m - fewer for heads in falls)
    expected = 1.0 if one == other else extreme / len(falls)
    assert mcnemar_p_value(first, second) == pytest.approx(expected)


def test_the_bootstrap_is_drawing_questions_again():
    """Against a plain loop over resampled questions."""
    values = np.random.default_rng(1).choice([0, 0.25, 0.5, 1], 60)
    rng = np.random.default_rng(2)
    means = [rng.choice(values, len(values)).mean() for _ in range(20_000)]
    by_hand = np.quantile(means, (0.025, 0.975))
    assert statistics.bootstrap_interval(values) == pytest.approx(by_hand, abs=0.01)
    low, high, p = statistics.paired_bootstrap(values, values[::-1] + 0.1)
    difference = values[::-1] + 0.1 - values
    draws = np.array([rng.choice(difference, 60).mean() for _ in range(20_000)])
    assert (low, high) == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.015)
    assert p == pytest.approx(2 * (draws <= 0).mean(), abs=0.02)


def said(*texts):
    return [Completion(text) for text in texts]


TWO = [Example("1+1", "2"), Example("1+2", "3")]


def test_scores_of_samples_by_hand():
    """Votes are for values: 2, 2.0 and $2 are one; a missing answer is wrong."""
    answered = [said("2", "2.0", "7", "so $2"), said("4", "4", "It is 3.", "?")]
    result = metrics.score_completions(TWO, answered).result
    assert result["accuracy"] == (3 + 1) / 8
    assert result["pass@k"] == {"1": 0.5, "2": (1 + 1 / 2) / 2, "4": 1.0}
    assert result["maj@k"] == {"1": 0.5, "2": ((1 + 0) + (0 + 1)) / 4, "4": 0.5}
    low, high = result["pass@k_ci95"]["2"]
    assert low == 0.5 and high == 1.0  # of two questions: the worse or the better one


@pytest.mark.parametrize(
    "boxes, reference, votes, right",
    [
        (["5", r"3\text{ cm}", "5", "x=3", "3"], "3", [1, 0, 1, 0, 0], True),
        # equal wrong ones are one vote too, and may outvote the right ones
        (["5", "x=5", r"5\text{ cm}", "3", "3"], "3", [1, 1, 1, 0, 0], False),
        (["0.5", r"\frac12", "1/2", "3", "3"], "3", [1, 1, 1, 0, 0], False),
        ([r"\sqrt{8}", "7", r"2\sqrt2", "8", "8"], "8", [1, 2, 1, 0, 0], False),
        ([r"\sqrt{8}", "7", r"\sqrt2", "8", "8"], "8", [1, 2, 3, 0, 0], True),
        (["(1,2)", "(2,1)", "1,2", "2,1", "3", "3"], "3", [1, 2, 3, 3, 0, 0], False),
        (["500", "5", "50", "3", "3"], "3", [1, 2, 3, 0, 0], True),
        (["3", "3", r"\{4,5\}", "5,4", "4,5"], "3", [0, 0, 1, 1, 1], False),
        (["5", r"5\text{ m}", r"5\text{ cm}", "3", "3"], "3", [1, 1, 1, 0, 0], False),
        ([r"5\text{ m}", r"5\text{ cm}", "3", "3"], "3", [1, 2, 0, 0], True),
    ],
)
def test_a_majority_is_of_equal_answers(boxes, reference, votes, right):
    example = Example("?", reference)
    answered = said(*(f"\\boxed{{{box}}}" for box in boxes))
    result = metrics.score_completions([example], [answered]).result
    assert result["maj@k"][str(len(boxes))] == right
    graded = np.array([[vote == 0 for vote in votes]])
    assert metrics.assign_votes([example], boxes, graded) == [votes]


def test_an_option_and_its_value_are_one_vote():
    options = {"options": ["1", "2", "3", "4"]}
    example = Example("?", "A", columns=options)
    given = ["B", "2.0", "2", "A", "1", "C"]
    right = np.array([[0, 0, 0, 1, 1, 0]])
    assert metrics.assign_votes([example], given, right) == [[1, 1, 1, 0, 0, 3]]


def test_no_votes_are_compared_where_none_is_right(monkeypatch):
    asked = []

    def count(examples, predictions):
        asked.append(len(examples))
        return [False] * len(examples)

    monkeypatch.setattr(kinds, "grade_examples", count)
    given = [str(n) for n in range(100)]
    (votes,) = metrics.assign_votes([Example("?", "no")], given, np.zeros((1, 100)))
    assert votes == list(range(1, 101))
    metrics.assign_votes([Example("?", "0")], given, np.eye(1, 100))
    assert asked == [0, 64 * 63 // 2]  # not 99 with 98 others


def test_a_question_that_is_too_long_counts_as_wrong():
    result = metrics.score_completions(TWO, [None, said("It is 3.")]).result
    assert (result["accuracy"], result["too_long"]) == (0.5, 1)


def test_programs_and_the_papers_rule_stand_beside():
    texts = ["```output\n2\n```\nSo \\boxed{200}", "```output\nRuntime errors: x\n```3"]
    answered = [said(text) for text in texts]
    result = metrics.score_completions(
        TWO, answered, grader="paper", programs=True
    ).result
    assert result["accuracy"] == 0 and result["paper"]["accuracy"] == 0.5
    assert result["program"]["accuracy"] == 0.5


def test_paired_tests_say_which_they_are():
    a = metrics.Score({}, np.array([[1.0], [0.0], [0.0], [1.0]]))
    b = metrics.Score({}, np.array([[1.0], [1.0], [0.0], [0.0]]))
    c = metrics.Score({}, np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))
    tests = metrics.compare_pairs({("s", "greedy"): {"a": a, "b": b, "c": c}})
    assert [t["models"] for t in tests] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert (tests[0]["test"], tests[0]["p"]) == ("exact McNemar", 1.0)
    assert tests[1]["test"] == "paired bootstrap"
    assert tests[1]["difference"] == 0.125
    shown = to_markdown(paired_table({"paired": tests, "sets": {}, "models": []}))
    assert "| s | greedy | a → c | +12.5 [+0.0, +37.5] |" in shown


# -- tables ----------------------------------------------------------------------------


def test_the_table_says_what_was_measured_where():
    def cell(accuracy, heat=0.0):
        found = {"accuracy": accuracy, "ci95": wilson_interval(accuracy, 100)}
        return found | {"temperature": heat}

    results = {
        "models": ["instruct", "rl"],
        "sets": {
            "a": {
                "in_domain": True,
                "instruct": {"n": 100, "greedy": cell(0.25), "sampled": cell(0.5, 0.7)},
                "rl": {
                    "n": 100,
                    "greedy": cell(0.75),
                    "sampled": cell(0.5, 0.7),
                    "tool_greedy": cell(0.8) | {"program": cell(0.7), "cut_off": 0.25},
                },
            }
        },
    }
    text = to_markdown(accuracy_table(results))
    assert "temperature 0.7: instruct → rl" in text
    assert "| a (in-domain) | 100 | 25.0 ± 8.4 → 75.0 ± 8.4 | 50.0 ± 9.6 →" in text
    assert (
        "with programs, greedy: instruct → rl | with programs, greedy, its programs"
        in (text)
    )
    assert "– → 80.0 ± 7.8 | – → 70.0 ± 8.8 |" in text
    results["sets"]["b"] = {"rl": {"tool_greedy": {"cut_off": 1.0, "too_long": 3}}}
    assert comparison_remarks(results) == [
        "rl, tool, greedy: completions cut off: a 25 %, b 100 %",
        "rl, tool, greedy: prompts too long, which count as wrong: b 3",
    ]


def test_published_figures_are_marked_and_complete():
    assert (
        len(published_figures.FIGURES["cot"]) == 19
        and len(published_figures.FIGURES["tool"]) == 7
    )
    assert published_figures.FIGURES["cot"]["GPT-4"]["cmath"] == "86.0"
    assert published_figures.FIGURES["cot"]["DeepSeekMath-RL 7B"]["mgsm_zh"] == "79.6"
    assert published_figures.FIGURES["tool"]["ToRA 34B"]["mgsm_zh"] == "41.2"
    ((title, table),) = published_tables(["gsm8k", "svamp"], ["cot"]).items()
    assert title.startswith("Published, not measured here")
    assert "| DeepSeekMath-RL 7B | 88.2 |" in to_markdown(table)
    assert published_tables(["svamp"], ["cot"]) == {}
    known = published_figures.figures_for_json(["math", "ocw"], ["cot", "tool"])
    assert known["note"].startswith("published, not measured")
    assert known["tool"]["MAmmoTH 70B"] == {"math": "41.8"}


# -- completions made elsewhere --------------------------------------------------------


def write(file: Path, *rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


SETS = {
    "a": [Example("one  plus\none", "2", id="a/0"), Example("1+2", "3", id="a/1")],
    "b": [Example("same", "1", id="b/0"), Example("same", "1", id="b/1")],
}


def test_completions_of_others_are_read_by_id_index_or_question(tmp_path):
    file = write(
        tmp_path / "x.jsonl",
        {"settings": {"anything": 1}},
        {"set": "a", "question": "one plus one", "completion": "2", "extra": []},
        {"set": "a", "index": 1, "completions": ["3"]},
        {"set": "a", "id": "a/1", "completions": ["x", "y"], "temperature": 0.5},
        {"set": "a", "id": "a/0", "completion": "v", "temperature": 0.5},
        {"set": "a", "id": "a/0", "completion": "w", "temperature": 0.5},
        {"set": "b", "question": "same", "completion": "p", "mode": "tool"},
        {"set": "b", "question": "same", "completion": "q", "mode": "tool"},
        {"set": "c", "index": 0, "completion": "of a set that is not asked for"},
    )
    found = completion_files.read_completions(file, SETS)
    assert found["a"] == {
        ("cot", "greedy"): ([said("2"), said("3")], 0.0),
        ("cot", "sampled"): ([said("v", "w"), said("x", "y")], 0.5),
    }
    assert found["b"] == {("tool", "greedy"): ([said("p"), said("q")], 0.0)}


GOOD = {"set": "a", "index": 0, "completion": "2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"x.jsonl:1: not valid JSON"),
        ([GOOD, 7], r"x.jsonl:2: expected a JSON object"),
        ([{**GOOD, "set": 1}], "x.jsonl:1: set 1 is not a name"),
        ([{"index": 0, "completion": ""}], "x.jsonl:1: no 'set', and --sets names"),
        ([{**GOOD, "index": 2}], "x.jsonl:1: the set a has no question with index 2"),
        ([{"set": "a", "completion": ""}], "x.jsonl:1: none of 'id', 'index'"),
        ([{**GOOD, "completions": []}], "x.jsonl:1: give either 'completion' or"),
        ([{**GOOD, "completion": 2}], "x.jsonl:1: a completion is not a text"),
        ([{**GOOD, "mode": "pal"}], "x.jsonl:1: mode 'pal' is neither"),
        ([{**GOOD, "temperature": -1}], "x.jsonl:1: temperature -1 is not a number"),
        ([GOOD], "x.jsonl: set a: 1 of 2 questions have no completion .* id a/1"),
        (
            [GOOD, GOOD, {**GOOD, "index": 1}],
            "x.jsonl: set a: index 1 has 1 completions and index 0 has 2",
        ),
        ([{**GOOD, "set": "A"}], "x.jsonl: no completions of the set a; it has A"),
    ],
)
def test_bad_completions_are_refused_with_file_and_line(rows, message, tmp_path):
    file = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(GrpoError, match=message):
        completion_files.read_completions(file, SETS)


# -- the command, stopped and continued ------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Hugging Face folder: random weights, one token a character."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer.from_alphabet("0123456789+=?# \n")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=1, heads=2, kv_heads=2,
        head_dim=16, ffn=32,
    )  # fmt: skip
    decoder = Decoder(config)
    save_pretrained(
        decoder, decoder.init(jax.random.key(3)), folder, tokenizer=tokenizer
    )
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    rows = [{"question": f"{a}+{a % 7}=?", "answer": f"{a % 10}"} for a in range(60)]
    return str(write(tmp_path_factory.mktemp("sets") / "sums.jsonl", *rows))


@pytest.fixture
def command(model, questions, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)
    settings = "--samples 4 --batch 8 --max_new_tokens 64 --template plain"
    words = ["--models", str(model), "--sets", questions, *settings.split()]
    return [*words, "--instruction", "none"]


DATED = (".lock", "report.html", "started.json")


def folder_of(out: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name not in DATED
    }


def sampled_of(out: Path) -> Path:
    (file,) = out.glob("completions/tiny/*sums.jsonl.cot.sampled.jsonl")
    return file


@pytest.fixture(scope="module")
def whole(model, questions, tmp_path_factory):
    """The evaluation that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)
        settings = "--samples 4 --batch 8 --max_new_tokens 64 --template plain"
        words = ["--models", str(model), "--sets", questions, *settings.split()]
        evaluate.main([*words, "--instruction", "none", "--out", str(out)])
    return out


def test_killed_and_continued_to_the_same_bits(command, whole, tmp_path, monkeypatch):
    """kill -9 among the samples, and a torn line: no whole batch is asked again."""
    out = tmp_path / "out"
    run = [sys.executable, "-m", "grpo_jax.evaluate", *command, "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(run, env=env, **quiet)
    while process.poll() is None:
        files = list(out.glob("completions/*/*sampled.jsonl"))
        if files and files[0].read_bytes().count(b"\n") > 16:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    there, wanted = sampled_of(out).read_bytes(), sampled_of(whole).read_bytes()
    assert wanted.startswith(there) and len(there) < len(wanted)
    # as if it had come a little earlier: within a line, one row into the second batch
    lines = there.splitlines(keepends=True)
    sampled_of(out).write_bytes(b"".join(lines[:10]) + lines[10][:30])
    asked: list[int] = []
    ask = generate_answers.MODES["cot"]

    def spy(model, params, tokenizer, prompts, **options):
        asked.append(len(prompts))
        return ask(model, params, tokenizer, prompts, **options)

    monkeypatch.setitem(generate_answers.MODES, "cot", spy)
    evaluate.main([*command, "--out", str(out)])
    assert folder_of(out) == folder_of(whole)
    assert asked == [8] * 6 + [4]  # 60 questions in batches of 8, without the first
    asked.clear()
    evaluate.main([*command, "--out", str(out)])
    assert folder_of(out) == folder_of(whole) and asked == []


def test_ctrl_c_ends_with_one_line(command, tmp_path):
    out = tmp_path / "out"
    run = [sys.executable, "-m", "grpo_jax.evaluate", *command, "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        run,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and not list(out.glob("completions/*/*greedy.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped; the same command goes on from here"
    assert "Traceback" not in said


def refusal(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(words)
    said = capsys.readouterr().err if stop.value.code == 2 else str(stop.value.code)
    return said.strip().splitlines()[-1]


def test_a_model_that_is_not_there_is_refused_before_another_is_asked(
    command, model, capsys, tmp_path
):
    names, out = ["--models", str(model), "none"], tmp_path / "out"
    said = refusal([*command, *names, "--out", str(out)], capsys)
    assert said.startswith("error: none: there is no such folder")
    (out / "old/checkpoints").mkdir(parents=True)
    (out / "old/config.json").write_text('{"model": {"remat": true}}')
    names = ["--models", str(model), str(out / "old")]
    said = refusal([*command, *names, "--out", str(out)], capsys)
    assert said == (
        f"error: {out}/old/config.json: config.model.remat: True is bool; text is "
        "needed; change it there"
    )
    assert not list(out.rglob("*.jsonl"))


def test_other_settings_and_other_weights_are_refused(command, whole, capsys, model):
    words = [*command, "--out", str(whole)]
    before = folder_of(whole)
    said = refusal([*words, "--max_new_tokens", "9", "--template", "chat"], capsys)
    assert "error: tokenizer: it has no chat template" in said
    said = refusal(
        [*words, "--max_new_tokens", "9", "--max_prompt_tokens", "99"], capsys
    )
    assert "sums.jsonl.cot.greedy.jsonl: made with other settings" in said
    assert "(max_prompt_tokens 2048 → 99, max_new_tokens 64 → 9); take" in said
    said = refusal([*words, "--seed", "1"], capsys)  # greedy has no seed
    assert "sums.jsonl.cot.sampled.jsonl: made with other settings (seed 0 → 1)" in said
    assert folder_of(whole) == before
    weights = model / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert "made with other settings (weights '" in refusal(words, capsys)
    finally:
        weights.write_bytes(kept)


def test_a_file_is_scored_as_the_model_that_wrote_it(command, whole, tmp_path, capsys):
    """Our own completions, given back as somebody else's, have the same scores."""
    given = tmp_path / "theirs.jsonl"
    files = sorted(whole.glob("completions/tiny/*.jsonl"))
    given.write_text("".join(f.read_text() for f in files))
    words = [*command[2:4], "--out", str(tmp_path / "out")]
    evaluate.main(["--models", str(given), *words])
    theirs = json.loads((tmp_path / "out/results.json").read_text())
    ours = json.loads((whole / "results.json").read_text())
    (name,) = ours["sets"]
    assert theirs["sets"][name]["theirs"] == ours["sets"][name]["tiny"]


def test_two_files_are_compared_on_the_same_questions(questions, tmp_path):
    rows = [
        {"set": questions, "index": i, "completion": f"#### {i % 10}"}
        for i in range(60)
    ]
    best = write(tmp_path / "best.jsonl", *rows)
    rows[7]["completion"] = "?"
    good = write(tmp_path / "good.jsonl", *rows)
    words = ["--sets", questions, "--out", str(tmp_path / "out")]
    evaluate.main(["--models", str(best), str(good), *words])
    page = (tmp_path / "out/report.html").read_text()
    assert "<td>98.3 <span" in page and "No metrics yet" not in page
    report = (tmp_path / "out/results.md").read_text()
    assert "| 60 | 100.0 ± 3.0 → 98.3 ± 4.3 |" in report
    assert "| greedy | best → good | −1.7 [−5.0, +0.0] | 1 | exact McNemar |" in report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mode tool --generations 0", "--generations 0 is not between 1 and"),
        ("--few_shot", "has no --template and no --instruction"),
        ("--questions -1", "--questions -1 is not between 0 and"),
        ("--sets gsm9k", "error: data 'gsm9k': no such set; did you mean 'gsm8k'?"),
        ("--models a/x b/x a/x", "error: --models: the same model twice"),
        ("--coordinator here", "error: --coordinator, --num_processes and --process"),
        ("--models none.jsonl", "error: --models: none.jsonl: no such file of comp"),
    ],
)
def test_mistakes_are_one_line(words, message, command, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert message in refusal([*command, *out, *words.split()], capsys)
