"""Damaged JSON: configs, tokenizers, indices and rows are as they say, or one line."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import prmbench
import pytest
from damage import DEEP, LEAVES, mutate, mutations, one_clear_line
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_folders import byte_level, write_folder

from grpo_jax.checkpoints.huggingface.config import config_from_hf
from grpo_jax.checkpoints.huggingface.weights import load_pretrained
from grpo_jax.data import datasets, parsers, registry
from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError
from grpo_jax.evaluation import completion_files
from grpo_jax.training.reward_model import labels

GOLDEN = Path(__file__).parents[1] / "golden"
SHARD = GOLDEN / "families" / "deepseek" / "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module", autouse=True)
def cache(folder):
    """Prepared sets of other runs of these tests are not taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_JAX_CACHE", str(folder / "cache"))
        yield


# -- JSON ------------------------------------------------------------------------------

ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "partial_rotary_factor"]
ROPE_KEYS += ["low_freq_factor", "high_freq_factor"]
ROPE_KEYS += ["original_max_position_embeddings"]
VALUES = LEAVES | st.lists(LEAVES, max_size=3)
VALUES |= st.dictionaries(st.sampled_from(ROPE_KEYS), LEAVES, max_size=6)
CONFIG_KEYS = [
    *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("quantization_config", "partial_rotary_factor", "num_experts"),
]


@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES, min_size=1, max_size=3),
)
def test_a_config_is_a_model_that_can_be_computed_or_is_refused(kind, changed):
    sound = {"model_type": kind, "hidden_size": 16, "num_attention_heads": 4}
    sound |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 4}
    try:
        config = config_from_hf(sound | changed, "dir/config.json")
    except GrpoError as error:
        assert str(error).startswith("dir/config.json: ") and one_clear_line(error, "")
        return
    sizes = [config.vocab_size, config.width, config.layers, config.ffn, config.heads]
    sizes += [config.kv_heads, config.head_dim, config.max_positions]
    assert all(type(size) is int and 0 < size < 2**31 for size in sizes)
    assert config.heads % config.kv_heads == 0 and config.head_dim % 2 == 0
    assert 0 < config.norm_eps <= 1 and 0 < config.rope_theta <= 1e12
    assert config.sliding_window is None or config.sliding_window > 0
    for switch in (config.tied, config.qkv_bias, config.out_bias, config.mlp_bias):
        assert type(switch) is bool
    if (scaling := config.rope_scaling) is not None:
        assert math.isfinite(scaling.factor) and scaling.factor > 0
        assert scaling.low_freq_factor < scaling.high_freq_factor


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is not a whole number"),
        ({"num_key_value_heads": -2}, "num_key_value_heads=-2 is not a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads=True is not a whole"),
        ({"num_attention_heads": "4"}, "num_attention_heads='4' is not a whole"),
        ({"head_dim": 5}, "head_dim=5 is not supported; even ones"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a number above 0"),
        ({"rope_theta": "x"}, "rope_theta='x' is not a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers=2147483648 is not a whole"),
    ],
)
def test_nonsense_in_a_config_is_refused_by_key_and_value(fields, message):
    sound = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 16}
    with pytest.raises(GrpoError, match=message):
        config_from_hf(sound | fields)


TOKENIZER_FILES: dict[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    },
    "special_tokens_map.json": {"eos_token": "<|im_end|>"},
    "generation_config.json": {"eos_token_id": [2, 0]},
    "config.json": {"eos_token_id": 2},
    "tokenizer.json": json.loads(byte_level().to_str()),
}


def places(value, at=()):
    """The way to every value in a JSON value, long lists and objects cut short."""
    found = [at] if at else []
    items = list(value.items()) if isinstance(value, dict) else []
    items = list(enumerate(value)) if isinstance(value, list) else items
    for key, inner in items[:9]:
        found += places(inner, (*at, key))
    return found


@given(st.data())
def test_a_tokenizer_folder_is_read_or_is_refused(folder, data):
    files = copy.deepcopy(TOKENIZER_FILES)
    name = data.draw(st.sampled_from(sorted(files)))
    *way, last = data.draw(st.sampled_from(places(files[name])))
    value = files[name]
    for key in way:
        value = value[key]
    value[last] = data.draw(VALUES | st.just("\ud800"))
    texts = {name: json.dumps(value).encode() for name, value in files.items()}
    if data.draw(st.booleans()):
        texts[name] = mutate(texts[name], data.draw(mutations(len(texts[name]))))
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    try:
        tokenizer = Tokenizer.from_folder(folder)
        assert all(type(i) is int for i in tokenizer.eos_ids)
        assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.eos_ids)
        assert all(tokenizer.decode([i], skip_special=False) for i in tokenizer.eos_ids)
        tokenizer.decode(tokenizer.encode("in the 答案"))
    except GrpoError as error:
        assert one_clear_line(error, "")


