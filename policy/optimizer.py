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

import torch
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
    own masters. bf16 gradients are added into fp32 as soon as backward has made them (`grad_dtype`), so sums over
    micro-batches are exact and the bf16 gradients of the whole model never exist together.

    On the card that takes 16 bytes per parameter (master, two moments, gradient sum) beside a bf16 policy.
    `offload=True` is for cards where this does not fit: master and moments live in host memory and the step is computed
    there, so that only gradients and weights cross the bus. Gradients are summed in bf16, so 2 bytes per parameter stay
    (measured over 69 micro-batches: the sum is off by 1 %, bf16 arithmetic alone by 2 %).
    Weight decay applies to all parameters, as in the official code.
    """

    def __init__(self, policy: torch.nn.Module, weight_decay: float = 0.01, offload: bool = False) -> None:
        self.params = {name: p for name, p in policy.named_parameters() if p.requires_grad}  # tied weights once
        self.adapters = any(not p.requires_grad for p in policy.parameters())  # the model folder does not hold them
        self.offload, self.steps = offload, 0
        self.options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": weight_decay}
        self.options |= {"fused": True, "amsgrad": False, "maximize": False}
        place = {"dtype": torch.float32, "device": "cpu" if offload else next(policy.parameters()).device}
        self.master = {name: p.data.to(**place) for name, p in self.params.items()}  # the parameter itself if it can be
        self.exp_avg = {name: torch.zeros(p.shape, **place) for name, p in self.params.items()}
        self.exp_avg_sq = {name: torch.zeros(p.shape, **place) for name, p in self.params.items()}
        for p in () if offload else self.params.values():
            p.grad_dtype = torch.float32

    def clear(self) -> None:
        """Forget the gradients summed so far."""
        for p in self.params.values():
            p.grad = None

    @torch.no_grad()
    def step(self, lr: float, grad_clip: float = 1.0) -> float:
        """Clip the summed gradients to norm `grad_clip`, take one AdamW step, clear them; returns the norm before.

        If the norm is not finite nothing is changed except that the gradients are cleared.
        """
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        norm = float(torch.stack(torch._foreach_norm(list(grads.values()), dtype=torch.float32)).norm())
        if math.isfinite(norm):
            scale = min(1.0, grad_clip / (norm + 1e-6))
            for name, grad in grads.items():  # one by one: an offloaded gradient becomes fp32 only for its own step
                master, exp_avg, exp_avg_sq = (held[name] for held in (self.master, self.exp_avg, self.exp_avg_sq))
                grad = grad.to(master.device).float().mul_(scale)
                taken = torch.full((), float(self.steps), device=master.device)
                adamw([master], [grad], [exp_avg], [exp_avg_sq], [], [taken], lr=lr, **self.options)
                if self._apart(name):
                    self.params[name].copy_(master)
            self.steps += 1
        self.clear()
        return norm

    def _apart(self, name: str) -> bool:
        return self.master[name].data_ptr() != self.params[name].data_ptr()

    def state_dict(self) -> dict:
        """References, not copies: masters of bf16 parameters and of adapters, both moments and the step count."""
        masters = {name: master for name, master in self.master.items() if self.adapters or self._apart(name)}
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
