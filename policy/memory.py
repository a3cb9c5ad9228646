"""What will fit: memory of the training and the rollout phase, predicted before anything is loaded.

What it does: `plan` counts the bytes of both phases from a model's Hugging Face config and chooses what makes them fit
(optimizer in host memory, engine asleep during the update, gradient checkpointing, tokens per micro-batch, KV cache);
`estimate_seconds` adds a rough time per step. Needs neither torch nor the weights.
What it leaves out: several cards, quantised weights, mixture-of-experts models. Byte counts follow what trr.py and
optimizer.py keep: bf16 weights, fp32 gradient sums, fp32 master and two moments; fp32 weights are their own master.
GB means 1e9 bytes: "24 GB" cards report 22.5 to 23.6 GiB = 24.1 to 25.4e9 bytes.

    print(plan(config, card_bytes=80 * GB, free_host_bytes=64 * GB, max_len=4096, sequences=1728).describe())
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

GB, GiB = 10**9, 2**30
FILL = 0.95  # share of the memory a plan may use; the rest is for fragmentation and other programs
CONTEXT = 1.2 * GiB  # CUDA context, kernels, allocator slack of this process
ENGINE = 1.0 * GiB  # CUDA graphs and workspace of the awake engine, beside weights, cache, prefill and logits
ASLEEP = 1.0 * GiB  # what a sleeping engine keeps (graphs, buffers)
HOST_BASE = 0.4 * GB  # Python, torch and transformers themselves, when everything lives in host memory
HOST_ENGINE = 0.35 * GB  # vLLM's own code and buffers there; it also keeps its weights twice, packed for the products
HEAP = 1.4  # factor of short-lived tensors on a CPU: the C library keeps what was freed, full of holes
CHUNK = 512  # tokens whose logits exist at the same time in logprobs.token_logprobs
ENOUGH_TOKENS = 16384  # larger micro-batches are no faster: the matrix products are saturated; 1/8 is tried as well
CPU_TOKENS = 4096  # a CPU is saturated long before, and small micro-batches stay nearer to its caches
GOOD_SEQUENCES = 256  # in flight: with fewer, decoding slows visibly
MOST_SEQUENCES = 512  # with more, it hardly gains
BATCH_TOKENS = 65536  # of one batch of the transformers engine: longer batches mix short and long rows and gain nothing
PREFILL_TOKENS = 8192  # of prompts that an engine reads at a time: enough to saturate, and it bounds the activations
MEAN_FILL = 0.25  # vLLM's cache is made for sequences that are on average a quarter as long as the longest allowed,
LIKELY_FILL = 0.125  # but as many are let in as fit at an eighth: vLLM puts some off if they grow longer


def shape(config) -> dict[str, int]:
    """The sizes that matter, from a Hugging Face config: layers, hidden, inner, q, kv (widths), heads, vocab."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return {
        "layers": config.num_hidden_layers, "hidden": config.hidden_size, "inner": config.intermediate_size,
        "q": heads * head_dim, "kv": kv_heads * head_dim, "heads": heads, "head_dim": head_dim,
        "vocab": config.vocab_size,
    }  # fmt: skip


def count_parameters(config) -> int:
    """Parameters of a gated-MLP decoder, tied embeddings counted once; exact for llama, qwen2 and qwen3."""
    s = shape(config)
    qwen2 = config.model_type == "qwen2"
    attention_bias = qwen2 or getattr(config, "attention_bias", False)
    layer = s["hidden"] * (2 * s["q"] + 2 * s["kv"]) + 3 * s["hidden"] * s["inner"] + 2 * s["hidden"]
    if attention_bias:
        layer += s["q"] + 2 * s["kv"] + (0 if qwen2 else s["hidden"])  # qwen2 has no bias after attention
    if getattr(config, "mlp_bias", False):
        layer += 2 * s["inner"] + s["hidden"]
    if config.model_type == "qwen3":
        layer += 2 * s["head_dim"]  # norms of queries and keys
    embeddings = s["vocab"] * s["hidden"] * (1 if config.tie_word_embeddings else 2)
    return embeddings + s["layers"] * layer + s["hidden"]


def kv_bytes_per_token(config, width: int = 2) -> int:
    """Bytes one token takes in the KV cache; `width` bytes per number."""
    s = shape(config)
    return 2 * s["layers"] * s["kv"] * width


