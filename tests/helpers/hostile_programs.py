"""Programs that mean harm: what a sandbox must survive with nothing leaked or left.

`PROGRAMS`: name → (source, the status it must end with). The source prints ESCAPED, or
a secret, where it got what it wanted; PORT, SOCKET, FILE, LISTENER, PROJECT stand for
what `test_sandbox.traps` has set up outside. `SYSTEM_CALLS`: name → its x86-64 number;
called with zeros each must be refused. `under`, `left_over`: what still runs;
`missing`: why this machine has not got a mechanism.
"""

import ctypes
import pathlib
import shutil
import subprocess
import time

SECRET = "hunter2-never-inside"

_TRY = """
import os, sys
def attempt(what):
    try:
        print('ESCAPED', what())
    except (OSError, ImportError, EOFError, MemoryError, AttributeError) as e:
        print('refused', type(e).__name__)
"""
_LOOP = "\nwhile True: pass\n"
_NATIVE = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(CODE)
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
print('ESCAPED', call())
"""


def _tries(*expressions: str) -> str:
    return _TRY + "".join(f"attempt(lambda: {x})\n" for x in expressions)


def _reads(*paths: str) -> str:
    return _tries(*(f"open({path!r}, 'rb').read(4096)" for path in paths))


PROGRAMS: dict[str, tuple[str, str]] = {
    # More than its share: time.
    "infinite loop": (_LOOP, "timeout"),
    "sleep": ("import time; time.sleep(1000)", "timeout"),
    "regex stall": ("import re; re.match('(a+)+$', 'a' * 64 + 'b')", "timeout"),
    "power stall": ("x = 10 ** 10 ** 9", "timeout"),
    "factorial in sympy": (
        "import sympy; sympy.factorint(sympy.nextprime(10**40) * 10**9001 + 7)",
        "timeout",
    ),
    "waits for signals": (
        "import signal\nwhile True: signal.pause()",
        "timeout",
    ),
    "ignores SIGTERM": (
        "import signal\nfor n in (1, 2, 14, 15): signal.signal(n, signal.SIG_IGN)"
        + _LOOP,
        "timeout",
    ),
    "ignores SIGXCPU": (
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)" + _LOOP,
        "timeout",
    ),
    "catches everything": (
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        "timeout",
    ),
    "closes its output and goes on": (
        "import os; os.close(1); os.close(2)" + _LOOP,
        "timeout",
    ),
    "huge constant": ("x = 7 ** 7 ** 11", "timeout"),
    # Memory, processes, disk, output.
    "memory bomb": ("x = [0]\nwhile True: x = x * 2", "error"),
    "memory in small parts": (
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "error",
    ),
    "memory outside Python": (
        "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))",
        "error",
    ),
    "fork bomb": (
        _tries("os.fork()", "os.forkpty()") + "while True: os.fork()",
        "error",
    ),
    "thread bomb": (
        "import threading\n"
        "while True: threading.Thread(target=lambda: print('ESCAPED')).start()",
        "error",
    ),
    "processes by library": (
        _tries(
            "os.system('echo $$') and exit(3)",
            "__import__('subprocess').check_output(['/bin/ls'])",
            "os.posix_spawn('/usr/bin/id', ['id'], {})",
            "os.execv(sys.executable, ['python'])",
        ),
        "error",  # os.system returns -1 without raising
    ),
    "output flood": ("while True: print('x' * 1000)", "output_limit"),
    "error flood": (
        "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
        "output_limit",
    ),
    "raw output flood": (
        "import os\nwhile True: os.write(1, b'\\xff' * 65536)",
        "output_limit",
    ),
    "fills /tmp": (
        "f = open('/tmp/big', 'wb')\nwhile True: f.write(bytes(1 << 20))",
        "error",
    ),
    "fills /tmp with files": (
        "import os\n"
        "for n in range(10**6):\n"
        "    for k in range(3): open(f'/tmp/{n}.{k}', 'wb').write(bytes(9000))",
        "error",
    ),
    "fills /tmp with folders": (
        "import os\nwhile True:\n os.mkdir('d')\n os.chdir('d')",
        "error",
    ),
    # Reading what is not its own.
    "/etc/passwd": (_reads("/etc/passwd", "/etc/shadow", "/etc/hosts"), "ok"),
    "a file of the host": (_reads("FILE"), "ok"),
    "the project": (
        _reads("PROJECT/README.md", "PROJECT/grpo_jax/sandbox/server.py")
        + "attempt(lambda: os.listdir('PROJECT'))\n"
        + "attempt(lambda: __import__('grpo_jax'))\nattempt(lambda: __import__('jax'))",
        "ok",
    ),
    "/proc": (
        _reads("/proc/self/environ", "/proc/1/environ", "/proc/self/mem")
        + "for n in range(2, 40): attempt(lambda: open(f'/proc/{n}/environ').read())\n"
        + "attempt(lambda: os.listdir('/proc/self/fd'))",
        "ok",
    ),
    "/sys and devices": (
        _reads("/sys/kernel/vmcoreinfo", "/dev/mem", "/dev/vda", "/dev/tty", "/dev/shm")
        + "attempt(lambda: open('/proc/sys/kernel/core_pattern', 'w'))",
        "ok",
    ),
    "the environment": ("import os; print(dict(os.environ))", "ok"),
    "old stacks and objects": (
        "import gc, sys\nf = sys._getframe()\n"
        "while f: print(f.f_locals, f.f_globals); f = f.f_back\n"
        "print([o for o in gc.get_objects() if isinstance(o, dict)].__len__())",
        "ok",
    ),
    "inherited descriptors": (
        _tries(*(f"os.fstat({n})" for n in range(3, 64))),
        "ok",
    ),
    "seeks in its own standard input": (_tries("os.read(0, 10) or input()"), "ok"),
    # The network, and other ways to other processes.
    "TCP to loopback": (
        _tries("__import__('socket').create_connection(('127.0.0.1', PORT), 1)"),
        "ok",
    ),
    "UDP and names": (
        _tries(
            "__import__('socket').socket(2, 2).sendto(b'x', ('127.0.0.1', PORT))",
            "__import__('socket').gethostbyname('example.org')",
            "__import__('urllib.request').request.urlopen('http://127.0.0.1:PORT')",
        ),
        "ok",
    ),
    "an abstract Unix socket": (
        _tries("__import__('socket').socket(1, 1).connect('\\0SOCKET')"),
        "ok",
    ),
    "packets and netlink": (
        _tries(
            "__import__('socket').socket(17, 3)", "__import__('socket').socket(16, 3)"
        ),
        "ok",
    ),
    "kill": (
        _tries(*(f"os.kill({n}, 9)" for n in (-1, 0, 1, 2, 3, "os.getppid()"))),
        "ok",
    ),
    "kill by a pipe's owner": (
        "import fcntl\n"
        + _tries(
            "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
            "fcntl.fcntl(1, 10, 9)",  # F_SETSIG
            "fcntl.fcntl(1, 15, bytes(8))",  # F_SETOWN_EX
        ),
        "ok",
    ),
    "answers for its keeper": (
        "import os\n"
        "for n in range(3, 64):\n"
        ' try: os.write(n, b\'{"status": "ok", "stdout": "ESCAPED"}\\n\')\n'
        " except OSError: pass\n"
        "raise SystemExit(3)",
        "error",
    ),
    # Writing, and changing what others will run.
    "writes outside /tmp": (
        _tries(
            *(
                f"open({path!r}, 'w')"
                for path in ("/x", "/usr/lib/x", "/site/x", "/py/x", "/dev/x", "FILE")
            ),
            "open(os.__file__, 'a')",
            "open(__import__('sympy').__file__, 'a')",
            "os.mkdir('/usr/lib/x')",
            "os.unlink(os.__file__)",
        ),
        "ok",
    ),
    "writes anywhere": (
        # Also what mounts of its own have left open; under Landlock nothing is listed.
        "import os\n"
        "for folder, folders, _ in os.walk('/'):\n"
        "    if folder == '/tmp' or folder.count('/') > 5:\n"
        "        folders.clear(); continue\n"
        "    try: open(folder + '/x', 'w'); print('ESCAPED', folder)\n"
        "    except OSError: pass\n",
        "ok",
    ),
    "truncates while reading": (
        _tries(
            "os.open(__import__('sympy').__file__, os.O_RDONLY | os.O_TRUNC)",
            "os.open('FILE', os.O_RDONLY | os.O_TRUNC)",
            "os.truncate(os.__file__, 0)",
        ),
        "ok",
    ),
    "changes modes and owners": (
        _tries(
            "os.chmod(os.__file__, 0o777)",
            "os.chown(os.__file__, 65534, 65534)",
            "os.utime(os.__file__, (0, 0))",
            "os.setxattr(os.__file__, 'user.x', b'x')",
        ),
        "ok",
    ),
    "a link out of /tmp": (
        _tries(
            "os.symlink('/etc/passwd', '/tmp/a') or open('/tmp/a').read()",
            "os.link(os.__file__, '/tmp/b')",
            "os.rename(os.__file__, '/tmp/c')",
        ),
        "ok",
    ),
    "poisoned builtins": (
        "import builtins, sympy, sys, os\n"
        "builtins.print = builtins.len = lambda *a, **k: 'ESCAPED'\n"
        "sympy.sqrt = sympy.Integer.__add__ = None; sys.modules.clear()\n"
        "os.environ['GRPO'] = 'ESCAPED'",
        "ok",
    ),
    # More rights than it was given.
    "raises its limits": (
        "import resource\n"
        + _tries(
            *(
                f"resource.setrlimit(resource.RLIMIT_{name}, (-1, -1))"
                for name in ("AS", "CPU", "NOFILE", "NPROC", "CORE")
            )
        ),
        "error",  # resource raises ValueError for EPERM
    ),
    "becomes root": (
        _tries("os.setuid(0)", "os.setresuid(0, 0, 0)", "os.setgroups([0])"),
        "ok",
    ),
    "runs a program from memory": (
        _tries(
            "os.memfd_create('x')",
            "os.execve('/proc/self/fd/3', ['x'], {})",
            "os.execv('/lib64/ld-linux-x86-64.so.2', ['ld', '/usr/bin/id'])",
        ),
        "ok",
    ),
    "setuid binaries": (
        _tries(
            *(
                f"os.execv({path!r}, ['x'])"
                for path in ("/bin/su", "/usr/bin/sudo", "/usr/bin/mount")
            )
        ),
        "ok",
    ),
    "leaves its root": (_tries("os.chroot('.')", "os.setns(0)"), "ok"),
    "32-bit system calls": (
        # mov eax, 20 (getpid of i386); int 0x80; ret
        _NATIVE.replace("CODE", r"b'\xb8\x14\x00\x00\x00\xcd\x80\xc3'"),
        "error",
    ),
    "x32 system calls": (
        "import ctypes; print('ESCAPED', ctypes.CDLL(None).syscall(0x40000027))",
        "error",
    ),
    # Crashes.
    "segfault": ("import ctypes; ctypes.string_at(0)", "error"),
    "abort": ("import ctypes; ctypes.CDLL(None).abort()", "error"),
    "deep recursion": (
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()",
        "error or timeout",  # out of memory; unwinding a million frames is slow
    ),
    "deep recursion in C": (
        "import sys; sys.setrecursionlimit(10**9)\n"
        "class A: __repr__ = lambda self: repr([self])\nrepr(A())",
        "error",
    ),
    "deep source": ("(" * 10**5 + ")" * 10**5, "error"),
    "NUL in the source": ("print('ESCAPED')\0", "error"),
    "surrogates in the source": ("print('ESCAPED \ud800')", "error"),
    "surrogates in the output": ("print('\\ud800\\udfff')", "ok"),
}

SYSTEM_CALLS = {
    "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "clone3": 435,
    "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129,
    "rt_tgsigqueueinfo": 297, "pidfd_open": 434, "pidfd_send_signal": 424,
    "pidfd_getfd": 438, "ptrace": 101, "process_vm_readv": 310, "kcmp": 312,
    "process_vm_writev": 311, "process_madvise": 440, "prctl": 157, "seccomp": 317,
    "setrlimit": 160, "prlimit64": 302, "setpriority": 141, "sched_setaffinity": 203,
    "setuid": 105, "setresuid": 117, "setgroups": 116, "capset": 126, "setsid": 112,
    "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
    "chroot": 161, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432,
    "mount_setattr": 442, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_setup": 206, "memfd_create": 319,
    "memfd_secret": 447, "keyctl": 250, "add_key": 248, "request_key": 249,
    "socket": 41, "connect": 42, "sendto": 44, "sendmsg": 46, "bind": 49,
    "socketpair": 53, "open_by_handle_at": 304, "name_to_handle_at": 303,
    "openat2": 437, "mknod": 133, "symlink": 88, "link": 86, "linkat": 265,
    "chmod": 90, "chown": 92, "utimensat": 280, "setxattr": 188, "truncate": 76,
    "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "pipe2": 293,
    "inotify_init": 253, "fanotify_init": 300, "timer_create": 222, "ioctl": 16,
    "splice": 275, "vmsplice": 278, "tee": 276, "personality": 135, "modify_ldt": 154,
    "iopl": 172, "ioperm": 173, "swapon": 167, "reboot": 169, "sethostname": 170,
    "settimeofday": 164, "syslog": 103, "init_module": 175, "kexec_load": 246,
    "quotactl": 179, "acct": 163, "landlock_create_ruleset": 444, "set_mempolicy": 238,
}  # fmt: skip

# A machine that refuses some system calls, as a container's profile does.
REFUSING = """
import ctypes, struct, sys
from grpo_jax import sandbox
steps = [(0x20, 0, 0, 0)]
for number in REFUSED:
    steps += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50001)]
steps.append((0x06, 0, 0, 0x7FFF0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *s) for s in steps))
program = struct.pack("@HP", len(steps), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
try:
    with sandbox.Sandbox() as box:
        print(box.mechanism, box.run_program("print(6 * 7)").stdout)
except sandbox.GrpoError as error:
    print("refused:", error)
"""


def under(process: int) -> set[int]:
    """The processes that descend from one."""
    parents = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(text.rpartition(")")[2].split()[1])
    found, new = set(), {process}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new}
    return found


def left_over(box, before: set[int]) -> set[int]:
    """What runs under the sandbox and did not before; a keeper takes a moment to go."""
    until = time.monotonic() + 5
    while (
        more := under(box._server.process.pid) - before
    ) and time.monotonic() < until:
        time.sleep(0.01)
    return more


def missing(mechanism: str) -> str:
    """Why a mechanism cannot be had here, asked without the sandbox; "" if it can."""
    if mechanism == "landlock":
        version = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)
        return "" if version >= 1 else "this kernel has no Landlock"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip()
