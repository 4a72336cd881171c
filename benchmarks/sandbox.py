"""The sandbox's speed: model-written programs a second.

    python benchmarks/sandbox.py [--mechanism bubblewrap|landlock]

In: nothing; the programs are below, of the kind that tool-integrated reasoning writes.
Out: JSON lines {"case", "mechanism", "workers", "programs", "seconds",
"programs_per_second", …}: "start" is a server from nothing to its first answer;
"print", "numpy" and "sympy" run `--programs` different programs, `--workers` at a
time, `--repeats` times; "outside" is one `python -c` of a sympy program, for scale.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from lines import make_parser, show

CASES = {
    "print": """
total = sum(n for n in range({n}) if n % 3 == 0)
print(total)
""",
    "numpy": """
import numpy as np

A = np.array([[{n} + 2.0, 1], [1, 3]])
print(np.linalg.solve(A, np.array([1.0, 2.0])))
""",
    "sympy": """
from sympy import symbols, Eq, solve, simplify

def solve_problem():
    x, y = symbols('x y')
    answer = solve([Eq(x + y, {n} + 3), Eq(x * y, {n})], [x, y])
    return simplify(answer[0][0] + answer[0][1])

print(solve_problem())
""",
}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--mechanism", choices=["bubblewrap", "landlock"], help="(what works here)")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    add("--programs", type=int, default=120)
    add("--workers", type=int, help="programs at a time (the cores)")
    add("--repeats", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    flags = parse()
    from grpo_jax import sandbox

    workers = flags.workers or sandbox.DEFAULT_WORKERS
    begin = time.perf_counter()
    with sandbox.Sandbox(flags.mechanism) as box:
        who = {"mechanism": box.mechanism, "workers": workers}
        show(case="start", **who, seconds=time.perf_counter() - begin)
        for case in flags.cases:
            for _ in range(flags.repeats):
                programs = [CASES[case].format(n=n) for n in range(flags.programs)]
                begin = time.perf_counter()
                found = box.run_programs(programs, workers=workers)
                seconds = time.perf_counter() - begin
                bad = [x for x in found if x.status != "ok" or not x.stdout]
                if bad:
                    sys.exit(f"error: {case}: {bad[0]}")
                show(
                    case=case,
                    **who,
                    programs=len(found),
                    seconds=seconds,
                    programs_per_second=len(found) / seconds,
                    inside_seconds=sum(x.seconds for x in found) / len(found),
                )
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", CASES["sympy"].format(n=1)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    show(case="outside", seconds=time.perf_counter() - begin)


if __name__ == "__main__":
    main()
