"""Rows hold every sample once, whole, and hardly anything else."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.errors import GrpoError
from grpo_jax.training.batch import Sample
from grpo_jax.training.packing import PROMPT, fitting_length, pack, unpack
from grpo_jax.training.row_placement import place_in_rows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 100))
@settings(max_examples=50, deadline=None)
def test_every_sample_is_placed_once_and_no_row_overfilled(lengths, size):
    samples = [Sample(tokens=[0] * (n + 1), mask=[1] * (n + 1)) for n in lengths]
    rows = [[i for group in row for i in group] for row in place_in_rows(samples, size)]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= size for row in rows)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_shared_prompt_stands_once_a_row(seed):
    """Every output follows its own prompt, and all come back whole."""
    rng = random.Random(seed)
    samples = []
    for _ in range(rng.randint(1, 6)):
        prompt = [rng.randint(1, 9) for _ in range(rng.randint(1, 8))]
        for _ in range(rng.randint(1, 5)):
            answer = [rng.randint(10, 99) for _ in range(rng.randint(1, 12))]
            mask = [0] * len(prompt) + [1] * len(answer)
            tokens = prompt + answer
            samples.append(Sample(tokens=tokens, mask=mask, prompt=len(prompt)))
    batch = pack(samples, length=32, share_prompts=True)
    plain = pack(samples, length=32)
    assert (batch.segment_ids > 0).sum() <= (plain.segment_ids > 0).sum()
    assert batch.mask.sum() == plain.mask.sum()
    targets = unpack(batch.targets, samples, share_prompts=True)
    tokens = unpack(batch.tokens, samples, share_prompts=True)
    positions = unpack(batch.positions, samples, share_prompts=True)
    for s, went_in, came_out, where in zip(
        samples, tokens, targets, positions, strict=True
    ):
        assert went_in.tolist() == s.tokens[:-1]
        assert came_out.tolist() == s.tokens[1:]
        assert where.tolist() == list(range(len(s.tokens) - 1))
    for row, ids in enumerate(batch.segment_ids.reshape(-1, 32)):
        prompts = [x for x in ids.tolist() if x and x % PROMPT == 0]
        starts = batch.positions.reshape(-1, 32)[row][np.isin(ids, prompts)]
        assert (starts == 0).sum() == len(set(prompts))


def samples_of(rng, n, longest):
    samples = []
    for i in range(n):
        prompt, answer = rng.randint(1, longest // 2), rng.randint(1, longest // 2)
        tokens = [rng.randint(1, 99) for _ in range(prompt + answer)]
        samples.append(
            Sample(
                tokens=tokens,
                mask=[0] * prompt + [1] * answer,
                advantages=float(i),
                logps=[0.0] * prompt + [-0.5 * i] * answer,
            )
        )
    return samples


def test_what_is_packed_can_be_read_back():
    samples = samples_of(random.Random(0), 37, 30)
    batch = pack(samples, length=48, rows=4)
    assert batch.tokens.shape[1:] == (4, 48) and batch.sequences == 37
    found = {}
    flat = {k: getattr(batch, k).reshape(-1, 48) for k in ("tokens", "targets")}
    for row in range(flat["tokens"].shape[0]):
        ids = batch.segment_ids.reshape(-1, 48)[row]
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            tokens = flat["tokens"][row][here].tolist()
            targets = flat["targets"][row][here].tolist()
            assert tokens[1:] == targets[:-1]  # the target is the next token
            positions = batch.positions.reshape(-1, 48)[row][here]
            assert positions.tolist() == list(range(len(tokens)))
            number = int(batch.advantages.reshape(-1, 48)[row][here][0])
            mask = batch.mask.reshape(-1, 48)[row][here].tolist()
            logps = batch.sampler_logps.reshape(-1, 48)[row][here].tolist()
            found[number] = ([tokens[0], *targets], mask, logps)
        assert not batch.mask.reshape(-1, 48)[row][ids == 0].any()
    assert found == {
        i: (s.tokens, [bool(m) for m in s.mask[1:]], list(s.logps or [])[1:])
        for i, s in enumerate(samples)
    }


def test_under_five_percent_is_padding_on_ragged_lengths():
    """Lengths as of 512 outputs: prompts near 100 tokens, outputs of 10 to 400."""
    rng = random.Random(1)
    samples = [
        Sample(tokens=[1] * (100 + int(10 * 40 ** rng.random())), mask=[1])
        for _ in range(512)
    ]
    samples = [Sample(tokens=s.tokens, mask=[1] * len(s.tokens)) for s in samples]
    batch = pack(samples, length=1024)
    assert (batch.segment_ids == 0).mean() < 0.05


# Tokens of GSM8K's first 16 questions in SmolLM2-135M-Instruct's chat template, and of
# its 8 outputs each at temperature 1: what `benchmarks/sampler.py --cases ragged
# --ragged-new 512` samples first (seed 0).
QUESTIONS = [87, 82, 109, 104, 75, 113, 110, 155, 160, 116, 124, 143, 89, 119, 79, 118]
OUTPUTS = """
    512, 47, 512, 512, 236, 29, 512, 259, 512, 512, 512, 512, 279, 512, 125, 59,
    512, 327, 512, 512, 512, 512, 363, 24, 232, 512, 301, 272, 481, 338, 512, 97,
    94, 397, 145, 512, 262, 262, 80, 512, 489, 25, 299, 512, 442, 512, 512, 185,
    512, 340, 267, 245, 122, 249, 512, 362, 359, 512, 512, 225, 333, 186, 512, 164,
    512, 396, 323, 369, 53, 512, 512, 440, 512, 512, 248, 512, 97, 512, 512, 512,
    512, 443, 512, 512, 395, 512, 326, 512, 134, 225, 512, 512, 317, 457, 328, 154,
    299, 512, 512, 512, 512, 241, 112, 512, 243, 512, 512, 512, 148, 512, 374, 457,
    512, 272, 284, 220, 296, 512, 512, 322, 313, 512, 512, 512, 457, 512, 182, 283
