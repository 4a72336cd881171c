"""Hugging Face folders in and out: nothing lost, and every fault said in one line."""

import dataclasses
import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from grpo_jax.checkpoints.huggingface import config as hf_config
from grpo_jax.checkpoints.huggingface import weights
from grpo_jax.checkpoints.huggingface.weights import (
    abstract_params,
    load_pretrained,
    model_config,
    save_pretrained,
)
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.models.config import ModelConfig, RopeScaling
from grpo_jax.models.decoder import Decoder, Params

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
FAMILIES = sorted(folder.name for folder in GOLDEN.iterdir())
SHARDED = "deepseek"  # three shards and an index, bfloat16
WHOLE = "llama_old_keys"  # one file, tied
LAST = "model.layers.1.mlp.down_proj.weight"


def equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    return jax.tree.all(same)


# -- config.json -----------------------------------------------------------------------


def test_missing_keys_take_the_defaults_of_transformers():
    """As AutoConfig of transformers 5 gives them for {"model_type": …} alone."""
    llama = hf_config.config_from_hf({"model_type": "llama"})
    assert llama == ModelConfig(
        vocab_size=32000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        ffn=11008,
        norm_eps=1e-6,
        rope_theta=10000.0,
        max_positions=2048,
    )
    mistral = hf_config.config_from_hf({"model_type": "mistral"})
    assert mistral == dataclasses.replace(
        llama, kv_heads=8, ffn=14336, sliding_window=4096, max_positions=131072
    )
    qwen2 = hf_config.config_from_hf({"model_type": "qwen2"})
    large = dict(vocab_size=151936, ffn=22016, max_positions=32768)
    assert qwen2 == dataclasses.replace(llama, **large, qkv_bias=True)
    qwen3 = hf_config.config_from_hf({"model_type": "qwen3", "hidden_size": 1024})
    assert qwen3 == dataclasses.replace(llama, **large, width=1024, qk_norm=True)


