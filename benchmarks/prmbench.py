"""A process reward model on PRMBench (Song et al. 2025): does it see a wrong step?

    python benchmarks/prmbench.py FILE --model WORKDIR [--stage reward]
    python benchmarks/prmbench.py FILE --train OUT [--steps N]

In: prmbench_all.jsonl, whose rows hold a right solution (`original_process`) and one
with planted mistakes (`modified_process`, `error_steps` from 1); a reward model of a
work directory, or none: `--train` makes a small one of nothing, with a tokenizer of its
own, and trains it on three quarters of the questions. Out: the AUC over the steps of
the modified solutions, and over solutions (original against modified, each scored by
its worst step), with n and an interval that draws questions.

Measured (--train --steps 150 --limit 80, seed 0, CPU): steps 0.623 (0.598 to 0.649, n
7779), solutions 0.551 (0.523 to 0.583, n 1087); the length of a step alone gives 0.576.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import auc
import jax
import numpy as np

from grpo_jax.config import Config, ModelSettings, OptimizerSettings
from grpo_jax.data.tokenizer import EOS, PAD, Tokenizer
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError, Preempted
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.metrics_writer import Recorder
from grpo_jax.training.reward_model.labels import Solution, encode_solution, read_rows
from grpo_jax.training.reward_model.scoring import score_samples
from grpo_jax.training.reward_model.training import (
    RewardModelTraining,
    load_reward_model,
    train_reward_model,
)
from grpo_jax.training.run import Run
from grpo_jax.training.setup import declared_config
from grpo_jax.training.work_directory import WorkDirectoryClaim


@dataclasses.dataclass(frozen=True)
class Bench:
    """Solutions without mistakes, and with; `kinds` are those of the latter."""

    original: list[Solution]
    modified: list[Solution]
    kinds: list[str]
    dropped: int = 0  # rows whose error_steps name steps that are not there

    def part(self, keep: Callable[[Solution], bool]) -> Bench:
        """The solutions to keep, by their question."""
        pairs = zip(self.modified, self.kinds, strict=True)
        kept = [(solution, kind) for solution, kind in pairs if keep(solution)]
        return Bench(
            [solution for solution in self.original if keep(solution)],
            [solution for solution, _ in kept],
            [kind for _, kind in kept],
            self.dropped,
        )


def read(path: str | Path) -> Bench:
    """PRMBench's rows as solutions; an original that stands in many rows is kept once.

    A solution's `id` is its question's: the row's `idx`, which the eight modifications
    of one solution share.
    """
    originals: dict[tuple[str, tuple[str, ...]], Solution] = {}
    modified, kinds, dropped = [], [], 0
    for number, row in read_rows(path):
        try:
            for key in ("original_process", "modified_process", "error_steps"):
                if not isinstance(row[key], list):
                    raise TypeError(f"{key} is not a list")
            steps = tuple(map(str, row["original_process"]))
            name, question = str(row["idx"]), str(row["original_question"])
            right = Solution(question, steps, (1.0,) * len(steps), name)
            originals.setdefault((question, steps), right)
            steps, wrong = tuple(map(str, row["modified_process"])), row["error_steps"]
            kind, question = str(row["classification"]), str(row["modified_question"])
        except (KeyError, TypeError) as error:
            raise GrpoError(
                f"{path}:{number}: not a row of PRMBench ({error})"
            ) from None
        if not all(isinstance(i, int) and 1 <= i <= len(steps) for i in wrong):
            dropped += 1
            continue
        labels = tuple(float(i not in wrong) for i in range(1, len(steps) + 1))
        modified.append(Solution(question, steps, labels, name))
        kinds.append(kind)
    if not modified:
        raise GrpoError(f"{path}: no row of PRMBench in it")
    return Bench(list(originals.values()), modified, kinds, dropped)


def is_held_out(solution: Solution) -> bool:
    """Whether a question is for the test: a quarter of all are, by a hash."""
    return hashlib.blake2b(solution.id.encode()).digest()[0] % 4 == 0


def evaluate(
    score: Callable[[Sequence[Solution]], list[np.ndarray]], bench: Bench
) -> dict[str, Any]:
    """The AUCs of a model that gives each step of a solution a score."""
    both = [*bench.original, *bench.modified]
    found = score(both)
    pairs = list(zip(both, found, strict=True))[len(bench.original) :]

    def over_steps(pairs: Iterable[tuple[Solution, np.ndarray]]) -> dict[str, Any]:
        pairs = list(pairs)
        return auc.measure(
            np.concatenate([values for _, values in pairs]),
            np.concatenate([solution.labels for solution, _ in pairs]),
            [solution.id for solution, values in pairs for _ in values],
        )

    by_kind: dict[str, list[tuple[Solution, np.ndarray]]] = {}
    for pair, kind in zip(pairs, bench.kinds, strict=True):
        by_kind.setdefault(kind, []).append(pair)
    return {
        "steps": over_steps(pairs),
        "solutions": auc.measure(
            [values.min() for values in found],
            [min(solution.labels) for solution in both],
            [solution.id for solution in both],
        ),
        "steps_by_length": over_steps((s, by_length(s)) for s in bench.modified),
        "steps_by_kind": {
            kind: over_steps(by_kind[kind])
            for kind in sorted(by_kind)
            if any(0 in solution.labels for solution, _ in by_kind[kind])
        },
        "dropped": bench.dropped,
    }


def by_length(solution: Solution) -> np.ndarray:
    """The shorter, the better: what needs no model, and a model has to surpass."""
    return -np.array([len(step) for step in solution.steps], np.float64)


def scorer(
    model: RewardModel, params: Params, tokenizer: Tokenizer, *, rows: int = 4
) -> Callable[[Sequence[Solution]], list[np.ndarray]]:
    """The score at the last token of each step."""

    def score(solutions: Sequence[Solution]) -> list[np.ndarray]:
        items = [encode_solution(tokenizer.encode, solution) for solution in solutions]
        # Long solutions would make rows long for all of them: by length, in chunks.
        order = sorted(range(len(items)), key=lambda i: len(items[i].tokens))
        found: list[np.ndarray] = [np.zeros(0)] * len(items)
        for at in range(0, len(order), 256):
            chunk = order[at : at + 256]
            length = -(-len(items[chunk[-1]].tokens) // 256) * 256
            sequences = [items[i].tokens for i in chunk]
            scores = score_samples(model, params, sequences, length=length, rows=rows)
            for i, values in zip(chunk, scores, strict=True):
                found[i] = values[list(items[i].ends)]
        return found

    return score


def train_small(
    bench: Bench,
    workdir: Path,
    *,
    steps: int = 300,
    seed: int = 0,
    vocab_size: int = 4096,
    longest: int = 512,
) -> tuple[RewardModel, Params, Tokenizer]:
    """A process reward model of nothing but these solutions: a small random decoder.

    It knows no mathematics: its AUC is what the look of a wrong step gives away.
    Solutions of more than `longest` tokens are left out.
    """
    solutions = [*bench.original, *bench.modified]
    texts = ("\n".join((s.question, *s.steps)) for s in solutions)
    tokenizer = learn_tokenizer(texts, vocab_size)
    items = [encode_solution(tokenizer.encode, solution) for solution in solutions]
    items = [item for item in items if len(item.tokens) <= longest]
    config = Config(
        name="prmbench",
        seed=seed,
        checkpoint_every=100,
        model=ModelSettings(layers=2, width=128, heads=4, ffn=384),
    )
    mesh = sharding.make_mesh(fsdp=-1)
    decoder = Decoder(declared_config(config, tokenizer.vocab_size))
    model = RewardModel(decoder)
    settings = RewardModelTraining(
        steps=steps,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=20,
        schedule="linear",
        row_length=longest,
        micro_rows=4,
        shared=OptimizerSettings(weight_decay=0.1),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh), Recorder(workdir, config) as recorder:
        claim = WorkDirectoryClaim(config, workdir)
        run = Run(config, workdir, mesh, decoder, tokenizer, recorder, claim)

        def start() -> Params:
            policy = decoder.init(run.key("init", 0))
            return run.new_reward_model(run.key("reward", 0), policy)

        return (
            model,
            train_reward_model(run, "reward", start, items, settings),
            tokenizer,
        )


def learn_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """Byte pairs of these texts; any other text is bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    special = {"pad_token": PAD, "eos_token": EOS}
    return Tokenizer(learned, special=special, eos_ids=[1])


