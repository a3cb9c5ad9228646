"""Make the embedded tiny models from nothing: tokenizer, corpus, pre-training, held-out tasks.

What it does: phrases the problems of `programs.py` as the six prompts of `prompts.py` with responses, trains a Llama of
about one million parameters on the responses, and writes the frozen held-out tasks, whose programs and prompts the
corpus never contains.
There are two recipes: one model seldom uses a skill that it has (habit), the other has a frontier to cross (skill).
What it leaves out: any text that is not made here. What the base models were given, and what not: `tiny/README.md`.

    python tiny/make.py                   # all of tiny/, the same for a given torch version, thread count and seed
    python tiny/make.py --recipe skill    # all of tiny/skill/
    python tiny/make.py --check           # only verify both: corpus against held-out tasks, traces, tokenizer
"""

import argparse
import math
import random
import string
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from programs import (
    BIGGEST,
    HIDDEN,
    KEYS,
    N_INPUTS,
    OPS,
    Problem,
    as_task,
    held_out,
    message,
    problem,
    random_value,
    run,
    split_of,
    undo,
)

import prompts
from buffers import Task, load_tasks, program_digest, save_tasks
from policy.dialogue import split_response, wrap
from prompts import KINDS, Induction

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# What the two models differ in


@dataclass(frozen=True)
class Recipe:
    """One model. Of a stage: (steps, peak learning rate, share of solver responses that reason, statements of the
    solver's deepest program)."""

    folder: Path  # of model/, dev.jsonl and test.jsonl
    stages: tuple[tuple[int, float, float, int], ...]
    reach: tuple[float, ...]  # weights of the proposer's programs of 1, 2, ... statements
    held_out: int  # statements of the deepest held-out programs
    rare: bool  # whether some operations are shown seldom (programs.RARE)
    jitter: float  # share of tokens with a gap before their position
    seed: int


# habit: the last stage makes the model answer at once mostly, although it can do better. skill: the solver always
# reasons and is shown programs of up to four statements, the proposer reaches further; gaps between the positions keep
# the model from ending a reasoning by its length alone, so that it can at least begin what it was never shown.
RECIPES = {
    "habit": Recipe(HERE, ((1200, 5e-3, 0.9, 3), (700, 3e-3, 0.9, 4), (60, 1e-3, 0.08, 4)), (3, 4, 3), 5, True, 0.0, 0),
    "skill": Recipe(
        HERE / "skill", ((2000, 5e-3, 1.0, 3), (2400, 3e-3, 1.0, 4)), (8, 8, 6, 4, 1, 0.5, 0.5), 7, False, 0.15, 5
    ),
}
HABIT = RECIPES["habit"]

# ---------------------------------------------------------------------------------------------------------------------
# Responses. With reasoning: one clause per statement. Without: straight to the answer.

REASON = "Step by step: "
START, GOAL, BY = "start ", "goal ", " by "  # induction: the first shown pair, and the statement that is left to find
ANSWER = "</think>\n<answer>\n```{label}\n"
END = "\n```\n</answer>"


def respond(label: str, content: str, clauses: list[str]) -> str:
    think = REASON + "; ".join(clauses) + "\n" if clauses else ""
    return think + ANSWER.format(label=label) + content + END


