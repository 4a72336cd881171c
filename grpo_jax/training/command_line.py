"""Parses command lines with a config, `--config FILE --config.field=value`."""

from __future__ import annotations

import itertools
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

from absl import flags
from ml_collections import config_flags

from grpo_jax.arguments import ArgumentParser, underscore_flags
from grpo_jax.config import Config, flatten_config, unknown_field
from grpo_jax.errors import GrpoError, one_line
from grpo_jax.training.config_checks import validate_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "the run's config file")


def print_help(argv: list[str], usage: str, names: Sequence[str]) -> None:
    """If argv asks for help, prints the usage and the named flags, and exits."""
    if not {"-h", "-help", "--help", "--helpfull"} & set(argv[1:]):
        return
    parser = ArgumentParser(usage=usage.removeprefix("usage: "))
    for name in ("config", *names):
        flag = flags.FLAGS[name]
        parser.add_argument(
            f"--{name}",
            *[f"--no{name}"] * bool(flag.boolean and flag.default),
            default=flag.default,
            help=flag.help,
            action="store_true" if flag.boolean else "store",
        )
    parser.add_argument("--config.FIELD", metavar="VALUE", help="any of these fields")
    parser.print_help()
    print("\nfields of the config:")
    print(
        "\n".join(f"  {name} = {x!r}" for name, x in flatten_config(Config()).items())
    )
    sys.exit(0)


def parse_config(argv: list[str], usage: str) -> Config:
    """Returns the checked config of a command line, and parses its absl flags.

    Args:
      argv: the program's name and its arguments, `--config FILE` and any
        `--config.field=value` among them.
      usage: one line for the messages.

    Raises:
      GrpoError: any mistake, in one line.
    """
    argv = underscore_flags(argv)
    file, known = "", flatten_config(Config())
    for flag, value in itertools.pairwise([*argv[1:], ""]):
        name, equals, inline = flag.lstrip("-").partition("=")
        if name == "config":
            file = (inline if equals else value).partition(":")[0]
            if not Path(file).is_file():
                missing = file or "nothing"
                raise GrpoError(f"--config: {missing}: no such file ({usage})")
        prefix, dot, field = name.removeprefix("no").partition(".")
        if flag.startswith("-") and prefix == "config" and dot and field not in known:
            raise GrpoError(unknown_field(field))
    typed, sys.argv = sys.argv, argv  # where config_flags looks for fields
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        if "parsing config file" in str(error):  # the file raised Type- or ValueError
            raise GrpoError(_in_config_file(error, file)) from None
        raise GrpoError(f"{one_line(error)} ({usage})") from None
    except Exception as error:  # whatever the file's own code raised
        raise GrpoError(_in_config_file(error, file)) from None
    finally:
        sys.argv = typed
    if not file:
        raise GrpoError(usage)
    if rest:
        raise GrpoError(f"{rest[0]!r}: what is this for? ({usage})")
    if not isinstance(_CONFIG.value, Config):
        raise GrpoError("--config: its get_config() must return a grpo_jax Config")
    return validate_config(_CONFIG.value)


def _in_config_file(error: Exception, file: str) -> str:
    """Describes in one line what the config file's own code raised."""
    trace = "".join(traceback.format_exception(error)).strip().splitlines()
    lines = re.findall(rf'File "{re.escape(file)}", line (\d+)', "\n".join(trace))
    place = f"{file}:{lines[-1]}" if lines else file
    call = re.search(r"(\w+)\.__init__\(\) got an unexpected .*? '(\w+)'", trace[-1])
    if call:  # a name that is no field of the Config, or of one of its parts
        parts = get_type_hints(Config).items()
        names = {kind.__name__: f"{n}." for n, kind in parts if is_dataclass(kind)}
        return f"{place}: {unknown_field(names.get(call[1], '') + call[2])}"
    return f"--config: {place}: {trace[-1]}"