@pytest.mark.parametrize("value", [-1, 10**6, 2**40, "2", 1.0, True, [2, -1], [[2]]])
@pytest.mark.parametrize("file", ["generation_config", "config"])
def test_an_end_id_is_the_id_of_a_token(file, value, tmp_path):
    files = {file: {"eos_token_id": value}}
    folder = write_folder(tmp_path, byte_level(), {"eos_token": "<|im_end|>"}, **files)
    with pytest.raises(GrpoError, match=f"{file}.json: eos_token_id=.* is not the id"):
        Tokenizer.from_folder(folder)


def test_templates_that_are_no_text_are_refused(tmp_path):
    for template in (5, {"default": "x"}, [{"name": "default", "template": 5}]):
        settings = {"eos_token": "<|im_end|>", "chat_template": template}
        folder = write_folder(tmp_path, byte_level(), settings)
        with pytest.raises(GrpoError, match="tokenizer_config.json: chat_template is"):
            Tokenizer.from_folder(folder)
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\xe9")
    with pytest.raises(GrpoError, match="chat_template.jinja: not UTF-8"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("text", [b'{"a": %s}' % DEEP, DEEP, b"[" * 10**6], ids=len)
def test_deep_files_of_a_model_are_refused(name, text, tmp_path):
    folder = shutil.copytree(SHARD.parent, tmp_path / "model")
    write_folder(folder, byte_level(), {"eos_token": "<|im_end|>"})
    (folder / "tokenizer.json").rename(folder / "later.json")
    (folder / name).write_bytes(text)
    with pytest.raises(GrpoError) as error:
        load_pretrained(folder)
        (folder / "later.json").rename(folder / "tokenizer.json")
        Tokenizer.from_folder(folder)
    assert one_clear_line(error, folder / name)


@pytest.mark.parametrize("where", [5, None, {}, [], "x", "a/b", "..", "x" * 300])
def test_an_index_names_files_beside_it(where, tmp_path):
    folder = shutil.copytree(SHARD.parent, tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["model.norm.weight"] = where
    index.write_text(json.dumps(fields))
    with pytest.raises(GrpoError) as error:
        load_pretrained(folder)
    assert one_clear_line(error, folder) and "model.norm.weight" in str(error.value)


# -- JSON lines ------------------------------------------------------------------------

ROW = {"question": "1+1?", "answer": "2", "solution": "It is 2.", "options": ["1", 2]}
LINES = b"".join(
    json.dumps(row, ensure_ascii=False).encode() + b"\n"
    for row in (ROW, ROW | {"question": "答案?", "level": {"a": [None]}}, {})
    if row
)


@given(mutations(len(LINES)))
def test_changed_lines_give_what_they_say_or_are_refused(folder, edits):
    file = folder / "changed.jsonl"
    file.write_bytes(raw := mutate(LINES, edits))
    try:
        found = list(registry.read_examples(registry.local_source(str(file)), file))
    except GrpoError as error:
        assert one_clear_line(error, f"{file}:")
        return
    lines = [line for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    expected = [json.loads(line) for line in lines if line.strip()]
    assert [e.question for e in found] == [r["question"].strip() for r in expected]
    for example, row in zip(found, expected, strict=True):
        known = {"question", "answer", "solution", "language", "id"}
        assert example.columns == {k: v for k, v in row.items() if k not in known}


@given(st.data())
def test_a_row_of_a_set_is_an_example_or_is_refused(folder, data):
    """Any field of any set's rows with any value: text, or file, line and row."""
    convert = data.draw(st.sampled_from(CONVERTERS))
    row = {key: data.draw(VALUES) for key in FIELDS}
    source = registry.Source("set", "set.jsonl", convert)
    file = folder / "row.jsonl"
    file.write_text(json.dumps(row) + "\n")
    try:
        (example,) = registry.read_examples(source, file)
    except GrpoError as error:
        assert one_clear_line(error, f"{file}:1: row 0")
        return
    texts = ("question", "answer", "solution", "language", "id")
    assert all(isinstance(getattr(example, name), str) for name in texts)
    json.dumps(example.columns)


CONVERTERS = [
    parsers.gsm8k,
    parsers.parse_math,
    parsers.cmath,
    parsers.mgsm("zh"),
    parsers.svamp,
]
CONVERTERS += [parsers.mawps, parsers.gsm_hard, parsers.ocw, parsers.mmlu, parsers.sat]
CONVERTERS += [parsers.gaokao_mathqa, parsers.gaokao_mathcloze, parsers.parse_local_row]
FIELDS = "question answer solution language id options topic label Answer level subject"
FIELDS += " type unique_id problem golden Body Question Type Equation input target code"
FIELDS = (FIELDS + " other").split()


@pytest.mark.parametrize("deep", [DEEP, b"[" * 100 + b"]" * 100, b'{"a":' * 985])
def test_deep_rows_are_refused_with_file_and_line(deep, tmp_path):
    file = tmp_path / "deep.jsonl"
    good = b'{"question": "1+1?", "answer": "2"}\n'
    file.write_bytes(good + b'{"question": "1", "answer": "2", "x": %s}\n' % deep)
    readers = [
        lambda: datasets.load_dataset(str(file)),
        lambda: list(labels.read_rows(file)),
    ]
    for read in readers:
        with pytest.raises(GrpoError, match="deep.jsonl:2: not (readable|valid)"):
            read()


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(parsers, "LONGEST", 100)
    (tmp_path / "a.jsonl").write_text('{"question": "' + "x" * 1000)
    with pytest.raises(GrpoError, match="a.jsonl:1: longer than 100 bytes"):
        datasets.load_dataset(str(tmp_path / "a.jsonl"))


LABELLED = {"tokens": [1, 2, 3], "prompt": 1, "ends": [2], "labels": [1.0], "id": "a"}
BENCH = {
    **{"idx": "1", "original_question": "q", "modified_question": "q"},
    **{"original_process": ["a", "b"], "modified_process": ["a", "c"]},
    **{"error_steps": [2], "classification": "x"},
}
MARKED = {"input": "q Step 1: a ки Step 2: b ки", "label": "q Step 1: a + Step 2: b -"}


@pytest.mark.parametrize(
    "read, row",
    [
        (lambda file: labels.read_labels(file, vocab_size=9), LABELLED),
        (labels.read_math_shepherd, MARKED),
        (prmbench.read, BENCH),
    ],
    ids=["labelled", "marked", "bench"],
)
@given(st.data())
def test_labelled_rows_are_read_or_are_refused(read, row, folder, data):
    file = folder / "labelled.jsonl"
    file.write_text(json.dumps(row) + "\n")
    read(file)  # sound before
    changed = row | {data.draw(st.sampled_from(sorted(row))): data.draw(VALUES)}
    file.write_text(json.dumps(changed) + "\n")
    try:
        found = read(file)
    except GrpoError as error:
        assert one_clear_line(error, file)
    else:
        if row is LABELLED:
            assert all(0 <= token < 9 for item in found for token in item.tokens)


def test_a_negative_token_is_refused(tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps(LABELLED | {"tokens": [1, -2, 3]}) + "\n")
    with pytest.raises(GrpoError, match="labels.jsonl:1: token -2 is not one"):
        labels.read_labels(file, vocab_size=9)


ANSWERED = {
    **{"set": "mine", "index": 0, "mode": "cot", "temperature": 0.5},
    **{"completions": ["5", "6"], "cut_off": [True, None]},
}


@given(st.data())
def test_completions_made_elsewhere_are_read_or_are_refused(folder, data):
    file = folder / "completions.jsonl"
    changed = ANSWERED | {
        data.draw(st.sampled_from(sorted(ANSWERED))): data.draw(VALUES)
    }
    file.write_text(json.dumps(changed) + "\n")
    try:
        found = completion_files.read_completions(
            file, {"mine": [Example("1+1?", "2")]}
        )
    except GrpoError as error:
        assert one_clear_line(error, file)
        return
    ((_, group),) = found["mine"].items()
    ((*answers,),) = group.completions
    assert all(type(answer.text) is str for answer in answers)
    assert all(answer.cut_off in (True, False, None) for answer in answers)
    assert group.temperature is None or 0 <= group.temperature <= 1e6


def test_temperatures_of_completions_are_numbers(tmp_path):
    file = tmp_path / "a.jsonl"
    for value in ("NaN", "Infinity", "1e999", "-1", "true", "1" + "0" * 400):
        row = json.dumps(ANSWERED | {"temperature": "@"}).replace('"@"', value)
        file.write_text(row + "\n")
        with pytest.raises(GrpoError, match="a.jsonl:1: temperature .* is not a"):
            completion_files.read_completions(file, {"mine": [Example("1+1?", "2")]})
