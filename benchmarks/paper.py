"""The paper's figures 5, 6 and 7 in miniature, on the chain sums of configs/tiny.py.

    make paper                    # all methods, 3 seeds: 33 minutes on 2 cores
    make paper PAPER=--fast       # 1 seed, fewer steps: minutes

Every method starts from the same Instruct checkpoint and draws the same number of
outputs of the same questions, at the demo's settings but for what `METHODS` says; the
reward models of the first iteration are trained once for all seeds. Out, in
--out: paper.json (every number), paper.md (the table), figure5.png (accuracy against
steps, by method), figure6.png (by iteration), figure7.png (pass@K and maj@K, Instruct
and RL). What is there already is not done again, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# A reward model this small is soon over-optimised: a lower rate, a stronger KL term,
# and more labels than the demo's.
JUDGED = ["--config.learning_rate=1e-4", "--config.kl_coef=0.3"]
OUTCOME, PROCESS, ITERATIVE = "GRPO, reward model", "GRPO + PS", "GRPO, iterative"
# label in figures → flags beyond the defaults
METHODS = {
    "RFT": ["--config.method=rft"],
    "Online RFT": ["--config.method=online_rft"],
    # at 1e-3 DPO unlearns both outputs of a pair
    "DPO": ["--config.method=dpo", "--config.learning_rate=1e-4"],
    "PPO": ["--config.method=ppo"],
    "GRPO": ["--config.method=grpo"],
    OUTCOME: ["--config.method=grpo", "--config.rewards.functions=model", *JUDGED],
    PROCESS: ["--config.method=grpo_process", *JUDGED],
    ITERATIVE: ["--config.method=grpo_iterative", "--config.iterations=3", *JUDGED],
}
SET = "sums/chain"
Json = dict[str, Any]
Job = tuple[Path, list[str]]  # its work directory, its flags


def main() -> None:
    flags = parse()
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    instruct = out / "instruct"
    run(
        instruct,
        ["--config.method=sft", f"--config.sft_steps={flags.sft_steps}"],
        flags,
    )
    runs: dict[str, list[Path]] = {label: [] for label in METHODS}
    first: list[Job] = []
    then: list[Job] = []
    for seed in range(flags.seeds):
        for label, extra in METHODS.items():
            name = label.lower().replace(" ", "").replace(",", "-").replace("+", "-")
            runs[label].append(out / f"{name}-{seed}")
            arguments = [*extra, f"--config.seed={seed}"]
            arguments += [f"--config.sft_steps={flags.sft_steps}"]
            arguments += [f"--config.reward_model.questions={flags.labelled}"]
            arguments += [f"--config.reward_model.steps={flags.reward_steps}"]
            arguments += ["--accept_changes"]  # what is copied is another run's
            trains = label in (OUTCOME, PROCESS) and not seed
            (first if trains else then).append((runs[label][-1], arguments))
    for workdir, _ in first + then:
        copy(instruct, workdir, "checkpoints/sft")
    side_by_side(first, flags)
    for label, judge in ((OUTCOME, OUTCOME), (PROCESS, PROCESS), (ITERATIVE, OUTCOME)):
        for workdir in runs[label]:
            copy(runs[judge][0], workdir, "checkpoints/reward-1", "labels-1.jsonl")
    then.sort(key=lambda job: "iterative" not in job[0].name)  # the longest first
    side_by_side(then, flags)
    results = collect(runs, flags) | {"passes": flags.passes}
    results["figure7"] = {
        "Instruct": pass_and_majority(instruct, flags),
        "RL": pass_and_majority(runs["GRPO"][0], flags),
    }
    (out / "paper.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (out / "paper.md").write_text(text + "\n")
    draw(results, out)
    print(f"\n{text}\n\nwritten to {out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", default="runs/paper")
    add("--fast", action="store_true", help="1 seed, 24 steps")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=60)
    add("--sft-steps", dest="sft_steps", type=int, default=600)
    add("--questions", type=int, default=500, help="of an evaluation")
    flags = parser.parse_args()
    flags.samples, flags.passes = 64, 250
    flags.labelled, flags.reward_steps = 4096, 600
    if flags.fast:
        flags.out = flags.out.rstrip("/") + "-fast"
        flags.seeds, flags.steps, flags.questions = 1, 24, 300
        flags.samples, flags.passes = 16, 100
        flags.labelled, flags.reward_steps = 1024, 150
    flags.every = max(1, flags.steps // 10)
    return flags


def copy(source: Path, workdir: Path, *names: str) -> None:
    """Gives a run what another has made, as if it had done it itself."""
    for name in names:
        if (workdir / name).exists():
            continue
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, workdir / name)
        else:
            shutil.copy(source / name, workdir / name)


def side_by_side(jobs: list[Job], flags: argparse.Namespace) -> None:
    """All runs, one on each core: models this small are no faster on two."""
    cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    # Where a process cannot be pinned (macOS), they share all cores.
    pinned = hasattr(os, "sched_getaffinity")
    for core in sorted(os.sched_getaffinity(0)) if pinned else [None] * 2:
        cores.put(core)

    def one(job: Job) -> None:
        core = cores.get()
        try:
            run(*job, flags, log=job[0] / "log.txt", core=core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        try:
            list(pool.map(one, jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run(
    workdir: Path,
    arguments: list[str],
    flags: argparse.Namespace,
    log: Path | None = None,
    core: int | None = None,
) -> None:
    """One run of train.py, unless it is done; with a log, what it prints goes there."""
    if (workdir / "results.json").exists():
        return
    begin = time.perf_counter()
    print(f"{workdir.name}: starts", flush=True)
    command = [sys.executable, "train.py", "--config=configs/tiny.py"]
    command += [f"--workdir={workdir.resolve()}", f"--config.rl_steps={flags.steps}"]
    command += [f"--config.data.eval={SET}", f"--config.eval.every={flags.every}"]
    command += [f"--config.eval.questions={flags.questions}", *arguments]
    options: Json = {}
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        options = {"stdout": log.open("a"), "stderr": subprocess.STDOUT}
    if core is not None:
        options["preexec_fn"] = lambda: os.sched_setaffinity(0, {core})
    done = subprocess.run(command, cwd=ROOT, check=False, **options)
    if done.returncode:
        where = f"; see {log}" if log else ""
        raise SystemExit(
            f"error: {' '.join(command)} ended with {done.returncode}{where}"
        )
    print(f"{workdir.name}: {time.perf_counter() - begin:.0f} s", flush=True)


def collect(runs: dict[str, list[Path]], flags: argparse.Namespace) -> Json:
    """Every run's curve and its last accuracies."""
    methods: Json = {}
    start: Json = {}
    for label, workdirs in runs.items():
        curves, last, outputs = [], [], 0.0
        for workdir in workdirs:
            lines = (workdir / "metrics.jsonl").read_text().splitlines()
            rows = [r for r in map(json.loads, lines) if r["stage"] == "rl"]
            key = f"eval/{SET}/greedy_accuracy"
            curves.append([[r["step"], r[key]] for r in rows if key in r])
            results = json.loads((workdir / "results.json").read_text())["sets"][SET]
            last.append({mode: results["rl"][mode] for mode in ("greedy", "sampled")})
            start = results["instruct"]
            outputs = len(rows)
        curves = [[[0, start["greedy"]["accuracy"]], *curve] for curve in curves]
        methods[label] = {"steps": outputs, "curves": curves, "last": last}
    return {
        "set": SET,
        "questions": flags.questions,
        "seeds": flags.seeds,
        "instruct": start,
        "methods": methods,
    }


