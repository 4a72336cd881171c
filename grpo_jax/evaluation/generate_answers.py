"""Generates a model's answers to a set of questions, with a file to resume from.

A mode ("cot", chain of thought; "tool", with programs) is one function from prompts to
completions. The sampler gets up to four batches of prompts at a time, the longest
first, and their completions are written before it gets the next. Random draws depend
only on the seed, the temperature and the place in that order, so that an evaluation
that was stopped resumes with the same completions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.checkpoints import checksums
from grpo_jax.data import datasets, few_shot_prompts
from grpo_jax.data.example import Example
from grpo_jax.data.prompts import encode_prompts
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import processes, sharding
from grpo_jax.distributed.progress import progress_bar
from grpo_jax.environments.interpreter import Interpreter
from grpo_jax.environments.tool_rollouts import decode_output, generate_with_tools
from grpo_jax.errors import Preempted
from grpo_jax.evaluation.completion_files import Completion, CompletionLog
from grpo_jax.files import to_json
from grpo_jax.generation.sampler import generate
from grpo_jax.models.decoder import Decoder, Params

Answers = list[list[Completion]]  # [questions][samples]
Mode = Callable[..., Answers]  # see `chain_of_thought`
QUEUE = 4  # the most batches that the sampler gets at a time
PARTS = 4  # a set has about this many, to show progress and to lose little in a stop


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How a set is asked and answered."""

    template: str = "chat"
    instruction: str = "cot"
    mode: str = "cot"  # cot | tool
    generations: int = 2  # of a completion with tools (`tool_rollouts.py`)
    tool_timeout: float = 10.0  # seconds of a program
    few_shot: bool = False  # worked examples instead of template and instruction
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 1024
    questions: int = 0  # of each set; 0 is all
    samples: int = 1  # a question, at `temperature`; 0 measures greedy decoding only
    temperature: float = 1.0
    batch: int = 64  # the most completions decoded at a time
    seed: int = 0
    data_dir: str | None = None
    grader: str = "strict"  # strict | paper: the paper's rule beside the strict one


@dataclass(frozen=True)
class PromptedSet:
    """A set's questions with their prompts; None for a prompt that is too long."""

    name: str
    examples: Sequence[Example]
    prompts: Sequence[list[int] | None]

    @functools.cached_property
    def order(self) -> list[int]:
        """The questions that are asked, the longest prompts first."""
        lengths = {i: len(ids) for i, ids in enumerate(self.prompts) if ids is not None}
        return sorted(lengths, key=lambda i: -lengths[i])

    def digest(self) -> str:
        """Returns a hash of all prompts."""
        sha = hashlib.sha256()
        for ids in self.prompts:
            sha.update(np.array([-1] if ids is None else ids, "<i4").tobytes() + b"|")
        return sha.hexdigest()[:16]


def load_prompts(
    tokenizer: Tokenizer, name: str, settings: AnswerSettings
) -> PromptedSet:
    """Returns a set's questions, with prompts as the settings define them.

    Raises:
      GrpoError: the set cannot be read, or processes read different ones.
    """
    limit, where = settings.questions or None, settings.data_dir
    rows = datasets.load_dataset(
        name, "test", data_dir=where, limit=limit, require=("answer",)
    )
    examples = list(rows)
    shown, template, instruction = examples, settings.template, settings.instruction
    if settings.few_shot:
        shown = [
            few_shot_prompts.add_few_shot_prompt(name, e, data_dir=where)
            for e in examples
        ]
        template, instruction = "plain", "none"
    kept, _ = encode_prompts(
        tokenizer,
        shown,
        limit=settings.max_prompt_tokens,
        template=template,
        instruction=instruction,
    )
    found = {id(example): ids for example, ids in kept}
    prompted = PromptedSet(name, examples, [found.get(id(e)) for e in shown])
    digests = {"rows": rows.digest, "prompts": prompted.digest()}
    processes.check_equal(f"set {name}", digests)
    return prompted


# -- modes -----------------------------------------------------------------------------


def chain_of_thought(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    slots: int = 0,
    stop: Sequence[Sequence[int]] = (),
) -> Answers:
    """Returns completions by chain of thought.

    Args:
      model: the decoder.
      params: its parameters.
      tokenizer: the model's.
      prompts: token ids.
      key: the random key of all draws.
      samples: completions of each prompt.
      temperature: 0 is greedy.
      max_new_tokens: the limit of a completion.
      slots: completions decoded at a time; 0 leaves it to the sampler.
      stop: token sequences that end a completion.

    Returns:
      For each prompt its `samples` completions.
    """
    out = generate(
        model,
        params,
        prompts,
        key=key,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_id=tokenizer.eos_ids,
        stop=stop,
        slots=slots or None,
    )
    while not out.tokens.is_ready():  # waits in Python, so that Ctrl-C works
        time.sleep(0.005)
    tokens, lengths, done = sharding.fetch_to_hosts(
        (out.tokens, out.lengths, out.finished)
    )
    rows = [
        Completion(tokenizer.decode(ids[:n]), not end)
        for ids, n, end in zip(tokens, lengths.tolist(), done.tolist(), strict=True)
    ]
    return [rows[i : i + samples] for i in range(0, len(rows), samples)]


def with_programs(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    slots: int = 0,
    stop: Sequence[Sequence[int]] = (),
    **options: Any,
) -> Answers:
    """Returns completions by tool-integrated reasoning; a sandbox runs their programs.

    Arguments as in `chain_of_thought`, without `stop`; `options` go on to
    `tool_rollouts.generate_with_tools`.
    """
    assert not stop
    found = generate_with_tools(
        model, params, tokenizer, prompts, rows=slots, **options
    )
    arrays = found.tokens, found.mask, found.lengths, found.finished
    rows = [
        Completion(
            decode_output(tokenizer, ids[:n].tolist(), mask[:n].tolist()), not end
        )
        for ids, mask, n, end in zip(*arrays, strict=True)
    ]
    samples = options["samples"]
    return [rows[i : i + samples] for i in range(0, len(rows), samples)]


