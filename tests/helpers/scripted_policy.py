"""A model that recites: trained until it writes given token ids, call by call.

What the interpreter would write is known to the scripts as text, and is masked in
training as it is in RL; so the model goes on rightly only if the loop really wrote it.
"""

import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from grpo_jax.data.tokenizer import EOS, PAD, Tokenizer
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.training.batch import Sample
from grpo_jax.training.objectives import sft_objective
from grpo_jax.training.packing import pack
from grpo_jax.training.train_step import TrainState, make_step

# Characters, and tokens that a text is never encoded to: only a model writes them.
WIDE = ["```", "``", "`output", "output\n", "outputs", "out", "put"]
Script = Sequence[list[str]]  # in turn: what the model writes, what it is told, …
P = "```python\n"
LONG = "\n" + "ab" * 25 + "..." + "ab" * 25 + "\n```\n"
# What the model writes and what it is told, in turn; the parts in WIDE are tokens.
SCRIPTS: dict[str, Script] = {
    # the stop string in three tokens, one of which holds a part of it and no more
    "a": (
        [P + "print(6*7)\n```\n", "``", "`output"],
        ["\n42\n```\n"],
        ["so 42", "<eos>"],
    ),
    # in four, with no program before it: a faked output
    "b": (["It is 5.\n", "```", "out", "put"],),
    # an error; then a program that stands on the first one, without its print
    "c": (
        [P + "x=2\nprint(x)\nprint(y)\n```\n```output"],
        ["\nRuntime errors: NameError: name 'y' is not defined\n```\n"],
        [P + "print(x+5)\n```\n```output"],
        ["\n7\n```\n"],
        ["7", "<eos>"],
    ),
    # more than 100 characters
    "d": ([P + "print('ab'*99)\n```\n", "```", "output\n"], [LONG[1:]], ["!", "<eos>"]),
    # chain of thought
    "e": (["Just 7.", "<eos>"],),
    # it ends its turn itself: nothing is run
    "f": ([P + "print(1)\n```", "<eos>"],),
    # it goes on within the token that ends the stop string
    "g": ([P + "print(1)\n```\n", "```", "outputs"],),
    # a call after a call
    "h": (
        [P + "print(3)\n```\n```output"],
        ["\n3\n```\n"],
        [P + "print(4)\n```\n```output"],
        ["\n4\n```\n"],
        [P + "print(5)\n```\n```output"],
        ["\n5\n```\n"],
        ["end", "<eos>"],
    ),
}  # fmt: skip


def make_tokenizer() -> Tokenizer:
    names = [PAD, EOS, *string.printable[:-2], *WIDE]
    vocabulary = {name: i for i, name in enumerate(names)}
    found = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    found.decoder = decoders.Fuse()
    found.add_special_tokens([PAD, EOS])
    return Tokenizer(
        found,
        special={"pad_token": PAD, "eos_token": EOS},
        eos_ids=[vocabulary[EOS]],
    )


def ids_of(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    """Parts that are tokens as these, others character by character."""
    found: list[int] = []
    for part in parts:
        one = tokenizer.token_id(part)
        found += tokenizer.encode(part) if one is None else [one]
    return found


def sample_of(tokenizer: Tokenizer, prompt: str, script: Script) -> Sample:
    tokens = tokenizer.encode(prompt)
    mask = [0] * len(tokens)
    for i, parts in enumerate(script):
        ids = ids_of(tokenizer, parts)
        tokens, mask = tokens + ids, mask + [1 - i % 2] * len(ids)
    return Sample(tokens=tokens, mask=mask)


def learn(
    tokenizer: Tokenizer, scripts: Mapping[str, Script], *, steps: int = 110
) -> tuple[Decoder, Any]:
    """(model, parameters) that recite every script after its prompt."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 5,
        width=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=12,
        ffn=96,
    )
    model = Decoder(config)
    samples = [sample_of(tokenizer, *item) for item in scripts.items()]
    length = max(len(s.tokens) for s in samples)
    batch = pack(samples, length=length, rows=4)  # several to a row
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, steps, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    step = make_step(sft_objective(model, aggregate="token_mean"), optimizer)
    state = TrainState.create(model.init(jax.random.key(0)), optimizer)
    metrics: Any = {}
    for _ in range(steps):
        state, metrics = step(state, None, batch)
    assert float(metrics["loss"]) < 0.02, "it has not learnt its scripts"
    return model, state.params
