"""Tests of tasks, buffers and their files."""

import random
from dataclasses import replace

import pytest

from buffers import Buffer, Task, draw_references, load_seeds, load_tasks, program_digest, refill, repeated, save_tasks
from prompts import KINDS

PROGRAM = "def f(items, k):\n    total = 0\n    for x in items:\n        total = total * k + x\n    return total"


# ---------------------------------------------------------------------------------------------------------------------
# Buffers


def numbered(number: int, step: int = 0) -> Task:
    return Task("deduction", f"def f(x):\n    return x + {number}", ["1"], [str(1 + number)], step=step)


def test_buffer_at_capacity_drops_the_oldest_and_the_new_slice_is_the_new_ones():
    buffer = Buffer(20)
    for number in range(20):
        assert buffer.add(numbered(number))
    for number in range(20, 30):
        assert buffer.add(numbered(number, step=7))
    assert len(buffer) == 20 and next(iter(buffer)).program.endswith("+ 10")
    assert [task.program for task in buffer.added_at(7)] == [numbered(number).program for number in range(20, 30)]


def test_buffer_refuses_programs_equal_up_to_names_comments_and_layout():
    buffer = Buffer()
    assert buffer.add(Task("deduction", "def f(a):\n    b = a + 1\n    return b", ["1"], ["2"]))
    assert not buffer.add(
        Task("deduction", "def f(x):\n    '''Doc.'''\n    y = (x+1)  # hm\n\n    return y", ["5"], ["6"])
    )
    assert buffer.add(Task("deduction", "def f(a):\n    b = a + 2\n    return b", ["1"], ["3"]))
    assert buffer.add(Task("deduction", "def f(a):\n    b = a + 1\n    return a", ["1"], ["1"]))


def test_programs_that_differ_in_names_of_outer_variables_or_in_defaults_are_two():
    outer = (
        "def f(x):\n    a, b = 1, 2\n    def g():\n        nonlocal {}\n        a = b = x\n    g()\n    return a - b"
    )
    assert program_digest(outer.format("a")) != program_digest(outer.format("b"))
    first, second = "def f(x, *, a=1, b): return x", "def f(x, *, a, b=1): return x"
    assert program_digest(first) != program_digest(second)


def test_names_of_a_class_that_attributes_read_keep_their_part():
    program = (
        "class C:\n    {} = 1\n    {} = 2\n    def {}(self):\n        return 3\ndef f(x):\n    return C.lo + C().get()"
    )
    ways = [("lo", "hi", "get"), ("hi", "lo", "get"), ("lo", "get", "hi")]
    assert len({program_digest(program.format(*names)) for names in ways}) == 3
    both = "class C:\n    lo, hi = 1, 2\ndef f({}, {}):\n    return C.lo"
    assert program_digest(both.format("lo", "hi")) != program_digest(both.format("hi", "lo"))
    for body in (
        "    async def {}(self): pass\n    async def {}(self): return 1\n",
        "    if True:\n        def {}(self): pass\n        def {}(self): return 1\n",
        "    for {}, {} in [(1, 2)]: pass\n",
        "    from math import sin as {}, cos as {}\n",
    ):
        text = "class C:\n" + body + "def f(x): return C.a"
        assert program_digest(text.format("a", "b")) != program_digest(text.format("b", "a"))
    plain = "from math import sin, cos\ndef g({0}): return 0\ndef f(x): return {0}(x)"
    assert program_digest(plain.format("sin")) != program_digest(plain.format("cos"))
    same = program.format(*ways[0]).replace("C", "D").replace("self", "it").replace("x", "y")
    assert program_digest(same) == program_digest(program.format(*ways[0]))


def test_names_that_other_statements_bind_make_no_new_program():
    program = (
        "import math as {0}\nfrom math import pi as {1}\nasync def {2}(): pass\n"
        "def f(x):\n    try:\n        return {0}.sqrt(x)\n    except ValueError as {3}:\n"
        "        match x:\n            case [{4}, *{5}] | {{'a': {4}, **{5}}}: return {4}"
    )
    assert program_digest(program.format(*"abcdeg")) == program_digest(program.format(*"qrstuv"))
    assert program_digest("from math import sin as g\ndef f(sin): return g(sin)") != program_digest(
        "from math import cos as g\ndef f(cos): return g(cos)"
    )
    assert program_digest("def f(): return u'a'") == program_digest("def f(): return 'a'")


def test_digests_survive_integers_that_python_does_not_print():
    assert program_digest("x = 0x" + "f" * 5000) != program_digest("x = 0x" + "f" * 5001)
    assert program_digest("x = 1") != program_digest("x = True")


def test_digests_survive_deep_programs():
    assert program_digest("def f(x):\n    return " + "+".join(["x"] * 3000))


def test_buffer_sampling_is_uniform_without_replacement():
    buffer, rng, counts = Buffer(), random.Random(3), {}
    for number in range(10):
        buffer.add(numbered(number))
    for _ in range(2000):
        drawn = buffer.sample(3, rng)
        assert len({task.program for task in drawn}) == 3
        for task in drawn:
            counts[task.program] = counts.get(task.program, 0) + 1
    assert min(counts.values()) > 500 and max(counts.values()) < 700
    assert len(buffer.sample(99, rng)) == 10


