"""The command line, end to end: whole runs, stops and resumes, damaged folders, wrong input, the presets.

Everything is real: the embedded model, the files of a run, signals and limits. What needs no process of its own calls
`azr.main`.
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
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config

import azr
from buffers import Task, save_tasks
from harness.config import TINY_MODEL, Config, parse, presets_table
from harness.start import choose_template
from policy.load import resolve_model
from prompts import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--preset", "tiny", "--batch", "3", "--rollouts", "2", "--seed-factor", "1", "--inputs", "4"]
SMALL += ["--eval-every", "0", "--engine", "transformers", "--device", "cpu"]


def cli(*arguments: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "azr.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=HERE, **more)


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
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
    assert number == signal.SIGKILL or "--resume" in rest
    assert azr.main(["--resume", str(folder)]) == 0
    assert_same_run(whole_run, folder)


def test_a_run_killed_while_seeding_starts_over_from_its_folder(tmp_path):
    folder = tmp_path / "r"
    config, _ = parse([*SMALL, "--steps", "1", "--out", str(folder)])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": config.__dict__}))
    assert azr.main(["--resume", str(folder)]) == 0


def test_seeds_are_reusable(whole_run, tmp_path, monkeypatch):
    seeds = ["--seeds", str(whole_run / "seeds.jsonl")]
    monkeypatch.setattr(azr, "fill", None)  # nothing is proposed to fill the buffers
    assert azr.main([*SMALL, "--steps", "1", "--out", str(tmp_path / "r"), *seeds]) == 0
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
        ["--baseline", "global", "--buffer-drops", "newest", "--reference-draw", "frontier"],
        ["--baseline", "task", "--solve-prompts", "0", "--duplicate-reward", "-0.5"],
    ],
)
def test_ablations_and_switches_run(whole_run, tmp_path, capsys, extra):
    seeds = ["--seeds", str(whole_run / "seeds.jsonl")]
    assert azr.main([*SMALL, "--steps", "1", "--out", str(tmp_path / "r"), *seeds, *extra]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/1")]
    assert "nan" not in line and ("| valid " in line) == ("propose" in line) == ("fixed" not in extra)
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


def test_a_model_too_weak_to_seed_says_how_many_and_why(tmp_path, capfd):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), *SMALL, "--seed-limit", "4"]
    assert azr.main([*arguments, "--max-response", "8", "--out", str(tmp_path / "r")]) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "too weak" in message and "no_program" in message and len(message) < 500


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
        (["--resume", ""], "is not a run folder"),
        (["--seeds", "nowhere.jsonl"], "there is no file --seeds nowhere.jsonl"),
        (["--model", "m", "--keep-best"], "--keep-best needs --eval-every"),
        (["--model", "m", "--eval-suites", "aime24"], "--eval-suites needs --eval-every"),
        (["--preset", "0.5b-instruct"], "use --preset 0.5b, --template auto does the rest"),
        (["--tasks", "deduction,examples/missing.py"], "examples/missing.py"),
        (["--card", "24"], "--card 24 is for --dry-run"),
        (["--card", "nan", "--dry-run"], "--card nan"),
        (["--tasks", "deduction,divination"], "divination"),
        (["--template", "fancy"], "--template"),
        (["--device", "cuda"], "--device cpu"),
        (["--resume", "/nonexistent"], "config.json"),
        (["--eval-every", "5", "--eval-suites", ""], "--eval-suites"),
        (["--solve-prompts", "0", "--no-reuse-measurement-rollouts"], "--solve-prompts 0 leaves the solver nothing"),
        (["--solve-prompts", "0", "--control", "fixed"], "--solve-prompts 0 leaves the solver nothing"),
        (["--preset", "tiny", "--baseline", "task", "--no-reuse-measurement-rollouts"], "--baseline task needs"),
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
        (["--seeds", "induction.jsonl", "--tasks", "induction"], "holds no abduction or deduction seeds"),
        (["--eval-every", "1", "--eval-suites", "divination"], "choose from humaneval"),
        (["--eval-every", "1", "--eval-suites", "tasks:missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_turns_out_wrong_before_the_first_step_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    save_tasks(tmp_path / "nopython.jsonl", [KINDS["deduction"].zero(), Task("abduction", "def f(:", ["1"], ["1"])])
    save_tasks(tmp_path / "all_shown.jsonl", [replace(KINDS["induction"].zero(), visible=99)])
    save_tasks(tmp_path / "induction.jsonl", [KINDS["induction"].zero()])
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
        if path.is_file() and path.name != Path(file).name:
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

    result = cli("--resume", str(folder), "--steps", "4", preexec_fn=limit)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert (folder / "checkpoint").resolve().name == "checkpoint-000003"
    assert not list(folder.glob("*.partial"))
    assert azr.main(["--resume", str(folder), "--steps", "3"]) == 0
    assert_same_run(whole_run, folder)


def test_the_best_checkpoint_is_saved_before_the_newest(whole_run, tmp_path, monkeypatch):
    """A kill between the two must not leave a run that goes on behind a best step it never kept."""
    saved, save, scores = [], azr.checkpoint.save, [0.1, 0.9]
    monkeypatch.setattr(azr.checkpoint, "save", lambda *arguments: (saved.append(arguments[-1]), save(*arguments)))
    monkeypatch.setattr(azr.evaluate, "during_training", lambda run: {"score": scores.pop(0), "eval/t/accuracy": 0.5})
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


def test_ctrl_c_while_the_first_record_is_written_leaves_a_run_that_begins_again(
    whole_run, tmp_path, monkeypatch, capsys
):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(azr.journal, "append", interrupted)
        seeds = ["--seeds", str(whole_run / "seeds.jsonl"), "--steps", "1"]
        assert azr.main([*SMALL, *seeds, "--out", str(folder)]) == 130
    assert "stopped before the first step" in capsys.readouterr().out and not (folder / "checkpoint").exists()
    assert azr.main(["--resume", str(folder)]) == 0
    assert (folder / "metrics.jsonl").read_text().count('"step"') == 2


def test_a_broken_trainer_state_says_what_to_do(whole_run, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "r", symlinks=True)
    path = tmp_path / "r/checkpoint/trainer.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert azr.main(["--resume", str(tmp_path / "r"), "--steps", "4"]) == 2
    assert "trainer.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, words",
    [
        ("policy.transformers_engine.TransformersEngine._decode", "propose .*--memory"),
        ("trr.update", "update .*--token-budget"),
    ],
)
def test_out_of_memory_names_the_flag_to_lower_and_leaves_the_checkpoint(
    whole_run, tmp_path, capsys, monkeypatch, place, words
):
    """The error is the allocator's own, raised in the middle of a step."""
    shutil.copytree(whole_run, tmp_path / "r", symlinks=True)
    with monkeypatch.context() as patch:
        fail, train = lambda *_, **__: torch.empty(1 << 50, dtype=torch.uint8), azr.train  # not yet in the check
        patch.setattr(azr, "train", lambda run: (patch.setattr(place, fail), train(run)))
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
    assert resolve_model("Qwen/Qwen2.5-3B-Coder") == "Qwen/Qwen2.5-Coder-3B"


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path, capsys):
    assert azr.main(["--dry-run", "--out", str(tmp_path / "r")]) == 0
    assert "rollouts" in capsys.readouterr().out and not (tmp_path / "r").exists()


