"""What a step leaves behind: logs, the status line, TensorBoard, and the closing table with its curve.

    RUN/metrics.jsonl          one flat record per step (step 0: before training); the same bytes in every repeat
    RUN/timing.jsonl           seconds per phase, tokens and peak memory of each step, which no repeat reproduces
    RUN/tasks.jsonl            every proposal with verdict, solve rate, reward and the references it was shown
    RUN/rollouts.jsonl         sampled full texts
    RUN/flagged.jsonl          texts that the monitor of health.py wants a person to read
    RUN/buffers/KIND.jsonl     every task that entered a buffer

What it leaves out: deciding anything. The names of the metrics are explained in docs/metrics.md.
"""

from dataclasses import asdict

from buffers import KINDS
from harness import checkpoint, plots
from harness import metrics as health
from harness.start import Rollout, Run
from policy.memory import GB


def log(run: Run, proposals: list[Rollout], attempts: list[Rollout], update: dict, seconds: float) -> dict:
    """One flat record into metrics.jsonl, every proposal into tasks.jsonl, some full texts into rollouts.jsonl."""
    config, step = run.config, run.step
    rollouts = [*proposals, *attempts]
    record = {
        "step": step,
        "valid_share": mean(item.task is not None for item in proposals),
        "solve_rate": mean(item.correct for item in attempts),
        **update,
        **health.cell_metrics(rollouts, config.rollouts),
        **health.buffer_metrics(run.buffers),
    }
    flagged = [(item, names) for item in rollouts if (names := health.flags(item))]
    record["flagged"] = len(flagged)
    record["alarms"] = run.remember(record)
    timing = {f"seconds/{name}": round(value, 3) for name, value in run.seconds.items()}
    generated = sum(len(item.completion.token_ids) for item in rollouts)
    timing |= {"seconds/step": round(seconds, 3), "generated_tokens": generated}
    predicted, measured = peaks(run)
    timing |= {"predicted_peak_gb": round(predicted, 3), "peak_gb": round(measured, 3)}
    checkpoint.append(run.folder / "metrics.jsonl", [record])
    checkpoint.append(run.folder / "timing.jsonl", [{"step": step, **timing}])
    checkpoint.append(run.folder / "tasks.jsonl", [proposal_record(item) for item in proposals])
    for kind in KINDS:
        entered = [asdict(item.task) for item in proposals if item.admitted and item.kind == kind]
        checkpoint.append(run.folder / f"buffers/{kind}.jsonl", entered)
    sampled = run.rng(step, "log").sample(rollouts, min(config.log_rollouts, len(rollouts)))
    checkpoint.append(run.folder / "rollouts.jsonl", [rollout_record(item) for item in sampled])
    checkpoint.append(run.folder / "flagged.jsonl", [{"flags": names, **rollout_record(i)} for i, names in flagged])
    write_tensorboard(run, record | timing)
    return record


def show(run: Run, record: dict, seconds: float) -> None:
    """One status line on the terminal, and the alarms."""
    print(status_line(run, record, seconds))
    for alarm in record["alarms"]:
        print(f"ALARM at step {record['step']}: {alarm}")


def peaks(run: Run) -> tuple[float, float]:
    """(predicted, measured so far) peak memory in GB, of the card or of this process."""
    predicted = max(run.plan.train_peak, run.plan.rollout_peak)
    return predicted / GB, run.peak / GB


def mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values) if values else 0.0


def proposal_record(item: Rollout) -> dict:
    task = item.task
    return {
        "step": item.step,
        "kind": item.kind,
        "verdict": item.verdict,
        "solve_rate": item.solve_rate,
        "reward": item.reward,
        "admitted": item.admitted,
        "references": [reference.id for reference in item.references],
        **({"id": task.id, "program": task.program, "inputs": task.inputs, "outputs": task.outputs} if task else {}),
        **({"message": task.message} if task and task.message else {}),
        **({"answer": item.parts.answer} if not task else {}),
    }


def rollout_record(item: Rollout) -> dict:
    names = ("step", "role", "kind", "verdict", "correct", "reward", "advantage", "trains", "prompt", "response")
    return {name: getattr(item, name) for name in names} | {"formatted": item.parts.formatted}


def status_line(run: Run, record: dict, seconds: float) -> str:
    def rewards(role: str) -> str:
        return " ".join(f"{record.get(f'{role}/{kind}/reward_mean', float('nan')):+.2f}" for kind in run.config.kinds)

    phases = " ".join(f"{name} {value:.1f}" for name, value in run.seconds.items())
    remaining = int((run.config.steps - run.step) * seconds)
    shown = (("entropy", "entropy", ".3f"), ("grad", "grad_norm", ".2f"), ("mismatch", "mismatch", ".4f"))
    policy = " ".join(  # a value is absent where nothing was trained, or where the engine is the policy itself
        f"{label} {record[f'update/{name}']:{form}}" for label, name, form in shown if f"update/{name}" in record
    )
    return (
        f"step {run.step}/{run.config.steps} | reward propose {rewards('propose')} solve {rewards('solve')} | "
        f"valid {record['valid_share']:.0%} solved {record['solve_rate']:.0%} | {policy} | "
        f"{phases} s | ETA {remaining // 60}:{remaining % 60:02d}"
    )


def write_tensorboard(run: Run, record: dict) -> None:
    """Scalars for TensorBoard where it is installed; metrics.jsonl holds everything in any case."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    if run.board is None:  # one for the whole run: each makes a file of its own, which TensorBoard reads one by one
        run.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step)
    for name, value in record.items():
        if isinstance(value, int | float):
            run.board.add_scalar(name, value, run.step)
    run.board.flush()


def finish(run: Run) -> None:
    """Predicted and measured memory; when there were evaluations, before and after per task type, greedy and at T = 1,
    and the curve."""
    predicted, measured = peaks(run)
    print(f"peak memory: {predicted:.2f} GB predicted for responses of full length, {measured:.2f} GB measured")
    evaluated = [record for record in run.history if "score" in record]
    if len(evaluated) < 2:
        return
    print(plots.comparison_table(evaluated[0], evaluated[-1]))
    names = [key for key in evaluated[0] if key.startswith("eval/") and key.endswith("/accuracy")]
    names = [key for key in names if key.split("/")[-2] in KINDS] or names
    several = len({name.split("/")[1] for name in names}) > 1
    labels = {name: name[5:-9] if several else name[5:-9].rpartition("/")[2] for name in names}
    series = {label: [(record["step"], record[name]) for record in evaluated] for name, label in labels.items()}
    series["mean"] = [(record["step"], record["score"]) for record in evaluated]
    print(plots.terminal_plot(series))
    (run.folder / "curve.svg").write_text(plots.svg_plot(series, "Held-out accuracy", "accuracy"), encoding="utf-8")
    print(f"curve: {run.folder / 'curve.svg'}")
