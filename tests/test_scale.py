"""scale/: the same run in azr.py, in one process of the bridge and in two that torchrun starts, on a CPU with gloo.

Everything is real: the embedded model, TRL's trainer, two processes. They play all their runs (`two_processes`) in one
launch, because importing takes longer than a step.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("trl", reason="scale/ needs TRL: pip install -r requirements-scale.txt")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import azr
import executor
from harness.config import TINY_MODEL
from policy.optimizer import MasterAdamW
from prompts import KINDS
from scale import run as scale
from scale.spread import Ranks
from scale.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).resolve().parent.parent
SMALL = ["--preset", "tiny", "--batch", "3", "--rollouts", "2", "--inputs", "4", "--seed-factor", "1"]
SMALL += ["--token-budget", "1500", "--engine", "transformers", "--device", "cpu"]
SMALL += ["--no-reuse-measurement-rollouts", "--eval-every", "2", "--steps", "2"]
SMALL += ["--eval-suites", f"tasks:{TINY_MODEL.parent / 'test.jsonl'}:4"]
TEXTS = ["tasks.jsonl", "rollouts.jsonl", "seeds.jsonl", *(f"buffers/{kind}.jsonl" for kind in KINDS)]
QUICK = ["--eval-every", "0", "--steps", "1"]  # after SMALL, and with the seeds that were made already


# ---------------------------------------------------------------------------------------------------------------------
# What the two processes do


@contextlib.contextmanager
def patched(owner, name: str, make):
    """`owner.name` replaced by make(what it was)."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def recording(found: dict):
    """Fills `found` with the trainer and with the gradient of its first step, before it is clipped."""

    def attach(before):
        def attached(trainer, *arguments):
            found["trainer"] = trainer
            before(trainer, *arguments)

        return attached

    def clip(before):
        def clipped(accelerator, *arguments):
            named = found["trainer"].run.policy.named_parameters()
            found.setdefault("gradient", {name: p.grad.clone() for name, p in named if p.grad is not None})
            return before(accelerator, *arguments)

        return clipped

    with patched(Trainer, "attach", attach), patched(Accelerator, "clip_grad_norm_", clip):
        yield


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in trainer.run.policy.named_parameters()}


def state(trainer: Trainer) -> dict:
    adam, named = trainer.optimizer.optimizer, trainer.run.policy.named_parameters()
    buffers = {kind: [vars(task) for task in buffer] for kind, buffer in trainer.run.buffers.items()}
    return {"weights": weights(trainer), "moments": {n: dict(adam.state[p]) for n, p in named}, "buffers": buffers}


def poisoned(before):
    """Rewards that make the gradient a NaN."""

    def give(run, proposals, attempts, step):
        before(run, proposals, attempts, step)
        attempts[-1].advantage = float("nan")

    return give


def as_gpus(before):
    """accelerate shards on GPUs only: let these processes pass for some."""

    def create(trainer):
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        before(trainer)

    return create


