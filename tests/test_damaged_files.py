"""Damaged and hostile files: the same numbers as before, or one line that refuses them.

Each test changes a sound file at many places. What is then read is compared with
another reading of the same bytes; anything else must be a GrpoError, in bounded time.
"""

import copy
import io
import json
import math
import pickle
import pickletools
import shutil
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_convert import TYPES, WORDS, rebuilt, write_gguf
from test_tokenizer import byte_level, write_folder

from grpo_jax import data, rows, sources
from grpo_jax.convert import convert_gguf
from grpo_jax.errors import GrpoError
from grpo_jax.hf.config import from_hf
from grpo_jax.hf.gguf_file import read_gguf
from grpo_jax.hf.tensors import DTYPES, Source, read_header, write_file
from grpo_jax.hf.torch_bin import read_bin
from grpo_jax.reward_model import labelled, prmbench
from grpo_jax.tokenizer import Tokenizer
from grpo_jax.weights import load_pretrained

GOLDEN = Path(__file__).parent / "golden"
SHARD = GOLDEN / "families" / "deepseek" / "model-00001-of-00003.safetensors"
DEEP = b"[" * 985 + b"]" * 985


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module", autouse=True)
def cache(folder):
    """Prepared sets of other runs of these tests are not taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_JAX_CACHE", str(folder / "cache"))
        yield


def mutations(length: int):
    """Edits of bytes before `length`: another byte, a bit, eight of them, a cut, …"""
    kinds = st.sampled_from(["set", "bit", "eight", "delete", "insert", "cut"])
    edit = st.tuples(kinds, st.integers(0, length - 1), st.integers(0, 255))
    return st.lists(edit, min_size=1, max_size=3)


def mutate(raw: bytes, edits) -> bytes:
    for kind, at, value in edits:
        before, byte, after = raw[:at], raw[at : at + 1], raw[at + 1 :]
        if kind == "set":
            byte = bytes([value])
        elif kind == "bit":
            byte = bytes(b ^ 1 << value % 8 for b in byte)
        elif kind == "eight":
            byte, after = (b"\xff" * 7 + b"\x7f", b"\0" * 8)[value % 2], after[7:]
        elif kind == "delete":
            byte = b""
        elif kind == "insert":
            byte = bytes([value]) + byte
        else:
            byte, after = b"", b""
        raw = before + byte + after
    return raw


def one_clear_line(error, where) -> bool:
    text = str(error.value if hasattr(error, "value") else error)
    return str(where) in text and "\n" not in text and len(text) < 600


# -- safetensors -----------------------------------------------------------------------


def test_a_header_of_any_length_is_read(folder):
    """Its first bytes are its length: 0x80 and less than 6 also begin a pickle."""
    file = folder / "lengths.safetensors"
    numbers = np.arange(6, dtype=np.float32)
    header = b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
    for length in [*range(len(header), 400), 640, 896, 1152, 1408, 1664]:
        raw = struct.pack("<Q", length) + header.ljust(length) + numbers.tobytes()
        file.write_bytes(raw)
        np.testing.assert_array_equal(read_header(file)["w"][...], numbers)


def test_our_own_files_are_read_whatever_their_names_are(folder):
    file = folder / "names.safetensors"
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    lengths = set()
    for length in range(30, 340):
        name = "w" * length
        source = Source(numbers.dtype, numbers.shape, lambda: numbers)
        write_file(file, {name: source})
        lengths.add(int.from_bytes(file.read_bytes()[:8], "little"))
        np.testing.assert_array_equal(read_header(file)[name][1, 1:], [4, 5])
    assert {128, 384} <= lengths


def by_the_format(raw: bytes) -> dict[str, np.ndarray] | None:
    """The tensors of a safetensors file as its definition says; None: it is not one."""
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        header, numbers = raw[8 : 8 + length], raw[8 + length :]
        if len(header) < length or header[:1] != b"{":
            return None
        pairs = json.loads(header, object_pairs_hook=lambda pairs: pairs)
        pairs = [(name, dict(e)) for name, e in pairs if name != "__metadata__"]
        found, end = {}, 0
        for name, entry in sorted(pairs, key=lambda pair: pair[1]["data_offsets"]):
            (start, stop), shape = entry["data_offsets"], entry["shape"]
            dtype = DTYPES[entry["dtype"]]
            size = math.prod(shape) * dtype.itemsize
            if name in found or start != end or stop != start + size:
                return None
            found[name] = np.frombuffer(numbers[start:stop], dtype).reshape(shape)
            end = stop
        return found if end == len(numbers) else None
    except (ValueError, KeyError, TypeError, struct.error, IndexError):
        return None


HEADER = 8 + struct.unpack("<Q", SHARD.read_bytes()[:8])[0]


@given(mutations(HEADER))
def test_a_changed_header_gives_what_it_says_or_is_refused(folder, edits):
    file = folder / "changed.safetensors"
    file.write_bytes(raw := mutate(SHARD.read_bytes(), edits))
    expected = by_the_format(raw)
    try:
        found = {name: stored[...] for name, stored in read_header(file).items()}
    except GrpoError as error:
        assert one_clear_line(error, file)
        assert raw != SHARD.read_bytes()
        return
    assert expected is not None and found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        assert array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes()


def with_header(raw: bytes, edit) -> bytes:
    """The file with its header changed in place by `edit`."""
    header = json.loads(raw[8:HEADER])
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[HEADER:]


def move(by: int):
    """The numbers of the first tensor are said to lie some bytes further on."""

    def edit(header):
        entries = [e for name, e in header.items() if name != "__metadata__"]
        first = min(entries, key=lambda entry: entry["data_offsets"])
        first["data_offsets"] = [x + by for x in first["data_offsets"]]

    return lambda raw: with_header(raw, edit)


def one_on_another(raw: bytes) -> bytes:
    """Two tensors of one size are both said to have the numbers of one."""

    def edit(header):
        gate, up = (header[f"model.layers.0.mlp.{x}_proj.weight"] for x in PAIR)
        up["data_offsets"] = gate["data_offsets"]

    return with_header(raw, edit)


PAIR = ("gate", "up")


@pytest.mark.parametrize(
    "edit",
    [
        move(4),
        move(-4),
        one_on_another,
        lambda raw: raw + b"\0\0\0\0",
        lambda raw: raw[:HEADER] + b"\0\0\0\0" + raw[HEADER:],
    ],
    ids=["later", "earlier", "overlap", "behind", "before"],
)
def test_tensors_cover_the_file_exactly(edit, tmp_path):
    folder = shutil.copytree(SHARD.parent, tmp_path / "model")
    load_pretrained(folder)
    (folder / SHARD.name).write_bytes(edit(SHARD.read_bytes()))
    with pytest.raises(GrpoError) as error:
        load_pretrained(folder)
    assert one_clear_line(error, folder / SHARD.name)


def test_a_shape_of_a_hundred_axes_is_refused_by_name(tmp_path):
    folder = shutil.copytree(SHARD.parent, tmp_path / "model")
    name, array = next(iter(load_file(SHARD).items()))
    many = [1] * 99 + list(array.shape)
    edit = lambda header: header[name].update(shape=many)  # noqa: E731
    (folder / SHARD.name).write_bytes(with_header(SHARD.read_bytes(), edit))
    with pytest.raises(GrpoError, match=f"{name} has shape"):
        load_pretrained(folder)


# -- .bin ------------------------------------------------------------------------------


def entries(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


KINDS = entries(GOLDEN / "bin" / "kinds.pt")
PICKLE = next(name for name in KINDS if name.endswith("data.pkl"))


def write_bin(file: Path, data: bytes, parts=KINDS, name=PICKLE) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for part, content in (parts | {name: data}).items():
            archive.writestr(part, content)
    return file


class Torch(pickle.Unpickler):
    """The standard library's reading of a state dict, as NumPy arrays."""

    def find_class(self, module, name):
        if name == "OrderedDict":
            return dict
        if name.endswith("Storage"):
            names = {"Float": "F32", "Half": "F16", "BFloat16": "BF16", "Double": "F64"}
            return DTYPES[names[name.removesuffix("Storage")]]
        return self.rebuild

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        return np.frombuffer(KINDS[PICKLE.replace("data.pkl", f"data/{key}")], dtype)

    def rebuild(self, storage, start, shape, strides, *_):
        steps = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[start:], shape, steps)