def test_references_at_the_frontier_come_by_r_times_one_minus_r_over_all_pools(tmp_path):
    rng, counts = random.Random(5), dict.fromkeys((0.5, 0.125, None, 0.0, 1.0), 0)
    pools = [Buffer(draw="frontier") for _ in range(2)]
    for number, rate in enumerate(counts):
        task = numbered(number)
        task.solve_rate = rate
        pools[number % 2].add(task)
    for _ in range(4000):
        [drawn] = draw_references(pools, 1, rng)
        counts[drawn.solve_rate] += 1
    weights = {0.5: 0.25, 0.125: 0.125 * 0.875, None: 0.05, 0.0: 0.001, 1.0: 0.001}
    for rate, weight in weights.items():
        assert abs(counts[rate] / 4000 - weight / sum(weights.values())) < 0.03
    assert len({task.program for task in draw_references(pools, 4, rng)}) == 4
    assert len(draw_references(pools, 99, rng)) == 5 and draw_references(pools, 0, rng) == []
    save_tasks(tmp_path / "entered.jsonl", pools[0])
    again = Buffer(draw="frontier")
    refill(again, tmp_path / "entered.jsonl", KINDS["deduction"])  # the rates come back after a stop
    assert draw_references([again], 2, random.Random(7)) == draw_references(pools[:1], 2, random.Random(7))


def test_references_are_drawn_uniformly_over_all_pools_unless_told_otherwise():
    rng, counts = random.Random(6), [0] * 6
    pools = [Buffer(), Buffer()]
    for number in range(6):
        task = numbered(number)
        task.solve_rate = 0.5 if number == 0 else 1.0
        pools[number > 3].add(task)
    for _ in range(3000):
        for task in draw_references(pools, 2, rng):
            counts[int(task.program[-1])] += 1
    assert min(counts) > 900 and max(counts) < 1100


def test_a_buffer_that_drops_the_newest_keeps_its_first_tasks_and_says_so(tmp_path):
    buffer = Buffer(5, drops="newest")
    assert [buffer.add(numbered(number)) for number in range(8)] == [True] * 5 + [False] * 3
    assert [task.program[-1] for task in buffer] == list("01234")
    save_tasks(tmp_path / "entered.jsonl", buffer)
    again = Buffer(5, drops="newest")
    refill(again, tmp_path / "entered.jsonl", KINDS["deduction"])
    assert list(again) == list(buffer)


def test_a_task_is_repeated_when_its_buffer_or_its_step_has_it():
    buffers = {name: Buffer(key=kind.key) for name, kind in KINDS.items()}
    buffers["deduction"].add(numbered(1))
    backwards = Task("abduction", numbered(1).program, ["1"], ["2"])
    renamed = Task("deduction", "def f(y):\n    return y + 2", ["9"], ["11"])
    tasks = [numbered(1), numbered(2), None, backwards, renamed, None, numbered(3)]
    assert repeated(tasks, buffers) == [True, False, False, False, True, False, False]
    inputs = [Task("induction", "def f(x):\n    return x", [n, "7"], [n, "7"], "m") for n in ("1", "2", "1")]
    assert repeated(inputs, buffers) == [False, False, True]  # other inputs make another induction task


def test_tasks_survive_a_file_and_a_truncated_one_names_its_line(tmp_path):
    tasks = [kind.zero() for kind in KINDS.values()]
    save_tasks(tmp_path / "tasks.jsonl", tasks)
    assert load_tasks(tmp_path / "tasks.jsonl", KINDS) == tasks
    text = (tmp_path / "tasks.jsonl").read_text()
    (tmp_path / "tasks.jsonl").write_text(text[:-20])
    with pytest.raises(ValueError, match=r"tasks\.jsonl, line 3"):
        load_tasks(tmp_path / "tasks.jsonl", KINDS)


def test_tasks_of_another_run_become_seeds(tmp_path):
    """Their step would pass for a step of this run, their name for that of another task."""
    zero = KINDS["deduction"].zero()
    save_tasks(
        tmp_path / "tasks.jsonl", [replace(zero, step=3, id="3-deduction-0", solve_rate=0.5, references=["x"]), zero]
    )
    seeds = load_seeds(tmp_path / "tasks.jsonl", KINDS)
    name = seeds[0].id
    assert seeds == [replace(zero, id=name), zero] and seeds[0].step == 0 and name not in ("3-deduction-0", zero.id)
    save_tasks(tmp_path / "more.jsonl", [*seeds, replace(zero, program=PROGRAM, step=1, id="1-deduction-0")])
    assert (
        len({task.id for task in load_seeds(tmp_path / "more.jsonl", KINDS)}) == 3
    )  # of two runs, one after the other


def test_a_full_buffer_comes_back_from_the_file_of_all_that_ever_entered(tmp_path):
    buffer, rng, entered = Buffer(20), random.Random(4), []
    for step in range(300):  # programs come again, some while they are still in the ring and some after they left it
        task = numbered(rng.randrange(40), step)
        if buffer.add(task):
            entered.append(task)
    save_tasks(tmp_path / "entered.jsonl", entered)
    again = Buffer(20)
    refill(again, tmp_path / "entered.jsonl", KINDS["deduction"])
    assert len(entered) > 60 and list(again.tasks.items()) == list(buffer.tasks.items())
    draws = [[held.sample(4, random.Random(seed)) for seed in range(9)] for held in (buffer, again)]
    assert draws[0] == draws[1]
    buffer.add(numbered(99, 300))
    assert buffer[19].step == 300 and buffer[0] is next(iter(buffer))  # the list of all was made anew
