"""The exercises of the course: their solutions are taken from the page and run, their numbers from docs/results."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import azr
import evaluate
from buffers import Task, load_tasks, save_tasks
from executor import Executor
from harness.checkpoint import read_log
from harness.config import parse
from policy.dialogue import split_response
from prompts import KINDS, load_kinds
from tests.test_run import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/exercises.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs/results/exercises.md").read_text(encoding="utf-8")
FILES = {name: text for name, text in re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)}
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
LOOKED = {line["run"]: line for line in map(json.loads, re.findall(r'^\{"run.*$', RESULTS, re.MULTILINE))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with every file and patch of the page, and seeds for all task types."""
    path = tmp_path_factory.mktemp("exercises")
    for name, text in FILES.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def seeds(folder) -> list[str]:
    assert azr.main([*SMALL, "--steps", "1", "--out", str(folder / "paper")]) == 0
    return ["--seeds", str(folder / "paper/seeds.jsonl")]


def first_step(folder: Path, *arguments: str) -> dict:
    assert azr.main([*SMALL, "--steps", "1", "--out", str(folder), *arguments]) == 0
    return read_log(folder / "metrics.jsonl")[-1]


def table(after: str) -> list[list[str]]:
    """The rows of the first table that follows a text of the page, without its head."""
    lines = PAGE.partition(after)[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def test_there_are_eight_each_with_its_parts():
    parts = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert [part[0] for part in parts] == list("12345678")
    for part in parts:
        assert re.match(r"\d\. .* \((\d+ minutes|\d hours?|an evening|a weekend)\)\n", part)
        assert all(part.count(word) == 1 for word in ("**Start:**", "**Look at:**", "<details>", "</details>"))


def test_every_command_of_the_page_is_understood(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = defaultdict(int)
    for line in COMMANDS:
        command, program, *arguments = shlex.split(line)
        found[program] += 1
        if program == "azr.py":
            parse(arguments)
        elif program == "evaluate.py":
            assert evaluate.parse_arguments(arguments).specs == ["tasks:tiny/dev.jsonl:150"]
        else:
            assert command == "echo" and arguments == [">", "seeds.jsonl"]
            (folder / "seeds.jsonl").write_text(program)
            assert load_tasks(folder / "seeds.jsonl", load_kinds("congruence.py"))
    assert found["azr.py"] >= 8 and found["evaluate.py"] == 2


def test_1_the_switches_do_what_the_solution_says(folder, seeds):
    paper = read_log(folder / "paper/metrics.jsonl")[-1]
    zero = first_step(folder / "zero", *seeds, "--zero-reward", "-0.5")
    token = first_step(folder / "token", *seeds, "--advantage-weighting", "token")
    previous = first_step(folder / "previous", *seeds, "--solve-batch", "previous")
    changed = 0.0
    tasks = read_log(folder / "zero/tasks.jsonl")
    for kind in KINDS:
        bins = paper.get(f"propose/{kind}/solve_rate_hist", [0, 0])
        assert bins == zero.get(f"propose/{kind}/solve_rate_hist", [0, 0])
        own = [task for task in tasks if task["kind"] == kind and task["solve_rate"] in (0.0, 1.0)]
        assert len(own) == bins[0] + bins[-1]
        formatted = sum(task["reward"] == -0.5 for task in own)
        gap = paper[f"propose/{kind}/reward_mean"] - zero[f"propose/{kind}/reward_mean"]
        assert gap == pytest.approx(0.5 * formatted / paper[f"propose/{kind}/count"])
        changed += gap
        assert previous[f"propose/{kind}/valid_share"] == paper[f"propose/{kind}/valid_share"]
    assert changed > 0
    assert abs(token["update/loss"]) < 1e-6 < abs(paper["update/loss"]) and token["update/grad_norm"] > 1e-3


def test_2_the_judge_can_be_fooled_so_far_and_no_further(folder, capsys):
    runpy.run_path(str(folder / "fool.py"))
    printed = capsys.readouterr().out
    two, eight = re.findall(r"hash seeds: (\d+) of 10 accepted; run again, all the same: True", printed)
    assert 0 < int(two) < 10 and eight == "0"
    assert re.findall(r"(right|wrong)", printed) == ["wrong"] * 3 + ["right"] * 2


def test_3_and_4_the_patches_apply_and_change_what_they_say(folder, seeds):
    """Both in one copy: the first changes advantages, the second rewards."""
    copy = folder / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "tests", "docs", "__pycache__", ".*_cache")
    )
    for name in ("baseline.diff", "reward.diff"):
        subprocess.run(["git", "apply", str(folder / name)], cwd=copy, check=True)
    command = [sys.executable, "azr.py", *SMALL, *seeds, "--steps", "2", "--log-rollouts", "9999"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, "--out", "run"], cwd=copy, env=environment, check=True, capture_output=True)
    assert first_step(folder / "plain", *seeds, "--log-rollouts", "9999")["step"] == 1
    for run, six in ((folder / "plain", True), (copy / "run", False)):
        rows = [row for row in read_log(run / "rollouts.jsonl") if row["trains"] and row["step"] == 1]
        rewards, cells = [row["reward"] for row in rows], defaultdict(list)
        mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
        for row in rows:
            cells[row["role"], row["kind"]].append(row)
        assert len(cells) == 6
        for own in cells.values():
            wanted = 0.0 if six else (statistics.fmean(row["reward"] for row in own) - mean) / deviation
            assert statistics.fmean(row["advantage"] for row in own) == pytest.approx(wanted, abs=1e-6)
    tasks = [task for task in read_log(copy / "run/tasks.jsonl") if task["solve_rate"] is not None]
    paid = {(task["solve_rate"], task["reward"]) for task in tasks if task["reward"] != -1}
    assert (0.5, 1.0) in paid and paid <= {(0.0, 0.0), (0.5, 1.0), (1.0, 0.0)}


