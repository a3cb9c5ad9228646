"""Generation engines: token ids in, token ids out, with the weights of the policy that is being trained.

What it does: loads a policy with its tokenizer, and samples from it through one of two engines with the same methods.
`TransformersEngine`, below, decodes with the policy itself (any device, bit-exact when repeated on CPU); `VllmEngine`
(vllm_engine.py) gets the policy's weights pushed into it after every update. Both sample from the distribution that the
loss differentiates: sampling settings that a model folder carries in `generation_config.json` are ignored.
What it leaves out: several GPUs, quantisation, speculative decoding, engines in other processes.
Paper: section 3.3 (rollouts of both roles at temperature 1).

    policy, tokenizer = load_policy("Qwen/Qwen2.5-Coder-0.5B-Instruct", "cpu", "float32")
    engine = make_engine("auto", path, policy, tokenizer, dtype="float32", max_model_len=2048)
    [[completion]] = engine.generate([tokenizer.encode("def f(")], max_new_tokens=32, seed=0)
    engine.sync(policy)                                    # after every optimizer step
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from policy.engine import Completion, Engine, Request, SyncError, eos_ids, first_line, ran_out_of_memory
from policy.memory import PREFILL_TOKENS
from policy.vllm_engine import VllmEngine, import_vllm, vllm_build

# Names under which the paper and its readers speak of the models, and the names under which the hub serves them.
MODEL_ALIASES = {
    f"Qwen/Qwen2.5-{size}-Coder{kind}": f"Qwen/Qwen2.5-Coder-{size}{kind}"
    for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")
    for kind in ("", "-Instruct")
}
# What transformers raises for damaged folders: its own checks, those of the libraries below it, or none at all.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, EOFError, UnpicklingError)
LOAD_ERRORS += (SafetensorError, StrictDataclassError)
SYNC_LIMIT = 0.1  # nats per token; bf16 noise is below 0.05, stale weights were seen at 0.2 and more

# ---------------------------------------------------------------------------------------------------------------------
# The policy


def resolve_model(name: str) -> str:
    """The folder or hub name that `name` means; raises ValueError where it can be neither."""
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise ValueError(f"The folder {name} has no config.json: give a model folder in Hugging Face format.")
        return name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith("."):
        raise ValueError(
            f"There is no model {name}: give an existing folder or a hub name such as Qwen/Qwen2.5-Coder-3B."
        )
    return MODEL_ALIASES.get(name, name)


def load_config(name: str) -> PretrainedConfig:
    """The model's config alone, so that a wrong name is found before anything large is loaded; raises ValueError."""
    path = resolve_model(name)
    try:
        return AutoConfig.from_pretrained(path)
    except LOAD_ERRORS as error:
        known = Path(path).is_dir()
        what = f"The config.json of {path} cannot be used" if known else f"There is no model {path} to be had here"
        raise ValueError(f"{what}: {first_line(error)}") from error


