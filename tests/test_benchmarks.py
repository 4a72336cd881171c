"""The benchmark commands, on a folder made on the spot: what they print adds up."""

import json
import string
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from grpo_jax.checkpoints.huggingface.weights import save_pretrained
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The options for a small model and a file of questions."""
    folder = tmp_path_factory.mktemp("benchmarks")
    tokenizer = Tokenizer.from_alphabet(string.printable, chat_template=TEMPLATE)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        ffn=32,
        max_positions=512,
    )
    model = Decoder(config)
    params = model.init(jax.random.key(0))
    save_pretrained(model, params, folder / "model", tokenizer=tokenizer)
    lines = [json.dumps({"question": f"{i} + {i}?"}) for i in range(12)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return [
        "--model",
        str(folder / "model"),
        "--prompts",
        str(folder / "questions.jsonl"),
    ]


def lines_of(script: str, *arguments: str) -> list[dict]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_whole_step_is_its_parts(given):
    options = ["--questions", "2", "--group", "4", "--max-new", "8", "--steps", "2"]
    options += ["--learning-rate", "1e-2", "--row-length", "256"]
    found = lines_of("grpo_step.py", *given, *options)
    assert [x["step"] for x in found] == [1, 2]
    for x in found:
        parts = x["generate_seconds"] + x["update_seconds"]
        assert parts == pytest.approx(x["seconds"], rel=1e-3)
        assert 0 < x["completion_tokens"] <= 2 * 4 * 8
    # An update went before each, so that π_θ has moved away from π_ref, a little.
    assert 0 < found[0]["kl"] < found[1]["kl"]
    assert found[0]["peak_rss_gb"] <= found[1]["peak_rss_gb"]


def test_too_few_questions_are_counted(given):
    command = [sys.executable, str(BENCHMARKS / "grpo_step.py"), *given]
    done = subprocess.run(
        [*command, "--steps", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode and "12 questions, 16 wanted" in done.stderr


def test_the_sampler_counts_its_tokens(given):
    options = ["--slots", "4", "--group", "2", "--new", "6", "--rows", "16"]
    found = lines_of("sampler.py", *given, *options, "--ragged-new", "8")
    fixed, ragged = ([x for x in found if x["case"] == c] for c in ("fixed", "ragged"))
    assert len(fixed) == len(ragged) == 3
    assert all(x["tokens"] == 4 * 6 and x["occupancy"] == 1 for x in fixed)
    assert all(0 < x["tokens"] <= 16 * 8 for x in ragged)


def test_the_update_is_measured_against_the_peak(given):
    sizes = ["--questions", "2", "--group", "4", "--groups", "2", "4", "--prompt", "5"]
    sizes += ["--new", "8", "--row-length", "32", "--size", "256"]
    sizes += ["--vocabularies", "512", "1024", "--repeats", "2"]
    found = lines_of("update.py", *given[:2], *sizes)
    by_case = {c: [x for x in found if x["case"] == c] for c in ("update", "group")}
    peak = next(x for x in found if x["case"] == "peak")
    (update,), (group,) = by_case["update"], by_case["group"]
    assert (update["G"], group["G"]) == (4, 2)
    assert update["tokens"] > group["tokens"]
    share = update["gflops"] / peak["gflops"]
    assert update["share_of_peak"] == pytest.approx(share, rel=1e-3)
    held = [x for x in found if x["case"] == "vocabulary"]
    assert [x["V"] for x in held] == [512, 1024]


def test_a_bound_is_what_was_measured_and_nothing_else():
    sizes = ["--slots", "2", "--outputs", "4", "--group", "2", "--new", "10"]
    product, reading, *turns, step = lines_of("roofline.py", *sizes, "--repeats", "1")
    assert product["parameters"] == 134_515_008
    assert [x["slots"] for x in turns] == [2, 4]
    for x in turns:
        bound = x["slots"] / (x["products_ms"] + x["reading_ms"]) * 1e3
        assert x["tokens_per_second"] == pytest.approx(bound, rel=1e-3)
    # 4 rows have written 5 each; 2 prompts of 110 are read once: 30 × 2 × 192 × 4 B.
    read = (4 * 5 + 2 * 110) * 46080 / reading["gbytes"] / 1e6
    assert turns[1]["reading_ms"] == pytest.approx(read, rel=1e-3)
    update = 8 * product["parameters"] * (40 + 220) / product["gflops"] / 1e9
    assert step["update_seconds"] == pytest.approx(update, rel=1e-3)
    seconds = 40 / step["tokens_per_second"]
    turn = turns[1]["products_ms"] + turns[1]["reading_ms"]
    assert seconds == pytest.approx(update + 10 * turn / 1e3, rel=1e-3)


def test_two_processes_hold_half_the_weights_each_and_write_them_back():
    *found, bits = lines_of("weights.py", "--gigabytes", "0.02")
    assert bits == {"case": "bits", "same": True}
    cases = [(x["case"], x["process"]) for x in found]
    assert cases == [("load", 0), ("write", 0), ("load", 1), ("write", 1)]
    for x in found:
        ratio = (x["peak_gb"] - x["tensor_gb"]) / x["share_gb"]
        assert x["ratio"] == pytest.approx(ratio, rel=1e-3)
        assert x["share_gb"] == pytest.approx(0.01, rel=0.2)  # norms are on both


def test_the_sandbox_is_measured_on_programs_that_ran():
    sizes = ["--programs", "6", "--repeats", "2", "--workers", "2"]
    start, *found, outside = lines_of("sandbox.py", *sizes)
    assert (start["case"], outside["case"]) == ("start", "outside")
    assert [x["case"] for x in found] == ["print"] * 2 + ["numpy"] * 2 + ["sympy"] * 2
    for x in found:
        rate = x["programs_per_second"] * x["seconds"]
        assert rate == pytest.approx(x["programs"], rel=1e-3) and x["programs"] == 6
        assert x["inside_seconds"] * 6 < 2 * x["seconds"]
