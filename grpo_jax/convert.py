"""Converts weights that `load_pretrained` does not open to a folder that it opens.

    python -m grpo_jax.convert SOURCE OUT

SOURCE is a Hugging Face folder with pytorch_model*.bin files, or a .gguf file; with
--package it is an installed Python package that carries a .gguf file. OUT becomes a
folder with config.json, safetensors and the tokenizer's files, complete or not at all.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from grpo_jax.arguments import ArgumentParser
from grpo_jax.checkpoints.formats.gguf import GgufModel
from grpo_jax.checkpoints.formats.torch_bin import INDEX, read_bin_folder
from grpo_jax.checkpoints.huggingface.config import config_from_hf
from grpo_jax.checkpoints.huggingface.folders import find_folder, new_folder
from grpo_jax.checkpoints.huggingface.safetensors_files import write_folder
from grpo_jax.checkpoints.huggingface.weights import check_names, model_config
from grpo_jax.errors import GrpoError, errors_as_one_line
from grpo_jax.files import write_json

KEPT = (".json", ".jinja", ".model", ".txt", ".md")  # files copied beside the weights


def convert_gguf(file: Path, out: Path) -> None:
    """Writes the Hugging Face folder `out` from a GGUF file, weights in float32.

    Raises:
      GrpoError: the file cannot be read, or its tensors are not those of its config.
    """
    model = GgufModel(file)
    config = model.config()
    tensors = dict(model.tensors())
    check_names(file, config_from_hf(config, str(file)), tensors)
    with new_folder(out) as folder:
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", model.generation_config())
        write_json(folder / "tokenizer_config.json", model.tokenizer_config())
        model.tokenizer().save(str(folder / "tokenizer.json"))
        write_folder(folder, tensors)


def convert_bin(source: Path, out: Path) -> None:
    """Writes the Hugging Face folder `out` from one with pytorch_model*.bin files.

    torch is not needed.

    Raises:
      GrpoError: the folder has safetensors already, a pickle holds more than tensors,
        or the tensors are not those of the config.
    """
    source = find_folder(source)
    if list(source.glob("*.safetensors")):
        raise GrpoError(f"{source}: has safetensors already; load it as it is")
    config = model_config(source)
    stored = {
        name: tensor
        for name, tensor in read_bin_folder(source).items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if config.tied:
        stored.pop("lm_head.weight", None)  # a copy of the embedding
    check_names(source, config, stored)
    with new_folder(out) as folder:
        for file in source.iterdir():
            if file.suffix in KEPT and file.name != INDEX or "LICENSE" in file.name:
                shutil.copyfile(file, folder / file.name)
        write_folder(folder, stored)


def find_gguf(package: str) -> Path:
    """Returns the one .gguf file inside an installed Python package.

    Raises:
      GrpoError: the package is not installed, or does not have exactly one.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise GrpoError(f"package {package} is not installed; pip install it first")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if len(files) != 1:
        raise GrpoError(f"package {package} holds {len(files)} .gguf files, not one")
    return files[0]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with `arguments`, by default those of the process."""
    parser = ArgumentParser(
        prog="python -m grpo_jax.convert",
        description="A .gguf file or a folder of pytorch_model*.bin → safetensors.",
    )
    parser.add_argument(
        "source", help="a folder with pytorch_model*.bin, or a .gguf file"
    )
    parser.add_argument("out", help="the Hugging Face folder to write")
    parser.add_argument(
        "--package",
        action="store_true",
        help="SOURCE is an installed Python package that carries a .gguf file",
    )
    flags = parser.parse_args(arguments)
    with errors_as_one_line(flags.out):
        source = find_gguf(flags.source) if flags.package else Path(flags.source)
        convert = convert_gguf if source.suffix == ".gguf" else convert_bin
        convert(source, Path(flags.out))
    print(f"{flags.out}: written from {source}")


if __name__ == "__main__":
    main()
