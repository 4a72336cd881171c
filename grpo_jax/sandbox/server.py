"""The sandbox's server: imports numpy and sympy once, then forks for every program.

It is started as `python -c` and needs the standard library alone. Each message on its
socket carries one connection. A connection brings a line of JSON {program,
wall_seconds, cpu_seconds, memory_bytes, output_bytes} and gets a line of JSON {status,
stdout, stderr, seconds}, or {failed} if the program did not run. Three processes share
the work:

    server   forks a keeper for every connection, and never runs a program itself
    keeper   forks the program, collects its output, and kills it at its limits
    program  drops all rights that it will not need (`confine_process`), then runs

A program has a process of its own, and under bubblewrap a /tmp of its own. It cannot
make another process: once the keeper has seen it end, nothing of it is left.
"""

import builtins
import ctypes
import gc
import json
import linecache
import math
import os
import platform
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
import types

NOBODY = 65534
TMP_BYTES, TMP_FILES, DESCRIPTORS = 16 << 20, 1024, 64
LIBC = ctypes.CDLL(None, use_errno=True)

# ---- what a program may still ask the kernel for (x86-64 system calls) ---------------
_ALWAYS = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7,
    "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17,
    "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "select": 23,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34,
    "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39,
    "exit": 60, "uname": 63, "getcwd": 79, "chdir": 80, "readlink": 89, "umask": 95,
    "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "getgroups": 115, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292, "getcpu": 309,
    "getrandom": 318, "statx": 332, "rseq": 334, "close_range": 436,
    "faccessat2": 439,
}  # fmt: skip
_OPEN = {"open": 2, "openat": 257}
_WRITING = {
    "fsync": 74, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85,
    "unlink": 87, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
}  # fmt: skip
_ABSENT = {"clone3": 435, "openat2": 437}  # the C library then uses the older call
_FCNTL, _LANDLOCK = 72, 444  # Landlock: create a rule set, add a rule, restrict
# Without F_SETOWN, which lets a pipe signal another process without any kill().
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GET/SETFD, F_GET/SETFL, …CLOEXEC
_OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000  # REFUSE | errno
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_EPERM, _ENOSYS, _X86_64, _X32 = 1, 38, 0xC000003E, 0x40000000


def seccomp_filter(may_write: bool) -> bytes:
    """Returns a BPF program that refuses system calls that are not listed (EPERM).

    A call of another architecture or numbering kills the process.

    Args:
      may_write: whether files may be opened for writing. If not, the filter alone
        refuses it: Landlock of older kernels lets O_TRUNC through.
    """

    def answer(number: int, result: int) -> list[tuple[int, int, int, int]]:
        return [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, result)]

    # Each step is a code, the steps to skip if true and if false, and a number.
    steps = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    allowed = _ALWAYS | _OPEN | _WRITING if may_write else _ALWAYS
    for number in allowed.values():
        steps += answer(number, _ALLOW)
    for number in _ABSENT.values():
        steps += answer(number, _REFUSE | _ENOSYS)
    if not may_write:
        for number, argument in ((_OPEN["open"], 1), (_OPEN["openat"], 2)):
            steps += [
                (_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, 16 + 8 * argument),
                (_ANY_BIT, 0, 1, _OPEN_TO_WRITE),
                (_RETURN, 0, 0, _REFUSE | _EPERM),
                (_RETURN, 0, 0, _ALLOW),
            ]
    steps += [(_EQUAL, 0, 2 + 2 * len(_FCNTL_COMMANDS), _FCNTL), (_LOAD, 0, 0, 16 + 8)]
    for command in _FCNTL_COMMANDS:
        steps += answer(command, _ALLOW)
    steps += [(_RETURN, 0, 0, _REFUSE | _EPERM)] * 2
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


# ---- dropping rights -----------------------------------------------------------------
def _call(function: str, *arguments: object) -> int:
    """Calls a function of the C library; raises OSError if it returns -1."""
    result = getattr(LIBC, function)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function} {arguments[0]}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: object, more: object = 0) -> None:
    _call("prctl", option, value, more, 0, 0)


def landlock_ruleset(readable: list[str]) -> int:
    """Returns the descriptor of a Landlock rule set that allows to read these paths."""
    version = _call("syscall", _LANDLOCK, None, ctypes.c_size_t(0), 1)
    rights = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    handled = ctypes.c_uint64((1 << rights) - 1)
    size = ctypes.c_size_t(8)
    ruleset = _call("syscall", _LANDLOCK, ctypes.byref(handled), size, 0)
    for path in filter(os.path.exists, readable):
        place = os.open(path, os.O_PATH)
        read_file, read_folder = 4, 8
        rule = read_file | (read_folder if os.path.isdir(path) else 0)
        packed = ctypes.create_string_buffer(struct.pack("=Qi", rule, place), 12)
        _call("syscall", _LANDLOCK + 1, ruleset, 1, packed, 0)
        os.close(place)
    return ruleset