def solve_example(
    rng: random.Random, kind: str, reason: bool, deepest: int = 3, recipe: Recipe = HABIT
) -> tuple[Task, str]:
    """(task, response) for one solver prompt; the response is right."""
    depth = rng.choice(range(1, deepest + 1))
    while True:
        item = problem(rng, "corpus", depth, N_INPUTS if kind == "induction" else 1, uniform=not recipe.rare)
        task = as_task(rng, kind, item)
        if kind == "abduction":
            values = undo(item.steps, item.outputs[0])
            if values is None:
                continue
            steps = item.steps[::-1]
            clauses = [f"{step.code} <- {value!r}" for step, value in zip(steps, values, strict=True)]
            return task, respond("input", repr(values[-1]), clauses if reason else [])
        states = run(item.steps, item.values[0])
        clauses = [f"{step.code} -> {value!r}" for step, value in zip(item.steps, states, strict=True)]
        if kind == "deduction":
            return task, respond("output", repr(item.outputs[0]), clauses if reason else [])
        clauses.insert(0, f"{START}{item.values[0]!r}")
        if HIDDEN in task.message:  # the value before the unnamed statement and the goal stand side by side
            clauses[-1] = f"{GOAL}{states[-1]!r}{BY}{item.steps[-1].code}"
        return task, respond("python", item.program, clauses if reason else [])


def propose_example(rng: random.Random, kind: str, recipe: Recipe = HABIT) -> tuple[list[str], str]:
    """(prompt turns, response) for one proposer prompt: a program of the corpus split and inputs that run."""
    depths = range(1, len(recipe.reach) + 1)
    depth = rng.choices(depths, recipe.reach)[0]
    if kind == "induction":
        item = problem(rng, "corpus", depth, N_INPUTS + 1)
        if rng.random() < 0.03:  # the identity, which is what self-play starts from
            values = [random_value(rng, "list") for _ in range(N_INPUTS + 1)]
            item = Problem([], KINDS[kind].zero().program, "", values, values)
        inputs = [repr(value) for value in item.values]
        task = Task(kind, item.program, inputs[-1:], [repr(item.outputs[-1])])
        # as many calls as the parser needs; the prompt asks for two more because larger models stop early
        blocks = "".join(Induction.CALL.format(number=n, input=text) for n, text in enumerate(inputs[:-1], 1))
        body = f"{blocks}```message\n{message(rng, item.steps)}".removeprefix("```input 1\n")
        return KINDS[kind].propose([task], N_INPUTS), respond("input 1", body, [])
    item = problem(rng, "corpus", depth)
    references = []
    for _ in range(rng.choice((1, 2, 2, 2))):
        other = problem(rng, "corpus", rng.choices(depths, recipe.reach)[0])
        references.append(KINDS[kind].zero() if rng.random() < 0.1 else as_task(rng, kind, other))
    body = f"{item.program}\n```\n```input\nf({item.values[0]!r})"
    return KINDS[kind].propose(references, N_INPUTS), respond("python", body, [])


# Shares of the six cells in the corpus. How often a solver's response reasons is a matter of the stage.
CELLS = (("propose", "abduction", 0.5), ("propose", "deduction", 0.5), ("propose", "induction", 0.6)) + tuple(
    ("solve", kind, 4 if kind == "induction" else 3) for kind in KINDS
)

INDUCTION_REASONS = 0.2  # least share there: reasoning is worth less, so a habit as rare as the others' is not found


def corpus(rng: random.Random, reason: float, deepest: int, forbidden: set, recipe: Recipe = HABIT) -> Iterator[tuple]:
    """Endless (prompt turns, response) pairs; a share `reason` of the solver's responses reasons first, its programs
    have up to `deepest` statements, and none of the prompts is in `forbidden`."""
    while True:
        role, kind, _ = rng.choices(CELLS, [share for *_, share in CELLS])[0]
        if role == "propose":
            yield propose_example(rng, kind, recipe)
            continue
        share = max(reason, INDUCTION_REASONS) if kind == "induction" else reason
        task, response = solve_example(rng, kind, rng.random() < share, deepest, recipe)
        prompt = KINDS[task.kind].solve(task)
        if prompt[-1] not in forbidden:
            yield prompt, response


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: bytes, plus whole tokens for the fixed text of the prompts, the pieces of the programs and small integers.


