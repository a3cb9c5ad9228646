"""Absolute Zero Reasoner: one language model proposes Python tasks, solves them, and learns from both.

What it does: the self-play loop of Algorithm 1. Every step proposes tasks, lets the executor validate them, measures
how often the model itself solves them, trains both roles with TRR++ and hands the new weights to the engine.
What it leaves out: more than one GPU, human data, a value network, and a KL term (the paper has none either).
Paper: arXiv 2505.03335, Algorithm 1 and sections 3.1 to 3.3. Configuration: config.py.

    python azr.py                                   # the embedded tiny model, minutes on a laptop
    python azr.py --model Qwen/Qwen2.5-3B-Coder     # one GPU
    python azr.py --resume runs/NAME                # continue after a stop
"""

import errno
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

import evaluate
import prompts
import trr
from buffers import KINDS, Buffer, Task, load_tasks, save_tasks, zero_task
from executor import Executor, Judgement, Result
from harness import checkpoint, report
from harness import metrics as health
from harness.config import parse
from harness.start import Rollout, Run, describe, make_rollout, phase, start, uninterrupted
from policy import rollout
from policy.engine import SyncError, first_line, ran_out_of_memory
from policy.optimizer import learning_rate


class SetupError(ValueError):
    """The run cannot go on with this model or these settings."""


# ---------------------------------------------------------------------------------------------------------------------
# The loop (Algorithm 1)


def train(run: Run) -> None:
    """Self-play from the step after the last finished one until `steps`."""
    config = run.config
    while run.step < config.steps:
        step, run.seconds, began = run.step + 1, Counter(), time.perf_counter()
        proposals = propose(run, step)
        validate(run, proposals)
        attempts = solve(run, proposals, step)
        verify(run, attempts)
        give_rewards(run, proposals, attempts, step)
        with uninterrupted(run):  # half an optimizer step cannot be saved, so Ctrl-C waits for the end of the step
            update = learn(run, [*proposals, *attempts], step)
            admit(run, proposals)
            run.step = step
            if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                update |= evaluate_policy(run)
            record = report.log(run, proposals, attempts, update, time.perf_counter() - began)
            collapsed = config.stop_on_collapse and bool(record["alarms"])
            save(run, record, last=collapsed or step == config.steps)
            report.show(run, record, time.perf_counter() - began)
        if collapsed:
            print(f"stopped by --stop-on-collapse after step {step}; the checkpoint is in {run.folder / 'checkpoint'}")
            break


def propose(run: Run, step: int) -> list[Rollout]:
    """B proposals for each task type, in one call of the engine. References come from the buffer of the same type;
    an induction proposal describes a program from either of the other two (paper section 3.2)."""
    config = run.config
    if config.control == "fixed":
        return []
    rng = run.rng(step, "propose")
    proposals = [proposal_prompt(run, kind, rng, step) for kind in config.kinds for _ in range(config.batch)]
    return generate(run, "propose", proposals, step)


def proposal_prompt(run: Run, kind: str, rng: random.Random, step: int) -> Rollout:
    """One propose prompt that fits into --max-prompt: references are drawn again, then fewer of them."""
    config = run.config
    for count in range(config.references, -1, -1):
        for _ in range(4):
            if kind == "induction":
                references = [draw_program(run, rng)]
            else:
                references = run.buffers[kind].sample(count, rng)
            text = prompts.propose_prompt(kind, references, config.inputs)
            proposal = make_rollout(run, "propose", kind, step, text, references=references)
            if len(proposal.prompt_ids) <= config.max_prompt:
                return proposal
    raise SetupError(f"--max-prompt {config.max_prompt} is too short for {kind} proposals; raise it")


def draw_program(run: Run, rng: random.Random) -> Task:
    """A task of the other two buffers, uniformly; they are not put together first, which would cost their size."""
    first, second = run.buffers["abduction"], run.buffers["deduction"]
    number = rng.choice(range(len(first) + len(second)))
    return first[number] if number < len(first) else second[number - len(first)]


