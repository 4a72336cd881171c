"""A template that reads the clock: the same prompts on another day."""

import datetime
import json

import jax
import pytest
from small_runs import ROOT, small_config, write_questions

from grpo_jax import evaluate
from grpo_jax.checkpoints.huggingface.weights import save_pretrained
from grpo_jax.data.prompts import encode_sft
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError
from grpo_jax.evaluation import generate_answers
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.train import train_run
from grpo_jax.training import run_comparison
from grpo_jax.training.run import open_run
from grpo_jax.training.start_time import start_time

CLOCK = (
    "{% for m in messages %}{{ m.content }}{% if loop.first %}"
    "{{ strftime_now(' %Y-%m-%d %H:%M:%S=') }}{% endif %}{% endfor %}"
)
LONG_AGO = datetime.datetime(2001, 2, 3, 4, 5, 6)


def test_a_start_is_kept_and_told_again(tmp_path):
    before = datetime.datetime.now() - datetime.timedelta(seconds=1)
    first = start_time(tmp_path)
    assert before <= first and not list(tmp_path.iterdir())  # only looked at
    file = tmp_path / "started.json"
    file.write_text(json.dumps({"started": LONG_AGO.isoformat()}))
    assert start_time(tmp_path, keep=True) == start_time(tmp_path) == LONG_AGO
    # A start that came to nothing is no start.
    now = start_time(tmp_path, keep=True, again=True)
    assert now >= before and start_time(tmp_path, keep=True) == now


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"started": 3}', '{"started": "x"}'])
def test_a_damaged_start_is_one_line(text, tmp_path):
    (tmp_path / "started.json").write_text(text)
    with pytest.raises(GrpoError, match='started.json: expected {"started": "2026'):
        start_time(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder whose chat template writes the time."""
    folder = tmp_path_factory.mktemp("models") / "clock"
    tokenizer = Tokenizer.from_alphabet("0123456789+=?# \n-:", chat_template=CLOCK)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=2,
        head_dim=8, ffn=16,
    )  # fmt: skip
    decoder = Decoder(config)
    weights = decoder.init(jax.random.key(3))
    save_pretrained(decoder, weights, folder, tokenizer=tokenizer)
    return folder


def test_a_run_and_its_evaluation_ask_as_on_its_first_day(model, tmp_path, monkeypatch):
    cache = str(ROOT / ".pytest_cache" / "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    questions, workdir = write_questions(tmp_path / "sums.jsonl"), tmp_path / "run"
    sizes = {f"model.{name}": 0 for name in ("layers", "width", "heads", "ffn")}
    settings = sizes | {
        "model.path": str(model),
        "data.template": "chat",
        "data.instruction": "none",
        "data.sft": questions,
        "data.train": questions,
        "data.eval": questions,
        "eval.questions": 8,
        "eval.samples": 0,
        "sft_steps": 1,
        "rl_steps": 0,
    }
    train_run(small_config(settings), workdir)
    file = workdir / "started.json"
    today = json.loads(file.read_text())["started"]
    assert today[:3] == f"{datetime.datetime.now():%Y}"[:3]
    # As if that had been another day: the run is resumed, and evaluated.
    file.write_text(json.dumps({"started": LONG_AGO.isoformat()}))
    completions = workdir / "completions"
    for log in completions.rglob("*.jsonl"):
        log.unlink()
    (workdir / "results.json").unlink()
    train_run(small_config(settings | {"sft_steps": 2}), workdir, accept_changes=True)
    run = open_run(workdir)
    assert run.tokenizer.now == LONG_AGO
    asked = run_comparison.settings_of(run.config)
    tokenizer = Tokenizer.from_folder(model)
    tokenizer.now = LONG_AGO
    expected = generate_answers.load_prompts(tokenizer, questions, asked)
    example = expected.examples[0]
    prompt = expected.prompts[0]
    assert prompt and tokenizer.decode(prompt).endswith(" 2001-02-03 04:05:06=")
    tokens, _ = encode_sft(run.tokenizer, example, instruction="none")
    assert tokens[: len(prompt)] == prompt
    out = tmp_path / "out"
    words = ["--models", str(workdir), "--sets", questions, "--out", str(out)]
    evaluate.main([*words, *"--questions 8 --samples 0 --max_new_tokens 12".split()])
    logs = [*completions.rglob("*.jsonl"), *out.rglob("*.cot.greedy.jsonl")]
    assert len(logs) == 2
    for log in logs:
        written = json.loads(log.read_text().splitlines()[0])["settings"]
        assert written["prompts"] == expected.digest()


def test_an_evaluation_goes_on_with_the_day_it_began(model, tmp_path, monkeypatch):
    cache = str(ROOT / ".pytest_cache" / "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    questions, out = write_questions(tmp_path / "sums.jsonl"), tmp_path / "out"
    words = ["--models", str(model), "--sets", questions, "--out", str(out)]
    words += "--questions 8 --samples 0 --max_new_tokens 12".split()
    words += ["--instruction", "none"]
    evaluate.main(words)
    file = out / "started.json"
    started = datetime.datetime.fromisoformat(json.loads(file.read_text())["started"])
    (log,) = out.rglob("*.cot.greedy.jsonl")
    before = log.read_bytes()
    tokenizer = Tokenizer.from_folder(model)
    tokenizer.now = started
    settings = generate_answers.AnswerSettings(instruction="none", questions=8)
    digest = generate_answers.load_prompts(tokenizer, questions, settings).digest()
    assert json.loads(before.splitlines()[0])["settings"]["prompts"] == digest
    evaluate.main(words)  # seconds later: by the clock these are other prompts
    assert log.read_bytes() == before
    assert json.loads(file.read_text())["started"] == started.isoformat()