@given(mutations(len(KINDS[PICKLE])))
def test_a_changed_pickle_gives_what_it_says_or_is_refused(folder, edits):
    data = mutate(KINDS[PICKLE], edits)
    file = write_bin(folder / "changed.bin", data)
    try:
        found = {name: stored[...] for name, stored in read_bin(file).items()}
    except GrpoError as error:
        assert one_clear_line(error, file)
        return
    ops = pickletools.genops(data)
    memo = [int(x or 0) for op, x, _ in ops if op.name == "LONG_BINPUT"]
    if max(memo, default=0) < 1000:  # above, the standard library takes gigabytes
        expected = Torch(io.BytesIO(data)).load()
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.dtype == expected[name].dtype
            np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    "start, geometry, message",
    [
        ("I0\n", "(I100000\nI100000\nt(I0\nI0\nt", "two numbers"),  # 37 GiB of one
        ("I0\n", "(I4\nt(I0\nt", "two numbers"),
        ("I0\n", "(I2\nI2\nt(I1\nI1\nt", "two numbers"),
        ("I0\n", "(I0\nI9999999999999999999999\nt(I1\nI1\nt", "no weight has"),
        ("I0\n", "(" + "I1\n" * 99 + "t(" + "I1\n" * 99 + "t", "no weight has"),
        ("I9223372036854775807\n", "(I1\nt(I1\nt", "beyond its storage"),
    ],
)
def test_strides_and_sizes_that_no_weight_has(start, geometry, message, tmp_path):
    with pytest.raises(GrpoError, match=message):
        rebuilt(tmp_path, start, geometry)


