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

    On the card that takes 16 bytes per parameter (master, two moments, gradient sum) beside a bf16 policy.
    `offload=True` is for cards where this does not fit: master and moments live in pinned host memory, gradients are
    summed in bf16, so 2 bytes per parameter stay (measured over 69 micro-batches: the sum is off by 1 %, bf16
    arithmetic alone by 2 %). A step moves the states through the card in pieces of `piece` elements on alternating
    streams, so that uploads, arithmetic and downloads overlap.
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

        rounded = {name: p for name, p in self.params.items() if p.dtype != torch.float32}
        copies = self._zeros(rounded)
        self.master = {
            name: copies[name].copy_(p.data) if name in rounded else p.data for name, p in self.params.items()
        }
        self.exp_avg, self.exp_avg_sq = self._zeros(self.params), self._zeros(self.params)
        for p in () if offload else rounded.values():
            p.register_post_accumulate_grad_hook(self._add)

    def _zeros(self, params: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        """One fp32 tensor per parameter: beside it, or offloaded as a piece of one pinned host buffer.

        The buffer is pinned in place: torch's allocator of pinned memory rounds every tensor up to a power of two.
        """
        if not self.offload:
            return {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in params.items()}
        flat = torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.float32)
        if any(p.is_cuda for p in params.values()):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
        pieces = flat.split([p.numel() for p in params.values()])
        return {name: piece.view(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}

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
        norm = float(torch.stack(torch._foreach_norm(list(grads.values()), dtype=torch.float32)).norm())
        if math.isfinite(norm):
            self.steps += 1
            scale = min(1.0, grad_clip / (norm + 1e-6))
            (self._step_in_pieces if self.offload else self._step_at_once)(grads, scale, lr)
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

    def _step_at_once(self, grads: dict[str, Tensor], scale: float, lr: float) -> None:
        masters, exp_avgs, exp_avg_sqs = ([held[name] for name in grads] for held in self._states())
        torch._foreach_mul_(list(grads.values()), scale)
        self._adamw(masters, list(grads.values()), exp_avgs, exp_avg_sqs, lr)
        for name in grads:
            if self.params[name].dtype != torch.float32:
                self.params[name].copy_(self.master[name])

    def _step_in_pieces(self, grads: dict[str, Tensor], scale: float, lr: float) -> None:
        cuda = next(iter(grads.values())).is_cuda
        streams = [torch.cuda.Stream() for _ in range(3)] if cuda else []
        if cuda:
            torch.cuda.synchronize()  # the gradients are complete
        number = 0
        for name, grad in grads.items():
            p, grad = self.params[name].data.view(-1), grad.view(-1)
            states = [held[name].view(-1) for held in self._states()]
            for start in range(0, len(p), self.piece):
                part = slice(start, start + self.piece)
                with torch.cuda.stream(streams[number % 3]) if cuda else nullcontext():
                    there = [held[part] for held in states]
                    master, exp_avg, exp_avg_sq = here = [held.to(p.device, non_blocking=True) for held in there]
                    self._adamw([master], [grad[part].float() * scale], [exp_avg], [exp_avg_sq], lr)
                    p[part].copy_(master)
                    for host, card in zip(there, here, strict=True):
                        if host is not card:
                            host.copy_(card, non_blocking=True)
                number += 1
        if cuda:
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
