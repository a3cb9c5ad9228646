"""Log-probabilities and entropies of tokens without the (tokens x vocabulary) matrix.

A policy with 152k words makes 0.6 MB of fp32 logits per token, and plain autograd keeps about three such rows: the
matrix, not the model, is what fills the memory in reinforcement learning of language models. Here hidden states go
through the head in chunks, forward and backward, and only the results stay.

What it leaves out: cutting the vocabulary as well, fused kernels, heads that bend their logits.

Usage:
    logprob, entropy = token_logprobs(hidden, policy.get_output_embeddings().weight, targets)
    (-(logprob * advantage).mean()).backward()
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # tokens whose logits exist at the same time


class _TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`. Saves hidden (T, H), weight (V, H) and targets (T,); logits (chunk, V) are made twice."""

    @staticmethod
    def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int | None) -> Tensor:
        """(C, H) -> (C, size): product in the model's dtype, softmax in fp32 (fp64 for fp64 input)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return torch.log_softmax(F.linear(hidden, weight, bias)[:, :size], -1, dtype=wide)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk, entropy_grad, size):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprob, entropy = (torch.empty(len(targets), device=hidden.device, dtype=wide) for _ in range(2))  # (T,)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logp = _TokenLogprobs.log_softmax(hidden[part], weight, bias, size)  # (C, size)
            logprob[part] = logp.gather(-1, targets[part, None]).squeeze(-1)
            entropy[part] = -torch.einsum("cv,cv->c", logp.exp(), logp)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunk, ctx.entropy_grad, ctx.size = chunk, entropy_grad, size
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        (hidden, weight, bias, targets), size = ctx.saved_tensors, ctx.size
        grad_hidden = torch.empty_like(hidden)
        # Sums over chunks are kept in fp32: bf16 would drop the small terms of late chunks.
        grad_weight, grad_bias = (  # none of a frozen head, which adapters leave as it is
            torch.zeros_like(each, dtype=grad_logprob.dtype) if wanted else None
            for each, wanted in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logp = _TokenLogprobs.log_softmax(hidden[part], weight, bias, size)  # (C, size)
            if ctx.entropy_grad:  # dH/dlogit = -p (log p + H), dlogprob/dlogit = onehot - p
                p = logp.exp()
                entropy = -torch.einsum("cv,cv->c", p, logp)
                scale = (logp.add_(entropy[:, None])).mul_(grad_entropy[part, None]).add_(grad_logprob[part, None])
                grad = p.mul_(scale).neg_()
            else:
                grad = logp.exp_().mul_(-grad_logprob[part, None])
            grad.scatter_add_(-1, targets[part, None], grad_logprob[part, None])
            if grad_bias is not None:
                grad_bias[:size] += grad.sum(0)
            # Products over the whole vocabulary: rows of an odd `size` would be aligned to nothing a card is fast at.
            if grad.shape[1] < len(weight):
                whole = grad.new_zeros(len(grad), len(weight), dtype=hidden.dtype)
                whole[:, :size] = grad
                grad = whole
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is None:
                continue
            if grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, hidden[part])
            else:
                grad_weight += grad.T @ hidden[part]
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk=CHUNK,
    entropy_grad=False,
    size=None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each next-token distribution, in nats.

    hidden (T, H) last hidden states, weight (V, H) output embedding (may be tied to the input embedding), bias (V,),
    targets (T,) token ids  ->  logprob (T,), entropy (T,), both fp32. Only the first `size` ids (None: all) can occur.
    Works on `chunk` tokens at a time and recomputes their logits in the backward pass: memory is O(chunk x V), not
    O(T x V), for one extra head product. Measured at T = 4,096, V = 151,936, H = 896 in fp32: 1.5 GB at the peak of
    forward and backward instead of 7.5 GB. Gradients flow through `entropy` only with `entropy_grad=True`.
    """
    return _TokenLogprobs.apply(hidden, weight, bias, targets, chunk, entropy_grad, size)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether torch found no memory: on a card it raises a class of its own, elsewhere only the text says so."""
    known = ("can't allocate memory", "out of memory")  # in host memory; where vLLM maps a sleeping engine's back
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in known)


def logit_scale(config) -> float:
    """What a model multiplies its logits with (Granite, Cohere, Falcon-H1). Raises ValueError for one that bends them.
    The check at start (harness/check.py) finds what goes by other names."""
    if any(
        getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    ):
        raise ValueError("This model caps its logits (as Gemma 2), which the update does not: train another --model.")
    factors = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier")]
    return math.prod(factors) / (getattr(config, "logits_scaling", None) or 1.0)
