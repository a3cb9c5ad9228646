"""Tests of the loop and of the small modules around it: prompts, buffers, configuration, run folder.

Everything is real: the embedded model, real subprocesses, the real command line. The other modules have a test file
of the same name. Run: python -m pytest -q
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import azr
from azr import Rollout
from buffers import Buffer, Task, save_tasks
from executor import Executor
from harness.config import TINY_MODEL, Config, parse, presets_table
from policy.dialogue import split_response
from policy.transformers_engine import TransformersEngine
from prompts import KINDS

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
    from harness.start import start

    config, _ = parse(["--batch", "4", "--out", str(tmp_path_factory.mktemp("run") / "r"), "--eval-every", "0"])
    started = start(config, None)
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
# Steps


def test_one_prompt_too_long_is_drawn_again_and_the_batch_stays_whole(run):
    run.buffers = {kind: Buffer(100) for kind in KINDS}
    for kind in ("abduction", "deduction"):
        run.buffers[kind].add(Task(kind, "def f(x):\n    return x" + " + 1" * 2000, ["1"], ["2001"]))
        run.buffers[kind].add(numbered(3))
    proposals = [azr.proposal_prompt(run, "deduction", random.Random(n), 1) for n in range(8)]
    assert all(0 < len(item.prompt_ids) <= run.config.max_prompt for item in proposals)


def test_a_seed_too_long_for_either_of_its_two_uses_is_left_out(run, tmp_path):
    """`list(range(900))`: the output stands in the abduction prompt, not in the one for deduction."""
    long = Task("deduction", "def f(x):\n    return list(range(x))", ["900"], [str(list(range(900)))], id="long")
    assert azr.fits(run, long) and not azr.fits(run, replace(long, kind="abduction"))
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


# ---------------------------------------------------------------------------------------------------------------------
# The command line, end to end

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--batch", "3", "--rollouts", "2", "--seed-factor", "1", "--inputs", "4", "--eval-every", "0"]
SMALL += ["--engine", "transformers", "--device", "cpu"]


def cli(*arguments: str, cwd: Path = HERE) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "azr.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """Three uninterrupted steps of the embedded model."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = cli(*SMALL, "--steps", "3", "--out", str(folder))
    assert result.returncode == 0, result.stderr
    assert "step 3/3" in result.stdout and "ETA" in result.stdout
    assert re.search(r"peak memory: \d+\.\d\d GB predicted .*, \d+\.\d\d GB measured", result.stdout)
    return folder


def test_a_run_leaves_everything_behind_and_parameters_change(whole_run):
    names = "config.json metrics.jsonl timing.jsonl tasks.jsonl rollouts.jsonl seeds.jsonl flagged.jsonl checkpoint"
    assert all((whole_run / name).exists() for name in names.split())
    assert {path.name for path in (whole_run / "buffers").iterdir()} == {f"{kind}.jsonl" for kind in KINDS}
    records = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    timing = [json.loads(line) for line in (whole_run / "timing.jsonl").read_text().splitlines()]
    assert all(0.5 < line["peak_gb"] / line["predicted_peak_gb"] < 1.5 for line in timing)
    before, after = load_file(TINY_MODEL / "model.safetensors"), load_file(whole_run / "checkpoint/model.safetensors")
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)
    tasks = [json.loads(line) for line in (whole_run / "tasks.jsonl").read_text().splitlines()]
    assert len(tasks) == 3 * 3 * 3 and all(task["verdict"] for task in tasks)
    LlamaForCausalLM.from_pretrained(whole_run / "checkpoint")  # an ordinary Hugging Face folder
    AutoTokenizer.from_pretrained(whole_run / "checkpoint")


REPRODUCED = ["metrics.jsonl", "tasks.jsonl", "rollouts.jsonl", "checkpoint/model.safetensors"]
REPRODUCED += [f"buffers/{kind}.jsonl" for kind in KINDS]


def assert_same_run(first: Path, second: Path) -> None:
    for name in REPRODUCED:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    ours, theirs = (torch.load(path / "checkpoint/trainer.pt") for path in (first, second))
    for name, moment in ours["optimizer"]["exp_avg"].items():
        assert torch.equal(moment, theirs["optimizer"]["exp_avg"][name])


