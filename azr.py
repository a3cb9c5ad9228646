"""Absolute Zero Reasoner: one language model proposes tasks, solves them, and learns from both.

What it does: the self-play loop of Algorithm 1. Every step proposes tasks, lets the executor validate them, measures
how often the model itself solves them, trains both roles with TRR++ and hands the new weights to the engine.
What it leaves out: more than one GPU (scale/), human data, a value network, and a KL term (the paper has none either).
Paper: arXiv 2505.03335, Algorithm 1 and sections 3.1 to 3.3. Every option: `python azr.py --help`.

    python azr.py                                   # an embedded tiny model, minutes on a laptop
    python azr.py --model Qwen/Qwen2.5-3B-Coder     # one GPU
    python azr.py --resume runs/NAME                # continue after a stop
"""

import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from tqdm import tqdm

import evaluate
from buffers import Buffer, Task, load_seeds, load_tasks, repeated, save_tasks
from executor import Executor
from harness.config import Config, parse
from policy.dialogue import STOP, Parts, encode, response_text, split_response, wrap
from prompts import KINDS, Kind

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse()  # shows the options and ends before torch is imported, which takes seconds

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import trr
from harness import checkpoint, journal, metrics
from harness.check import agree
from harness.journal import phase
from harness.start import SetupError, dry_run, interruptible, start, stop, uninterrupted
from policy.engine import Completion, Engine
from policy.memory import Plan
from policy.optimizer import MasterAdamW, learning_rate

# ---------------------------------------------------------------------------------------------------------------------
# What the loop passes on


@dataclass
class Rollout:
    """One sampled response in one of the (task, role) cells, from prompt to advantage."""

    role: str  # "propose" or "solve"
    kind: str
    step: int
    prompt: str
    prompt_ids: list[int]
    task: Task | None = None  # solve: the task tried; propose: the task it made, None while (or if) invalid
    references: list[Task] = field(default_factory=list)  # propose: what the proposer was shown
    count: int = 1  # how many responses to sample
    trains: bool = True  # False: it only measures learnability
    completion: Completion | None = None
    response: str = ""
    parts: Parts | None = None
    verdict: str = ""  # "ok", an executor verdict, or why the proposal could not be parsed
    correct: bool = False
    solve_rate: float | None = None  # propose: r, the mean over G attempts
    admitted: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    entropy: float | None = None


@dataclass
class Run:
    """Everything a step needs. `step` is the last finished one; all randomness follows from (seed, step, purpose)."""

    config: Config
    folder: Path
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    optimizer: MasterAdamW
    executor: Executor
    plan: Plan | None  # None: nobody planned the memory
    buffers: dict[str, Buffer]
    watch: metrics.Watch  # has read all records of metrics.jsonl
    step: int = 0
    saved: int = -1  # the step of the newest checkpoint
    writes: bool = True  # False: another process of the same run writes its folder
    status: journal.Status = field(default_factory=journal.Status)  # the harness's own notes

    def rng(self, step: int, purpose: str) -> random.Random:
        return random.Random(f"{self.config.seed}/{step}/{purpose}")


# ---------------------------------------------------------------------------------------------------------------------
# The loop (Algorithm 1)


def train(run: Run) -> None:
    """Self-play from the step after the last finished one until `steps`."""
    ended = run.step >= run.config.steps
    while not ended:
        step, run.status.seconds, began = run.step + 1, Counter(), time.perf_counter()
        proposals, attempts = play(run, step)
        with uninterrupted(run):  # half an optimizer step cannot be saved, so Ctrl-C waits for the end of the step
            update = learn(run, [*proposals, *attempts], step)
            ended = close_step(run, proposals, attempts, update, began)


def play(run: Run, step: int) -> tuple[list[Rollout], list[Rollout]]:
    """One step of self-play up to the advantages: (proposals, attempts at solving)."""
    proposals = propose(run, step)
    validate(run, proposals)
    attempts = solve(run, proposals, step)
    verify(run, attempts)
    give_rewards(run, proposals, attempts, step)
    return proposals, attempts


