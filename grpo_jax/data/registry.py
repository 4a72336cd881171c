"""Registry of the known sets of questions.

`find_source` returns the `Source` of a set: its file, public URL, SHA-256 and converter
from rows. `local_source` does so for a user's JSON-lines file. `read_examples` converts
a file to `Example`s, or raises an error that names the file, line and row.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_jax.data import parsers
from grpo_jax.data.example import Example
from grpo_jax.data.parsers import Row, check_text, type_name
from grpo_jax.errors import GrpoError


@dataclass(frozen=True)
class Source:
    """Where the file of a set is, and how its rows are read."""

    slug: str
    file: str  # path relative to the data directory
    convert: Callable[[Row], Example]
    url: str = ""  # "": no public download
    sha256: str = ""


GITHUB = "https://raw.githubusercontent.com"
_GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
_DEEPSEEK = "deepseek-ai/DeepSeek-Math/b8b0f8ce093d80bf8e9a641e44142f06d092c305"
_MGSM = "google-research/url-nlp/452a21ad3dae5668c06ceeac21ff073e1e40f9be/mgsm"
_SVAMP = "arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53"
_AGIEVAL = "ruixiangcui/AGIEval/5c77d073fda993f1652eaae3cf5d04cc5fd21d40/data/v1"
_HARNESS = "ZubinGou/math-evaluation-harness/db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5"
# (set, split): file, converter, path on GitHub, SHA-256. MATH has no path:
# its owner's takedown notice removed it from the Hugging Face hub.
_TABLE: dict[tuple[str, str], tuple] = {
    ("gsm8k", "train"): (
        "gsm8k/train.jsonl",
        parsers.gsm8k,
        f"{_GSM8K}/grade_school_math/data/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ),
    ("gsm8k", "test"): (
        "gsm8k/test.jsonl",
        parsers.gsm8k,
        f"{_GSM8K}/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    ("math", "train"): ("math/train.jsonl", parsers.parse_math),
    ("math", "test"): ("math/test.jsonl", parsers.parse_math),
    ("math500", "test"): ("math/math500.jsonl", parsers.parse_math),
    ("cmath", "test"): (
        "cmath/test.jsonl",
        parsers.cmath,
        f"{_DEEPSEEK}/evaluation/datasets/cmath/test.jsonl",
        "cabe17c127c3227912b3384f4755e180f3aa0d9e5865677e7e5e223439bf15eb",
    ),
    ("svamp", "test"): (
        "svamp/SVAMP.json",
        parsers.svamp,
        f"{_SVAMP}/SVAMP.json",
        "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
    ),
    ("mawps", "test"): (
        "mawps/test.jsonl",
        parsers.mawps,
        f"{_HARNESS}/data/mawps/test.jsonl",
        "00ffe31161be8623a3d36741830edbba87a3aee0109f693810fe40b9d5d91b8b",
    ),
    ("gsm_hard", "test"): (
        "gsm_hard/test.jsonl",
        parsers.gsm_hard,
        f"{_HARNESS}/data/gsm_hard/test.jsonl",
        "45db606263a4902580aba3974e8b7fb3f66012877889209af206b1c1b2f208f5",
    ),
    ("gaokao_mathcloze", "test"): (
        "agieval/gaokao-mathcloze.jsonl",
        parsers.gaokao_mathcloze,
        f"{_AGIEVAL}/gaokao-mathcloze.jsonl",
        "088675c147794970a3ed25c7147a3bbc59715d6813837d5f483f46dcb1b5008d",
    ),
    ("gaokao_mathqa", "test"): (
        "agieval/gaokao-mathqa.jsonl",
        parsers.gaokao_mathqa,
        f"{_AGIEVAL}/gaokao-mathqa.jsonl",
        "d246f12752d121289ef55cbf1bcf954243cefb65d110f71d09358e24065c808f",
    ),
    ("ocw", "test"): (
        "deepseekmath/ocw.jsonl",
        parsers.ocw,
        f"{_DEEPSEEK}/evaluation/datasets/ocw/test.jsonl",
        "095ba49696fcd401474a5014e2fae5e6b0b8ec1939d8dded0343fcbdb0bf1a9b",
    ),
    ("sat", "test"): (
        "deepseekmath/sat.jsonl",
        parsers.sat,
        f"{_DEEPSEEK}/evaluation/datasets/sat/test.jsonl",
        "96720a1dc496ea72f80db55250290cf9c48e95b657ac2183b7deb1dc4627351f",
    ),
    ("mmlu_stem", "test"): (
        "deepseekmath/mmlu_stem.jsonl",
        parsers.mmlu,
        f"{_DEEPSEEK}/evaluation/datasets/mmlu_stem/test.jsonl",
        "1c918d1df6de635a0202c989705c34f19b0c4ad858cbdb27135cdfc7fd44f14a",
    ),
}
for _language, _sha256 in {
    "de": "4dfea30fede44b813e2e496f5f0534049e83c7cc8aed6e00600b30ec62053626",
    "en": "50021d0f28cc957edcb44e7806425b1c7fbd648ddcb9e0a8ec689d10e57d40fa",
    "es": "5bd27ebdf00140cec845c5298dc17715f5cd57d8edda6df1976db40bf3f0750a",
    "fr": "36207c1c03fd7cd3ea491441eb755408199f94e4a647851df531bbaedc99d606",
    "ja": "59a2b50debe77981fd784cb3b2bef1505e3abf2a37116dc9d7a366ab029b4637",
    "zh": "b2fa63151022370a0de1f4211c8c284eae74b0f5a3b003b1d5982c0d4a73f661",
}.items():
    _file = f"mgsm_{_language}.tsv"
    _TABLE[f"mgsm_{_language}", "test"] = (
        f"mgsm/{_file}",
        parsers.mgsm(_language),
        f"{_MGSM}/{_file}",
        _sha256,
    )
SOURCES = {
    (name, split): Source(f"{name}-{split}", *fields)
    for (name, split), fields in _TABLE.items()
}


PAPER = ("gsm8k", "math")  # the RL training sets of DeepSeekMath (section 4.2)


def is_in_domain(name: str, trained_on: Sequence[str] = PAPER) -> bool:
    """Returns whether a set is in the domain of the sets that RL trained on.

    >>> (is_in_domain("math500"),
    ...  is_in_domain("gsm_hard"),
    ...  is_in_domain("svamp", ["svamp"]))
    (True, False, True)
    """
    whole = {"math500": "math"}  # subsets of another set
    return name in trained_on or whole.get(name) in trained_on


def is_file(name: str) -> bool:
    """Returns whether the name of a set is the path of a user's own file."""
    return name.endswith(".jsonl")


