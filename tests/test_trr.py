"""Tests of trr.py, logprobs.py and optimizer.py against naive float64 numpy versions and on small real models."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from policy.logprobs import token_logprobs
from policy.optimizer import MasterAdamW, learning_rate
from trr import (
    Sample,
    advantages,
    can_pack,
    collate,
    micro_batches,
    objective,
    proposer_reward,
    response_logprobs,
    solver_reward,
    update,
    whiten,
)

VOCAB = 61


def tiny_policy(kind: str = "llama", tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A real two-layer model with grouped attention, large enough weights that attention matters."""
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(seed)
    policy = model(
        config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            max_position_embeddings=256,
        )
    )
    return policy.to(dtype).eval()


def some_samples(seed: int = 0, rows: int = 7, engine: bool = False) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(rows):
        prompt, size = rng.integers(VOCAB, size=rng.integers(1, 12)), int(rng.integers(1, 20))
        logprobs = (-rng.uniform(1, 8, size)).tolist() if engine else None
        samples.append(Sample(prompt.tolist(), rng.integers(VOCAB, size=size).tolist(), float(rng.normal()), logprobs))
    return samples


class KeepGradients:
    """Stands where the optimizer stands and keeps the summed gradients instead of stepping."""

    def __init__(self, policy):
        self.policy, self.grads = policy, None

    def step(self, lr: float, grad_clip: float) -> float:
        self.grads = {n: p.grad.double() for n, p in self.policy.named_parameters()}
        self.policy.zero_grad()
        return math.sqrt(sum(float(g.square().sum()) for g in self.grads.values()))


def gradients(policy, samples, **options):
    keeper = KeepGradients(policy)
    result = update(policy, keeper, samples, lr=0.0, **options)
    return keeper.grads, result


def relative_distance(a: dict, b: dict) -> float:
    distance = sum(float((a[n] - b[n]).square().sum()) for n in a)
    return math.sqrt(distance / sum(float(b[n].square().sum()) for n in b))