def activation_bytes(config, tokens: int, checkpointing: bool, width: int = 2) -> tuple[int, int]:
    """(bytes autograd keeps between forward and backward, largest extra while one layer runs backward).

    Counted from what the Hugging Face layers save: both norms keep an fp32 copy, attention its inputs and output twice,
    the MLP four inner vectors. Checkpointing keeps one hidden vector per layer and makes one layer's rest again.
    """
    s = shape(config)
    norms = 2 * (4 + 2 * width) * s["hidden"]
    layer = norms + width * (3 * s["q"] + 2 * s["kv"] + 4 * s["inner"]) + 4 * s["heads"] + 8
    outside = (4 + 2 * width) * s["hidden"]  # last norm, and the hidden states that reach the head
    gradients = width * 4 * s["inner"]
    if checkpointing:
        return tokens * (s["layers"] * width * s["hidden"] + outside), tokens * (layer + gradients)
    return tokens * (s["layers"] * layer + outside), tokens * gradients


@dataclass(frozen=True)
class Plan:
    """What was chosen, and the bytes of each part in the (training, rollout) phase."""

    device: str  # "cuda" or "cpu"
    engine: str
    parameters: int
    offload_optimizer: bool
    sleep: bool
    gradient_checkpointing: bool
    token_budget: int  # tokens of a micro-batch
    kv_cache_bytes: int
    generation_budget: int  # the same in tokens: what the transformers engine may hold at a time
    max_num_seqs: int
    parts: dict[str, tuple[int, int]]
    limit: int  # bytes that may be used on the card (host memory on a CPU)
    host_bytes: int  # held in host memory because of offloading
    reasons: dict[str, str]

    @property
    def train_peak(self) -> int:
        """Compare with total - free of the card, or the process's RSS on a CPU: both hold more than torch's tensors."""
        return sum(train for train, _ in self.parts.values())

    @property
    def rollout_peak(self) -> int:
        return sum(rollout for _, rollout in self.parts.values())

    def describe(self) -> str:
        where = "host memory" if self.device == "cpu" else "card"
        lines = [f"{self.parameters / 1e9:.3g} B parameters; GB on the {where}     train   rollout"]
        rows = {**self.parts, "predicted peak": (self.train_peak, self.rollout_peak)}
        lines += [f"  {name:<38}{a / GB:8.2f}  {b / GB:8.2f}" for name, (a, b) in rows.items()]
        lines.append(f"  {'may be used':<38}{self.limit / GB:8.2f}  {self.limit / GB:8.2f}")
        if self.host_bytes:
            lines.append(f"  {'in host memory beside':<38}{self.host_bytes / GB:8.2f}  {self.host_bytes / GB:8.2f}")
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.reasons.items()])


def plan(
    config,
    *,
    card_bytes: int | None,
    free_host_bytes: int,
    max_len: int,
    sequences: int,
    engine: str = "vllm",
    width: int | None = None,
    gradient_bytes: int = 4,
    max_prompt: int | None = None,
    overrides: Mapping | None = None,
) -> Plan:
    """The fastest arrangement that fits.

    `card_bytes`: memory of the card, None for a CPU. `max_len`: longest prompt + response in tokens. `sequences`: most
    sequences of one generate call. `engine`: "vllm" holds its own copy of the weights, "transformers" uses the policy.
    `width`: bytes per weight (None: 2 on a card, 4 on a CPU). `gradient_bytes`: per parameter, of the summed gradients.
    `max_prompt`: tokens of the longest prompt (None: as long as `max_len`).
    `overrides` fixes any of sleep, offload_optimizer, gradient_checkpointing, token_budget, kv_cache_bytes.
    Raises ValueError with one sentence that says what to lower when nothing fits.
    """
    width = width or (4 if card_bytes is None else 2)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    unknown = set(given) - {"sleep", "offload_optimizer", "gradient_checkpointing", "token_budget", "kv_cache_bytes"}
    if unknown:
        raise ValueError(f"the memory plan has no setting named {', '.join(sorted(unknown))}")
    fixed = (config, card_bytes, free_host_bytes, sequences, engine, width, gradient_bytes, max_prompt or max_len)
    if found := search(*fixed, max_len, given):
        return found
    size = f"{count_parameters(config) / 1e9:.3g} B parameters do not fit"
    room = f"{(free_host_bytes if card_bytes is None else card_bytes) / GB:.0f} GB"
    if given and search(*fixed, max_len, {}):
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{size} in {room} with the given {flags}; leave that to the plan or lower it")
    for shorter in (length for length in (16384, 8192, 4096, 2048, 1024, 512, 256) if length < max_len):
        if search(*fixed, shorter, {}):
            raise ValueError(
                f"{size} in {room} with sequences of {max_len} tokens; "
                f"lower --max-prompt and --max-response so that they add up to {shorter} at most"
            )
    host = "" if card_bytes is None else f" and {free_host_bytes / GB:.0f} GB of free host memory"
    raise ValueError(f"{size} in {room}{host} at any length; choose a smaller --model, or free or add memory")


