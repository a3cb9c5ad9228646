"""How long a step takes, roughly: the arithmetic and memory traffic of a decoder against a device's data sheet.

An estimate for orientation, not a measurement; Python, the executor and the uneven end of a batch are not counted.
"""

import torch
from transformers import AutoModelForCausalLM

from policy.lora import count_adapters

# Dense bf16 TFLOP/s and memory GB/s from the vendors' data sheets; for two CPU cores, fp32, from `python azr.py`.
DEVICES = {"H200": (989, 4800), "H100": (989, 3350), "A100": (312, 2039), "4090": (165, 1008), "cpu": (0.5, 20)}
MFU, SERVED, HOST = 0.4, 0.32, 50e9  # shares of arithmetic and of memory traffic reached; bytes/s of host memory


def shape(config, rank: int = 0) -> tuple[int, int, int, int]:
    """(parameters, width of all queries, width of all keys, trained parameters: those of adapters of this rank, or all)
    of a decoder of the Hugging Face kind; raises ValueError for a model of another kind."""
    try:
        with torch.device("meta"):  # a model that takes no memory
            policy = AutoModelForCausalLM.from_config(config)
        parameters, heads = sum(p.numel() for p in policy.parameters()), config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys = (getattr(config, "num_key_value_heads", None) or heads) * width
        return parameters, heads * width, keys, count_adapters(policy, rank) if rank else parameters
    except (AttributeError, TypeError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"A {config.model_type} model cannot be planned for ({error}): use another --model."
        ) from error


def estimate_seconds(plan, device: str, sequences: int, trained: int, prompt: int, response: int) -> dict:
    """Seconds by phase of a `memory.Plan`. `sequences` are generated and `trained` of them updated on; mean lengths in
    tokens."""
    (tflops, traffic), live = DEVICES[device], min(plan.max_num_seqs, sequences)
    cached = live * (prompt + response / 2) * plan.kv_cache_bytes / plan.generation_budget
    read = plan.parts["policy weights"][0] + cached  # bytes for one token of each
    flops = 2 * plan.parameters  # per token; an update takes three times as much, four with gradient checkpointing
    decode = max(read / (SERVED * traffic * 1e9), live * flops / (SERVED * tflops * 1e12)) / live
    update = (4 if plan.gradient_checkpointing else 3) * flops / (MFU * tflops * 1e12)
    step = 28 * plan.parameters / (HOST if plan.offload_optimizer else traffic * 1e9)  # each number of it once
    return {
        "generate": sequences * response * decode,
        "update": trained * (prompt + response) * update + step,
    }
