"""report.html in a real browser, without a window: its script works, no other runs."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from report_cases import HOSTILE, Page, completion, write_case, write_lines

from grpo_jax import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is on the path"
)


def browse(file: Path) -> tuple[Page, list[str]]:
    """The page after its scripts have run, and what the browser's console said."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [
        f"--user-data-dir={file.parent / 'browser'}",
        "--virtual-time-budget=3000",
    ]
    command = [str(CHROMIUM), *flags, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "</html>" in done.stdout, done.stderr
    return Page(done.stdout), [x for x in done.stderr.splitlines() if "CONSOLE" in x]


def drive(file: Path, script: str) -> tuple[Page, list[str]]:
    """The same after a script of the test's own; the page's policy would stop it."""
    text = file.read_text(encoding="utf-8")
    free = re.sub("<meta http-equiv=[^>]*>", "", text)
    note = "const note = (k, v) => { document.body.dataset[k] = String(v); };"
    end = f"<script>{{{note}{script}}}</script></body>"
    other = file.with_name("driven.html")
    other.write_text(free.replace("</body>", end), encoding="utf-8")
    return browse(other)


def notes(page: Page) -> dict[str, str | None]:
    """What a driven page's script noted: attributes of its body."""
    (body,) = (attrs for tag, attrs in page.elements if tag == "body")
    return body


def classes(page: Page, tag: str) -> Counter:
    return Counter(a.get("class", "") for t, a in page.elements if t == tag)


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    """One group: a program, what a tool answered, the rest; and a failure."""
    parts = [
        "So:\n",
        "```",
        "python\n",
        "print(1)\n",
        "```",
        "385",
        "\n",
        "Done",
        "<eos>",
    ]
    solved = completion(
        1.0,
        [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.5, 4.0],
        parts,
        mask=[1, 1, 1, 1, 1, 0, 0, 1, 1],
        old_logps=[-0.25] * 9,
        calls=1,
    )
    failed = completion(0.0, -2.0, ["no", "thing"], calls=2, failures=2)
    folder = tmp_path_factory.mktemp("tools") / "run"
    folder.mkdir()
    group = {"step": 7, "stage": "rl", "question": "q", "answer": "385"}
    write_lines(folder / "samples.jsonl", [{**group, "completions": [solved, failed]}])
    rows = [{"step": i, "stage": "rl", "reward": i / 8} for i in range(1, 6)]
    write_lines(folder / "metrics.jsonl", rows)
    return report.write_report(folder)


def test_the_console_tells_of_faults(tools):
    """Or the silence that the other tests ask for would say nothing."""
    _, said = drive(tools, "undefinedFunction();")
    assert any("undefinedFunction is not defined" in line for line in said)


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    file = report.write_report(write_case(tmp_path / "run", HOSTILE))
    page, said = browse(file)
    assert said == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "b", "iframe", "object", "link", "a", "form"}
    names = {name for _, attrs in page.elements for name in attrs}
    assert not [name for name in names if name.startswith("on") or name == "data-ran"]
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    shown = [t for t in page.texts if t.startswith("</script><script>")]
    # Three groups: a question, an answer and three completions each, and more.
    assert len(shown) >= 15
    assert classes(page, "article") == {"completion": 5, "completion failed": 4}


def test_a_policy_stops_scripts_that_are_not_the_pages(tools):
    """A second wall, were an element ever to get through."""
    text = tools.read_text().replace("</body>", "<script>let a = 1</script></body>")
    other = tools.with_name("foreign.html")
    other.write_text(text)
    _, said = browse(other)
    assert any("Content Security Policy" in line for line in said)


def test_tokens_are_coloured_by_their_advantage(tools):
    page, said = browse(tools)
    assert said == []
    # Scale: the largest but one in fifty of 0 0.5 1 1 1 1 2 2 4 is 2.
    spans = classes(page, "span")
    assert spans["d8"] == 2 + 1  # both tokens of −2, and the scale's end
    assert spans["u8"] == 1 + 1  # 4, and the scale's other end
    assert spans["u4 code"] == 4  # the program, 1.0
    assert spans["tool"] == 1
    text = "".join(page.texts)
    assert "output of a tool385\nDone<eos>" in text
    assert "reward 0 · Â −2 · 2 tokens · 2 programs, 2 failed" in text
    assert "9 tokens · 1 programSo:" in text
    assert text.index("nothing") < text.index("Done")  # failures first


def test_the_keyboard_reads_tokens_and_curves(tools):
    script = """
    const key = (at, key) => at.dispatchEvent(new KeyboardEvent("keydown", { key }));
    const said = () => document.getElementById("token").textContent;
    const solved = document.querySelectorAll(".text")[1];
    key(solved, "Home"); key(solved, "ArrowRight"); note("second", said());
    for (let i = 0; i < 4; i++) key(solved, "ArrowRight");
    note("tool", said());
    document.querySelector("input[value=kl]").click();
    note("kl", solved.querySelector("[data-i='8']").className);
    note("still", solved.querySelector("[data-i='5']").className);
    const chart = document.querySelector(".chart");
    key(chart, "End"); key(chart, "ArrowLeft");
    note("curve", chart.parentElement.querySelector(".readout").textContent);
    """
    page, said = drive(tools, script)
    assert said == []
    found = notes(page)
    # log π −0.5, log π_ref −0.75: e^-0.25 + 0.25 − 1 = 0.0288; ratio e^0.25 = 1.284.
    assert found["data-second"] == (
        'token 2 of 9 "```": Â 1 · log π/π_ref 0.25 · KL 0.0288 · '
        "π_old/π_sampler 1.284 · −log π 0.5"
    )
    assert found["data-tool"] == 'token 6 of 9 "385": written by a tool'
    assert (found["data-kl"], found["data-still"]) == ("d8", "at")
    assert found["data-curve"] == "step 4: reward 0.5"


def test_a_phone_shows_it_without_scrolling_sideways(tools, tmp_path):
    """360 px: nothing but tables is wider than the window, hostile text neither."""
    hostile = report.write_report(write_case(tmp_path / "run", HOSTILE + "x" * 500))
    for file in (tools, hostile):
        inner = re.sub("<meta http-equiv=[^>]*>", "", file.read_text("utf-8"))
        inner = inner.replace("&", "&amp;").replace('"', "&quot;")
        frame = tmp_path / "frame.html"
        frame.write_text(
            f'<!doctype html><html><body><iframe width="360" height="800" '
            f'srcdoc="{inner}"></iframe><script>onload = () => {{ const root = '
            "document.querySelector('iframe').contentDocument.documentElement; "
            "document.body.dataset.width = root.scrollWidth; }</script></body></html>",
            encoding="utf-8",
        )
        page, _ = browse(frame)
        assert int(notes(page)["data-width"] or 0) <= 360
