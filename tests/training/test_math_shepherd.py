"""Step labels: by hand on a scripted policy, and from the real sampler."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError
from grpo_jax.generation.sampler import generate
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.training.reward_model.labels import (
    LabelledSequence,
    encode_solution,
    mix_with_history,
    read_labels,
    read_math_shepherd,
    write_labels,
)
from grpo_jax.training.reward_model.math_shepherd import (
    Sampler,
    grade_by_rule,
    label_outputs,
    label_questions,
)

TOKENIZER = Tokenizer.from_alphabet("0123456789+-=?# \n")
LETTERS = Tokenizer.from_alphabet("ab\n")  # line breaks come often
MODEL = Decoder(
    ModelConfig(
        vocab_size=LETTERS.vocab_size,
        width=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=8,
        ffn=32,
    )
)
PARAMS = MODEL.init(jax.random.key(0))


def ids(text, eos=True):
    return TOKENIZER.encode(text) + [TOKENIZER.eos_id] * eos


# What the policy does from the end of each prefix, K = 4 times.
SCRIPT = {
    "1+2+3=?1+2=3\n": ["3+3=6\n#### 6", "3+3=7\n#### 7", "#### 6", "3+3=6\n#### 5"],
    "1+2+3=?1+2=3\n3+3=7\n": ["#### 7", "#### 7", "#### 7", "#### 6"],
    "1+1=?1+1=3\n": ["#### 3", "#### 3", "#### 1", "#### 4"],
}
QUESTIONS = [Example("1+2+3=?", "6", id="a"), Example("1+1=?", "2", id="b")]
OUTPUTS = [
    (QUESTIONS[0], ids("1+2+3=?", False), ids("1+2=3\n3+3=7\n#### 7")),
    (QUESTIONS[1], ids("1+1=?", False), ids("1+1=3\n#### 2")),
    (QUESTIONS[1], ids("1+1=?", False), ids("#### 2")),  # one step: nothing to sample
]


def scripted(prefixes, samples, key):
    assert samples == 4
    return [[ids(t) for t in SCRIPT[TOKENIZER.decode(p)]] for p in prefixes]


@pytest.mark.parametrize(
    ("soft", "labels"),
    [
        (False, [(1, 1, 0), (0, 1), (1,)]),
        (True, [(2 / 4, 1 / 4, 0), (0, 1), (1,)]),
    ],
)
def test_labels_by_hand(soft, labels):
    """A prefix is worth what follows from it; the last step, what the output is."""
    found = label_outputs(
        scripted,
        TOKENIZER,
        OUTPUTS,
        max_new_tokens=40,
        key=jax.random.key(0),
        completions=4,
        soft=soft,
    )
    assert [item.labels for item in found] == labels
    first = found[0]
    assert first.id == "a" and first.prompt == 7
    assert first.tokens == tuple(OUTPUTS[0][1] + OUTPUTS[0][2])
    ends = [TOKENIZER.decode(first.tokens[7 : end + 1]) for end in first.ends]
    assert ends == ["1+2=3\n", "1+2=3\n3+3=7\n", "1+2=3\n3+3=7\n#### 7"]


def test_what_the_policy_could_not_have_written_is_cut_off():
    """Completions end where whole outputs do: at max_new_tokens."""
    longest = len("1+2=3\n3+3=6\n#### ")  # the answer no longer fits
    options = dict(key=jax.random.key(0), completions=4, soft=True)
    found = label_outputs(
        scripted, TOKENIZER, OUTPUTS[:1], max_new_tokens=longest, **options
    )
    assert found[0].labels[0] == 1 / 4  # "#### 6" straight away


def test_equal_outputs_are_graded_once_and_alike():
    texts = ["#### 6", "#### 7", "#### 6", "#### 6"]
    examples = [QUESTIONS[0]] * 3 + [QUESTIONS[1]]
    assert grade_by_rule(examples, texts) == [1.0, 0.0, 1.0, 0.0]


def test_the_sampler_gives_each_prompt_its_own_continuations():
    """Sorted, chunked and padded inside; greedy, so that each can be checked alone."""
    sample = Sampler(MODEL, PARAMS, LETTERS, 5, temperature=0.0, batch=6)
    rng = random.Random(0)
    lengths = [20, 1, 17, 3, 3, 9, 2]
    prompts = [[rng.randint(3, 5) for _ in range(n)] for n in lengths]
    found = sample(prompts, 2, jax.random.key(0))
    expected = generate(
        MODEL,
        PARAMS,
        prompts,
        key=jax.random.key(0),
        max_new_tokens=5,
        temperature=0.0,
        eos_id=LETTERS.eos_ids,
    )
    expected = jax.device_get(expected)
    rows = zip(expected.tokens, expected.lengths, strict=True)
    rows = [tokens[:n].tolist() for tokens, n in rows]
    assert len(set(map(tuple, rows))) > 2
    assert found == [[row, row] for row in rows]


def test_labels_of_the_real_sampler():
    """Outputs with a label a step; the same again from the same key."""
    sample = Sampler(MODEL, PARAMS, LETTERS, 10, batch=32)
    questions = [Example(text, "", id=text) for text in ("ab", "bb")]
    prompts = [(e, LETTERS.encode(e.question)) for e in questions] * 4

    def even(examples, texts):  # an answer of even length is right
        return [float(len(text) % 2 == 0) for text in texts]

    options = dict(outputs=2, completions=4, soft=True, grade=even)
    found = label_questions(sample, prompts, key=jax.random.key(1), **options)
    assert len(found) == 2 * len(prompts)
    for item, i in zip(found, range(len(found)), strict=True):
        example, prompt = prompts[i // 2]
        assert item.id == example.id and list(item.tokens[: item.prompt]) == prompt
        text = LETTERS.decode(item.tokens[item.prompt :])
        assert item.labels[-1] == float(len(text) % 2 == 0)
        assert item.ends[-1] == len(item.tokens) - 1
    middle = [label for item in found for label in item.labels[:-1]]
    assert middle and {label * 4 % 1 for label in middle} == {0}
    assert 0.2 < np.mean(middle) < 0.8 and len(set(middle)) > 2
    assert label_questions(sample, prompts, key=jax.random.key(1), **options) == found
    assert label_questions(sample, prompts, key=jax.random.key(2), **options) != found


ITEM = LabelledSequence(
    tokens=(5, 6, 7, 8), prompt=2, ends=(2, 3), labels=(0.25, 1.0), id="é"
)


def test_json_lines_round_trip(tmp_path):
    items = [ITEM, dataclasses.replace(ITEM, labels=(1 / 3, 0.0), id="")]
    write_labels(tmp_path / "labels.jsonl", items)
    assert read_labels(tmp_path / "labels.jsonl", vocab_size=9) == items
    with pytest.raises(GrpoError, match=r"labels.jsonl:1: token 8 is not one"):
        read_labels(tmp_path / "labels.jsonl", vocab_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": [3, 2]}, "do not rise"),
        ({"ends": [2, 4]}, "to below 4 tokens"),
        ({"ends": [1, 3]}, "from the prompt's end 2"),
        ({"labels": [1.0]}, "2 step ends and 1 labels"),
        ({"labels": [0.5, 1.5]}, r"not all in \[0, 1\]"),
        ({"labels": None}, "field 'labels' does not hold int or float"),
    ],
)
def test_a_damaged_line_is_refused_with_its_number(tmp_path, change, message):
    file = tmp_path / "labels.jsonl"
    rows = [dataclasses.asdict(ITEM), dataclasses.asdict(ITEM) | change]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(GrpoError, match=f"labels.jsonl:2: .*{message}"):
        read_labels(file)
    file.write_text('{"tokens": [1]')
    with pytest.raises(GrpoError, match=r"labels.jsonl:1: not valid JSON"):
        read_labels(file)


def test_an_outcome_is_the_last_label():
    outcome = ITEM.outcome()
    assert (outcome.ends, outcome.labels) == ((3,), (1.0,))
    assert outcome.tokens == ITEM.tokens


def test_replay_adds_a_tenth_of_the_history():
    history = [dataclasses.replace(ITEM, id=str(i)) for i in range(40)]
    new = [dataclasses.replace(ITEM, id="new")] * 3
    mixed = mix_with_history(new, history, seed=0, iteration=1)
    assert mixed[:3] == new and len(mixed) == 3 + 4
    assert len({item.id for item in mixed[3:]}) == 4  # without replacement
    assert mixed == mix_with_history(new, history, seed=0, iteration=1)
    assert mixed != mix_with_history(new, history, seed=0, iteration=2)
    assert mixed != mix_with_history(new, history, seed=1, iteration=1)
    assert mix_with_history(new, [], seed=0, iteration=0) == new


def test_math_shepherds_own_format(tmp_path):
    row = {
        "input": "Q? Step 1: a+b=2 ки\nStep 2: 1-2 The answer is: 3 ки",
        "label": "Q? Step 1: a+b=2 +\nStep 2: 1-2 The answer is: 3 -",
        "task": "GSM8K",
    }
    file = tmp_path / "shepherd.jsonl"
    file.write_text(json.dumps(row))
    (solution,) = read_math_shepherd(file)
    assert solution.question == "Q?" and solution.labels == (1.0, 0.0)
    assert solution.steps == ("Step 1: a+b=2", "Step 2: 1-2 The answer is: 3")
    item = encode_solution(lambda text: [ord(c) for c in text], solution)
    assert [chr(item.tokens[end]) for end in item.ends] == ["\n", "\n"]
    assert item.prompt == len("Q?\n") and item.labels == (1.0, 0.0)
    for broken in (
        row | {"label": row["label"].replace("a+b", "a-b")},
        row | {"label": row["label"][:-1]},
        row | {"input": row["input"] + " more"},
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(GrpoError, match="shepherd.jsonl:1: `"):
            read_math_shepherd(file)


def test_math_shepherds_published_samples(data_dir):
    solutions = read_math_shepherd(data_dir / "prm/samples_math-shepherd.jsonl")
    assert [len(s.steps) for s in solutions] == [5, 3, 2, 5, 5, 2, 3]
    assert solutions[0].labels == (1, 1, 1, 1, 0)
    assert solutions[0].question.endswith("clarinet lessons in a year?")
    assert all("ки" not in step for s in solutions for step in s.steps)
