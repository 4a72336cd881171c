"""What a set's rows mean: their prompts, which answers are right, few-shot prompts."""

import os

import pytest

from grpo_jax.data import datasets, few_shot_prompts, parsers, registry
from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError
from grpo_jax.rewards.grading import kinds, worker_pool

DATA = os.environ.get("GRPO_JAX_DATA", "")
real = pytest.mark.skipif(not DATA, reason="real data: set GRPO_JAX_DATA to its folder")
MATRIX = r"\begin{{{0}matrix}}1\\{1}\end{{{0}matrix}}"
FOUR = Example("?", "C", columns={"options": ["3", r"$\sqrt{8}$", r"\frac{1}{2}", "A"]})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_multiple_choice_prompts():
    row = {"question": "2+2?", "options": ["3", "4", "5", 6.0], "answer": "B"}
    row |= {"topic": "t", "id": 7}
    example = parsers.mmlu(row)
    assert example.question == (
        "2+2?\nWhat of the following is the right choice? Explain your answer.\n"
        "(A) 3, (B) 4, (C) 5, (D) 6.0"
    )
    assert (example.answer, example.id) == ("B", "mmlu_stem/7")
    row = {"id": "0", "question": "x?", "options": "A. $a)$ B. b, A) C. c D. d"}
    example = parsers.sat({**row, "Answer": "D"})
    assert example.columns["options"] == ["$a)$", "b, A)", "c", "d"]
    assert example.question.endswith("\n(A) $a)$ (B) b, A) (C) c (D) d")
    row = {"question": "则 $a=(\\quad)$\\\\\n", "options": ["(A)$-1$", "(B)1"]}
    example = parsers.gaokao_mathqa({**row, "label": "A B", "other": {"source": "卷"}})
    assert example.question == "则 $a=(\\quad)$\n从以下选项中选择：\n(A) $-1$ (B) 1"
    assert (example.answer, example.language) == ("AB", "zh")


def test_rows_that_name_no_option_are_refused(tmp_path):
    source = registry.find_source("sat", "test")
    file = tmp_path / "sat.jsonl"
    file.write_text('{"id": "0", "question": "x?", "options": "A) 1 B) 2 D) 3"}\n')
    with pytest.raises(GrpoError, match=r"sat.jsonl:1: row 0 .* no option C"):
        list(registry.read_examples(source, file))
    with pytest.raises(ValueError, match="'E' is none of the options ABCD"):
        row = {"question": "?", "options": list("wxyz"), "topic": "t", "id": 1}
        parsers.mmlu({**row, "answer": "E"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r"Thus \boxed{C}.", "C"),
        (r"Thus \boxed{\text{(C)}}.", "C"),
        (r"Thus $\boxed{\mathbf{C)}\ 12}$.", "C"),
        ("The answer is C.", "C"),
        ("The final answer is (C).", "C"),
        ("The answer is therefore (C), not less.", "C"),
        (r"\boxed{P(C)}", "P(C)"),
        ("(A) is too small. The answer is **C: 0.5**", "C"),
        ("A dog runs. 故选：C。", "C"),
        ("所以答案是 C。", "C"),
        ("选项 C 正确", "C"),
        ("Option B fails, so choose option C", "C"),
        ("I pick (C)", "C"),
        ("C", "C"),
        (r"\boxed{A, C and D}", "ACD"),
        (r"\boxed{0.5}", "0.5"),  # a value, to be compared with the options
        ("A dog has 4 legs, B has 2", None),
        ("so x = 0.5", None),  # the last number is no choice
        ("", None),
    ],
)
def test_which_option_a_completion_chooses(text, said):
    assert kinds.extract_prediction(text, FOUR) == said


def test_options_are_right_by_letter_or_by_value():
    said = ["C", "B", "0.5", r"2\sqrt{2}", "7", None, "AC", r"\tfrac12"]
    right = [True, False, True, False, False, False, False, True]
    assert kinds.grade_examples([FOUR] * len(said), said) == right
    twice = Example("?", "A", columns={"options": ["1/2", "0.5", "3", "4"]})
    assert kinds.grade_examples([twice], ["50\\%"]) == [False]  # which of the two?
    several = Example("?", "ACD", columns={"options": list("wxyz")})
    assert kinds.grade_examples([several] * 3, ["ACD", "AC", "ABCD"]) == [
        True,
        False,
        False,
    ]


