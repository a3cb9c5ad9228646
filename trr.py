"""Rewards, TRR++ advantages, the clipped policy-gradient loss and one optimizer step.

Paper: "Absolute Zero: Reinforced Self-play Reasoning with Zero Data" (arXiv 2505.03335), section 3.1 (rewards, eq. 4-6)
and section 3.3.5 (Task-Relative REINFORCE++, eq. 8; objective, eq. 9). Everything here is a function of its arguments:
no files, no globals, no knowledge of Python tasks. Of the project it needs only policy/logprobs.py and packing.py.

What it does, in the order of the file:
    proposer_reward, solver_reward    text -> number is decided elsewhere; here only the reward table
    whiten, advantages                rewards -> advantages, one mean and one deviation per (task type, role) cell
    objective                         the clipped loss, the engine/policy correction and the entropy bonus
    micro_batches ... update          samples -> micro-batches, smaller ones if memory runs out -> one AdamW step

What it deliberately leaves out: a KL term and a reference model (the paper has none), a critic, GAE (the reward sits on
the last token and nothing is discounted), the optimizer (`optimizer.py`), several cards.

Usage:
    gains = whiten(rewards, cells, lengths)
    samples = [Sample(prompt_ids, response_ids, float(a)) for ..., a in zip(..., gains)]
    result = update(policy, MasterAdamW(policy), samples, lr=1e-6)  # policy/optimizer.py
"""

import math
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.logprobs import CHUNK, logit_scale, ran_out_of_memory, token_logprobs
from policy.packing import can_pack, training


def proposer_reward(
    valid: bool, formatted: bool, solve_rate: float | None, zero_reward: float = 0.0, most: float = 1.0
) -> float:
    """Learnability reward of one proposal (paper eq. 4, with the format penalty of eq. 6).

    -1 if the proposal is not a valid task or the response breaks the think/answer format; `zero_reward` if the solver
    always or never succeeds (0 in the paper, -0.5 in the official code); else 1 - solve_rate: hard but possible pays.
    `most` bounds the reward of a task, for one that is not new.
    """
    if not (valid and formatted):
        return -1.0
    if solve_rate is None or not 0.0 <= solve_rate <= 1.0:
        raise ValueError(f"A valid proposal needs a solve rate between 0 and 1, got {solve_rate}.")
    return min(most, zero_reward if solve_rate in (0.0, 1.0) else 1.0 - solve_rate)


def solver_reward(formatted: bool, correct: bool) -> float:
    """Reward of one solution (paper eq. 5 and 6): +1 right, -0.5 wrong but well formed, -1 badly formed."""
    if not formatted:
        return -1.0
    return 1.0 if correct else -0.5


