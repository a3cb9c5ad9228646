"""Every knob of a run, in one place: default, unit, the paper's value, presets, and the command line made from them.

What it does: `Config` is the single source of `python azr.py --help`, of RUN/config.json and of the checks at start.
What it leaves out: knobs nobody needs. Temperature is 1 and no top-p, top-k or penalty exists, because the policy
gradient differentiates the distribution that was sampled.
Paper: Table 3 (hyper-parameters); where paper and official code differ the default is the paper's, but for the mean
of the loss (docs/differences.md).

    config, extra = parse(["--model", "Qwen/Qwen2.5-3B-Coder", "--steps", "100"])
"""

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from buffers import Buffer
from policy.dialogue import Tags, read_tags
from prompts import KINDS, Kind, load_kinds

TINY_MODEL = Path(__file__).resolve().parent.parent / "tiny" / "model"
SKILL_MODEL = TINY_MODEL.parent / "skill" / "model"


def option(default, help: str, paper: str = "", choices: tuple = ()):
    """A field of Config: its default, what it is (with the unit), the paper's value, the allowed values."""
    return field(default=default, metadata={"help": help, "paper": paper, "choices": choices})


LARGEST = 2**31  # no option needs more, and beyond it sums and sizes overflow
ABOVE_ZERO = (
    "steps", "batch", "rollouts", "max_prompt", "max_response", "seed_factor", "seed_limit", "buffer_size", "lr",
    "grad_clip", "minibatches", "save_every",
)  # fmt: skip
MAY_BE_NEGATIVE = ("zero_reward", "duplicate_reward", "solve_prompts")


