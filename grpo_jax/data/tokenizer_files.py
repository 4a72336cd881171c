"""The tokenizer's files in a Hugging Face folder, each read or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from grpo_jax.errors import GrpoError, one_line
from grpo_jax.files import read_json, read_small_file


def open_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a tokenizer.json file.

    Raises:
      GrpoError: the file cannot be read, is a git-LFS pointer, or is no tokenizer file.
    """
    raw = read_small_file(file)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        tokenizer.no_truncation()  # some files set it, and it loses text silently
        tokenizer.no_padding()
        tokenizer.encode("")  # fails if the post-processor is damaged
        return tokenizer
    except Exception as error:  # the package raises nothing narrower
        reason = one_line(error)
    except BaseException as error:  # pyo3's PanicException: a panic in Rust
        if type(error).__name__ != "PanicException":
            raise
        reason = one_line(error)
    raise GrpoError(f"{file}: not a tokenizer file ({reason}); download it again")


def read_token_ids(
    file: Path, key: str, value: Any, tokenizer: tokenizers.Tokenizer
) -> list[int]:
    """Returns an id or a list of ids as a list.

    Raises:
      GrpoError: one is not the id of a token.
    """
    found = value if isinstance(value, list) else [value]
    for item in found:
        whole = type(item) is int and 0 <= item < 2**32
        if not whole or tokenizer.id_to_token(item) is None:
            raise GrpoError(
                f"{file}: {key}={one_line(repr(item))} is not the id of a token; put "
                "those there that end an answer"
            )
    return found


def read_optional_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file, or {} if there is no such file."""
    return read_json(path) if path.is_file() else {}


def special_token_texts(config: dict[str, Any]) -> dict[str, str]:
    """Returns eos_token, bos_token … as text; some files write them as objects."""
    special = {}
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, dict):
            value = value.get("content")
        if key.endswith("_token") and isinstance(value, str):
            special[key] = value
    return special


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Returns the chat template of a model folder; None if it has none.

    Args:
      folder: the folder, whose chat_template.jinja comes first.
      config: the content of its tokenizer_config.json.

    Raises:
      GrpoError: the template is not text.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return read_small_file(file).decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise GrpoError(f"{file}: not UTF-8 ({error.reason})") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        default = [e.get("template") for e in named if e.get("name") == "default"]
        template = default[-1] if default else None
    if template is not None and not isinstance(template, str):
        raise GrpoError(
            f"{folder / 'tokenizer_config.json'}: chat_template is "
            f"{type(template).__name__}; expected text, or a list of name and template"
        )
    return template