def test_a_users_columns_may_be_called_so_too():
    """Names that mean something else there change nothing."""
    columns = {"options": ["3", "4"], "blanks": "two", "tolerance": "low"}
    example = Example("2+2?", "4", columns=columns)
    assert kinds.extract_prediction("It is 4.", example) == "4"
    assert kinds.grade_examples([example] * 2, ["4", "B"]) == [True, False]


def test_blanks_are_answered_in_their_order():
    two = Example("?", r"1; \frac{8}{9}", columns={"blanks": 2})
    texts = {
        r"\boxed{1} and \boxed{8/9}": True,
        r"\boxed{1, \frac89}": True,
        r"\boxed{1;\ 8/9}": True,
        r"First 3. 答案是 $1$，$\frac{8}{9}$。": True,
        r"\boxed{8/9} and \boxed{1}": False,
        r"\boxed{1}": False,
        r"\boxed{5}, \boxed{1}, \boxed{8/9}": True,  # the last two
        "nothing": False,
    }
    found = [kinds.extract_prediction(text, two) for text in texts]
    assert kinds.grade_examples([two] * len(texts), found) == list(texts.values())
    pairs = Example("?", r"(3,0); \sqrt{3}", columns={"blanks": 2})
    said = kinds.extract_prediction(r"\boxed{(3, 0), \sqrt 3}", pairs)
    assert kinds.grade_examples([pairs], [said]) == [True]


def test_rounded_numbers_and_units():
    """OCW to a relative 1e-5; computed decimals to 0.001 and to 1 % of them."""
    ocw = Example("?", "4.5e33", columns={"tolerance": [None, 1e-5]})
    said = [r"4.5 \times 10^{33} \text{ erg/s}", "4.50001e33", "4.5001e33", "4.5"]
    assert kinds.grade_examples([ocw] * 4, said) == [True, True, False, False]
    near = Example("?", "6.3333333333", columns={"tolerance": [1e-3, 1e-2]})
    assert kinds.grade_examples([near] * 3, ["19/3", "6.333", "6.33"]) == [
        True,
        True,
        False,
    ]
    tiny = Example("?", "0.000002", columns={"tolerance": [1e-3, 1e-2]})
    assert kinds.grade_examples([tiny] * 2, ["0", "2e-6"]) == [False, True]
    formula = parsers.ocw(
        {"id": 1, "problem": "?", "solution": "…", "answer": "x / 2-1 / 4+c e^{-2 x}"}
    )
    said = [r"\frac{x}{2}-\frac{1}{4}+c e^{-2x}", r"\frac{x}{2}+c e^{-2x}"]
    assert kinds.grade_examples([formula] * 2, said) == [True, False]
    assert parsers.ocw(
        {"id": 1, "problem": "?", "solution": "…", "answer": "-1./3"}
    ).answer == ("-1/3")


@real
@pytest.mark.parametrize(
    "name", "gsm_hard gaokao_mathcloze gaokao_mathqa ocw sat mmlu_stem".split()
)
def test_every_gold_answer_is_right_and_its_neighbours_is_not(name):
    examples = datasets.load_dataset(name, "test")[:400]
    texts = [f"Steps with 3. So it is \\boxed{{{e.answer}}}." for e in examples]
    said = [
        kinds.extract_prediction(t, e) for t, e in zip(texts, examples, strict=True)
    ]
    assert all(kinds.grade_examples(examples, said))
    moved = [*examples[1:], examples[0]]
    said = [kinds.extract_prediction(t, e) for t, e in zip(texts, moved, strict=True)]
    same = [a.answer == b.answer for a, b in zip(examples, moved, strict=True)]
    assert kinds.grade_examples(moved, said) == same


