"""Evaluates and compares a run's own models, during training and at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping

from grpo_jax.config import Config, set_names, tool_generations
from grpo_jax.data import registry
from grpo_jax.data.datasets import split_names
from grpo_jax.distributed import processes
from grpo_jax.evaluation import generate_answers, metrics
from grpo_jax.evaluation.comparison import (
    Result,
    Scores,
    add_scores,
    measure_name,
    measure_set,
)
from grpo_jax.evaluation.generate_answers import AnswerSettings
from grpo_jax.files import write_json
from grpo_jax.models.decoder import Params
from grpo_jax.training.run import Run


def settings_of(config: Config) -> AnswerSettings:
    """Returns the evaluation settings that a run's config defines."""
    return AnswerSettings(
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
        mode="tool" if tool_generations(config) else "cot",
        generations=tool_generations(config),
        tool_timeout=config.tools.timeout,
    )


def check_sets(run: Run) -> None:
    """Checks before the training that the comparison after it can run.

    Raises:
      GrpoError: a set cannot be read, or its mode has no sandbox here.
    """
    generate_answers.find_mode(settings_of(run.config))
    for name in set_names(run.config):
        generate_answers.load_prompts(run.tokenizer, name, settings_of(run.config))


def evaluate_set(run: Run, params: Params, name: str) -> Result:
    """Evaluates parameters on one set greedily, without keeping the completions.

    Args:
      run: the run.
      params: the parameters, which are still being trained.
      name: the set's name.

    Returns:
      Measure → figures, as in results.json.
    """
    settings = settings_of(run.config)
    model = run.model, params, run.tokenizer
    return measure_set(*model, name, settings, sampled=False).result


def evaluate_policy(run: Run, params: Params) -> dict[str, float]:
    """Returns greedy accuracy on the comparison's first set, and the seconds taken.

    Raises:
      Preempted: the run was asked to stop.
    """
    started = time.perf_counter()
    name = set_names(run.config)[0]
    mode = "tool" if tool_generations(run.config) else "cot"
    greedy = evaluate_set(run, params, name)[measure_name(mode, "greedy")]
    found = {f"eval/{name}/greedy_accuracy": greedy["accuracy"]}
    if mode == "tool":
        found[f"eval/{name}/program_accuracy"] = greedy["program"]["accuracy"]
    return found | {"time/eval": time.perf_counter() - started}


def trained_on(config: Config) -> list[str]:
    """Returns the names of the sets that count as in-domain for a run."""
    return split_names(config.data.in_domain or config.data.train)


def compare_run(run: Run, models: Mapping[str, Params]) -> Result:
    """Compares a run's models on all its sets, and writes results.json.

    Completions are kept in the work directory, so that no question is asked again
    while weights and settings stay the same. results.json is rewritten after every set;
    sets that are still to come are in it without figures.

    Args:
      run: the run.
      models: name ("instruct", "rl") → parameters.

    Returns:
      What results.json holds.
    """
    run.recorder.begin()
    config, settings = run.config, settings_of(run.config)
    steps = {"instruct": config.sft_steps, "rl": config.rl_steps}
    results: Result = {
        "name": config.name,
        "seed": config.seed,
        "method": config.method,
        "steps": {name: steps[name] for name in models},
        "settings": settings.__dict__,
        "models": list(models),
        "sets": {
            name: {"in_domain": registry.is_in_domain(name, trained_on(config))}
            for name in set_names(config)
        },
    }
    found: Scores = {}
    for name, row in results["sets"].items():
        for model, params in models.items():
            measured = measure_set(
                run.model,
                params,
                run.tokenizer,
                name,
                settings,
                label=model,
                folder=run.workdir / "completions" / model,
                restart=True,
            )
            row[model] = measured.result
            add_scores(found, name, model, measured)
        results["paired"] = metrics.compare_pairs(found)
        if processes.is_first_process():
            write_json(run.workdir / "results.json", results)
    return results
