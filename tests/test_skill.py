"""The queue of benchmarks/skill.py: it goes on after a stop, leaves alone what is done, and its tables count right."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import skill  # noqa: E402
from measuring import finished  # noqa: E402

from buffers import load_tasks, save_tasks  # noqa: E402
from harness.config import parse  # noqa: E402
from prompts import KINDS  # noqa: E402

FEW = "--batch 3 --rollouts 2 --seed-factor 1 --eval-every 1"


def test_the_queue_resumes_what_was_stopped_keeps_what_is_done_and_writes_its_files(tmp_path, monkeypatch, capsys):
    tasks, out = tmp_path / "held.jsonl", tmp_path / "runs"
    save_tasks(tasks, load_tasks(ROOT / "tiny/skill/dev.jsonl", KINDS)[:21])  # one of each kind and depth
    extra = f"{FEW} --eval-suites tasks:{tasks}"
    job = skill.Job("trained", 0, ())
    skill.train(job, out, f"{extra} --steps 1".split())
    assert finished(out / job.name)
    about = json.loads((out / job.name / "config.json").read_text())
    about["config"]["steps"] = 2  # as if it had been stopped after its first step
    (out / job.name / "config.json").write_text(json.dumps(about))
    (out / "logs" / "trained-0.flags").unlink()
    assert not finished(out / job.name)
    arguments = ["--seeds", "0", "--conditions", "trained", "--tasks", str(tasks), "--samples", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["skill.py", *arguments, "--extra", extra, "--results", str(tmp_path / "docs")])
    skill.main()
    log = out / "logs" / "trained-0.log"
    assert "after step 1" in log.read_text() and finished(out / job.name)
    result = json.loads((tmp_path / "docs/skill.json").read_text())
    assert result["n"] == 21 and result["n unshown"] == 9 == result["samples"]["tasks"]
    assert list(result["samples"]["pass"]["trained"]) == ["1", "4"] and list(result["base"]["greedy"]["depth"]) == [
        *"1234567"
    ]
    assert result["conditions"]["trained"]["runs"][0]["proposer"]["last"]["valid"] > 0
    kept = [json.loads(line) for line in (tmp_path / "docs/skill/trained-0.metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in kept] == [0, 1, 2]
    assert "eval/held/depth7/accuracy" in kept[-1] and not any("update/" in name for record in kept for name in record)
    assert "pass@k" in (tmp_path / "docs/skill.md").read_text()
    assert "statements of proposed programs" in (tmp_path / "docs/skill.svg").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "beyond" not in path.name}
    skill.main()
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "beyond" not in path.name}
    assert before == after


@pytest.mark.parametrize("flags", [*skill.CONDITIONS.values(), *skill.ablated().values()])
def test_every_setting_of_the_queue_is_a_valid_command(flags):
    config, _ = parse(["--preset", "tiny-skill", *flags])
    assert config.rollouts * config.batch == 128 or "--rollouts" in flags
    assert Path(config.eval_suites.split(":")[1]).parts[-3:] == ("tiny", "skill", "test.jsonl")


def test_settings_have_names_of_their_own():
    found, given = skill.ablated(), [flags for group in skill.ABLATIONS.values() for flags in group.values()]
    assert found["trained"] == [] and len(found) == len(set(map(tuple, given))) == 16
    assert all(found[skill.named(flags)] == flags for flags in given)


def test_unlocked_tasks_are_those_the_base_never_solved_and_lost_ones_the_reverse():
    def rows(*correct: bool) -> list[dict]:
        return [{"id": id, "correct": right} for id, right in zip("abcd", correct, strict=True)]

    samples = {"count": 4, "base": dict(zip("abcd", (0.0, 0.0, 0.25, 1.0), strict=True))}
    samples["trained-7"] = dict(zip("abcd", (0.5, 0.0, 0.0, 1.0), strict=True))
    runs = {"trained": [{"greedy": rows(True, False, False, True)}]}
    found = skill.sampled(samples, rows(False, False, True, True), runs, [7])
    assert found["unlocked"] == {"trained": [1]} and found["lost"] == {"trained": [1]}
    assert found["never"] == {"base": [2], "trained": [2]}
    assert skill.sampled(samples, rows(False, False, True, True), runs, [8])["pass"].keys() == {"base"}  # not sampled
    assert found["pass"]["base"] == {"1": pytest.approx(0.3125), "4": pytest.approx(0.5)}


def test_differences_are_paired_by_seed_and_task():
    def rows(*correct: bool) -> list[dict]:
        kinds = [kind for kind in KINDS for _ in range(2)] * 2
        depths = [5] * 6 + [2] * 6
        return [{"kind": k, "depth": d, "correct": c} for k, d, c in zip(kinds, depths, correct, strict=True)]

    before, after = [rows(*[False] * 12)], [rows(*[True] * 6, *[False] * 6), rows(*[True] * 3, *[False] * 9)]
    found = skill.compare(before, after)
    assert found["unshown"]["per_seed"] == [1.0, 0.5] and found["unshown"]["mean"] == 0.75
    assert found["shown"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "per_seed": [0.0, 0.0]}
    assert found["unshown"]["low"] < 0.75 < found["unshown"]["high"]


def test_a_folder_is_not_taken_for_a_run_with_other_flags(tmp_path):
    job = skill.Job("trained", 0, ())
    skill.claim(tmp_path / job.name, ["--steps", "60"], tmp_path / "logs" / "trained-0.log")
    skill.claim(tmp_path / job.name, ["--steps", "300"], tmp_path / "logs" / "trained-0.log")  # nothing was run yet
    (tmp_path / job.name).mkdir()
    with pytest.raises(SystemExit, match="made with other flags or tasks .* give another --out"):
        skill.train(job, tmp_path, ["--steps", "60"])
    assert not list((tmp_path / job.name).iterdir())


def test_the_table_of_ablations_compares_with_the_first_setting_of_a_group(tmp_path):
    def rows(right: int) -> str:
        found = [(kind, i) for kind in KINDS for i in range(8)]  # four deep ones and four others of each kind
        lines = [{"kind": k, "depth": 5 if i < 4 else 2, "correct": i < right or i >= 4} for k, i in found]
        return "".join(json.dumps(line | {"mode": "greedy", "reasons": True}) + "\n" for line in lines)

    (tmp_path / "rows").mkdir()
    for name, right in (("base", 1), ("trained-0", 3), ("zero-reward-0-5-0", 2)):
        (tmp_path / "rows" / f"{name}.jsonl").write_text(rows(right))
        (tmp_path / name).mkdir()
        (tmp_path / name / "timing.jsonl").write_text('{"step": 1, "seconds/step": 60}\n')
        task = {"step": 1, "kind": "deduction", "solve_rate": 0.5, "program": "def f(x):\n    x = x\n    return x"}
        (tmp_path / name / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    result, table = skill.ablation_table(tmp_path, [0], ["reward at r = 0 and 1"])
    [first, second] = result["groups"]["reward at r = 0 and 1"].values()
    assert first["difference"] is None and first["gain"]["unshown"]["per_seed"] == [0.5] and first["depth"]["5"] == 0.75
    assert second["difference"]["unshown"]["per_seed"] == [-0.25] and second["runs"][0]["minutes"] == 1
    assert "| -0.5 | 50.0 | +25.0 [" in table and table.rstrip().endswith("| 1.0 |")