def test_a_transpose_is_no_overlap(tmp_path):
    tensor = rebuilt(tmp_path, "I0\n", "(I2\nI2\nt(I1\nI2\nt")["w"]
    np.testing.assert_array_equal(tensor[...], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    "data, message",
    [
        # tuples in one another as a key: hashing them overflowed the stack of C
        (b"\x80\x02}K\x01" + b"\x85" * 300_000 + b"K\x02s.", "a key is no text"),
        (b"\x80\x02}" + b"}" * 5_000_000, "larger than a list of tensors"),
        (b"\x80\x02" + b"(" * 1000, "broken pickle"),
        (b"\x80\x02}cos\nsystem\n.", "asks for os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
        (b"\x80\x02}\x82\x01.", "EXT1 is not of a dictionary"),
    ],
)
def test_hostile_pickles_are_refused(data, message, tmp_path):
    with pytest.raises(GrpoError, match=message):
        read_bin(write_bin(tmp_path / "x.bin", data))


def test_a_high_memo_index_takes_no_memory(tmp_path):
    """pickle.Unpickler makes room for every index below it: here 16 GB."""
    file = write_bin(tmp_path / "x.bin", b"\x80\x02}r\xff\xff\xff\x3f.")
    assert read_bin(file) == {}


def test_zip_bombs_are_not_unpacked(tmp_path):
    file = tmp_path / "x.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("a/data/0", bytes(10_000_000))
    with pytest.raises(GrpoError, match="compressed by another program"):
        read_bin(file)
    with pytest.warns(UserWarning, match="Duplicate name"):
        with zipfile.ZipFile(file, "w") as archive:
            for _ in range(2):
                archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
    with pytest.raises(GrpoError, match="lie on one another"):
        read_bin(file)


# -- .gguf -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(folder):
    """A GGUF file, the length of its header, and the folder that it becomes."""
    gguf = pytest.importorskip("gguf")
    file = folder / "sound.gguf"
    write_gguf(file, quantised=["blk.0.ffn_down"], add_bos_token=True)
    convert_gguf(file, folder / "sound")
    weights = (folder / "sound" / "model.safetensors").read_bytes()
    return file.read_bytes(), gguf.GGUFReader(file).data_offset, weights


def test_a_gguf_file_is_read_as_the_package_reads_it(sound, folder):
    gguf = pytest.importorskip("gguf")
    ours = read_gguf(folder / "sound.gguf")
    theirs = gguf.GGUFReader(folder / "sound.gguf")
    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    fields = {k: f.contents() for k, f in theirs.fields.items() if k not in own}
    assert ours.values == fields and fields["tokenizer.ggml.tokens"] == WORDS
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.tensors[tensor.name][...], expected)
        np.testing.assert_array_equal(ours.tensors[tensor.name][1:3], expected[1:3])


@given(st.data())
def test_a_changed_gguf_header_gives_the_same_numbers_or_is_refused(
    sound, folder, data
):
    raw, length, weights = sound
    file, out = folder / "changed.gguf", folder / "out"
    file.write_bytes(mutate(raw, data.draw(mutations(length - 8))))
    shutil.rmtree(out, ignore_errors=True)
    begun = time.monotonic()
    try:
        convert_gguf(file, out)
    except GrpoError as error:
        assert one_clear_line(error, file) and not out.exists()
    else:
        assert (out / "model.safetensors").read_bytes() == weights
    assert time.monotonic() - begun < 5


