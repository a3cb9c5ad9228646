"""The embedded tiny models: their tokenizers know the prompts, their held-out tasks are right, gold answers are judged
right by the real executor in every solver cell, proposals parse, and the skill recipe leaves a frontier to cross."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tiny"))

import make  # noqa: E402
import programs  # noqa: E402

from buffers import load_tasks, program_digest  # noqa: E402
from executor import Executor, canonical, parse_arguments  # noqa: E402
from policy.dialogue import split_response  # noqa: E402
from prompts import KINDS  # noqa: E402

RECIPES = make.RECIPES
TASKS = {
    name: [task for split in ("dev", "test") for task in load_tasks(recipe.folder / f"{split}.jsonl", KINDS)]
    for name, recipe in RECIPES.items()
}
FORBIDDEN = {name: {KINDS[task.kind].solve(task)[-1] for task in tasks} for name, tasks in TASKS.items()}


@pytest.fixture(scope="module")
def executor():
    with Executor() as found:
        yield found


@pytest.mark.parametrize("name", RECIPES)
def test_held_out_tasks_match_neither_corpus_nor_each_other(name):
    recipe, tasks = RECIPES[name], TASKS[name]
    tokenizer = make.PreTrainedTokenizerFast.from_pretrained(recipe.folder / "model")
    make.check(tokenizer, tasks, FORBIDDEN[name], samples=500, recipe=recipe)
    splits = {split: {program_digest(t.program) for t in tasks if t.id.startswith(split)} for split in ("dev", "test")}
    assert splits["dev"] and not splits["dev"] & splits["test"]
    counts = Counter((task.kind, task.depth) for task in tasks)
    assert counts == {(kind, depth): 80 for kind in KINDS for depth in range(1, recipe.held_out + 1)}


def statements(program: str) -> int:
    return program.count("\n") - 1


def test_the_skill_recipe_shows_the_solver_four_statements_and_the_proposer_seven():
    """What lies between them is the frontier: nothing but self-play can teach it."""
    recipe, rng = RECIPES["skill"], random.Random(2)
    tasks = [
        make.solve_example(rng, kind, True, stage[-1], recipe)[0] for stage in recipe.stages for kind in [*KINDS] * 40
    ]
    deepest = max(statements(task.program) for task in tasks)
    proposed = [split_response(make.propose_example(rng, "deduction", recipe)[1]).answer for _ in range(400)]
    drafts = [KINDS["deduction"].parse_proposal(answer, [], programs.N_INPUTS)[0] for answer in proposed]
    depths = Counter(statements(draft.program) for draft in drafts)
    assert deepest == 4 and set(depths) == set(range(1, 8))
    assert 0 < sum(depths[depth] for depth in (5, 6, 7)) < 60  # about 7 of 100
    assert all(reason == 1.0 for _, _, reason, _ in recipe.stages)


def test_gaps_between_positions_keep_their_order_and_their_share():
    torch.manual_seed(0)
    steps = make.with_gaps(torch.Size((8, 400)), 0.15).diff(dim=1)
    assert set(steps.unique().tolist()) == {1, 2, 3, 4, 5}
    assert 0.12 < (steps > 1).float().mean() < 0.18


def test_the_check_notices_a_held_out_prompt_in_the_corpus():
    tokenizer = make.build_tokenizer()
    task = programs.as_task(random.Random(0), "deduction", programs.problem(random.Random(0), "corpus", 1))
    with pytest.raises(AssertionError, match="corpus program is held out"):
        make.check(tokenizer, [task], set(), samples=500)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_model_folder_is_small(recipe):
    assert sum(path.stat().st_size for path in (recipe.folder / "model").iterdir()) <= 8_000_000


def test_outputs_are_canonical_and_inputs_are_literals(executor):
    for task in (task for tasks in TASKS.values() for task in tasks[::10]):
        for result, wanted in zip(executor.run([(task.program, task.inputs)])[0], task.outputs, strict=True):
            assert result.ok and result.output == wanted
        for text in task.inputs:
            (value,), _ = parse_arguments(text)
            assert canonical(value) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reason", [False, True])
def test_gold_responses_are_judged_right_and_changed_ones_wrong(executor, kind, reason):
    rng = random.Random(3)
    for _ in range(20):
        task, response = make.solve_example(rng, kind, reason)
        parts = split_response(response)
        answer = KINDS[kind].parse_answer(parts.answer)
        assert parts.formatted and bool(parts.think) == reason
        assert KINDS[kind].verify(executor, [(task, answer)])[0].correct
        wrong = "def f(x):\n    return [x]" if kind == "induction" else "['no such value']"
        assert not KINDS[kind].verify(executor, [(task, wrong)])[0].correct


@pytest.mark.parametrize("kind", KINDS)
def test_gold_proposals_parse_and_run(executor, kind):
    rng = random.Random(4)
    for _ in range(10):
        prompt, response = make.propose_example(rng, kind)
        parts = split_response(response)
        given = programs.as_task(rng, "deduction", programs.problem(rng, "corpus", 1))
        proposal, cause = KINDS[kind].parse_proposal(parts.answer, [given], programs.N_INPUTS)
        assert parts.formatted and proposal is not None, cause
        assert bool(proposal.message) == (kind == "induction")
        if kind != "induction":
            assert all(result.ok for result in executor.validate([(proposal.program, proposal.inputs)])[0])
