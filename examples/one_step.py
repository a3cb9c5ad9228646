"""One step of self-play on the board: what a lecturer would write, with the real numbers of the embedded model.

What it does: plays one step of `azr.py` and prints a propose prompt, its response and the parse, the executor's
verdict, the solve prompt, G answers and their solve rate, the reward table, the six cells of TRR++ with two advantages
worked out, the loss of one token and the gradient norm. `docs/one_step.md` is this output with explanations.
What it leaves out: nothing of the algorithm; it calls the loop's own functions.
Paper: Algorithm 1, equations 4 to 9.

    python examples/one_step.py
"""

import contextlib
import io
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import azr
from harness.config import parse
from harness.start import start


def heading(text: str) -> None:
    print(f"\n## {text}\n")


def block(text: str) -> None:
    """A text of the model, indented, so that its own fences do not end a block of the page."""
    print("\n".join(f"    {line}".rstrip() for line in text.split("\n")))


def show(run: azr.Run, proposals: list[azr.Rollout], attempts: list[azr.Rollout]) -> None:
    config = run.config
    learnable = [item for item in proposals if item.kind == "deduction" and item.task]
    proposal = max(learnable, key=lambda item: item.reward)
    task, own = proposal.task, [item for item in attempts if item.task is proposal.task]
    heading("1. Propose: the end of one prompt, and the response")
    block(proposal.prompt[-420:] + proposal.response)
    heading("2. The parse, and the executor's verdict")
    block(f"program  {task.program!r}\ninput    {task.inputs[0]}\nverdict  {proposal.verdict}: four calls agree")
    block(f"output   {task.outputs[0]}  (the gold, which only the executor knows)")
    heading("3. Solve: the end of the prompt (no output in it), and G answers")
    block(own[0].prompt[own[0].prompt.rindex("The next program") :])
    measured = own[: config.rollouts]
    for item in measured:
        answer = azr.KINDS["deduction"].parse_answer(item.parts.answer)
        block(f"{'right' if item.correct else 'wrong'}  {answer}   reward {item.reward:+.1f}")
    heading("4. Rewards (equations 4 to 6)")
    right = sum(item.correct for item in measured)
    block(f"r = {right} / {len(measured)} = {proposal.solve_rate:.3f}")
    block(f"reward of this proposal = {'0' if right in (0, len(measured)) else '1 - r'} = {proposal.reward:.3f}")
    block("solver: +1 right, -0.5 wrong in the right form, -1 without it; proposer: -1 for what is no task")
    heading("5. Six cells (equation 8): n, mean, deviation")
    rows = [item for item in [*proposals, *attempts] if item.trains]
    cells: dict[tuple[str, str], list[azr.Rollout]] = {}
    for item in rows:
        cells.setdefault((item.role, item.kind), []).append(item)
    for (role, kind), members in cells.items():
        rewards = [item.reward for item in members]
        block(f"{role:8}{kind:10}{len(members):4}{statistics.fmean(rewards):8.3f}{statistics.stdev(rewards):8.3f}")
    solver = next(item for item in measured if item.trains)
    for item in (proposal, solver):
        rewards = [other.reward for other in cells[item.role, item.kind]]
        mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
        block(
            f"A of this {'proposal' if item is proposal else 'answer'} = ({item.reward:.3f} - {mean:.3f}) / "
            f"{deviation:.3f} = {(item.reward - mean) / deviation:.3f}; trr.whiten says {item.advantage:.3f}"
        )
    heading("6. The loss of one token (equation 9), and the update")
    tokens = sum(len(item.completion.token_ids) for item in rows)
    block(f"ratio = 1 before the first step, so the token's loss is -1 x A / N = {-proposal.advantage / tokens:.6f}")
    block(f"with N = {tokens} response tokens of {len(rows)} rollouts; its gradient is that of -A log pi / N")
    update = azr.learn(run, [*proposals, *attempts], 1)
    norm = f"gradient norm {update['update/grad_norm']:.4f}, clipped at {config.grad_clip}"
    block(f"loss {update['update/loss']:.4f}, {norm}")


def main() -> None:
    torch.set_num_threads(1)  # sums in one order: the same numbers on machines with other numbers of cores
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--preset", "tiny", "--batch", "8", "--rollouts", "4", "--seed-factor", "1", "--eval-every", "0"]
        config, _ = parse([*arguments, "--seed", "3", "--device", "cpu", "--out", f"{folder}/run"])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run = azr.Run(**start(config, None))
            azr.seed_buffers(run)
        with run.executor:
            proposals, attempts = azr.play(run, 1)
            print(f"# One step of self-play\n\nB = {config.batch}, G = {config.rollouts}, the embedded model.")
            show(run, proposals, attempts)


if __name__ == "__main__":
    main()
