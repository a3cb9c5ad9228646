"""Decoding with the policy itself: never stale, exact on a CPU, slower than vLLM for real models.

What it does: samples in batches whose finished rows leave; samples of one prompt share its key-value cache.
What it leaves out: speculative decoding, paged caches. Paper: section 3.3 (rollouts of both roles).

    engine = TransformersEngine(policy, tokenizer, max_model_len=2048, token_budget=32768)
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from policy.engine import Completion, Engine, Request
from policy.memory import PREFILL_TOKENS


class TransformersEngine(Engine):
    """Samples with the policy's own forward pass. `token_budget` bounds rows x (prompt + new tokens) of a batch, and
    with it the key-value cache."""

    name, is_policy = "transformers", True

    def __init__(self, policy: PreTrainedModel, tokenizer, max_model_len: int, token_budget: int):
        super().__init__(policy, tokenizer, policy.device.type, max_model_len)
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
        """Decode one batch. Each row draws its uniforms from its own generator before the loop, so what row r draws at
        position t depends neither on the other rows nor on when they leave (cache compaction)."""
        device, limits = self.policy.device, [request.limit for request, _ in rows]
        sources = [torch.Generator().manual_seed(request.seed + j) for request, j in rows]
        uniforms = [torch.rand(max(limits), generator=source, dtype=torch.float64) for source in sources]
        uniforms = torch.stack(uniforms).to(device)
        temperature = torch.tensor([request.temperature for request, _ in rows], device=device)
        limit, eos = torch.tensor(limits, device=device), torch.tensor(self.eos, device=device)
        out = torch.zeros(uniforms.shape, dtype=torch.long, device=device)  # (B, T) sampled ids
        scores = torch.zeros(uniforms.shape, device=device)  # (B, T) their log-probabilities
        lengths, stopped = torch.zeros_like(limit), torch.zeros_like(limit, dtype=torch.bool)
        live = torch.arange(len(rows), device=device)  # rows still in the batch
        logits, cache, mask, positions = self._prefill([request.ids for request, _ in rows])
        for t in range(max(limits)):
            tokens, logprobs = sample(logits, uniforms[live, t], temperature[live], top_p, self.vocab_size)
            out[live, t], scores[live, t] = tokens, logprobs
            ends = torch.isin(tokens, eos)
            if stop:
                ends |= self._hits_stop(out[live, : t + 1], stop)
            # A finished row stays in the batch until the next compaction, but its length is set.
            closing = (lengths[live] == 0) & (ends | (limit[live] == t + 1))
            lengths[live[closing]] = t + 1
            stopped[live[closing]] = ends[closing]
            closed, left = int(closing.sum()), int((lengths[live] == 0).sum())
            if progress:
                progress(closed, closed + left)
            if not left:
                break
            if left <= 0.75 * len(live):  # copying the cache costs about one step, so not for every single row
                kept = (lengths[live] == 0).nonzero().squeeze(1)
                cache.reorder_cache(kept)  # unlike batch_select_indices, layers without keys have it, too
                live, mask, positions, tokens = live[kept], mask[kept], positions[kept], tokens[kept]
            mask, positions = torch.cat([mask, mask.new_ones(len(live), 1)], 1), positions + 1
            logits = self._forward(tokens[:, None], mask, positions, cache)
        results = zip(rows, out.tolist(), scores.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        return [
            Completion(ids[:length], chances[:length] if request.logprobs else None, ended)
            for (request, _), ids, chances, length, ended in results
        ]

    def _prefill(self, rows: list[list[int]]) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
        """Logits (B, V), cache, mask (B, width) and last positions (B, 1) after the prompts, padded on the left.

        Rows with the same prompt stand together, and it is read once. Prompts are read `PREFILL_TOKENS` at a time: the
        activations of a whole batch of them would be larger than its cache.
        """
        prompts, owner = [], []  # distinct prompts, and the prompt that each row continues
        for ids in rows:
            if not prompts or prompts[-1] is not ids:
                prompts.append(ids)
            owner.append(len(prompts) - 1)
        width, device = max(map(len, prompts)), self.policy.device
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions, owner = (mask.cumsum(-1) - 1).clamp(min=0), torch.tensor(owner, device=device)
        logits, caches = [], []
        for part in torch.arange(len(ids), device=device).split(max(1, PREFILL_TOKENS // width)):
            caches.append(DynamicCache(config=self.policy.config))
            layers = caches[-1].layers  # one plain kind of layer; sliding windows and recurrent states have their own
            caches[-1].layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in layers]
            logits.append(self._forward(ids[part], mask[part], positions[part], caches[-1]))
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            for parts in zip(*map(_states, layers), strict=True):
                (held, name), *_ = parts
                held[name] = torch.cat([held[name] for held, name in parts])[owner]
        return torch.cat(logits)[owner], caches[0], mask[owner], positions[owner, -1:]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the last position, (B, V) fp32; those of the prompt are never computed."""
        place = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        return self.policy(input_ids=ids, logits_to_keep=1, **place).logits[:, -1].float()

    def _hits_stop(self, out: Tensor, stop: Sequence[str]) -> Tensor:
        # A stop string of b bytes spans at most b tokens; 4 more give the decoder its context.
        texts = self.tokenizer.batch_decode(out[:, -max(len(text.encode()) for text in stop) - 4 :])
        return torch.tensor([any(text in decoded for text in stop) for decoded in texts], device=out.device)

    def sync(self, policy: PreTrainedModel) -> None:
        """Nothing to push. Raises ValueError for another model than the one the engine was built with."""
        if policy is not self.policy:
            raise ValueError("The transformers engine samples from the policy it was built with: build a new engine.")


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, (B, heads, T, D), in room that grows by blocks: transformers' own layer copies all
    of them for every token, which is half of the decoding time on a CPU."""

    block = 48  # tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        self.keys, self.values = self.grown(self.keys, key_states), self.grown(self.values, value_states)
        return self.keys, self.values

    def grown(self, held: Tensor, added: Tensor) -> Tensor:
        """`held` and behind it `added`: the first places of a longer tensor, of which `held` may be a view already."""
        old, new, room = held.shape[-2], held.shape[-2] + added.shape[-2], held._base
        if room is None or room.shape[-2] < new:  # rows have left, or it is full
            room = held.new_empty(*held.shape[:2], new + self.block, held.shape[-1])
            room[:, :, :old] = held
        room[:, :, old:new] = added
        return room[:, :, :new]


def _states(layer) -> list[tuple[dict, object]]:
    """Where a layer of a cache holds its tensors, one row per sequence: keys and values, or recurrent states."""
    held = [vars(layer), *(value for value in vars(layer).values() if isinstance(value, dict))]
    return [(each, name) for each in held for name, value in each.items() if isinstance(value, Tensor) and value.dim()]


def sample(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
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
