"""Evaluation by chain of thought: greedy, pass@k and maj@k, with intervals.

    python -m grpo_jax.evaluate --models A [B …] --sets gsm8k math --out DIR

In: models (work directories of train.py, Hugging Face folders or hub names) and sets.
Out: results.json and results.md with the table, the models' figures side by side and
the published ones beneath, marked as published.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax import answers, data, hosts, published, sharding
from grpo_jax.config import Config
from grpo_jax.data import Example
from grpo_jax.errors import GrpoError
from grpo_jax.grading import workers
from grpo_jax.measures import maj_at_k, pass_at_k, wilson
from grpo_jax.model import Decoder, Params
from grpo_jax.prompts import encode_prompts
from grpo_jax.recorder import progress
from grpo_jax.rollout import generate
from grpo_jax.run import Preempted, Run, load_run
from grpo_jax.tokenizer import Tokenizer

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a set is asked and answered."""

    template: str = "chat"
    instruction: str = "cot"
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 1024
    questions: int = 0  # of each set; 0 is all
    samples: int = 1  # a question, at `temperature`; 0 leaves that out
    temperature: float = 1.0
    batch: int = 64  # completions that the sampler gets at a time
    seed: int = 0
    data_dir: str | None = None


def load_prompts(
    tokenizer: Tokenizer, name: str, settings: Settings
) -> tuple[list[tuple[Example, list[int]]], int]:
    """A set's questions with their prompts, and how many are too long to be asked."""
    limit = settings.questions or None
    examples = data.load(
        name, "test", data_dir=settings.data_dir, limit=limit, require=("answer",)
    )
    return encode_prompts(
        tokenizer,
        examples,
        limit=settings.max_prompt_tokens,
        template=settings.template,
        instruction=settings.instruction,
    )