def test_counts_that_the_file_does_not_hold_take_no_time(sound, folder):
    """2^62 keys, tensors, characters or numbers, where there are a few."""
    raw, _, _ = sound
    many = struct.pack("<Q", 1 << 62)
    types = raw.index(struct.pack("<Q", len(TYPES)), raw.index(b"token_type"))
    words = raw.index(struct.pack("<Q", len(WORDS)), raw.index(b"ggml.tokens"))
    file = folder / "many.gguf"
    begun = time.monotonic()
    for at in (8, 16, 24, types, words, words + 8):
        file.write_bytes(raw[:at] + many + raw[at + 8 :])
        with pytest.raises(GrpoError, match="many.gguf: not a whole GGUF file"):
            read_gguf(file)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"\n\0\0\0", b"\x0c\0\0\0", "eos_token_id=12 is not supported; an id below"),
        (b"\x04\0\0\0", b"\0\0\0\0", "num_attention_heads=0 is not a whole number"),
        (b"\x02\0\0\0", b"\x03\0\0\0", "is not a multiple of num_key_value_heads=3"),
    ],
    ids=["eos", "heads", "kv_heads"],
)
def test_values_of_a_gguf_file_are_checked_by_key(old, new, message, sound, folder):
    keys = {b"\n": b"eos_token_id", b"\x04": b"head_count", b"\x02": b"head_count_kv"}
    raw, _, _ = sound
    at = raw.index(keys[old[:1]]) + len(keys[old[:1]]) + 4
    assert raw[at : at + 4] == old
    file = folder / "value.gguf"
    file.write_bytes(raw[:at] + new + raw[at + 4 :])
    with pytest.raises(GrpoError, match=message):
        convert_gguf(file, folder / "none")


# -- JSON ------------------------------------------------------------------------------

NAMES = st.sampled_from(["", "x", "4", "silu", "linear", "llama3", "full_attention"])
LEAVES = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | NAMES
LEAVES |= st.sampled_from([2**31, 2**63, -(10**30), "a\nb", "\x1b[2J", "x" * 300])
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
        config = from_hf(sound | changed, "dir/config.json")
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
        from_hf(sound | fields)


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
        found = list(sources.examples(sources.local(str(file)), file))
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
    source = sources.Source("set", "set.jsonl", rows.json_lines, convert)
    file = folder / "row.jsonl"
    file.write_text(json.dumps(row) + "\n")
    try:
        (example,) = sources.examples(source, file)
    except GrpoError as error:
        assert one_clear_line(error, f"{file}:1: row 0")
        return
    texts = ("question", "answer", "solution", "language", "id")
    assert all(isinstance(getattr(example, name), str) for name in texts)
    json.dumps(example.columns)


CONVERTERS = [rows.gsm8k, rows.math_, rows.cmath, rows.mgsm("zh"), rows.svamp]
CONVERTERS += [rows.mawps, rows.gsm_hard, rows.ocw, rows.mmlu, rows.sat]
CONVERTERS += [rows.gaokao_mathqa, rows.gaokao_mathcloze, rows.local_row]
FIELDS = "question answer solution language id options topic label Answer level subject"
FIELDS += " type unique_id problem golden Body Question Type Equation input target code"
FIELDS = (FIELDS + " other").split()


@pytest.mark.parametrize("deep", [DEEP, b"[" * 100 + b"]" * 100, b'{"a":' * 985])
def test_deep_rows_are_refused_with_file_and_line(deep, tmp_path):
    file = tmp_path / "deep.jsonl"
    good = b'{"question": "1+1?", "answer": "2"}\n'
    file.write_bytes(good + b'{"question": "1", "answer": "2", "x": %s}\n' % deep)
    readers = [lambda: data.load(str(file)), lambda: list(labelled.read_rows(file))]
    for read in readers:
        with pytest.raises(GrpoError, match="deep.jsonl:2: not (readable|valid)"):
            read()


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 100)
    (tmp_path / "a.jsonl").write_text('{"question": "' + "x" * 1000)
    with pytest.raises(GrpoError, match="a.jsonl:1: longer than 100 bytes"):
        data.load(str(tmp_path / "a.jsonl"))


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
        (lambda file: labelled.read(file, vocab_size=9), LABELLED),
        (labelled.read_math_shepherd, MARKED),
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
        labelled.read(file, vocab_size=9)
