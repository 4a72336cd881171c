"""The sandbox: hostile programs do no harm, ordinary ones run as they would outside."""

import contextlib
import errno
import math
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hostile_programs import (
    PROGRAMS,
    REFUSING,
    SECRET,
    SYSTEM_CALLS,
    left_over,
    missing,
    under,
)

from grpo_jax import sandbox
from grpo_jax.errors import GrpoError

PROJECT = pathlib.Path(__file__).parents[2]
LIMITS = {"wall_seconds": 60.0, "cpu_seconds": 30.0, "memory_bytes": 300 << 20}


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    """What programs are told to look for, set up before the sandbox starts."""
    file = tmp_path_factory.mktemp("host") / "secret.txt"
    file.write_text(SECRET)
    file.chmod(0o666)
    os.environ["GRPO_JAX_SECRET"] = SECRET
    opened = os.open(file, os.O_RDONLY)
    os.set_inheritable(opened, True)
    abstract = f"grpo-jax-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(1) as unix:
        unix.bind(f"\0{abstract}")
        unix.listen()
        yield {
            "PORT": str(tcp.getsockname()[1]),
            "SOCKET": abstract,
            "FILE": str(file),
            "PROJECT": str(PROJECT),
        }
    os.close(opened)
    del os.environ["GRPO_JAX_SECRET"]
    assert file.read_text() == SECRET


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def box(request, traps):
    if why := missing(request.param):
        pytest.skip(why)
    with sandbox.Sandbox(request.param) as started:
        yield started


# ---- hostile programs ----------------------------------------------------------------
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_does_no_harm(box, traps, name):
    source, status = PROGRAMS[name]
    for word, value in traps.items():
        source = source.replace(word, value)
    before = under(box._server.process.pid)
    limits = {**LIMITS, **({"wall_seconds": 0.7} if "timeout" in status else {})}
    found = box.run_program(source, output_bytes=1 << 20, **limits)
    said = found.stdout + found.stderr
    assert found.status in status.split(" or "), said[-2000:]
    assert "ESCAPED" not in found.stdout and SECRET not in said
    assert len(said) <= (1 << 20) + 100
    assert found.status != "timeout" or 0.7 <= found.seconds < 10
    assert left_over(box, before) == set()
    # The next program finds everything as it should be.
    after = box.run_program(
        "import sympy, os; print(sympy.sqrt(8), len(os.environ), 2 + 2)"
    )
    assert (after.status, after.stdout.split()[0]) == ("ok", "2*sqrt(2)"), after
    assert after.stdout.split()[-1] == "4"


def test_every_other_system_call_is_refused(box):
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
zeros = [ctypes.c_long(0)] * 6
for name, number in {SYSTEM_CALLS!r}.items():
    ctypes.set_errno(0)
    result = libc.syscall(number, *zeros)
    print(name, result, ctypes.get_errno())
"""
    found = box.run_program(program)
    assert found.status == "ok", found
    lines = [line.split() for line in found.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(SYSTEM_CALLS)
    absent = ("clone3", "openat2")  # so that the C library takes the older ones
    for name, result, error in lines:
        expected = errno.ENOSYS if name in absent else errno.EPERM
        assert (int(result), int(error)) == (-1, expected), name


def test_under_landlock_the_filter_alone_refuses_to_write(box):
    """Older kernels' Landlock lets O_TRUNC through; the filter's errno is not its."""
    if box.mechanism != "landlock":
        pytest.skip("under bubblewrap a program has a /tmp to write to")
    program = """
import os
for flags in (os.O_RDONLY | os.O_TRUNC, os.O_WRONLY, os.O_RDWR, os.O_CREAT):
    try: os.open(os.__file__, flags)
    except OSError as error: print(error.errno)