def local_source(name: str) -> Source:
    """Returns the source for a user's own JSON-lines file."""
    return Source("jsonl", name, parsers.parse_local_row)


def find_source(name: str, split: str) -> Source:
    """Returns the source of a known set.

    Raises:
      GrpoError: the set is unknown, or it has no such split.
    """
    if (name, split) in SOURCES:
        return SOURCES[name, split]
    splits = [s for n, s in SOURCES if n == name]
    if splits:
        raise GrpoError(
            f"data {name!r}: no split {split!r}; it has {' and '.join(splits)}"
        )
    names = sorted({n for n, _ in SOURCES})
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise GrpoError(
        f"data {name!r}: no such set; {hint}give the path of a .jsonl file or one of "
        f"{', '.join(names)}"
    )


def read_examples(source: Source, path: Path) -> Iterator[Example]:
    """Yields every row of a file as an example.

    Raises:
      GrpoError: a row is invalid; the message names the file, line and row.
    """
    for index, (number, row) in enumerate(parsers.read_rows(path)):
        where = f"{path}:{number}: row {index}"
        try:
            if not isinstance(row, dict):
                raise TypeError(f"is {type_name(row)}; expected an object with fields")
            check_text(row)
            example = source.convert(row)
            if not example.question:
                raise ValueError("has an empty question")
        except KeyError as error:
            raise GrpoError(f"{where} has no field {error}") from None
        except (TypeError, ValueError) as error:
            raise GrpoError(f"{where} {error}") from None
        yield example
