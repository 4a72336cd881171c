"""report.html: its numbers are the run's, and no text becomes anything but text."""

import json
import pathlib
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_cases import HOSTILE, Page, completion, measured, write_case, write_lines

from grpo_jax import report
from grpo_jax.report.__main__ import main
from grpo_jax.report.charts import BOTTOM, LEFT, RIGHT, TOP, downsample_curve
from grpo_jax.report.comparison import (
    accuracy_table,
    comparison_remarks,
    paired_table,
)
from grpo_jax.report.safe_text import make_visible
from grpo_jax.report.tables import to_markdown


def read(workdir) -> Page:
    return Page(report.write_report(workdir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def friendly(tmp_path_factory) -> Page:
    return read(write_case(tmp_path_factory.mktemp("friendly") / "run", "name"))


def test_the_curves_are_those_of_metrics_jsonl(friendly):
    """The script's points and the drawn ones: both are the metrics."""
    reward, other = friendly.data["charts"][0]["lines"]
    assert reward["x"] == list(range(1, 21))
    assert reward["y"] == pytest.approx([i / 7 for i in range(1, 21)], rel=1e-5)
    assert other["label"] == "rewards/name/mean"
    assert other["y"] == [-float(i) for i in range(1, 21)]
    drawn = [a for t, a in friendly.elements if t == "polyline"][0]["points"]
    points = [tuple(map(float, p.split(","))) for p in drawn.split()]
    across = [(x - LEFT) / (RIGHT - LEFT) for x, _ in points]
    assert across == pytest.approx([i / 19 for i in range(20)], abs=1e-3)
    assert all(TOP <= y <= BOTTOM for _, y in points)
    up = [a[1] - b[1] for a, b in zip(points, points[1:], strict=False)]
    assert max(up) - min(up) < 0.21 and min(up) > 0  # evenly up; y is from the top


def test_curves_that_are_one_are_drawn_as_one(tmp_path):
    rows = [
        {"step": i, "stage": "rl", "reward": i, "rewards/a/mean": i} for i in (1, 2)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (line,) = read(tmp_path).data["charts"][0]["lines"]
    assert line["label"] == "reward = rewards/a/mean"


def test_the_comparison_is_evaluates(tmp_path):
    """Every figure of the Markdown table stands in a cell of its own."""
    row = {
        m: {"n": 200, "greedy": measured(a, 200)} for m, a in [("x", 0.4), ("y", 0.7)]
    }
    results: dict[str, Any] = {"models": ["x", "y"], "settings": {"temperature": 1.0}}
    results["sets"] = {"gsm8k": {"in_domain": True, **row}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    cells = [" ".join(cell.split()) for cell in read(tmp_path).cells]
    before, after = re.findall(r"[\d.]+ ± [\d.]+", to_markdown(accuracy_table(results)))
    at = cells.index(before)
    assert cells[at - 2 : at + 3] == [
        "gsm8k (in-domain)",
        "200",
        before,
        after,
        "+30.0",
    ]
    assert "DeepSeekMath-RL 7B" in cells  # published figures, for a set that has any


def test_the_paired_test_stands_below(tmp_path):
    """As in the Markdown; tests that no evaluation writes cost nothing else."""
    row = {
        m: {"n": 9, "tool_greedy": measured(a, 9)} for m, a in [("x", 0.4), ("y", 0.7)]
    }
    test = {"set": "s", "measure": "tool_greedy", "models": ["x", "y"], "p": 0.03125}
    test |= {"difference": 0.3, "ci95": [-0.1, 0.5], "test": "exact McNemar"}
    results: dict[str, Any] = {"models": ["x", "y"], "sets": {"s": row}}
    results["paired"] = [{"ci95": 3, "p": "0", "models": {}}, 3, test]
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = read(tmp_path)
    assert "with programs, greedy" in page.texts
    assert page.cells.count("+30.0") == 1  # the change
    shown = ["s", "with programs, greedy", "x → y", "+30.0 [−10.0, +50.0]", "0.031"]
    assert page.cells[-6:] == [*shown, "exact McNemar"]
    assert to_markdown(paired_table(results)).endswith(
        "| " + " | ".join(page.cells[-6:]) + " |"
    )


def test_remarks_stand_below_the_comparison(tmp_path):
    cut = {"greedy": measured(0.5, 9) | {"cut_off": 0.25, "too_long": 2}}
    results = {"models": ["<x>"], "sets": {"s": {"<x>": cut}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = read(tmp_path)
    for remark in comparison_remarks(results):
        assert remark in page.texts
    assert "<x>, greedy: completions cut off: s 25 %" in page.texts


def test_samples_are_shown_failures_first(friendly):
    group = friendly.data["groups"][1]
    assert group["step"] == 2 and group["of"] == 3 and group["failed"] == 2
    assert [c["reward"] for c in group["completions"]] == [None, 0.0, 1.0]
    assert group["reward"] == 0.5  # of those that have one
    assert group["completions"][2]["tokens"] == ["name", "a", "b"]
    assert group["completions"][2]["ref_logps"] == [-0.5, -0.75, -1.0]
    assert group["completions"][1]["advantage"] == [-2.0, 0.0]


def test_no_element_and_no_attribute_comes_from_data(friendly, tmp_path):
    """Hostile text everywhere gives the elements that friendly text gives."""
    hostile = read(write_case(tmp_path / "run", HOSTILE))

    def outline(page):
        spoken = ("aria-label",)  # what is drawn, in words: escaped, one attribute
        return [
            (tag, {k: "" if k in spoken else v for k, v in attrs.items()})
            for tag, attrs in page.elements
        ]

    assert sorted(map(str, outline(hostile))) == sorted(map(str, outline(friendly)))
    tokens = hostile.data["groups"][0]["completions"][-1]["tokens"]
    assert tokens[0] == make_visible(HOSTILE, 400) and "</script><script>" in tokens[0]
    assert any(HOSTILE[:60] in text for text in hostile.texts)
    assert hostile.scripts[""] == friendly.scripts[""]
    source = (tmp_path / "run/report.html").read_bytes()
    assert source.count(b"<script") == source.count(b"</script>") == 2
    text = source.decode("utf-8")  # strict: no lone surrogate got through
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text
    )


def test_the_page_asks_for_nothing_and_runs_only_its_own(friendly):
    (policy,) = (a["content"] for t, a in friendly.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "*" not in policy
    names = {name for _, attrs in friendly.elements for name in attrs}
    assert not names & {"src", "href", "srcset", "action", "style", "data"}
    assert not [name for name in names if name.startswith("on")]


def test_damaged_files_cost_what_is_damaged_only(tmp_path):
    good = {"step": 2, "stage": "rl", "reward": 0.5}
    lines = [
        '{"step": 1, "stage": "rl", "reward": NaN, "kl": Infinity}',
        json.dumps(good),
        '{"step": 3, "stage": ["rl"], "reward": 1}',
        '{"step": "3", "stage": "rl", "reward": 1}',
        '{"step": 3, "stage": "rl", "reward": "1", "kl": 1' + "0" * 400 + "}",
        "[" * 100_000,
        '"rl"',
        "\x00\xff",
        '{"step": 4, "stage": "rl", "rew',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="latin-1")
    broken: list[Any] = [{"completions": x} for x in (3, None, "x", [1, None, []])]
    odd = {"tokens": ["a", 3, None], "logps": [1], "mask": "no", "reward": True}
    broken.append(
        {"completions": [odd, {"completion": 3, "reward": float("nan")}], "step": []}
    )
    write_lines(tmp_path / "samples.jsonl", broken)
    (tmp_path / "results.json").write_text('{"models": {}, "sets": {"a": 3}}')
    (tmp_path / "config.json").write_text('[{"name": 3}')
    data = read(tmp_path).data
    assert [c["lines"] for c in data["charts"]] == [
        [{"label": "reward", "x": [2.0], "y": [0.5]}]
    ]
    last = data["groups"][-1]["completions"]
    assert {"tokens": ["a", "", ""], "reward": None}.items() <= last[0].items()
    assert "logps" not in last[0] and last[1]["text"] == ""


KEYS = (
    "completions sets models settings temperature n greedy sampled accuracy ci95 "
    "too_long cut_off paper few_shot tool_sampled in_domain pass@k maj@k 2 rl gsm8k "
    "method rl_steps step stage reward kl "
    "tokens logps mask advantage question"
).split()
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ANY_JSON = st.recursive(
    ODD | st.sampled_from(KEYS),
    lambda x: (
        st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(KEYS), x, max_size=6)
    ),
    max_leaves=25,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_json_makes_a_page(tmp_path, data):
    """Whatever the files hold: also what no run ever wrote."""
    for name in ("results.json", "config.json", "metrics.jsonl", "samples.jsonl"):
        value = data.draw(ANY_JSON)
        if name == "results.json" and isinstance(value, dict):
            value = {"models": ["rl", "gsm8k"], "sets": value} | value
        if name == "samples.jsonl" and isinstance(value, list):
            value = {"completions": value}
        (tmp_path / name).write_text(json.dumps(value) + "\n")
    assert "groups" in read(tmp_path).data


def test_a_curve_is_thinned_to_means_of_its_stretches():
    values = [float(i * i % 97) for i in range(10_000)]
    steps, means = downsample_curve(list(range(1, 10_001)), values, 240)
    assert len(steps) == 240 and steps[-1] == 10_000
    sizes = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    assert sum(s * m for s, m in zip(sizes, means, strict=True)) == pytest.approx(
        sum(values)
    )


def test_a_long_run_makes_a_small_page(tmp_path):
    """10,000 steps, groups of 20 outputs of 300 tokens: under 5 MB, the last one in."""
    names = [f"rewards/f{i}/mean" for i in range(5)] + ["reward", "kl", "grad_norm"]
    rows = ({"step": i, "stage": "rl"} | dict.fromkeys(names, i) for i in range(10_000))
    write_lines(tmp_path / "metrics.jsonl", rows)
    outputs = [completion(0.5, -0.25, ["token"] * 300)] * 20
    line = json.dumps({"stage": "rl", "completions": outputs})
    with open(tmp_path / "samples.jsonl", "w") as file:
        for i in range(1, 301):
            file.write(f'{{"step": {i}, {line[1:]}\n')
    page = read(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    steps = [g["step"] for g in page.data["groups"]]
    assert steps[-1] == 300 and len(steps) >= 10 and steps == sorted(set(steps))
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    assert max(gaps) <= 2 * 300 / len(steps)  # from all of the run


def test_huge_texts_are_cut(tmp_path):
    huge = "\u202e" * 3_000_000
    outputs = [completion(0.0, 1.0, [huge] * 3), {"completion": huge}]
    write_lines(
        tmp_path / "samples.jsonl", [{"question": huge, "completions": outputs}]
    )
    page = read(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 200_000
    assert "⟨U+202E⟩" in page.data["groups"][0]["question"]


def test_a_fault_is_one_line_and_never_ends_a_run(tmp_path, capsys):
    report.try_write_report(tmp_path / "absent")
    shown = capsys.readouterr().err
    assert shown.startswith("report.html: not written (FileNotFoundError")
    assert shown.count("\n") == 1


def test_the_command_writes_the_page_or_says_why_not(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no work directory .none of config.json"):
        main([str(tmp_path)])
    (tmp_path / "config.json").write_text('{"method": "grpo"}')
    main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert "No metrics yet." in (tmp_path / "report.html").read_text()


def test_texts_can_be_read_on_every_colour():
    """WCAG's 4.5 to 1, in light and dark, also on a token of full colour."""
    css = (pathlib.Path(report.__file__).parent / "report.css").read_text()
    themes = [
        {name: bytes.fromhex(x) for name, x in re.findall(r"--(\w+): #(\w{6})", block)}
        for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(themes) == 2

    def luminance(color):
        parts = [c / 255 for c in color]
        r, g, b = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(a, b):
        low, high = sorted([luminance(a), luminance(b)])
        return (high + 0.05) / (low + 0.05)

    (share,) = {float(x) for x in re.findall(r"\.[ud]8 \{.* (\d+)%", css)}
    for theme in themes:
        for ground in ("page", "card", "tool"):
            for ink in ("text", "quiet"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        for hue in ("up", "down"):
            mixed = [
                (share * a + (100 - share) * b) / 100
                for a, b in zip(theme[hue], theme["card"], strict=True)
            ]
            assert contrast(theme["text"], mixed) >= 4.5, hue
        for i in range(5):
            assert contrast(theme[f"line{i}"], theme["card"]) >= 3  # graphics
