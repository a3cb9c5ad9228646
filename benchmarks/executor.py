"""What a run of a program costs: CPU milliseconds of the whole process tree, runs per second, memory of a lane.

The workload is 20 small programs x 20 inputs = 400 runs: each run in a child of its own, then 5 and 20 inputs per
program, on 1 to 8 lanes, beside `subprocess.run([python, "-c", ...])`. Every number is the median of some repeats and
every output is checked. CPU milliseconds are the figure to trust on a machine that others use too.

What it leaves out: the isolation itself (`python executor.py --doctor`, `tests/test_sandbox.py`). The paper reports no
cost of execution. Usage:
    python benchmarks/executor.py [--repeats 5]     # a table, and everything as JSON on the last line
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from executor import Executor  # noqa: E402

BARS = {1: 2.0, 5: 0.5, 20: 0.2}  # CPU-ms per run, by inputs per child
BODIES = [
    "sum(range(x))",
    "[i * i for i in range(x)]",
    "str(x)[::-1]",
    "{i: i % 3 for i in range(x)}",
    "sorted([x, 3, 1, 2], reverse=True)",
    "x ** 3 - 2 * x",
    "[d for d in range(1, x + 1) if x % d == 0]",
    "bin(x).count('1')",
    "''.join(chr(97 + i % 26) for i in range(x))",
    "divmod(x, 7)",
]
PROGRAMS = [f"def f(x):\n    x = x + {shift}\n    return {body}" for shift in (0, 5) for body in BODIES]
TICK = os.sysconf("SC_CLK_TCK")


def tree_cpu(lanes: list) -> float:
    """CPU seconds so far of this process, its waited-for children, and each server with the children it waited for."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own.ru_utime + own.ru_stime + dead.ru_utime + dead.ru_stime
    for lane in lanes:
        fields = Path(f"/proc/{lane.process.pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / TICK
    return total


def memory_mb(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kb = {line.split()[0].rstrip(":"): int(line.split()[1]) for line in lines}
    return {"rss": kb["Rss"] / 1024, "pss": kb["Pss"] / 1024, "own": (kb["Private_Dirty"] + kb["Private_Clean"]) / 1024}


def measure(lanes: int, per_fork: int, repeats: int, distinct: bool = False) -> dict:
    """Medians for the workload, `per_fork` inputs in one child. `distinct`: no source text comes twice (a server keeps
    the last 32 compiled programs)."""
    jobs = [(p, [str(x) for x in range(i, i + per_fork)]) for p in PROGRAMS for i in range(0, 20, per_fork)]
    runs, cpu, speed, wanted = 20 * len(PROGRAMS), [], [], []
    for program in PROGRAMS:
        namespace: dict = {}
        exec(program, namespace)  # ours, not a model's
        wanted += [repr(namespace["f"](x)) for x in range(20)]
    with Executor(lanes, hash_seeds=(0,), inputs_per_fork=per_fork) as executor:
        executor.run(jobs)
        for _ in range(repeats):
            if distinct:
                jobs = [(f"{program}  # {n}", inputs) for n, (program, inputs) in enumerate(jobs)]
            before, started = tree_cpu(executor.lanes), time.perf_counter()
            results = executor.run(jobs)
            speed.append(runs / (time.perf_counter() - started))
            cpu.append((tree_cpu(executor.lanes) - before) / runs * 1000)
        if [r.output for job in results for r in job] != wanted:
            raise RuntimeError("an output is wrong: the numbers mean nothing")
        memory = memory_mb(executor.lanes[0].process.pid)
    name = f"{per_fork} per child, {lanes} lane{'s' * (lanes > 1)}{', distinct' * distinct}"
    return {"name": name, "cpu_ms": statistics.median(cpu), "runs_s": statistics.median(speed), **memory}


def measure_subprocess(repeats: int) -> dict:
    cpu, speed, runs = [], [], 10
    for _ in range(repeats):
        before, started = tree_cpu([]), time.perf_counter()
        for program in PROGRAMS[:runs]:
            subprocess.run([sys.executable, "-c", f"{program}\nprint(repr(f(3)))"], check=True, capture_output=True)
        speed.append(runs / (time.perf_counter() - started))
        cpu.append((tree_cpu([]) - before) / runs * 1000)
    return {"name": "subprocess, python -c", "cpu_ms": statistics.median(cpu), "runs_s": statistics.median(speed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement; medians are printed")
    repeats = parser.parse_args().repeats
    plan = [(lanes, per_fork) for per_fork in BARS for lanes in (1, 2, 4, 8)]
    rows = [measure_subprocess(repeats), *(measure(lanes, per_fork, repeats) for lanes, per_fork in plan)]
    rows.append(measure(2, 1, repeats, distinct=True))
    print(f"{'':32}{'CPU-ms/run':>11}{'runs/s':>9}{'lane MB: RSS':>14}{'PSS':>7}{'own':>7}")
    for row in rows:
        memory = f"{row['rss']:14.1f}{row['pss']:7.1f}{row['own']:7.1f}" if "rss" in row else ""
        print(f"{row['name']:32}{row['cpu_ms']:11.2f}{row['runs_s']:9.0f}{memory}")
    best = {per: min(r["cpu_ms"] for r, p in zip(rows[1:], plan, strict=False) if p[1] == per) for per in BARS}
    for per, bar in BARS.items():
        print(f"{per:2} per child: {best[per]:.2f} CPU-ms on the best number of lanes (bar {bar})")
    print(json.dumps({"rows": rows, "bars": BARS, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