@pytest.mark.parametrize(
    "scaling, expected",
    [
        (None, None),
        ({"type": "linear", "factor": 4}, RopeScaling(kind="linear", factor=4.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            RopeScaling(kind="llama3", factor=8.0, original_max_positions=512),
        ),
    ],
)
def test_old_and_new_rope_keys_say_the_same(scaling, expected):
    base = {"model_type": "llama"}
    old = base | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = base | {"rope_parameters": {"rope_theta": 5e5} | (scaling or {})}
    assert hf_config.config_from_hf(old) == hf_config.config_from_hf(new)
    assert hf_config.config_from_hf(old).rope_theta == 5e5
    assert hf_config.config_from_hf(old).rope_scaling == expected


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {
                "model_type": "llama",
                "architectures": ["LlamaForSequenceClassification"],
            },
            "LlamaForSequenceClassification",
        ),
        (
            {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type='yarn'",
        ),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}},
            "rope_parameters.rope_type='dynamic'",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor=None",
        ),
        (
            {"model_type": "llama", "partial_rotary_factor": 0.5},
            "partial_rotary_factor",
        ),
        ({"model_type": "mistral", "num_local_experts": 8}, "num_local_experts=8"),
        (
            {"model_type": "llama", "quantization_config": {"bits": 4}},
            "quantization_config={'bits': 4}",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "num_hidden_layers": 4,
                "max_window_layers": 2,
            },
            "layer_types=['full_attention', 'sliding_attention']",
        ),
        ({"model_type": "llama", "num_attention_heads": 7}, "num_attention_heads=7"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers=0"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused_by_key_and_value(fields, message):
    with pytest.raises(GrpoError) as error:
        hf_config.config_from_hf(fields, "dir/config.json")
    assert str(error.value).startswith("dir/config.json: ") and message in str(error)


def test_windows_are_read_as_transformers_reads_them():
    def window(**fields):
        return hf_config.config_from_hf(
            {"num_hidden_layers": 2} | fields
        ).sliding_window

    assert window(model_type="mistral", sliding_window=None) is None  # v0.2 and later
    assert window(model_type="mistral", sliding_window=7) == 7
    assert window(model_type="llama", sliding_window=7) is None
    assert window(model_type="qwen2", sliding_window=7) is None  # switched off
    on = dict(model_type="qwen2", use_sliding_window=True, sliding_window=7)
    assert window(**on) is None  # from layer 28 on, there are 2
    assert window(**on, max_window_layers=0) == 7


configs = st.builds(
    ModelConfig,
    vocab_size=st.integers(1, 99),
    width=st.sampled_from([16, 24]),
    layers=st.integers(1, 4),
    heads=st.sampled_from([2, 4]),
    kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([4, 6]),
    ffn=st.integers(1, 99),
    norm_eps=st.sampled_from([1e-5, 1e-6]),
    rope_theta=st.sampled_from([1e4, 5e5]),
    rope_scaling=st.sampled_from(
        [
            None,
            RopeScaling(kind="linear", factor=2.0),
            RopeScaling(kind="llama3", factor=8.0),
        ]
    ),
    tied=st.booleans(),
    max_positions=st.integers(1, 99),
)
kinds = st.sampled_from(
    [
        {},
        {"qkv_bias": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"sliding_window": 5},
        {"qkv_bias": True, "sliding_window": 5},
        {"qk_norm": True},
        {"qk_norm": True, "qkv_bias": True, "out_bias": True, "sliding_window": 5},
    ]
)


@settings(max_examples=60, deadline=None)
@given(configs, kinds)
def test_a_config_comes_back_from_its_json(config, kind):
    config = dataclasses.replace(config, **kind)
    fields = json.loads(json.dumps(hf_config.config_to_hf(config)))
    assert hf_config.config_from_hf(fields) == config


def test_a_model_without_a_name_in_transformers_is_not_exported():
    config = ModelConfig(
        vocab_size=9, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn=8
    )
    odd = dataclasses.replace(config, qk_norm=True, mlp_bias=True)
    with pytest.raises(GrpoError, match="no architecture of transformers"):
        hf_config.config_to_hf(odd)


# -- in and out ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_comes_back_bit_for_bit(name, tmp_path):
    dtype = "bfloat16" if name == SHARDED else "float32"
    model, params = load_pretrained(GOLDEN / name, dtype=dtype)
    save_pretrained(model, params, tmp_path / "out", max_shard_bytes=8000)
    again, same = load_pretrained(tmp_path / "out", dtype=dtype)
    assert again == model and equal(params, same)

    # and as another reader sees it: the names and numbers of the original files
    original, written = (
        {
            key: file.get_tensor(key)
            for path in sorted(folder.glob("*.safetensors"))
            for file in [safe_open(path, "np")]
            for key in file.keys()  # noqa: SIM118
        }
        for folder in (GOLDEN / name, tmp_path / "out")
    )
    assert original.keys() == written.keys()
    for key, value in written.items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, original[key].astype(dtype))
    files = list((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 1 and set(index["weight_map"]) == set(written)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in written.values())
    assert all(file.stat().st_size < 8000 + 2000 for file in files)  # and a header


def test_bfloat16_is_the_rounded_float32():
    _, exact = load_pretrained(GOLDEN / WHOLE)
    model, half = load_pretrained(GOLDEN / WHOLE, dtype="bfloat16")
    assert model.dtype == "bfloat16"
    assert equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))
    assert not equal(exact, jax.tree.map(lambda x: x.astype(jnp.float32), half))
    with pytest.raises(GrpoError, match="dtype='float16'"):
        load_pretrained(GOLDEN / WHOLE, dtype="float16")


@pytest.mark.parametrize("name", [SHARDED, "qwen2"])
def test_a_mesh_of_eight_devices_holds_the_same_numbers(name, tmp_path):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])
    model, whole = load_pretrained(GOLDEN / name)
    same, spread = load_pretrained(GOLDEN / name, mesh=mesh)
    assert same == model
    for leaf, part, plan in zip(
        *map(jax.tree.leaves, (whole, spread, abstract_params(model.config, mesh))),
        strict=True,
    ):
        assert part.sharding == plan.sharding and len(part.sharding.device_set) == 8
        np.testing.assert_array_equal(leaf, part)
    # a matrix is cut in four, not copied whole to each device
    assert spread["layers"]["gate_proj"].addressable_shards[0].data.shape == (2, 12, 8)
    save_pretrained(model, spread, tmp_path / "out")
    assert equal(whole, load_pretrained(tmp_path / "out")[1])


