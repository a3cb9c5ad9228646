"""Share of valid proposals per task type after seeding, without any training, with the causes of the others.

Seeds the buffers with the model itself, then asks for `--proposals` proposals of each type (in rounds of --batch) with
references from those buffers, and validates them exactly as a training step does. All other flags are azr.py's.

    python benchmarks/validity.py --proposals 48 --model PATH --preset 0.5b-instruct --batch 16 --seed-factor 1
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import azr
from harness.config import parse
from harness.start import start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposals", type=int, default=48, help="proposals per task type")
    ours, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config, _ = parse([*rest, "--out", f"{folder}/run"])
        run = azr.Run(**start(config, None))
        with run.executor:
            azr.seed_buffers(run)
            proposals = []
            for step in range(1, -(-ours.proposals // config.batch) + 1):
                batch = azr.propose(run, step)
                azr.validate(run, batch)
                proposals += batch
    result = {}
    for kind in config.kinds:
        items = [item for item in proposals if item.kind == kind]
        causes = Counter(item.verdict for item in items)
        formatted = sum(item.parts.formatted for item in items)
        distinct = len({item.task.program + "".join(item.task.inputs) for item in items if item.task})
        result[kind] = {"valid": causes["ok"] / len(items), "n": len(items), "formatted": formatted / len(items)}
        result[kind] |= {"distinct_valid": distinct / len(items), "causes": dict(causes.most_common())}
        print(f"{kind:10} valid {causes['ok']}/{len(items)}, formatted {formatted}, {dict(causes.most_common())}")
        for item in [item for item in items if item.task][:2]:
            print(f"--- a valid one\n{item.parts.answer}")
    print(json.dumps({"model": config.model, "engine": run.engine.name, **result}))


if __name__ == "__main__":
    main()
