"""How a run starts, what it is told beforehand, and how it stops.

What it does: `dry_run` prints the plan of a run; `start` loads all it needs, after --resume with every state of the
last finished step, and checks the model; `interruptible` and `uninterrupted` let Ctrl-C and SIGTERM stop it without
losing a step; `stop` says what went wrong in one sentence.
What it leaves out: the algorithm (azr.py) and what is written down (journal.py).

    config, extra = parse(["--model", "PATH"]); run = azr.Run(**start(config, resume=None))
"""

import contextlib
import errno
import json
import os
import platform
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import torch
import transformers
from jinja2 import TemplateError  # torch requires it; transformers renders templates with it

from buffers import Buffer
from executor import Executor
from harness import checkpoint
from harness.check import inspect_config, inspect_tokenizer, rehearse
from harness.config import Config
from harness.metrics import Watch
from policy import memory
from policy.dialogue import choose_tags, wrap
from policy.engine import SyncError, first_line
from policy.load import choose_engine, load_config, load_policy, load_tokenizer, make_engine
from policy.logprobs import ran_out_of_memory
from policy.lora import add_adapters
from policy.memory import GB
from policy.optimizer import MasterAdamW
from policy.speed import DEVICES, estimate_seconds

# ---------------------------------------------------------------------------------------------------------------------
# Before a run


def prepare(config: Config, card: float = 0.0, fresh=True, whole=False) -> tuple[memory.Plan, Config, list, dict]:
    """Plan a run and say what will happen: in two lines, or as a `whole` with the parts of the memory. `card`: GB of a
    card that is not here. Raises ValueError for a model that cannot be had, does not fit or fails a check, and without
    the file of --seeds. Returns the plan, the configuration without "auto", the prompts to check weights with, what was
    checked already."""
    if fresh and config.seeds and not Path(config.seeds).is_file():
        raise ValueError(f"there is no file --seeds {config.seeds}; give RUN/seeds.jsonl of an earlier run")
    hf_config = load_config(config.model)
    prompts, checked = [], inspect_config(config, hf_config)
    if not card:  # a config is enough to plan for another machine
        tokenizer = load_tokenizer(config.model, hf_config)
        config = settle(config, tokenizer)
        prompts, more = inspect_tokenizer(config, tokenizer, fresh)
        checked |= more
    plan = choose_plan(config, hf_config, card)
    config = replace(config, token_budget=plan.token_budget)
    print(f"{config.steps} steps of self-play with {config.model}, {pace(config, plan, bool(card))}")
    if whole:
        describe(config, plan, card)
    else:
        peak = f"{max(plan.train_peak, plan.rollout_peak) / GB:.2f} of {plan.limit / GB:.1f} GB predicted at the peak"
        chosen = {
            "the engine sleeps during updates": plan.sleep,
            "activations are recomputed": plan.gradient_checkpointing,
        }
        chosen |= {"optimizer in host memory": plan.offload_optimizer}
        print(", ".join([f"{plan.engine} on {plan.device}", peak, *(text for text in chosen if chosen[text])]))
    return plan, config, prompts, checked


def counts(config: Config) -> tuple[int, int, int]:
    """Most (proposals, attempts that measure, other attempts) of a step."""
    proposals = len(config.kinds) * config.batch
    return proposals, proposals * config.rollouts, len(config.kinds) * config.solve_count


def choose_plan(config: Config, hf_config, card: float) -> memory.Plan:
    """The engine, and the memory that it and the update share; raises ValueError where nothing fits."""
    device, dtype = place(config, bool(card))
    engine = "vllm" if card and config.engine == "auto" else choose_engine(config.engine)
    given = config.memory * GB
    wishes = {
        "card_bytes": (int(card * GB) or given or torch.cuda.mem_get_info()[1]) if device == "cuda" else None,
        "host_bytes": None if card else given if given and device == "cpu" else free_host_bytes(),
        "max_len": config.max_prompt + config.max_response,
        "max_prompt": config.max_prompt,
        "sequences": sum(counts(config)[1:]),
        "width": 4 if dtype == "float32" else 2,
        "token_budget": config.token_budget or None,
        "checkpointing": config.gradient_checkpointing,
        "lora": config.lora,
    }
    try:
        return memory.plan(hf_config, engine=engine, **wishes)
    except ValueError:  # vLLM holds a second copy of the weights
        if config.engine != "auto" or engine != "vllm":
            raise
        found = memory.plan(hf_config, engine="transformers", **wishes)
        print("with vLLM it does not fit: the policy generates by itself, which is slower (--engine transformers)")
        return found