def pass_and_majority(workdir: Path, flags: argparse.Namespace) -> Json:
    """pass@K and maj@K of a run's newest model at temperature 1."""
    from grpo_jax.evaluation.comparison import measure_set
    from grpo_jax.evaluation.generate_answers import AnswerSettings
    from grpo_jax.training.run import load_run
    from grpo_jax.training.work_directory import read_config

    file = workdir / "pass.json"
    if file.exists():
        return json.loads(file.read_text())
    model, params, tokenizer = load_run(workdir)
    config = read_config(workdir)
    settings = AnswerSettings(
        template=config.data.template,
        instruction=config.data.instruction,
        max_new_tokens=config.max_new_tokens,
        questions=flags.passes,
        samples=flags.samples,
        batch=128,
    )
    measured = measure_set(model, params, tokenizer, SET, settings)
    sampled = measured.result["sampled"]
    result = {"pass@k": sampled["pass@k"], "maj@k": sampled["maj@k"]}
    file.write_text(json.dumps(result))
    return result


def table(results: Json) -> str:
    """Accuracy in % at the end, mean over seeds ± the seeds' standard error."""
    start = results["instruct"]
    rows = [
        ("Instruct", start["greedy"]["accuracy"], 0, start["sampled"]["accuracy"], 0)
    ]
    for label, method in results["methods"].items():
        cells = []
        for mode in ("greedy", "sampled"):
            values = np.array([last[mode]["accuracy"] for last in method["last"]])
            error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
            cells += [values.mean(), error]
        rows.append((label, *cells))
    lines = ["| method | greedy | temperature 1 |", "|---|---|---|"]
    for label, greedy, g_error, sampled, s_error in rows:
        cells = [f"{100 * x:.1f}" for x in (greedy, sampled)]
        errors = [f" ± {100 * e:.1f}" if e else "" for e in (g_error, s_error)]
        lines.append(f"| {label} | {cells[0]}{errors[0]} | {cells[1]}{errors[1]} |")
    return "\n".join(lines)


