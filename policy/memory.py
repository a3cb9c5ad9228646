"""What will fit: one table of the bytes of both phases of a step, made before anything is loaded.

`table` is arithmetic to be checked by hand. `plan` takes the first arrangement that fits: policy and engine side by
side; engine asleep during the update; asleep, optimizer in host memory. The KV cache gets the rest. Where a plan is
wrong, `trr.update` halves its micro-batch. What it leaves out: several cards, quantised weights. GB means 1e9 bytes.

    print(plan(load_config(PATH), card_bytes=24 * GB, max_len=4096, sequences=1728).describe())
"""

from dataclasses import dataclass
from functools import partial

from policy.logprobs import CHUNK
from policy.speed import shape

GB, GiB = 10**9, 2**30
FILL = 0.95  # share of the memory a plan may use; the rest is for fragmentation and other programs
STATES = {2: 12, 4: 8}  # bytes of optimizer per parameter: fp32 master, two moments; fp32 weights are their own masters
# Bytes of CUDA (or Python) and of vLLM itself; factor of short-lived tensors: the heap of a CPU is full of holes.
HOLD = {"cuda": (1.2 * GiB, 1.0 * GiB, 1.0), "cpu": (0.4 * GB, 0.35 * GB, 1.4)}
ENOUGH_TOKENS = {"cuda": 16384, "cpu": 4096}  # of a micro-batch: larger ones are no faster; 1/8 is tried as well
BATCH_TOKENS = 65536  # of one batch of the transformers engine: longer batches mix short and long rows and gain nothing
PREFILL_TOKENS = 8192  # of prompts that an engine reads at a time: enough to saturate, and it bounds the activations
GOOD_ROWS, MOST_ROWS = 256, 512  # sampled at a time: with fewer, decoding slows visibly; with more, it hardly gains
# (engine asleep, gradient checkpointing, optimizer in host memory): a second a step, a third of the update, seconds.
ARRANGEMENTS = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what it takes."""

    engine: str
    device: str  # "cuda" or "cpu"
    parameters: int
    trained: int  # of them, or of the adapters
    sleep: bool
    gradient_checkpointing: bool
    offload_optimizer: bool
    token_budget: int  # tokens of a micro-batch
    generation_budget: int  # tokens in the KV cache
    kv_cache_bytes: int
    max_num_seqs: int
    parts: dict[str, tuple[int, int]]  # bytes of each part in the (training, rollout) phase
    train_peak: int  # compare with total - free of the card, or with the process's RSS on a CPU
    rollout_peak: int
    limit: int  # bytes that may be used on the card (host memory on a CPU)
    host_bytes: int  # needed in host memory beside the card

    def describe(self) -> str:
        rows = self.parts | {"may be used": (self.limit,) * 2, "needed in host memory": (self.host_bytes,) * 2}
        lines = [f"{self.parameters / 1e9:.3g} B parameters; GB, device {self.device:<20}train   rollout"]
        lines += [f"  {name:<38}{a / GB:8.2f}  {b / GB:8.2f}" for name, (a, b) in rows.items() if a or b]
        names = ("sleep", "gradient_checkpointing", "offload_optimizer", "token_budget", "max_num_seqs")
        return "\n".join(lines + [f"  {name}: {getattr(self, name)}" for name in names])


def table(config, sizes, engine, device, width, rows, read, sleep, again, offload, tokens, cache) -> dict:
    """Bytes of each part in the (training, rollout) phase, and their sums. `sizes`: `shape(config)`;
    `width`: bytes of a weight; `rows`: sampled at a time; `read`: prompt tokens read at a time; `again`: with gradient
    checkpointing; `tokens`: of a micro-batch; `cache`: bytes. Autograd keeps of each layer two norms with fp32 copies,
    inputs and output (twice) of the attention, four inner vectors of the MLP."""
    (parameters, q, kv, trained), (context, own, heap), vllm = sizes, HOLD[device], engine == "vllm"
    hidden, vocab = config.hidden_size, config.vocab_size
    weights, states, gradient = width * parameters, STATES[width] * trained, width if offload else 4
    norm, mlp = (4 + 2 * width) * hidden, 4 * width * (getattr(config, "intermediate_size", None) or 4 * hidden)
    layer = 2 * norm + width * (3 * q + 2 * kv) + mlp
    saved = norm + config.num_hidden_layers * (width * hidden if again else layer)
    own_head = vocab * hidden * (trained == parameters)  # adapters leave the head as it is: it has no gradient
    head = min(CHUNK, tokens) * vocab * (8 + width) + (4 if width == 4 else 6) * own_head
    backward = tokens * (mlp + layer * again) + gradient * own_head  # of one layer
    copy = vllm * weights * (2 if device == "cpu" else 1)  # on a CPU vLLM packs its weights and keeps both
    prefill = read * (mlp + 2 * width * hidden) + rows * vocab * (6 if vllm else 20)
    parts = {
        "policy weights": (weights, weights),
        "gradients": (gradient * trained, 0),
        "optimizer (master and moments)": (0, 0) if offload else (states, states),
        "activations": (tokens * saved * heap, 0),
        "logits chunk and backward": (max(head, backward) * heap, 0),
        "engine weights": (0 if sleep else copy, copy),
        "engine workspace": (own * vllm, own * vllm),
        "prompts read and logits sampled": (0, prefill * heap),
        "KV cache": (0 if sleep or not vllm else cache, cache if vllm else cache * heap),
        "context": (context, context),
    }
    parts["predicted peak"] = tuple(map(sum, zip(*parts.values(), strict=True)))
    return {name: (int(train), int(rollout)) for name, (train, rollout) in parts.items()}


def plan(
    config, *, card_bytes, max_len, sequences, host_bytes=None, max_prompt=None, engine="vllm", width=2,
    token_budget=None, checkpointing=False, lora=0,
) -> Plan:  # fmt: skip
    """The fastest arrangement that fits. Raises ValueError that says in one sentence what to lower when nothing does.

    `card_bytes`: memory of the card, None for a CPU; `host_bytes`: free host memory, None if it need not suffice here;
    `max_len`: longest prompt + response in tokens; `sequences`: most of one generate call; `width`: bytes of a weight;
    `lora`: rank of adapters (0: all parameters are trained)."""
    cpu, vllm, sizes = card_bytes is None, engine == "vllm", shape(config, lora)
    device, memory = ("cpu", host_bytes) if cpu else ("cuda", card_bytes)
    limit, states = int(FILL * memory), STATES[width] * sizes[3]
    kv_token = 2 * width * config.num_hidden_layers * sizes[2]
    can_offload = not (cpu or lora) and (host_bytes is None or states <= FILL * host_bytes)

    def fit(length: int, budget: int | None) -> Plan | None:
        def live(cache: int) -> int:  # vLLM's sequences may reach an eighth of the longest, then it puts some off
            return max(1, min(sequences, MOST_ROWS, cache * (8 if vllm else 1) // length))

        least = length + 32  # the longest sequence alone, in whole blocks; transformers reserves that for every row
        tokens = [min(sequences, rows) * length for rows in (GOOD_ROWS, MOST_ROWS)]
        wanted, most = (max(least, each // 4 if vllm else min(each, BATCH_TOKENS)) for each in tokens)
        read = min(max(PREFILL_TOKENS, max_prompt or length), sequences * (max_prompt or length))
        options = [
            (sleep and vllm and not cpu, again or checkpointing, offload, max(length, tokens))
            for sleep, again, offload in ARRANGEMENTS
            for tokens in ([budget] if budget else [ENOUGH_TOKENS[device] >> k for k in range(4)])
            if can_offload or not offload
        ]
        for option in options:
            fill = partial(table, config, sizes, engine, device, width, live(most), read, *option)
            train, rollout = (limit - peak for peak in fill(0)["predicted peak"])
            room = min(train, rollout) if vllm and not option[0] else rollout / (1 if vllm else HOLD[device][2])
            cache = min(most, int(room / kv_token))
            if train >= 0 and cache >= (least if option == options[-1] else wanted):
                parts = fill(cache * kv_token)
                held = (cache, cache * kv_token, live(cache), parts, *parts["predicted peak"])
                return Plan(engine, device, sizes[0], sizes[3], *option, *held, limit, states * option[2])
        return None

    size = f"{sizes[0] / 1e9:.3g} B parameters do not fit in {memory / GB:.0f} GB"
    if found := fit(max_len, token_budget):
        return found
    if token_budget and fit(max_len, None):
        raise ValueError(f"{size} with --token-budget {token_budget}; lower it or leave it to the plan")
    for shorter in (16384, 8192, 4096, 2048, 1024, 512, 256):
        if shorter < max_len and fit(shorter, None):
            lower = f"lower --max-prompt and --max-response so that they add up to {shorter} at most"
            raise ValueError(f"{size} with sequences of {max_len} tokens; {lower}")
    beside = "" if host_bytes is None or cpu else f" and {host_bytes / GB:.0f} GB of free host memory"
    raise ValueError(f"{size}{beside} at any length; choose a smaller --model, or free or add memory")