def search(
    config, card_bytes, free_host_bytes, sequences, engine, width, gradient_bytes, max_prompt, max_len, given
) -> Plan | None:
    """First arrangement that fits, cheapest first. Sleeping costs about a second a step, offloading moves 24 bytes per
    parameter over the bus (seconds), checkpointing adds a third to the update. A KV cache for fewer sequences slows
    generation, the longest phase, most of all: it is halved only after every combination was tried."""
    cpu, copy = card_bytes is None, engine == "vllm"
    s, count, kv_token = shape(config), count_parameters(config), kv_bytes_per_token(config, width)
    limit = int(FILL * (free_host_bytes if cpu else card_bytes))
    weights, states = width * count, (8 if width == 4 else 12) * count  # fp32 weights are their own master
    least = (max_len + 32) * kv_token  # the longest sequence alone, in whole blocks: no engine starts with less
    length = max_len * (MEAN_FILL if copy else 1)  # transformers reserves the longest for every row of a batch
    likely = max_len * (LIKELY_FILL if copy else 1)
    useful = [min(sequences, n) * length for n in (GOOD_SEQUENCES, MOST_SEQUENCES)]
    wanted, most = (max(least, int(n if copy else min(n, BATCH_TOKENS)) * kv_token) for n in useful)

    def layout(sleep: bool, offload: bool, checkpointing: bool, tokens: int, kv: int) -> dict[str, tuple[int, int]]:
        saved, backward = activation_bytes(config, tokens, checkpointing, width)
        table = s["vocab"] * s["hidden"]  # its gradient: fp32 sum over chunks, and a bf16 copy when handed on
        head = min(CHUNK, tokens) * s["vocab"] * (8 + width) + (4 if width == 4 else 6) * table
        heap, twice = (HEAP, 2) if cpu else (1, 1)
        beside = copy and not sleep  # the engine stays while the policy trains
        awake, asleep = (HOST_ENGINE if cpu else ENGINE, 0 if cpu else ASLEEP) if copy else (0, 0)
        parts = {
            "policy weights": (weights, weights),
            "optimizer (master and moments)": (0, 0) if offload else (states, states),
            # an offloaded optimizer sums them in the policy's own type, so that 3B fits a 24 GB card
            "gradients": ((width if offload else gradient_bytes) * count, 0),
            "activations": (saved * heap, 0),
            "logits chunk and backward": (max(head, backward + width * table) * heap, 0),
            "engine weights": (weights * twice * beside, weights * twice * copy),
            "KV cache": (kv * beside, kv if copy else kv * heap),
            "engine workspace": (awake if beside else asleep, awake + working(kv)),
            "context": (HOST_BASE, HOST_BASE) if cpu else (CONTEXT, CONTEXT),
        }
        return {name: (int(a), int(b)) for name, (a, b) in parts.items() if a or b}

    def live(kv: int) -> int:
        """Sequences in flight. Too many for the cache cost a second prefill now and then, too few cost speed always."""
        most_rows = MOST_SEQUENCES if copy else sequences
        return max(1, min(sequences, most_rows, int(kv / (kv_token * likely))))

    def working(kv: int) -> float:
        """What reading prompts and sampling take beside the cache: a layer of the prompt tokens read at a time, and
        per sequence in flight its logits (vLLM: bf16 and one fp32 copy; transformers: `rollout.sample`)."""
        if copy:
            read, token, row = max(PREFILL_TOKENS, max_len if cpu else 0), 3 * s["inner"] + 4 * s["hidden"] + s["q"], 6
        else:
            read = min(max(PREFILL_TOKENS, max_prompt), kv / kv_token)
            token, row = 4 * s["inner"] + 2 * s["hidden"], 20
        return (read * width * token + live(kv) * s["vocab"] * row) * (HEAP if cpu else 1)

    def room(parts: dict) -> tuple[int, int]:
        return limit - sum(a for a, _ in parts.values()), limit - sum(b for _, b in parts.values())

    def choices(name: str, possible: bool = True) -> tuple[bool, ...]:
        return (bool(given[name]) and possible,) if name in given else (False, True) if possible else (False,)

    budgets = [given.get("token_budget", (CPU_TOKENS if cpu else ENOUGH_TOKENS) >> k) for k in range(4)]
    caches = [given.get("kv_cache_bytes", max(least, wanted >> k)) for k in range(12)]
    arrangements = product(
        dict.fromkeys(caches),
        choices("gradient_checkpointing"),
        choices("offload_optimizer", not cpu and states <= FILL * free_host_bytes),
        choices("sleep", copy and not cpu),
        dict.fromkeys(max(max_len, tokens) for tokens in budgets),  # a sequence is never cut
    )
    for kv, checkpointing, offload, sleep, tokens in arrangements:
        arrangement = (sleep, offload, checkpointing, tokens)
        train_room, rollout_room = room(layout(*arrangement, kv))
        if min(train_room, rollout_room) < 0 or kv < least:
            continue
        if "kv_cache_bytes" not in given:  # what is left over goes to the cache, as far as it helps
            spare = min(train_room, rollout_room) if copy and not sleep else rollout_room
            larger = min(most, kv + int(spare / (HEAP if cpu else 1)))
            kv = max(kv, int(larger - (working(larger) - working(kv))))
        without, _ = activation_bytes(config, tokens, False, width)
        why = {
            "sleep": (sleep, "policy and engine do not fit side by side during the update"),
            "offload_optimizer": (offload, f"{states / GB:.1f} GB do not fit beside the rest"),
            "gradient_checkpointing": (checkpointing, f"saved activations would take {without / GB:.1f} GB"),
        }
        reasons = {
            name: ("on" if on else "off") + (", as given" if name in given else f": {text}" if on else ": not needed")
            for name, (on, text) in why.items()
        }
        reasons["token_budget"] = f"{tokens} tokens per micro-batch, the longest sequence has {max_len}"
        reasons["kv_cache"] = f"{kv / GB:.2f} GB = {kv // kv_token} tokens, about {live(kv)} sequences at a time"
        return Plan(
            device="cpu" if cpu else "cuda",
            engine=engine,
            parameters=count,
            offload_optimizer=offload,
            sleep=sleep,
            gradient_checkpointing=checkpointing,
            token_budget=tokens,
            kv_cache_bytes=kv,
            generation_budget=kv // kv_token,
            max_num_seqs=live(kv),
            parts=layout(*arrangement, kv),
            limit=limit,
            host_bytes=states if offload else 0,
            reasons=reasons,
        )
    return None


