"""The journal of a run: progress bars, logs, the status line, and the closing table.

What it leaves out: deciding anything. The files are listed in checkpoint.py, the metrics explained in docs/metrics.md.

    with phase(run, "solve", total) as bar: ...
    record = log(run, proposals, attempts, update, seconds); show(run, record, seconds); finish(run)
"""

import contextlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from buffers import save_tasks
from harness import metrics, report
from harness.checkpoint import append
from harness.metrics import mean
from policy.memory import GB

# ---------------------------------------------------------------------------------------------------------------------
# While a step runs


@dataclass
class Status:
    """What the harness notes of a run: nothing in it decides what is learnt."""

    phase: str = ""  # the one that runs now
    seconds: Counter = field(default_factory=Counter)  # per phase of the current step
    peak: int = 0  # most bytes held so far, to set beside the plan's peak
    halfway: bool = False  # the policy may be in the middle of an update: not a state to save
    stopping: bool = False  # Ctrl-C or SIGTERM came while a step was being finished


@contextlib.contextmanager
def phase(run, name: str, total: int) -> Iterator[tqdm]:
    """A progress bar for one phase of a step; its seconds and what it held of the memory go into the step's record."""
    began, run.status.phase = time.perf_counter(), name
    with tqdm(total=total, desc=f"step {run.step + 1} {name}", leave=False, disable=None) as bar:
        yield bar
    run.status.seconds[name] += time.perf_counter() - began
    run.status.peak = max(run.status.peak, held_bytes(run.policy.device.type))


def token_rate(bar: tqdm) -> Callable[[int, int], None]:
    """What an engine calls with (sequences, tokens) newly done: they go into the bar, the tokens as a rate."""
    tokens = 0

    def progress(sequences: int, new_tokens: int) -> None:
        nonlocal tokens
        tokens += new_tokens
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
        bar.update(sequences)

    return progress


