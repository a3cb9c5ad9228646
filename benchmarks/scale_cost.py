"""On paper: what a step of the paper's size costs on 1 to 64 GPUs, and which phase it goes to. Nothing is run.

A step: 3 x 64 proposals, 8 attempts at each, 192 solving attempts; 384 rows are trained on. What is known of the
hardware stands in the constants. Lengths and shares are assumptions, each with its reason; real runs differ.
What it leaves out: evaluation, checkpoints, Python between the phases, stragglers other than the longest response.

    python benchmarks/scale_cost.py
"""

from math import ceil
from typing import NamedTuple


class Model(NamedTuple):
    """A decoder of the Qwen2.5 family."""

    parameters: float
    layers: int
    key_width: int  # key heads x their size


MODELS = {
    "3B": Model(3.09e9, 36, 2 * 128),
    "7B": Model(7.62e9, 28, 4 * 128),
    "14B": Model(14.8e9, 48, 8 * 128),
    "72B": Model(72.7e9, 80, 8 * 128),
}
GPUS = (1, 2, 4, 8, 16, 32, 64)
# One H200, measured: a large bf16 product, a copy; and its memory.
FLOPS, TRAFFIC, MEMORY = 788e12, 4.3e12, 139e9
INSIDE, BETWEEN, NODE = 450e9, 50e9, 8  # bytes/s of a GPU to the others of its node, to other nodes; GPUs of a node
SERVED = 0.35  # share of the memory limit that vLLM reaches: 30 to 45 % is common, the rest goes to its scheduler
MFU = 0.28  # share of the arithmetic that an update reaches: fine-tuning at such sizes is published at 28 %
PROPOSALS, ATTEMPTS, SOLVES = 192, 192 * 8, 192
RESPONSE, LONGEST, PROMPT = 650, 2048, 700  # tokens; at the paper's batch that is 1.2 M generated ones
TRAINED = 600_000  # tokens of the 384 rows, with their prompts
LIVE = 512  # sequences that a vLLM samples at a time
MICRO = 16384  # tokens of a micro-batch, unless a rank's share is smaller
RESERVE, WEIGHTS = 15e9, 0.4  # bytes of activations and context; share of a GPU that a vLLM's weights may take
CORES = 16  # of a node, per GPU
# CPU-milliseconds of a program by number of its inputs, and the runs of a step: each proposal in two processes; the
# attempts at abduction (1 input) and induction (5 hidden ones); those at deduction are compared without running.
MS = {1: 2.0, 5: 0.5 * 5, 10: 0.4 * 10}
RUNS = {1: 2 * 128 + (ATTEMPTS + SOLVES) // 3, 10: 2 * 64, 5: (ATTEMPTS + SOLVES) // 3}
LOOPING, LIMIT = 0.02, 1.0  # share of runs that meet their CPU limit, and that limit in seconds


def generate(model: Model, gpus: int) -> float:
    """Seconds of the two calls, proposals and then attempts, on as many vLLMs as fit."""
    parallel = next(n for n in (1, 2, 4, 8) if 2 * model.parameters / n <= WEIGHTS * MEMORY)
    engines, seconds = max(1, gpus // parallel), 0.0

    def token(live: int) -> float:
        cache = live * (PROMPT + RESPONSE / 2) * 4 * model.layers * model.key_width
        read = (2 * model.parameters + cache) / (SERVED * TRAFFIC)
        return max(read, 2 * model.parameters * live / (MFU * FLOPS)) / parallel

    for rows in (PROPOSALS, ATTEMPTS + SOLVES):
        own = ceil(rows / engines)
        waves = own / min(own, LIVE)
        seconds += waves * RESPONSE * token(min(own, LIVE)) + (LONGEST - RESPONSE) * token(max(1, own // 50))
    prompts = (PROPOSALS * 2 + SOLVES) * PROMPT * 2 * model.parameters
    return seconds + prompts / (MFU * FLOPS * engines * parallel)


def update(model: Model, gpus: int) -> float:
    """Seconds of forward and backward, with recomputed activations, on the rank that has the most micro-batches."""
    tokens = min(MICRO, TRAINED / gpus)
    turns = ceil(TRAINED / tokens / gpus)
    arithmetic = turns * tokens * 8 * model.parameters / (MFU * FLOPS)
    link = INSIDE if gpus <= NODE else BETWEEN
    gathered = turns * (2 + 2 + 4) * model.parameters * (1 - 1 / gpus) / link  # weights twice, gradients once
    return max(arithmetic, gathered) + 28 * model.parameters / gpus / TRAFFIC  # each number of the optimizer once


def push(model: Model, gpus: int) -> float:
    """Seconds until every vLLM has the new weights, gathered parameter by parameter."""
    return 4 * model.parameters * ((1 - 1 / gpus) / (INSIDE if gpus <= NODE else BETWEEN) + 1 / TRAFFIC)


def executor() -> tuple[float, float]:
    """CPU-seconds of a step: of programs that end, and of those that meet their limit."""
    return sum(RUNS[n] * MS[n] for n in MS) / 1000, sum(RUNS.values()) * LOOPING * LIMIT


def main() -> None:
    ending, looping = executor()
    print(f"executor: {sum(RUNS.values())} runs, {ending:.1f} CPU-s, and {looping:.0f} CPU-s of those that never end\n")
    print("| model | GPUs | generate | update | push | executor | step | most of it |\n|" + "---|" * 8)
    for name, model in MODELS.items():
        for gpus in GPUS:
            if 16 * model.parameters / gpus + RESERVE > MEMORY:  # master, two moments, gradient: 4 bytes each
                print(
                    f"| {name} | {gpus} | does not fit: {16 * model.parameters / gpus / 1e9:.0f} GB of states a GPU |"
                )
                continue
            phases = {"generate": generate(model, gpus), "update": update(model, gpus), "push": push(model, gpus)}
            phases["executor"] = (ending + looping) / (CORES * gpus)
            seconds = " | ".join(f"{value:.1f}" for value in phases.values())
            total, most = sum(phases.values()), max(phases, key=phases.get)
            print(f"| {name} | {gpus} | {seconds} | {total:.0f} | {most} {phases[most] / total:.0%} |")


if __name__ == "__main__":
    main()