# Dense bf16 TFLOP/s, memory GB/s, bus GB/s from the vendors' data sheets; for a CPU: two cores, fp32, as a guess.
DEVICES = {
    "H200": (989, 4800, 50),
    "H100": (989, 3350, 50),
    "A100": (312, 2039, 25),
    "4090": (165, 1008, 25),
    "cpu": (0.1, 20, 20),
}
BANDWIDTH = 0.9  # sustained share of the sheet's memory bandwidth
MFU = 0.4  # share of peak reached by the update
SERVED = 0.35  # share of the decoding limit a real engine reaches: scheduler, sampler and gaps take the rest


def decode_limit(config, device: str, live: int, context: float, width: int = 2) -> float:
    """Most tokens/s that memory bandwidth and arithmetic allow with `live` sequences of mean length `context`."""
    tflops, memory, _ = DEVICES[device]
    count, s = count_parameters(config), shape(config)
    read = width * count + live * context * kv_bytes_per_token(config, width)
    arithmetic = 2 * count + 4 * s["layers"] * s["q"] * context
    return live / max(read / (BANDWIDTH * memory * 1e9), live * arithmetic / (tflops * 1e12))


def estimate_seconds(
    config, plan: Plan, device: str, *, prompts: int, sequences: int, trained: int, prompt_tokens: int,
    response_tokens: int,
) -> dict[str, float]:  # fmt: skip
    """Rough seconds per step by phase: an estimate for orientation (say so when printing it), not a measurement.

    `prompts`: different prompts (a shared prefix is read once), `sequences`: generated, `trained`: rows in the update;
    mean lengths in tokens. Python overhead, the executor and the uneven end of a batch are not counted, so models under
    0.1 B parameters take longer. Raises ValueError for a device that is not in DEVICES.
    """
    if device not in DEVICES:
        raise ValueError(f"no figures for {device!r}: choose one of {', '.join(DEVICES)}")
    tflops, memory, bus = DEVICES[device]
    width = 4 if device == "cpu" else 2
    s, context = shape(config), prompt_tokens + response_tokens / 2
    rate = SERVED * decode_limit(config, device, min(plan.max_num_seqs, sequences), context, width)
    forward = 2 * plan.parameters + 4 * s["layers"] * s["q"] * context  # FLOP per token
    passes = 4 if plan.gradient_checkpointing else 3
    seconds = {
        "generate": sequences * response_tokens / rate + prompts * prompt_tokens * forward / (MFU * tflops * 1e12),
        "update": trained * (prompt_tokens + response_tokens) * passes * forward / (MFU * tflops * 1e12),
        "optimizer": plan.parameters * (24 / (bus * 1e9) if plan.offload_optimizer else 28 / (memory * 1e9)),
        "sync": 4 * plan.parameters / (BANDWIDTH * memory * 1e9) if plan.engine == "vllm" else 0.0,
    }
    return seconds | {"step": sum(seconds.values())}
