"""Commands that start the sandbox's server: under bubblewrap, or bare for Landlock.

The server gets nothing of the host's environment. Of the host's files it can read the
shared libraries, Python, numpy, sympy and mpmath, and no others.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from grpo_jax.errors import GrpoError

PACKAGES = ("numpy", "sympy", "mpmath")
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
SERVER = Path(__file__).with_name("server.py")


def package_folders() -> list[Path]:
    """Returns the folders of `PACKAGES`, and of the libraries that come with them.

    Raises:
      GrpoError: a package is not installed.
    """
    found: list[Path] = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise GrpoError(f"sandbox: no {name} in this Python; pip install {name}")
        folder = Path(spec.submodule_search_locations[0]).resolve()
        found += filter(Path.is_dir, (folder, folder.with_name(f"{name}.libs")))
    return found


def program_environment(library: str) -> dict[str, str]:
    """Returns the environment of a program; `library` holds Python's libraries."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": library,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # the same program prints the same
    }


def _server_command(python: str, *arguments: object) -> list[str]:
    # As text: the server then needs to see no file of this project.
    source = SERVER.read_text(encoding="utf-8")
    flags = ["-s", "-S", "-B", "-P", "-X", "utf8"]
    return [python, *flags, "-c", source, json.dumps(arguments)]


def bubblewrap_command(control: int) -> tuple[list[str], dict[str, str]]:
    """Starts the server in namespaces of its own, without a network, /proc and /sys.

    Its root holds the libraries alone and is read-only.

    Args:
      control: descriptor of the server's end of the socket.

    Returns:
      The command and its environment, for `subprocess`.

    Raises:
      GrpoError: bubblewrap or a package is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise GrpoError("no `bwrap` on PATH (apt-get install bubblewrap)")
    prefix = Path(sys.base_prefix).resolve()
    python = Path("/py") / Path(sys.executable).resolve().relative_to(prefix)
    command = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    # No --die-with-parent: it means the starting thread. The server ends by itself
    # when the host's end of the socket closes.
    command += ["--unshare-uts", "--unshare-cgroup-try", "--new-session"]
    command += ["--hostname", "sandbox"]
    kept = ["SYS_ADMIN"]  # to mount each program's own /tmp
    if os.geteuid() == 0:
        # SETUID and SETGID to become nobody, KILL to end what became nobody.
        kept += ["SETUID", "SETGID", "KILL"]
        command += ["--cap-drop", "ALL"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    for name in kept:
        command += ["--cap-add", f"CAP_{name}"]
    # bubblewrap would make these on its own, but for root alone.
    for folder in ("/usr", "/py", "/py/lib", "/site", "/dev", "/tmp"):
        command += ["--dir", folder]
    for library in LIBRARIES:
        if os.path.islink(library):
            command += ["--symlink", os.readlink(library), library]
        elif os.path.isdir(library):
            command += ["--ro-bind", library, library]
    for folder in ("bin", "lib", "lib64"):
        if (prefix / folder).is_dir():
            command += ["--ro-bind", str(prefix / folder), f"/py/{folder}"]
    inner = Path("/py") / Path(os.__file__).resolve().parent.relative_to(prefix)
    for folder in ("site-packages", "dist-packages"):  # hides what else is installed
        if Path(os.__file__).with_name(folder).is_dir():
            command += ["--tmpfs", str(inner / folder)]
            command += ["--remount-ro", str(inner / folder)]
    for package in package_folders():
        command += ["--ro-bind", str(package), f"/site/{package.name}"]
    for device in ("null", "zero", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--remount-ro", "/", "--chdir", "/tmp", "--"]
    command += _server_command(str(python), control, ["/site"], None)
    return command, program_environment("/py/lib")


def landlock_command(control: int) -> tuple[list[str], dict[str, str]]:
    """Starts the server as a plain process, whose programs confine themselves.

    Args and returns are those of `bubblewrap_command`.
    """
    prefix = Path(sys.base_prefix).resolve()
    folders = [str(folder) for folder in package_folders()]
    readable = [*LIBRARIES, str(prefix / "lib"), "/dev/null", "/dev/urandom"]
    readable += [str(Path(os.__file__).resolve().parent), *folders]
    sites = sorted({str(Path(folder).parent) for folder in folders})
    python = str(Path(sys.executable).resolve())
    command = _server_command(python, control, sites, readable)
    return command, program_environment(str(prefix / "lib"))


MECHANISMS = {"bubblewrap": bubblewrap_command, "landlock": landlock_command}
