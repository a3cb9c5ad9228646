"""LoRA: adapters in place, merged weights for engine and checkpoint, exact resume. Real models, real peft."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import azr
from harness.check import rehearse
from harness.config import TINY_MODEL
from policy.load import choose_engine, load_policy, make_engine
from policy.lora import add_adapters, count_adapters, merged_weights, plain_shapes
from policy.optimizer import MasterAdamW
from policy.transformers_engine import TransformersEngine
from trr import Sample, update

pytest.importorskip("peft", reason="peft is not installed: pip install -r requirements-lora.txt")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
SIZES["num_key_value_heads"] = 2
SAMPLES = [Sample([1, 2, 3], [4, 5, 6, 7], 1.0), Sample([2, 9], [8, 1], -0.5)]


def build(tied: bool = False, dtype=torch.float32):
    torch.manual_seed(0)
    model = (
        Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
        if tied
        else LlamaForCausalLM(LlamaConfig(**SIZES))
    )
    return model.to(dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_add_nothing_at_first_and_only_they_move(tied, dtype):
    policy = build(tied, dtype)
    before = copy.deepcopy(policy.state_dict())
    expected = count_adapters(policy, 4)
    add_adapters(policy, 4)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == expected
    assert trained and all(".lora_" in name for name in trained)
    merged = dict(merged_weights(policy))
    assert list(merged) == list(before) and plain_shapes(policy) == {n: tuple(w.shape) for n, w in before.items()}
    assert all(torch.equal(merged[name], before[name]) for name in before)
    optimizer = MasterAdamW(policy, weight_decay=0.0)
    assert set(optimizer.params) == trained
    update(policy, optimizer, SAMPLES, lr=1e-2)
    after = policy.state_dict()
    for name, weight in before.items():
        layer, _, what = name.rpartition(".")
        assert torch.equal(after[name] if name in after else after[f"{layer}.base_layer.{what}"], weight), name
    moved = {name for name, weight in merged_weights(policy) if not torch.equal(weight, before[name])}
    assert moved and all("_proj" in name for name in moved)


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_folder_computes_what_the_policy_does(tied, tmp_path):
    policy = build(tied)
    add_adapters(policy, 4)
    update(policy, MasterAdamW(policy), SAMPLES, lr=1e-2)
    policy.save_pretrained(tmp_path, state_dict=dict(merged_weights(policy)))
    folder = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(1, 40)[None]
    assert torch.allclose(policy(ids).logits, folder(ids).logits, atol=1e-5)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


SMALL = ["--preset", "tiny", "--lora", "4", "--lr", "1e-2", "--batch", "3", "--rollouts", "2", "--seed-factor", "1"]
SMALL += ["--eval-every", "0", "--engine", "transformers", "--device", "cpu"]


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert azr.main([*SMALL, "--steps", "2", "--out", str(whole)]) == 0
    assert azr.main([*SMALL, "--steps", "1", "--out", str(part)]) == 0
    assert azr.main(["--resume", str(part), "--steps", "2"]) == 0
    torch.set_num_threads(threads)
    for name in ("metrics.jsonl", "tasks.jsonl", "checkpoint/model.safetensors"):
        assert (whole / name).read_bytes() == (part / name).read_bytes(), name
    base, merged = load_file(TINY_MODEL / "model.safetensors"), load_file(whole / "checkpoint/model.safetensors")
    assert base.keys() == merged.keys()
    assert any(not torch.equal(base[name].float(), merged[name].float()) for name in base)
    states = [torch.load(path / "checkpoint/trainer.pt") for path in (whole, part)]
    for name, master in states[0]["optimizer"]["master"].items():
        assert ".lora_" in name and torch.equal(master, states[1]["optimizer"]["master"][name])


def test_wrong_ranks_are_one_sentence(tmp_path, capsys):
    assert azr.main([*SMALL, "--lora", "100000", "--out", str(tmp_path / "r")]) == 2
    assert "--lora 100000 is more than the" in capsys.readouterr().err


@pytest.fixture(scope="module")
def engine_of_the_tiny_model():
    """vLLM where it is installed (run this file alone: a process holds one vLLM), else the policy's own decoding."""
    policy, tokenizer = load_policy(str(TINY_MODEL), "cpu", "float32")
    add_adapters(policy, 8)
    kind = choose_engine("auto")
    for_vllm = {"max_num_seqs": 8, "kv_cache_bytes": 1 << 27} if kind == "vllm" else {}
    return make_engine(kind, str(TINY_MODEL), policy, tokenizer, max_model_len=128, **for_vllm), policy, tokenizer


def test_the_engine_follows_the_adapters(engine_of_the_tiny_model):
    engine, policy, tokenizer = engine_of_the_tiny_model
    prompts = [tokenizer.encode("def f(x):"), tokenizer.encode("x = ")]
    optimizer = MasterAdamW(policy)
    rehearse(policy, tokenizer, engine, optimizer.clear, prompts)
    for _ in range(5):
        update(policy, optimizer, [Sample(prompts[0], [5, 6, 7, 8], 1.0)], lr=3e-2)
    engine.sync(policy)
    rehearse(policy, tokenizer, engine, optimizer.clear, prompts)
    plain = LlamaForCausalLM(policy.config)
    plain.load_state_dict(dict(merged_weights(policy)))
    greedy = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    own = TransformersEngine(plain.eval(), tokenizer, 128, 1024)
    assert [c[0].token_ids for c in engine.generate(prompts, **greedy)] == [
        c[0].token_ids for c in own.generate(prompts, **greedy)
    ]
