"""AdamW with fp32 master weights for a bf16 policy, its states on the card or in host memory.

Paper: the optimizer of "Absolute Zero" (arXiv 2505.03335): AdamW, constant lr 1e-6, gradient norm clipped at 1.
What it deliberately leaves out: parameter groups, 8-bit states, several cards, a scheduler object (`learning_rate` is a
function and `step` takes its value).

Usage:
    optimizer = MasterAdamW(policy)
    loss.backward()  # as often as needed
    norm = optimizer.step(learning_rate(step, peak=1e-6, warmup=10))
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def learning_rate(step: int, peak: float, warmup: int = 0, total: int | None = None, decay: str = "constant") -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up to `peak`, then constant, linear or cosine decay to 0."""
    if decay not in ("constant", "linear", "cosine"):
        raise ValueError(f"Decay must be 'constant', 'linear' or 'cosine', got {decay!r}.")
    if decay != "constant" and total is None:
        raise ValueError(f"{decay.capitalize()} decay needs the total number of steps.")
    if step < warmup:
        return peak * (step + 1) / warmup
    if decay == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))


class MasterAdamW:
    """AdamW whose weights are fp32 even when the policy computes in bf16.

    At lr 1e-6 an update is far below one bf16 step of a weight (2^-8 of its value), so a bf16 optimizer loses it: the
    sum of many updates is kept in fp32 masters and rounded into the policy after each step. fp32 parameters are their
    own masters. bf16 gradients are added into fp32 as soon as backward has made them (a hook), so sums over
    micro-batches are exact and the bf16 gradients of the whole model never exist together.

    On the card: 16 bytes per parameter (master, two moments, gradient) beside the policy. `offload=True` keeps master
    and moments in pinned host memory (4 bytes per parameter stay on the card): a step moves them through the card in
    pieces of `piece` elements on alternating streams, so uploads, arithmetic and downloads overlap.
    Weight decay applies to all parameters, as in the official code.
    """

    def __init__(
        self,
        policy: torch.nn.Module,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        offload: bool = False,
        piece: int = 2**24,
    ) -> None:
        self.params = {name: p for name, p in policy.named_parameters() if p.requires_grad}  # tied weights once
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.offload, self.piece, self.steps = offload, piece, 0
        self.sums: dict[torch.nn.Parameter, Tensor] = {}  # fp32 gradients of bf16 parameters, only during an update

        def state(p: Tensor) -> Tensor:
            place = {"device": "cpu", "pin_memory": p.is_cuda} if offload else {"device": p.device}
            return torch.zeros(p.shape, dtype=torch.float32, **place)

        own = {name: p.dtype == torch.float32 for name, p in self.params.items()}
        self.master = {n: p.data if own[n] else state(p).copy_(p.data) for n, p in self.params.items()}
        self.exp_avg = {name: state(p) for name, p in self.params.items()}
        self.exp_avg_sq = {name: state(p) for name, p in self.params.items()}
        for name, p in self.params.items():
            if not own[name]:
                p.register_post_accumulate_grad_hook(self._add)

    def _add(self, p: torch.nn.Parameter) -> None:
        if p in self.sums:
            self.sums[p].add_(p.grad)
        else:
            self.sums[p] = p.grad.float()
        p.grad = None

    @torch.no_grad()
    def step(self, lr: float, grad_clip: float = 1.0) -> float:
        """Clip the summed gradients to norm `grad_clip`, take one AdamW step, clear them; returns the norm before.

        If the norm is not finite nothing is changed except that the gradients are cleared.
        """
        grads = {n: g for n, p in self.params.items() if (g := self.sums.get(p, p.grad)) is not None}
        norm = float(torch.nn.utils.get_total_norm(grads.values()))
        if math.isfinite(norm):
            self.steps += 1
            if norm > grad_clip:
                torch._foreach_mul_(list(grads.values()), grad_clip / norm)
            if self.offload:
                self._step_in_pieces(grads, lr)
            else:
                masters, exp_avgs, exp_avg_sqs = ([held[n] for n in grads] for held in self._states())
                self._adamw(masters, list(grads.values()), exp_avgs, exp_avg_sqs, lr)
                for name in grads:
                    if self.params[name].dtype != torch.float32:
                        self.params[name].copy_(self.master[name])
        self.sums.clear()
        for p in self.params.values():
            p.grad = None
        return norm

    def _states(self) -> tuple[dict[str, Tensor], ...]:
        return self.master, self.exp_avg, self.exp_avg_sq

    def _adamw(self, masters: list, grads: list, exp_avgs: list, exp_avg_sqs: list, lr: float) -> None:
        """One fused kernel over lists of fp32 tensors, in place."""
        steps = list(torch.full((len(masters),), self.steps - 1.0, device=masters[0].device).unbind())
        options = {"lr": lr, "weight_decay": self.weight_decay, "eps": self.eps, "amsgrad": False, "maximize": False}
        beta1, beta2 = self.betas
        adamw(masters, grads, exp_avgs, exp_avg_sqs, [], steps, fused=True, beta1=beta1, beta2=beta2, **options)

    def _step_in_pieces(self, grads: dict[str, Tensor], lr: float) -> None:
        streams = []
        number = 0
        device = next(iter(self.params.values())).device
        if device.type == "cuda":
            torch.cuda.synchronize()
            streams = [torch.cuda.Stream() for _ in range(3)]
        for name, grad in grads.items():
            p = self.params[name].data.view(-1)
            states = [held[name].view(-1) for held in self._states()]
            for start in range(0, len(p), self.piece):
                part = slice(start, start + self.piece)
                with torch.cuda.stream(streams[number % 3]) if streams else nullcontext():
                    there = [held[part] for held in states]
                    here = [held.to(device, non_blocking=True) for held in there]
                    self._adamw(*([x] for x in (here[0], grad.view(-1)[part], here[1], here[2])), lr)
                    p[part].copy_(here[0])
                    for host, card in zip(there, here, strict=True):
                        if host is not card:
                            host.copy_(card, non_blocking=True)
                number += 1
        if streams:
            torch.cuda.synchronize()

    def state_dict(self) -> dict:
        """References, not copies: masters of bf16 parameters, both moments and the step count."""
        masters = {n: m for n, m in self.master.items() if self.params[n].dtype != torch.float32}
        return {"steps": self.steps, "master": masters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict` was taken; the policy's bf16 weights are set from the masters."""
        own = self.state_dict()
        for key in ("master", "exp_avg", "exp_avg_sq"):
            shapes, saved = ({n: t.shape for n, t in held[key].items()} for held in (own, state))
            if shapes != saved:
                raise ValueError("This optimizer state belongs to another model or dtype: start without it.")
            for name, tensor in own[key].items():
                tensor.copy_(state[key][name])
        for name, tensor in own["master"].items():
            self.params[name].copy_(tensor)
        self.steps = state["steps"]
