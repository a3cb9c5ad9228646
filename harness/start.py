"""A run and its parts: the record of one sampled response, the state a step needs, and how both come to life.

What it does: `Rollout` is one response from prompt to advantage; `Run` holds policy, engine, optimizer, executor and
buffers; `describe` prints what a run will do; `start` loads it all, after --resume with every state of the last step.
What it leaves out: the algorithm (azr.py) and what is written down (report.py). It stands apart because both need it.

    config, extra = config.parse(["--model", "PATH"]); run = start(config, resume=None)
"""

import contextlib
import json
import os
import platform
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import prompts
from buffers import KINDS, Buffer, Task
from executor import Executor
from harness import checkpoint
from harness import metrics as health
from harness.config import Config
from policy import memory
from policy.engine import Completion, Engine
from policy.load import choose_engine, load_config, load_policy, make_engine
from policy.logprobs import ran_out_of_memory
from policy.optimizer import MasterAdamW
from policy.speed import DEVICES, estimate_seconds


@dataclass
class Rollout:
    """One sampled response in one of the six (task, role) cells, from prompt to advantage."""

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
    parts: prompts.Parts | None = None
    verdict: str = ""  # "ok", an executor verdict, or why the proposal could not be parsed
    correct: bool = False
    solve_rate: float | None = None  # propose: r, the mean over G attempts
    admitted: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    entropy: float | None = None

    @property
    def reference_programs(self) -> list[str]:
        return [task.program for task in self.references]


@dataclass
class Run:
    """Everything a step needs. `step` is the last finished one; all randomness follows from (seed, step, purpose)."""

    config: Config
    folder: Path
    policy: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    engine: Engine
    optimizer: MasterAdamW
    executor: Executor
    plan: memory.Plan
    buffers: dict[str, Buffer]
    step: int = 0
    saved: int = -1  # the step of the newest checkpoint
    halfway: bool = False  # the policy may be in the middle of an update: not a state to save
    phase: str = ""  # the one that runs now
    seconds: Counter = field(default_factory=Counter)  # per phase of the current step
    peak: int = 0  # most bytes held so far, to set beside the plan's peak
    history: list[dict] = field(default_factory=list)  # records of metrics.jsonl: step 0 and those with an evaluation
    watch: health.Watch = field(default_factory=health.Watch)  # has read all of them
    board: object = None  # the TensorBoard writer, once there is something to write

    def rng(self, step: int, purpose: str) -> random.Random:
        return random.Random(f"{self.config.seed}/{step}/{purpose}")

    def remember(self, record: dict) -> list[str]:
        """Take in the next record of metrics.jsonl; returns the alarms that ring at it. Kept are only the records that
        the closing table needs: all of them are about 15 kB a step, which a long run would feel."""
        if record["step"] == 0 or "score" in record:
            self.history.append(record)
        return self.watch.read(record)


def make_rollout(run: Run, role: str, kind: str, step: int, text: str, **more) -> Rollout:
    prompt = prompts.wrap(text, run.tokenizer, run.config.template)
    return Rollout(role, kind, step, prompt, run.tokenizer.encode(prompt, add_special_tokens=False), **more)


@contextlib.contextmanager
def phase(run: Run, name: str, total: int) -> Iterator[tqdm]:
    """A progress bar for one phase of a step; its seconds and what it held of the memory go into the step's record."""
    began, run.phase = time.perf_counter(), name
    with tqdm(total=total, desc=f"step {run.step + 1} {name}", leave=False, disable=None) as bar:
        yield bar
    run.seconds[name] += time.perf_counter() - began
    run.peak = max(run.peak, held_bytes(run.policy.device.type))


