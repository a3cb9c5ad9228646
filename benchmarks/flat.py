"""Does a run stay flat? Time and memory of late steps against early ones, of the whole program on the embedded model.

What it does: runs `python azr.py` in a process of its own and, at every status line, reads from /proc what that process
and its executor servers have used: wall seconds, processor seconds (programs that were run included) and resident
memory. The learning rate is so small that the policy, and with it the lengths of its texts, stay what they were, so any
growth comes from buffers, logs or leaks. Printed: medians of the first 100 steps after the warm-up against the last
100 (of memory too: from step to step it goes up and down by some percent with what was just freed). Processor seconds
are the primary figure: on a shared machine wall seconds mostly measure the neighbours, and even processor seconds move
by several percent with them. The tokens of the same steps are printed beside, because steps are only comparable where
they did the same amount of work, and so is the executor's share of a step's wall seconds.
What it leaves out: evaluation, vLLM, a GPU, and the filling of buffers: they are small here, so that they are full when
the warm-up ends. A task takes 1.2 kB, the default 16,384 of each type 60 MB. Needs Linux.

    OMP_NUM_THREADS=1 python benchmarks/flat.py              # 1,000 steps, about a quarter of an hour on a free core
    python benchmarks/flat.py --steps 200 --warmup 50 --window 50

The last line is one JSON object.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICKS, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
# Two references as in the preset; no evaluation; a rate at which fp32 weights hardly move.
SETTINGS = "--preset tiny --batch 4 --rollouts 2 --eval-every 0 --lr 1e-9 --warmup 0 --lr-decay constant "
SETTINGS += "--engine transformers --buffer-size 256"  # full after some 80 steps


def used(pid: int) -> tuple[float, int]:
    """(processor seconds, its ended children included; resident bytes) of one process; zeros if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0
    return sum(map(int, stat[11:15])) / TICKS, resident


def sample(pid: int) -> dict[str, float]:
    """What a run and its executor servers (its only lasting children) have used so far."""
    servers = [used(int(child)) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    cpu, resident = used(pid)
    return {
        "wall": time.perf_counter(),
        "cpu": cpu + sum(seconds for seconds, _ in servers),
        "rss_mb": resident / 1e6,
        "servers_rss_mb": sum(size for _, size in servers) / 1e6,
    }


def measure(folder: Path, steps: int, extra: list[str]) -> list[dict[str, float]]:
    """One record per step: seconds since the status line before, memory at its own, generated tokens."""
    command = [sys.executable, str(ROOT / "azr.py"), *SETTINGS.split(), *extra]
    command += ["--steps", str(steps), "--out", str(folder)]
    samples = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        for line in process.stdout:
            if line.startswith("step "):
                samples.append(sample(process.pid))
                if len(samples) % 50 == 0:
                    print(line.split("|")[0], samples[-1], flush=True)
    if process.returncode or len(samples) != steps:
        raise RuntimeError(f"azr.py ended with code {process.returncode} after {len(samples)} of {steps} steps")
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {
            **now,
            "wall": now["wall"] - before["wall"],
            "cpu": now["cpu"] - before["cpu"],
            "tokens": t["generated_tokens"],
            "executor_share": (t["seconds/validate"] + t["seconds/verify"]) / t["seconds/step"],
        }
        for (before, now), t in zip(itertools.pairwise(samples), timing[1:], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=100, help="first steps that do not count")
    parser.add_argument("--window", type=int, default=100, help="steps compared at either end")
    parser.add_argument("--records", type=Path, help="also write every step's record there, as JSONL")
    options, extra = parser.parse_known_args()  # what is not known here goes to azr.py
    if options.steps < options.warmup + 2 * options.window:
        parser.error("--steps must be at least --warmup and two --window long")
    with tempfile.TemporaryDirectory() as scratch:
        records = measure(Path(scratch) / "run", options.steps, extra)
        buffers = {path.stem: len(path.read_text().splitlines()) for path in Path(scratch).glob("run/buffers/*.jsonl")}
    counted = records[options.warmup - 1 :]  # the first step has no line before it
    first, last = counted[: options.window], counted[-options.window :]
    result = {}
    columns = {"cpu": 3, "wall": 3, "tokens": 0, "executor_share": 3, "rss_mb": 1, "servers_rss_mb": 1}
    for name, digits in columns.items():
        early, late = (statistics.median(record[name] for record in part) for part in (first, last))
        result[name] = {"first": round(early, 3), "last": round(late, 3), "ratio": round(late / early, 4)}
        print(f"{name:16} first {early:9.{digits}f}  last {late:9.{digits}f}  ratio {late / early:.3f}")
    if options.records:
        options.records.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(json.dumps(result | {"buffers": buffers, "steps": options.steps,
                               "warmup": options.warmup, "window": options.window, "settings": SETTINGS, "extra": extra,
                               "threads": os.environ.get("OMP_NUM_THREADS"), "cores": os.cpu_count(),
                               "python": platform.python_version()}))  # fmt: skip


if __name__ == "__main__":
    main()