def answer_all(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    kept: Sequence[tuple[Example, list[int]]],
    settings: Settings,
    *,
    temperature: float,
    samples: int,
    label: str,
) -> list[list[str]]:
    """Completions of every question, [n][samples]."""
    by_length = sorted(range(len(kept)), key=lambda i: -len(kept[i][1]))
    questions = max(1, settings.batch // samples)
    texts: list[list[str]] = [[] for _ in kept]
    key = jax.random.fold_in(jax.random.key(settings.seed), round(1000 * temperature))
    with progress(label, 0, len(kept), unit="question") as bar:
        for start in range(0, len(kept), questions):
            chunk = by_length[start : start + questions]
            # The last chunk is filled up, so that it needs no program of its own.
            filled = chunk + chunk[:1] * (min(questions, len(kept)) - len(chunk))
            out = generate(
                model,
                params,
                [kept[i][1] for i in filled],
                key=jax.random.fold_in(key, start),
                samples=samples,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                eos_id=tokenizer.eos_ids,
            )
            tokens, lengths = sharding.to_hosts((out.tokens, out.lengths))
            for place, i in enumerate(chunk):
                rows = range(place * samples, (place + 1) * samples)
                texts[i] = [tokenizer.decode(tokens[r, : lengths[r]]) for r in rows]
            bar.update(len(chunk))
            if hosts.stopping():
                raise Preempted(f"{label}: stopped")
    return texts


def judge(pairs: Sequence[tuple[str, str]]) -> list[tuple[str | None, bool]]:
    """(text, reference) → (the text's answer, whether it is right)."""
    found = [answers.extract(text) for text, _ in pairs]
    right = workers.grade(found, [reference for _, reference in pairs])
    return list(zip(found, right, strict=True))


def measure(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    name: str,
    settings: Settings,
    *,
    sampled: bool = True,
    label: str = "",
) -> Result:
    """Greedy accuracy; with samples also accuracy, pass@k, maj@k at a temperature."""
    kept, dropped = load_prompts(tokenizer, name, settings)
    n = len(kept) + dropped  # a question that was left out counts as wrong
    result: Result = {"n": n}
    modes = [("greedy", 0.0, 1)]
    if sampled and settings.samples:
        modes.append(("sampled", settings.temperature, settings.samples))
    for mode, temperature, samples in modes:
        texts = answer_all(
            model,
            params,
            tokenizer,
            kept,
            settings,
            temperature=temperature,
            samples=samples,
            label=f"{label} {name} {mode}".strip(),
        )
        asked = zip(kept, texts, strict=True)
        pairs = [(text, e.answer) for (e, _), row in asked for text in row]
        judged = hosts.divide(judge, pairs)
        right = np.array([x for _, x in judged]).reshape(len(kept), samples)
        accuracy, share = float(right.sum() / (samples * n)), len(kept) / n
        result[mode] = {
            "accuracy": accuracy,
            "ci95": wilson(accuracy, n),
            "too_long": dropped,
        }
        if samples > 1:
            counts = right.sum(1).tolist()
            powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
            result[mode]["samples"] = samples
            result[mode]["pass@k"] = {
                str(k): share * pass_at_k(counts, samples, k) for k in powers
            }
            flat, said = [p for p, _ in judged], right.tolist()
            rows = range(0, len(flat), samples)
            voted = [(flat[i : i + samples], said[i // samples]) for i in rows]
            result[mode]["maj@k"] = {
                str(k): share * float(np.mean([maj_at_k(p, r, k) for p, r in voted]))
                for k in [*powers, samples]
            }
    return result


def set_names(config: Config) -> list[str]:
    names = config.data.eval.replace(",", "+").split("+")
    return [name.strip() for name in names if name.strip()]


def settings_of(config: Config) -> Settings:
    return Settings(
        template=config.data.template,
        instruction=config.data.instruction,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        questions=config.eval.questions,
        samples=config.eval.samples,
        temperature=config.eval.temperature,
        batch=config.eval.batch,
        seed=config.seed,
        data_dir=config.data.dir or None,
    )


def check_sets(run: Run) -> None:
    """Refuses before the training what the comparison would refuse after it."""
    for name in set_names(run.config):
        load_prompts(run.tokenizer, name, settings_of(run.config))


def evaluate_set(
    run: Run, params: Params, name: str, *, sampled: bool = True, label: str = ""
) -> Result:
    """One set of a run's comparison."""
    settings = settings_of(run.config)
    return measure(
        run.model,
        params,
        run.tokenizer,
        name,
        settings,
        sampled=sampled,
        label=label,
    )


def compare(run: Run, models: Mapping[str, Params]) -> Result:
    """The comparison of a run's models on all its sets; what is measured stays so.

    Results are written after every set, and a set that results.json has already under
    the same settings is not asked again.
    """
    config = run.config
    file = run.workdir / "results.json"
    steps = {"instruct": config.sft_steps, "rl": config.rl_steps}
    header = {
        "name": config.name,
        "seed": config.seed,
        "method": config.method,
        "steps": {name: steps[name] for name in models},
        "settings": settings_of(config).__dict__,
    }
    results: Result = {**header, "models": list(models), "sets": {}}
    before = hosts.from_first(lambda: read_json(file))
    if before is not None:
        if all(before.get(name) == value for name, value in header.items()):
            results = before
    trained_on = (config.data.in_domain or config.data.train).split("+")
    for name in set_names(config):
        row = results["sets"].setdefault(name, {"in_domain": name in trained_on})
        for model, params in models.items():
            if model not in row:
                row[model] = evaluate_set(run, params, name, label=model)
                write_json(file, results)
    write_json(file, results)
    return results


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def write_json(file: Path, value: Any) -> None:
    if not hosts.first():
        return
    fresh = file.with_suffix(".tmp")
    text = json.dumps(value, indent=2, ensure_ascii=False)
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(file)


def table(results: Result) -> str:
    """The comparison in Markdown: accuracy in %, ± half of the 95 % interval."""
    models = results["models"]
    modes = [
        mode
        for mode in ("greedy", "sampled")
        if any(mode in row[models[0]] for row in results["sets"].values())
    ]
    temperature = results["settings"]["temperature"]
    titles = {"greedy": "greedy", "sampled": f"temperature {temperature:g}"}
    arrow = " → ".join(models)
    lines = [
        "| set | n | " + " | ".join(f"{titles[m]}: {arrow}" for m in modes) + " |",
        "|---|---|" + "---|" * len(modes),
    ]
    for name, row in results["sets"].items():
        where = "" if "in_domain" not in row else " (in-domain)"
        if row.get("in_domain") is False:
            where = " (out-of-domain)"
        cells = [" → ".join(_cell(row[m].get(mode)) for m in models) for mode in modes]
        n = row[models[0]]["n"]
        lines.append(f"| {name}{where} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(result: Result | None) -> str:
    if result is None:
        return "–"
    low, high = result["ci95"]
    return f"{100 * result['accuracy']:.1f} ± {50 * (high - low):.1f}"


def _load(path: str) -> tuple[Decoder, Params, Tokenizer, str, str]:
    """A model with the template and the instruction that it was trained on."""
    if (Path(path) / "checkpoints").is_dir():
        from grpo_jax.run import read_config

        model, params, tokenizer = load_run(path)
        asked = read_config(Path(path)).data
        return model, params, tokenizer, asked.template, asked.instruction
    from grpo_jax import weights

    mesh = sharding.make_mesh(fsdp=-1)
    model, params = weights.load_pretrained(path, mesh=mesh)
    tokenizer = Tokenizer.from_folder(weights.find_folder(path, None))
    template = "chat" if tokenizer.chat_template else "deepseekmath"
    return model, params, tokenizer, template, "cot"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_jax.evaluate",
        description="Evaluates models on sets of questions, by chain of thought.",
    )
    add = parser.add_argument
    add("--models", nargs="+", required=True, help="work directories, folders, names")
    add("--sets", nargs="+", required=True, help="gsm8k math cmath mgsm_zh … or .jsonl")
    add("--out", required=True, help="the folder for results.json and results.md")
    add("--questions", type=int, default=0, help="of each set (all)")
    add("--samples", type=int, default=0, help="a question, for pass@k and maj@k (0)")
    add("--temperature", type=float, default=1.0, help="of the samples (1.0)")
    add("--mode", choices=["cot"], default="cot", help="chain of thought")
    add("--max-new-tokens", type=int, default=1024, help="of a completion (1024)")
    add("--batch", type=int, default=64, help="completions decoded at a time (64)")
    add("--template", choices=["chat", "deepseekmath", "plain"], help="of the prompt")
    add("--instruction", choices=["cot", "tool", "none"], help="after the question")
    add("--data-dir", help="where the sets' original files lie ($GRPO_JAX_DATA)")
    add("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    for name, least in (("questions", 0), ("samples", 0), ("max_new_tokens", 1)):
        if getattr(flags, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more")
    if flags.temperature <= 0 or flags.batch < 1:
        parser.error("--temperature must be above 0 and --batch 1 or more")
    return flags


def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    with hosts.together():
        try:
            hosts.say(run_command(flags))
        except GrpoError as error:
            sys.exit(f"error: {error}")
        except Preempted as stopped:
            sys.exit(f"{stopped}")


def run_command(flags: argparse.Namespace) -> str:
    """Measures every model on every set; returns the report that is also written."""
    out = Path(flags.out)
    hosts.agree("flags", vars(flags))
    if hosts.first():
        out.mkdir(parents=True, exist_ok=True)
    labels = [Path(m).name or m for m in flags.models]
    if len(set(labels)) < len(labels):
        labels = list(flags.models)
    results: Result = {"models": labels, "sets": {}}
    for path, label in zip(flags.models, labels, strict=True):
        model, params, tokenizer, template, instruction = _load(path)
        settings = Settings(
            template=flags.template or template,
            instruction=flags.instruction or instruction,
            max_new_tokens=flags.max_new_tokens,
            questions=flags.questions,
            samples=flags.samples,
            temperature=flags.temperature,
            batch=flags.batch,
            seed=flags.seed,
            data_dir=flags.data_dir,
        )
        results["settings"] = settings.__dict__
        for name in flags.sets:
            row = results["sets"].setdefault(name, {})
            row[label] = measure(
                model, params, tokenizer, name, settings, label=f"{label}:"
            )
            write_json(out / "results.json", results)
    report = table(results)
    if figures := published.table(flags.sets):
        report += f"\n\n{figures}"
    if hosts.first():
        (out / "results.md").write_text(report + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
