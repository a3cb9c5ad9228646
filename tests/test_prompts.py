"""Tests of the task types: prompts and parsers are each other's inverse, and one contract that every kind keeps."""

import random
import time
from functools import partial
from pathlib import Path

import pytest

import prompts
from buffers import Task
from executor import ALLOWED_MODULES, Executor
from policy.dialogue import TAGS, Tags, arguments, split_response
from prompts import KINDS, Deduction, Draft, Kind, load_kinds
from suites.extract import extract_assert, extract_code, extract_math

PROGRAM = "def f(items, k):\n    total = 0\n    for x in items:\n        total = total * k + x\n    return total"
GIVEN = [Task("deduction", PROGRAM, ["[1, 2], 3"], ["5"])]


@pytest.fixture(scope="module")
def executor():
    with Executor(lanes=2) as running:
        yield running


def parse(kind: str, answer: str):
    return KINDS[kind].parse_proposal(answer, GIVEN, 10)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and parsers


def reply(answer: str, think: str = "I think.") -> str:
    return f"{think}\n</think>\n<answer>\n{answer}\n</answer>"


def fence(label: str, content: str) -> str:
    return f"```{label}\n{content}\n```\n"


def random_text(rng: random.Random) -> str:
    return (
        "".join(rng.choice("abc xyz'\"[](){}<>/=+\\\n\té\U0001f600") for _ in range(rng.randrange(1, 40))).strip()
        or "x"
    )


def test_proposals_parse_back():
    """parse_proposal undoes propose_prompt's format, whatever the program and the inputs look like."""
    rng = random.Random(0)
    for _ in range(300):
        program = f"import math\n\ndef f(x):\n    y = {random_text(rng)!r}\n    return (x, y)"
        text = repr(random_text(rng))
        parts = split_response(reply(fence("python", program) + fence("input", text)))
        proposal, cause = parse("abduction", parts.answer)
        assert (proposal.program, proposal.inputs, cause) == (program, [text], "")
        inputs = [repr((number, random_text(rng))) for number in range(6)]
        answer = "".join(fence("input", item) for item in inputs) + fence("message", "Add them\nup.")
        proposal, cause = KINDS["induction"].parse_proposal(split_response(reply(answer)).answer, GIVEN, 6)
        assert (proposal.inputs, proposal.message, cause) == (inputs, "Add them\nup.", "")


def test_answers_parse_back():
    rng = random.Random(1)
    for _ in range(300):
        value = repr([random_text(rng), rng.random(), None])
        for kind, label in (("deduction", "output"), ("abduction", "input")):
            assert KINDS[kind].parse_answer(split_response(reply(fence(label, value))).answer) == value
        assert KINDS["induction"].parse_answer(split_response(reply(fence("python", PROGRAM))).answer) == PROGRAM


def test_every_prompt_shows_its_own_format():
    """The example reply inside each prompt is parsed by the parser of that prompt: they cannot drift apart."""
    for kind in KINDS:
        for demonstration in KINDS[kind].propose([KINDS["deduction"].zero()], 6)[1::2]:
            shown = split_response(demonstration, prefilled=False)
            assert shown.formatted
            proposal, _ = KINDS[kind].parse_proposal(shown.answer, GIVEN, 6)
            assert proposal and not any(text.startswith("f(") for text in proposal.inputs)
        prompt = "".join(KINDS[kind].solve(KINDS[kind].zero()))
        shown = split_response(prompt[prompt.rindex("<think>") :], prefilled=False)
        assert shown.formatted and KINDS[kind].parse_answer(shown.answer)


def test_prompts_hide_what_must_be_found():
    task = Task("deduction", PROGRAM, ["[77, 5], 3"], ["98765"])
    text = "".join(KINDS[task.kind].solve(task))
    assert "98765" not in text and "[77, 5]" in text
    task.kind = "abduction"
    text = "".join(KINDS[task.kind].solve(task))
    assert "[77, 5]" not in text and "98765" in text
    task = Task("induction", PROGRAM, ["[1], 2", "[111], 2"], ["1", "111"], "hint", visible=1)
    text = KINDS[task.kind].solve(task)[-1]
    assert "111" not in text and "total" not in text and "hint" in text


def test_prompts_promise_only_allowed_modules():
    assert set(prompts.MODULES.split(", ")) <= set(ALLOWED_MODULES)


@pytest.mark.parametrize(
    "response, formatted",
    [
        ("a</think><answer>b</answer>", True),
        ("a</think> \n <answer>b</answer> trailing text", True),
        ("a</think> text between <answer>b</answer>", False),
        ("a <answer>b</answer>", False),
        ("a</think><answer>b", False),
    ],
)
def test_response_format(response, formatted):
    assert split_response(response).formatted is formatted