@dataclass
class Config:
    # What to train, where
    model: str = option("", "Hugging Face folder or hub name; empty: an embedded tiny one")
    preset: str = option("", "named set of defaults for a model size (docs/presets.md); without --model: tiny-skill")
    out: str = option("", "run folder; empty: runs/DATE-MODEL")
    seed: int = option(0, "the one seed from which every random choice follows")
    device: str = option("auto", "where the policy lives", choices=("auto", "cuda", "cpu"))
    engine: str = option("auto", "who generates", choices=("auto", "vllm", "transformers"))
    dtype: str = option("auto", "compute type; auto: bfloat16 on a GPU, float32 on a CPU", "bfloat16",
                        ("auto", "bfloat16", "float32"))  # fmt: skip
    template: str = option("auto", "plain text or the tokenizer's chat template; auto: chat where there is one and the "
                           "model's name says instruct or chat", "plain", ("auto", "plain", "chat"))  # fmt: skip
    tags: str = option("auto", "names of the think and answer tag, e.g. thought,result; auto: the paper's, or others "
                       "in plain text for a tokenizer that has a token for them", "think,answer")  # fmt: skip
    lora: int = option(0, "rank of LoRA adapters (requirements-lora.txt); 0: all weights are trained", "0")
    memory: int = option(0, "GB to plan for on the card (without GPU: of host memory); 0: what is there")
    # The batch
    steps: int = option(500, "training steps", "500")
    batch: int = option(64, "B, proposals and solve prompts per task type and step", "64")
    rollouts: int = option(8, "G, attempts that measure the learnability of each valid proposal", "8")
    references: int = option(6, "K, earlier tasks a proposer is shown; 0: none (ablation)", "6")
    inputs: int = option(10, "N, inputs of an induction task; the first half is shown to the solver", "10")
    tasks: str = option(",".join(KINDS), "task types: names, or files as examples/fault.py (comma)", "all three")
    max_prompt: int = option(6144, "longest prompt in tokens", "6144")
    max_response: int = option(8096, "longest response in tokens", "8096")
    # Seeding and buffers
    seeds: str = option("", "JSONL of seed tasks from an earlier run (RUN/seeds.jsonl)")
    seed_factor: int = option(4, "S, seeds per task type = S x B", "4")
    seed_limit: int = option(40, "give up seeding after this many proposals per wanted seed")
    buffer_size: int = option(16384, "tasks a buffer holds", "16384")
    buffer_drops: str = option("oldest", "what a full buffer loses: its oldest tasks, or whatever is new (ablation)",
                               "newest, in the official code", ("oldest", "newest"))  # fmt: skip
    reference_draw: str = option("uniform", "tasks a proposer is shown: drawn uniformly, or by r(1-r), those at the "
                                 "solver's frontier first", "uniform", ("uniform", "frontier"))  # fmt: skip
    admit: str = option("all", "which valid tasks enter a buffer: all, or only those solved sometimes", "all",
                        ("all", "learnable"))  # fmt: skip
    solve_batch: str = option("new", "solve this step's tasks first, or the previous step's (official code)", "new",
                              ("new", "previous"))  # fmt: skip
    solve_prompts: int = option(-1, "tasks per type and step the solver trains on beside the measuring attempts; 0: "
                                "none, with --reuse-measurement-rollouts; -1: as many as --batch", "B")  # fmt: skip
    # Reward and advantage
    zero_reward: float = option(0.0, "proposer reward when nobody or everybody solves; the official code has -0.5", "0")
    duplicate_reward: float = option(1.0, "most that a proposal earns whose task is in the buffer already, or came "
                                     "before in this step; 1: as much as a new one", "1")  # fmt: skip
    baseline: str = option("cell", "what an advantage is centred on: the mean of its (task type, role) cell, of all "
                           "rollouts, or for the solver of the attempts at the same task", "cell",
                           ("cell", "global", "task"))  # fmt: skip
    advantage_weighting: str = option("sequence", "mean and std of a cell per sequence, or per token (official code)",
                                      "sequence", ("sequence", "token"))  # fmt: skip
    train_proposer: bool = option(True, "train the propose role; off: ablation", "on")
    reuse_measurement_rollouts: bool = option(False, "also train the solver on the G measuring attempts", "off")
    control: str = option("none", "shuffle: rewards permuted within cells; fixed: solve only the seeds, no proposals",
                          choices=("none", "shuffle", "fixed"))  # fmt: skip
    # Update
    lr: float = option(1e-6, "AdamW learning rate", "1e-6")
    warmup: int = option(0, "steps of linear learning-rate warm-up", "0")
    lr_decay: str = option("constant", "learning rate after warm-up", "constant", ("constant", "linear", "cosine"))
    weight_decay: float = option(0.01, "AdamW weight decay", "0.01 in the official code")
    grad_clip: float = option(1.0, "largest gradient norm", "1.0")
    minibatches: int = option(1, "optimizer steps per batch; with one the ratio is 1 and clipping never acts", "1")
    clip_low: float = option(0.2, "ratio clipped below 1 - this", "0.2")
    clip_high: float = option(0.2, "ratio clipped above 1 + this", "0.2")
    loss_mean: str = option("token", "loss averaged over all tokens of the batch, or per sequence first (paper eq. 9)",
                            "sequence; token in the official code", ("token", "sequence"))  # fmt: skip
    entropy_coef: float = option(0.001, "weight of the entropy bonus", "0.001")
    importance_cap: float = option(2.0, "largest importance weight between engine and policy; 0: no correction", "none")
    token_budget: int = option(0, "tokens per micro-batch; 0: from the memory plan")
    gradient_checkpointing: bool = option(False, "recompute activations; the memory plan may switch it on")
    # Saving, evaluation, health
    save_every: int = option(1, "steps between checkpoints: what a kill can lose", "10")
    keep_best: bool = option(False, "keep the checkpoint with the best held-out score as RUN/best")
    eval_every: int = option(0, "steps between evaluations; 0: none")
    eval_suites: str = option("", "suites for --eval-every, e.g. cruxeval-o:100,tasks:FILE")
    eval_data: str = option("data", "folder of the benchmark files")
    eval_max_tokens: int = option(0, "longest evaluation response in tokens; 0: max_response")
    stop_on_collapse: bool = option(False, "stop when the collapse alarm rings")
    log_rollouts: int = option(12, "full texts per step in rollouts.jsonl")

    @property
    def kinds(self) -> dict[str, Kind]:
        """The task types of --tasks; raises ValueError for one that cannot be loaded."""
        return load_kinds(self.tasks)

    @property
    def solve_count(self) -> int:
        """Tasks per type and step that the solver trains on besides the measuring attempts."""
        return self.batch if self.solve_prompts < 0 else self.solve_prompts

    def new_buffer(self, kind: Kind) -> Buffer:
        """An empty buffer as these options want it."""
        return Buffer(self.buffer_size, kind.key, self.buffer_drops, self.reference_draw)

    @property
    def tag_names(self) -> Tags:
        """Think and answer tag; raises ValueError for what names no two."""
        return read_tags(self.tags)

    @property
    def buffered(self) -> dict[str, Kind]:
        """The kinds that have a buffer: those that are trained, and those whose tasks their proposers are shown."""
        more = [name for kind in self.kinds.values() for name in kind.sources if name not in self.kinds]
        return load_kinds(",".join([*more, self.tasks]))  # in the order of seeding: sources before those they serve

    @property
    def objective(self) -> dict[str, float | None]:
        """The options of `trr.objective`."""
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return clip | {"entropy_coef": self.entropy_coef, "tis_cap": self.importance_cap or None}

    def validate(self) -> None:
        """Raise ValueError with one sentence that names the flag to change."""
        for item in fields(self):
            name, value, choices = flag(item.name), getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(map(repr, choices))}")
            if item.name in ABOVE_ZERO and value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")
            if isinstance(value, int | float) and value < 0 and item.name not in MAY_BE_NEGATIVE:
                raise ValueError(f"{name} must not be negative, but is {value}")
            if isinstance(value, int | float) and not abs(value) < LARGEST:  # nan, too
                raise ValueError(f"{name} must be a number below {LARGEST}, not {value}")
        _ = self.buffered, self.tag_names  # they raise for what cannot be meant
        if not 2 <= self.inputs <= 10:
            raise ValueError("--inputs must be 2 (one pair shown, one hidden) to 10 (the prompt demonstrates no more)")
        if self.buffer_size < self.batch * self.seed_factor:
            raise ValueError("--buffer-size is smaller than the seeds (batch x seed-factor); raise it")
        if not self.solve_count and (self.control == "fixed" or not self.reuse_measurement_rollouts):
            raise ValueError("--solve-prompts 0 leaves the solver nothing to train on; raise it, or use "
                             "--reuse-measurement-rollouts without --control fixed")  # fmt: skip
        if self.baseline == "task" and not self.reuse_measurement_rollouts:
            raise ValueError("--baseline task needs --reuse-measurement-rollouts: a task tried once is its own mean")
        if self.eval_every and not self.eval_suites:
            raise ValueError("--eval-every needs --eval-suites, for example --eval-suites cruxeval-o:100")


