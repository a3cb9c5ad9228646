"""How much slower is the demo while another program uses the second core?

Runs a few steps of the embedded model, alone and beside a process that multiplies matrices, in turn and several times,
and prints the ratio of the medians of seconds per step. Threads that wait for each other by spinning made it 4 to 20;
`policy/__init__.py` lets them spin for a moment only. `--spin` shows what it was (OMP_WAIT_POLICY=ACTIVE).

    python benchmarks/contention.py --repeats 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUSY = "import numpy as np\na = np.ones((600, 600))\nwhile True: a @ a"
STEPS = 4


def seconds_per_step(folder: Path, environment: dict) -> float:
    """Median seconds of a step, the first one left out."""
    command = [sys.executable, str(ROOT / "azr.py"), "--preset", "tiny", "--batch", "8", "--seed-factor", "1"]
    command += ["--eval-every", "0", "--steps", str(STEPS), "--out", str(folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds/step"] for row in rows[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--spin", action="store_true", help="let waiting threads spin, as OpenMP does by itself")
    options = parser.parse_args()
    environment = os.environ | ({"OMP_WAIT_POLICY": "ACTIVE"} if options.spin else {})
    found: dict[str, list[float]] = {"alone": [], "contended": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.repeats):
            for name, times in found.items():
                threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                busy = subprocess.Popen([sys.executable, "-c", BUSY], env=os.environ | threads)
                try:
                    if name == "alone":
                        busy.kill()
                    times.append(seconds_per_step(Path(folder, f"{name}-{number}"), environment))
                finally:
                    busy.kill()
                    busy.wait()
                print(f"{name:10} {times[-1]:.2f} s a step", flush=True)
    alone, contended = (statistics.median(times) for times in found.values())
    print(f"median {alone:.2f} s alone, {contended:.2f} s beside another program: {contended / alone:.2f}x")


if __name__ == "__main__":
    main()
