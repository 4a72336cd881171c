"""The reward model in an RL run: trained for each iteration, it scores the outputs.

Each iteration labels outputs of the current policy by Math-Shepherd (the first one may
read a file of labels instead), adds a share of the earlier labels (`replay`, 10 % in
the paper), and continues to train the reward model (section 4.1.4, Algorithm 1). Labels
and checkpoints are kept in the work directory, so that a resumed run repeats nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import reward_names
from grpo_jax.data.datasets import Batches
from grpo_jax.data.example import Example
from grpo_jax.distributed import processes, sharding
from grpo_jax.distributed.progress import progress_bar
from grpo_jax.errors import GrpoError, Preempted
from grpo_jax.models.decoder import Params
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.credit import Output
from grpo_jax.training.reward_model import labels
from grpo_jax.training.reward_model.labels import LabelledSequence
from grpo_jax.training.reward_model.math_shepherd import Sampler, label_questions
from grpo_jax.training.reward_model.scoring import score_samples
from grpo_jax.training.reward_model.solution_steps import step_ends
from grpo_jax.training.reward_model.training import (
    RewardModelTraining,
    train_reward_model,
)
from grpo_jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class OutputScorer:
    """A trained reward model; its scores are probabilities of being right."""

    run: Run
    params: Params

    def outcome(self, outputs: Sequence[Output]) -> np.ndarray:
        """Returns each output's score, read at its last token, [N]."""
        return np.array([scores[-1] for scores in self._scores(outputs)], np.float32)

    def steps(
        self, outputs: Sequence[Output]
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Returns each output's step ends and step scores.

        Returns:
          For each output the indices of its steps' last tokens, and for each output the
          scores [number of steps].
        """
        ends = [step_ends(self.run.tokenizer, o.tokens) for o in outputs]
        pairs = zip(self._scores(outputs), ends, strict=True)
        return ends, [scores[where] for scores, where in pairs]

    def _scores(self, outputs: Sequence[Output]) -> list[np.ndarray]:
        config = self.run.config
        longest = config.data.max_prompt_tokens + config.max_new_tokens
        found = score_samples(
            RewardModel(self.run.model),
            self.params,
            [[*o.prompt, *o.tokens] for o in outputs],
            length=max(config.optimizer.row_length, longest),
            rows=config.optimizer.micro_rows * sharding.rows_multiple(self.run.mesh),
            place=sharding.batch_placer(self.run.mesh),
        )
        pairs = zip(outputs, found, strict=True)
        return [1 / (1 + np.exp(-s[-len(o.tokens) :])) for o, s in pairs]


class RewardModelIterations:
    """Trains the reward model of each iteration; returns None if the run needs none.

    Args:
      run: the run.
      questions: the RL questions with their prompts.

    Raises:
      GrpoError: there are too few labels for a batch, or a sequence fits no row.
    """

    def __init__(self, run: Run, questions: Sequence[tuple[Example, list[int]]]):
        config = run.config
        values = config.method_values()
        by_step = METHODS[config.method].coefficient == "process"
        self.run, self.questions = run, questions
        self.needed = by_step or "model" in reward_names(config)
        self.replay = values.get("replay", 0.0)
        r, o = config.reward_model, config.optimizer
        self.settings = RewardModelTraining(
            kind="process" if by_step else "outcome",
            steps=r.steps,
            batch_size=r.batch_size,
            learning_rate=r.learning_rate,
            row_length=o.row_length
            or config.data.max_prompt_tokens + config.max_new_tokens,
            micro_rows=o.micro_rows,
            shared=o,
        )
        self.given: list[LabelledSequence] = []  # the labels of the config's file
        if self.needed:  # fails here, before any training
            if r.labels:
                self.given = self._read(r.labels)
            self._check(values.get("iterations", 1))

    def __call__(self, iteration: int, policy: Params | None) -> OutputScorer | None:
        """Returns an iteration's reward model, trained on outputs of `policy`."""
        if not self.needed:
            return None
        assert policy is not None  # `train_rl` keeps π_sft if a reward model is needed
        return OutputScorer(self.run, self._train(iteration, policy))

    def _train(self, iteration: int, policy: Params) -> Params:
        def start() -> Params:
            if iteration:
                return self._train(iteration - 1, policy)
            return self.run.new_reward_model(self.run.key("reward", 0), policy)

        return train_reward_model(
            self.run,
            f"reward-{iteration + 1}",
            start,
            self._labels(iteration, policy),
            self.settings,
            seed=self.run.config.seed + iteration,
        )

    def _check(self, iterations: int) -> None:
        """Checks that there are enough labels and that they fit a row."""
        config, r = self.run.config, self.run.config.reward_model
        row = self.settings.row_length
        if not r.labels or iterations > 1:
            size = min(r.questions, len(self.questions))
            if size * r.samples < r.batch_size:
                raise GrpoError(
                    f"config.reward_model.batch_size: {r.batch_size}, but {size} "
                    f"questions with {r.samples} output(s) each are fewer; lower it, "
                    "or raise reward_model.samples"
                )
            # One position more than the policy needs: the last token is scored too.
            longest = max(len(ids) for _, ids in self.questions) + config.max_new_tokens
            if longest > row:
                raise GrpoError(
                    f"config.optimizer.row_length: {row}; the longest prompt and an "
                    f"output of {config.max_new_tokens} take {longest} in the reward "
                    "model; raise it, or set 0"
                )
        if not r.labels:
            return
        items = self.given
        if len(items) < r.batch_size:
            raise GrpoError(
                f"config.reward_model.batch_size: {r.batch_size}, but {r.labels} has "
                f"{len(items)} sequences; lower it"
            )
        longest = max(len(item.tokens) for item in items)
        if longest > row:
            given = config.optimizer.row_length
            field = "optimizer.row_length" if given else "max_new_tokens"
            raise GrpoError(
                f"{r.labels}: a sequence of {longest} tokens fits no row of {row}; "
                f"raise config.{field}"
            )

    def _labels(self, iteration: int, policy: Params) -> list[LabelledSequence]:
        """Returns the labels of the iteration, and a share of the earlier ones."""
        numbers = range(1, iteration + 2)
        *before, file = (self.run.workdir / f"labels-{i}.jsonl" for i in numbers)
        if processes.broadcast(file.exists):
            new = self._read(file)
        else:
            new = self._make_labels(iteration, policy)
            self.run.recorder.begin()
            if processes.is_first_process():
                labels.write_labels(file, new)
        history = [item for file in before for item in self._read(file)]
        return labels.mix_with_history(
            new,
            history,
            seed=self.run.config.seed,
            iteration=iteration,
            share=self.replay,
        )

    def _make_labels(self, iteration: int, policy: Params) -> list[LabelledSequence]:
        config, r = self.run.config, self.run.config.reward_model
        if r.labels and not iteration:
            return self.given
        sampler = Sampler(
            self.run.model,
            policy,
            self.run.tokenizer,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            batch=config.questions_per_step * config.group_size,
        )
        size = min(r.questions, len(self.questions))
        questions = Batches(self.questions, size, seed=config.seed)[iteration]
        items: list[LabelledSequence] = []
        chunk = 1024  # labelled at a time, to show progress and to stop in between
        with progress_bar(f"labels {iteration + 1}", 0, size, unit="question") as bar:
            for at in range(0, size, chunk):
                part = questions[at : at + chunk]
                items += label_questions(
                    sampler,
                    part,
                    key=self.run.key("reward", 1 + iteration * size + at),
                    outputs=r.samples,
                    completions=r.completions,
                    soft=r.soft,
                )
                bar.update(len(part))
                if processes.is_preempted():
                    raise Preempted(f"labels {iteration + 1}: stopped")
        return items

    def _read(self, file: str | Path) -> list[LabelledSequence]:
        return labels.read_labels(file, vocab_size=self.run.tokenizer.vocab_size)