def test_text_before_the_think_tag_fails_the_format():
    assert not split_response("hm <think>a</think><answer>b</answer>", prefilled=False).formatted


def test_of_two_answers_the_one_that_makes_the_format_is_read():
    assert split_response("t</think><answer>1</answer><answer>2</answer>").answer == "1"


def test_input_block_before_the_code_block_is_accepted():
    proposal, _ = parse("deduction", fence("input", "[1], 2") + fence("python", PROGRAM))
    assert proposal.program == PROGRAM and proposal.inputs == ["[1], 2"]


def test_draft_code_block_then_final_one_takes_the_last_that_defines_f():
    answer = fence("python", "def f(x):\n    draft") + fence("python", PROGRAM) + fence("python", "print(f([1], 2))")
    assert parse("deduction", answer + fence("input", "[1], 2"))[0].program == PROGRAM


def test_other_function_name_becomes_f(executor):
    answer = fence("python", "def helper(x):\n    return x + 1\n\ndef main(x):\n    return helper(x)") + fence(
        "input", "1"
    )
    program = parse("deduction", answer)[0].program
    assert executor.validate([(program, ["1"])])[0][0].output == "2"


@pytest.mark.parametrize(
    "text, expected",
    [("f([1], 2)", "[1], 2"), (" [1], 2\n", "[1], 2"), ("f('a)(b')", "'a)(b'"), ("f()", ""), ("g(1)", "g(1)")],
)
def test_an_input_block_may_hold_the_whole_call(text, expected):
    assert arguments(text) == expected


def test_a_call_with_something_around_it_is_no_input(executor):
    for text in ("f(1), f(2)", "f(1) or (2)", "f(1) + f(2)", "f(1) + 2", "f(f(1))", "x = f(1)", "f(1)\nf(2)"):
        answer = KINDS["abduction"].parse_answer(fence("input", text))
        assert not executor.validate([("def f(*x):\n    return x", [answer])])[0][0].ok
        assert not executor.verify([("def f(*x):\n    return 1", [answer], ["1"])])[0].correct


@pytest.mark.parametrize(
    "kind, answer, cause",
    [
        ("deduction", "", "no_answer"),
        ("deduction", fence("input", "1"), "no_program"),
        ("abduction", fence("python", PROGRAM), "no_input"),
        ("induction", fence("input", "1") * 6 + fence("message", "m"), "too_few_inputs"),
        (
            "induction",
            "".join(fence("input", text) for text in ("[1]", "[ 1]", "[1,]", "'a'", '"a"', "0"))
            + fence("message", "m"),
            "too_few_inputs",
        ),
        ("induction", "".join(fence("input", str(n)) for n in range(6)), "no_message"),
    ],
)
def test_unusable_proposals_name_their_cause(kind, answer, cause):
    assert KINDS[kind].parse_proposal(answer, GIVEN, 6) == (None, cause)


input_of, output_of = partial(extract_assert, side="input"), partial(extract_assert, side="output")


