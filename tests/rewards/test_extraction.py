"""What a completion states: answer lines, thoughts, languages, hostile length."""

import time

import pytest

from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.rewards import answers, reward_functions
from grpo_jax.rewards.grading import extraction, kinds, worker_pool

STATED = [
    # answer lines
    ("6+6, so\n**Answer:** 12 (see step 3)", "12"),
    ("**Answer**: 12", "12"),
    ("**Final Answer:** $12$ apples, by step 3", "12"),
    ("### Answer\n12\n\n(See step 3.)", "12"),
    ("**Answer**\n\n12", "12"),
    ("Answer = 12; 3 steps", "12; 3 steps"),
    ("Ans: 12", "12"),
    ("ANSWER: 12", "12"),
    ("The correct answer is 12. I used 3 steps.", "12"),
    ("My answer is 12. Check: 3.", "12"),
    ("The answer should be 12, as shown in step 3.", "12"),
    ("Thus the answer must be 12.", "12"),
    ("The answer to question 3 is 12.", "12"),
    ("The answer to the problem is: $12$. (3 steps)", "12"),
    ("The answer (in cm) is 12.", "12"),
    ("**The answer is 12** because 3 + 9 = 12.", "12"),
    ("The answer is **12**, since 3 + 9 = 12.", "12"),
    ("The answer is 12, which is 3 more than 9.", "12"),
    ("The answer equals 12.", "12"),
    ("The answer is therefore 12.", "12"),
    ("The answer is\n\n$$12$$\n\nin 3 steps.", "12"),
    ("The answer is \\(12\\).", "12"),
    ("答案：12（见第3步）", "12"),
    ("正确答案是12。共3步。", "12"),
    ("所以答案应该是12。", "12"),
    ("最终答案为：$12$。", "12"),
    ("**答：** 12（第3步）", "12"),
    ("答えは12です。3歩。", "12です"),
    ("The answers are 3 and 4.", "3 and 4"),
    ("The answer is $x=3$ and $y=4$.", "x=3 and y=4"),
    ("The answer is a 5% increase.", "5% increase"),
    ("答案是0.75（即3/4）。", "0.75"),
    # what announces none
    ("Antwort: Sie verdient 18 Dollar.", "18"),
    ("Answer: First we add 3 and 4, which gives us a total of 7.\nSo 7.", "7"),
    ("Let me answer: we add the 3 boxes to the 4 others, to find 7 boxes.", "7"),
    ("The answer is 12. Check with 3: this answer is correct.", "12"),
    ("The answer is 12. So the answer is right.", "12"),
    ("The answer is not 5. The sum is 12.", "12"),
    ("The answer is found by adding. We get 12.", "12"),
    ("回答：我们先算3个苹果和9个梨一共有多少个水果然后再相加得12", "12"),
    # the last number
    ("Thus the probability is 3/4.", "3/4"),
    ("so 3/4 of 8 is 6.", "6"),
    ("The odds are 3/4, roughly.", "3/4"),
    ("It is 0.75.", "0.75"),
    ("It is 0.333... .", "0.333..."),
    ("The answer is 0.333... .", "0.333..."),
    ("so \\boxed{0.333\\ldots}", "0.333\\ldots"),
    ("First 3 ... then 4 ...", "4"),
    ("To convert the answer to weeks: 28 days / 7 = 4 weeks\n#### 4", "4"),
    ("She got 1 1/2.", "1 1/2"),
    ("It comes to 11/2.", "11/2"),
    ("The ratio is 2:3.", "2:3"),
    ("It starts at 4:30.", "4:30"),
    ("so we get 10^5.", "10^5"),
    ("a mass of 1.2 \\times 10^{5} kg", "1.2 \\times 10^{5}"),
    ("about 3e-5.", "3e-5"),
    ("The area is 12 m^2.", "12"),
    ("The area is 12 cm².", "12"),
    ("We get \\frac{3}{4}.", "\\frac{3}{4}"),
    ("We get $\\frac34$.", "\\frac34"),
    ("We get $-2\\frac{3}{4}$.", "-2\\frac{3}{4}"),
    ("Thus the length is $2\\sqrt{3}$.", "2\\sqrt{3}"),
    ("Thus \\(x = 2\\pi\\).", "2\\pi"),
    ("so $x^2 - 3\\cdot2 = 10 - 6 = {4}$, and we are done.", "4"),
    ("hence $3C = 42 \\rightarrow C = 14.$", "14"),
    ("He has $3 + 4 = 7$.", "7"),
    ("It costs $5 and she has $12 left.", "12"),
    ("Thus $x_1 = 5$.", "5"),
    ("It is $12\\,\\text{cm}$.", "12"),
    ("所以占百分之20。", "百分之20"),
    ("概率为3/4。", "3/4"),
    ("It falls to -5.", "-5"),
    ("In version v2 it is 7, as H2O.", "7"),
    # the text of an end token
    ("#### 5<|EOT|>", "5"),
    ("#### 5</s>", "5"),
    ("#### 5<|im_end|>\n<|endoftext|>", "5"),
    ("#### 5<｜end▁of▁sentence｜>", "5"),
    ("so it is 5<|eot_id|>", "5"),
    ("The answer is 5<end_of_turn>", "5"),
    ("The answer is 5.<|EOT|>User: what is 6?", "5"),
    ("so $x<5$ and 3|x|>2", "2"),  # none is there
    # thoughts
    ("<think>\\boxed{1}</think>\nIt is \\boxed{2}.", "2"),
    ("\\boxed{1}</think>\nThe answer is 2.", "2"),
    ("<think>\\boxed{1}</think>\nSo it is 2.", "2"),
    ("<think>\\boxed{1}</think>\n", None),
    ("<think>First \\boxed{1}, and then", None),  # cut off before it answered
    ("<thinking>\\boxed{1}</thinking> The answer is 2.", "2"),
    ("<think>The answer is 1.</think>\n\n#### 2", "2"),
    ("<think>a</think> \\boxed{1} <think>b \\boxed{3}</think> \\boxed{2}", "2"),
    ("<think>3</think><answer>2</answer>", "2"),
    ("<answer> x < 2 </answer>", "x < 2"),
    ("İİİİ <answer>12</answer>", "12"),  # İ has two characters in lower case
    ("<answer>So we have \\boxed{2}.</answer> 3 steps", "2"),
    ("<answer>It is 12 since 3 + 9 is.\nThe answer is 12.</answer> 3", "12"),
    # boxes
    ("\\boxed{x = \\boxed{3}}", "x = \\boxed{3}"),
    ("\\boxed{x = \\boxed{3}", "3"),  # the outer one is cut off
    ("\\boxed{1}, \\fbox{2}", "2"),
    # other languages
    ("Die Antwort ist 1.234.", "1234"),
    ("Die Antwort lautet: 1.234 Euro.", "1234 Euro"),
    ("Die Antwort ist also 3,5.", "3.5"),
    ("Antwort: 1.234.567,5", "1234567.5"),
    ("La réponse est 1 234.", "1234"),
    ("La réponse est 1\u202f234.", "1234"),
    ("La bonne réponse est 12,5.", "12.5"),
    ("Réponse : 12", "12"),
    ("La respuesta es 1.234.", "1234"),
    ("La respuesta correcta es: 1,234.", "1234"),
    ("The answer is 1.234.", "1.234"),
]