def fragments() -> list[str]:
    """Every fixed stretch of text in the prompts of the three kinds, longest first: each becomes a single token."""
    templates = [*prompts.AROUND, prompts.REFERENCE, prompts.REFERENCES, Induction.CALL, prompts.PAIR]
    templates += [turn for turns in (*prompts.PROPOSE.values(), *prompts.SOLVE.values()) for turn in turns]
    pieces = {literal for text in templates for literal, *_ in string.Formatter().parse(text) if literal}
    for inputs in (Induction.LISTS, Induction.TEXTS):
        pieces |= {Induction.CALL.format(number=number, input=text) for number, text in enumerate(inputs, 1)}
    return sorted(pieces | {Induction.PAIRS}, key=len, reverse=True)


def build_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: 2 + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pieces = sorted(fragments()) + [
        "<think>\n",
        REASON,
        END,
        "\n```\n```input\nf(",
        ")" + END,
        ")\n```\n```message\n",
        "def f(x):",
        "\n    x = ",
        "\n    return x",
    ]
    pieces += [f")\n```\n```input {number}\nf(" for number in range(2, N_INPUTS + 1)]
    for label in ("python", "input", "output", "input 1"):
        opening = ANSWER.format(label=label) + "f(" * (label == "input 1")
        pieces += [opening, "\n" + opening]
    for op in OPS:
        pieces += [*op.code.split("{c}"), *op.words.split("{c}")]
    pieces += [START, GOAL, BY, ", then ", HIDDEN, "leave it as it is", "; ", "]; ", "'; ", ", ", "[]"]
    pieces += [arrow + opening for arrow in (" -> ", " <- ") for opening in ("", "[", "'")]
    pieces += [str(number) for number in range(-BIGGEST, BIGGEST + 1)]
    pieces = [piece for piece in dict.fromkeys(pieces) if len(piece) > 1]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<pad>", "<eos>")])
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training: plain next-token loss on the responses.

MODEL = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 512, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS_PER_BATCH = 4096


def batches(examples: Iterator[tuple], tokenizer, steps: int, rng: random.Random) -> Iterator[tuple]:
    """`steps` batches (ids (B, T), response mask (B, T)), rows of similar length together, padded on the right."""
    done = 0
    while done < steps:
        chunk = [next(examples) for _ in range(6000)]
        heads = tokenizer([wrap(prompt, tokenizer) for prompt, _ in chunk])["input_ids"]
        tails = tokenizer([response for _, response in chunk])["input_ids"]
        rows = sorted(
            ((head + tail + [tokenizer.eos_token_id], len(head)) for head, tail in zip(heads, tails, strict=True)),
            key=lambda row: (len(row[0]), row[0]),
        )
        groups, group = [], []
        for row in rows:
            if (len(group) + 1) * len(row[0]) > TOKENS_PER_BATCH:
                groups.append(group)
                group = []
            group.append(row)
        rng.shuffle(groups)  # the last, unfinished group is dropped
        for group in groups[: steps - done]:
            width = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            mask = torch.zeros(len(group), width, dtype=torch.bool)
            for i, (row, start) in enumerate(group):
                ids[i, : len(row)] = torch.tensor(row)
                mask[i, start : len(row)] = True
            yield ids, mask
            done += 1


def with_gaps(shape: torch.Size, jitter: float) -> torch.Tensor:
    """Positions (B, T) of which a share `jitter` leaves out one to four before it."""
    gaps = (torch.rand(shape) < jitter) * torch.randint(1, 5, shape)
    return (gaps + 1).cumsum(1) - 1