def mount_own_tmp() -> None:
    """Enters a new mount namespace with an empty /tmp of bounded size."""
    new_mounts, recursive, private = 0x20000, 0x4000, 1 << 18
    nosuid_nodev_noexec = 2 | 4 | 8
    _call("unshare", new_mounts)
    _call("mount", None, b"/", None, recursive | private, None)
    size = f"size={TMP_BYTES},nr_inodes={TMP_FILES},mode=1777".encode()
    _call("mount", b"tmpfs", b"/tmp", b"tmpfs", nosuid_nodev_noexec, size)


def set_limits(memory_bytes: int, cpu_seconds: float) -> None:
    """Sets soft and hard rlimits; at the hard CPU limit the kernel kills."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, math.ceil(cpu_seconds)),
        (resource.RLIMIT_FSIZE, TMP_BYTES),
        (resource.RLIMIT_NOFILE, DESCRIPTORS),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def confine_process(
    request: dict, ruleset: int | None, filter_: bytes, nobody: bool
) -> None:
    """Leaves this process able to compute, to read the libraries, and little else.

    Args:
      request: has the limits `memory_bytes` and `cpu_seconds`.
      ruleset: descriptor of a Landlock rule set; None under bubblewrap.
      filter_: the system call filter (`seccomp_filter`).
      nobody: whether to become the user nobody.
    """
    if ruleset is None:
        mount_own_tmp()
    os.chdir("/tmp" if ruleset is None else "/")
    set_limits(request["memory_bytes"], request["cpu_seconds"])
    if nobody:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    set_no_new_privs, set_dumpable, set_death_signal, set_seccomp = 38, 4, 1, 22
    _prctl(set_no_new_privs, 1)
    _prctl(set_dumpable, 0)
    _prctl(set_death_signal, signal.SIGKILL)  # with the keeper
    if ruleset is not None:
        _call("syscall", _LANDLOCK + 2, ruleset, 0)
        os.close(ruleset)
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _call("capset", header, none)
    code = ctypes.create_string_buffer(filter_, len(filter_))
    program = struct.pack("@HP", len(filter_) // 8, ctypes.addressof(code))
    _prctl(set_seccomp, 2, program)


# ---- the program's process -----------------------------------------------------------
def execute_program(source: str) -> int:
    """Executes the source as `__main__` and returns its exit code.

    Output is line-buffered, so that what it prints before a crash is kept.
    """
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = open(number, "w", 1, "utf-8", errors="replace", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # `site` is not loaded
    name, main = "<program>", types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = main, [name]
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    code = 0
    try:
        exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            code = (leave.code or 0) & 0xFF
        else:
            code = 1
            print(leave.code, file=sys.stderr)
    except BaseException as error:
        code, where = 1, error.__traceback__
        error = error.with_traceback(where and where.tb_next)
        traceback.print_exception(error, limit=-100)  # deep recursion has millions
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def start_program(request, keeper, ready, out, err, confinement) -> None:
    """Confines this fresh fork and runs the program in it; does not return.

    Args:
      request: the request.
      keeper: the parent's process id.
      ready: descriptor that gets "ok" before the program starts, or the reason why not.
      out: descriptor for stdout.
      err: descriptor for stderr.
      confinement: the Landlock rule set, the filter, and whether to become nobody.
    """
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(out, 1)
        os.dup2(err, 2)
        ruleset, filter_, nobody = confinement
        kept = sorted({ready, ready if ruleset is None else ruleset})
        for begin, end in zip([2, *kept], [*kept, 4 * DESCRIPTORS], strict=True):
            os.closerange(begin + 1, end)
        try:
            confine_process(request, ruleset, filter_, nobody)
        except BaseException as error:
            os.write(ready, f"{type(error).__name__}: {error}".encode())
            return
        if os.getppid() != keeper:  # the keeper ended before the death signal was set
            return
        # Fixed seeds: the same program prints the same.
        random.seed(0), sys.modules["numpy"].random.seed(0)
        os.write(ready, b"ok")
        os.close(ready)
        code = execute_program(request["program"])
    finally:
        os._exit(code)


# ---- the keeper ----------------------------------------------------------------------
def handle_connection(connection: socket.socket, confinement) -> None:
    """Reads one request, runs its program, sends the reply."""
    request = json.loads(connection.makefile(encoding="utf-8").readline())
    (ready, ready_in), (out, out_in), (err, err_in) = (os.pipe() for _ in range(3))
    keeper, program = os.getpid(), os.fork()
    if program == 0:
        start_program(request, keeper, ready_in, out_in, err_in, confinement)
    for end in (ready_in, out_in, err_in):
        os.close(end)
    message = os.read(ready, 4096)
    begin = time.monotonic()
    if message != b"ok":
        _, status = os.waitpid(program, 0)
        code = os.waitstatus_to_exitcode(status)
        fault = message.decode(errors="replace") or f"its process ended with {code}"
        reply = {"failed": fault}
    else:
        texts, reason = watch_program(program, out, err, connection, begin, request)
        _, status, used = os.wait4(program, 0)
        seconds = time.monotonic() - begin
        code = os.waitstatus_to_exitcode(status)
        spent = used.ru_utime + used.ru_stime
        late = spent > math.ceil(request["cpu_seconds"]) - 0.5
        if code == -signal.SIGKILL and late:  # not for memory
            reason = reason or "timeout"
        if code < 0 and not reason:
            texts[1] += f"killed by signal {-code}\n".encode()
        reply = {
            "status": reason or ("error" if code else "ok"),
            "stdout": texts[0].decode(errors="replace"),
            "stderr": texts[1].decode(errors="replace"),
            "seconds": seconds,
        }
    connection.sendall(json.dumps(reply).encode() + b"\n")


def watch_program(
    program, out, err, connection, begin, request
) -> tuple[list[bytes], str]:
    """Collects a program's output until it ends, and kills it at a limit.

    Returns:
      [stdout, stderr], and the status that it was killed for, or "".
    """
    texts, reason, left = [b"", b""], "", request["output_bytes"]
    until: float | None = begin + request["wall_seconds"]
    ended = os.pidfd_open(program)
    poller = select.poll()
    for end in (out, err, connection.fileno(), ended):
        poller.register(end, select.POLLIN)
    open_ends = {out, err, ended}
    while open_ends:
        # After a kill there is no deadline: the pipes end on their own.
        wait = None if until is None else max(0.0, until - time.monotonic()) * 1000
        events = poller.poll(wait)
        if until is not None and time.monotonic() >= until:
            reason = reason or "timeout"
        for end, _ in events:
            part = os.read(end, 65536) if end in (out, err) else b""
            if end == connection.fileno():
                reason = "timeout"  # nobody waits for the answer any more
            elif part and not reason:
                texts[end == err] += part[:left]
                left -= len(part)
                if left < 0:
                    reason = "output_limit"
            if not part:
                poller.unregister(end)
                open_ends.discard(end)
        if reason and until is not None:
            os.kill(program, signal.SIGKILL)
            until = None
    return texts, reason


# ---- the server ----------------------------------------------------------------------
def preload_libraries() -> None:
    """Imports numpy and sympy, and makes sympy build the tables of its first use."""
    import numpy.random  # noqa: F401
    import sympy

    x, n = sympy.symbols("x"), sympy.Symbol("n", integer=True)
    sympy.solve(x**2 - 2 * x - 1, x), sympy.solve([x + n - 1, x - n], [x, n])
    sympy.simplify("sin(x)**2 + cos(x)**2"), sympy.factor(x**2 - 1)
    sympy.Rational(1, 3).evalf(), sympy.sqrt(8), sympy.factorint(360)
    sympy.integrate(x**2, x), sympy.diff(x**3, x), sympy.Matrix([[1, 2], [3, 4]]).inv()


def run_server(control: int, packages: list[str], readable: list[str] | None) -> None:
    """Forks a keeper for each connection, until the host closes the socket.

    Args:
      control: descriptor of the socket.
      packages: folders for `sys.path`.
      readable: paths that Landlock lets programs read; None under bubblewrap.
    """
    if platform.machine() != "x86_64" or sys.byteorder != "little":
        sys.exit("the system call filter is written for x86-64")
    sys.path[:] = [path for path in sys.path if path] + packages
    preload_libraries()
    nobody, ruleset = os.getuid() == 0, None
    if readable is not None:
        ruleset = landlock_ruleset(readable)
        if nobody:  # not if that user could not read this Python, as in root's home
            os.seteuid(NOBODY)
            nobody = os.access(os.__file__, os.R_OK, effective_ids=True)
            os.seteuid(0)
    confinement = (ruleset, seccomp_filter(may_write=ruleset is None), nobody)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the host's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave no zombies
    gc.collect()
    gc.freeze()
    door = socket.socket(fileno=control)
    door.sendall(b"ready")
    while True:
        message, descriptors, *_ = socket.recv_fds(door, 1, 1)
        if not message:
            return
        connection = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            try:
                door.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                handle_connection(connection, confinement)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    run_server(*json.loads(sys.argv[1]))
