"""The sets: real rows, a user's own files, faults, batches by step."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.data import datasets, parsers, registry
from grpo_jax.data.datasets import Batches, Dataset
from grpo_jax.data.example import Example
from grpo_jax.errors import GrpoError
from grpo_jax.files import file_digest

DATA = os.environ.get("GRPO_JAX_DATA", "")
real = pytest.mark.skipif(not DATA, reason="real data: set GRPO_JAX_DATA to its folder")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Every set is prepared once, in a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GRPO_JAX_CACHE", str(folder))
        yield folder


def write(path: Path, *rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


# -- real sets ---------------------------------------------------------------------

ROWS = {
    ("gsm8k", "test"): 1319,
    ("gsm8k", "train"): 7473,
    ("math", "test"): 5000,
    ("math", "train"): 7500,
    ("math500", "test"): 500,
    ("cmath", "test"): 1098,
    ("svamp", "test"): 1000,
    ("mawps", "test"): 2065,
    ("gsm_hard", "test"): 1319,
    ("gaokao_mathcloze", "test"): 118,
    ("gaokao_mathqa", "test"): 351,
    ("ocw", "test"): 272,
    ("sat", "test"): 32,
    ("mmlu_stem", "test"): 3018,
    **{(f"mgsm_{language}", "test"): 250 for language in "de en es fr ja zh".split()},
}


@real
@pytest.mark.parametrize(("name", "split"), ROWS)
def test_real_set_is_whole(name, split):
    dataset = datasets.load_dataset(name, split, require=("answer",))
    assert len(dataset) == ROWS[name, split]
    rows = dataset[:: 1 if len(dataset) < 3000 else 6]
    for example in rows:
        assert example.question.strip() and example.answer.strip()
        assert "####" not in example.answer and "<<" not in example.solution
        assert example.language == (
            name[5:]
            if name.startswith("mgsm")
            else "zh"
            if name in ("cmath", "gaokao_mathcloze", "gaokao_mathqa")
            else "en"
        )
        # A gold answer is something short, on one line.
        assert len(example.answer) < 220 and "\n" not in example.answer
    assert len({example.id for example in rows}) == len(rows)


@real
@pytest.mark.parametrize(
    ("name", "split", "index", "question", "answer"),
    [
        ("gsm8k", "test", 0, "Janet’s ducks lay 16 eggs", "18"),
        ("gsm8k", "train", 1, "Weng earns $12 an hour", "10"),
        ("math", "test", 0, "How many vertical asymptotes", "2"),
        ("math", "train", 0, "Let \\[f(x) = \\left\\{", "0"),
        ("math", "train", 5529, "For any integer $n>1$", "0"),  # an empty \boxed{}
        (
            "math500",
            "test",
            0,
            "Convert the point",
            "\\left( 3, \\frac{\\pi}{2} \\right)",
        ),
        ("cmath", "test", 0, "妈咪买了3盒茶叶", "18"),
        ("mgsm_zh", "test", 0, "珍妮特的鸭子每天下 16 颗蛋", "18"),
        ("mgsm_de", "test", 1, "", "3"),
        ("svamp", "test", 0, "Each pack of dvds costs 76 dollars. If there is", "51"),
        ("mawps", "test", 0, "Joan found 70 seashells", "43"),
        ("gsm_hard", "test", 0, "Janet’s ducks lay 16 eggs", "-9867630"),
        ("gaokao_mathcloze", "test", 2, "袋中有 4 个红球", "1; \\frac{8}{9}"),
        ("gaokao_mathqa", "test", 1, "已知 $a \\in R", "C"),
        ("ocw", "test", 5, "Preamble: A collimated", "\\arcsin(10/13)"),
        ("sat", "test", 3, "$$q=s(r-1)^2$$", "A"),
        ("mmlu_stem", "test", 1, "Let p = (1, 2, 5, 4)(2, 3)", "C"),
    ],
)
def test_real_rows(name, split, index, question, answer):
    example = datasets.load_dataset(name, split)[index]
    assert example.question.startswith(question) and example.answer == answer


@real
def test_real_fields():
    gsm8k = datasets.load_dataset("gsm8k", "test")[0]
    assert gsm8k.solution == (
        "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 2 = $18 every day "
        "at the farmer’s market."
    )
    assert gsm8k.id == "gsm8k/test/0"
    math = datasets.load_dataset("math", "test")[0]
    assert math.columns == {"subject": "Algebra", "level": 3}
    assert math.id == "test/algebra/1.json" and "\\boxed{2}" in math.solution
    assert datasets.load_dataset("math500", "test")[0].columns["level"] == 2
    assert datasets.load_dataset("cmath", "test")[0].columns["grade"] == 1
    svamp = datasets.load_dataset("svamp", "test")
    assert svamp[1].question == (
        "Dan had $ 3 left with him after he bought a candy bar. If he had $ 4 at the "
        "start. How much did the candy bar cost?"
    )
    # mawps holds floats: whole ones are written without ".0", the others as they are
    answers = {example.answer for example in datasets.load_dataset("mawps", "test")}
    assert {"43", "11.5"} <= answers and not any(a.endswith(".0") for a in answers)


@real
def test_sets_are_put_one_after_the_other():
    both = datasets.load_dataset("gsm8k+math", "train")
    assert len(both) == 7473 + 7500
    assert both[7472].id == "gsm8k/train/7472"
    assert both[7473] == datasets.load_dataset("math", "train")[0] and both[
        -1
    ].id.startswith("train")
    few = datasets.load_dataset("gsm8k + math", "train", limit=3)
    assert [e.id for e in few[:3]] == [f"gsm8k/train/{i}" for i in range(3)]
    assert len(few) == 6 and few[3] == both[7473]


def test_procedural_sets_are_found():
    sums = datasets.load_dataset("sums/chain", "test", limit=10)
    assert len(sums) == 10 and sums[9].question and sums[9].answer


# -- names -------------------------------------------------------------------------


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(GrpoError, match="'gsm8': no such set; did you mean 'gsm8k'"):
        datasets.load_dataset("gsm8", "test")
    with pytest.raises(GrpoError, match="'math500': no split 'train'; it has test"):
        datasets.load_dataset("math500", "train")
    with pytest.raises(GrpoError, match="'gsm8k': no split 'dev'; .* train and test"):
        datasets.load_dataset("gsm8k", "dev")
    with pytest.raises(GrpoError, match="'no/such.jsonl': no such file"):
        datasets.load_dataset("no/such.jsonl")
    with pytest.raises(GrpoError, match="limit 0 is below 1"):
        datasets.load_dataset("gsm8k", limit=0)


# -- a user's own file -------------------------------------------------------------


def test_local_file_keeps_every_field(tmp_path):
    path = write(
        tmp_path / "a+b.jsonl",
        {"question": " 1+1? ", "answer": 2, "options": ["1", "2"], "level": None},
        "",
        {"question": "题", "solution": "所以 3。", "language": "zh", "id": "x7"},
    )
    rows = datasets.load_dataset(path)[:]
    assert rows[0] == Example(
        "1+1?", "2", "", id=f"{path}/0", columns={"options": ["1", "2"], "level": None}
    )
    assert rows[1] == Example("题", "", "所以 3。", "zh", "x7")
    assert len(datasets.load_dataset(f"{path}", limit=1)) == 1
    path = shutil.copy(path, tmp_path / "c.jsonl")
    assert len(datasets.load_dataset(f"{path}+{path}")) == 4


def test_numbers_become_text(tmp_path):
    numbers = [3, 3.0, 0.1, -12, 1e20, "3.0"]
    path = write(
        tmp_path / "a.jsonl", *({"question": "q", "answer": n} for n in numbers)
    )
    assert [e.answer for e in datasets.load_dataset(path)] == [
        "3", "3", "0.1", "-12", "100000000000000000000", "3.0",
    ]  # fmt: skip


def test_chat_messages(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "It is 2."},
    ]
    path = write(
        tmp_path / "a.jsonl",
        {"messages": turns, "answer": "2"},
        {"messages": turns[1:]},
        {"messages": turns[1:2], "answer": "2"},
    )
    rows = datasets.load_dataset(path)[:]
    assert [(e.question, e.answer, e.solution) for e in rows] == [
        ("1+1?", "2", "It is 2."),
        ("1+1?", "", "It is 2."),
        ("1+1?", "2", ""),
    ]
    assert [e.columns for e in rows] == [{"system": "Be brief."}, {}, {}]


@pytest.mark.parametrize("system", [True, False])
def test_chats_of_several_turns(system, tmp_path):
    """The last question and its answer, behind all that was said before them."""
    roles = ["user", "assistant"] * 2
    said = [{"role": role, "content": f"{i}"} for i, role in enumerate(roles, 1)]
    brief = {"role": "system", "content": "Be brief."}
    head = [brief] if system else []
    path = write(
        tmp_path / "a.jsonl",
        {"messages": head + said},
        {"messages": head + said[:3], "answer": "4"},
    )
    for row, solution in zip(datasets.load_dataset(path)[:], ["4", ""], strict=True):
        assert (row.question, row.solution) == ("3", solution)
        assert row.columns["messages"] == said[:2]
        assert row.columns.get("system") == ("Be brief." if system else None)
    for i, turns in enumerate([said[1:], said[:1] * 2, [*said, brief], [brief], []]):
        bad = write(tmp_path / f"{i}.jsonl", {"messages": turns, "answer": "4"})
        with pytest.raises(GrpoError, match=r"jsonl:1: row 0 .*roles .*expected \[sys"):
            datasets.load_dataset(bad)


def test_missing_answers_are_refused_where_they_are_needed(tmp_path):
    rows = [{"question": "q", "answer": "1"}, {"question": "q", "solution": "s"}]
    path = write(tmp_path / "a.jsonl", *rows)
    assert len(datasets.load_dataset(path)) == 2
    with pytest.raises(GrpoError, match="a.jsonl: row 1 has no 'answer'"):
        datasets.load_dataset(path, require=("answer",))
    with pytest.raises(GrpoError, match="a.jsonl: row 0 has no 'solution'"):
        datasets.load_dataset(path, require=("solution",))
    datasets.load_dataset(write(tmp_path / "b.jsonl", rows[0]), require=("answer",))


GOOD = b'{"question": "1+1?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"answer": "2"}', "row 2 has no field 'question'"),
        (b'{"problem": "1+1?", "answer": "2"}', "row 2 has no field 'question'"),
        (b'{"question": "1+1?"}', "row 2 has neither an 'answer' nor a 'solution'"),
        (b'{"question": "1+1?", "answer": " "}', "row 2 has neither an 'answer'"),
        (b'{"question": " \\n", "answer": "2"}', "row 2 has an empty question"),
        (b'{"question": ["1+1?"], "answer": "2"}', "row 2 field 'question' is list"),
        (b'{"question": "1+1?", "answer": true}', "row 2 field 'answer' is bool"),
        (b'{"question": "1+1?", "answer": null}', "row 2 field 'answer' is NoneType"),
        (b'{"question": "1+1?", "answer": NaN}', "row 2 field 'answer' is float"),
        (b'["1+1?", "2"]', "row 2 is list; expected an object"),
        (b'{"question": "1+1?", "answer": ', "not valid JSON"),
        (b'{"question": "1+1?", "answer": "2"} x', "not valid JSON"),
        (b'{"question": "caf\xe9", "answer": "2"}', "not UTF-8"),
        (b'\xff\xfe{\x00"\x00', "not UTF-8"),
        (b'{"question": "1\\u0000", "answer": "2"}', "row 2 holds a NUL character"),
        (b'{"question": "1\x00", "answer": "2"}', "not valid JSON"),
        (b'{"question": "1", "answer": "\\ud83d"}', "row 2 holds a lone surrogate"),
        (
            b'{"question": "1", "answer": "2", "o": {"k": ["\\udc00"]}}',
            "lone surrogate",
        ),
        (b"[" * 100000, "not readable as JSON"),
        (b'{"question": ' + b"9" * 5000 + b"}", "not readable as JSON"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(bad, message, tmp_path, cache):
    before = set(cache.glob("*/*"))
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD + bad + b"\n" + GOOD)  # one line is blank
    with pytest.raises(GrpoError) as error:
        datasets.load_dataset(str(path))
    assert str(error.value).startswith(f"{path}:4: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    assert set(cache.glob("*/*")) == before  # nothing half-made is left


def test_windows_files_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2)
    assert [e.answer for e in datasets.load_dataset(str(path))] == ["2", "2"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_refused(content, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(GrpoError, match="a.jsonl: the file has no rows"):
        datasets.load_dataset(str(tmp_path / "a.jsonl"))


def test_bad_rows_of_the_other_formats(tmp_path):
    for folder in ("mgsm", "svamp"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mgsm/mgsm_zh.tsv").write_text("q\t1\nq 2\n")
    with pytest.raises(GrpoError, match="mgsm_zh.tsv:2: 1 columns; expected question"):
        datasets.load_dataset("mgsm_zh", "test", data_dir=str(tmp_path))
    (tmp_path / "svamp/SVAMP.json").write_text('[\n{"Body": "b"},\n{"Body": }\n]')
    with pytest.raises(GrpoError, match="SVAMP.json:3: not valid JSON"):
        datasets.load_dataset("svamp", "test", data_dir=str(tmp_path))
    (tmp_path / "svamp/SVAMP.json").write_text('[{"Body": "b", "Question": "q"}]')
    with pytest.raises(GrpoError, match="row 0 has no field 'Type'"):
        datasets.load_dataset("svamp", "test", data_dir=str(tmp_path))
    (tmp_path / "svamp/SVAMP.json").write_bytes(b'[\n"\xe9"]')
    with pytest.raises(GrpoError, match="SVAMP.json:2: not UTF-8"):
        datasets.load_dataset("svamp", "test", data_dir=str(tmp_path))


def test_gsm8k_answers_and_annotations(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    answer = "2*3=<<2*3=6>>6, 6/4=<<6/4=1.5>>1.5\nso #1 #### -1,080 "
    path = tmp_path / "gsm8k/test.jsonl"
    write(path, {"question": "q", "answer": answer})
    example = datasets.load_dataset("gsm8k", "test", data_dir=str(tmp_path))[0]
    assert example.answer == "-1,080"
    assert example.solution == "2*3=6, 6/4=1.5\nso #1"
    write(path, {"question": "q", "answer": "18"})
    with pytest.raises(
        GrpoError, match="test.jsonl:1: row 0 field 'answer' has no '##"
    ):
        datasets.load_dataset("gsm8k", "test", data_dir=str(tmp_path))


@given(st.recursive(st.just("x"), lambda s: st.lists(s, max_size=3).map("".join)))
def test_last_boxed_takes_balanced_braces(inner):
    inner = "{" + inner + "}" + inner
    assert parsers.last_boxed("\\boxed{a\n b}") == "a b"
    assert parsers.last_boxed(f"\\boxed{{0}} so \\boxed{{{inner}}} }}") == inner


def test_last_boxed_without_a_whole_box():
    assert parsers.last_boxed("none") == ""
    assert parsers.last_boxed("\\boxed{1} and \\boxed{2") == ""


# -- preparing ---------------------------------------------------------------------


def test_changed_file_is_prepared_anew(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", {"question": "changing", "answer": "1"})
    assert datasets.load_dataset(path)[0].answer == "1"
    prepared = set(cache.glob("tfds/*"))
    assert datasets.load_dataset(path)[0].answer == "1"
    assert set(cache.glob("tfds/*")) == prepared  # not a second time
    write(tmp_path / "a.jsonl", {"question": "changing", "answer": "2"})
    assert datasets.load_dataset(path)[0].answer == "2"
    assert len(set(cache.glob("tfds/*")) - prepared) == 1


def test_preparing_leaves_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = write(tmp_path / "a.jsonl", {"question": "new to it", "answer": "1"})
    assert datasets.load_dataset(path)[0].answer == "1"
    assert not list((tmp_path / "temporary").iterdir())


def test_damaged_prepared_records_name_their_folder(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", {"question": "damaged", "answer": "1"})
    before = set(cache.glob("tfds/*"))
    datasets.load_dataset(path)
    (folder,) = set(cache.glob("tfds/*")) - before
    (records,) = folder.glob("*/*/*.array_record-*")
    records.write_bytes(records.read_bytes()[:100])
    with pytest.raises(GrpoError, match=f"{folder}: .*delete the folder"):
        datasets.load_dataset(path)
    shutil.rmtree(folder)
    assert datasets.load_dataset(path)[0].answer == "1"


def test_two_processes_prepare_the_same_file(tmp_path):
    rows = [{"question": f"q{i}", "answer": i} for i in range(2000)]
    path = write(tmp_path / "a.jsonl", *rows)
    code = (
        "import sys; from grpo_jax.data import datasets;"
        " d = datasets.load_dataset(sys.argv[1]);"
        "print(len(d), d[1999].answer)"
    )
    environment = os.environ | {"GRPO_JAX_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(Path(datasets.__file__).parents[2])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, path],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["2000 1999"] * 2
    (left,) = (tmp_path / "cache/tfds").iterdir()  # one folder, and nothing half-made
    assert left.name.startswith("jsonl-")


def test_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRPO_JAX_CACHE", str(tmp_path / "file"))
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "1"})
    with pytest.raises(GrpoError, match="set GRPO_JAX_CACHE to a folder"):
        datasets.load_dataset(path)


# -- downloading -------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """Serves a small GSM8K file on this machine; counts the requests."""
    write(tmp_path / "test.jsonl", {"question": "far away", "answer": "1 #### 2"})

    class Handler(http.server.SimpleHTTPRequestHandler):
        requests = 0

        def log_message(self, format, *args):
            Handler.requests += 1

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", tmp_path, Handler
        running.shutdown()


def address(monkeypatch, url: str, content: bytes):
    entry = registry.Source(
        "gsm8k-test",
        "gsm8k/test.jsonl",
        registry.SOURCES["gsm8k", "test"].convert,
        url,
        hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(registry.SOURCES, ("gsm8k", "test"), entry)
    monkeypatch.delenv("GRPO_JAX_DATA", raising=False)


def test_missing_file_is_downloaded_once_and_checked(server, monkeypatch, cache):
    url, folder, handler = server
    content = (folder / "test.jsonl").read_bytes()
    address(monkeypatch, f"{url}/test.jsonl", content)
    assert datasets.load_dataset("gsm8k", "test")[0].answer == "2"
    assert (
        datasets.load_dataset("gsm8k", "test", data_dir=str(folder))[0].question
        == "far away"
    )
    assert handler.requests == 1
    address(monkeypatch, f"{url}/test.jsonl", b"another file")
    with pytest.raises(GrpoError, match="its SHA-256 is .*, expected .* by hand"):
        datasets.load_dataset("gsm8k", "test")
    kept = [path.name for path in (cache / "downloads").iterdir()]
    assert kept == [f"{hashlib.sha256(content).hexdigest()[:16]}-test.jsonl"]


def test_failed_download_says_what_to_put_where(server, monkeypatch, tmp_path):
    url, *_ = server
    address(monkeypatch, f"{url}/none.jsonl", b"x")
    place = f"{tmp_path}/gsm8k/test.jsonl"
    with pytest.raises(
        GrpoError, match=f"download {url}/none.*404.* put it at {place}"
    ):
        datasets.load_dataset("gsm8k", "test", data_dir=str(tmp_path))
    address(monkeypatch, "http://127.0.0.1:9/none.jsonl", b"x")
    with pytest.raises(
        GrpoError, match=r"cannot download .* \$GRPO_JAX_DATA/gsm8k/test"
    ):
        datasets.load_dataset("gsm8k", "test")


def test_math_is_never_downloaded(monkeypatch):
    monkeypatch.delenv("GRPO_JAX_DATA", raising=False)
    for name in ("math", "math500"):
        with pytest.raises(
            GrpoError, match="MATH may not be downloaded.*GRPO_JAX_DATA"
        ):
            datasets.load_dataset(name, "test")


def test_every_address_is_pinned_and_has_a_checksum():
    for (name, _), source in registry.SOURCES.items():
        if not name.startswith("math"):
            assert len(source.sha256) == 64
            commit = source.url.split("/")[2]  # owner, repository, commit
            assert len(commit) == 40 and int(commit, 16)


@real
def test_checksums_are_those_of_the_files():
    for source in registry.SOURCES.values():
        if source.sha256:
            assert file_digest(Path(DATA, source.file)) == source.sha256


# -- batches -----------------------------------------------------------------------


@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 12),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=10, deadline=None)
def test_a_step_has_its_rows_whatever_was_asked_before(rows, batch, seed):
    if rows < batch:
        return
    whole = Batches(range(rows), batch, seed=seed)
    for step in (5, 0, 3):  # in any order: a step needs no steps before it
        assert Batches(range(rows), batch, seed=seed)[step] == whole[step]
    steps = -(-3 * rows // batch)
    order = [row for step in range(steps) for row in whole[step]]
    for epoch in range(3):  # each row once an epoch, also across batches' borders
        once = order[epoch * rows : (epoch + 1) * rows]
        assert sorted(once) == list(range(rows))


def test_every_epoch_and_seed_has_its_own_order():
    orders = [
        tuple(Batches(range(100), 100, seed=seed)[epoch])
        for seed in (0, 1)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 6 and tuple(range(100)) not in orders


def test_batches_that_cannot_be_made_are_refused():
    rows = Dataset("mine", [[Example("q", "a")] * 7])
    with pytest.raises(GrpoError, match="'mine': 7 rows are fewer than one batch of 8"):
        Batches(rows, 8, seed=0)
    with pytest.raises(GrpoError, match="batch of 0 rows"):
        Batches(rows, 0, seed=0)
    with pytest.raises(GrpoError, match="the set is empty"):
        Dataset("mine", [[]])
    with pytest.raises(IndexError):
        Batches(rows, 7, seed=0)[-1]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.data())
def test_parts_are_indexed_as_one_list(lengths, draw):
    parts = [[Example(f"{p}/{i}") for i in range(n)] for p, n in enumerate(lengths)]
    flat = [example for part in parts for example in part]
    dataset = Dataset("all", parts)
    index = draw.draw(st.integers(-len(flat), len(flat) - 1))
    assert list(dataset) == flat and dataset[index] == flat[index]
    assert dataset[1:-1] == flat[1:-1]
    with pytest.raises(IndexError):
        dataset[len(flat)]