@pytest.mark.parametrize("spread", [False, True])
def test_weights_are_not_held_beside_their_shards(spread, tmp_path, monkeypatch):
    """In NumPy's memory while a part is read: the part, and less than a tensor more.

    A part is of one matrix in all layers, and the device's as soon as it is read; 0.22
    of this model at most. Devices that hold the same part have it read once.
    """
    config = ModelConfig(
        vocab_size=64, width=128, layers=12, heads=4, kv_heads=4, head_dim=32, ffn=352
    )
    model = Decoder(config)
    whole = model.init(jax.random.key(0), "bfloat16")
    save_pretrained(model, whole, tmp_path / "hf")
    mesh = sharding.make_mesh(8) if spread else None
    monkeypatch.setattr(weights, "BLOCK", 1024)
    load_pretrained(tmp_path / "hf", mesh=mesh)  # what is imported once is there
    make, parts, beside = jax.make_array_from_callback, [], []

    def watched(shape, where, read):
        def measured(index):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            parts.append(read(index))
            beside.append(tracemalloc.get_traced_memory()[1] - before)
            return parts[-1]

        return make(shape, where, measured)

    monkeypatch.setattr(jax, "make_array_from_callback", watched)
    tracemalloc.start()
    try:
        _, params = load_pretrained(tmp_path / "hf", mesh=mesh)
    finally:
        tracemalloc.stop()
    assert equal(params, jax.tree.map(lambda x: x.astype(jnp.float32), whole))
    tensor = max(x[0].nbytes for x in jax.tree.leaves(params["layers"]))
    seen = set()
    for part, more in zip(parts, beside, strict=True):
        new = 0 if id(part) in seen else part.nbytes
        assert more < new + tensor, (part.shape, more)
        seen.add(id(part))
    assert len(seen) == len(jax.tree.leaves(params))  # each once, also for eight


def test_the_plan_of_the_parameters_takes_no_memory():
    config = ModelConfig(
        vocab_size=102400,
        width=4096,
        layers=30,
        heads=32,
        kv_heads=32,
        head_dim=128,
        ffn=11008,
    )
    plan = abstract_params(config, sharding.make_mesh(fsdp=8), "bfloat16")
    count = sum(leaf.size for leaf in jax.tree.leaves(plan))
    assert count == 6_910_365_696  # DeepSeekMath 7B
    assert plan["embed"].dtype == jnp.bfloat16
    assert plan["embed"].sharding.shard_shape(plan["embed"].shape) == (102400, 512)


class Vocabulary:
    """The part of a tokenizer that an export asks for."""

    eos_ids, bos_id, pad_id = (2, 5), 1, 0

    def save(self, folder):
        (folder / "tokenizer.json").write_text(_tokenizer(11))


def _tokenizer(size):
    model = tokenizers.models.WordLevel({f"t{i}": i for i in range(size)})
    return tokenizers.Tokenizer(model).to_str()


@pytest.fixture
def new_model() -> tuple[Decoder, Params]:
    config = ModelConfig(
        vocab_size=11, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn=8
    )
    plan = abstract_params(config)
    return Decoder(config), jax.tree.map(lambda x: jnp.ones(x.shape), plan)