@pytest.mark.parametrize("text, expected", STATED)
def test_the_stated_answer(text, expected):
    assert answers.extract(text) == expected


@pytest.mark.parametrize(
    "language, text, expected",
    [
        ("de", "#### 1.234", "1234"),
        ("de", "Das sind \\boxed{1.234}.", "1234"),
        ("de", "Zusammen 1.234 Eier.", "1234"),
        ("de", "Zusammen 12,5.", "12.5"),
        ("de", "Insgesamt 1.234,56 €", "1234.56"),
        ("de", "\\boxed{0.125}", "0.125"),  # no group of thousands
        ("de", "\\boxed{12.34}", "12.34"),
        ("de", "\\boxed{(1,2)}", "(1,2)"),
        ("fr", "Il y a 1 234 œufs.", "1234"),
        ("fr", "soit 12 345,6 €", "12345.6"),
        ("es", "En total 12.345.678", "12345678"),
        ("es-MX", "En total 1,234", "1234"),
        ("en", "\\boxed{1.234}", "1.234"),
        ("en", "in all 1,234.5", "1,234.5"),
        ("zh", "一共1.234", "1.234"),
    ],
)
def test_numbers_as_the_language_of_the_question_writes_them(language, text, expected):
    assert answers.extract(text, language) == expected
    example = Example("?", "1", language=language)
    assert kinds.extract_prediction(text, example) == expected


def test_a_reward_reads_numbers_in_the_language_of_each_question():
    said = ["Es sind 1.234 Eier.", "There are 1.234 eggs."]
    reference = {"answer": ["1234"] * 2, "language": ["de", "en"]}
    assert reward_functions.rule_reward(["?"] * 2, said, **reference) == [1.0, 0.0]


FOUR = Example("?", "C", columns={"options": ["3", "1/4", "1/2", "8"]})


