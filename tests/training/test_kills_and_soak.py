"""The short forms of `make chaos` and `make soak`."""

import re

import chaos
from chaos import Kill
from small_runs import SMALL
from soak import Moment, complaints, growth, soak

SETTINGS = SMALL | {
    "sft_steps": 6,
    "rl_steps": 6,
    "max_new_tokens": 6,
    "eval.questions": 8,
    "eval.batch": 8,
    "eval.samples": 0,
    "eval.every": 3,
    "data.eval": "sums/chain",
}


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    """kill -9 in a save, after a SIGTERM too short before, in the last evaluation."""
    kills = [
        Kill("save", 2, 0.5, None),
        Kill("reward", 6, 0.0, None, warned=True),
        Kill("evaluation", 2, 0.5, None),
    ]
    said = []
    chaos.chaos(
        tmp_path,
        SETTINGS,
        processes=1,
        kills=kills,
        say=lambda text, flush: said.append(text),
    )
    assert sum(text.startswith("kill ") for text in said) == 3, said
    # What was saved before the grace period that was too short stands: of step 4, or
    # where that was still being written of step 2.
    assert "after rl 5;" in said[2]
    log = (tmp_path / "killed.0.log").read_text()
    assert re.search("rl: resumed at step [24] of 6", log), log


def test_nothing_grows_in_a_run(tmp_path):
    """Of 60 small steps; time and memory take the long one to tell (`make soak`)."""
    moments = soak(tmp_path, 60, checkpoint_every=5, eval__every=10)
    found = growth(moments, 20)
    assert len(moments) == 60 and moments[0].programs > 5
    for name in ("files", "programs"):
        assert found[name][1] <= found[name][0], found
    # What is compiled once more each step, or kept open, is found.
    leaky = [Moment(1.0, 2**30 + i * 2**20, i, i, 1) for i in range(100)]
    told = complaints(growth(leaky, 10))
    assert [text.partition(":")[0] for text in told] == [
        "resident",
        "files",
        "programs",
    ]