def test_a_dry_run_plans_for_a_card_that_is_not_here(tmp_path, capsys):
    """3B on 24 GB: the optimizer moves to host memory, and the plan says how much of that it takes, here or not."""
    sizes = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_key_value_heads": 2}
    Qwen2Config(**sizes, vocab_size=151936, tie_word_embeddings=True).save_pretrained(tmp_path / "3b")
    assert azr.main(["--dry-run", "--card", "24", "--preset", "3b", "--model", str(tmp_path / "3b")]) == 0
    printed = capsys.readouterr().out
    assert "engine vllm | device cuda | bfloat16" in printed
    assert "host memory needed: 37 GB beside a card of 24 GB" in printed


@pytest.mark.parametrize(
    ("name", "typed", "templated", "used"),
    [
        ("Tiny-Instruct", "auto", True, "chat"),
        ("tiny-chat-v1", "auto", True, "chat"),
        ("Tiny-Instruct", "auto", False, "plain"),
        ("tiny", "auto", True, "plain"),
        ("tiny", "chat", True, "chat"),
        ("Tiny-Instruct", "plain", True, "plain"),
    ],
)
def test_the_template_follows_the_name_and_the_tokenizer(name, typed, templated, used):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}" if templated else None
    assert choose_template(Config(model=f"org/{name}", template=typed), tokenizer) == used


def test_sources_of_a_kind_have_buffers_and_seeds_of_their_own(tmp_path):
    """Induction alone: its proposals describe programs of the other two, which are neither proposed nor solved."""
    assert azr.main([*SMALL, "--tasks", "induction", "--steps", "1", "--out", str(tmp_path / "r")]) == 0
    assert {path.stem for path in (tmp_path / "r/buffers").iterdir()} == set(KINDS)
    assert {json.loads(line)["kind"] for line in (tmp_path / "r/tasks.jsonl").open()} == {"induction"}


def test_a_run_folder_of_other_kinds_is_refused_and_one_of_an_old_preset_goes_on(whole_run, tmp_path, capsys):
    folder = shutil.copytree(whole_run, tmp_path / "r", symlinks=True)
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= {"tasks": f"deduction,{HERE / 'examples/rewriting.py'}"}
    (folder / "config.json").write_text(json.dumps(about))
    assert azr.main(["--resume", str(folder), "--steps", "4"]) == 2
    assert "is a run of other task types, without a buffer for" in capsys.readouterr().err
    about["config"] |= {"tasks": "deduction,gone.py"}
    (folder / "config.json").write_text(json.dumps(about))
    assert azr.main(["--resume", str(folder), "--steps", "4"]) == 2
    assert "gone.py" in (message := capsys.readouterr().err) and message.count("\n") == 1
    about["config"] |= {"tasks": ",".join(KINDS), "preset": "0.5b-instruct", "template": "plain"}
    (folder / "config.json").write_text(json.dumps(about))
    assert azr.main(["--resume", str(folder), "--steps", "3"]) == 0
    assert_same_run(whole_run, folder)


def test_config_defaults_are_valid_and_every_field_has_help():
    Config(model="x").validate()
    assert all(item.metadata["help"] for item in Config.__dataclass_fields__.values())


def test_the_presets_page_is_current():
    assert presets_table() in (HERE / "docs/presets.md").read_text()


def test_help_needs_no_torch():
    """Help in under a second of processor time: what takes seconds is importing torch, so it must not be."""
    for program in ("azr.py", "evaluate.py"):
        code = f"import runpy, sys; sys.argv = ['{program}', '--help']\n"
        code += f"try: runpy.run_path('{program}', run_name='__main__')\n"
        code += "except SystemExit: assert 'torch' not in sys.modules, 'torch was imported'"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
        assert result.returncode == 0 and "--model" in result.stdout, result.stderr


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(given):
    code = "import os, sys, azr; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {
        name: value for name, value in ENVIRONMENT.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=environment | given
    )
    expected = given.get("GOMP_SPINCOUNT", "None" if given else "3000")
    assert result.stdout.split() == [expected, "True"], result.stderr
