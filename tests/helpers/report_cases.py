"""Work directories for the report's tests: made up, with friendly or hostile text."""

import html.parser
import json
from pathlib import Path

from grpo_jax.evaluation.statistics import wilson_interval

RAN = "document.documentElement.dataset.ran='yes'"
HOSTILE = (
    f"</script><script>{RAN}</script><!-- <img src=x onerror={RAN}>"
    f"\"'><svg onload={RAN}> javascript:{RAN} &lt;b&gt; ]]> <!--<script> "
    "\u2028\u2029 \ud800 \x1b[2J\x07\x00 \u202egnp.exe \u2066 \U000e0041 {{7*7}} ${1+1}"
)


def measured(accuracy, n):
    return {"accuracy": accuracy, "ci95": wilson_interval(accuracy, n), "too_long": 0}


def completion(reward, advantage, tokens, **more):
    n = len(tokens)
    found = {"completion": "".join(tokens), "reward": reward, "advantage": advantage}
    known = {"logps": [-0.5] * n, "ref_logps": [-0.5 - i / 4 for i in range(n)]}
    return {**found, "finished": True, "tokens": tokens, **known, **more}


def write_case(folder: Path, text: str, steps: int = 20) -> Path:
    """A finished run whose every name and text is `text`, up to a number."""
    folder.mkdir(parents=True, exist_ok=True)
    models = [f"{text}1", f"{text}2"]
    pass_at = {"samples": 2, "pass@k": {"1": 0.5, "2": 0.75}, "maj@k": {"2": 0.5}}
    row = {
        models[0]: {"n": 200, "greedy": measured(0.25, 200)},
        models[1]: {"n": 200, "greedy": measured(0.5, 200)},
    }
    row[models[0]]["sampled"] = measured(0.125, 200) | pass_at
    row[models[1]]["sampled"] = measured(0.625, 200) | pass_at
    results = {
        "models": models,
        "settings": {"temperature": 0.7},
        "sets": {text: {"in_domain": True, **row}, "gsm8k": {"in_domain": False} | row},
    }
    config = {"name": text, "method": text, "seed": text, "rl_steps": 20}
    config |= {f"{text}3": text, "inner": {text: text}}
    metrics = [
        {"step": i, "stage": stage, "reward": i / 7, "kl": 0.25, f"eval/{text}": 0.5}
        | {f"rewards/{text}/mean": -1.0 * i, f"{text}4": 1.0}
        for stage in (text, "rl")
        for i in range(1, steps + 1)
    ]
    samples = [
        {
            "step": i,
            "stage": "rl",
            "question": f"{text}\n{i}",
            "answer": text,
            "completions": [
                completion(1.0, 0.5, [text, "a", "b"]),
                completion(0.0 if i == 2 else 1.0, [-2.0, 0.0], [text, "c"]),
                {"completion": text, "reward": None, "advantage": None},
            ],
        }
        for i in range(1, 4)
    ]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", samples)
    return folder


def write_lines(file: Path, rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(html.parser.HTMLParser):
    """A page as a browser's parser sees it."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self.cells: list[str] = []
        self._inside = self._id = ""
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside, self._id = tag, dict(attrs).get("id") or ""
        if tag in ("td", "th"):
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._inside = ""
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[self._id] = self.scripts.get(self._id, "") + data
            return
        self.texts.append(data)
        if self._in_cell:
            self.cells[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts["data"])
