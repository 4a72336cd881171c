"""Where steps end: on characters, on merged line breaks, on a real tokenizer."""

import pathlib

import pytest
import tokenizers

from grpo_jax.data import chain_sums
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.training.reward_model.solution_steps import step_ends

CHARACTERS = Tokenizer.from_alphabet(chain_sums.ALPHABET)
SMOLLM2 = pathlib.Path(__file__).parents[2] / "models/smollm2-135m-instruct"


def split(tokenizer, tokens):
    """The texts between step ends."""
    ends = step_ends(tokenizer, tokens)
    starts = [0, *(end + 1 for end in ends)]
    assert ends == sorted(set(ends)) and ends[-1] == len(tokens) - 1
    pairs = zip(starts, ends, strict=False)
    return [tokenizer.decode(tokens[a : b + 1]) for a, b in pairs]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("12+7=19\n19-5=14\n#### 14", ["12+7=19\n", "19-5=14\n", "#### 14"]),
        ("1+1=2", ["1+1=2"]),
        ("1\n\n\n2", ["1\n", "\n\n2"]),  # empty lines go with what follows them
        ("\n 1\n2", ["\n 1\n", "2"]),
        ("1\n2\n", ["1\n", "2\n"]),
        ("1\n2\n\n \n", ["1\n", "2\n\n \n"]),  # … and at the end with what was before
        ("\n\n", ["\n\n"]),
    ],
)
@pytest.mark.parametrize("eos", [True, False])
def test_lines_are_steps(text, steps, eos):
    tokens = CHARACTERS.encode(text) + [CHARACTERS.eos_id] * eos
    assert split(CHARACTERS, tokens) == steps


def test_eos_alone_is_one_step_and_nothing_is_none():
    assert step_ends(CHARACTERS, [CHARACTERS.eos_id]) == [0]
    assert step_ends(CHARACTERS, []) == []


def test_a_worked_solution_has_the_steps_that_it_was_made_of():
    tokens = [
        *CHARACTERS.encode(chain_sums.write_solution((12, 7, -5, 3))),
        CHARACTERS.eos_id,
    ]
    assert len(split(CHARACTERS, tokens)) == 4


def test_a_line_break_may_be_anywhere_in_a_token():
    texts = ["<eos>", "a", ".\n", "\n\n", "\nb", "}\n\n{", " ", "\n", "a\nb"]
    vocabulary = {text: i for i, text in enumerate(texts)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    inner.decoder = tokenizers.decoders.Fuse()
    inner.add_special_tokens(["<eos>"])
    tokenizer = Tokenizer(inner, special={"eos_token": "<eos>"}, eos_ids=[0])

    def ends(*tokens):
        return step_ends(tokenizer, [vocabulary[t] for t in tokens])

    assert ends("a", ".\n", "a", "<eos>") == [1, 3]
    assert ends(".\n", "a") == [0, 1]  # the full stop is visible text
    assert ends("a", "\n\n", "a") == [1, 2]
    assert ends("a", "\nb", "\n", "a") == [1, 2, 3]  # b opens the next step
    assert ends("\nb", "\nb") == [1]  # the first break ends nothing
    assert ends("}\n\n{", "\n", "\n", "<eos>") == [0, 3]
    assert ends(" ", "\n", "a", "\n") == [3]
    assert ends("a\nb", "\n\n", "<eos>") == [0, 2]


@pytest.mark.parametrize("eos", [True, False])
def test_smollm2(eos):
    if not SMOLLM2.is_dir():
        pytest.skip(f"{SMOLLM2} is not there (make smollm2)")
    tokenizer = Tokenizer.from_folder(SMOLLM2)
    text = "First, 2 + 3 = 5.\n\nThen:\n- 5 × 4 = 20\n\n\n那么\\(x\\)\n    \\boxed{20}."
    tokens = tokenizer.encode(text)
    texts = [tokenizer.decode([token]) for token in tokens]
    assert "\n\n" in texts and "\n" in texts and "\n   " in texts
    steps = split(tokenizer, tokens + [tokenizer.eos_id] * eos)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    assert [step.strip() for step in steps] == lines