def draw(results: Json, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"figure.dpi": 110, "font.size": 10, "axes.spines.top": False}
    plt.rcParams |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    seeds = results["seeds"]
    ylabel = "greedy accuracy in %, in-domain"

    def curve(axes, label: str, **options: Any) -> None:
        curves = np.array(results["methods"][label]["curves"])
        values = 100 * curves[..., 1]
        steps, mean = curves[0, :, 0], values.mean(0)
        line = axes.plot(steps, mean, label=label, marker=".", **options)[0]
        if len(values) > 1:
            low, high = values.min(0), values.max(0)
            axes.fill_between(
                steps, low, high, color=line.get_color(), alpha=0.12, lw=0
            )

    @contextlib.contextmanager
    def figure(number: int, title: str, **legend: Any):
        drawing, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
        yield axes
        axes.set_title(f"Figure {number} in miniature: {title}, n {n}")
        axes.legend(fontsize=8, **legend)
        drawing.savefig(out / f"figure{number}.png")

    spread, n = f"mean and range of {seeds} seeds", results["questions"]
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    with figure(5, spread, **beside) as axes:
        for label in results["methods"]:
            if label != ITERATIVE:
                curve(axes, label)
        axes.set(xlabel="steps of 512 outputs", ylabel=ylabel)

    with figure(6, spread) as axes:
        for label in (ITERATIVE, OUTCOME, "GRPO"):
            curve(axes, label)
        steps = results["methods"][ITERATIVE]["steps"]
        for i in (1, 2):
            axes.axvline(steps * i / 3, color="gray", lw=1, ls="--")
        xlabel = "steps of 512 outputs; an iteration ends at each line"
        axes.set(xlabel=xlabel, ylabel=ylabel)

    n = results["passes"]
    with figure(7, "GRPO's first seed") as axes:
        for model, color in (("Instruct", "tab:gray"), ("RL", "tab:blue")):
            for measure, style in (("pass@k", "-"), ("maj@k", "--")):
                points = results["figure7"][model][measure]
                ks, values = (
                    [int(k) for k in points],
                    [100 * v for v in points.values()],
                )
                name = f"{model}, {measure.replace('k', 'K')}"
                axes.plot(ks, values, style, color=color, label=name, marker=".")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="K", ylabel="accuracy in %, temperature 1")


if __name__ == "__main__":
    main()