def load_policy(name: str, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder or the hub; `dtype` is that of the parameters ("float32", "bfloat16").

    Raises ValueError, in one sentence, for a name that is no model, a folder without tokenizer, incomplete weights and
    a model without end-of-sequence id.
    """
    path = resolve_model(name)
    config = load_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except LOAD_ERRORS as error:
        raise ValueError(
            f"{path} has no usable tokenizer ({first_line(error)}): put its tokenizer files beside config.json."
        ) from error
    try:
        policy, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True
        )
    except LOAD_ERRORS as error:
        if ran_out_of_memory(error):
            raise
        raise ValueError(f"The weights of {path} could not be loaded: {first_line(error)}") from error
    if other := [key for key, *_ in report["mismatched_keys"]]:
        raise ValueError(f"The weights of {path} have other sizes than its config.json says, first {min(other)}.")
    if report["missing_keys"]:  # transformers would leave them random
        raise ValueError(f"The weights of {path} are incomplete: {min(report['missing_keys'])} is missing.")
    if more := [key for key in report["unexpected_keys"] if ".layers." in key]:  # transformers would drop them
        raise ValueError(f"The weights of {path} hold {min(more)}, which its config.json does not have: restore it.")
    if not eos_ids(policy, tokenizer):
        raise ValueError(f"{path} names no end-of-sequence token: set eos_token in its tokenizer_config.json.")
    return policy.to(device), tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Decoding with the policy itself


class TransformersEngine(Engine):
    """Samples with the policy's own forward pass: never stale, exact on CPU, slower than vLLM for real models."""

    name, is_policy = "transformers", True

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        max_model_len: int,
        token_budget: int,
    ):
        """`token_budget` bounds rows x (prompt + new tokens) of a batch, so its cache; compute is in `dtype`."""
        super().__init__(policy, tokenizer, policy.device.type, dtype, max_model_len)
        self.policy, self.tokenizer, self.token_budget = policy, tokenizer, token_budget

    def _run(self, requests, top_p, stop, progress):
        rows = [(request, j) for request in requests for j in range(request.n)]
        done, training = {}, self.policy.training
        self.policy.eval()  # no dropout; and gradient checkpointing, on in training only, would switch the cache off
        try:
            for batch in _batches(rows, self.token_budget):
                for (request, j), completion in zip(batch, self._decode(batch, top_p, stop, progress), strict=True):
                    done[request.seed + j] = completion
        finally:
            self.policy.train(training)
        return [[done[request.seed + j] for j in range(request.n)] for request in requests]

    @torch.no_grad()
    def _decode(self, rows: list[tuple[Request, int]], top_p, stop, progress) -> list[Completion]:
        """Decode one batch. Finished rows leave it (cache compaction), samples of one prompt share its prefill.

        Each row draws its uniforms from its own generator before the loop, so what row r draws at position t depends
        neither on the other rows nor on when they leave.
        """
        device, limits = self.policy.device, [request.limit for request, _ in rows]
        uniforms = torch.zeros(len(rows), max(limits), dtype=torch.float64)
        for row, length, (request, j) in zip(uniforms, limits, rows, strict=True):
            row[:length].uniform_(generator=torch.Generator().manual_seed(request.seed + j))
        uniforms = uniforms.to(device)
        temperature = torch.tensor([request.temperature for request, _ in rows], device=device)
        limit, eos = torch.tensor(limits, device=device), torch.tensor(self.eos, device=device)
        out = torch.zeros(uniforms.shape, dtype=torch.long, device=device)  # (B, T) sampled ids
        scores = torch.zeros(uniforms.shape, device=device)  # (B, T) their log-probabilities
        lengths, stopped = torch.zeros_like(limit), torch.zeros_like(limit, dtype=torch.bool)

        prompts, owner = [], []  # distinct prompts of the batch, and the prompt that each row continues
        for request, _ in rows:
            if not prompts or prompts[-1] is not request.ids:
                prompts.append(request.ids)
            owner.append(len(prompts) - 1)
        width, owner = max(map(len, prompts)), torch.tensor(owner, device=device)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        with _compute_in(self.dtype, self.policy):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits, cache = self._prefill(ids, mask, positions, owner)
            mask, positions = mask[owner], positions[owner, -1:]
            live = torch.arange(len(rows), device=device)  # rows still in the batch
            for t in range(max(limits)):
                tokens, logprobs = sample(logits, uniforms[live, t], temperature[live], top_p, self.vocab_size)
                open_ = lengths[live] == 0  # a finished row stays in the batch until the next compaction
                out[live, t], scores[live, t] = tokens, logprobs
                ends = torch.isin(tokens, eos)
                if stop:
                    ends |= self._hits_stop(out[live, : t + 1], stop)
                closing = open_ & (ends | (limit[live] == t + 1))
                lengths[live[closing]] = t + 1
                stopped[live[closing]] = ends[closing]
                closed, left = int(closing.sum()), int((lengths[live] == 0).sum())
                if progress:
                    progress(closed, closed + left)
                if not left:
                    break
                if left <= 0.75 * len(live):  # copying the cache costs about one step, so not for every single row
                    kept = (lengths[live] == 0).nonzero().squeeze(1)
                    cache.batch_select_indices(kept)
                    live, mask, positions, tokens = live[kept], mask[kept], positions[kept], tokens[kept]
                mask, positions = torch.cat([mask, mask.new_ones(len(live), 1)], 1), positions + 1
                logits = self._forward(tokens[:, None], mask, positions, cache)
        completions = []
        for (request, _), ids, chances, length, ended in zip(
            rows, out.tolist(), scores.tolist(), lengths.tolist(), stopped.tolist(), strict=True
        ):
            completions.append(Completion(ids[:length], chances[:length] if request.logprobs else None, ended))
        return completions

    def _prefill(self, ids, mask, positions, owner) -> tuple[torch.Tensor, DynamicCache]:
        """Logits (B, V) and cache of the rows that continue prompt owner[b] each. Prompts are read `PREFILL_TOKENS` at
        a time: the activations of a whole batch of them would be larger than its cache."""
        logits, caches = [], []
        for part in torch.arange(len(ids), device=ids.device).split(max(1, PREFILL_TOKENS // ids.shape[1])):
            caches.append(DynamicCache(config=self.policy.config))
            logits.append(self._forward(ids[part], mask[part], positions[part], caches[-1]))
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            layers[0].keys = torch.cat([layer.keys for layer in layers])[owner]
            layers[0].values = torch.cat([layer.values for layer in layers])[owner]
        return torch.cat(logits)[owner], caches[0]

    def _forward(self, ids, mask, positions, cache) -> torch.Tensor:
        """Logits of the last position, (B, V) fp32; those of the prompt are never computed."""
        output = self.policy(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _hits_stop(self, out: torch.Tensor, stop: Sequence[str]) -> torch.Tensor:
        # A stop string of b bytes spans at most b tokens; 4 more give the decoder its context.
        tail = max(len(text.encode()) for text in stop) + 4
        texts = self.tokenizer.batch_decode(out[:, -tail:])
        return torch.tensor([any(text in decoded for text in stop) for decoded in texts], device=out.device)

    def sync(self, policy: PreTrainedModel) -> None:
        """Nothing to push. Raises ValueError for another model than the one the engine was built with."""
        if policy is not self.policy:
            raise ValueError("The transformers engine samples from the policy it was built with: build a new engine.")


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: torch.Tensor, top_p: float, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw ids (B,) from fp32 logits (B, V) by inverting the distribution function at `uniform` (B,) in [0, 1).

    Returns ids and their log-probabilities. Rows of temperature (B,) 0 take the most likely id. Ids from `vocab_size`
    on, which the model has but the tokenizer lacks, have probability 0. The cumulative sum is fp64: over 150,000 fp32
    probabilities it would lose the rare tokens.
    """
    greedy = temperature == 0
    logprobs = (logits[:, :vocab_size] / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    if top_p < 1:
        ranked, order = logprobs.exp().sort(-1, descending=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p  # the id that crosses top_p is kept
        logprobs = logprobs.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    tokens = torch.where(greedy, logprobs.argmax(-1), drawn.clamp(max=logprobs.shape[1] - 1))
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(1)


def _batches(rows: list[tuple[Request, int]], token_budget: int) -> Iterator[list[tuple[Request, int]]]:
    """Rows by prompt length, cut where rows x (longest prompt + longest answer) would pass the budget."""
    batch, widest = [], 0
    for row in sorted(rows, key=lambda row: len(row[0].ids)):  # stable: samples of one prompt stay together
        own = len(row[0].ids) + row[0].limit
        widest = max(widest, own)
        if batch and (len(batch) + 1) * widest > token_budget:
            yield batch
            batch, widest = [], own
        batch.append(row)
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Choosing an engine


def choose_engine(kind: str) -> str:
    """What --engine auto means here: vLLM where its build fits the machine, else transformers, with a line that says so
    where vLLM is installed but unusable. Raises ValueError for an unknown name."""
    if kind not in ("auto", "vllm", "transformers"):
        raise ValueError(f"There is no engine {kind}: choose auto, vllm or transformers.")
    if kind != "auto" or vllm_build() is None:
        return "transformers" if kind == "auto" else kind
    try:
        import_vllm()
    except RuntimeError as error:
        print(f"using the transformers engine: {error}")
        return "transformers"
    return "vllm"


def make_engine(
    kind: str,
    model_path: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    max_model_len: int,
    token_budget: int = 32768,
    **for_vllm,
) -> Engine:
    """The engine called `kind` ("auto": `choose_engine`), holding the policy's weights. A "vllm" that cannot be had
    raises RuntimeError. `token_budget` is for transformers, `for_vllm` (see `VllmEngine`) for vLLM alone."""
    common = {"dtype": dtype, "max_model_len": max_model_len}
    if choose_engine(kind) == "transformers":
        return TransformersEngine(policy, tokenizer, **common, token_budget=token_budget)
    return VllmEngine(resolve_model(model_path), policy, tokenizer, **common, **for_vllm)


@torch.no_grad()
def check_sync(
    engine: Engine, policy: PreTrainedModel, prompts: list[list[int]], *, max_new_tokens: int = 16, seed: int = 0
) -> float:
    """Mean |engine logprob - policy logprob| in nats over tokens sampled from `prompts`: are the weights the policy's?

    Finds stale weights, a head that was not pushed, other sampling settings. Raises SyncError above `SYNC_LIMIT`, and
    for a policy whose probabilities are no numbers.
    """
    answers = engine.generate(prompts, max_new_tokens=max_new_tokens, seed=seed, logprobs=True)
    was_training, distances = policy.training, []
    policy.eval()
    for prompt, [answer] in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer.token_ids], device=policy.device)
        with _compute_in(engine.dtype, policy):
            logits = policy(input_ids=ids, logits_to_keep=len(answer.token_ids) + 1).logits[0, :-1].float()
        chosen = logits[:, : engine.vocab_size].log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(1)
        if chosen.isnan().any():
            raise SyncError(
                "The policy's probabilities are no numbers, so its weights are damaged: choose another --model."
            )
        distances.append((chosen - torch.tensor(answer.logprobs, device=policy.device)).abs())
    policy.train(was_training)
    mean = torch.cat(distances).mean().item()
    if not mean <= SYNC_LIMIT:  # nan, too
        raise SyncError(
            f"The {engine.name} engine does not sample from the policy (logprobs differ by {mean:.3g} nats per token, "
            f"limit {SYNC_LIMIT}), so its weights are stale: use the transformers engine."
        )
    return mean


def _compute_in(dtype: str, policy: PreTrainedModel) -> torch.autocast:
    """Parameters stay in their dtype; matrix products run in `dtype` where the two differ."""
    return torch.autocast(policy.device.type, getattr(torch, dtype), enabled=str(policy.dtype) != f"torch.{dtype}")