def report(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = {"steps": result["steps"], "solutions (worst step)": result["solutions"]}
    rows |= {"steps, by length alone": result["steps_by_length"]}
    rows |= {f"steps, {kind}": row for kind, row in result["steps_by_kind"].items()}
    lines = ["| PRMBench | AUC | 95 % | n | right |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        low, high = row["ci95"]
        interval = f"{low:.3f} to {high:.3f}"
        lines.append(
            f"| {name} | {row['auc']:.3f} | {interval} | {row['n']} | {row['right']} |"
        )
    if result["dropped"]:
        lines.append(f"\n{result['dropped']} rows name error steps that are not there.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/prmbench.py",
        description="The AUC of a process reward model on PRMBench.",
    )
    add = parser.add_argument
    add("file", help="prmbench_all.jsonl")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a work directory with a reward model")
    which.add_argument("--train", help="train a small one here, on other questions")
    add("--stage", default="reward", help="the reward model's checkpoints (reward)")
    add("--steps", type=int, default=300, help="of --train (300)")
    add("--seed", type=int, default=0, help="of --train (0)")
    add("--limit", type=int, default=0, help="questions to score (all)")
    add("--out", help="a JSON file for the figures")
    flags = parser.parse_args(arguments)
    try:
        result = run_command(flags)
    except GrpoError as error:
        sys.exit(f"error: {error}")
    except Preempted as stopped:
        sys.exit(f"{stopped}; the same command goes on from there")
    if flags.out:
        Path(flags.out).write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(report(result))


def run_command(flags: argparse.Namespace) -> dict[str, Any]:
    bench = read(flags.file)
    if flags.train:
        others, seed = bench.part(lambda s: not is_held_out(s)), flags.seed
        loaded = train_small(others, Path(flags.train), steps=flags.steps, seed=seed)
        bench = bench.part(is_held_out)
    else:
        loaded = load_reward_model(flags.model, flags.stage)
    if flags.limit:
        names = set(sorted({s.id for s in bench.modified})[: flags.limit])
        bench = bench.part(lambda solution: solution.id in names)
    return evaluate(scorer(*loaded), bench)


if __name__ == "__main__":
    main()
