"""Acceptance: the judge on gold and bad answers of all cells, the steps of the loop, exact resume, the smoke run.

Everything is real: the embedded model, real subprocesses, the real command line. Each room has a file of its own in
tests/. Run: python -m pytest -q
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import azr
import evaluate
import trr
from azr import Rollout
from buffers import Buffer, Task, save_tasks
from executor import Executor
from harness.config import TINY_MODEL, parse
from harness.start import start
from policy.dialogue import Parts, split_response
from policy.engine import Completion
from prompts import KINDS, load_kinds
from tests.test_run import SMALL, assert_same_run, cli

HERE = Path(__file__).resolve().parent
PROGRAM = "def f(items, k):\n    total = 0\n    for x in items:\n        total = total * k + x\n    return total"


@pytest.fixture(scope="module")
def executor():
    with Executor(lanes=2) as running:
        yield running


def reply(answer: str, think: str = "I think.") -> str:
    return f"{think}\n</think>\n<answer>\n{answer}\n</answer>"


def fence(label: str, content: str) -> str:
    return f"```{label}\n{content}\n```\n"


def numbered(number: int, step: int = 0) -> Task:
    return Task("deduction", f"def f(x):\n    return x + {number}", ["1"], [str(1 + number)], step=step)


# ---------------------------------------------------------------------------------------------------------------------
# The judge: gold answers of all six cells are right, so that a parser's fault can never pass for a model's


def attempt(task: Task, answer: str) -> Rollout:
    return Rollout(
        "solve", task.kind, 1, "", [], task=task, response=reply(answer), parts=split_response(reply(answer))
    )


GOLD = {
    "deduction": (Task("deduction", PROGRAM, ["[1, 2], 3"], ["5"]), fence("output", "5"), fence("output", "6")),
    "abduction": (Task("abduction", PROGRAM, ["[1, 2], 3"], ["5"]), fence("input", "[5], 0"), fence("input", "[6], 0")),
    "induction": (
        Task("induction", PROGRAM, ["[1], 2", "[1, 1], 2", "[3, 1], 2", "[], 9"], ["1", "3", "7", "0"], "m", visible=2),
        fence("python", PROGRAM),
        fence("python", "def f(items, k):\n    return {1: 1, 2: 3}[len(items)]"),
    ),
}


@pytest.fixture(scope="module")
def run(executor, tmp_path_factory):
    """A run on the embedded model that was started but not trained."""
    out = str(tmp_path_factory.mktemp("run") / "r")
    config, _ = parse(["--preset", "tiny", "--batch", "4", "--eval-every", "0", "--out", out])
    started = azr.Run(**start(config, None))
    yield started
    started.executor.close()


@pytest.mark.parametrize("kind", KINDS)
def test_gold_answers_are_right_and_wrong_ones_wrong(run, kind):
    """For induction the wrong program is right on the visible pairs and wrong on one hidden pair: binary reward 0."""
    task, right, wrong = GOLD[kind]
    attempts = [attempt(task, right), attempt(task, wrong), attempt(task, "no fence here ```")]
    azr.verify(run, attempts)
    assert [item.correct for item in attempts] == [True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_gold_proposals_are_valid(run, kind):
    inputs = ["[1, 2], 3", "[4], 1", "[], 2", "[0, 1], 9", "[2, 2], 2", "[7], 7"]
    answer = fence("python", PROGRAM) + fence("input", inputs[0])
    if kind == "induction":
        answer = "".join(fence("input", item) for item in inputs) + fence("message", "Weigh the items.")
    references = [Task("deduction", PROGRAM, [inputs[0]], ["5"], id="x")]
    item = Rollout("propose", kind, 1, "", [], references=references, response=reply(answer))
    item.parts = split_response(item.response)
    azr.validate(run, [item])
    assert item.verdict == "ok" and item.task.outputs[0] == "5" and item.task.references == ["x"]
    assert len(item.task.hidden_inputs) == (run.config.inputs // 2 if kind == "induction" else 0)


@pytest.mark.parametrize(
    "program, verdict",
    [
        ("def f(x):\n    return None", "returns_none"),
        ("import os\ndef f(x):\n    return 1", "unsafe"),
        ("seen = []\ndef f(x):\n    seen.append(1)\n    return len(seen)", "nondeterministic"),
        ("def f(x):\n    raise StopIteration", "runtime_error"),
        ("def f(x):\n    while True:\n        pass", "timeout"),
    ],
)
def test_bad_proposals_are_rejected_with_their_reason(run, program, verdict):
    item = Rollout("propose", "deduction", 1, "", [], response=reply(fence("python", program) + fence("input", "1")))
    item.parts = split_response(item.response)
    azr.validate(run, [item])
    assert item.task is None and item.verdict == verdict


@pytest.mark.parametrize(
    "program, message, verdict",
    [
        (PROGRAM, PROGRAM, "message_has_code"),
        (PROGRAM, PROGRAM.partition(":")[2], "message_has_code"),
        (PROGRAM.replace(":", ":  # weigh", 1), PROGRAM.partition(":")[2], "message_has_code"),
        (PROGRAM, "Weigh the items.", "ok"),
        ("def f(items, k): return len(items) * k", "Count them, k times.", "ok"),
        ("def f(items, k): return len(items) * k", "def f(items, k): return len(items) * k", "message_has_code"),
    ],
)
def test_a_message_that_is_the_program_is_rejected(run, program, message, verdict):
    answer = "".join(fence("input", f"[{n}], 1") for n in range(6)) + fence("message", message)
    item = Rollout("propose", "induction", 1, "", [], references=[numbered(1)], response=reply(answer))
    item.parts = split_response(item.response)
    item.references[0].program = program
    azr.validate(run, [item])
    assert item.verdict == verdict


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance vectors: what the official code gets wrong, and ten attacks on the judge. None of them earns anything

VECTORS = {  # what a program does with 3: verdict of the executor, and its output
    "pure": ("def f(x):\n    return x + 1", "ok", "4"),
    "counter between calls": ("seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)", "nondeterministic", ""),
    "set of strings": ("def f(x):\n    return {'b', 'a'}", "ok", "{'a', 'b'}"),
    "order of a set": ("def f(x):\n    return list({'a', 'b', 'c', 'd', 'e', 'f'})", "nondeterministic", ""),
    "nan": ("def f(x):\n    return float('nan')", "ok", "nan"),
    "instance": ("class A:\n    pass\ndef f(x):\n    return A()", "unserialisable", ""),
    "raises": ("def f(x):\n    raise Exception('bad')", "runtime_error", ""),
    "long output": ("def f(x):\n    return list(range(9999))", "output_too_large", ""),
    "endless": ("def f(x):\n    while True: pass", "timeout", ""),
    "clock": ("import time\ndef f(x):\n    return time.time()", "unsafe", ""),
    "file": ("def f(x):\n    return open('/etc/hostname').read()", "unsafe", ""),
    "word in a string": ("def f(x):\n    return 'input(' + str(x)", "ok", "'input(3'"),
    "helper and class": (
        "class A:\n    n = 2\ndef g(x):\n    return x * A.n\ndef f(x):\n    def h(y): return g(y)\n    return h(x)",
        "ok",
        "6",
    ),
    "patches a module": ("import math\nmath.pi = 3\ndef f(x):\n    return math.pi", "ok", "3"),
    "the next program": ("import math\ndef f(x):\n    return math.pi", "ok", "3.141592653589793"),
}
EQUAL = "class E:\n    def __eq__(self, other): return True\n    def __hash__(self): return 1\n"
ATTACKS = [  # (kind, answer): the gold is 5 for [1, 2], 3; hidden pairs of induction: 7 for [3, 1], 2 and 0 for [], 9
    ("abduction", "1) or (1"),
    ("abduction", "[1, 2], 3) == 5 or True or f([]"),
    ("abduction", "type('E', (), {'__eq__': lambda *a: True})(), 1"),
    ("deduction", "f([1, 2], 3)"),
    ("deduction", "__import__('os').system('true') + 5"),
    ("deduction", "type('E', (), {'__eq__': lambda *a: True})()"),
    ("induction", EQUAL + "def f(items, k):\n    return E()"),
    ("induction", "def f(items, k):\n    if items: return 7\n    raise KeyboardInterrupt"),
    ("induction", "import os\ndef f(items, k):\n    os._exit(0)"),
    ("induction", "def f(items, k):\n    return [g for g in ().__class__.__base__.__subclasses__()][0]"),
]


def test_acceptance_vectors_of_programs(executor):
    found = executor.validate([(program, ["3"]) for program, _, _ in VECTORS.values()])
    for (name, (_, verdict, output)), [result] in zip(VECTORS.items(), found, strict=True):
        assert (result.verdict, result.output) == (verdict, output), name


@pytest.mark.parametrize("kind, answer", ATTACKS)
def test_ten_attacks_on_the_judge_earn_nothing(run, kind, answer):
    label = {"abduction": "input", "deduction": "output", "induction": "python"}[kind]
    attempts = [attempt(GOLD[kind][0], fence(label, answer)), attempt(GOLD[kind][0], GOLD[kind][1])]
    azr.verify(run, attempts)
    assert [item.correct for item in attempts] == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def test_one_prompt_too_long_is_drawn_again_and_the_batch_stays_whole(run):
    run.buffers = {kind: Buffer(100) for kind in KINDS}
    for kind in ("abduction", "deduction"):
        run.buffers[kind].add(Task(kind, "def f(x):\n    return x" + " + 1" * 2000, ["1"], ["2001"]))
        run.buffers[kind].add(numbered(3))
    proposals = [azr.proposal_prompt(run, KINDS["deduction"], random.Random(n), 1) for n in range(8)]
    assert all(0 < len(item.prompt_ids) <= run.config.max_prompt for item in proposals)


def test_a_seed_too_long_for_either_of_its_two_uses_is_left_out(run, tmp_path):
    """`list(range(900))`: the output stands in the abduction prompt, not in the one for deduction."""
    long = Task("deduction", "def f(x):\n    return list(range(x))", ["900"], [str(list(range(900)))], id="long")
    assert azr.fits(run, long, [KINDS["deduction"]]) and not azr.fits(run, long, [KINDS["abduction"]])
    save_tasks(tmp_path / "seeds.jsonl", [long, numbered(3), KINDS["induction"].zero()])
    run.config.seeds = str(tmp_path / "seeds.jsonl")
    azr.seed_buffers(run)
    run.config.seeds = ""
    for kind in ("abduction", "deduction"):
        assert [task.program for task in run.buffers[kind]] == [numbered(3).program]


def test_solve_batch_holds_this_steps_tasks_first(run):
    run.buffers = {kind: Buffer(100) for kind in KINDS}
    for kind in KINDS:
        for number in range(9):
            task = numbered(number)
            run.buffers[kind].add(Task(kind, task.program, task.inputs * 2, task.outputs * 2, "m", visible=1))
    fresh = Task("deduction", "def f(x):\n    return x * 5", ["1"], ["5"], step=1, id="1-deduction-0")
    proposal = Rollout("propose", "deduction", 1, "", [], task=fresh)
    attempts = azr.solve(run, [proposal], 1)
    trained = [item.task.id for item in attempts if item.kind == "deduction"][run.config.rollouts :]
    assert len(trained) == run.config.batch and "1-deduction-0" in trained
    measuring = [item for item in attempts if item.task.id == "1-deduction-0"]
    assert len(measuring) == run.config.rollouts + 1


def judged(kind: str, number: int, program: str, right: list[bool]) -> tuple[Rollout, list[Rollout]]:
    """A valid proposal and its measuring attempts, of which those in `right` were right."""
    task = Task(kind, program, ["2"], ["3"], id=f"1-{kind}-{number}", step=1)
    well, some = Parts("t", "a", True), Completion([1, 2], None, True)
    proposal = Rollout("propose", kind, 1, "", [0], task=task, parts=well, completion=some)
    tried = [Rollout("solve", kind, 1, "", [0], task=task, parts=well, completion=some, correct=one) for one in right]
    return proposal, tried


def test_a_program_that_is_there_already_or_twice_in_a_step_earns_the_bound(run, monkeypatch):
    run.buffers = {kind: Buffer(100) for kind in KINDS}
    run.buffers["deduction"].add(numbered(1))
    programs = [numbered(1).program, numbered(2).program, numbered(2).program]
    found = [judged("deduction", n, program, [True, False, False, False]) for n, program in enumerate(programs)]
    for most, rewards in ((1.0, [0.75, 0.75, 0.75]), (-0.5, [-0.5, 0.75, -0.5])):
        monkeypatch.setattr(run, "config", replace(run.config, duplicate_reward=most, rollouts=4))
        azr.give_rewards(run, [item for item, _ in found], [one for _, tried in found for one in tried], 1)
        assert [item.reward for item, _ in found] == rewards


@pytest.mark.parametrize("baseline", ["cell", "task"])
def test_the_loop_centres_a_solver_on_its_cell_or_on_its_task(run, monkeypatch, baseline):
    """Of two tasks one is solved by 3 of 4, one by 1 of 4: the right attempts at both earn alike only by cell."""
    run.buffers = {kind: Buffer(100) for kind in KINDS}
    options = {"baseline": baseline, "rollouts": 4, "reuse_measurement_rollouts": True}
    monkeypatch.setattr(run, "config", replace(run.config, **options))
    easy = judged("deduction", 1, numbered(1).program, [True, True, True, False])
    hard = judged("deduction", 2, numbered(2).program, [True, False, False, False])
    azr.give_rewards(run, [easy[0], hard[0]], easy[1] + hard[1], 1)
    first, last = easy[1][0].advantage, hard[1][0].advantage
    assert (last > first + 0.1) == (baseline == "task") and first > 0
    assert [item.reward for item in easy[1]] == [1.0, 1.0, 1.0, -0.5]


def test_without_solve_prompts_only_the_measuring_attempts_are_made(run, monkeypatch):
    run.buffers = {kind: Buffer(100) for kind in KINDS}
    for kind in KINDS:
        run.buffers[kind].add(KINDS[kind].zero())
    options = {"solve_prompts": 0, "reuse_measurement_rollouts": True, "rollouts": 3}
    monkeypatch.setattr(run, "config", replace(run.config, **options))
    proposal, _ = judged("deduction", 0, numbered(2).program, [])
    attempts = azr.solve(run, [proposal], 1)
    assert len(attempts) == 3 and all(item.trains and item.task is proposal.task for item in attempts)
    monkeypatch.setattr(run, "config", replace(run.config, solve_prompts=5))
    assert len(azr.solve(run, [], 1)) == 5 * len(KINDS)  # of one task each: it is tried again


def test_shuffled_rewards_keep_each_cells_rewards():
    cells = [("solve", kind) for kind in KINDS for _ in range(9)]
    shuffled = trr.shuffle_within_cells([float(n) for _ in KINDS for n in range(9)], cells, random.Random(0))
    for kind in KINDS:
        rewards = [reward for reward, cell in zip(shuffled, cells, strict=True) if cell == ("solve", kind)]
        assert sorted(rewards) == [float(n) for n in range(9)] and rewards != sorted(rewards)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs (the command line in all its ways: tests/test_run.py)


def test_resume_is_bit_for_bit_the_uninterrupted_run(tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert azr.main([*SMALL, "--steps", "3", "--out", str(whole)]) == 0
    assert azr.main([*SMALL, "--steps", "2", "--out", str(part)]) == 0
    assert azr.main(["--resume", str(part), "--steps", "3"]) == 0
    assert "after step 2" in capsys.readouterr().out
    assert_same_run(whole, part)


def test_smoke_ends_with_one_line(tmp_path):
    result = cli("--smoke", "--out", str(tmp_path / "r"))
    assert result.returncode == 0 and result.stdout.strip().splitlines()[-1].startswith("smoke ok"), result.stderr
    assert "\r" not in result.stdout + result.stderr and "%|" not in result.stderr  # bars are for terminals


# ---------------------------------------------------------------------------------------------------------------------
# The seam: a kind from a file goes through the whole loop and through evaluate.py


@pytest.mark.parametrize("example", ["deduction,examples/fault.py", "examples/rewriting.py"])
def test_a_run_with_the_kinds_of_a_file_trains_two_steps(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes, max_position_embeddings=4096)).save_pretrained(
        tmp_path / "m"
    )
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path / "m")
    kinds = load_kinds(example)
    save_tasks(tmp_path / "seeds.jsonl", [kind.zero() for kind in kinds.values()])
    out, seeds, model = (str(tmp_path / name) for name in ("run", "seeds.jsonl", "m"))
    arguments = ["--model", model, "--tasks", example, "--seeds", seeds, "--out", out, *SMALL, "--steps", "2"]
    arguments += ["--no-reuse-measurement-rollouts", "--max-prompt", "3000", "--max-response", "16", "--lr", "1e-3"]
    assert azr.main(arguments) == 0
    before, after = (load_file(Path(folder, "model.safetensors")) for folder in (model, f"{out}/checkpoint"))
    assert any(not torch.equal(before[name], after[name]) for name in after)
    record = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
    for kind in kinds:
        assert record["step"] == 2 and record[f"solve/{kind}/count"] == 3 and record[f"propose/{kind}/count"] == 3
    assert {path.stem for path in Path(out, "buffers").iterdir()} == set(kinds)
    assert azr.main(["--resume", out, "--steps", "3"]) == 0
    suite = ["--suites", f"tasks:{seeds}", "--tasks", example, "--model", model, "--out", str(tmp_path / "eval")]
    assert evaluate.main([*suite, "--max-tokens", "8", "--engine", "transformers"]) == 0
    assert "score" in capsys.readouterr().out
