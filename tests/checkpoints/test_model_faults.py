"""What is wrong with a model's folder ends train.py before it trains, in one line."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from small_runs import SMALL, small_config, write_questions

from grpo_jax.checkpoints.huggingface.weights import save_pretrained
from grpo_jax.data import chain_sums
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.train import train_run

SHARDS = 3


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A model of characters in some shards, and questions for it."""
    here = tmp_path_factory.mktemp("model")
    write_questions(here / "sums.jsonl")
    tokenizer = Tokenizer.from_alphabet(chain_sums.ALPHABET)
    config = ModelConfig(
        **{"vocab_size": tokenizer.vocab_size, "width": 16, "layers": 1, "heads": 2},
        **{"kv_heads": 2, "head_dim": 8, "ffn": 32},
    )
    model = Decoder(config)
    params = model.init(jax.random.key(0))
    size = sum(x.nbytes for x in jax.tree.leaves(params)) // SHARDS
    save_pretrained(
        model, params, here / "hf", tokenizer=tokenizer, max_shard_bytes=size
    )
    return here


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def missing_shard(folder):
    file = shard(folder)
    file.unlink()
    return file.name, "this file is missing; it holds model.layers.0."


def truncated(folder):
    file = shard(folder)
    file.write_bytes(file.read_bytes()[:-3])
    return str(file), "truncated", "download it again"


def pointer(folder):
    shard(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    return str(shard(folder)), "git-LFS pointer"


def disguised(folder):
    golden = Path(__file__).parents[1] / "golden" / "bin"
    shutil.copy(golden / "pytorch_model-00001-of-00002.bin", shard(folder))
    return str(shard(folder)), "a pickle", "not opened"


def other_shape(folder):
    edit(folder / "config.json", intermediate_size=31)
    return "mlp.down_proj.weight has shape [16, 32]", "asks for [16, 31]"


def unmapped(folder):
    tensors = load_file(shard(folder))
    tensors["model.layers.0.extra"] = np.ones(2, np.float32)
    save_file(tensors, shard(folder))
    return "1 unknown (model.layers.0.extra)", "config.json"


def out_of_the_folder(folder):
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    where["model.norm.weight"] = "../hf/model.safetensors"
    edit(index, weight_map=where)
    return str(index), "'../hf/model.safetensors'", "not a plain file name"


def only_bin(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    return "only .bin weights", "python -m grpo_jax.convert"


def large_vocabulary(folder):
    file = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["答"])
    tokenizer.save(str(file))
    return f"highest id is {size}", f"embedding has {size} rows"


def no_end(folder):
    edit(folder / "config.json", eos_token_id=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink()
    return str(folder), "no EOS token"


def not_a_number(folder):
    tensors = load_file(shard(folder))
    name = next(iter(tensors))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[3] = np.nan
    save_file(tensors, shard(folder))
    return str(shard(folder)), f"{name} holds NaN"


def moved(folder):
    """The first tensor's numbers are said to lie four bytes further on."""
    raw = shard(folder).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    entries = [e for name, e in header.items() if name != "__metadata__"]
    first = min(entries, key=lambda entry: entry["data_offsets"])
    first["data_offsets"] = [x + 4 for x in first["data_offsets"]]
    text = json.dumps(header).encode()
    raw = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    shard(folder).write_bytes(raw)
    return str(shard(folder)), "invalid offset for tensor"


def end_outside(folder):
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((folder / file).read_text())
        del settings["eos_token"]
        (folder / file).write_text(json.dumps(settings))
    edit(folder / "config.json", eos_token_id=-1)
    return str(folder / "config.json"), "eos_token_id=-1 is not the id of a token"


def heads(folder):
    edit(folder / "config.json", num_key_value_heads=-1)
    return str(folder / "config.json"), "num_key_value_heads=-1 is not a whole number"


FAULTS = [
    *(missing_shard, truncated, pointer, disguised, other_shape, unmapped),
    *(out_of_the_folder, only_bin, large_vocabulary, no_end, not_a_number),
    *(moved, end_outside, heads),
]


def settings(here: Path, model: Path) -> dict[str, object]:
    questions = str(here / "sums.jsonl")
    files = {"data.train": questions, "data.sft": questions, "data.eval": questions}
    of_the_folder = {f"model.{name}": 0 for name in ("layers", "width", "heads", "ffn")}
    return SMALL | files | of_the_folder | {"model.path": str(model)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_model_ends_a_run_before_it_trains(fault, sound, tmp_path):
    folder = shutil.copytree(sound / "hf", tmp_path / "hf")
    words = fault(folder)
    config = small_config(settings(sound, folder))
    with pytest.raises(GrpoError) as error:
        train_run(config, tmp_path / "run")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    run = tmp_path / "run"
    assert not [file for file in run.glob("checkpoints/**/*") if file.is_file()]
    metrics = run / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()


def test_a_fault_of_the_model_is_one_line_of_the_command(sound, tmp_path):
    folder = shutil.copytree(sound / "hf", tmp_path / "hf")
    not_a_number(folder)
    flags = [f"--config.{k}={v}" for k, v in settings(sound, folder).items()]
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", *flags]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "run")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith(f"error: {shard(folder)}: ") and "holds NaN" in line
    assert "Traceback" not in done.stderr
