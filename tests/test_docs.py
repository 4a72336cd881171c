"""What the documents name is there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_every_test_that_reliability_names_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/reliability.md").read_text()))
    sources = "\n".join(f.read_text() for f in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", sources))
    assert len(named) > 60
    assert not named - defined


def test_the_readmes_short_programs_run():
    """The losses alone, and a model of one's own; the first needs SmolLM2."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    _, losses, model, _ = blocks
    for block in (losses, model):
        exec(block, {"__name__": "readme"})