def validate(run: Run, proposals: list[Rollout], whole_response: bool = False) -> None:
    """Parse and execute every proposal; the valid ones get their task (paper section 3.3.3: runs, safe,
    deterministic). `whole_response`: while seeding the answer tags may be missing (paper section 3.3.1)."""
    config, parsed = run.config, []
    for proposal in proposals:
        answer = proposal.parts.answer or (proposal.response if whole_response else "")
        parts, proposal.verdict = prompts.parse_proposal(proposal.kind, answer, config.inputs)
        if parts is not None:
            program = parts.program or proposal.references[0].program
            parsed.append((proposal, program, parts))
    jobs = [(program, parts.inputs) for _, program, parts in parsed]
    with phase(run, "validate", len(jobs)) as bar:
        results = run.executor.validate(jobs, progress=bar.update)
    for number, ((proposal, program, parts), outcome) in enumerate(zip(parsed, results, strict=True)):
        proposal.verdict = judge_proposal(program, parts, outcome)
        if proposal.verdict != "ok":
            continue
        task = Task(
            proposal.kind,
            program,
            parts.inputs,
            [result.output for result in outcome],
            parts.message,
            visible=max(1, len(parts.inputs) // 2),
            step=proposal.step,
            id=f"{proposal.step}-{proposal.kind}-{number}",
            references=[reference.id for reference in proposal.references],
        )
        if fits(run, task):
            proposal.task = task
        else:
            proposal.verdict = "prompt_too_long"


def judge_proposal(program: str, parts: prompts.Proposal, outcome: list[Result]) -> str:
    """ "ok", or the first reason against a proposal whose program ran."""
    for result in outcome:
        if not result.ok:
            return str(result.verdict)
        if result.output == "None":
            return "returns_none"
    lines = [line.strip() for line in program.splitlines() if not re.fullmatch(r"(def .*:)?\s*(#.*)?", line)]
    if parts.message and ("def f" in parts.message or all(line in parts.message for line in lines)):
        return "message_has_code"
    return "ok"


def solve(run: Run, proposals: list[Rollout], step: int) -> list[Rollout]:
    """G attempts at each valid proposal (they measure learnability) and B attempts per task type that train the
    solver, all in one call of the engine, so that the attempts at one task share their prompt's cache."""
    config, rng = run.config, run.rng(step, "solve")
    attempts = []
    for kind in config.kinds:
        new = [proposal.task for proposal in proposals if proposal.kind == kind and proposal.task]
        for task in new:
            attempts.append(solve_rollout(run, task, step, config.rollouts, trains=config.reuse_measurement_rollouts))
        if config.solve_batch == "previous":
            new = run.buffers[kind].added_at(step - 1)
        chosen = rng.sample(new, min(config.batch, len(new)))
        old = run.buffers[kind].sample(config.batch - len(chosen), rng)
        chosen += old + rng.choices(old or chosen, k=config.batch - len(chosen) - len(old))
        attempts += [solve_rollout(run, task, step) for task in chosen]
    return generate(run, "solve", attempts, step)


def fits(run: Run, task: Task) -> bool:
    """Whether the prompt to solve a task is within --max-prompt."""
    return len(solve_rollout(run, task, task.step).prompt_ids) <= run.config.max_prompt


def solve_rollout(run: Run, task: Task, step: int, count: int = 1, trains: bool = True) -> Rollout:
    return make_rollout(
        run, "solve", task.kind, step, prompts.solve_prompt(task), task=task, count=count, trains=trains
    )


def generate(run: Run, name: str, wanted: list[Rollout], step: int) -> list[Rollout]:
    """Sample `count` responses to each prompt at temperature 1; returns one Rollout per response."""
    total = sum(item.count for item in wanted)
    logprobs = [not run.engine.is_policy and item.trains for item in wanted]
    with phase(run, name, total) as bar:
        tokens = 0

        def progress(sequences: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
            bar.update(sequences)

        completions = run.engine.generate(
            [item.prompt_ids for item in wanted],
            n=[item.count for item in wanted],
            max_new_tokens=run.config.max_response,
            seed=run.rng(step, name).getrandbits(31),
            logprobs=logprobs,
            progress=progress,
        )
    answered = []
    for item, group in zip(wanted, completions, strict=True):
        for completion in group:
            response = run.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            parts = prompts.split_response(response)
            answered.append(replace(item, completion=completion, response=response, parts=parts, count=1))
    return answered


def verify(run: Run, attempts: list[Rollout]) -> None:
    """Judge every attempt by execution (paper equation 10 and section 3.3.4). Answers that could not be found are
    wrong; the format is a separate matter of the reward."""
    with phase(run, "verify", len(attempts)) as bar:
        for kind in KINDS:
            found = [(item, prompts.parse_answer(kind, item.parts.answer)) for item in attempts if item.kind == kind]
            for item, answer in found:
                item.verdict = "ok" if answer is not None else "no_answer"
            judged = [(item, answer) for item, answer in found if answer is not None]
            for (item, _), judgement in zip(judged, judge(run.executor, kind, judged, bar.update), strict=True):
                item.correct, item.verdict = judgement.correct, str(judgement.verdict)
            bar.update(len(found) - len(judged))


def judge(executor: Executor, kind: str, answers: list[tuple], progress: Callable) -> list[Judgement]:
    """Hand the answers of one task type to the executor; gold outputs stay on the trusted side of it."""
    if kind == "deduction":
        judgements = executor.verify_deduction([(item.task.outputs[0], answer) for item, answer in answers])
        progress(len(answers))
        return judgements
    if kind == "abduction":
        jobs = [(item.task.program, item.task.outputs[0], answer) for item, answer in answers]
        return executor.verify_abduction(jobs, progress=progress)
    jobs = [(answer, item.task.hidden_inputs, item.task.hidden_outputs) for item, answer in answers]
    return executor.verify_induction(jobs, progress=progress)


def give_rewards(run: Run, proposals: list[Rollout], attempts: list[Rollout], step: int) -> None:
    """Learnability rewards for the proposer (paper equation 4), binary ones for the solver (5), format (6), and
    then one mean and one standard deviation per (task, role) cell (8)."""
    config = run.config
    outcomes: dict[str, list[bool]] = {}
    for attempt in attempts:
        attempt.reward = trr.solver_reward(attempt.parts.formatted, attempt.correct)
        if attempt.task.step == step:
            outcomes.setdefault(attempt.task.id, []).append(attempt.correct)
    for proposal in proposals:
        if proposal.task:
            measured = outcomes[proposal.task.id][: config.rollouts]
            proposal.solve_rate = proposal.task.solve_rate = sum(measured) / len(measured)
        proposal.trains = config.train_proposer
        proposal.reward = trr.proposer_reward(
            proposal.task is not None, proposal.parts.formatted, proposal.solve_rate, config.zero_reward
        )
    rows = [item for item in [*proposals, *attempts] if item.trains]
    if config.control == "shuffle":
        shuffle_rewards(rows, run.rng(step, "shuffle"))
    advantages = trr.whiten(
        [item.reward for item in rows],
        [(item.role, item.kind) for item in rows],
        [len(item.completion.token_ids) for item in rows],
        config.advantage_weighting,
    )
    for item, advantage in zip(rows, advantages.tolist(), strict=True):
        item.advantage = advantage


def shuffle_rewards(rows: list[Rollout], rng: random.Random) -> None:
    """The control: every reward goes to another rollout of its cell, so that it says nothing about the rollout."""
    for cell in sorted({(item.role, item.kind) for item in rows}):
        members = [item for item in rows if (item.role, item.kind) == cell]
        rewards = [item.reward for item in members]
        rng.shuffle(rewards)
        for item, reward in zip(members, rewards, strict=True):
            item.reward = reward


def learn(run: Run, rollouts: list[Rollout], step: int) -> dict:
    """An update with all cells together (paper equation 9), then the engine gets the new weights."""
    config = run.config
    rows = [item for item in rollouts if item.trains]
    run.engine.sleep()
    samples = [
        trr.Sample(item.prompt_ids, item.completion.token_ids, item.advantage, item.completion.logprobs)
        for item in rows
    ]
    with phase(run, "update", sum(map(len, samples))) as bar:
        result = trr.update(
            run.policy,
            run.optimizer,
            samples,
            lr=learning_rate(step - 1, config.lr, config.warmup, config.steps, config.lr_decay),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            minibatches=config.minibatches,
            loss_mean=config.loss_mean,
            entropy_coef=config.entropy_coef,
            tis_cap=config.importance_cap or None,
            grad_clip=config.grad_clip,
            token_budget=run.plan.token_budget,
            progress=bar.update,
        )
    for item, entropy in zip(rows, result.row_entropy, strict=True):
        item.entropy = entropy
    with phase(run, "sync", 1) as bar:
        run.engine.sync(run.policy)
        bar.update(1)
    kept = {name: value for name, value in asdict(result).items() if name != "row_entropy" and value is not None}
    return {f"update/{name}": value for name, value in kept.items()}


def admit(run: Run, proposals: list[Rollout]) -> None:
    """Valid tasks enter their buffer; duplicates never do, and with --admit learnable only those solved sometimes."""
    for proposal in proposals:
        if proposal.task and (run.config.admit == "all" or 0 < proposal.solve_rate < 1):
            proposal.admitted = run.buffers[proposal.kind].add(proposal.task)


# ---------------------------------------------------------------------------------------------------------------------
# Seeding (paper section 3.3.1): no gradient, from the zero triplet alone


def seed_buffers(run: Run) -> None:
    """Fill the buffers with S x B tasks per type that the model itself proposed. Abduction and deduction share their
    seeds. Raises SetupError with counts and causes when the model is too weak."""
    config = run.config
    wanted = config.batch * config.seed_factor
    pairs, described = Buffer(wanted), Buffer(wanted)
    own = run.folder / "seeds.jsonl"  # there after a resume: seeding was over when the run stopped
    source = Path(config.seeds) if config.seeds else own
    if config.seeds or own.exists():
        for task in load_tasks(source):
            if fits_both_ways(run, task):
                (described if task.kind == "induction" else pairs).add(task)
    else:
        pairs.add(zero_task("deduction"))
        fill(run, pairs, ("abduction", "deduction"), wanted)
        if "induction" in config.kinds:
            share_seeds(run, pairs)
            described.add(zero_task("induction"))
            fill(run, described, ("induction",), wanted)
        save_tasks(own.with_suffix(".tmp"), [*pairs, *described])
        own.with_suffix(".tmp").rename(own)
    share_seeds(run, pairs)
    run.buffers["induction"] = Buffer(config.buffer_size)
    for task in described:
        run.buffers["induction"].add(task)
    empty = [kind for kind in config.kinds if not len(run.buffers[kind])]
    if empty:
        raise SetupError(
            f"{source} holds no seeds for {', '.join(empty)} that fit --max-prompt; raise it, or seed without --seeds"
        )


def fits_both_ways(run: Run, seed: Task) -> bool:
    """An abduction seed is also solved as deduction, and the other way round: one prompt shows the output, the other
    the input, so one of them may be too long."""
    ways = ("induction",) if seed.kind == "induction" else ("abduction", "deduction")
    return all(fits(run, replace(seed, kind=kind)) for kind in ways)


def share_seeds(run: Run, pairs: Buffer) -> None:
    for kind in ("abduction", "deduction"):
        run.buffers[kind] = Buffer(run.config.buffer_size)
        for task in pairs:
            run.buffers[kind].add(replace(task, kind=kind))


def fill(run: Run, seeds: Buffer, kinds: tuple[str, ...], wanted: int) -> None:
    """Propose with the kinds in turn until `wanted` different tasks are there."""
    config, causes, number = run.config, Counter(), 0
    with tqdm(total=wanted, desc=f"seed {'/'.join(kinds)}", initial=len(seeds)) as bar:
        while len(seeds) < wanted:
            if sum(causes.values()) >= wanted * config.seed_limit:
                reasons = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
                raise SetupError(
                    f"the model is too weak to seed the buffers: {causes['ok']} of {sum(causes.values())} proposals "
                    f"were valid and new, {wanted} are needed ({reasons}); use --seeds FILE, a lower --batch or "
                    "--seed-factor, --template chat for an instruct model, or a stronger model"
                )
            kind, number = kinds[number % len(kinds)], number + 1
            if kind != "induction":
                share_seeds(run, seeds)
            rng = run.rng(0, f"seed/{kinds}/{number}")
            proposals = [proposal_prompt(run, kind, rng, 0) for _ in range(config.batch)]
            proposals = generate(run, f"seed/{kind}/{number}", proposals, 0)
            validate(run, proposals, whole_response=True)
            for index, proposal in enumerate(proposals):
                if proposal.task and not fits_both_ways(run, proposal.task):
                    proposal.verdict = "prompt_too_long"
                elif proposal.task and len(seeds) < wanted:
                    proposal.task.id = f"seed-{kind}-{number}-{index}"
                    proposal.verdict = "ok" if seeds.add(proposal.task) else "duplicate"
                causes[proposal.verdict] += 1
            bar.update(len(seeds) - bar.n)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and checkpoints between steps


def evaluate_policy(run: Run) -> dict[str, float]:
    """The suites of --eval-suites with the engine of the run, greedily; before and after training also at T = 1."""
    config, found = run.config, {}
    for temperature in (0.0, 1.0) if run.step in (0, config.steps) else (0.0,):
        with phase(run, "evaluate", 1) as bar:
            records = evaluate.run_suites(
                config.eval_suites.split(","),
                run.engine,
                run.tokenizer,
                run.executor,
                data_dir=config.eval_data,
                template=config.template,
                temperature=temperature,
                max_tokens=config.eval_max_tokens or config.max_response,
                seed=config.seed,
            )
            bar.update(1)
        name = "eval" if temperature == 0 else "eval-t1"
        for suite, record in records.items():
            found |= {
                f"{name}/{Path(suite).stem}/{key}": value
                for key, value in evaluate.flatten(record).items()
                if isinstance(value, int | float)
            }
    greedy = [value for name, value in found.items() if name.startswith("eval/") and name.count("/") == 2]
    return found | {"score": sum(greedy) / len(greedy)}  # what --keep-best compares


def save(run: Run, record: dict, last: bool) -> None:
    """RUN/checkpoint every --save-every steps and after the last one, RUN/best when the held-out score is the best so
    far (--keep-best)."""
    config = run.config
    if config.keep_best and "score" in record and record["score"] >= max(r.get("score", -1.0) for r in run.history):
        save_checkpoint(run, "best")  # first: a step that is killed here is done again, and `best` with it
    if last or run.step % config.save_every == 0:
        save_checkpoint(run)


def save_checkpoint(run: Run, name: str = "checkpoint") -> None:
    checkpoint.save(run.folder, run.step, run.policy, run.tokenizer, run.optimizer, name)
    if name == "checkpoint":
        run.saved = run.step


# ---------------------------------------------------------------------------------------------------------------------
# Start and end


def main(argv: list[str] | None = None) -> int:
    """The command line. What the user or the machine did wrong gives one sentence and exit code 2, Ctrl-C exit code
    130; a fault of this program keeps its traceback."""
    run = None
    try:
        config, extra = parse(argv)
        if extra.dry_run:
            describe(config)
            return 0
        if config.eval_every:
            evaluate.check_data(config.eval_suites.split(","), Path(config.eval_data), {})
        run = start(config, extra.resume)
        with run.executor:
            self_play(run)
    except KeyboardInterrupt:
        done = "" if run is None else " before the first step" if run.saved < 0 else f" after step {run.saved}"
        again = f"; continue with: python azr.py --resume {run.folder}" if run else ""
        print(f"\nstopped{done}{again}")
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        sentence = explain(error, run)
        if sentence is None:
            raise
        print(f"azr.py: {sentence}", file=sys.stderr)
        return 2
    print(f"smoke ok: {run.step} steps, run folder {run.folder}" if extra.smoke else f"run folder: {run.folder}")
    return 0


def self_play(run: Run) -> None:
    """The whole of a run. Ctrl-C saves the last finished step if it was not yet."""
    try:
        if not run.history:
            begin(run)
        train(run)
        report.finish(run)
    except KeyboardInterrupt:
        if run.history and not run.halfway and run.saved < run.step:
            save_checkpoint(run)
        raise


def explain(error: Exception, run: Run | None) -> str | None:
    """What went wrong and what to change, in one sentence; None for a fault of this program."""
    again = f"then --resume {run.folder}" if run else "then start again"
    if isinstance(error, SyncError):
        return str(error)
    if isinstance(error, RuntimeError):
        if not ran_out_of_memory(error):
            return None
        if run is None:
            return f"out of memory at the start ({first_line(error)}); lower --memory, or choose a smaller --model"
        flag = f"--token-budget (now {run.plan.token_budget})" if run.phase == "update" else "--memory"
        return f"out of memory in {run.phase} ({first_line(error)}); lower {flag} or --max-response, {again}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}; free some disk space, {again}"
    if run and run.history and isinstance(error, ValueError) and not isinstance(error, SetupError):
        return None  # once it has begun, what was typed is in order
    return str(error)


def begin(run: Run) -> None:
    """Before the first step: check that engine and policy agree, seed the buffers, measure the untrained model."""
    probe = [make_rollout(run, "solve", kind, 0, prompts.solve_prompt(zero_task(kind))).prompt_ids for kind in KINDS]
    difference = rollout.check_sync(run.engine, run.policy, probe)
    print(f"engine and policy agree: mean |logprob difference| {difference:.1e}")
    seed_buffers(run)
    (run.folder / "buffers").mkdir(exist_ok=True)
    for kind, buffer in run.buffers.items():
        save_tasks(run.folder / f"buffers/{kind}.jsonl", buffer)
    record: dict = {"step": 0, **health.buffer_metrics(run.buffers)}
    if run.config.eval_every:
        record |= evaluate_policy(run)
    run.remember(record)
    checkpoint.append(run.folder / "metrics.jsonl", [record])
    report.write_tensorboard(run, record)
    save_checkpoint(run)


if __name__ == "__main__":
    sys.exit(main())
