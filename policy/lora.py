"""LoRA: a frozen policy with small trained adapters on all its linear layers, for cards that hold no full optimizer.

What it does: `add_adapters` lets peft put adapters into the policy in place, so that the policy stays the plain model
that the rest of the project knows, with the adapters as its only trained parameters. `merged_weights` is what an engine
and a checkpoint get: base + adapter, layer by layer, under the names of the plain model.
What it leaves out: quantised bases, several adapters, adapters on embeddings and head. The paper trains all weights.

    add_adapters(policy, rank=32); engine.sync(policy)
"""

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

SCALE = 2  # of what an adapter adds to its layer, whatever its rank


def add_adapters(policy: PreTrainedModel, rank: int) -> None:
    """Freeze the policy and give each linear layer but the head an adapter of this rank, which adds nothing at first.

    Raises ValueError where peft is not installed, or where the rank is larger than a layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("--lora needs peft: pip install -r requirements-lora.txt") from None
    if rank > policy.config.hidden_size:
        raise ValueError(f"--lora {rank} is more than the {policy.config.hidden_size} dimensions of a layer; lower it")
    policy.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear")
    inject_adapter_in_model(config, policy)  # in the policy's dtype: the optimizer keeps fp32 masters


def merged_weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the plain model that computes the same: `state_dict` without adapters, each added to its layer.
    One merged layer exists at a time."""
    for name, weight in policy.state_dict().items():
        if ".lora_" in name:
            continue
        layer, _, what = name.partition(".base_layer.")
        if what == "weight":
            delta = policy.get_submodule(layer).get_delta_weight("default")
            weight = (weight.float() + delta.float()).to(weight.dtype)
        yield name.replace(".base_layer", ""), weight


def plain_shapes(policy: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `merged_weights`, nothing computed."""
    weights = policy.state_dict().items()
    return {name.replace(".base_layer", ""): tuple(weight.shape) for name, weight in weights if ".lora_" not in name}


def count_adapters(policy: PreTrainedModel, rank: int) -> int:
    """Parameters that adapters of this rank would add: rank x (inputs + outputs) of every linear layer but the head."""
    head = policy.get_output_embeddings()
    layers = [layer for layer in policy.modules() if hasattr(layer, "in_features") and layer is not head]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)