def test_a_new_model_gets_a_config_and_its_tokenizer(new_model, tmp_path):
    model, params = new_model
    save_pretrained(model, params, tmp_path / "out", tokenizer=Vocabulary())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "float32"
    assert config["eos_token_id"] == [2, 5] and config["bos_token_id"] == 1
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_the_source_folder_s_other_fields_are_kept(tmp_path):
    source = shutil.copytree(GOLDEN / WHOLE, tmp_path / "source")
    fields = json.loads((source / "config.json").read_text())
    edited = fields | {"my_field": [1, 2]}
    (source / "config.json").write_text(json.dumps(edited))
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    model, params = load_pretrained(source, dtype="bfloat16")
    save_pretrained(model, params, tmp_path / "out", source=source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == edited | {"torch_dtype": "bfloat16"}
    assert (tmp_path / "out" / "generation_config.json").exists()
    with pytest.raises(GrpoError, match="another model"):
        save_pretrained(model, params, tmp_path / "no", source=GOLDEN / "qwen2")


def test_an_export_is_complete_or_not_there(new_model, tmp_path):
    model, params = new_model

    class Broken(Vocabulary):
        def save(self, folder):
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        save_pretrained(model, params, tmp_path / "out", tokenizer=Broken())
    assert os.listdir(tmp_path) == []

    (tmp_path / "out").mkdir()
    save_pretrained(model, params, tmp_path / "out")  # an empty folder is taken
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(GrpoError, match="out: exists and is not empty"):
        save_pretrained(model, params, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(GrpoError, match="file/out: cannot be written"):
        save_pretrained(model, params, tmp_path / "file" / "out")


# -- faults 18-24 and 26 ---------------------------------------------------------------

FIRST, SECOND = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))


