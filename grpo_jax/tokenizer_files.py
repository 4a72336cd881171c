"""What the files of a Hugging Face folder say about its tokenizer.

In: tokenizer_config.json and its neighbours. Out: the named special tokens, the chat
template, the ids that end a completion; or one line that names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from grpo_jax.errors import GrpoError


def token_ids(value: Any, tokenizer: tokenizers.Tokenizer, file: Path) -> list[int]:
    """eos_token_id of a config: an id, several, or none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    known = set(tokenizer.get_vocab(with_added_tokens=True).values()) if ids else ()
    for i in ids:
        if type(i) is not int or i not in known:
            raise GrpoError(
                f"{file}: eos_token_id {value!r}: {i!r} is not the id of a token; "
                f"tokenizer.json has {size}"
            )
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be absent."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise GrpoError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise GrpoError(f"{path}: expected a JSON object")
    return content


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """eos_token, bos_token …: written as text or as an object with `content`."""
    special = {}
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, dict):
            value = value.get("content")
        if key.endswith("_token") and isinstance(value, str):
            special[key] = value
    return special


def chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise GrpoError(f"{file}: not UTF-8 text ({error})") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        by_name = {str(entry.get("name")): entry.get("template") for entry in named}
        template = by_name.get("default")
    if template is not None and not isinstance(template, str):
        raise GrpoError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor "
            "a list of {name, template}"
        )
    return template