MODES: dict[str, Mode] = {"cot": chain_of_thought, "tool": with_programs}


def find_mode(settings: AnswerSettings) -> Mode:
    """Returns the function of the settings' mode.

    Raises:
      GrpoError: the mode needs a sandbox, and none works here.
    """
    if settings.mode != "tool":
        return MODES[settings.mode]
    return functools.partial(
        MODES["tool"],
        interpreter=Interpreter(settings.tool_timeout),
        generations=settings.generations,
    )


# -- a whole set -----------------------------------------------------------------------


def answer_all(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    prompted: PromptedSet,
    settings: AnswerSettings,
    *,
    kind: str,
    label: str = "",
    file: Path | None = None,
    restart: bool = False,
) -> list[list[Completion] | None]:
    """Returns the completions of every question; None for one that is too long.

    Args:
      model: the decoder.
      params: its parameters.
      tokenizer: the model's.
      prompted: the questions with their prompts.
      settings: how they are answered.
      kind: "greedy" (one completion, at temperature 0) or "sampled".
      label: what the progress bar shows.
      file: where completions are kept; those that it has are not generated again. None
        keeps none.
      restart: replace a file of other settings or weights, instead of raising.

    Raises:
      GrpoError: the file has other settings or weights, or no sandbox works here.
      Preempted: the run was asked to stop; the completions so far are in the file.
    """
    temperature, samples = 0.0, 1
    if kind == "sampled":
        temperature, samples = settings.temperature, settings.samples
    ask = find_mode(settings)
    form = few_shot_prompts.find_format(prompted.name) if settings.few_shot else None
    stop = few_shot_prompts.stop_ids(tokenizer, form) if form else []
    size = questions_at_once(len(prompted.order), samples, settings.batch)
    log = None
    if file is not None:
        header = describe_generation(prompted, settings, kind, size)
        header["weights"] = weights_digest(params)
        header["dtype"] = str(jnp.dtype(model.dtype))
        log = CompletionLog(file, header, restart=restart)
    found = {} if log is None else dict(log.rows)
    if all(i in found for i in prompted.order):  # nothing to do: show no progress bar
        return [found.get(i) for i in range(len(prompted.examples))]
    key = jax.random.fold_in(jax.random.key(settings.seed), round(1000 * temperature))
    done = sum(i in found for i in prompted.order)
    label, count = label or prompted.name, len(prompted.order)
    with progress_bar(label, done, count, unit="question") as bar:
        for start in range(0, count, size):
            batch = prompted.order[start : start + size]
            left = [i for i in batch if i not in found]
            if not left:
                continue
            queued = len(batch) * samples
            rows = ask(
                model,
                params,
                tokenizer,
                [prompted.prompts[i] for i in batch],
                key=jax.random.fold_in(key, start),
                samples=samples,
                temperature=temperature,
                max_new_tokens=settings.max_new_tokens,
                slots=settings.batch if queued > settings.batch else 0,
                stop=stop,
            )
            if form:
                rows = [[_cut_completion(c, form) for c in row] for row in rows]
            new = dict(zip(batch, rows, strict=True))
            if log is not None:
                about = {"set": prompted.name, "mode": settings.mode}
                log.append(new, prompted.examples, **about, temperature=temperature)
                new = {i: log.rows[i] for i in batch}
            found |= new
            bar.update(len(left))
            if processes.is_preempted():
                raise Preempted(f"{label}: stopped")
    return [found.get(i) for i in range(len(prompted.examples))]


def _cut_completion(
    completion: Completion, form: few_shot_prompts.Format
) -> Completion:
    text = few_shot_prompts.cut_at_next_question(completion.text, form)
    went_on = len(text) < len(completion.text)
    return Completion(text, completion.cut_off and not went_on)


def questions_at_once(questions: int, samples: int, batch: int) -> int:
    """Returns how many questions are asked at a time.

    Their completions are a quarter of the set's, but at least one batch and at most
    four batches.

    >>> [questions_at_once(n, 1, 64) for n in (10, 400, 1319, 5000)]
    [64, 100, 256, 256]
    >>> questions_at_once(1000, 64, 64)
    4
    """
    part = -(-questions * samples // PARTS)
    return max(1, min(max(part, batch), QUEUE * batch) // samples)


def describe_generation(
    prompted: PromptedSet, settings: AnswerSettings, kind: str, size: int
) -> dict[str, Any]:
    """Returns everything that completions depend on, except the model itself."""
    how = dataclasses.asdict(settings)
    unused = ["data_dir", "grader"]
    if settings.mode != "tool":
        unused += ["generations", "tool_timeout"]
    if kind == "greedy":
        unused += ["samples", "seed"]
        how["temperature"] = 0.0
    for name in unused:
        del how[name]
    return how | {
        "set": prompted.name,
        "questions": len(prompted.examples),
        "questions_at_once": size,
        "prompts": prompted.digest(),
    }


def weights_digest(params: Params) -> str:
    """Returns a checksum of all weights, which does not depend on their sharding.

    >>> one = weights_digest({"a": jnp.ones(3), "b": jnp.zeros(2)})
    >>> one == weights_digest({"a": jnp.ones(3), "b": -jnp.zeros(2)}), len(one)
    (False, 16)
    """
    described, _ = checksums.checksum_leaves(checksums.named_leaves(params))
    return hashlib.sha256(to_json(described)).hexdigest()[:16]