def held_bytes(device: str) -> int:
    """Bytes held of the card, as the driver counts them: at the end of a phase torch's cache still has the phase's peak
    (torch's own counts go on including the memory of an engine that sleeps). On a CPU the most this process has had
    resident so far."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total - free
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count what the parent held when it started this process
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# After a step


def log_start(run, update: dict) -> None:
    """The seeds in their buffers, and the record of step 0; `update`: the evaluation of the untrained model."""
    record = {"step": 0, **metrics.buffer_metrics(run.buffers), **update}
    if run.writes:
        (run.folder / "buffers").mkdir(exist_ok=True)
        for kind, buffer in run.buffers.items():
            save_tasks(run.folder / f"buffers/{kind}.jsonl", buffer)
        append(run.folder / "metrics.jsonl", [record])
    run.watch.remember(record)  # last: a run that is stopped before has nothing that could be saved


def log(run, proposals: Sequence, attempts: Sequence, update: dict, seconds: float) -> dict:
    """The flat record of a step, which the watch reads. It goes into metrics.jsonl, every proposal into tasks.jsonl,
    some full texts into rollouts.jsonl (`write`)."""
    config, step = run.config, run.step
    rollouts = [*proposals, *attempts]
    record = {
        "step": step,
        "valid_share": mean(item.task is not None for item in proposals),
        "solve_rate": mean(item.correct for item in attempts),
        **update,
        **metrics.cell_metrics(rollouts, config.kinds, config.rollouts),
        **metrics.buffer_metrics(run.buffers),
    }
    flagged = [(item, names) for item in rollouts if (names := metrics.flags(item))]
    record["flagged"] = len(flagged)
    record["alarms"] = run.watch.remember(record)
    timing = {f"seconds/{name}": round(value, 3) for name, value in (*run.status.seconds.items(), ("step", seconds))}
    timing["generated_tokens"] = sum(len(item.completion.token_ids) for item in rollouts)
    timing |= {name: round(value, 3) for name, value in peaks(run).items()}
    if run.writes:
        write(run, proposals, rollouts, record, timing, flagged)
    return record


def write(run, proposals: Sequence, rollouts: Sequence, record: dict, timing: dict, flagged: Sequence) -> None:
    """A step into the logs of the run folder."""
    config, step, folder = run.config, run.step, run.folder
    append(folder / "metrics.jsonl", [record])
    append(folder / "timing.jsonl", [{"step": step, **timing}])
    append(folder / "tasks.jsonl", [proposal_record(item) for item in proposals])
    for kind in run.buffers:
        entered = [asdict(item.task) for item in proposals if item.admitted and item.kind == kind]
        append(folder / f"buffers/{kind}.jsonl", entered)
    sampled = run.rng(step, "log").sample(rollouts, min(config.log_rollouts, len(rollouts)))
    append(folder / "rollouts.jsonl", [rollout_record(item) for item in sampled])
    append(folder / "flagged.jsonl", [{"flags": names, **rollout_record(item)} for item, names in flagged])


def peaks(run) -> dict[str, float]:
    """Peak memory in GB, of the card or of this process: predicted, where it was planned, and measured so far."""
    predicted = {"predicted_peak_gb": max(run.plan.train_peak, run.plan.rollout_peak) / GB} if run.plan else {}
    return predicted | {"peak_gb": run.status.peak / GB}


def proposal_record(item) -> dict:
    names = ("step", "kind", "verdict", "solve_rate", "reward", "admitted")
    record = {name: getattr(item, name) for name in names}
    record["references"] = [reference.id for reference in item.references]
    if item.task is None:
        return record | {"answer": item.parts.answer}
    record |= {name: getattr(item.task, name) for name in ("id", "program", "inputs", "outputs")}
    return record | ({"message": item.task.message} if item.task.message else {})


def rollout_record(item) -> dict:
    names = ("step", "role", "kind", "verdict", "correct", "reward", "advantage", "trains", "prompt", "response")
    return {name: getattr(item, name) for name in names} | {"formatted": item.parts.formatted}


def show(run, record: dict, seconds: float) -> None:
    """One status line on the terminal, and the alarms."""

    def rewards(role: str) -> str:  # of the kinds that had any: with --control fixed nothing is proposed
        means = [record.get(f"{role}/{kind}/reward_mean") for kind in run.config.kinds]
        found = [f"{mean:+.2f}" for mean in means if mean is not None]
        return f" {role} {' '.join(found)}" if found else ""

    shown = (("entropy", "entropy", ".3f"), ("grad", "grad_norm", ".2f"), ("mismatch", "mismatch", ".4f"))
    policy = " ".join(  # a value is absent where nothing was trained, or where the engine is the policy itself
        f"{label} {record[f'update/{name}']:{form}}" for label, name, form in shown if f"update/{name}" in record
    )
    valid = "" if run.config.control == "fixed" else f"valid {record['valid_share']:.0%} "
    phases = " ".join(f"{name} {value:.1f}" for name, value in run.status.seconds.items())
    remaining = int((run.config.steps - run.step) * seconds)
    print(
        f"step {run.step}/{run.config.steps} | reward{rewards('propose')}{rewards('solve')} | "
        f"{valid}solved {record['solve_rate']:.0%} | {policy} | "
        f"{phases} s | ETA {remaining // 60}:{remaining % 60:02d}"
    )
    for alarm in record["alarms"]:
        print(f"ALARM at step {record['step']}: {alarm}")
    if record["alarms"] and run.config.stop_on_collapse:
        print(f"stopped by --stop-on-collapse after step {run.step}; its checkpoint is {run.folder / 'checkpoint'}")


# ---------------------------------------------------------------------------------------------------------------------
# After the last step


def finish(run) -> None:
    """Predicted and measured memory; before and after per depth and task type, greedy and at T = 1, when there were
    evaluations; and the paths of what was written. What the report lacks never stops a run that has ended well."""
    *predicted, measured = peaks(run).values()
    planned = "".join(f"{peak:.2f} GB predicted for responses of full length, " for peak in predicted)
    print(f"peak memory: {planned}{measured:.2f} GB measured")
    if not run.writes:
        return
    evaluated = [record for record in run.watch.history if "score" in record]
    if len(evaluated) > 1:
        print(comparison_table(evaluated[0], evaluated[-1]))
    try:
        page = report.write(run.folder)
        if (curve := page.with_name("curve.svg")).exists():
            print(f"curve: {curve}")
        print(f"report: {page}")
    except (ValueError, OSError) as error:
        print(f"no report: {error}")
    print(f"run folder: {run.folder}")


def comparison_table(before: Mapping, after: Mapping) -> str:
    """`metrics.compare` as a table: accuracy before, after, the difference and its standard error."""
    lines = [("", "before", "after", "change", "standard error")]
    for row in metrics.compare(before, after):
        name, change = f"{row.suite.removeprefix('eval/')} {row.group}", row.after - row.before
        lines.append((name, f"{row.before:.3f}", f"{row.after:.3f}", f"{change:+.3f}", f"{row.error:.3f}"))
    width = max(len(line[0]) for line in lines)
    return "\n".join(f"{name:<{width}}{a:>8}{b:>8}{change:>9}   {error}" for name, a, b, change, error in lines)
