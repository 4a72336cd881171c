"""How the sandbox's server is started, by bubblewrap or bare under Landlock.

In: the mechanism and the socket's descriptor. Out: a command for `subprocess`, and its
environment. Nothing of the host's environment goes in, and of its files only shared
libraries, Python, numpy, sympy and mpmath, to be read.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from grpo_jax.errors import GrpoError

PACKAGES = ("numpy", "numpy.libs", "sympy", "mpmath")
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
SERVER = Path(__file__).with_name("server.py")


def packages() -> list[Path]:
    """The folders of `PACKAGES` (numpy.libs only where numpy has one)."""
    found = []
    for name in PACKAGES:
        if name.endswith(".libs"):
            folder = found[-1].with_name(name)
            found += [folder] if folder.is_dir() else []
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise GrpoError(f"sandbox: no {name} in this Python; pip install {name}")
        found.append(Path(spec.submodule_search_locations[0]).resolve())
    return found


def environment(library: str) -> dict[str, str]:
    """The whole environment of a program."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": library,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # the same program prints the same
    }


def _server(python: str, *arguments: object) -> list[str]:
    # As text, so that no file of the project need be seen from inside.
    source = SERVER.read_text(encoding="utf-8")
    flags = ["-s", "-S", "-B", "-P", "-X", "utf8"]
    return [python, *flags, "-c", source, json.dumps(arguments)]


def bubblewrap(control: int) -> tuple[list[str], dict[str, str]]:
    """Own namespaces; a root of libraries alone, read-only, without /proc and /sys."""
    program = shutil.which("bwrap")
    if program is None:
        raise GrpoError("no `bwrap` on PATH (apt-get install bubblewrap)")
    prefix = Path(sys.base_prefix).resolve()
    python = Path("/py") / Path(sys.executable).resolve().relative_to(prefix)
    command = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    # No --die-with-parent: it means the starting thread. The server ends by itself
    # when the host's end of the socket closes.
    command += ["--new-session"]
    if os.geteuid() == 0:
        # SETUID and SETGID to become nobody, KILL to end what became nobody.
        kept = ["SETUID", "SETGID", "KILL"]
        command += ["--cap-drop", "ALL"]
    else:
        kept = []
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    for name in [*kept, "SYS_ADMIN"]:  # to mount each program's own /tmp
        command += ["--cap-add", f"CAP_{name}"]
    # Folders that bubblewrap makes unasked, on the way to another, are for root alone.
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
    for folder in ("site-packages", "dist-packages"):  # what else is installed
        if Path(os.__file__).with_name(folder).is_dir():
            command += ["--tmpfs", str(inner / folder)]
            command += ["--remount-ro", str(inner / folder)]
    for package in packages():
        command += ["--ro-bind", str(package), f"/site/{package.name}"]
    for device in ("null", "zero", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--remount-ro", "/", "--chdir", "/tmp", "--"]
    command += _server(str(python), control, ["/site"], None)
    return command, environment("/py/lib")


def landlock(control: int) -> tuple[list[str], dict[str, str]]:
    """A plain process; each program shuts itself off from all but the libraries."""
    prefix = Path(sys.base_prefix).resolve()
    folders = [str(folder) for folder in packages()]
    readable = [*LIBRARIES, str(prefix / "lib"), "/dev/null", "/dev/urandom"]
    readable += [str(Path(os.__file__).resolve().parent), *folders]
    sites = sorted({str(Path(folder).parent) for folder in folders})
    python = str(Path(sys.executable).resolve())
    command = _server(python, control, sites, readable)
    return command, environment(str(prefix / "lib"))


MECHANISMS = {"bubblewrap": bubblewrap, "landlock": landlock}
