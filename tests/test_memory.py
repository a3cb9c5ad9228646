"""memory.py against real models: parameter counts on the meta device, bytes that autograd really keeps, and the budget
table of a 3B model worked out by hand (GiB)."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from policy import memory
from policy.memory import (
    GB,
    GiB,
    activation_bytes,
    count_parameters,
    decode_limit,
    estimate_seconds,
    kv_bytes_per_token,
    plan,
)

CODER_3B = Qwen2Config(
    hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
CODER_HALF_B = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


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
        CODER_HALF_B,
        CODER_3B,
    ],
    ids=lambda config: f"{config.model_type}-{config.hidden_size}",
)
def test_the_parameter_count_is_exact(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_activations_are_what_autograd_keeps(kind, dtype, width, checkpointing):
    config = small(kind, hidden_size=128, intermediate_size=512)
    saved, _ = activation_bytes(config, TOKENS, checkpointing, width)
    assert saved == pytest.approx(kept_by_autograd(config, dtype, checkpointing), rel=0.05)


def test_bytes_of_the_3b_model():
    assert count_parameters(CODER_3B) == pytest.approx(3.09e9, rel=0.002)
    assert kv_bytes_per_token(CODER_3B) == 36 * 1024
    saved, layer = activation_bytes(CODER_3B, 4096, checkpointing=True)
    assert (saved + layer) / GiB == pytest.approx(1.6, rel=0.1)


def table(card_gb: float, kv_gib: float, **overrides):
    """A plan with the settings of the hand-made table: bf16 gradients, checkpointing, 4k-token micro-batches."""
    settings = {"gradient_checkpointing": True, "token_budget": 4096, "kv_cache_bytes": int(kv_gib * GiB)} | overrides
    return plan(
        CODER_3B, card_bytes=int(card_gb * GB), free_host_bytes=100 * GB, max_len=4096, sequences=64,
        gradient_bytes=2, overrides=settings,
    )  # fmt: skip


def test_budget_table_of_the_3b_model():
    on_24 = table(24, 4, offload_optimizer=True, sleep=True)
    assert on_24.train_peak / GiB == pytest.approx(16.7, rel=0.1)
    assert on_24.rollout_peak / GiB == pytest.approx(18.2, rel=0.1)
    assert on_24.host_bytes / GiB == pytest.approx(34.5, rel=0.01)

    on_80 = table(80, 10, offload_optimizer=False, sleep=False)
    resident = on_80.parts["engine weights"][0] + on_80.parts["KV cache"][0] + on_80.parts["engine workspace"][0]
    assert (on_80.train_peak - resident) / GiB == pytest.approx(51.7, rel=0.1)
    assert on_80.train_peak / GiB == pytest.approx(69, rel=0.1)

    # 48 GB: bf16 moments instead of fp32 (half of 8 bytes per parameter), asleep during the update.
    moments = 4 * on_80.parameters
    asleep = table(80, 4, offload_optimizer=False, sleep=True)
    assert (asleep.train_peak - moments) / GiB == pytest.approx(39.7, rel=0.1)
    assert (asleep.rollout_peak - moments) / GiB == pytest.approx(41.3, rel=0.1)
    with pytest.raises(ValueError, match="offload"):  # full fp32 Adam does not fit there
        table(48, 4, offload_optimizer=False, sleep=True)

    on_141 = table(141, 40, offload_optimizer=False, sleep=False)
    assert on_141.train_peak <= on_141.limit


def chosen(card_gb, config=CODER_3B, **more):
    settings = {"free_host_bytes": 100 * GB, "max_len": 4096, "sequences": 1728, "gradient_bytes": 2} | more
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
            found = chosen(card_gb, config, engine=engine, max_len=max_len, gradient_bytes=4)
        except ValueError as error:
            assert "--m" in str(error)
            assert card_gb <= 24
            continue
        assert max(found.train_peak, found.rollout_peak) <= found.limit < card_gb * GB
        assert found.token_budget >= max_len
        assert found.kv_cache_bytes // kv_bytes_per_token(config) // 16 * 16 > max_len  # in whole blocks, one unused
        assert found.host_bytes <= 100 * GB
        if engine == "transformers":
            assert not found.sleep and "engine weights" not in found.parts


def test_a_cpu_holds_fp32_weights_gradients_and_moments_and_no_second_copy():
    found = chosen(None, CODER_HALF_B, engine="transformers", free_host_bytes=16 * GB, gradient_bytes=4)
    held = sum(found.parts[name][0] for name in ("policy weights", "gradients", "optimizer (master and moments)"))
    assert held == 16 * found.parameters
    assert found.device == "cpu" and not (found.sleep or found.offload_optimizer)


def test_the_rollout_phase_counts_what_reading_prompts_and_sampling_take():
    s = memory.shape(CODER_3B)
    settings = {"engine": "transformers", "max_len": 20_000}
    short, long = (chosen(80, max_prompt=tokens, **settings) for tokens in (2048, 16384))
    assert short.kv_cache_bytes == long.kv_cache_bytes
    layer = (16384 - memory.PREFILL_TOKENS) * 2 * (4 * s["inner"] + 2 * s["hidden"])  # one layer of longer prompts
    assert long.rollout_peak - short.rollout_peak == pytest.approx(layer, rel=0.01)
    busy, idle = (chosen(80, sequences=count, overrides={"kv_cache_bytes": 8 * GB}) for count in (400, 100))
    assert (busy.max_num_seqs, idle.max_num_seqs) == (400, 100)
    assert busy.rollout_peak - idle.rollout_peak == pytest.approx(300 * s["vocab"] * 6, rel=0.01)  # their logits


def test_overrides_are_kept_and_named():
    found = chosen(141, overrides={"gradient_checkpointing": True, "token_budget": 6000, "sleep": None})
    assert found.gradient_checkpointing and found.token_budget == 6000
    assert "as given" in found.reasons["gradient_checkpointing"]
    with pytest.raises(ValueError, match="no setting named tokens"):
        chosen(141, overrides={"tokens": 1})


def test_what_does_not_fit_says_what_to_lower():
    with pytest.raises(ValueError, match="--max-prompt and --max-response .* 16384 at most"):
        chosen(24, max_len=100_000)
    with pytest.raises(ValueError, match="smaller --model"):
        chosen(8)
    with pytest.raises(ValueError, match="host memory .* smaller --model"):
        chosen(24, free_host_bytes=8 * GB)  # the optimizer fits neither here nor there
    with pytest.raises(ValueError, match="--token-budget"):
        chosen(24, overrides={"token_budget": 200_000})


def test_describe_shows_parts_phases_and_reasons():
    found = chosen(24)
    text = found.describe()
    for words in ("policy weights", "KV cache", "predicted peak", "in host memory", "sleep: on: policy and engine"):
        assert words in text
    assert f"{found.train_peak / GB:.2f}" in text and f"{found.rollout_peak / GB:.2f}" in text


def test_decoding_limit_of_an_h200():
    """Bandwidth arithmetic done by hand with 4.3 TB/s: weights once per step plus all live keys and values."""
    for context, live, expected in [(700, 64, 35e3), (700, 256, 86e3), (1000, 128, 51e3), (1500, 512, 64e3)]:
        assert decode_limit(CODER_3B, "H200", live, context) == pytest.approx(expected, rel=0.05)
    assert decode_limit(CODER_3B, "H200", 4096, 100) == pytest.approx(989e12 / 6.2e9, rel=0.05)  # bound by arithmetic


def test_estimated_seconds():
    batch = {"prompts": 384, "sequences": 1920, "trained": 384, "prompt_tokens": 800, "response_tokens": 700}
    h200 = estimate_seconds(CODER_3B, chosen(141), "H200", **batch)
    assert h200["step"] == pytest.approx(sum(seconds for name, seconds in h200.items() if name != "step"))
    rate = batch["trained"] * 1500 / h200["update"]
    assert rate == pytest.approx(21.8e3, rel=0.1)  # 42 % of peak without checkpointing
    slower = estimate_seconds(CODER_3B, chosen(80), "A100", **batch)
    assert slower["generate"] > h200["generate"] and slower["update"] > h200["update"]
    assert (
        estimate_seconds(CODER_3B, chosen(24), "4090", **batch)["optimizer"] > 1
    )  # 24 bytes per parameter over the bus
    with pytest.raises(ValueError, match="choose one of H200"):
        estimate_seconds(CODER_3B, chosen(141), "abacus", **batch)


def test_gb_are_decimal():
    assert memory.GB == 10**9 and chosen(24).limit < 24 * 10**9