def test_5_the_proposer_is_read_from_its_tasks(folder, seeds, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["proposer.py", str(folder / "paper")])
    runpy.run_path(str(folder / "proposer.py"))
    printed = capsys.readouterr().out
    record = read_log(folder / "paper/metrics.jsonl")[-1]
    assert f"steps 1 to 1: valid {record['valid_share']:.2f}" in printed and "statements:" in printed
    monkeypatch.setattr(sys, "argv", ["look.py", str(folder / "paper")])
    runpy.run_path(str(folder / "look.py"))
    line = json.loads(capsys.readouterr().out)
    tasks = [task for task in read_log(folder / "paper/tasks.jsonl") if task["solve_rate"] is not None]
    assert line["run"] == "paper" and sum(line["solve_rate_hist/first"]) == len(tasks)
    learning = (ROOT / "docs/results/learning.md").read_text(encoding="utf-8")
    rows = table("first to last five steps of 40")
    assert len(rows) == 3 and all(f"| {' | '.join(row)} |" in learning for row in rows)
    for reward in re.findall(r"\+0\.\d\d", PAGE.partition("`python proposer.py runs/default-0` shows")[2][:500]):
        assert f"mean reward {reward}" in RESULTS


def test_the_runs_in_the_tables_are_those_of_the_results():
    rows = (
        table("all three together") + table("a right answer to a hard type stands out less") + table("`reward.diff`:")
    )
    assert len(rows) == 6
    for name, before, after, *nodes in rows:
        runs = [LOOKED[f"{name}-{seed}"] for seed in (0, 1)]
        assert before == f"{100 * runs[0]['score'][0]:.1f}"
        assert after == " ".join(f"{100 * run['score'][-1]:.1f}" for run in runs)
        assert nodes in ([], [" ".join(f"{run['ast_nodes_mean/last']:.1f}" for run in runs)])


def test_6_the_curves_of_pass_at_k_are_those_of_the_results():
    rows = {name: cells for name, *cells in table("## 6.")}
    results = {line["model"]: line for line in map(json.loads, re.findall(r'^\{"model.*$', RESULTS, re.MULTILINE))}
    assert rows.keys() == results.keys() and len(rows) == 2
    for name, line in results.items():
        values = [line["accuracy"], *line["pass_at"].values()]
        assert rows[name] == [f"{100 * value:.1f}" for value in values] and values == sorted(values)


@pytest.mark.parametrize("name", ["twice", "congruence"])
def test_7_and_8_the_new_kinds_keep_the_contract(folder, name):
    kind = load_kinds(str(folder / f"{name}.py"))[name]
    with Executor(lanes=2) as judge:
        turns = kind.propose([kind.zero()], 4)
        draft, cause = kind.parse_proposal(split_response(turns[1], prefilled=False).answer, [], 4)
        [[result]] = kind.run(judge, [draft])
        assert not cause and kind.check(draft, [result]) == "ok"
        shown, zero = Task(name, draft.program, draft.inputs, [kind.output(result)]), kind.zero()
        answers = [kind.parse_answer(kind.gold(task)) for task in (zero, shown)]
        found = kind.verify(judge, [(task, answer) for task in (zero, shown) for answer in answers])
        assert [judgement.correct for judgement in found] == [True, False, False, True]
    assert kind.gold(shown) not in kind.solve(shown)[-1] and kind.key(shown) != kind.key(zero)
    assert kind.parse_answer("") is None and kind.parse_answer(split_response(kind.solve(zero)[1], False).answer)


def test_7_the_gold_is_what_f_gives_when_it_is_applied_twice(folder):
    kind = load_kinds(str(folder / "twice.py"))["twice"]
    programs = {
        "def f(x):\n    return x + [len(x)]": ("[7]", "[7, 1, 2]"),
        "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)": ("7", "233"),  # recursive: f(13)
        "def f(x):\n    return len(x)": ("'abc'", "runtime_error"),
    }
    with Executor(lanes=2) as judge:
        drafts = [
            kind.parse_proposal(f"```python\n{p}\n```\n```input\nf({i})\n```", [], 4)[0]
            for p, (i, _) in programs.items()
        ]
        results = kind.run(judge, drafts)
    assert [result.output or str(result.verdict) for [result] in results] == [gold for _, gold in programs.values()]


def test_7_and_8_the_new_kinds_train_two_steps_on_the_embedded_model(folder, seeds):
    spec = f"deduction,{folder / 'twice.py'},{folder / 'congruence.py'}"
    mixed = folder / "mixed.jsonl"
    own = [kind.zero() for kind in load_kinds(spec).values() if kind.name != "deduction"]
    save_tasks(mixed, own)
    mixed.write_text(mixed.read_text() + Path(seeds[1]).read_text(), encoding="utf-8")
    arguments = [*SMALL, "--tasks", spec, "--seeds", str(mixed), "--max-prompt", "800", "--out", str(folder / "kinds")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert azr.main([*arguments, "--steps", "2"]) == 0, printed.getvalue()
    record = read_log(folder / "kinds/metrics.jsonl")[-1]
    assert record["step"] == 2 and record["update/steps"] == 1
    for name in ("deduction", "twice", "congruence"):
        assert record[f"propose/{name}/count"] == 3 and record[f"solve/{name}/count"] >= 3
    tasks = [task for task in read_log(folder / "kinds/tasks.jsonl") if task["kind"] == "twice"]
    assert any(task["verdict"] == "ok" for task in tasks)  # it knows the form from deduction