# What a preset changes against the defaults above. The lengths of the paper need hours a step on a small card; the
# presets shorten them to what models of that size write.
SMALL = {"max_prompt": 2048, "max_response": 1024, "references": 3, "lr": 2e-6}
TINY = {
    "batch": 16, "references": 2, "inputs": 4, "lr_decay": "linear", "warmup": 5, "weight_decay": 0.0,
    "entropy_coef": 0.0, "reuse_measurement_rollouts": True, "engine": "transformers",
}  # fmt: skip
PRESETS: dict[str, dict] = {
    "tiny": {
        **TINY, "model": str(TINY_MODEL), "steps": 40, "max_prompt": 448, "max_response": 128, "lr": 3e-4,
        "eval_every": 10, "eval_suites": f"tasks:{TINY_MODEL.parent / 'test.jsonl'}:300",
    },
    "tiny-skill": {
        **TINY, "model": str(SKILL_MODEL), "steps": 60, "max_prompt": 640, "max_response": 160, "lr": 2e-4,
        "solve_prompts": 0, "baseline": "task", "reference_draw": "frontier", "duplicate_reward": -0.5,
        "eval_every": 20, "eval_suites": f"tasks:{SKILL_MODEL.parent / 'test.jsonl'}:315",
    },
    "0.5b": {**SMALL, "batch": 32, "inputs": 4, "seed_factor": 2},
    "1.5b": {**SMALL, "batch": 32, "max_prompt": 3072, "max_response": 1536},
    "3b": {"max_prompt": 4096, "max_response": 2048, "save_every": 10},
    "7b": {"max_prompt": 4096, "max_response": 2048, "save_every": 10},
    "paper": {"save_every": 10},
}  # fmt: skip
SMOKE = {"steps": 2, "batch": 4, "rollouts": 2, "seed_factor": 1, "eval_every": 0, "eval_suites": "", "inputs": 4}