def rows_of(labels: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The rows that carry each label, labels in the order in which they first appear."""
    rows: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(label, []).append(i)
    return rows


def whiten(
    rewards: Sequence[float] | Tensor, cells: Sequence[Hashable], lengths: Sequence[int] | Tensor, weighting="sequence"
) -> Tensor:
    """Task-Relative REINFORCE++ (paper eq. 8): A_i = (R_i - mu_cell) / sigma_cell, one cell per (task type, role).

    rewards (R,), cells (R,) any hashable labels, lengths (R,) response tokens  ->  advantages (R,) float64.

    With w_i = 1 (`weighting="sequence"`, the paper) or w_i = lengths_i (`"token"`, the official code: a long answer
    counts more) and n = sum_i w_i over the cell:
        mu = sum_i w_i R_i / n        sigma^2 = sum_i w_i (R_i - mu)^2 / (n - 1) + 1e-8        (sample variance)
    A cell whose rewards are all equal, or that has one row, teaches nothing: its advantages are exactly zero.
    Raises ValueError for rewards that are not finite, empty responses, unequal sizes or an unknown weighting.
    """
    reward = torch.as_tensor(rewards, dtype=torch.float64)  # (R,)
    length = torch.as_tensor(lengths, dtype=torch.float64)  # (R,)
    if weighting not in ("sequence", "token"):
        raise ValueError(f"Advantage weighting must be 'sequence' or 'token', got {weighting!r}.")
    if not len(reward) == len(cells) == len(length):
        raise ValueError(f"Got {len(reward)} rewards, {len(cells)} cells and {len(length)} lengths: make them equal.")
    if not torch.isfinite(reward).all() or (length < 1).any():
        raise ValueError("Every reward must be finite and every response must have at least one token.")
    weight = length if weighting == "token" else torch.ones_like(length)
    advantage = torch.zeros_like(reward)
    for rows in map(torch.tensor, rows_of(cells).values()):
        r, w = reward[rows], weight[rows]
        if (r == r[0]).all():
            continue  # 0/0 in eq. 8; the 1e-8 alone would amplify rounding noise
        n = w.sum()
        mean = (w * r).sum() / n
        variance = (w * (r - mean) ** 2).sum() / (n - 1)
        advantage[rows] = (r - mean) / torch.sqrt(variance + 1e-8)
    return advantage


def advantages(
    rewards: Sequence[float],
    cells: Sequence[Hashable],
    tasks: Sequence[Hashable],
    lengths: Sequence[int],
    baseline: str = "cell",
    weighting: str = "sequence",
) -> Tensor:
    """Advantages (R,) centred on what `baseline` names; the lists are of the R rows.

    "cell": `whiten`, the paper's. "global": the same with all rows in one cell. "task": a reward first loses the mean
    of the rows of its cell that have the same `tasks`, so that only attempts at one task are compared and how hard it
    is adds no variance; the deviation is still the cell's. A row whose task has no other teaches nothing then.
    """
    centred, settled = list(rewards), []
    if baseline == "task":
        for rows in rows_of(list(zip(cells, tasks, strict=True))).values():
            weights = [lengths[i] if weighting == "token" else 1 for i in rows]
            mean = sum(w * rewards[i] for w, i in zip(weights, rows, strict=True)) / sum(weights)
            for i in rows:
                centred[i] -= mean
            settled += rows if len({rewards[i] for i in rows}) == 1 else []
    found = whiten(centred, [""] * len(cells) if baseline == "global" else cells, lengths, weighting)
    found[settled] = 0.0  # it is zero already, but for rounding
    return found


def shuffle_within_cells(rewards: Sequence[float], cells: Sequence[Hashable], rng: Random) -> list[float]:
    """The control: every reward goes to another row of its cell, so that it says nothing about the row."""
    shuffled = list(rewards)
    for _, rows in sorted(rows_of(cells).items()):
        moved = [rewards[i] for i in rows]
        rng.shuffle(moved)
        for i, reward in zip(rows, moved, strict=True):
            shuffled[i] = reward
    return shuffled


def objective(
    logprob: Tensor,
    entropy: Tensor,
    old_logprob: Tensor,
    engine_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (a scalar) of n response tokens, and what to report about them; every tensor argument is (n,).

    Paper eq. 9 with the engine correction and the entropy bonus:
        loss = sum_t weight_t (-w_t min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t) - coef H_t)
        ratio_t = pi / pi_old,  w_t = min(pi_old / pi_engine, tis_cap), a constant; w_t = 1 without `tis_cap`.
    The engine's kernels sample from a slightly different distribution than the policy that is differentiated: w_t
    reweights its tokens and the cap bounds the variance (truncated importance sampling, Ionides 2008).
    A NaN in engine_logprob (unknown) counts as pi_engine = pi_old. Reports are sums over tokens, but `tis_max`.
    """
    ratio = torch.exp(logprob - old_logprob)
    low, high = 1.0 - clip_low, 1.0 + clip_high
    gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    known = ~engine_logprob.isnan()
    gap = torch.where(known, old_logprob - engine_logprob, 0.0)
    tis = gap.exp().clamp(max=math.inf if tis_cap is None else tis_cap)
    if tis_cap is not None:
        gain = gain * tis
    loss = (weight * (-gain - entropy_coef * entropy)).sum()
    report = {
        "loss": loss,
        "ratio": ratio.sum(),
        "clip_low": ((advantage < 0) & (ratio < low)).sum(),
        "clip_high": ((advantage > 0) & (ratio > high)).sum(),
        "entropy": entropy.sum(),
        "mismatch": gap.abs().sum(),
        "tis_mean": (tis * known).sum(),
        "tis_max": (tis * known).max(),
        "tis_truncated": (gap.exp() > tis).sum(),
    }
    return loss, {name: value.detach().float() for name, value in report.items()}


@dataclass(frozen=True)
class Sample:
    """One rollout to train on, as token ids (never re-tokenised text)."""

    prompt_ids: list[int]
    response_ids: list[int]  # with the end-of-sequence id if the model wrote one
    advantage: float  # same for every token of the response
    engine_logprobs: list[float] | None = None  # one per response token, at temperature 1

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def micro_batches(lengths: Sequence[int], token_budget: int, packed: bool) -> list[list[int]]:
    """Indices of rows grouped so that a group costs at most `token_budget` tokens, pads included; longest rows first.

    Sorting puts rows of like length together, so padded groups waste little, and the largest group comes first, so that
    a card that runs out of memory does so at once. A row longer than the budget gets a group of its own.
    """
    groups: list[list[int]] = []
    cost = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = lengths[i] if packed or not groups else lengths[groups[-1][0]]
        if not groups or cost + width > token_budget:
            groups.append([])
            cost, width = 0, lengths[i]
        groups[-1].append(i)
        cost += width
    return groups


@dataclass
class MicroBatch:
    """n response tokens of B rows; every tensor is on the policy's device before the first micro-batch runs."""

    rows: list[int]  # B indices of samples
    tokens: int  # prompt and response tokens, without pads
    input_ids: Tensor  # (B, T), padded on the right; packed: (1, sum of lengths)
    forward_args: dict  # packed: position_ids (1, T) and the row lengths
    select: Tensor  # (n,) position in the flattened (B * T) whose hidden state predicts each response token
    targets: Tensor  # (n,) response tokens
    row: Tensor  # (n,) index of the token's sample
    engine: Tensor  # (n,) engine log-probabilities, NaN where none were given


def collate(samples: Sequence[Sample], rows: Sequence[int], packed: bool, device: torch.device) -> MicroBatch:
    """Tensors of the given rows. Right pads need no mask: causal attention never looks to the right."""
    lengths = [len(samples[i]) for i in rows]
    width = max(lengths)
    starts = [sum(lengths[:k]) if packed else k * width for k in range(len(rows))]
    ids = torch.zeros(sum(lengths) if packed else len(rows) * width, dtype=torch.long)
    select, row, engine = [], [], []
    for i, start, length in zip(rows, starts, lengths, strict=True):
        sample = samples[i]
        ids[start : start + length] = torch.tensor(sample.prompt_ids + sample.response_ids)
        select.append(torch.arange(start + len(sample.prompt_ids) - 1, start + length - 1))
        row.append(torch.full((len(sample.response_ids),), i))
        engine.append(torch.tensor(sample.engine_logprobs or [math.nan] * len(sample.response_ids)))
    select = torch.cat(select)

    def send(tensor: Tensor) -> Tensor:  # pinned copies do not make the host wait for the card
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    forward_args = {"position_ids": send(positions), "segments": lengths} if packed else {}
    per_token = map(send, (select, ids[select + 1], torch.cat(row), torch.cat(engine)))
    return MicroBatch(
        list(rows), sum(lengths), send(ids.view(1 if packed else len(rows), -1)), forward_args, *per_token
    )


def response_logprobs(
    policy: PreTrainedModel, batch: MicroBatch, chunk: int, entropy_grad: bool = False, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (n,) of the response tokens of a micro-batch among the first `vocab_size` ids (None:
    all); prompts never reach the head."""
    output = policy.base_model(input_ids=batch.input_ids, use_cache=False, **batch.forward_args)
    hidden = output.last_hidden_state.flatten(0, 1).index_select(0, batch.select)  # (n, H)
    if (scale := logit_scale(policy.config)) != 1.0:
        hidden = hidden * scale
    head = policy.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return token_logprobs(hidden, head.weight, batch.targets, bias, chunk, entropy_grad, vocab_size)


@dataclass(kw_only=True)
class UpdateResult:
    """What one call of `update` did; means are over trained response tokens, None where nothing was measured."""

    loss: float = 0.0  # near 0 at ratio 1 with centred advantages: the gradient is what matters
    ratio: float = 1.0  # mean pi / pi_old, exactly 1 with one optimizer step per batch
    clip_low: float = 0.0  # shares of tokens whose gradient was cut at 1 - clip_low and at 1 + clip_high
    clip_high: float = 0.0
    entropy: float | None = None  # nats per token
    row_entropy: list[float | None]  # one per sample, None for rows that were skipped
    grad_norm: float  # before clipping; mean over optimizer steps
    mismatch: float | None = None  # mean |engine logprob - policy logprob|
    tis_mean: float | None = None  # truncated importance weight: mean, largest, share at the cap
    tis_max: float | None = None
    tis_truncated: float | None = None
    tokens: int  # response tokens in the normaliser
    trained_tokens: int  # prompt and response tokens that went through the policy
    trained_rows: int
    steps: int  # optimizer steps taken; fewer than asked if there was nothing to learn or a gradient was not finite


def update(
    policy: PreTrainedModel,
    optimizer,
    samples: Sequence[Sample],
    *,
    lr: float,
    token_budget: int = 8192,
    loss_mean: str = "token",
    grad_clip: float = 1.0,
    minibatches: int = 1,
    packed: bool | None = None,
    chunk: int = CHUNK,
    vocab_size: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    **options: float | None,
) -> UpdateResult:
    """Maximise the paper's objective (eq. 9) on one batch of rollouts; `options` are those of `objective`.

    `optimizer.step(lr, grad_clip)` must apply and clear the gradients and return their norm, `.clear()` forget them.
    `loss_mean="token"` (default) weighs every response token of the batch alike: a per-sequence mean ("sequence", the
    letter of eq. 9) makes each token of a long wrong answer cheap, which rewards rambling. The normaliser is taken over
    the whole batch before it is cut, so the gradient does not depend on the micro-batches; rows with zero advantage are
    counted there but not computed (unless the entropy bonus needs them).
    `minibatches` = n > 1 takes n optimizer steps, each on every n-th row, with old log-probabilities from a pass before
    the first; with one step the ratio is 1 by construction and that pass is saved. `packed=None` packs if `can_pack`.
    `vocab_size`: the ids that are sampled from, where the model has more than its tokenizer.
    `progress` receives prompt + response tokens done. A step whose gradient is not finite is dropped; one that runs out
    of memory begins again with half the token budget, down to one row at a time.
    """
    if loss_mean not in ("token", "sequence"):
        raise ValueError(f"The loss mean must be 'token' or 'sequence', got {loss_mean!r}.")
    if any(not s.prompt_ids or not s.response_ids for s in samples):
        raise ValueError("Every sample needs at least one prompt token and one response token.")
    if any(s.engine_logprobs is not None and len(s.engine_logprobs) != len(s.response_ids) for s in samples):
        raise ValueError("Engine log-probabilities must be one per response token.")
    device, packed = policy.device, can_pack(policy) if packed is None else packed
    entropy_coef = options.get("entropy_coef", 0.0)
    sizes = [len(s.response_ids) for s in samples]
    weight, advantage = torch.zeros(len(samples)), torch.tensor([s.advantage for s in samples], device=device)
    parts: list[list[int]] = []  # rows of each optimizer step
    for part in (range(k, len(samples), minibatches) for k in range(minibatches)):
        size = sum(sizes[i] for i in part)
        for i in part:  # of each token of row i
            weight[i] = 1 / (size if loss_mean == "token" else len(part) * sizes[i])
        parts.append([i for i in part if samples[i].advantage != 0.0 or entropy_coef])
    weight, row_entropy = weight.to(device), torch.zeros(len(samples), device=device)
    old_logprob: dict[int, Tensor] = {}  # of each row, only for several optimizer steps
    reports, norms = [], []

    def remember(batch: MicroBatch) -> None:
        with torch.no_grad():
            logprob, _ = response_logprobs(policy, batch, chunk, False, vocab_size)
        old_logprob.update(zip(batch.rows, logprob.split([sizes[i] for i in batch.rows]), strict=True))

    def accumulate(batch: MicroBatch) -> dict[str, Tensor]:  # nothing here waits for the card
        logprob, entropy = response_logprobs(policy, batch, chunk, entropy_coef != 0, vocab_size)
        old = torch.cat([old_logprob[i] for i in batch.rows]) if old_logprob else logprob.detach()
        tokens = (logprob, entropy, old, batch.engine, advantage[batch.row], weight[batch.row])
        loss, report = objective(*tokens, **options)
        loss.backward()
        row_entropy.index_fill_(0, batch.row, 0.0).index_add_(0, batch.row, entropy.detach())
        progress(batch.tokens)
        return report

    def each(work: Callable, rows: list[int]) -> list:
        """work(micro-batch) for all rows, from the start again with half the budget where memory runs out."""
        nonlocal token_budget
        while True:
            try:
                groups = micro_batches([len(samples[i]) for i in rows], token_budget, packed)
                batches = [collate(samples, [rows[k] for k in group], packed, device) for group in groups]
                return [work(batch) for batch in batches]
            except RuntimeError as error:
                if not ran_out_of_memory(error) or token_budget <= max(len(samples[i]) for i in rows):
                    raise
            optimizer.clear()
            token_budget //= 2
            print(f"the update ran out of memory: again with {token_budget} tokens per micro-batch", file=sys.stderr)

    with training(policy, packed):
        for rows in parts if minibatches > 1 else ():
            each(remember, rows)
        for rows in filter(None, parts):
            reports += each(accumulate, rows)
            norms.append(optimizer.step(lr, grad_clip))

    trained = [i for part in parts for i in part]
    return summarise(samples, trained, reports, row_entropy, norms, minibatches, options.get("tis_cap"))


def summarise(
    samples: Sequence[Sample],
    trained: Sequence[int],
    reports: Sequence[dict[str, Tensor]],
    row_entropy: Tensor,
    norms: Sequence[float],
    minibatches: int = 1,
    tis_cap: float | None = None,
) -> UpdateResult:
    """What an update reports. `trained`: indices of the rows that were computed; `reports`: those of `objective`, one
    per micro-batch; `row_entropy` (R,): summed over each row's tokens; `norms`: of each optimizer step's gradient."""
    sizes = [len(s.response_ids) for s in samples]
    count, known = (sum(sizes[i] for i in trained if every or samples[i].engine_logprobs) for every in (True, False))
    over = dict.fromkeys(("ratio", "clip_low", "clip_high", "entropy"), count)
    over |= {"mismatch": known, "loss": minibatches if reports else 0}
    if tis_cap is not None:
        over |= {"tis_mean": known, "tis_truncated": known, "tis_max": min(known, 1)}
    total = {name: torch.stack([report[name] for report in reports]) for name, n in over.items() if n}
    means = {name: float(t.max() if name == "tis_max" else t.sum()) / over[name] for name, t in total.items()}
    entropies, computed = row_entropy.tolist(), set(trained)
    return UpdateResult(
        **means,
        row_entropy=[entropies[i] / sizes[i] if i in computed else None for i in range(len(samples))],
        grad_norm=sum(norms) / len(norms) if norms else 0.0,
        tokens=sum(sizes),
        trained_tokens=sum(len(samples[i]) for i in trained),
        trained_rows=len(trained),
        steps=sum(math.isfinite(norm) for norm in norms),
    )