"""
    assert box.run_program(program).stdout.split() == [str(errno.EPERM)] * 4


def test_a_program_has_given_everything_up(box):
    """As the kernel tells it, from outside."""
    before = under(box._server.process.pid)
    thread = threading.Thread(
        target=box.run_program, args=["import time; time.sleep(1.5)"]
    )
    thread.start()
    time.sleep(0.7)
    new = under(box._server.process.pid) - before  # the keeper, the program
    states = [pathlib.Path(f"/proc/{n}/status").read_text() for n in new]
    thread.join()
    confined = [s for s in states if re.search(r"^Seccomp:\t2$", s, re.M)]
    assert len(states) == 2 and len(confined) == 1
    assert re.search(r"^NoNewPrivs:\t1$", confined[0], re.M)
    for kind in ("Inh", "Prm", "Eff", "Amb"):
        assert re.search(rf"^Cap{kind}:\t0+$", confined[0], re.M)
    if box.mechanism == "bubblewrap" and os.geteuid() == 0:
        assert re.search(r"^Uid:\t65534\t65534\t65534\t65534$", confined[0], re.M)


def test_programs_do_not_see_each_other(box):
    """Not even at the same time: what one writes to /tmp, another has not got."""
    leave = "import time; open('/tmp/note', 'w').write('ESCAPED'); time.sleep(0.5)"
    look = "import time, os; time.sleep(0.3); print(os.path.exists('/tmp/note'))"
    _, found, later = box.run_programs([leave, look, look], workers=2)
    assert found.stdout == later.stdout == "False\n"


def test_nothing_outlives_the_caller(tmp_path):
    """The caller is killed; its server, its keeper and its program end."""
    code = (
        "import threading, sys; from grpo_jax import sandbox\n"
        "box = sandbox.Sandbox(); print(box._server.process.pid, flush=True)\n"
        "box.run_program('import time; time.sleep(1000)', wall_seconds=1000)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment
    ) as caller:
        assert caller.stdout
        server = int(caller.stdout.readline())
        time.sleep(0.5)
        running = under(server)
        assert len(running) >= 3
        caller.kill()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        alive = [n for n in running if pathlib.Path(f"/proc/{n}").exists()]
        # A zombie whose new parent does not wait is over as well.
        alive = [n for n in alive if ") Z " not in _stat(n)]
        if not alive:
            return
        time.sleep(0.05)
    pytest.fail(f"still running: {alive}")


def _stat(process: int) -> str:
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ") Z "


# ---- ordinary programs ---------------------------------------------------------------
ORDINARY = {
    "prints": ("print('a'); print('b', end='')", "a\nb"),
    "unicode": ("print('解 = π ✓ 🙂', 'é'.encode())", "解 = π ✓ 🙂 b'\\xc3\\xa9'\n"),
    "numpy": (
        "import numpy as np\nA = np.array([[2., 1], [1, 3]])\n"
        "print(np.linalg.solve(A, [3, 5]).round(6).tolist(), np.fft.fft([1, 0]).real)",
        "[0.8, 1.4] [1. 1.]\n",
    ),
    "sympy": (
        "from sympy import *\nx, y = symbols('x y')\n"
        "print(solve([x + y - 3, x - y - 1], [x, y]), integrate(exp(-x**2), (x, -oo, "
        "oo)))\nprint(Matrix([[1, 2], [3, 4]]).det(), limit(sin(x) / x, x, 0))",
        "{x: 2, y: 1} sqrt(pi)\n-2 1\n",
    ),
    "the standard library": (
        "import itertools, fractions, decimal, statistics, json, datetime, hashlib\n"
        "print(fractions.Fraction(1, 3) + 1, decimal.Decimal('0.1') * 3)\n"
        "print(statistics.mean([1, 2]), hashlib.sha256(b'').hexdigest()[:6])",
        "4/3 0.3\n1.5 e3b0c4\n",
    ),
    "a main guard": (
        "def f():\n    return x\nx = 5\nif __name__ == '__main__': print(f())",
        "5\n",
    ),
    "classes and pickles": (
        "import pickle, dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\n"
        "print(pickle.loads(pickle.dumps(P(3))))",
        "P(x=3)\n",
    ),
    "leaves early": ("print(1); exit(); print(2)", "1\n"),
    "leaves without a flush": ("import os; print('kept'); os._exit(0)", "kept\n"),
    "bad UTF-8": (
        "import sys; sys.stdout.buffer.write(b'a\\xffb\\n')",
        "a\ufffdb\n",
    ),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_program(box, name):
    program, printed = ORDINARY[name]
    found = box.run_program(program, **LIMITS)
    assert (found.status, found.stdout, found.stderr) == ("ok", printed, "")


@pytest.mark.parametrize(
    "program, last",
    [
        ("print('before'); 1 / 0", "ZeroDivisionError: division by zero"),
        ("print('before')\ninput()", "EOFError: EOF when reading a line"),
        ("print('before')\nimport sys; sys.exit('no root')", "no root"),
        (
            "print('before')\nimport torch",
            "ModuleNotFoundError: No module named 'torch'",
        ),
        ("print('before')\nimport os; os._exit(3)", ""),
        ("print('before')\nimport ctypes; ctypes.string_at(0)", "killed by signal 11"),
    ],
)
def test_an_error_keeps_what_was_printed(box, program, last):
    found = box.run_program(program)
    assert (found.status, found.stdout) == ("error", "before\n")
    assert found.stderr.rstrip("\n").rpartition("\n")[2] == last


def test_a_traceback_names_the_line(box):
    found = box.run_program("def half(x):\n    return x / 0\n\nhalf(3)\n")
    assert 'File "<program>", line 2, in half\n    return x / 0' in found.stderr
    assert "server" not in found.stderr and "<string>" not in found.stderr
    syntax = box.run_program("x = = 1")
    assert syntax.status == "error" and "SyntaxError" in syntax.stderr


def test_a_file_of_its_own(box):
    found = box.run_program("open('/tmp/a', 'w').write('é'); print(open('a').read())")
    if box.mechanism == "bubblewrap":
        assert found.stdout == "é\n"
    else:  # Landlock has no place of bounded size
        assert "PermissionError" in found.stderr


def test_the_same_program_prints_the_same(box):
    program = (
        "import random, numpy\nprint(random.random(), numpy.random.rand())\n"
        "print({str(n) for n in range(20)}, hash('a'))"
    )
    first, second = box.run_programs([program] * 2)
    assert first.stdout == second.stdout
    with sandbox.Sandbox(box.mechanism) as other:
        assert other.run_program(program).stdout == first.stdout


# ---- limits --------------------------------------------------------------------------
def test_wall_time_is_measured_and_ends_a_program(box):
    found = box.run_program("import time; print(1); time.sleep(0.4)", wall_seconds=5)
    assert found.status == "ok" and 0.35 < found.seconds < 2
    found = box.run_program("import time; print(1); time.sleep(9)", wall_seconds=0.4)
    assert (found.status, found.stdout) == ("timeout", "1\n")
    assert 0.4 <= found.seconds < 2


def test_cpu_time_ends_a_program_before_its_wall_time(box):
    found = box.run_program("while True: pass", cpu_seconds=1, wall_seconds=60)
    assert found.status == "timeout" and found.seconds >= 0.9
    slept = box.run_program(
        "import time; time.sleep(1.3)", cpu_seconds=1, wall_seconds=60
    )
    assert slept.status == "ok"


def test_memory_is_what_was_allowed(box):
    program = "x = bytearray(300 << 20); print(len(x) >> 20)"
    assert box.run_program(program, memory_bytes=1 << 30).stdout == "300\n"
    less = box.run_program(program, memory_bytes=400 << 20)
    assert less.status == "error" and "MemoryError" in less.stderr


@pytest.mark.parametrize("limit", [1, 1000, 65536 + 1])
def test_output_is_cut_where_it_was_allowed(box, limit):
    exact = box.run_program(f"print('x' * {limit}, end='')", output_bytes=limit)
    assert (exact.status, exact.stdout) == ("ok", "x" * limit)
    over = box.run_program(f"print('x' * {limit + 1}, end='')", output_bytes=limit)
    assert (over.status, over.stdout) == ("output_limit", "x" * limit)
    both = box.run_program(
        "import sys\n"
        f"print('y' * {limit}, end='', flush=True); print('z', file=sys.stderr)",
        output_bytes=limit,
    )
    assert (both.status, both.stdout, both.stderr) == ("output_limit", "y" * limit, "")


@pytest.mark.parametrize("name", list(LIMITS) + ["output_bytes"])
@pytest.mark.parametrize("limit", [0, -1, math.nan])
def test_a_limit_of_nothing_is_a_mistake(box, name, limit):
    with pytest.raises(GrpoError, match=f"sandbox.{name}"):
        box.run_program("print(1)", **{name: limit})


# ---- many, and the sandbox's own faults ----------------------------------------------
def test_many_keep_their_order(box):
    rng = random.Random(0)
    waits = [rng.random() / 5 for _ in range(12)]
    programs = [
        f"import time; time.sleep({w}); print({n})" for n, w in enumerate(waits)
    ]
    programs[5] = "1 / 0"
    found = box.run_programs(programs, workers=6)
    printed = [f"{n}\n" for n in range(12)]
    printed[5] = ""
    assert [x.stdout for x in found] == printed
    assert [n for n, x in enumerate(found) if x.status != "ok"] == [5]
    assert box.run_programs([]) == []


def end(processes) -> None:
    """All at once: none of them lives to tell how another ended."""
    for kind in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, kind)


def end_servers(box, times: int) -> None:
    """Ends the server and all under it, once a program runs there; and the next one."""
    idle = 3 if box.mechanism == "bubblewrap" else 1  # its own two, the server
    for _ in range(times):
        server = box._server.process
        while len(running := under(server.pid)) < idle + 2:
            time.sleep(0.02)
        end(running)
        while times > 1 and box._server.process is server:
            time.sleep(0.02)


@pytest.mark.parametrize("times", [1, 2])
def test_the_death_of_a_server_is_not_the_programs_fault(box, times):
    """What it ran is run once more; then the sandbox says that it failed."""
    box.run_program("")
    thread = threading.Thread(target=end_servers, args=[box, times], daemon=True)
    thread.start()
    program = "import time; time.sleep(0.8); print('done')"
    if times == 1:
        found = box.run_program(program)
        assert (found.status, found.stdout) == ("ok", "done\n")
    else:
        with pytest.raises(sandbox.SandboxError, match="could not be run"):
            box.run_program(program)
    assert box.run_program("print(1)").stdout == "1\n"
    thread.join(10)
    assert not thread.is_alive()


MOUNT, LANDLOCK = 165, 444


@pytest.mark.parametrize(
    "refused, answer",
    [
        ((MOUNT,), "landlock 42\n"),
        ((MOUNT, LANDLOCK), "refused: sandbox: this machine has no way to confine"),
    ],
)
def test_without_bubblewrap_landlock_and_without_both_nothing(refused, answer):
    if LANDLOCK not in refused and (why := missing("landlock")):
        pytest.skip(why)
    code = REFUSING.replace("REFUSED", repr(refused))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.startswith(answer), done.stderr
    assert "refused" not in answer or "apt-get install bubblewrap" in done.stdout


def test_the_shared_sandbox_is_started_once():
    if missing("bubblewrap") and missing("landlock"):
        pytest.skip("neither mechanism exists here")
    first = sandbox.shared_sandbox()
    assert first.run_program("print(3)").stdout == "3\n"
    assert sandbox.shared_sandbox() is first