# With --resume: how long, how often saved, where the data are, and what makes it fit where memory ran out.
CHANGEABLE = "steps save_every eval_data memory token_budget gradient_checkpointing max_response"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Command line to (Config, the few flags that are not configuration: resume, dry_run, verbose, card, smoke).

    Order: defaults, then the preset, then what was typed. Raises ValueError with one sentence on a wrong value;
    argparse itself exits with code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(prog="azr.py", description="Absolute Zero Reasoner: self-play on one GPU.")
    add = parser.add_argument
    add("--resume", metavar="RUN", help=f"continue the run in this folder; of its options may change: {CHANGEABLE}")
    add("--dry-run", action="store_true", help="print the plan (engine, rollouts, memory, time) and stop")
    add("--verbose", action="store_true", help="with --dry-run: load the model, check it, and print what was checked")
    add("--card", type=float, default=0.0, metavar="GB", help="with --dry-run: plan for a card that is not here")
    add("--smoke", action="store_true", help="two small steps on the embedded model, under a minute")
    for item in fields(Config):
        paper = f" [paper: {item.metadata['paper']}]" if item.metadata["paper"] else ""
        settings = {"help": f"{item.metadata['help']}{paper} (default: {item.default!r})".replace("%", "%%")}
        if isinstance(item.default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": type(item.default), "metavar": item.name.upper()}
        add(flag(item.name), default=argparse.SUPPRESS, dest=item.name, **settings)
    typed = vars(parser.parse_args(argv))
    extra = argparse.Namespace(**{name: typed.pop(name) for name in ("resume", "dry_run", "verbose", "card", "smoke")})
    if extra.verbose and (extra.card or not extra.dry_run):
        raise ValueError("--verbose is for --dry-run, and without --card: it loads the model")
    if extra.card and not (extra.dry_run and 0 < extra.card < LARGEST):
        raise ValueError(f"--card {extra.card:g} is for --dry-run and in GB; --memory plans for a part of the one here")
    if extra.resume is not None:
        return resumed(Path(extra.resume), typed), extra
    typed["model"] = typed.get("model") or PRESETS.get(typed.get("preset"), {}).get("model", str(SKILL_MODEL))
    embedded = {values["model"]: name for name, values in PRESETS.items() if "model" in values}
    preset = typed.get("preset") or embedded.get(str(Path(typed["model"]).resolve()), "")
    if preset and preset not in PRESETS:
        base, known = preset.removesuffix("-instruct"), f"choose one of {', '.join(PRESETS)}"
        instead = f"use --preset {base}, --template auto does the rest" if base in PRESETS else known
        raise ValueError(f"--preset {preset!r} is unknown; {instead}")
    config = Config(**PRESETS.get(preset, {}) | (SMOKE if extra.smoke else {}) | typed | {"preset": preset})
    config.validate()
    for name in ("eval_suites", "keep_best"):
        if typed.get(name) and not (config.eval_every or extra.smoke or "eval_every" in typed):
            raise ValueError(f"{flag(name)} needs --eval-every, say --eval-every 10")
    return config, extra


def resumed(run_dir: Path, typed: dict) -> Config:
    """The configuration of an earlier run. What else than `CHANGEABLE` may not change: it would be another run."""
    path = run_dir / "config.json"
    if not path.exists():
        raise ValueError(f"{run_dir} is not a run folder: it has no config.json; give the folder of an earlier run")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["config"]
        config = Config(**{item.name: saved[item.name] for item in fields(Config) if item.name in saved})
        for item in fields(Config):
            if type(value := getattr(config, item.name)) is not type(item.default):
                raise TypeError(f"{item.name} is {value!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or start a new run") from None
    for name, value in typed.items():
        if name not in (*CHANGEABLE.split(), "out") and value != getattr(config, name):
            changed = f"{flag(name)} {value!r} differs from {getattr(config, name)!r} in {path}"
            raise ValueError(f"{changed}; start a new run, or resume without the flag")
        setattr(config, name, value)
    config.out = str(run_dir)
    config.validate()
    return config


def presets_table() -> str:
    """docs/presets.md: what each preset changes, beside the default and the paper's value."""
    names = sorted(PRESETS, key=lambda name: "model" in PRESETS[name])  # the embedded models' come last
    lines = [f"| option | default | paper | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
    for item in fields(Config):
        if any(item.name in PRESETS[name] for name in names):
            values = [str(PRESETS[name].get(item.name, "")).replace(str(TINY_MODEL.parent), "tiny") for name in names]
            paper = item.metadata["paper"] or "-"
            lines.append(f"| `{flag(item.name)}` | {item.default} | {paper} | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(presets_table())
