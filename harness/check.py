"""The check of a model: does everything that a run needs of it work, before hours are spent.

What it does: `inspect_config` and `inspect_tokenizer` look before any weight is loaded; `rehearse` lets the engine
sample replies to a prompt of every cell, lets the update compute them, and saves a checkpoint without weights. Each
fills a part of one table (check -> result), and raises in one sentence at the first failure.
What it leaves out: whether the model is strong enough (seeding finds out).

    rows = inspect_config(config, hf_config)
    prompts, more = inspect_tokenizer(config, tokenizer, fresh=True)
    rows |= more | rehearse(policy, tokenizer, engine, optimizer.clear, prompts)
"""

import math
import random
import tempfile
from collections.abc import Callable
from types import SimpleNamespace

from transformers import GenerationConfig

import trr
from buffers import Buffer
from harness.config import Config
from policy.dialogue import encode, inspect_dialogue, wrap
from policy.engine import Engine, SyncError, first_line
from policy.load import LOAD_ERRORS, load_config, load_tokenizer, positions
from policy.logprobs import logit_scale, ran_out_of_memory

# Mean |engine logprob - policy logprob| in nats per token that a run bears: rounding is below 1e-4 in float32 and below
# 0.05 in bfloat16; stale weights were seen at 0.2 and more.
LIMITS = {"float32": 0.005, "bfloat16": 0.1}


def inspect_config(config: Config, hf_config) -> dict[str, str]:
    """Whether the update can compute such a model and lengths fit its positions; raises ValueError where not."""
    logit_scale(hf_config)
    most, wanted = positions(hf_config), config.max_prompt + config.max_response
    if most and wanted > most:
        prompt = max(1, most * config.max_prompt // wanted)
        raise ValueError(
            f"--max-prompt {config.max_prompt} and --max-response {config.max_response} need {wanted} positions, but "
            f"{config.model} has {most}; use --max-prompt {prompt} --max-response {most - prompt}, for example"
        )
    return {"lengths": f"{wanted} positions of {most or 'any number'}"}


def inspect_tokenizer(config: Config, tokenizer, fresh: bool) -> tuple[list[list[int]], dict[str, str]]:
    """The ids of the shortest prompt of each (role, kind) cell: about the given tasks, without references; and what
    was checked. Raises ValueError where a `fresh` run has no room for them, and as `inspect_dialogue`."""
    buffers = {name: Buffer(1, kind.key) for name, kind in config.buffered.items()}
    for name, kind in config.buffered.items():
        buffers[name].add(kind.zero())
    asked = []
    for kind in config.kinds.values():
        references = kind.references(buffers, 0, random.Random(0))
        asked += [kind.propose(references, config.inputs), kind.solve(kind.zero())]
    inspect_dialogue(tokenizer, config.template, config.tag_names)
    texts = [wrap(turns, tokenizer, config.template, tags=config.tag_names) for turns in asked]
    prompts = [encode(text, tokenizer) for text in texts]
    longest = max(map(len, prompts))
    if fresh and longest > config.max_prompt:
        short = f"--max-prompt {config.max_prompt} is too short for a prompt of {longest} tokens"
        raise ValueError(f"{short}; raise it, or train a model with more positions")
    return prompts, {"dialogue": f"{len(prompts)} {config.template} prompts of up to {longest} tokens and more"}


def rehearse(
    policy, tokenizer, engine: Engine, clear: Callable, prompts: list[list[int]], saved=False
) -> dict[str, str]:
    """What was checked with the weights, which stay as they are; raises as `compare` and `save_without_weights`.
    `saved`: the policy was read from a checkpoint, so that one can be written."""
    difference, saving = compare(engine, policy, prompts, clear), "config, generation config and tokenizer"
    if not saved:
        save_without_weights(policy, tokenizer, prompts[0])
    return {
        "update": f"logprobs of replies to {len(prompts)} prompts differ by {difference:.1e} nats from the engine's",
        "saving": f"{saving} {'were' if saved else 'can be'} read back",
    }


def compare(engine: Engine, policy, prompts: list[list[int]], clear: Callable) -> float:
    """Mean |engine logprob - logprob that the update computes| in nats over tokens sampled from `prompts`. The update
    is a whole one, with an optimizer that takes no step: `clear` forgets the gradients.

    Finds stale weights, a head that was not pushed, logits that the update does not make as the model does. Raises
    SyncError above the limit and for a policy whose probabilities are no numbers, ValueError for what else fails."""
    try:
        answers = [answer for [answer] in engine.generate(prompts, max_new_tokens=16, seed=0, logprobs=True)]
        engine.sleep()
        samples = [trr.Sample(ids, a.token_ids, 1.0, a.logprobs) for ids, a in zip(prompts, answers, strict=True)]
        pretence = SimpleNamespace(step=lambda lr, grad_clip: clear() or 0.0, clear=clear)
        longest = max(map(len, samples))
        result = trr.update(policy, pretence, samples, lr=0.0, token_budget=longest, vocab_size=engine.vocab_size)
    except (*LOAD_ERRORS, IndexError) as error:
        if ran_out_of_memory(error):
            raise
        kind = policy.config.model_type
        raise ValueError(f"a {kind} model cannot be trained here ({first_line(error)}); use another --model") from error
    if math.isnan(result.entropy):
        raise SyncError("The policy's probabilities are no numbers, its weights are damaged: use another --model.")
    unknown = any(math.isnan(logprob) for answer in answers for logprob in answer.logprobs)
    agree(engine, math.nan if unknown else result.mismatch)
    engine.sync(policy)
    return result.mismatch


def save_without_weights(policy, tokenizer, prompt: list[int]) -> None:
    """Raise ValueError unless a checkpoint of this model could be written and read back."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            policy.save_pretrained(folder, state_dict={})
            tokenizer.save_pretrained(folder)
            again = load_tokenizer(folder, load_config(folder))
            ends = GenerationConfig.from_pretrained(folder).eos_token_id
        except (*LOAD_ERRORS, AssertionError) as error:
            raise ValueError(f"this model cannot be saved ({first_line(error)}); mend its config.json") from error
    text = tokenizer.decode(prompt)
    if again.encode(text) != tokenizer.encode(text) or ends != policy.generation_config.eos_token_id:
        raise ValueError("this model's tokenizer or generation config is another after saving; use another --model")


def agree(engine: Engine, mismatch: float | None) -> None:
    """Raise SyncError where engine and update differ by more than rounding; `mismatch`: None where not measured."""
    limit = LIMITS.get(engine.dtype, 0.1)
    if mismatch is not None and not mismatch <= limit:  # nan, too
        raise SyncError(
            f"The {engine.name} engine does not sample from the policy that is trained (logprobs differ by "
            f"{mismatch:.3g} nats per token, limit {limit}): its weights are stale, or the update does not know how "
            "this model makes its logits; use --engine transformers or another --model."
        )