def test_resume_is_bit_for_bit_the_uninterrupted_run(whole_run, tmp_path):
    folder = tmp_path / "part"
    assert cli(*SMALL, "--steps", "2", "--out", str(folder)).returncode == 0
    result = cli("--resume", str(folder), "--steps", "3")
    assert result.returncode == 0 and "after step 2" in result.stdout, result.stderr
    assert_same_run(whole_run, folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_at_any_moment_loses_at_most_the_current_step(whole_run, tmp_path, number):
    folder = tmp_path / "killed"
    command = [sys.executable, str(HERE / "azr.py"), *SMALL, "--steps", "3", "--out", str(folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("step 1/3"):
            break
    time.sleep(random.Random(number).random())
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() in (130, -signal.SIGKILL)
    assert number != signal.SIGINT or "--resume" in rest
    assert cli("--resume", str(folder)).returncode == 0
    assert_same_run(whole_run, folder)


def test_a_run_killed_while_seeding_starts_over_from_its_folder(tmp_path):
    folder = tmp_path / "r"
    config, _ = parse([*SMALL, "--steps", "1", "--out", str(folder)])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": config.__dict__}))
    assert cli("--resume", str(folder)).returncode == 0


def test_seeds_are_reusable(whole_run, tmp_path):
    result = cli(*SMALL, "--steps", "1", "--out", str(tmp_path / "r"), "--seeds", str(whole_run / "seeds.jsonl"))
    assert result.returncode == 0 and "seed deduction" not in result.stderr
    before = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    after = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert before[1] == after[1]


@pytest.mark.parametrize(
    "extra",
    [
        ["--control", "shuffle"],
        ["--control", "fixed"],
        ["--no-train-proposer", "--references", "0"],
        ["--tasks", "deduction"],
        ["--reuse-measurement-rollouts", "--zero-reward", "-0.5", "--advantage-weighting", "token"],
        ["--solve-batch", "previous", "--admit", "learnable", "--loss-mean", "sequence"],
        ["--minibatches", "2", "--clip-high", "0.28"],
    ],
)
def test_ablations_and_switches_run(whole_run, tmp_path, extra):
    result = cli(
        *SMALL, "--steps", "1", "--out", str(tmp_path / "r"), "--seeds", str(whole_run / "seeds.jsonl"), *extra
    )
    assert result.returncode == 0, result.stderr
    if "--minibatches" in extra:
        record = json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[-1])
        assert record["update/steps"] == 2 and record["update/ratio"] != 1


def test_a_collapse_stops_the_run_with_its_step_saved_and_a_table(whole_run, tmp_path, monkeypatch, capsys):
    """The alarm comes long before the next checkpoint is due, and before T = 1 is measured again."""
    monkeypatch.setattr("harness.metrics.Watch.read", lambda self, record: ["collapse"] if record["step"] == 1 else [])
    arguments = [*SMALL, "--seeds", str(whole_run / "seeds.jsonl"), "--out", str(tmp_path / "r"), "--steps", "9"]
    arguments += ["--eval-every", "1", "--eval-suites", f"tasks:{HERE / 'tiny/test.jsonl'}:3", "--save-every", "5"]
    assert azr.main([*arguments, "--stop-on-collapse"]) == 0
    assert (tmp_path / "r/checkpoint").resolve().name == "checkpoint-000001"
    assert "stopped by --stop-on-collapse after step 1" in (printed := capsys.readouterr().out)
    assert "before" in printed and "after" in printed


def test_shuffled_rewards_keep_each_cells_rewards():
    rows = [Rollout("solve", kind, 1, "", [], reward=float(n)) for kind in KINDS for n in range(9)]
    azr.shuffle_rewards(rows, random.Random(0))
    for kind in KINDS:
        rewards = [item.reward for item in rows if item.kind == kind]
        assert sorted(rewards) == [float(n) for n in range(9)] and rewards != sorted(rewards)


def test_a_model_too_weak_to_seed_says_how_many_and_why(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--preset", "tiny", *SMALL, "--seed-limit", "4"]
    result = cli(*arguments, "--max-response", "8", "--out", str(tmp_path / "r"))
    assert result.returncode == 2 and "too weak" in result.stderr and "no_program" in result.stderr
    assert len(result.stderr.strip().splitlines()[-1]) < 500 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--batch", "-1"], "--batch must be above 0"),
        (["--lr", "nan"], "--lr must be a number below"),
        (["--eval-every", "1", "--eval-suites", "tasks:a/t.jsonl,tasks:b/t.jsonl"], "Two suites have the name t"),
        (["--out", str(HERE / "README.md")], "README.md is a file"),
        (["--importance-cap", "-1"], "--importance-cap must not be negative"),
        (["--grad-clip", "0"], "--grad-clip must be above 0"),
        (["--inputs", "11"], "--inputs must be 2"),
        (["--rollouts", "999999999999"], "--rollouts must be a number below"),
        (["--preset", "9000b"], "choose one of"),
        (["--tasks", "deduction,divination"], "divination"),
        (["--template", "fancy"], "--template"),
        (["--device", "cuda"], "--device cpu"),
        (["--resume", "/nonexistent"], "config.json"),
        (["--eval-every", "5", "--eval-suites", ""], "--eval-suites"),
    ],
)
def test_wrong_input_gets_one_sentence_and_exit_code_2(capsys, arguments, words):
    assert azr.main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert words in message and "\n" not in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--max-prompt", "50"], "--max-prompt 50 is too short"),
        (["--seeds", "bad.jsonl"], "bad.jsonl, line 1"),
        (["--seeds", "missing.jsonl"], "missing.jsonl"),
        (["--seeds", "nopython.jsonl"], "nopython.jsonl, line 2"),
        (["--seeds", "binary.jsonl"], "binary.jsonl, line 1"),
        (["--seeds", "all_shown.jsonl"], "visible is 99"),
        (["--eval-every", "1", "--eval-suites", "divination"], "choose from humaneval"),
        (["--eval-every", "1", "--eval-suites", "tasks:missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_turns_out_wrong_before_the_first_step_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    save_tasks(tmp_path / "nopython.jsonl", [KINDS["deduction"].zero(), Task("abduction", "def f(:", ["1"], ["1"])])
    save_tasks(tmp_path / "all_shown.jsonl", [replace(KINDS["induction"].zero(), visible=99)])
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    seeds = [] if "--seeds" in arguments or "--max-prompt" in arguments else ["--seeds", "seeds.jsonl"]
    save_tasks(tmp_path / "seeds.jsonl", [kind.zero() for kind in KINDS.values()])
    assert azr.main([*SMALL, *seeds, "--steps", "1", "--out", "r", *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("azr.py: ") and words in message


def test_a_run_of_another_model_is_refused(whole_run, capsys):
    assert azr.main(["--resume", str(whole_run), "--model", "other/model"]) == 2
    assert "start a new run" in capsys.readouterr().err


def test_a_damaged_buffer_names_file_and_line(whole_run, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "r", symlinks=True)
    path = tmp_path / "r/buffers/deduction.jsonl"
    path.write_text(path.read_text()[:-30] + "x" * 30)
    assert azr.main(["--resume", str(tmp_path / "r"), "--steps", "4"]) == 2
    assert "deduction.jsonl, line" in capsys.readouterr().err


def test_a_copy_without_the_link_goes_on_from_the_newest_checkpoint(whole_run, tmp_path, capsys):
    folder = shutil.copytree(whole_run, tmp_path / "r", symlinks=True)
    (folder / "checkpoint").unlink()
    assert azr.main(["--resume", str(folder), "--steps", "3"]) == 0
    assert "after step 3" in capsys.readouterr().out
    assert_same_run(whole_run, folder)
    (folder / "checkpoint").unlink()
    shutil.copytree(folder / "checkpoint-000003", folder / "checkpoint")
    assert azr.main(["--resume", str(folder), "--steps", "3"]) == 2
    assert "remove it, checkpoint-000003 is the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("metrics.jsonl", None, "it had at the checkpoint"),
        ("metrics.jsonl", "{}\n" * 9999, "metrics.jsonl, line 1"),
        ("buffers/deduction.jsonl", "", "it had at the checkpoint"),
        ("config.json", "", "config.json is damaged"),
        ("config.json", "{}", "config.json is damaged"),
        ("config.json", '{"config": {"batch": "3"}}', "batch is '3'"),
        ("checkpoint/trainer.pt", "", "trainer.pt cannot be read"),
        ("checkpoint/config.json", "null", "config.json of"),
    ],
)
def test_a_damaged_run_folder_is_named_and_left_as_it_is(whole_run, tmp_path, capsys, file, text, words):
    folder = shutil.copytree(whole_run, tmp_path / "r", symlinks=True)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    assert azr.main(["--resume", str(folder), "--steps", "4"]) == 2
    message = capsys.readouterr().err.strip()
    assert words in message and "\n" not in message
    for path in whole_run.rglob("*.*"):
        if path.is_file() and path.name != Path(file).name and "tensorboard" not in str(path):
            assert (folder / path.relative_to(whole_run)).read_bytes() == path.read_bytes(), path


def test_fewer_steps_than_are_done_is_refused(whole_run, capsys):
    assert azr.main(["--resume", str(whole_run), "--steps", "1"]) == 2
    assert "has 3 steps already" in capsys.readouterr().err


def test_a_trainer_state_of_something_else_is_refused(whole_run, tmp_path, capsys):
    folder = shutil.copytree(whole_run, tmp_path / "r", symlinks=True)
    state = torch.load(folder / "checkpoint/trainer.pt")
    for other in ([1, 2], {name: value for name, value in state.items() if name != "log_sizes"}):
        torch.save(other, folder / "checkpoint/trainer.pt")
        assert azr.main(["--resume", str(folder), "--steps", "4"]) == 2
        assert "trainer.pt cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("size", [20_000, 2_000_000, 8_000_000])
def test_a_disk_that_fills_leaves_the_last_checkpoint(whole_run, tmp_path, size):
    """A limit on the size of a file stands for the disk: it fails in the weights, in the optimizer's state or in a
    log, with the same kinds of errors."""
    folder = shutil.copytree(whole_run, tmp_path / "r", symlinks=True)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, str(HERE / "azr.py"), "--resume", str(folder), "--steps", "4"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=HERE, preexec_fn=limit)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert (folder / "checkpoint").resolve().name == "checkpoint-000003"
    assert not list(folder.glob("*.partial"))
    assert cli("--resume", str(folder), "--steps", "3").returncode == 0
    assert_same_run(whole_run, folder)


def test_the_best_checkpoint_is_saved_before_the_newest(whole_run, tmp_path, monkeypatch):
    """A kill between the two must not leave a run that goes on behind a best step it never kept."""
    saved, save, scores = [], azr.checkpoint.save, [0.1, 0.9]
    monkeypatch.setattr(azr.checkpoint, "save", lambda *arguments: (saved.append(arguments[-1]), save(*arguments)))
    monkeypatch.setattr(azr, "evaluate_policy", lambda run: {"score": scores.pop(0), "eval/t/accuracy": 0.5})
    arguments = [*SMALL, "--seeds", str(whole_run / "seeds.jsonl"), "--out", str(tmp_path / "r"), "--steps", "1"]
    arguments += ["--eval-every", "1", "--eval-suites", f"tasks:{HERE / 'tiny/test.jsonl'}:3", "--keep-best"]
    assert azr.main(arguments) == 0
    assert saved == ["checkpoint", "best", "checkpoint"]


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(azr, "start", interrupted)
    assert azr.main([*SMALL, "--out", str(tmp_path / "r")]) == 130
    assert capsys.readouterr().out.strip() == "stopped"


def test_a_broken_trainer_state_says_what_to_do(whole_run, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "r", symlinks=True)
    path = tmp_path / "r/checkpoint/trainer.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert azr.main(["--resume", str(tmp_path / "r"), "--steps", "4"]) == 2
    assert "trainer.pt" in capsys.readouterr().err


@pytest.mark.parametrize("place, words", [("_decode", "propose .*--memory"), ("update", "update .*--token-budget")])
def test_out_of_memory_names_the_flag_to_lower_and_leaves_the_checkpoint(
    whole_run, tmp_path, capsys, monkeypatch, place, words
):
    """The error is the allocator's own, raised in the middle of a step."""
    shutil.copytree(whole_run, tmp_path / "r", symlinks=True)
    with monkeypatch.context() as patch:
        where = azr.trr if place == "update" else TransformersEngine
        patch.setattr(where, place, lambda *_, **__: torch.empty(1 << 50, dtype=torch.uint8))
        assert azr.main(["--resume", str(tmp_path / "r"), "--steps", "4"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(f"out of memory in {words} .*--max-response, then --resume", message)
    assert azr.main(["--resume", str(tmp_path / "r"), "--steps", "4", "--token-budget", "512"]) == 0
    assert "step 4/4" in capsys.readouterr().out


def test_out_of_memory_while_loading_is_one_sentence(tmp_path, capsys, monkeypatch):
    loader = "policy.load.AutoModelForCausalLM.from_pretrained"
    monkeypatch.setattr(loader, lambda *_, **__: torch.empty(1 << 50, dtype=torch.uint8))
    assert azr.main(["--out", str(tmp_path / "r")]) == 2
    assert "choose a smaller --model" in capsys.readouterr().err


def test_the_paper_spelling_of_a_model_is_understood():
    from policy.load import resolve_model

    assert resolve_model("Qwen/Qwen2.5-3B-Coder") == "Qwen/Qwen2.5-Coder-3B"


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path):
    result = cli("--dry-run", "--out", str(tmp_path / "r"))
    assert result.returncode == 0 and "rollouts" in result.stdout and not (tmp_path / "r").exists()


def test_smoke_ends_with_one_line(tmp_path):
    result = cli("--smoke", "--out", str(tmp_path / "r"))
    assert result.returncode == 0 and result.stdout.strip().splitlines()[-1].startswith("smoke ok"), result.stderr


def test_config_defaults_are_valid_and_every_field_has_help():
    Config(model="x").validate()
    assert all(item.metadata["help"] for item in Config.__dataclass_fields__.values())


def test_the_presets_page_is_current():
    assert presets_table() in (HERE / "docs/presets.md").read_text()
