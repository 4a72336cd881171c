"""Damaged and hostile weights: the same numbers as before, or one line.

Each test changes a sound file at many places. What is then read is compared with
another reading of the same bytes; anything else must be a GrpoError, in bounded time.
"""

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

import numpy as np
import pytest
from damage import mutate, mutations, one_clear_line
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from weight_files import TYPES, WORDS, rebuilt, write_gguf

from grpo_jax.checkpoints.formats.gguf_file import read_gguf
from grpo_jax.checkpoints.formats.torch_bin import read_bin
from grpo_jax.checkpoints.huggingface.safetensors_files import (
    DTYPES,
    StoredTensor,
    read_safetensors,
    write_file,
)
from grpo_jax.checkpoints.huggingface.weights import load_pretrained
from grpo_jax.convert import convert_gguf
from grpo_jax.errors import GrpoError

GOLDEN = Path(__file__).parents[1] / "golden"
SHARD = GOLDEN / "families" / "deepseek" / "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


# -- safetensors -----------------------------------------------------------------------


def test_a_header_of_any_length_is_read(folder):
    """Its first bytes are its length: 0x80 and less than 6 also begin a pickle."""
    file = folder / "lengths.safetensors"
    numbers = np.arange(6, dtype=np.float32)
    header = b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
    for length in [*range(len(header), 400), 640, 896, 1152, 1408, 1664]:
        raw = struct.pack("<Q", length) + header.ljust(length) + numbers.tobytes()
        file.write_bytes(raw)
        np.testing.assert_array_equal(read_safetensors(file)["w"][...], numbers)


def test_our_own_files_are_read_whatever_their_names_are(folder):
    file = folder / "names.safetensors"
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    lengths = set()
    for length in range(30, 340):
        name = "w" * length
        read = numbers.__getitem__
        write_file(file, {name: StoredTensor(file, numbers.dtype, numbers.shape, read)})
        lengths.add(int.from_bytes(file.read_bytes()[:8], "little"))
        np.testing.assert_array_equal(read_safetensors(file)[name][1, 1:], [4, 5])
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
        found = {name: stored[...] for name, stored in read_safetensors(file).items()}
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
    theirs = gguf.GGUFReader(folder / "sound.gguf")
    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    fields = {k: f.contents() for k, f in theirs.fields.items() if k not in own}
    values, tensors = read_gguf(folder / "sound.gguf")
    assert values == fields and fields["tokenizer.ggml.tokens"] == WORDS
    assert [tensor.name for tensor in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(tensors[tensor.name][...], expected)
        np.testing.assert_array_equal(tensors[tensor.name][1:3], expected[1:3])


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


def test_tensors_behind_a_byte_too_many_are_refused(sound, folder):
    """It is in the padding before the tensors, so that the header is whole."""
    raw, length, _ = sound
    file = folder / "shifted.gguf"
    file.write_bytes(raw[: length - 1] + b"\0" + raw[length - 1 :])
    with pytest.raises(GrpoError, match="not a whole GGUF file .*follow its last"):
        read_gguf(file)


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