def test_parsers_survive_100_000_mutated_responses():
    rng = random.Random(2)
    pieces = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "```",
        "```python\n",
        "```input\n",
        "\n",
        "def f(x):",
        "'",
        "\0",
    ]
    pieces += [
        "```output\n",
        "```message\n",
        "1, 2",
        "\ud800",
        "é",
        "f(",
        ")",
        "<",
        ">",
        " ",
        "    return x",
        "class A:",
        "\r\n",
        "\ufeff",
        "~~~",
        "````",
        "[ANSWER]",
        "assert f(1) == ",
        '"',
        "np.int64(",
        "#",
        "\\",
    ]
    base = reply(fence("python", PROGRAM) + fence("input", "[1, 2], 3"))
    for number in range(100_000):
        cut, end = rng.randrange(len(base)), rng.randrange(len(base))
        text = base[:cut] + "".join(rng.choices(pieces, k=rng.randrange(6))) + base[end:]
        parts = split_response(text, number % 2 == 0, [TAGS, Tags("python", "input")][number % 5 == 0])
        kind = list(KINDS)[number % 3]
        KINDS[kind].parse_proposal(parts.answer or text, GIVEN, 2)
        KINDS[kind].parse_answer(parts.answer or text)
        [extract_code, extract_math, input_of, output_of][number // 3 % 4](text)


def test_reading_a_response_takes_time_in_proportion_to_its_length():
    pieces = ["</think><answer>", "<answer>", "</answer>", "<think>", "</think>\n", "'", '"', "f(", ")", "```", "``` x"]
    pieces += [
        "\n```\n",
        "~~~\n",
        "</answer><think>",
        "\ufeff'",
        "\\'",
        "f(')",
        "' ",
        "[ANSWER]",
        "assert f(1)\n",
        "``",
        "\n\n",
        " \n",
        "\\boxed{",
        "**a ",
        "\\[",
        "#",
    ]
    for piece in [*pieces, *(f"{piece} " for piece in pieces)]:
        text, began = "f(</think>\n<answer>" + piece * (20_000 // len(piece)), time.process_time()
        answer = split_response(text).answer or text
        for part in (answer, text[len("f(</think>\n<answer>") :]):
            for read in (
                input_of,
                output_of,
                extract_code,
                extract_math,
                *(kind.parse_answer for kind in KINDS.values()),
            ):
                read(part)
        assert time.process_time() - began < 1, piece


# ---------------------------------------------------------------------------------------------------------------------
# The contract: what holds for every kind, those of examples/ too

EXAMPLES = sorted(map(str, (Path(__file__).resolve().parent.parent / "examples").glob("*.py")))
EVERY = KINDS | load_kinds(",".join(path for path in EXAMPLES if "KIND = " in Path(path).read_text()))
REFERENCE = Task("deduction", "def f(*x):\n    return [x]", ["1"], ["[(1,)]"], id="given")


def made_into_task(kind: Kind, executor: Executor, draft: Draft) -> Task:
    [results] = kind.run(executor, [draft])
    assert kind.check(draft, results) == "ok"
    outputs = [kind.output(result) for result in results]
    return Task(kind.name, draft.program, draft.inputs, outputs, draft.message, max(1, len(draft.inputs) // 2))


@pytest.fixture(scope="module")
def tasks(executor) -> dict[str, list[Task]]:
    """The tasks that the demonstrations of each propose prompt describe."""
    found = {}
    for name, kind in EVERY.items():
        turns = kind.propose([REFERENCE], 4)
        answers = [split_response(turn, prefilled=False) for turn in turns[1::2]]
        assert answers and all(answer.formatted for answer in answers)
        drafts = [kind.parse_proposal(answer.answer, [REFERENCE], 4)[0] for answer in answers]
        found[name] = [made_into_task(kind, executor, draft) for draft in drafts]
    return found


@pytest.mark.parametrize("name", EVERY)
def test_the_zero_task_is_a_task(name, executor):
    kind = EVERY[name]
    zero = kind.zero()
    again = made_into_task(kind, executor, Draft(zero.program, zero.inputs, zero.message))
    assert (again.outputs, again.kind, again.visible) == (zero.outputs, name, zero.visible)
    kind.inspect(zero)


@pytest.mark.parametrize("name", EVERY)
def test_gold_is_right_and_another_tasks_gold_is_wrong(name, executor, tasks):
    kind = EVERY[name]
    first, other = kind.zero(), tasks[name][0]
    answers = {task.program: kind.parse_answer(kind.gold(task)) for task in (first, other)}
    pairs = [(task, answers[source.program]) for task in (first, other) for source in (first, other)]
    assert [found.correct for found in kind.verify(executor, pairs)] == [True, False, False, True]
    assert kind.parse_answer("") is None


@pytest.mark.parametrize("name", EVERY)
def test_the_gold_is_absent_from_the_prompt_and_the_demonstration_parses(name, tasks):
    kind = EVERY[name]
    for task in tasks[name]:
        turns = kind.solve(task)
        assert kind.gold(task) not in turns[-1] and len(turns) % 2 == 1
        for turn in turns[1::2]:
            shown = split_response(turn, prefilled=False)
            assert shown.formatted and kind.parse_answer(shown.answer)


@pytest.mark.parametrize("name", EVERY)
def test_keys_of_equal_tasks_agree_and_of_others_differ(name, tasks):
    kind = EVERY[name]
    first = tasks[name][0]
    again = Task(**{**first.__dict__, "inputs": list(first.inputs), "step": 7, "id": "other"})
    assert kind.key(first) == kind.key(again) != kind.key(kind.zero())
    assert kind.made(first) == kind.made(again) != kind.made(kind.zero())


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "is no file"),
        ("x = 1\n", "must make a Kind with a new name"),
        ("from prompts import Kind\nclass Half(Kind):\n    name = 'half'\nKIND = Half()\n", "abstract method.*verify"),
        ("from prompts import Deduction\nKIND = Deduction()\n", "new name"),
        ("def f(:\n", "invalid syntax"),
    ],
)
def test_a_file_without_a_whole_kind_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "kind.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_kinds(f"deduction,{path}")
    assert "\n" not in str(caught.value)


def test_kinds_are_loaded_in_the_order_of_the_table_then_of_the_files(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from prompts import Deduction\nclass Mine(Deduction):\n    name = 'mine'\nKIND = Mine()\n"
    )
    assert list(load_kinds(f"{tmp_path}/mine.py,induction,abduction")) == ["abduction", "induction", "mine"]
    assert isinstance(load_kinds(f"{tmp_path}/mine.py")["mine"], Deduction)
