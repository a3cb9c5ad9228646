"""Where the time of one training step goes: generate, execute, update and sync, on a given or randomly made model.

The phases are the project's own functions, on made-up token ids: proposals, then learnability and solve rollouts in one
call each, programs through the executor, one update on the trained rows, one push of the weights. No reward decides
anything, so random weights do. Reported per phase: median seconds of the repeats, generated and trained tokens/s, the
share of peak arithmetic the update reaches (MFU: only useful products count, the head only where it is computed,
recomputation not at all), predicted and measured peak memory, and the seconds that a step of the paper's size
(6 x 64 rows, G = 8) would take at these rates.

    python benchmarks/step.py --config Qwen2.5-Coder-3B --random-init        # one GPU
    python benchmarks/step.py                                                # a 50M model, minutes on a CPU
    python benchmarks/step.py --model FOLDER --memory 24                     # at most 24 GB of the card
    python benchmarks/step.py --config Qwen2.5-Coder-3B --lora 32 --sleep    # adapters; an engine that sleeps
    python benchmarks/step.py --config Qwen2.5-Coder-3B --cudnn              # attention by cuDNN, as torch prefers

After each step there is a line with one JSON object of the steps so far (but for the first, which warms up), so that a
run that is cut has its last one. An engine whose logprobs differ from the update's stops the run: every step moves the
weights by 1e-3, so stale ones show.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from executor import Executor
from harness.check import agree
from harness.journal import held_bytes
from policy import memory
from policy.dialogue import STOP
from policy.load import choose_engine, load_config, load_policy, make_engine
from policy.lora import add_adapters
from policy.optimizer import MasterAdamW
from policy.speed import DEVICES, shape
from trr import Sample, update

QWEN = dict(vocab_size=151936, num_key_value_heads=2, max_position_embeddings=32768, rope_theta=1e6)
QWEN_IDS = 151_665  # of its tokenizer
LLAMA = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=32768, rope_theta=5e5)


def sizes(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
    return dict(zip(names, (hidden, inner, layers, heads, tied), strict=True))


CONFIGS = {
    "random-50m": LlamaConfig(vocab_size=32768, num_key_value_heads=2, **sizes(512, 1536, 10, 8, True)),
    "Qwen2.5-Coder-0.5B": Qwen2Config(**QWEN, **sizes(896, 4864, 24, 14, True)),
    "Qwen2.5-Coder-1.5B": Qwen2Config(**QWEN, **sizes(1536, 8960, 28, 12, True)),
    "Qwen2.5-Coder-3B": Qwen2Config(**QWEN, **sizes(2048, 11008, 36, 16, True)),
    "Llama-3.1-8B": LlamaConfig(**LLAMA, **sizes(4096, 14336, 32, 32, False)),
}

# A step of the paper: rows and the mean token counts assumed for a base model early in training.
PAPER = {"proposals": 192, "solves": 192, "samples": 8, "proposer_prompt": 1500, "solver_prompt": 450, "response": 500}

PHASES = ("propose", "solve", "execute", "update", "sync")

# What proposals look like to the executor: loops over small literals, some of them nested.
PROGRAMS = [
    ("def f(x):\n    return sum(i * i for i in range(x))", "12"),
    ("def f(words):\n    return {w: words.count(w) for w in words}", "['a', 'b', 'a']"),
    ("def f(n, m):\n    while m:\n        n, m = m, n % m\n    return n", "84, 36"),
    ("def f(s):\n    return ''.join(sorted(set(s)))[::-1]", "'absolute zero'"),
]


def folder_for(config, folder: str) -> str:
    """A folder with the config and a tokenizer, which has fewer ids than Qwen's head has rows; the engine takes its
    weights from the policy."""
    words = {f"<{i}>": i for i in range(min(config.vocab_size, QWEN_IDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<0>", pad_token="<0>").save_pretrained(folder)
    config.architectures = ["LlamaForCausalLM" if config.model_type == "llama" else "Qwen2ForCausalLM"]
    config.eos_token_id = 0
    config.save_pretrained(folder)
    return folder


def timed(device: str, function, *args, **kwargs) -> tuple[float, object]:
    """Seconds until the card has finished, and the result."""
    began = now(device)
    result = function(*args, **kwargs)
    return now(device) - began, result


def now(device: str, clock=time.perf_counter) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return clock()


def arithmetic_clock(device: str):
    """Rates of arithmetic on a CPU are per processor second: other programs must not change them."""
    return time.perf_counter if device == "cuda" else time.process_time


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Best rate of a large square product here: the roofline of the update."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        began = now(device, arithmetic_clock(device))
        torch.mm(a, b)
        seconds.append(now(device, arithmetic_clock(device)) - began)
    return 2 * size**3 / min(seconds)


def useful_flops(config, samples: list[Sample], frozen: bool = False) -> float:
    """Arithmetic of forward and backward that no implementation can avoid: 6 per weight and token (4 where weights are
    frozen and need no gradient; adapters are not counted), and attention."""
    each = 4 if frozen else 6
    parameters, width, *_ = shape(config)
    table = config.vocab_size * config.hidden_size
    body = parameters - (1 if config.tie_word_embeddings else 2) * table
    attention = sum(
        6 * config.num_hidden_layers * width * len(sample) ** 2 for sample in samples
    )  # causal: half of 12 L q T^2
    head = each * table * sum(len(sample.response_ids) for sample in samples)
    return each * body * sum(map(len, samples)) + head + attention


def one_step(number: int, options, policy, optimizer, engine, executor, plan) -> dict[str, float]:
    """Seconds of each phase and the rates, of one step on fresh random prompts (so that no prefix is cached)."""
    device, seconds = options.device, {}
    draw = torch.Generator().manual_seed(number)
    call = dict(max_new_tokens=options.response, seed=number, stop=list(STOP))

    def prompts(count: int) -> list[list[int]]:
        lengths = torch.randint(options.prompt // 2, options.prompt + 1, (count,), generator=draw).tolist()
        return [torch.randint(1, engine.vocab_size, (length,), generator=draw).tolist() for length in lengths]

    asked, tasks = prompts(options.proposals), prompts(options.proposals + options.solves)
    seconds["propose"], proposed = timed(device, engine.generate, asked, logprobs=True, **call)
    count = [options.samples] * options.proposals + [1] * options.solves
    trains = [False] * options.proposals + [True] * options.solves  # learnability rollouts do not train
    seconds["solve"], solved = timed(device, engine.generate, tasks, n=count, logprobs=trains, **call)

    held = held_bytes(device)

    programs = [PROGRAMS[i % len(PROGRAMS)] for i in range(options.proposals)]
    answers = [(program, [arguments], ["0"]) for program, arguments in programs for _ in range(options.samples)]
    validating, _ = timed(device, executor.validate, [(program, [arguments]) for program, arguments in programs])
    verifying, _ = timed(device, executor.verify, answers)
    seconds["execute"] = validating + verifying

    rows = [*zip(asked, proposed, strict=True), *list(zip(tasks, solved, strict=True))[options.proposals :]]
    samples = []
    for i, (prompt, [response, *_]) in enumerate(rows):  # random weights never stop: the lengths are mixed by cutting
        length = int(torch.randint(options.response // 4, options.response + 1, (1,), generator=draw))
        kept = response.token_ids[:length], response.logprobs[:length]
        samples.append(Sample(prompt, kept[0], 1.0 if i % 2 else -1.0, kept[1]))
    engine.sleep()
    correction = None if engine.is_policy else 2.0
    settings = dict(lr=1e-3, token_budget=plan.token_budget, tis_cap=correction, entropy_coef=0.001)
    settings |= dict(vocab_size=engine.vocab_size)
    began = now(device, arithmetic_clock(device))
    seconds["update"], result = timed(device, update, policy, optimizer, samples, **settings)
    arithmetic = now(device, arithmetic_clock(device)) - began
    held = max(held, held_bytes(device))
    seconds["sync"], _ = timed(device, engine.sync, policy)
    print({name: round(value, 3) for name, value in seconds.items()}, f"mismatch {result.mismatch:.4f}", flush=True)
    agree(engine, result.mismatch)
    generated = sum(len(completion.token_ids) for group in proposed + solved for completion in group)
    rates = {
        "generated_per_s": generated / (seconds["propose"] + seconds["solve"]),
        "trained_per_s": result.trained_tokens / seconds["update"],
        "useful_flops_per_s": useful_flops(policy.config, samples, options.lora > 0) / arithmetic,
        "held": held,
    }
    if engine.name == "vllm" and number == options.repeats:  # at last the same two calls without this project's code
        alone, tokens = 0.0, 0
        for counts in ([1] * len(asked), count):
            requests = [{"prompt_token_ids": ids} for ids in prompts(len(counts))]
            sampling = [
                engine.sampling_params(
                    n=n, temperature=1.0, max_tokens=options.response, seed=number, stop=list(STOP), logprobs=0
                )
                for n in counts
            ]
            took, outputs = timed(device, engine.llm.generate, requests, sampling, use_tqdm=False)
            alone += took
            tokens += sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        rates["vllm_alone"] = tokens / alone
    return seconds | rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="random-50m", help="sizes of a random model")
    parser.add_argument("--random-init", action="store_true", help="random weights also for the config of --model")
    parser.add_argument("--model", help="a Hugging Face folder with weights, instead of --config")
    parser.add_argument("--engine", choices=["auto", "vllm", "transformers"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights")
    parser.add_argument("--sleep", action="store_true", help="the engine sleeps although the plan has room for both")
    parser.add_argument("--cudnn", action="store_true", help="attention by cuDNN, which this project switches off")
    parser.add_argument("--memory", type=float, help="GB of the card that may be used; the process is held to it")
    parser.add_argument("--proposals", type=int, default=64 if torch.cuda.is_available() else 6)
    parser.add_argument("--solves", type=int, default=64 if torch.cuda.is_available() else 6)
    parser.add_argument("--samples", type=int, default=8 if torch.cuda.is_available() else 2, help="G")
    parser.add_argument("--prompt", type=int, default=512 if torch.cuda.is_available() else 96, help="tokens")
    parser.add_argument("--response", type=int, default=512 if torch.cuda.is_available() else 48, help="tokens")
    parser.add_argument(
        "--token-budget", type=int, default=None if torch.cuda.is_available() else 512, help="of a micro-batch"
    )
    parser.add_argument("--repeats", type=int, default=2, help="steps after one that warms up")
    options = parser.parse_args()
    device, dtype = options.device, options.dtype
    torch.backends.cuda.enable_cudnn_sdp(options.cudnn)

    executor = Executor()  # first: its servers should start while this process is small
    scratch = tempfile.TemporaryDirectory()
    try:
        config = load_config(options.model) if options.model else CONFIGS[options.config]
    except ValueError as error:
        parser.error(str(error))
    card = None
    if device == "cuda":
        total = torch.cuda.mem_get_info()[1]
        card = min(total, int(options.memory * memory.GB)) if options.memory else total
    # Taken away from the card for good: torch's own limit would go on counting the memory of an engine that sleeps.
    ballast = torch.empty(total - card if card else 0, dtype=torch.uint8, device=device)
    host = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    rollouts = options.proposals * options.samples + options.solves
    plan = memory.plan(
        config,
        card_bytes=card,
        host_bytes=host,
        max_len=options.prompt + options.response,
        sequences=rollouts,
        engine=choose_engine(options.engine),
        width=4 if dtype == "float32" else 2,
        max_prompt=options.prompt,
        token_budget=options.token_budget,
        lora=options.lora,
    )
    print(plan.describe(), flush=True)
    if options.model and not options.random_init:
        path = options.model
        policy, tokenizer = load_policy(path, device, dtype)
    else:
        path = folder_for(config, scratch.name)
        torch.manual_seed(0)
        with torch.device(device):
            policy = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if options.lora:
        add_adapters(policy, options.lora)
    if plan.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    optimizer = MasterAdamW(policy, offload=plan.offload_optimizer)
    engine = make_engine(
        options.engine,
        path,
        policy,
        tokenizer,
        max_model_len=options.prompt + options.response,
        max_num_seqs=plan.max_num_seqs,
        kv_cache_bytes=plan.kv_cache_bytes,
        sleep=plan.sleep or options.sleep,
        token_budget=plan.generation_budget,
    )

    roofline = peak_flops(device, getattr(torch, dtype))
    runs = []
    for number in range(options.repeats + 1):
        runs.append(one_step(number, options, policy, optimizer, engine, executor, plan))
        measured = runs[1:] or runs  # the first warms up
        held = max(run["held"] for run in runs) - ballast.nbytes
        print(json.dumps(report(measured, roofline, plan, held, policy.config, engine.name, options)), flush=True)
    executor.close()
    scratch.cleanup()


def report(runs: list[dict], roofline: float, plan: memory.Plan, held: int, config, engine: str, options) -> dict:
    """The record of the steps so far. `roofline`: FLOP/s; `held`: most bytes in use."""
    device = options.device
    median = {name: statistics.median(run[name] for run in runs if name in run) for name in runs[-1]}
    mfu = median["useful_flops_per_s"] / roofline
    p = PAPER
    paper_rollouts = p["proposals"] * (1 + p["samples"]) + p["solves"]
    paper_trained = sum(
        p[part] * (p[f"{who}_prompt"] + p["response"])
        for part, who in (("proposals", "proposer"), ("solves", "solver"))
    )
    paper = {
        "generate": paper_rollouts * p["response"] / median["generated_per_s"],
        "execute": median["execute"] * p["proposals"] * p["samples"] / (options.proposals * options.samples),
        "update": paper_trained / median["trained_per_s"],
        "sync": median["sync"],
    }
    known = next(
        (sheet for name, sheet in DEVICES.items() if device == "cuda" and name in torch.cuda.get_device_name()),
        None,
    )
    return {
        "steps": len(runs),
        "seconds": {name: round(median[name], 3) for name in PHASES},
        "generated_tokens_per_s": round(median["generated_per_s"], 1),
        "trained_tokens_per_s": round(median["trained_per_s"], 1),
        "vllm_alone_tokens_per_s": round(median["vllm_alone"], 1) if "vllm_alone" in median else None,
        "mfu_of_measured_roofline": round(mfu, 3),
        "mfu_of_data_sheet": round(mfu * roofline / known[0] / 1e12, 3) if known else None,
        "roofline_tflops": round(roofline / 1e12, 3),
        "peak_gb": {
            "predicted": round(max(plan.train_peak, plan.rollout_peak) / memory.GB, 2),
            "measured": round(held / memory.GB, 2),
        },
        "paper_step_s": {name: round(value, 1) for name, value in {**paper, "sum": sum(paper.values())}.items()},
        "parameters": shape(config)[0],
        "engine": engine,
        "plan": {
            name: getattr(plan, name)
            for name in ("offload_optimizer", "sleep", "gradient_checkpointing", "token_budget")
        },
        "settings": vars(options),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "on": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
    }


if __name__ == "__main__":
    main()