# -- DeepSeekMath's rule ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "passes"),
    [
        ("50", "0.5", True),  # ×100
        ("0.18", "18", True),  # /100
        ("0.005", "50", False),
        ("[1,2)", "(1,2]", True),
        ("(1,3)", "(1,2)", False),
        ("1.4142", r"\sqrt{2}", True),  # within 0.001
        ("1.41", r"\sqrt{2}", False),
        ("5, 3, 4", "4, 3", True),  # of a longer list the end
        ("4, 5", "4, 3", False),
        ("x=5", "5", True),
        ("7 cm", r"7 \text{ kg}", True),
        (MATRIX.format("p", "2.0001"), MATRIX.format("b", "2"), True),
        ("(2,3)\\cup(0,1)", "(0,1) \\cup (2,3]", True),
        ("1,234", "1234", True),
        ("6", "5", False),
        ("x^2", "x^3", False),
        ("", "0", False),
    ],
)  # fmt: skip
def test_the_papers_lenient_rule(prediction, reference, passes):
    assert worker_pool.grade_answers([prediction], [reference], "paper") == [passes]


def test_the_lenient_rule_passes_all_that_the_strict_one_passes(data_dir):
    import json

    lines = (data_dir / "grading_cases.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    pairs = [c["prediction"] for c in cases], [c["reference"] for c in cases]
    strict, lenient = (
        worker_pool.grade_answers(*pairs),
        worker_pool.grade_answers(*pairs, "paper"),
    )
    assert not any(s and not p for s, p in zip(strict, lenient, strict=True))
    wrong = [c for c, p in zip(cases, lenient, strict=True) if p and not c["equal"]]
    assert len(wrong) > 20  # what it is too lenient about


# -- few-shot --------------------------------------------------------------------------


@pytest.mark.parametrize("source", few_shot_prompts.written_examples())
def test_our_worked_examples_are_extracted_as_they_say(source):
    """What a base model is shown is what is understood of it afterwards."""
    (form,) = {f for f in few_shot_prompts.FORMATS.values() if f.source == source}
    written = few_shot_prompts.written_examples()[source]
    assert len(written) == form.shots
    for shot in written:
        question, worked, answer = shot["question"], shot["solution"], shot["answer"]
        columns = {}
        if "(D)" in question:
            columns = {"options": ["w", "x", "y", "z"]}
            answer = answer.strip()
        elif source == "cloze":
            columns = {"blanks": answer.count(";") + 1}
        example = Example(question, answer, columns=columns)
        text = f"{worked} {form.ends.format(answer)}"
        assert kinds.grade_examples(
            [example], [kinds.extract_prediction(text, example)]
        ) == [True], text
        assert form.stop not in f"{question}\n{worked}"


def test_every_set_has_a_few_shot_form():
    assert {name for name, _ in registry.SOURCES} == set(few_shot_prompts.FORMATS)
    with pytest.raises(GrpoError, match="set 'mine.jsonl': no few-shot prompt"):
        few_shot_prompts.find_format("mine.jsonl")


@real
@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_drawn_examples_are_the_training_files(name):
    train = {e.question for e in datasets.load_dataset(name, "train")}
    test = datasets.load_dataset(name, "test")[0]
    shown = few_shot_prompts.add_few_shot_prompt(name, test)
    form = few_shot_prompts.find_format(name)
    blocks = shown.question.split(f"\n\n{form.question} ")
    assert len(blocks) == form.shots + 1 and test.question in blocks[-1]
    assert blocks[-1].endswith(form.answer)
    for block in blocks[:-1]:
        question, _, worked = block.partition(f"\n{form.answer} ")
        assert question.removeprefix(f"{form.question} ") in train
        assert kinds.extract_prediction(worked, test)
    assert few_shot_prompts.add_few_shot_prompt(name, test).question == shown.question


def test_a_base_models_next_question_is_cut_off():
    form = few_shot_prompts.find_format("cmath")
    assert few_shot_prompts.cut_at_next_question(
        "3+2=5。所以答案是 5。\n\n问题：6+1？\n答案：7", form
    ).endswith("。\n")
    letters = Tokenizer.from_alphabet("1.\nQ:问题：")
    assert letters.decode(few_shot_prompts.stop_ids(letters, form)[0]) == "问题："


def test_domains():
    where = {n: registry.is_in_domain(n) for n, _ in registry.SOURCES}
    assert {n for n, known in where.items() if known} == {"gsm8k", "math", "math500"}
    assert not registry.is_in_domain("math", ["gsm8k"])
    assert registry.is_in_domain("sums/chain", ["sums/chain"])