@pytest.mark.parametrize(
    "text, said",
    [
        ("The correct answer is C.", "C"),
        ("Hence C is correct.", "C"),
        ("**Answer:** C (see step A)", "C"),
        ("Hence (C) is the correct option.", "C"),
        ("A is incorrect and B is wrong. C is right. D is not correct.", "C"),
        ("C is correct. Option D is wrong.", "C"),
        ("C is the correct answer; A is too small.", "C"),
        ("Therefore, C.", "C"),
        ("So the correct choice is C.", "C"),
        ("I choose C. A was close.", "C"),
        ("The answer is option C", "C"),
        ("The answer is choice (C), not (A).", "C"),
        ("因此选 C。", "C"),
        ("就选C，不是A", "C"),
        ("正确答案是C。", "C"),
        ("C正确，A错误。", "C"),
        ("选项C是正确的，选项D错误。", "C"),
        ("C项正确", "C"),
        ("A and C are correct.", "AC"),
        ("<think>The answer is A. Hence B is correct.</think> C is correct.", "C"),
        ("A is not correct.", None),
        ("选项A不正确", None),
        ("Is A correct? A dog is.", None),
        ("<think>Hence A is correct.", None),
    ],
)
def test_the_option_that_is_called_right(text, said):
    assert kinds.extract_prediction(text, FOUR) == said


def test_a_box_in_the_thoughts_is_no_box():
    format_ = reward_functions.format_reward
    said = [r"<think>\boxed{1}</think> \boxed{2}", r"<think>\boxed{1}</think> 2"]
    assert format_(["?"] * 2, said) == [1.0, 0.0]
    two = Example("?", "1; 2", columns={"blanks": 2})
    assert (
        kinds.extract_prediction(r"<think>\boxed{3; 4}</think> \boxed{1; 2}", two)
        == "1; 2"
    )
    boxes = r"<think>\boxed{3} \boxed{4}</think> \boxed{1}"
    assert kinds.extract_prediction(boxes, Example("?", "1"), "paper") == "1"


def test_the_end_token_is_no_text_where_it_is_not_flagged_special():
    tokenizer = Tokenizer.from_alphabet("#5 <|EOT>")
    ids = tokenizer.encode("#### 5<|EOT|>")
    tokenizer.eos_ids = (ids[-1], tokenizer.eos_id)  # as a config.json may name it
    assert tokenizer.decode(ids) == "#### 5<|EOT|"
    assert tokenizer.decode([*ids, *ids[-1:]]) == "#### 5<|EOT|"
    assert tokenizer.decode(ids, skip_special=False) == "#### 5<|EOT|>"
    assert tokenizer.decode([ids[-1], ids[5]]) == ">5"  # in the middle it is text


N = 300_000
LONG = {
    "nested boxes": r"\boxed{" * (N // 8) + "1" + "}" * (N // 8),
    "open boxes": r"\boxed{" * (N // 7),
    "braces in a box": r"\boxed{" + "{" * N,
    "a full box": r"\boxed{" + "." * N + "a}",
    "announcements": "the answer is " * (N // 14),
    "answers to": "answer to " * (N // 10),
    "spaces": "the answer is" + " " * N + "x",
    "colons": "the answer is " + ":" * N,
    "remarks": "The answer is 5 " + "(a b) " * (N // 6),
    "hopes": "final answer is $" * (N // 17),
    "hashes": "#" * N,
    "empty hashes": "#### \n" * (N // 6),
    "notes": "<<" * (N // 2) + ">>",
    "outputs": "```output\n" * (N // 10),
    "tokens": "<|a" * (N // 3),
    "tags": "<answer>" * (N // 8),
    "ends of thoughts": "</think>" * (N // 8),
    "digits": "1" * N,
    "groups": "1,111," * (N // 6),
    "signs": "-" * N + "1",
    "fractions": r"\frac{1}{" * (N // 9),
    "dollars": "$1" * (N // 2),
    "no digit at its end": "1" + "a" * N,
    "lines": "\n" * N,
    "答案": "答案是" * (N // 3),
    "Antwort": "Antwort " * (N // 8),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_takes_linear_time(name):
    """A twentieth of a second, alone; here at the best of three tries."""
    seconds = []
    for language in ("en", "de", "en"):
        began = time.process_time()
        answers.extract(LONG[name], language)
        extraction.last_number(LONG[name], language)
        seconds.append(time.process_time() - began)
        if seconds[-1] < 0.25:
            break
    assert min(seconds) < 0.25


def test_the_answer_of_every_row_of_the_table_is_right():
    """From a completion to its grade, as a reward sees it."""
    rows = [
        ("Thus the probability is 3/4.", "3/4"),
        ("**Answer:** 12 (see step 3)", "12"),
        ("#### 5<|EOT|>", "5"),
        ("Die Antwort ist 1.234.", "1234"),
        ("La réponse est 1 234.", "1234"),
        ("Die Antwort ist also 1.234 Eier.", "1234"),
        ("答：一共需要12元。", "12"),
        ("答えは1,234円です。", "1234"),
    ]
    said = [answers.extract(text) for text, _ in rows]
    assert worker_pool.grade_answers(said, [right for _, right in rows]) == [
        True
    ] * len(rows)