"""


def real_steps(questions: int, group: int, most: int) -> Iterator[list[Sample]]:
    lengths = [min(int(n), most) for n in OUTPUTS.split(",")]
    for start in range(0, len(lengths), questions * group):
        step = []
        for i, n in enumerate(lengths[start : start + questions * group]):
            prompt = QUESTIONS[(start + i) // group * group // 8]
            tokens = [i // group] * prompt + [9] * n
            mask = [0] * prompt + [1] * n
            step.append(Sample(tokens=tokens, mask=mask, prompt=prompt))
        yield step


@pytest.mark.parametrize(
    ("questions", "group", "most"),
    [(4, 8, 256), (4, 8, 512), (8, 8, 512), (16, 8, 512), (2, 64, 512)],
)
def test_under_five_percent_is_padding_on_real_outputs(questions, group, most):
    padding = []
    for step in real_steps(questions, group, most):
        length = fitting_length(step, longest=2048, share_prompts=True)
        batch = pack(step, length=length, share_prompts=True)
        empty = batch.segment_ids[: batch.used] == 0
        np.testing.assert_allclose(batch.padding, empty.mean())
        wide = batch.with_capacity(batch.used + 3)
        np.testing.assert_allclose(wide.padding, batch.padding)
        padding.append(batch.padding)
    assert np.mean(padding) < 0.05


def test_questions_are_taken_in_the_order_that_saves_a_row():
    """4 and 4 first leave 2 of 10 positions that no 3 fills: 3 rows for 20."""
    samples = [
        Sample(tokens=[0] * (n + 1), mask=[1] * (n + 1)) for n in (4, 4, 3, 3, 3, 3)
    ]
    assert len(place_in_rows(samples, 10)) == 3
    rows = place_in_rows(samples, 10, share_prompts=True)
    assert sorted(sorted(len(samples[i].tokens) - 1 for [i] in r) for r in rows) == [
        [3, 3, 4],
        [3, 3, 4],
    ]
    assert rows == place_in_rows(samples, 10, share_prompts=True)


def test_samples_that_teach_nothing_leave_an_empty_batch():
    left_out = Sample(tokens=[1, 2], mask=[0, 1], prompt=1)
    batch = pack([], length=4, share_prompts=True, of=[left_out])
    assert (batch.used, batch.sequences, batch.padding) == (0, 1, 1)


def test_few_outputs_take_a_row_length_that_fits_them():
    """4 groups of 8 share their prompts: 1,336 tokens for rows of 1,024 at most."""
    samples = []
    for group in range(4):
        prompt = [group + 1] * 31
        for _ in range(8):
            tokens = [*prompt, *[9] * 38]
            samples.append(Sample(tokens=tokens, mask=[1] * 69, prompt=31))

    def empty(length):
        batch = pack(samples, length=length, share_prompts=True)
        return (batch.segment_ids == 0).mean()

    length = fitting_length(samples, longest=1024, choices=4, share_prompts=True)
    assert length == 768 and empty(768) < 0.13 < 0.34 < empty(1024)
    assert all(empty(768) <= empty(n) for n in (1024, 896, 640))
    # Of many outputs hardly anything is empty, and no shape is added.
    assert fitting_length(samples * 20, longest=1024, share_prompts=True) == 1024
    # A length that does not hold the longest sample is no choice.
    one = [Sample(tokens=[0] * 900, mask=[1] * 900)]
    assert fitting_length(one, longest=1024) == 928
    assert fitting_length(one, longest=1200) == 900


def test_capacity_adds_only_empty_micro_batches():
    samples = samples_of(random.Random(2), 5, 20)
    batch = pack(samples, length=24, rows=2)
    wide = batch.with_capacity(9)
    assert wide.used == batch.used and wide.tokens.shape[0] == 9
    assert not wide.mask[batch.used :].any()
    np.testing.assert_array_equal(wide.tokens[: batch.used], batch.tokens)


def test_rows_of_their_own():
    samples = samples_of(random.Random(3), 5, 20)
    batch = pack(samples, length=24, share=False)
    assert batch.tokens.shape[0] == 5 and batch.segment_ids.max() == 1


def test_a_sample_that_fits_no_row_is_refused_by_number():
    with pytest.raises(GrpoError, match="sample 1 has 9 tokens"):
        pack(
            [Sample(tokens=[1, 2], mask=[0, 1]), Sample(tokens=[1] * 9, mask=[1] * 9)],
            length=7,
        )