def said(*arguments: str) -> tuple[int, str]:
    """Exit code of the command and what it wrote to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = scale.main([*SMALL, *arguments])
    return code, errors.getvalue()


def two_processes(folder: Path) -> None:
    """Every run that the tests below ask of two ranks; what they saw goes to RANK.pt."""
    rank, found = Ranks().rank, {}
    with recording(found):
        assert scale.main([*SMALL, "--out", str(folder / "two")]) == 0
    result = state(found["trainer"]) | {"gradient": found["gradient"]}
    seeds = ["--seeds", str(folder / "two/seeds.jsonl")]
    assert scale.main([*SMALL, *seeds, *QUICK, "--out", str(folder / "part")]) == 0
    assert scale.main(["--resume", str(folder / "part"), "--steps", "2"]) == 0
    assert scale.main([*SMALL, *seeds, "--eval-every", "0", "--out", str(folder / "whole")]) == 0

    def fails(before):
        def validate(*arguments):
            if rank == 1:
                raise OSError("the disk of this node is on fire")
            return before(*arguments)

        return validate

    with patched(executor.Executor, "validate", fails):
        result["error"] = said(*seeds, *QUICK, "--out", str(folder / "error"))

    def loses(before):
        def close_step(run, *arguments):
            ended = before(run, *arguments)
            if rank == 1:
                run.buffers["deduction"].tasks.popitem()
            return ended

        return close_step

    with patched(azr, "close_step", loses):
        result["differ"] = said(*seeds, "--eval-every", "0", "--out", str(folder / "differ"))
    with patched(azr, "give_rewards", poisoned), recording(found):
        assert scale.main([*SMALL, *seeds, *QUICK, "--out", str(folder / "poisoned")]) == 0
    result["poisoned"] = weights(found["trainer"])
    settings = yaml.safe_load((HERE / "scale/fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    os.environ |= {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in settings.items()}}
    with patched(scale, "SHARDED", lambda _: True), patched(Trainer, "create_accelerator_and_postprocess", as_gpus):
        assert scale.main([*SMALL, *seeds, *QUICK, "--out", str(folder / "sharded")]) == 0
        with recording(found):
            assert scale.main(["--resume", str(folder / "sharded"), "--steps", "2"]) == 0
    result["shards"] = [type(weight).__name__ for weight in found["trainer"].model.parameters()]
    torch.save(result, folder / f"{rank}.pt")


# ---------------------------------------------------------------------------------------------------------------------
# The same run three times


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders: own (azr.py), one and two (the bridge), and what else `two_processes` leaves."""
    folder = tmp_path_factory.mktemp("scale")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["-m", "tests.test_scale", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(runs) -> list[dict]:
    return [torch.load(runs / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def gradients(runs, ranks) -> dict[str, dict]:
    """Of step 1, by run folder. Plays azr.py and the bridge in this process alone."""
    own, found = {}, {}

    def step(before):
        def stepped(adam, *arguments):
            own.update({} if own else {name: p.grad.clone() for name, p in adam.params.items()})
            return before(adam, *arguments)

        return stepped

    with patched(MasterAdamW, "step", step):
        assert azr.main([*SMALL, "--out", str(runs / "own")]) == 0
    with recording(found):
        assert scale.main([*SMALL, "--out", str(runs / "one")]) == 0
    return {"own": own, "one": found["gradient"], "two": ranks[0]["gradient"]}


def test_texts_seeds_and_buffers_are_the_same_bytes(runs, gradients):
    for name in TEXTS:
        expected = (runs / "own" / name).read_bytes()
        assert expected and (runs / "one" / name).read_bytes() == expected, name
        assert (runs / "two" / name).read_bytes() == expected, name


@pytest.mark.parametrize("run", ["one", "two"])
def test_the_gradient_of_a_step_is_that_of_azr(gradients, run):
    own, other = (torch.cat([gradients[name][key].flatten() for key in gradients["own"]]) for name in ("own", run))
    assert own.norm() > 0 and (own - other).norm() < 1e-4 * own.norm()


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", ["one", "two"])
def test_metrics_are_those_of_azr_key_by_key(runs, gradients, run):
    """Texts, rewards and advantages give equal numbers; only what the update measures is rounded in another order."""
    pairs = list(zip(records(runs / "own"), records(runs / run), strict=True))
    assert len(pairs) == 3 and "eval/test/accuracy" in pairs[0][0] and "score" in pairs[2][0]
    assert any(key.endswith("measure_accuracy") for key in pairs[1][0])
    for own, other in pairs:
        assert list(own) == list(other)
        rounded = [key for key in own if key.startswith("update/") or key.endswith("entropy")]
        assert {key: other[key] for key in rounded} == pytest.approx({key: own[key] for key in rounded}, 1e-3, 1e-6)
        assert [own[key] for key in own if key not in rounded] == [other[key] for key in own if key not in rounded]


def test_rank_1_has_the_state_of_rank_0(ranks):
    first, second = ranks
    assert first["buffers"] == second["buffers"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
        assert all(torch.equal(moment, second["moments"][name][key]) for key, moment in first["moments"][name].items())


def test_only_the_first_rank_writes(runs):
    steps = [json.loads(line)["step"] for line in (runs / "two/timing.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_a_resumed_run_of_two_is_bit_identical(runs):
    for name in [*TEXTS[:2], *TEXTS[3:], "metrics.jsonl", "checkpoint/model.safetensors"]:
        assert (runs / "whole" / name).read_bytes() == (runs / "part" / name).read_bytes(), name
    whole, part = (torch.load(runs / name / "checkpoint/trainer.pt")["optimizer"] for name in ("whole", "part"))
    assert whole["steps"] == part["steps"] == 2
    assert (runs / "whole" / "report.html").exists()  # also of a run that has no memory plan
    assert all(torch.equal(moment, part["exp_avg_sq"][name]) for name, moment in whole["exp_avg_sq"].items())


def test_sharded_weights_play_the_same_run(runs, ranks):
    """FSDP2 with the settings of scale/fsdp2.yaml, resumed after a step from a checkpoint of whole weights."""
    assert set(ranks[0]["shards"]) == set(ranks[1]["shards"]) == {"DTensor"}
    for name in [*TEXTS[:2], *TEXTS[3:]]:
        assert (runs / "whole" / name).read_bytes() == (runs / "sharded" / name).read_bytes(), name
    before = load_file(TINY_MODEL / "model.safetensors")
    whole, sharded = (load_file(runs / name / "checkpoint/model.safetensors") for name in ("whole", "sharded"))
    moved = torch.cat([(weight - before[name].float()).flatten() for name, weight in whole.items()]).norm()
    assert moved > 0 and torch.cat([(whole[name] - sharded[name]).flatten() for name in whole]).norm() < 1e-3 * moved


def test_a_run_moves_between_azr_and_the_bridge(runs, gradients, tmp_path):
    """The third step, by azr.py after two steps on two ranks, and by the bridge after two steps of azr.py."""
    for name in ("own", "two"):
        shutil.copytree(runs / name, tmp_path / name, symlinks=True)
    assert azr.main(["--resume", str(tmp_path / "two"), "--steps", "3"]) == 0
    assert scale.main(["--resume", str(tmp_path / "own"), "--steps", "3"]) == 0
    for name in TEXTS:
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for name in ("own", "two"):
        saved = torch.load(tmp_path / name / "checkpoint/trainer.pt")
        assert saved["step"] == saved["optimizer"]["steps"] == len(records(tmp_path / name)) - 1 == 3


# ---------------------------------------------------------------------------------------------------------------------
# What stops or skips


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "what, words", [("error", "rank 1: the disk of this node is on fire"), ("differ", "the buffers of rank 1 are not")]
)
def test_an_error_on_one_rank_and_ranks_that_differ_stop_both(ranks, rank, what, words):
    code, errors = ranks[rank][what]
    assert code == 2 and words in errors.splitlines()[-1]


def test_a_gradient_that_is_not_finite_is_skipped_as_in_azr(runs, ranks, gradients, tmp_path):
    seeds = ["--seeds", str(runs / "two/seeds.jsonl")]
    with patched(azr, "give_rewards", poisoned):
        assert azr.main([*SMALL, *seeds, *QUICK, "--out", str(tmp_path / "own")]) == 0
    own, other = records(tmp_path / "own")[1], records(runs / "poisoned")[1]
    assert own["update/steps"] == other["update/steps"] == 0 and list(own) == list(other)
    before = load_file(TINY_MODEL / "model.safetensors")
    for rank in ranks:
        assert all(torch.equal(weight, before[name].float()) for name, weight in rank["poisoned"].items())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--minibatches", "2"],
        ["--lora", "4"],
        ["--memory", "8"],
        ["--dry-run"],
        ["--tensor-parallel", "2"],
        ["--eval-suites", "humaneval+"],
        ["--engine", "vllm"],
    ],
)
def test_what_the_bridge_cannot_honour_is_refused(arguments, tmp_path):
    code, errors = said(*arguments, "--out", str(tmp_path / "r"))
    assert code == 2 and len(errors.splitlines()) == 1 and not (tmp_path / "r").exists()
    assert (arguments[0] if arguments[1:] != ["vllm"] else "vLLM on GPUs only") in errors


def test_deepspeed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "DEEPSPEED", True)
    assert said("--out", str(tmp_path / "r"))[1].startswith("scale: scale/ does not take DeepSpeed")


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
