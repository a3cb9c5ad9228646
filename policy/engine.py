"""The interface of the generation engines: token ids in, token ids out.

What it does: defines a completion and the call that makes completions, and checks that call's arguments once for both
engines (transformers_engine.py, vllm_engine.py). Both sample from the distribution that the loss differentiates: a
model folder's own sampling settings are ignored.
What it leaves out: text. The caller owns the tokenizer, because decoding and encoding again would change ids.
Paper: section 3.3 (rollouts of both roles at temperature 1).

    [[completion]] = engine.generate([ids], max_new_tokens=32, seed=0)
    engine.sync(policy)                                    # after every optimizer step
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]  # called with (sequences newly finished, tokens newly generated)


class SyncError(RuntimeError):
    """The engine does not sample from the policy as it is now."""


@dataclass
class Completion:
    """One sampled continuation. `token_ids` keeps the end-of-sequence id; `stopped` is False where the length cut it.

    `logprobs[i]` is the log-probability of `token_ids[i]` under the distribution it was drawn from (after temperature
    and top-p), None where not asked for. With stop strings the ids reach to the token that completes the stop string.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    stopped: bool


@dataclass
class Request:
    """One prompt of a call. Its sample j (of `n`) is drawn with seed `seed + j`, and has `limit` tokens at most."""

    ids: list[int]
    n: int
    temperature: float
    logprobs: bool
    limit: int
    seed: int


class Engine(ABC):
    """Samples from the policy. `is_policy`: by the policy's own forward pass, so its samples need no correction."""

    name: str
    is_policy: bool

    def __init__(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str, max_model_len: int):
        self.device, self.max_model_len = device, max_model_len
        self.dtype = str(policy.dtype).removeprefix("torch.")
        self.eos = eos_ids(policy, tokenizer)
        # Models pad their embedding beyond the tokenizer's last id: such an id has no text and must not be sampled.
        self.vocab_size = min(policy.config.vocab_size, max(tokenizer.get_vocab().values()) + 1)

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        n: int | list[int] = 1,
        temperature: float | list[float] = 1.0,
        top_p: float = 1.0,
        seed: int,
        logprobs: bool | list[bool] = False,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """`n` completions of each prompt; `seed` alone determines them, global random state is neither read nor moved.

        `n`, `temperature` (0 = greedy) and `logprobs` take one value or one per prompt. Raises ValueError for a prompt
        that leaves no room within `max_model_len`; a completion is cut there as it is at `max_new_tokens`.
        """
        settings = [each if isinstance(each, list) else [each] * len(prompts) for each in (n, temperature, logprobs)]
        for values in settings:
            if len(values) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts came with {len(values)} values: give one, or one per prompt.")
        if max_new_tokens < 1 or min(settings[0], default=1) < 1:
            raise ValueError(f"Cannot sample {n} times {max_new_tokens} tokens: both numbers must be at least 1.")
        # Neighbouring seeds of two calls must not share sample seeds, so the call's seed is spread over 48 bits first.
        requests, sample_seed = [], random.Random(seed).getrandbits(48)
        for ids, count, heat, wanted in zip(prompts, *settings, strict=True):
            room = self.max_model_len - len(ids)
            if not ids or room < 1:
                raise ValueError(
                    f"A prompt of {len(ids)} tokens does not fit: it must have at least 1 and leave room for an answer "
                    f"within {self.max_model_len} tokens (raise the maximum length or shorten the prompt)."
                )
            if not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise ValueError(
                    f"A prompt has ids outside 0..{self.vocab_size - 1}, which model and tokenizer share: resize the "
                    "model's embeddings, or use the tokenizer that it was trained with."
                )
            requests.append(Request(ids, count, heat, wanted, min(max_new_tokens, room), sample_seed))
            sample_seed += count
        return self._run(requests, top_p, stop, progress)

    @abstractmethod
    def _run(self, requests: list[Request], top_p, stop, progress) -> list[list[Completion]]:
        """The completions of each request; the arguments are checked."""

    @abstractmethod
    def sync(self, policy: PreTrainedModel) -> None:
        """Make the engine sample from the policy as it is now."""

    def sleep(self) -> None:  # noqa: B027 (the transformers engine holds nothing of its own)
        """Free what the engine holds on the GPU, where it was built to, until the next `sync`."""


def eos_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the tokenizer's and those of the model's generation config."""
    configured = policy.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if isinstance(i, int)})


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