def close_step(run: Run, proposals: list[Rollout], attempts: list[Rollout], update: dict, began: float) -> bool:
    """What follows an update: the tasks enter their buffers, evaluation, logs, checkpoints. Whether the run has ended;
    `began`: when the step did."""
    admit(run, proposals)
    run.step += 1
    update |= measure(run)
    record = journal.log(run, proposals, attempts, update, time.perf_counter() - began)
    ended = run.step == run.config.steps or (run.config.stop_on_collapse and bool(record["alarms"]))
    checkpoint.save_due(run, record, last=ended)
    journal.show(run, record, time.perf_counter() - began)
    return ended


def propose(run: Run, step: int) -> list[Rollout]:
    """B proposals for each task type, in one call of the engine (paper section 3.2)."""
    config, rng = run.config, run.rng(step, "propose")
    if config.control == "fixed":
        return []
    proposals = [proposal_prompt(run, kind, rng, step) for kind in config.kinds.values() for _ in range(config.batch)]
    return generate(run, "propose", proposals, step)


def proposal_prompt(run: Run, kind: Kind, rng: random.Random, step: int) -> Rollout:
    """One propose prompt that fits into --max-prompt: references are drawn again, then fewer of them."""
    config = run.config
    for most in range(4 * config.references + 3, -1, -1):  # four times each
        references = kind.references(run.buffers, most // 4, rng)
        turns = kind.propose(references, config.inputs)
        proposal = make_rollout(run, "propose", kind.name, step, turns, references=references)
        if len(proposal.prompt_ids) <= config.max_prompt:
            return proposal
    raise SetupError(f"--max-prompt {config.max_prompt} is too short for {kind.name} proposals; raise it")


def make_rollout(run: Run, role: str, kind: str, step: int, turns: list[str], **more) -> Rollout:
    prompt = wrap(turns, run.tokenizer, run.config.template, tags=run.config.tag_names)
    return Rollout(role, kind, step, prompt, encode(prompt, run.tokenizer), **more)


def validate(run: Run, proposals: list[Rollout], seeding: list[Kind] | None = None) -> None:
    """Parse and execute every proposal; the valid ones get their task (paper section 3.3.3: runs, safe,
    deterministic). `seeding`: the kinds that will share the seeds; the answer tags may be missing then (3.3.1)."""
    config, drafts = run.config, []
    for proposal in proposals:
        answer = proposal.parts.answer or (proposal.response if seeding else "")
        kind = config.buffered[proposal.kind]
        draft, proposal.verdict = kind.parse_proposal(answer, proposal.references, config.inputs)
        if draft is not None:
            drafts.append((proposal, draft))
    number = count()
    with phase(run, "validate", len(drafts)) as bar:
        for kind in config.buffered.values():
            own = [(proposal, draft) for proposal, draft in drafts if proposal.kind == kind.name]
            outcomes = kind.run(run.executor, [draft for _, draft in own], bar.update)
            for (proposal, draft), results in zip(own, outcomes, strict=True):
                proposal.verdict = kind.check(draft, results)
                outputs, visible = [kind.output(result) for result in results], max(1, len(draft.inputs) // 2)
                task = Task(kind.name, draft.program, draft.inputs, outputs, draft.message, visible, proposal.step)
                task.id = f"{proposal.step}-{kind.name}-{next(number)}"
                task.references = [reference.id for reference in proposal.references]
                if proposal.verdict == "ok" and not fits(run, task, seeding or [kind]):
                    proposal.verdict = "prompt_too_long"
                proposal.task = task if proposal.verdict == "ok" else None


def solve(run: Run, proposals: list[Rollout], step: int) -> list[Rollout]:
    """G attempts at each valid proposal (they measure learnability) and `solve_count` per task type that train the
    solver, all in one call of the engine, so that the attempts at one task share their prompt's cache."""
    config, rng = run.config, run.rng(step, "solve")
    attempts = []
    for kind in config.kinds:
        new = [proposal.task for proposal in proposals if proposal.kind == kind and proposal.task]
        for task in new:
            attempts.append(solve_rollout(run, task, step, config.rollouts, trains=config.reuse_measurement_rollouts))
        if config.solve_batch == "previous":
            new = run.buffers[kind].added_at(step - 1)
        chosen = rng.sample(new, min(config.solve_count, len(new)))
        old = run.buffers[kind].sample(config.solve_count - len(chosen), rng)
        chosen += old + rng.choices(old or chosen, k=config.solve_count - len(chosen) - len(old))
        attempts += [solve_rollout(run, task, step) for task in chosen]
    return generate(run, "solve", attempts, step)


def solve_rollout(run: Run, task: Task, step: int, count: int = 1, trains: bool = True) -> Rollout:
    turns = (KINDS | run.config.buffered)[task.kind].solve(task)
    return make_rollout(run, "solve", task.kind, step, turns, task=task, count=count, trains=trains)


def fits(run: Run, task: Task, kinds: list[Kind]) -> bool:
    """Whether the prompts to solve a task as each of `kinds` (one shows the output, one the input) are short enough."""
    prompts = [solve_rollout(run, replace(task, kind=kind.name), task.step).prompt_ids for kind in kinds]
    return max(map(len, prompts)) <= run.config.max_prompt


def generate(run: Run, name: str, wanted: list[Rollout], step: int) -> list[Rollout]:
    """Sample `count` responses to each prompt at temperature 1; returns one Rollout per response."""
    with phase(run, name, sum(item.count for item in wanted)) as bar:
        completions = run.engine.generate(
            [item.prompt_ids for item in wanted],
            n=[item.count for item in wanted],
            max_new_tokens=run.config.max_response,
            seed=run.rng(step, name).getrandbits(31),
            stop=STOP,
            logprobs=[not run.engine.is_policy and item.trains for item in wanted],
            progress=journal.token_rate(bar),
        )
    pairs = zip(wanted, completions, strict=True)
    answered = [replace(item, completion=completion, count=1) for item, group in pairs for completion in group]
    for item in answered:
        item.response = response_text(item.completion.token_ids, run.tokenizer, run.engine.eos)
        item.parts = split_response(item.response, tags=run.config.tag_names)
    return answered


def verify(run: Run, attempts: list[Rollout]) -> None:
    """Judge every attempt by execution (paper equation 10 and section 3.3.4). Answers that could not be found are
    wrong; the format is a separate matter of the reward. Gold outputs stay on the trusted side of the executor."""
    with phase(run, "verify", len(attempts)) as bar:
        for kind in run.config.kinds.values():
            found = [(item, kind.parse_answer(item.parts.answer)) for item in attempts if item.kind == kind.name]
            for item, answer in found:
                item.verdict = "ok" if answer is not None else "no_answer"
            judged = [(item, answer) for item, answer in found if answer is not None]
            judgements = kind.verify(run.executor, [(item.task, answer) for item, answer in judged])
            for (item, _), judgement in zip(judged, judgements, strict=True):
                item.correct, item.verdict = judgement.correct, str(judgement.verdict)
            bar.update(len(found))


def give_rewards(run: Run, proposals: list[Rollout], attempts: list[Rollout], step: int) -> None:
    """Learnability rewards for the proposer (paper equation 4), binary ones for the solver (5), format (6), and
    then advantages, with one mean and one standard deviation per (task, role) cell (8) unless --baseline says so."""
    config = run.config
    outcomes: dict[str, list[bool]] = {}
    for attempt in attempts:
        attempt.reward = trr.solver_reward(attempt.parts.formatted, attempt.correct)
        if attempt.task.step == step:
            outcomes.setdefault(attempt.task.id, []).append(attempt.correct)
    for proposal, twice in zip(proposals, repeated([item.task for item in proposals], run.buffers), strict=True):
        if proposal.task:
            measured = outcomes[proposal.task.id][: config.rollouts]
            proposal.solve_rate = proposal.task.solve_rate = sum(measured) / len(measured)
        proposal.trains, most = config.train_proposer, config.duplicate_reward if twice else 1.0
        proposal.reward = trr.proposer_reward(
            proposal.task is not None, proposal.parts.formatted, proposal.solve_rate, config.zero_reward, most
        )
    rows = [item for item in [*proposals, *attempts] if item.trains]
    cells = [(item.role, item.kind) for item in rows]
    tasks = [item.task.id if item.role == "solve" else "" for item in rows]
    rewards = [item.reward for item in rows]
    if config.control == "shuffle":
        rewards = trr.shuffle_within_cells(rewards, cells, run.rng(step, "shuffle"))
    lengths = [len(item.completion.token_ids) for item in rows]
    advantages = trr.advantages(rewards, cells, tasks, lengths, config.baseline, config.advantage_weighting)
    for item, reward, advantage in zip(rows, rewards, advantages.tolist(), strict=True):
        item.reward, item.advantage = reward, advantage


def learn(run: Run, rollouts: list[Rollout], step: int, update=None) -> dict:
    """`trr.update`, or its like, with all cells together (paper equation 9); then the engine gets the new weights."""
    config = run.config
    rows = [item for item in rollouts if item.trains]
    run.engine.sleep()
    sampled = [(item.prompt_ids, item.completion, item.advantage) for item in rows]
    samples = [trr.Sample(prompt, found.token_ids, gain, found.logprobs) for prompt, found, gain in sampled]
    with phase(run, "update", sum(map(len, samples))) as bar:
        result = (update or trr.update)(
            run.policy, run.optimizer, samples, minibatches=config.minibatches, loss_mean=config.loss_mean,
            lr=learning_rate(step - 1, config.lr, config.warmup, config.steps, config.lr_decay),
            grad_clip=config.grad_clip, token_budget=config.token_budget, vocab_size=run.engine.vocab_size,
            progress=bar.update, **config.objective,
        )  # fmt: skip
    agree(run.engine, result.mismatch)
    for item, entropy in zip(rows, result.row_entropy, strict=True):
        item.entropy = entropy
    with phase(run, "sync", 1):
        run.engine.sync(run.policy)
    return {f"update/{key}": value for key, value in vars(result).items() if key != "row_entropy" and value is not None}


def measure(run: Run) -> dict:
    """The held-out scores, where they are due: before and after training, and every --eval-every steps."""
    every = run.config.eval_every
    if not every or (run.step % every and run.step != run.config.steps):
        return {}
    with phase(run, "evaluate", 1):
        return evaluate.during_training(run)


def admit(run: Run, proposals: list[Rollout]) -> None:
    """Valid tasks enter their buffer; duplicates never do, and with --admit learnable only those solved sometimes."""
    for proposal in proposals:
        if proposal.task and (run.config.admit == "all" or 0 < proposal.solve_rate < 1):
            proposal.admitted = run.buffers[proposal.kind].add(proposal.task)


# ---------------------------------------------------------------------------------------------------------------------
# Seeding (paper section 3.3.1): no gradient, from the zero triplet alone


def seed_buffers(run: Run) -> None:
    """Fill the buffers with S x B tasks per pool that the model itself proposed; kinds of one pool (abduction and
    deduction) share their seeds. Raises SetupError with counts and causes when the model is too weak."""
    config = run.config
    wanted = config.batch * config.seed_factor
    pools: dict[str, list[Kind]] = {}
    for kind in config.buffered.values():
        pools.setdefault(kind.pool or kind.name, []).append(kind)
    seeds = {pool: Buffer(wanted, kinds[-1].key) for pool, kinds in pools.items()}
    own = run.folder / "seeds.jsonl"  # there after a resume: seeding was over when the run stopped
    source = Path(config.seeds) if config.seeds else own
    if given := bool(config.seeds) or own.exists():
        known = KINDS | config.buffered
        for task in load_seeds(source, known) if config.seeds else load_tasks(source, known):
            pool = known[task.kind].pool or task.kind
            if pool in pools and fits(run, task, pools[pool]):
                seeds[pool].add(task)
    for pool, kinds in pools.items():
        if not given:
            seeds[pool].add(kinds[-1].zero())
            fill(run, seeds[pool], kinds, wanted)
        share(run, seeds[pool], kinds)
    if not given and run.writes:
        save_tasks(own.with_suffix(".tmp"), [task for pool in seeds.values() for task in pool])
        own.with_suffix(".tmp").rename(own)
    full = {name for name, buffer in run.buffers.items() if len(buffer)}
    needed = [names for name, kind in config.kinds.items() for names in ([name], kind.sources) if names]
    if empty := [" or ".join(names) for names in needed if not full.intersection(names)]:
        raise SetupError(f"{source} holds no {', '.join(empty)} seeds within --max-prompt; raise it, or omit --seeds")


def share(run: Run, seeds: Buffer, kinds: list[Kind]) -> None:
    for kind in kinds:
        run.buffers[kind.name] = run.config.new_buffer(kind)
        for task in seeds:
            run.buffers[kind.name].add(replace(task, kind=kind.name))


def fill(run: Run, seeds: Buffer, kinds: list[Kind], wanted: int) -> None:
    """Propose with the kinds in turn until `wanted` different tasks are there."""
    config, causes, names = run.config, Counter(), tuple(kind.name for kind in kinds)
    with tqdm(total=wanted, desc=f"seed {'/'.join(names)}", initial=len(seeds), disable=None) as bar:
        number = 0
        while len(seeds) < wanted:
            if sum(causes.values()) >= wanted * config.seed_limit:
                reasons = ", ".join(f"{found} {cause}" for cause, found in causes.most_common())
                raise SetupError(
                    f"the model is too weak to seed the buffers: {causes['ok']} of {sum(causes.values())} proposals "
                    f"were valid and new, {wanted} are needed ({reasons}); use --seeds FILE, a lower --batch or "
                    "--seed-factor, --template chat for an instruct model, or a stronger model"
                )
            kind, number = kinds[number % len(kinds)], number + 1
            share(run, seeds, kinds)
            rng = run.rng(0, f"seed/{names}/{number}")
            proposals = [proposal_prompt(run, kind, rng, 0) for _ in range(config.batch)]
            proposals = generate(run, f"seed/{kind.name}/{number}", proposals, 0)
            validate(run, proposals, seeding=kinds)
            for index, proposal in enumerate(proposals):
                if proposal.task and len(seeds) < wanted:
                    proposal.task.id = f"seed-{kind.name}-{number}-{index}"
                    proposal.verdict = "ok" if seeds.add(proposal.task) else "duplicate"
                causes[proposal.verdict] += 1
            bar.update(len(seeds) - bar.n)


# ---------------------------------------------------------------------------------------------------------------------
# Start and end


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 2 after one sentence on what to change, 130 after Ctrl-C; our faults are raised."""
    run = None
    try:
        config, extra = parse(argv)
        if extra.dry_run:
            dry_run(config, extra.card, extra.verbose)
            return 0
        if config.eval_every:
            evaluate.load_suites(config.eval_suites.split(","), Path(config.eval_data), config.kinds)
        run = Run(**start(config, extra.resume))
        with run.executor, interruptible(run):
            if not run.watch.history:
                begin(run)
            train(run)
            journal.finish(run)
    except (KeyboardInterrupt, OSError, ValueError, RuntimeError) as error:
        return stop(error, run)
    print("smoke ok" if extra.smoke else f"next: python azr.py --resume {run.folder} --steps {2 * run.config.steps}")
    return 0


def begin(run: Run) -> None:
    """Before the first step: seed the buffers, measure the untrained model."""
    seed_buffers(run)
    journal.log_start(run, measure(run))
    checkpoint.save(run, "checkpoint")


if __name__ == "__main__":
    sys.exit(main())