def naive_logprobs(policy, sample):
    """Log-softmax of all logits of one unpadded row, float64: (response length, V)."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logits = policy(ids).logits[0, len(sample.prompt_ids) - 1 : -1].double()
    return torch.log_softmax(logits, -1)


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize(
    ("solve_rate", "paper", "official"),
    [(0.0, 0.0, -0.5), (1 / 8, 7 / 8, 7 / 8), (4 / 8, 0.5, 0.5), (7 / 8, 1 / 8, 1 / 8), (1.0, 0.0, -0.5)],
)
def test_proposer_reward_r_over_8_rollouts(solve_rate, paper, official):
    assert proposer_reward(True, True, solve_rate) == paper
    assert proposer_reward(True, True, solve_rate, zero_reward=-0.5) == official


def test_a_task_that_is_not_new_earns_no_more_than_the_bound():
    assert [proposer_reward(True, True, r, 0.0, most=-0.5) for r in (0.0, 0.25, 1.0)] == [-0.5] * 3
    assert proposer_reward(True, True, 0.25, 0.0, most=0.5) == 0.5
    assert proposer_reward(True, True, 0.75, 0.0, most=0.5) == 0.25  # a bound, not a value
    assert proposer_reward(False, True, None, most=-0.5) == proposer_reward(True, False, 0.25, most=-0.5) == -1.0


def test_proposer_reward_of_invalid_or_badly_formed_is_minus_one():
    assert proposer_reward(False, True, None) == proposer_reward(False, False, None) == -1.0
    assert proposer_reward(True, False, 0.5) == -1.0


@pytest.mark.parametrize("solve_rate", [None, -0.1, 1.1, math.nan])
def test_proposer_reward_needs_a_solve_rate(solve_rate):
    with pytest.raises(ValueError, match="solve rate"):
        proposer_reward(True, True, solve_rate)


def test_solver_reward_table():
    assert solver_reward(True, True) == 1.0
    assert solver_reward(True, False) == -0.5
    assert solver_reward(False, True) == solver_reward(False, False) == -1.0


# ----------------------------------------------------------------------------------------------------------------------
# Advantages


def naive_whiten(rewards, cells, lengths, weighting):
    out = np.zeros(len(rewards))
    for cell in set(cells):
        rows = [i for i in range(len(rewards)) if cells[i] == cell]
        # The token form written as its definition: every token is one observation of its row's reward.
        repeated = [rewards[i] for i in rows for _ in range(lengths[i] if weighting == "token" else 1)]
        if len({rewards[i] for i in rows}) == 1:
            continue
        for i in rows:
            out[i] = (rewards[i] - np.mean(repeated)) / np.sqrt(np.var(repeated, ddof=1) + 1e-8)
    return out


@pytest.mark.parametrize("weighting", ["sequence", "token"])
def test_whiten_equals_naive_numpy(weighting):
    rng = np.random.default_rng(3)
    for _ in range(50):
        size = int(rng.integers(1, 40))
        rewards = rng.choice([-1.0, -0.5, 0.0, 0.125, 0.875, 1.0], size).tolist()
        cells = [(kind, role) for kind, role in rng.integers(0, 3, (size, 2)).tolist()]
        lengths = rng.integers(1, 300, size).tolist()
        expected = naive_whiten(rewards, cells, lengths, weighting)
        np.testing.assert_allclose(whiten(rewards, cells, lengths, weighting).numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighting", ["sequence", "token"])
def test_group_with_equal_rewards_gets_advantages_all_zero(weighting):
    # 0.1 is not exact in binary: a mean of equal values may differ from them in the last bit.
    rewards = [0.1] * 7 + [1.0, -0.5]
    advantage = whiten(rewards, ["a"] * 7 + ["b"] * 2, [5, 3, 9, 1, 7, 7, 7, 2, 2], weighting)
    assert advantage[:7].tolist() == [0.0] * 7
    assert torch.isfinite(advantage).all() and (advantage[7:] != 0).all()


@pytest.mark.parametrize("weighting", ["sequence", "token"])
def test_group_with_one_row_gets_zero(weighting):
    assert whiten([1.0], ["a"], [10], weighting).tolist() == [0.0]
    assert whiten([1.0, 1.0, -1.0], ["a", "b", "b"], [10, 1, 1], weighting)[0] == 0.0


def test_group_plus_one_100_tokens_minus_half_300_tokens():
    rewards, cells, lengths = [1.0, -0.5], ["a", "a"], [100, 300]
    sequence = whiten(rewards, cells, lengths, "sequence")
    deviation = math.sqrt(2 * 0.75**2 + 1e-8)  # around mu = 0.25, n - 1 = 1
    np.testing.assert_allclose(sequence.numpy(), [0.75 / deviation, -0.75 / deviation], rtol=1e-12)
    token = whiten(rewards, cells, lengths, "token")
    deviation = math.sqrt((100 * 1.125**2 + 300 * 0.375**2) / 399 + 1e-8)  # around mu = -0.125
    np.testing.assert_allclose(token.numpy(), [1.125 / deviation, -0.375 / deviation], rtol=1e-12)


def test_a_baseline_per_task_compares_attempts_at_one_task_only():
    """An easy and a hard task of one cell: only who did better than the others at the same task is rewarded."""
    rewards, cells = [1.0, 1.0, 1.0, -0.5, 1.0, -0.5, -0.5, -0.5, 1.0], [("solve", "deduction")] * 9
    tasks = ["easy"] * 4 + ["hard"] * 4 + ["once"]
    found = advantages(rewards, cells, tasks, [3] * 9, "task")
    less = np.array([0.375] * 3 + [-1.125] + [1.125] + [-0.375] * 3 + [0.0])
    np.testing.assert_allclose(found, less / math.sqrt(np.var(less, ddof=1) + 1e-8), rtol=1e-12)
    assert found[4] == 3 * found[0] > 0 == found[8]
    paper = advantages(rewards, cells, tasks, [3] * 9)
    assert torch.equal(paper, whiten(rewards, cells, [3] * 9)) and paper[0] == paper[4] == paper[8]


def test_a_baseline_per_task_leaves_other_cells_and_tasks_of_other_kinds_alone():
    cells = [("propose", "deduction")] * 3 + [("solve", "deduction")] * 2 + [("solve", "abduction")] * 2
    rewards, tasks = [0.875, 0.0, -1.0, 1.0, -0.5, 1.0, 1.0], ["", "", "", "a", "a", "a", "a"]
    found = advantages(rewards, cells, tasks, [5] * 7, "task")
    np.testing.assert_allclose(found[:3], whiten(rewards[:3], cells[:3], [5] * 3), rtol=1e-12)
    assert found[3] == -found[4] > 0 and not found[5:].any()


@pytest.mark.parametrize("weighting", ["sequence", "token"])
@pytest.mark.parametrize("attempts", [7, 8, 9])
def test_a_baseline_per_task_teaches_exactly_nothing_where_all_attempts_end_alike(weighting, attempts):
    rng = np.random.default_rng(attempts)
    rewards = [1.0] * attempts + [-0.5] * attempts + rng.choice([1.0, -0.5], 4 * attempts).tolist()
    tasks, lengths = np.repeat(range(6), attempts).tolist(), rng.integers(1, 90, 6 * attempts).tolist()
    found = advantages(rewards, ["solve"] * len(rewards), tasks, lengths, "task", weighting)
    assert not found[: 2 * attempts].any() and found[2 * attempts :].any()
    weight = torch.tensor(lengths if weighting == "token" else [1] * len(rewards), dtype=torch.float64)
    for rows in torch.arange(len(rewards)).split(attempts):
        assert abs((weight * found)[rows].sum()) < 1e-9 * weight[rows].sum()


def test_a_global_baseline_is_one_cell_for_all_rows():
    rewards, cells = [1.0, -0.5, 0.5, 0.5], ["a", "a", "b", "b"]
    found = advantages(rewards, cells, ["t"] * 4, [1, 2, 3, 4], "global", "token")
    assert torch.equal(found, whiten(rewards, [0] * 4, [1, 2, 3, 4], "token")) and found[2] > 0
    assert not advantages(rewards, cells, ["t"] * 4, [1, 2, 3, 4], "cell", "token")[2:].any()


def test_whiten_of_nothing_is_empty():
    assert whiten([], [], []).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], ["a"], [1], "per-token"), "weighting"),
        (([1.0, 2.0], ["a"], [1, 1]), "equal"),
        (([math.nan, 1.0], ["a", "a"], [1, 1]), "finite"),
        (([0.0, 1.0], ["a", "a"], [1, 0]), "at least one token"),
    ],
)
def test_whiten_rejects_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        whiten(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Chunked log-probabilities


@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_logprobs_equal_whole(chunk, entropy_grad, with_bias):
    torch.manual_seed(1)
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(VOCAB, (23,))
    mix = torch.randn(2, 23, dtype=torch.float64)
    leaves = [hidden, weight] + ([bias] if with_bias else [])

    def plain():
        logp = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias), -1)
        return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    chunked = token_logprobs(hidden, weight, targets, bias, chunk, entropy_grad)
    assert chunked[1].requires_grad == entropy_grad
    grads = []
    for logprob, entropy in (chunked, plain()):
        loss = (mix[0] * logprob).sum() + ((mix[1] * entropy).sum() if entropy_grad else 0.0)
        grads.append((logprob, entropy, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_chunked_logprobs_of_a_model_equal_full_logits(kind, tied):
    """Values and gradients of all parameters; with tied embeddings the head's gradient joins the input's."""
    policy = tiny_policy(kind, tied)
    sample = some_samples(rows=1)[0]
    logp = naive_logprobs(policy, sample)
    expected = logp.gather(-1, torch.tensor(sample.response_ids)[:, None]).squeeze(-1)
    expected.sum().backward()
    wanted = {n: p.grad.double().clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    batch = collate([sample], [0], False, policy.device)
    logprob, entropy = response_logprobs(policy, batch, chunk=3)
    logprob.sum().backward()
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)
    assert relative_distance({n: p.grad.double() for n, p in policy.named_parameters()}, wanted) < 1e-5


def test_bf16_hidden_states_get_an_fp32_softmax():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16).bfloat16().requires_grad_(), torch.randn(VOCAB, 16).bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (9,))
    logprob, entropy = token_logprobs(hidden, weight, targets, chunk=4)
    assert logprob.dtype == entropy.dtype == torch.float32
    logits = (hidden @ weight.T).float()  # the same rounded logits: only the softmax is compared
    torch.testing.assert_close(logprob, torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1))
    logprob.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_ids_beyond_the_vocabulary_have_no_part(entropy_grad):
    """A head with more rows than the tokenizer has ids: the same as with these rows cut off, and no gradient there."""
    hidden, weight, bias = torch.randn(9, 8), torch.randn(30, 8), torch.randn(30)
    targets, found = torch.arange(9), []
    for rows in (30, 21):
        leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight[:rows], bias[:rows])]
        logprob, entropy = token_logprobs(*leaves[:2], targets, leaves[2], chunk=4, entropy_grad=entropy_grad, size=21)
        torch.cat([logprob, entropy] if entropy_grad else [logprob]).square().sum().backward()
        found.append([logprob, entropy, leaves[0].grad, *(leaf.grad[:21] for leaf in leaves[1:])])
        assert not leaves[1].grad[21:].any() and not leaves[2].grad[21:].any()
    for whole, short in zip(*found, strict=True):
        torch.testing.assert_close(whole, short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_costs_no_gradient_of_its_size(dtype):
    """As with adapters, whose memory plan counts none."""
    hidden, weight, targets = torch.randn(20, 8, dtype=dtype), torch.randn(300, 8, dtype=dtype), torch.arange(20)
    bias, gradients = torch.randn(300, dtype=dtype), []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if function.overloadpacket._qualified_op_name in ("aten::zeros_like", "aten::mm"):  # no views
                shapes.append(tuple(made.shape))
            return made

    for frozen in (True, False):
        shapes, head = [], weight.clone().requires_grad_(not frozen)
        row = hidden.clone().requires_grad_()
        logprob, entropy = token_logprobs(row, head, targets, bias, chunk=5, entropy_grad=True)
        with Shapes():
            (logprob.sum() + entropy.sum()).backward()
        assert ((300, 8) in shapes) is not frozen and (head.grad is None) is frozen
        gradients.append(row.grad)
    assert torch.equal(*gradients)


def test_no_token_by_vocabulary_matrix_is_saved_for_backward():
    tokens, width, vocab = 64, 8, 1000
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(hidden, weight, targets, chunk=16, entropy_grad=True)
        chunked = max(saved)
        torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None])
    assert chunked == vocab * width  # the head itself
    assert max(saved) == tokens * vocab  # what the plain form keeps


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def naive_objective(logprob, entropy, old, engine, advantage, weight, clip_low, clip_high, coef, cap):
    loss, low, high = 0.0, 0, 0
    for lp, h, o, e, a, w in zip(logprob, entropy, old, engine, advantage, weight, strict=True):
        ratio = math.exp(lp - o)
        gain = min(ratio * a, min(max(ratio, 1 - clip_low), 1 + clip_high) * a)
        if cap is not None and not math.isnan(e):
            gain *= min(math.exp(o - e), cap)
        loss += w * (-gain - coef * h)
        low += a < 0 and ratio < 1 - clip_low
        high += a > 0 and ratio > 1 + clip_high
    return loss, low, high


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("coef", [0.0, 0.01])
def test_objective_equals_naive_numpy(cap, coef):
    rng = np.random.default_rng(5)
    n = 200
    logprob, old, engine = (-rng.uniform(0, 3, n) for _ in range(3))
    engine[::9] = math.nan
    entropy, advantage, weight = rng.uniform(0, 4, n), rng.normal(size=n), rng.uniform(0, 1 / n, n)
    arrays = (logprob, entropy, old, engine, advantage, weight)
    loss, report = objective(*(torch.tensor(x) for x in arrays), 0.2, 0.28, coef, cap)
    expected, low, high = naive_objective(*arrays, 0.2, 0.28, coef, cap)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert (float(report["clip_low"]), float(report["clip_high"])) == (low, high)
    assert low > 0 and high > 0
    assert float(report["mismatch"]) == pytest.approx(np.nansum(np.abs(old - engine)), rel=1e-5)


def test_clipping_stops_the_gradient_on_the_side_that_would_run_away():
    logprob = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    old, engine, one = torch.zeros(4), torch.full((4,), math.nan), torch.ones(4)
    loss, report = objective(logprob, torch.zeros(4), old, engine, torch.tensor([1.0, -1.0, 1.0, -1.0]), one)
    loss.backward()
    assert (logprob.grad != 0).tolist() == [False, True, True, False]
    assert (float(report["clip_low"]), float(report["clip_high"])) == (1.0, 1.0)


def test_truncated_importance_weight_scales_the_gradient_and_is_capped():
    logprob = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5])).requires_grad_()
    engine = torch.log(torch.tensor([0.5, 0.4, 0.1, 1.0]))
    engine[0] = math.nan
    loss, report = objective(
        logprob, torch.zeros(4), logprob.detach(), engine, torch.ones(4), torch.ones(4), tis_cap=2.0
    )
    loss.backward()
    torch.testing.assert_close(logprob.grad, -torch.tensor([1.0, 1.25, 2.0, 0.5]))
    assert float(report["tis_truncated"]) == 1.0 and float(report["tis_max"]) == 2.0
    assert float(report["tis_mean"]) == pytest.approx(1.25 + 2.0 + 0.5)


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize("coef", [0.0, 0.01])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_update_gradient_equals_the_loss_written_out_row_by_row(loss_mean, coef, cap):
    policy, samples = tiny_policy(), some_samples(engine=True)
    samples[2] = Sample(samples[2].prompt_ids, samples[2].response_ids, 0.0, None)
    tokens, loss = sum(len(s.response_ids) for s in samples), 0.0
    entropies = []
    for s in samples:
        logp = naive_logprobs(policy, s)
        chosen = logp.gather(-1, torch.tensor(s.response_ids)[:, None]).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        gain = s.advantage * torch.exp(chosen - chosen.detach())
        if cap is not None and s.engine_logprobs is not None:
            gain = gain * torch.exp(chosen.detach() - torch.tensor(s.engine_logprobs)).clamp(max=cap)
        share = 1 / tokens if loss_mean == "token" else 1 / (len(samples) * len(chosen))
        loss = loss - share * (gain + coef * entropy).sum()
        entropies.append(entropy.mean().item())
    loss.backward()
    wanted = {n: p.grad.double().clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    got, result = gradients(
        policy, samples, loss_mean=loss_mean, entropy_coef=coef, tis_cap=cap, token_budget=40, chunk=5
    )
    assert relative_distance(got, wanted) < 1e-5
    assert result.loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert result.ratio == 1.0 and result.steps == 1 and result.tokens == tokens
    assert (result.row_entropy[2] is None) == (coef == 0.0)
    for row, entropy in zip(result.row_entropy, entropies, strict=True):
        assert row is None or row == pytest.approx(entropy, rel=1e-4)
    assert (result.tis_mean is None) == (cap is None) and result.mismatch > 0


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches and layouts


def test_micro_batches_hold_every_row_once_within_the_budget():
    rng = np.random.default_rng(0)
    for packed in (True, False):
        lengths = rng.integers(1, 90, 60).tolist() + [500]
        groups = micro_batches(lengths, 200, packed)
        assert sorted(i for group in groups for i in group) == list(range(61))
        assert groups[0] == [60]  # longer than the budget: alone
        for group in groups[1:]:
            cost = sum(lengths[i] for i in group) if packed else len(group) * max(lengths[i] for i in group)
            assert cost <= 200
        assert len(groups) <= 1 + 2 * sum(lengths[:-1]) / 200


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_any_micro_batch_split_equals_one_batch(kind, packed):
    policy, samples = tiny_policy(kind), some_samples(rows=9, engine=True)
    whole, result = gradients(policy, samples, token_budget=10**6, packed=packed, tis_cap=2.0)
    for budget in (1, 30, 50, 77, 120):
        split, again = gradients(policy, samples, token_budget=budget, packed=packed, tis_cap=2.0, chunk=4)
        assert relative_distance(split, whole) < 1e-5
        assert again.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)
        assert again.entropy == pytest.approx(result.entropy, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_equals_padded_equals_single_rows(kind):
    policy, samples = tiny_policy(kind), some_samples(rows=6)
    assert can_pack(policy)
    single = [naive_logprobs(policy, s).gather(-1, torch.tensor(s.response_ids)[:, None]).squeeze(-1) for s in samples]
    attention = policy.config._attn_implementation
    for packed in (True, False):
        batch = collate(samples, range(6), packed, policy.device)
        policy.config._attn_implementation = "segments" if packed else attention
        logprob, _ = response_logprobs(policy, batch, chunk=8)
        torch.testing.assert_close(logprob.double(), torch.cat(single), rtol=1e-5, atol=1e-5)
    policy.config._attn_implementation = attention
    one, _ = gradients(policy, samples, packed=True)
    two, _ = gradients(policy, samples, packed=False)
    three, _ = gradients(policy, samples, token_budget=1, packed=False)
    assert relative_distance(one, two) < 1e-5 and relative_distance(two, three) < 1e-5


def test_packed_equals_padded_under_eager_attention():
    policy, samples = tiny_policy(), some_samples()
    packed, _ = gradients(policy, samples, packed=True)
    policy.set_attn_implementation("eager")
    padded, _ = gradients(policy, samples, packed=False)
    assert relative_distance(packed, padded) < 1e-5
    assert policy.config._attn_implementation == "eager" and not policy.training  # both put back


def test_gradient_checkpointing_changes_no_gradient():
    policy, samples = tiny_policy(), some_samples()
    wanted, _ = gradients(policy, samples)
    policy.gradient_checkpointing_enable()
    for packed in (True, False):
        got, _ = gradients(policy, samples, packed=packed)
        assert relative_distance(got, wanted) < 1e-5


def test_sliding_window_models_are_padded():
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    policy = tiny_policy("qwen2")
    policy.config.layer_types = config.layer_types
    assert "sliding_attention" in config.layer_types and not can_pack(policy)


def test_zero_advantage_rows_are_skipped_but_stay_in_the_normaliser():
    policy = tiny_policy()
    rows = some_samples(rows=8)
    samples = [Sample(s.prompt_ids, s.response_ids, 0.0 if i % 3 == 0 else s.advantage) for i, s in enumerate(rows)]
    skipped, result = gradients(policy, samples)
    # An advantage too small to matter forces the rows through the policy.
    forced, full = gradients(policy, [Sample(s.prompt_ids, s.response_ids, s.advantage or 1e-30) for s in samples])
    assert relative_distance(skipped, forced) < 1e-6
    assert (result.trained_rows, full.trained_rows) == (5, 8) and result.tokens == full.tokens
    assert [entropy is None for entropy in result.row_entropy] == [i % 3 == 0 for i in range(8)]


def test_nothing_to_learn_changes_nothing():
    policy, samples = tiny_policy(), [Sample([1], [2], 0.0), Sample([3], [4, 5], 0.0)]
    before = copy.deepcopy(policy.state_dict())
    for rows in (samples, []):
        result = update(policy, MasterAdamW(policy), rows, lr=1.0)
        assert (result.steps, result.trained_rows, result.entropy, result.grad_norm) == (0, 0, None, 0.0)
    assert all(torch.equal(before[n], p) for n, p in policy.state_dict().items())


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        (Sample([], [1], 1.0), {}, "at least one prompt token"),
        (Sample([1], [], 1.0), {}, "one response token"),
        (Sample([1], [1, 2], 1.0, [-1.0]), {}, "one per response token"),
        (Sample([1], [1], 1.0), {"loss_mean": "micro"}, "loss mean"),
    ],
)
def test_update_rejects_bad_input(sample, options, message):
    with pytest.raises(ValueError, match=message):
        policy = tiny_policy()
        update(policy, MasterAdamW(policy), [sample], lr=1e-3, **options)


def test_models_that_cap_their_logits_are_refused():
    policy = tiny_policy()
    policy.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="caps its logits"):
        update(policy, MasterAdamW(policy), some_samples(), lr=1e-3)


def test_progress_counts_the_tokens_of_computed_rows():
    policy, samples, seen = tiny_policy(), some_samples(), []
    result = update(policy, MasterAdamW(policy), samples, lr=0.0, token_budget=40, progress=seen.append)
    assert sum(seen) == result.trained_tokens == sum(len(s) for s in samples) and len(seen) > 1


def test_several_optimizer_steps_move_the_ratio_and_clip():
    policy, samples = tiny_policy(), some_samples(rows=12)
    result = update(policy, MasterAdamW(policy), samples, lr=0.03, minibatches=3, token_budget=60)
    assert result.steps == 3 and result.ratio != 1.0
    assert result.clip_low > 0 or result.clip_high > 0


class Refusing:
    """An allocator that refuses `times` times: a forward pass raises as torch does, in the middle of a batch."""

    def __init__(self, policy, error: Exception, after: int, times: int = 1):
        self.error, self.after, self.times, self.calls = error, after, times, 0
        self.forward = policy.model.norm.forward
        policy.model.norm.forward = self

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls > self.after and self.times:
            self.times -= 1
            raise self.error
        return self.forward(*arguments)


HOST_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), HOST_ERROR])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_an_update_that_runs_out_of_memory_goes_on_with_half_the_budget(dtype, error, minibatches, capsys):
    samples, results, policies, seen = some_samples(rows=12), [], [], []
    for budget in (120, 60):
        policy = tiny_policy(dtype=dtype)
        optimizer = MasterAdamW(policy)
        if budget == 120:  # the second micro-batch of the first pass: gradients of the first are there already
            refusing = Refusing(policy, error, after=1)
        options = {"lr": 1e-2, "token_budget": budget, "minibatches": minibatches, "entropy_coef": 0.01}
        results.append(update(policy, optimizer, samples, **options, progress=seen.append))
        policies.append(policy)
    assert refusing.times == 0 and all(p.grad is None for p in policy.parameters())
    assert results[0] == results[1] and results[0].steps == minibatches
    assert all(torch.equal(a, b) for a, b in zip(policies[0].parameters(), policies[1].parameters(), strict=True))
    assert capsys.readouterr().err == "the update ran out of memory: again with 60 tokens per micro-batch\n"


def test_gradients_of_a_failed_backward_pass_are_forgotten(monkeypatch):
    samples, sums = some_samples(rows=12), []
    for refuse in (True, False):
        policy, refusals = tiny_policy(), [refuse]

        def hook(gradient, refusals=refusals):
            if refusals[0]:
                refusals[0] = False
                raise torch.OutOfMemoryError("CUDA out of memory")

        policy.model.layers[0].mlp.up_proj.weight.register_hook(hook)  # the last layer has its gradients by then
        keeper = KeepGradients(policy)
        keeper.clear = policy.zero_grad
        update(policy, keeper, samples, lr=0.0, token_budget=120 if refuse else 60)
        sums.append(keeper.grads)
    assert all(torch.equal(sums[0][n], sums[1][n]) for n in sums[0])


def test_a_row_that_does_not_fit_alone_raises(capsys):
    policy, samples = tiny_policy(), some_samples(rows=12)
    longest = max(map(len, samples))
    Refusing(policy, torch.OutOfMemoryError("CUDA out of memory"), after=0, times=99)
    with pytest.raises(torch.OutOfMemoryError):
        update(policy, MasterAdamW(policy), samples, lr=0.0, token_budget=4 * longest)
    assert capsys.readouterr().err.count("\n") == 2  # with 2 and with 1 times the longest row
    with pytest.raises(RuntimeError, match="something else"):
        Refusing(policy, RuntimeError("something else"), after=0)
        update(policy, MasterAdamW(policy), samples, lr=0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


@pytest.mark.parametrize("offload", [False, True])
def test_master_adamw_equals_torch_adamw(offload):
    policy = tiny_policy()
    reference = copy.deepcopy(policy)
    ours = MasterAdamW(policy, offload=offload)
    theirs = torch.optim.AdamW(reference.parameters(), lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        for model in (policy, reference):
            model(ids, labels=ids).loss.backward()
        norm = ours.step(3e-3, grad_clip=0.5)
        expected = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5))
        theirs.step()
        theirs.zero_grad()
        assert norm == pytest.approx(expected, rel=1e-5) and norm > 0.5
    for a, b in zip(policy.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_fp32_masters_keep_updates_that_pure_bf16_loses():
    samples = some_samples()
    kept, lost = tiny_policy(dtype=torch.bfloat16), tiny_policy(dtype=torch.bfloat16)
    start = copy.deepcopy(kept)
    masters = MasterAdamW(kept, weight_decay=0.0)
    plain = torch.optim.AdamW(lost.parameters(), lr=1e-6, weight_decay=0.0)

    class PureBf16:
        def step(self, lr: float, grad_clip: float) -> float:
            norm = float(torch.nn.utils.clip_grad_norm_(lost.parameters(), grad_clip))
            plain.step()
            plain.zero_grad()
            return norm

    for _ in range(60):
        update(kept, masters, samples, lr=1e-6)
        update(lost, PureBf16(), samples, lr=1e-6)

    def changed(policy) -> float:
        pairs = zip(policy.parameters(), start.parameters(), strict=True)
        return sum(int((a != b).sum()) for a, b in pairs) / sum(p.numel() for p in start.parameters())

    moved = [(masters.master[n] - p.float()).abs().mean() for n, p in start.named_parameters()]
    assert all(2e-6 < m.item() < 6.1e-5 for m in moved)  # every master follows Adam's unit steps
    assert changed(kept) > 0.02
    assert changed(lost) < 0.2 * changed(kept)


def test_bf16_gradients_are_summed_in_fp32():
    policy = tiny_policy(dtype=torch.bfloat16)
    optimizer = MasterAdamW(policy)
    p = policy.model.norm.weight
    for _ in range(300):  # 256 + 1 is 256 in bf16
        (p.float().sum()).backward()
    assert p.grad.dtype == torch.float32
    assert p.grad.tolist() == [300.0] * p.numel()
    optimizer.step(1e-3)
    assert p.grad is None


def test_offloaded_bf16_gradients_are_summed_in_bf16_within_two_percent():
    samples, sums = some_samples(rows=40), []
    for offload in (False, True):
        policy = tiny_policy("qwen2", dtype=torch.bfloat16)
        optimizer = MasterAdamW(policy, offload=offload)

        class Keep:
            def step(self, lr: float, grad_clip: float, policy=policy, optimizer=optimizer) -> float:
                grads = {n: p.grad for n, p in policy.named_parameters()}
                assert {g.dtype for g in grads.values()} == {torch.bfloat16 if optimizer.offload else torch.float32}
                sums.append({n: g.double() for n, g in grads.items()})
                return optimizer.step(lr, grad_clip)

        result = update(policy, Keep(), samples, lr=1e-3, token_budget=30)
        assert result.steps == 1 and all(p.grad is None for p in policy.parameters())
    assert 0 < relative_distance(sums[1], sums[0]) < 0.02


def test_a_gradient_that_is_not_finite_is_dropped():
    policy = tiny_policy()
    optimizer = MasterAdamW(policy)
    before = copy.deepcopy(policy.state_dict())
    result = update(policy, optimizer, [Sample([1, 2], [3, 4], math.inf)], lr=1e-3)
    assert not math.isfinite(result.grad_norm) and result.steps == optimizer.steps == 0
    assert all(torch.equal(before[n], p) for n, p in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True])
def test_optimizer_resume_is_exact(dtype, offload, tmp_path):
    straight, samples = tiny_policy(dtype=dtype), some_samples()
    optimizer = MasterAdamW(straight, offload=offload)
    for _ in range(3):
        update(straight, optimizer, samples, lr=1e-3)
    torch.save({"policy": straight.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    resumed = tiny_policy(dtype=dtype, seed=1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["policy"])
    again = MasterAdamW(resumed, offload=offload)
    again.load_state_dict(state["optimizer"])
    for _ in range(3):
        update(straight, optimizer, samples, lr=1e-3)
        update(resumed, again, samples, lr=1e-3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.steps == optimizer.steps == 6


def test_optimizer_state_of_another_model_is_refused():
    optimizer = MasterAdamW(tiny_policy("llama"))
    wider = MasterAdamW(LlamaForCausalLM(LlamaConfig(**{**tiny_policy().config.to_dict(), "intermediate_size": 64})))
    for other in (MasterAdamW(tiny_policy("qwen2")), MasterAdamW(tiny_policy(dtype=torch.bfloat16)), wider):
        with pytest.raises(ValueError, match="another model"):
            optimizer.load_state_dict(other.state_dict())


def test_learning_rate_schedule():
    assert [learning_rate(t, 1.0, warmup=4) for t in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = [learning_rate(t, 1.0, warmup=2, total=6, decay="linear") for t in range(8)]
    assert linear == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert learning_rate(3, 1.0, total=6, decay="cosine") == pytest.approx(0.5)
    with pytest.raises(ValueError, match="total"):
        learning_rate(0, 1.0, decay="linear")


# ----------------------------------------------------------------------------------------------------------------------
# It learns


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float32, 1e-2), (torch.bfloat16, 1e-2)])
def test_probability_of_the_rewarded_token_rises(dtype, lr):
    """The whole path on a toy cell: sample one token, reward token 7, whiten, update; on-policy."""
    policy = tiny_policy(dtype=dtype)
    optimizer = MasterAdamW(policy)
    generator = torch.Generator().manual_seed(0)
    prompt, good = [3, 1, 4], 7

    def probabilities():
        with torch.no_grad():
            return torch.softmax(policy(torch.tensor([prompt])).logits[0, -1].float(), -1)

    curve = [float(probabilities()[good])]
    for _ in range(30):
        answers = torch.multinomial(probabilities(), 64, replacement=True, generator=generator).tolist()
        rewards = [solver_reward(True, answer == good) for answer in answers]
        advantages = whiten(rewards, ["toy"] * 64, [1] * 64)
        samples = [Sample(prompt, [a], float(adv)) for a, adv in zip(answers, advantages, strict=True)]
        update(policy, optimizer, samples, lr=lr)
        curve.append(float(probabilities()[good]))
    assert curve[0] < 0.1 and curve[-1] > 0.9


@pytest.mark.parametrize("weighting", ["sequence", "token"])
@pytest.mark.parametrize("loss_mean", ["sequence", "token"])
def test_the_value_of_the_loss_is_a_matter_of_lengths(weighting, loss_mean):
    """docs/metrics.md: at ratio 1 it is 0 where whitening and loss weigh alike, else a covariance with the lengths."""
    rewards, lengths = [1.0, 0.0, 1.0, -1.0, 0.5, -0.5], [3, 9, 4, 20, 7, 5]
    cells = ["a", "a", "a", "b", "b", "b"]
    advantage = whiten(rewards, cells, lengths, weighting)
    size = torch.tensor(lengths, dtype=torch.float64)
    weight = 1 / size.sum() if loss_mean == "token" else 1 / (len(size) * size)
    tokens = torch.repeat_interleave(torch.arange(len(size)), torch.tensor(lengths))
    weights, gains = torch.broadcast_to(weight, size.shape)[tokens], advantage[tokens]
    zero, unknown = torch.zeros(len(tokens)), torch.full((len(tokens),), math.nan)
    loss, _ = objective(zero, zero, zero, unknown, gains, weights)
    centred = size - torch.tensor([sum(lengths[:3]) / 3] * 3 + [sum(lengths[3:]) / 3] * 3, dtype=torch.float64)
    expected = {
        ("sequence", "sequence"): 0.0,
        ("token", "token"): 0.0,
        ("sequence", "token"): float(-(centred * advantage).sum() / size.sum()),
        ("token", "sequence"): float(-advantage.sum() / len(size)),
    }[weighting, loss_mean]
    assert float(loss) == pytest.approx(expected, abs=1e-7)
    assert (abs(expected) > 0.01) == (weighting != loss_mean)