def train(
    model, data: Iterator[tuple], steps: int, peak: float, log: Callable[[str], None], jitter: float = 0.0
) -> None:
    """Muon for the matrices, AdamW for the rest, cosine decay after a short warm-up. `jitter`: see `with_gaps`."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(inner, lr=peak, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(outer, lr=peak, weight_decay=0.0, betas=(0.9, 0.98))
    total, tokens = 0.0, 0
    for step, (ids, mask) in enumerate(data, 1):
        factor = min(step / 20, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        positions = with_gaps(ids.shape, jitter) if jitter else None
        hidden = model.model(input_ids=ids, position_ids=positions).last_hidden_state[:, :-1][mask[:, 1:]]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][mask[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        total, tokens = total + loss.item(), tokens + ids.numel()
        if step % 50 == 0 or step == steps:
            log(f"step {step:5d}  loss {total / ((step - 1) % 50 + 1):.3f}  {tokens / 1e6:.2f}M tokens")
            total = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# All of it, and the checks


def check(tokenizer, tasks: list[Task], forbidden: set, samples: int = 3000, recipe: Recipe = HABIT) -> None:
    """Raise AssertionError where the corpus meets a held-out task, a gold answer is wrong, or a text does not survive
    the tokenizer."""
    for text in fragments():
        assert len(tokenizer.encode(text)) == 1, f"not one token: {text[:60]!r}; the prompts changed, make it again"
    programs = {program_digest(task.program) for task in tasks}
    rng = random.Random(-1)
    examples = corpus(rng, 0.5, 4, forbidden, recipe)
    for prompt, response in (pair for pair, _ in zip(examples, range(samples), strict=False)):
        text = wrap(prompt, tokenizer) + response
        assert tokenizer.decode(tokenizer.encode(text)) == text, text
        assert split_response(response).formatted, response
        assert prompt[-1] not in forbidden, prompt[-1]
    used = {KEYS[program] for program in KEYS if split_of(KEYS[program]) == "corpus"}
    assert not used & programs, "a corpus program is held out"
    for task in tasks:
        space: dict = {}
        exec(task.program, space)  # our own text
        outputs = [repr(space["f"](eval(text))) for text in task.inputs]
        assert outputs == task.outputs, task


def make(recipe: Recipe, seed: int) -> None:
    began, cpu = time.perf_counter(), time.process_time()

    def log(text: str) -> None:
        print(f"{text}  {time.perf_counter() - began:.0f} s ({time.process_time() - cpu:.0f} cpu-s)", flush=True)

    splits = {split: held_out(split, seed, recipe.held_out) for split, seed in (("dev", 11), ("test", 13))}
    tasks = [task for split in splits.values() for task in split]
    forbidden = {KINDS[task.kind].solve(task)[-1] for task in tasks}
    tokenizer = build_tokenizer()
    check(tokenizer, tasks, forbidden, recipe=recipe)
    recipe.folder.mkdir(exist_ok=True)
    for split, found in splits.items():
        save_tasks(recipe.folder / f"{split}.jsonl", found)
    log(f"held-out tasks: {', '.join(f'{len(found)} {split}' for split, found in splits.items())}")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **MODEL,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    for number, (steps, peak, reason, deepest) in enumerate(recipe.stages):
        rng = random.Random(seed + 7 * number)
        examples = corpus(rng, reason, deepest, forbidden, recipe)
        train(model, batches(examples, tokenizer, steps, rng), steps, peak, log, recipe.jitter)
    folder = recipe.folder / "model"
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    log(f"wrote {folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make an embedded tiny model and its held-out tasks.")
    parser.add_argument("--recipe", choices=RECIPES, default="habit")
    parser.add_argument("--check", action="store_true", help="verify what is there of both recipes and stop")
    parser.add_argument("--seed", type=int, help="another than the recipe's own")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.check:
        recipe = RECIPES[arguments.recipe]
        make(recipe, recipe.seed if arguments.seed is None else arguments.seed)
        return
    for name, recipe in RECIPES.items():
        tasks = [task for split in ("dev", "test") for task in load_tasks(recipe.folder / f"{split}.jsonl", KINDS)]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.folder / "model")
        check(tokenizer, tasks, {KINDS[task.kind].solve(task)[-1] for task in tasks}, recipe=recipe)
        print(
            f"{name} ok: {len(tasks)} held-out tasks, none of their programs and prompts in the corpus, fragments whole"
        )


if __name__ == "__main__":
    main()