def rewrite(file: Path, edit) -> None:
    """Changes the header of a safetensors file and leaves its bytes."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = edit(raw[8 : 8 + length].decode())
    file.write_bytes(
        struct.pack("<Q", len(header)) + header.encode() + raw[8 + length :]
    )


def missing_shard(folder):
    (folder / SECOND).unlink()
    return SECOND, "missing", "model.layers."


def truncated(folder):
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(raw[:-1])
    return SECOND, "truncated"


def truncated_in_the_header(folder):
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(raw[:100])
    return SECOND, "truncated"


def empty_file(folder):
    (folder / SECOND).write_bytes(b"")
    return SECOND, "truncated"


def web_page(folder):
    (folder / SECOND).write_text("<!DOCTYPE html><title>Not found</title>" * 9)
    return SECOND, "not safetensors"


def lfs_pointer(folder):
    (folder / SECOND).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    )
    return SECOND, "git-LFS", "git lfs pull"


def lfs_config(folder):
    (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    return "config.json", "git-LFS"


def pickle_in_disguise(folder):
    (folder / SECOND).write_bytes(pickle.dumps({"w": list(range(99))}))
    return SECOND, "a pickle"


def zip_in_disguise(folder):
    golden = Path(__file__).parents[1] / "golden" / "bin"
    shutil.copy(golden / "pytorch_model-00001-of-00002.bin", folder / SECOND)
    return SECOND, "a pickle", "grpo_jax.convert"


def wrong_shape(folder):
    fields = json.loads((folder / "config.json").read_text())
    fields["intermediate_size"] = 25
    (folder / "config.json").write_text(json.dumps(fields))
    return "mlp.down_proj.weight", "[16, 24]", "[16, 25]"


def unknown_tensors(folder):
    for shard in (FIRST, SECOND):
        rewrite(folder / shard, lambda text: text.replace("gate_proj", "gate_new"))
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("gate_proj", "gate_new"))
    return "2 missing", "2 unknown", "0.mlp.gate_new.weight", "0.mlp.gate_proj.weight"


def one_layer_too_many(folder):
    fields = json.loads((folder / "config.json").read_text())
    fields["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(fields))
    return "9 missing", "model.layers.2.", "…"


def one_layer_too_few(folder):
    fields = json.loads((folder / "config.json").read_text())
    fields["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(fields))
    return "9 unknown", "model.layers.1.", "…"


def path_in_the_index(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(FIRST, f"../{folder.name}/{FIRST}"))
    return "index.json", f"../{folder.name}/{FIRST}", "not a plain file name"


def parent_in_the_index(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(FIRST, ".."))
    return "index.json", "'..'", "not a plain file name"


def index_that_lies(folder):
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    where["weight_map"]["model.norm.weight"] = FIRST
    index.write_text(json.dumps(where))
    return FIRST, "model.norm.weight"


def only_bin(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return "only .bin", "python -m grpo_jax.convert"


def nothing(folder):
    for file in folder.glob("model*"):
        file.unlink()
    return ("model.safetensors is missing",)


def no_config(folder):
    (folder / "config.json").unlink()
    return ("config.json: this file is missing",)


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')
    return "config.json", "not valid JSON", "line 1 column 24"


def twice_in_two_files(folder):
    shutil.copy(folder / FIRST, folder / "model-extra.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    return "model.embed_tokens.weight", FIRST, "model-extra.safetensors"


def twice_in_one_file(folder):
    name = '"model.layers.0.mlp.up_proj.weight"'
    other = '"model.layers.0.mlp.gate_proj.weight"'

    def edit(text):
        assert name in text and other in text
        return text.replace(name, other)

    file = next(
        f for f in folder.glob("*.safetensors") if name in f.read_text("latin1")
    )
    rewrite(file, edit)
    return file.name, "invalid offset for tensor `model.layers.0.mlp.gate_proj.weight`"


def not_finite(value):
    def fault(folder):
        header = (folder / FIRST).read_bytes()
        tensors = safe_open(folder / FIRST, "np")
        name = sorted(tensors.keys())[0]
        array = tensors.get_tensor(name)
        at = header.index(array.tobytes())
        array.reshape(-1)[5] = value
        raw = array.tobytes()
        (folder / FIRST).write_bytes(header[:at] + raw + header[at + len(raw) :])
        return FIRST, name, "NaN" if value != value else "infinity"

    fault.__name__ = f"not_finite({value})"
    return fault


def eight_bits(folder):
    tensors = load_file(folder / FIRST)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].astype(jnp.float8_e4m3fn)
    save_file(tensors, folder / FIRST)
    return FIRST, "F8_E4M3", "not supported"


def large_tokenizer(folder):
    (folder / "tokenizer.json").write_text(_tokenizer(62))
    return "tokenizer.json", "'t61' has id 61", "only 61 rows"


FAULTS = [
    missing_shard,
    truncated,
    truncated_in_the_header,
    empty_file,
    web_page,
    lfs_pointer,
    lfs_config,
    pickle_in_disguise,
    zip_in_disguise,
    wrong_shape,
    unknown_tensors,
    one_layer_too_many,
    one_layer_too_few,
    path_in_the_index,
    parent_in_the_index,
    index_that_lies,
    only_bin,
    nothing,
    no_config,
    broken_config,
    twice_in_two_files,
    twice_in_one_file,
    not_finite(np.nan),
    not_finite(-np.inf),
    eight_bits,
    large_tokenizer,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_told_in_one_line(fault, tmp_path):
    folder = shutil.copytree(GOLDEN / SHARDED, tmp_path / "model")
    load_pretrained(folder, dtype="bfloat16")  # sound before
    words = fault(folder)
    with pytest.raises(GrpoError) as error:
        load_pretrained(folder, dtype="bfloat16")
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message


def test_a_tied_model_may_carry_its_output_matrix_and_old_constants(tmp_path):
    """A copy of the embedding and rotary_emb.inv_freq are no unknown tensors."""
    folder = shutil.copytree(GOLDEN / WHOLE, tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, file)
    assert equal(load_pretrained(folder)[1], load_pretrained(GOLDEN / WHOLE)[1])


def test_shards_without_an_index_are_found(tmp_path):
    folder = shutil.copytree(GOLDEN / SHARDED, tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    assert equal(load_pretrained(folder)[1], load_pretrained(GOLDEN / SHARDED)[1])


def test_a_hub_name_says_what_is_missing_and_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    with pytest.raises(GrpoError) as error:
        load_pretrained("org/model-7b", revision="refs/pr/2")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("org/model-7b/config.json is missing")
    assert "hf download org/model-7b --revision refs/pr/2" in message
    with pytest.raises(GrpoError, match="hf download org/model-7b "):
        model_config("org/model-7b")
    with pytest.raises(GrpoError, match="there is no such folder"):
        load_pretrained("/nowhere/model/7b")