@contextlib.contextmanager
def uninterrupted(run: Run) -> Iterator[None]:
    """Hold back Ctrl-C until the block is over; a second one stops at once, and then this step is lost."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt
        print("finishing the step before stopping; once more Ctrl-C stops at once and loses it", file=sys.stderr)

    previous, run.halfway = signal.signal(signal.SIGINT, note), True
    try:
        yield
        run.halfway = False
    finally:
        signal.signal(signal.SIGINT, previous)
    if caught:
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------------
# Start


def describe(config: Config) -> memory.Plan:
    """Print which engine, device and type a run uses, how many rollouts a step makes, and what memory and time to
    expect. Returns the memory plan. Raises ValueError for a model that cannot be had or does not fit."""
    device, dtype = place(config)
    engine, hf_config = choose_engine(config.engine), load_config(config.model)
    given = config.memory * memory.GB
    card = (given or torch.cuda.mem_get_info()[1]) if device == "cuda" else None
    host = given if given and device == "cpu" else free_host_bytes()
    cells = len(config.kinds) * config.batch
    plan = memory.plan(
        hf_config,
        card_bytes=card,
        host_bytes=host,
        max_len=config.max_prompt + config.max_response,
        sequences=cells * (config.rollouts + 1),
        engine=engine,
        width=4 if dtype == "float32" else 2,
        max_prompt=config.max_prompt,
        token_budget=config.token_budget or None,
        checkpointing=config.gradient_checkpointing,
    )
    print(
        f"model {config.model} | engine {engine} | device {device} | {dtype}\n"
        f"a step: {cells} proposals + up to {cells * config.rollouts} measuring attempts + {cells} solving attempts = "
        f"{cells * (config.rollouts + 2)} rollouts of at most {config.max_response} tokens"
    )
    print(plan.describe())
    disk = plan.parameters * (14 if dtype == "bfloat16" else 12) / memory.GB  # weights, masters, two moments
    print(f"a checkpoint, every {config.save_every} steps: {disk:.3g} GB on disk, twice that while the next is written")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    known = next((key for key in DEVICES if key in name), None)
    if known:
        length = config.max_response // 4  # what models write on average is known only later; a quarter is a guess
        seconds = estimate_seconds(
            hf_config,
            plan,
            known,
            sequences=cells * (config.rollouts + 2),
            trained=cells * (2 + config.rollouts * config.reuse_measurement_rollouts),
            prompt=config.max_prompt // 4,
            response=length,
        )
        print(f"rough estimate at {length} tokens a response: {sum(seconds.values()):.0f} s a step on {known}")
    return plan


def free_host_bytes() -> int:
    """Host memory that a new process could get, page cache included; half of all memory where unknown."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return next(int(x.split()[1]) for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable")) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


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


def place(config: Config) -> tuple[str, str]:
    """(device, compute type) of the policy."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; install a CUDA build of torch or use --device cpu")
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return device, dtype


def try_chat_template(model: str, tokenizer) -> None:
    """Raise ValueError where a tokenizer has no chat template that takes a dialogue."""
    from jinja2 import TemplateError  # torch requires it; transformers renders templates with it

    if not tokenizer.chat_template:
        raise ValueError(f"{model} has no chat template; use --template plain")
    try:
        prompts.wrap(["one", "two", "three"], tokenizer, "chat")
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template of {model} fails ({error}); use --template plain") from None


def start(config: Config, resume: str | None) -> Run:
    """Load everything, and after --resume bring every state back to the last finished step."""
    if sys.platform == "win32":
        raise ValueError("azr needs Linux or macOS: the executor has no way to contain programs on Windows; use WSL")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what matters of its warnings, `load_policy` says
    transformers.set_seed(config.seed)  # for dropout, where a model has it; all other draws use `Run.rng`
    executor = Executor()  # first: its servers must start before this process touches the GPU
    device, dtype = place(config)
    plan = describe(config)
    folder = Path(config.out or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{Path(config.model).name}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another --out")
    if not resume and folder.exists() and any(item.suffix != ".tmp" for item in folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another --out, or --resume {folder}")
    saved = checkpoint.find(folder) if resume else None
    policy, tokenizer = load_policy(str(saved or config.model), device, dtype)
    if config.template == "chat":
        try_chat_template(config.model, tokenizer)
    if plan.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    optimizer = MasterAdamW(policy, weight_decay=config.weight_decay, offload=plan.offload_optimizer)
    try:
        engine = make_engine(
            plan.engine,
            config.model,
            policy,
            tokenizer,
            max_model_len=config.max_prompt + config.max_response,
            max_num_seqs=plan.max_num_seqs,
            kv_cache_bytes=plan.kv_cache_bytes,
            sleep=plan.sleep,
            token_budget=plan.generation_budget,
        )
    except RuntimeError as error:  # vLLM was asked for and cannot be had
        if ran_out_of_memory(error):
            raise
        raise ValueError(f"{error}; choose another --engine") from error
    run = Run(config, folder, policy, tokenizer, engine, optimizer, executor, plan, {k: Buffer(1) for k in KINDS})
    if resume and not saved:  # stopped before the first checkpoint: nothing in the logs counts
        for log in checkpoint.LOGS:
            (folder / log).unlink(missing_ok=True)
    if saved:
        run.step, run.buffers = checkpoint.load(folder, optimizer, config.buffer_size, config.steps)
        run.saved = run.step
        for record in checkpoint.read_log(folder / "metrics.jsonl"):
            run.remember(record)
        engine.sync(policy)
        print(f"resumed {folder} after step {run.step}")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    about = {"config": asdict(config), "versions": versions, "sandbox": executor.layers, "engine": engine.name}
    checkpoint.write_atomically(folder / "config.json", json.dumps(about, indent=1))
    return run
