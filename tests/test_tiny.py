"""The embedded tiny model: its tokenizer knows the prompts, its held-out tasks are right, its gold answers are judged
right by the real executor in every solver cell, and its proposals parse."""

import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tiny"))

import make  # noqa: E402
import programs  # noqa: E402

from buffers import load_tasks, program_digest  # noqa: E402
from executor import Executor, canonical, parse_arguments  # noqa: E402
from policy.dialogue import split_response  # noqa: E402
from prompts import KINDS  # noqa: E402

TASKS = [task for split in ("dev", "test") for task in load_tasks(ROOT / "tiny" / f"{split}.jsonl", KINDS)]
FORBIDDEN = {KINDS[task.kind].solve(task)[-1] for task in TASKS}


@pytest.fixture(scope="module")
def executor():
    with Executor() as found:
        yield found


def test_held_out_tasks_match_neither_corpus_nor_each_other(tmp_path):
    tokenizer = make.PreTrainedTokenizerFast.from_pretrained(ROOT / "tiny" / "model")
    make.check(tokenizer, TASKS, FORBIDDEN, samples=500)
    splits = {split: {program_digest(t.program) for t in TASKS if t.id.startswith(split)} for split in ("dev", "test")}
    assert splits["dev"] and not splits["dev"] & splits["test"]


def test_the_check_notices_a_held_out_prompt_in_the_corpus():
    tokenizer = make.build_tokenizer()
    task = programs.as_task(random.Random(0), "deduction", programs.problem(random.Random(0), "corpus", 1))
    with pytest.raises(AssertionError, match="corpus program is held out"):
        make.check(tokenizer, [task], set(), samples=500)


def test_model_folder_is_small():
    assert sum(path.stat().st_size for path in (ROOT / "tiny" / "model").iterdir()) <= 8_000_000


def test_outputs_are_canonical_and_inputs_are_literals(executor):
    for task in TASKS[::10]:
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