def pace(config: Config, plan: memory.Plan, elsewhere: bool) -> str:
    """How many rollouts a step makes and, for a device whose data sheet is known, about how long it takes."""
    proposals, measuring, solving = counts(config)
    rollouts = proposals + measuring + solving
    name = "" if elsewhere else torch.cuda.get_device_name() if plan.device == "cuda" else "cpu"
    if not (known := next((key for key in DEVICES if key in name), None)):
        return f"up to {rollouts} rollouts each"
    likely = config.max_response // 4  # what models write on average is known only later; a quarter is a guess
    trained = proposals + solving + measuring * config.reuse_measurement_rollouts
    phases = estimate_seconds(plan, known, rollouts, trained, config.max_prompt // 4, likely)
    seconds = sum(phases.values())
    total = f"{seconds * config.steps / 60:.2g} minutes in all"
    return f"up to {rollouts} rollouts each; roughly {seconds:.2g} s a step, {total}, at {likely} tokens a response"


def describe(config: Config, plan: memory.Plan, card: float) -> None:
    """Print the plan in full."""
    dtype = place(config, bool(card))[1]
    proposals, measuring, solving = counts(config)
    print(
        f"engine {plan.engine} | device {plan.device} | {dtype}\n"
        f"a step: {proposals} proposals + up to {measuring} measuring attempts + {solving} solving attempts, of at "
        f"most {config.max_response} tokens\n{plan.describe()}"
    )
    if card:
        needed = f"{plan.host_bytes / GB:.0f} GB beside a card of {card:g} GB"
        print(f"host memory needed: {needed}; {free_host_bytes() / GB:.0f} GB are free on this machine")
    width, kept = (2, 12) if dtype == "bfloat16" else (4, 8)  # bytes of a weight; of masters and two moments beside it
    disk = (plan.parameters * width + plan.trained * kept) / GB
    print(f"a checkpoint, every {config.save_every} steps: {disk:.3g} GB on disk, twice that while the next is written")


def place(config: Config, elsewhere: bool = False) -> tuple[str, str]:
    """(device, compute type) of the policy; `elsewhere`: on a card that is not here."""
    here = "cuda" if elsewhere or torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and here == "cpu":
        raise ValueError("--device cuda: torch sees no GPU here; install a CUDA build of torch or use --device cpu")
    device = here if config.device == "auto" or elsewhere else config.device
    return device, config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"


def free_host_bytes() -> int:
    """Host memory that a new process could get, page cache included; half of all memory where unknown."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return next(int(x.split()[1]) for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable")) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def settle(config: Config, tokenizer) -> Config:
    """The configuration with the template and the tags that "auto" means for this tokenizer. Raises ValueError."""
    config = replace(config, template=choose_template(config, tokenizer))
    return replace(config, tags=",".join(choose_tags(config.tags, tokenizer, config.template)))


def choose_template(config: Config, tokenizer) -> str:
    """What --template auto means here. Raises ValueError where the chat template is wanted and takes no dialogue."""
    named = any(word in Path(config.model).name.lower() for word in ("instruct", "chat"))
    if config.template == "plain" or (config.template == "auto" and not (named and tokenizer.chat_template)):
        return "plain"
    if not tokenizer.chat_template:
        raise ValueError(f"{config.model} has no chat template; use --template plain")
    try:
        wrap(["one", "two", "three"], tokenizer, "chat")
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template of {config.model} fails ({error}); use --template plain") from None
    return "chat"


# ---------------------------------------------------------------------------------------------------------------------
# The start


def start(config: Config, resume: str | None) -> dict:
    """The fields of an azr.Run: everything loaded and checked, and after --resume every state as it was after the last
    finished step. Raises ValueError with one sentence for what the user must change, SyncError where engine and update
    disagree."""
    if sys.platform == "win32":
        raise ValueError("azr needs Linux or macOS: the executor has no way to contain programs on Windows; use WSL")
    executor = Executor()  # first: its servers must start before this process touches the GPU
    plan, used, prompts, checked = prepare(config, fresh=not resume)
    folder, saved = find_folder(config, resume)
    # With adapters a resumed run starts from the base weights: the checkpoint holds the merged ones.
    weights = config.model if config.lora or not saved else str(saved)
    policy, tokenizer, optimizer, engine = load(config, plan, weights)
    step, buffers, watch = restore(folder, saved, config, optimizer)
    if saved:
        engine.sync(policy)
    checked |= rehearse(policy, tokenizer, engine, optimizer.clear, prompts, saved is not None)
    print(f"checked: {', '.join(checked)} ({checked['update']})")
    write_config(folder, config, used, engine.name, executor.layers)
    return {
        "config": used, "folder": folder, "policy": policy, "tokenizer": tokenizer,
        "engine": engine, "optimizer": optimizer, "executor": executor, "plan": plan, "buffers": buffers,
        "watch": watch, "step": step, "saved": step if saved else -1,
    }  # fmt: skip


def find_folder(config: Config, resume: str | None) -> tuple[Path, Path | None]:
    """The run folder, not yet made, and after --resume its newest checkpoint. Raises ValueError for a file, for a
    folder in use and as `checkpoint.find`."""
    folder = Path(config.out or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{Path(config.model).name}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another --out")
    if not resume and folder.exists() and any(item.suffix != ".tmp" for item in folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another --out, or --resume {folder}")
    return folder, checkpoint.find(folder) if resume else None


def restore(folder: Path, saved: Path | None, config: Config, optimizer) -> tuple[int, dict[str, Buffer], Watch]:
    """(step, buffers, watch) as they were after the last finished step, the optimizer's state too; of a run that has no
    checkpoint, nothing: what it logged does not count. Raises as `checkpoint.load`."""
    watch, buffers = Watch(), {name: config.new_buffer(kind) for name, kind in config.buffered.items()}
    if saved is None:
        for log in checkpoint.LOGS:
            (folder / log).unlink(missing_ok=True)
        return 0, buffers, watch
    step = checkpoint.load(folder, optimizer, buffers, config.buffered, config.steps)
    for record in checkpoint.read_log(folder / "metrics.jsonl"):
        watch.remember(record)
    print(f"resumed {folder} after step {step}")
    return step, buffers, watch


def write_config(folder: Path, config: Config, used: Config, engine: str, layers: dict) -> None:
    """RUN/config.json: what was asked for, and what it means here (`used`)."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    about = {"config": asdict(config), "template": used.template, "tags": used.tags, "engine": engine}
    about |= {"sandbox": layers, "versions": versions | {"python": platform.python_version()}}
    checkpoint.write_atomically(folder / "config.json", json.dumps(about, indent=1))


def load(config: Config, plan: memory.Plan, model: str) -> tuple:
    """Policy, tokenizer, optimizer and engine; `model`: the folder or hub name of the weights. Raises ValueError."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what matters of its warnings, `load_policy` says
    transformers.set_seed(config.seed)  # nothing should need it: all draws use `Run.rng`
    policy, tokenizer = load_policy(model, *place(config))
    if config.lora:
        add_adapters(policy, config.lora)
    if plan.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    optimizer = MasterAdamW(policy, weight_decay=config.weight_decay, offload=plan.offload_optimizer)
    try:
        engine = make_engine(
            plan.engine, config.model, policy, tokenizer, max_model_len=config.max_prompt + config.max_response,
            token_budget=plan.generation_budget, max_num_seqs=plan.max_num_seqs, kv_cache_bytes=plan.kv_cache_bytes,
            sleep=plan.sleep,
        )  # fmt: skip
    except RuntimeError as error:  # vLLM was asked for and cannot be had
        if ran_out_of_memory(error):
            raise
        raise ValueError(f"{error}; choose another --engine") from error
    return policy, tokenizer, optimizer, engine


def dry_run(config: Config, card: float = 0.0, weights: bool = False) -> None:
    """Print the plan of a run; with `weights` also check the model (harness/check.py) and print what was checked."""
    plan, _, prompts, checked = prepare(config, card, whole=True)
    if weights:
        policy, tokenizer, optimizer, engine = load(config, plan, config.model)
        checked |= rehearse(policy, tokenizer, engine, optimizer.clear, prompts)
        print("\n".join(f"  {name:<10}{result}" for name, result in checked.items()))


# ---------------------------------------------------------------------------------------------------------------------
# The stop


class SetupError(ValueError):
    """The run cannot go on with this model or these settings."""


@contextlib.contextmanager
def interruptible(run) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block with KeyboardInterrupt, within `uninterrupted` only after the step; the last
    finished step is saved if it was not yet."""

    def note(number: int, frame: object) -> None:
        if not run.status.halfway or run.status.stopping:
            raise KeyboardInterrupt
        run.status.stopping = True
        print("finishing the step before stopping; once more Ctrl-C stops at once and loses it", file=sys.stderr)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        if run.watch.history and not run.status.halfway and run.saved < run.step:
            checkpoint.save(run, "checkpoint")
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def uninterrupted(run) -> Iterator[None]:
    """Hold back Ctrl-C until the block is over; a second one stops at once, and then this step is lost."""
    run.status.halfway = True
    yield
    run.status.halfway = False
    if run.status.stopping:
        raise KeyboardInterrupt


def stop(error: BaseException, run) -> int:
    """Say what stopped a run (None: while it started), in one sentence that says what to change; returns the exit code.
    Raises the error again if it is a fault of this program."""
    again = f"then --resume {run.folder}" if run else "then start again"
    if isinstance(error, KeyboardInterrupt):
        done = "" if run is None else " before the first step" if run.saved < 0 else f" after step {run.saved}"
        print(f"\nstopped{done}" + (f"; continue with: python azr.py --resume {run.folder}" if run else ""))
        return 130
    message = str(error)
    if isinstance(error, RuntimeError) and ran_out_of_memory(error):
        where, lower = "at the start", "--memory, or choose a smaller --model"
        if run:
            lower = f"--token-budget (now {run.config.token_budget})" if run.status.phase == "update" else "--memory"
            where, lower = f"in {run.status.phase}", f"{lower} or --max-response, {again}"
        message = f"out of memory {where} ({first_line(error)}); lower {lower}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"{error}; free some disk space, {again}"
    elif isinstance(error, ValueError | OSError | SyncError):
        if run and run.watch.history and isinstance(error, ValueError) and not isinstance(error, SetupError):
            raise error  # once it has begun, what was typed is in order
    else:
        raise error
    print(f"azr.py: {message}", file=sys.stderr)
    return 2
