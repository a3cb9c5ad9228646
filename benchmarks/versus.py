"""One policy update, three ways: this project, the GRPOTrainer of TRL, and a plain loop (padded batches, full logits).

All ways get the same token ids, advantages, starting weights, optimizer settings and device; they take turns within one
run, and each repeat times loss, backward and optimizer step (no generation, no rewards). The gradient norms are printed
so that one can see that they do the same work. TRL runs its own `train()`, with ready rollouts in the place of its
generation; without TRL installed (`pip install trl`) that way is left out. Each way may hold `--token-budget` tokens,
pads included, in a micro-batch. Lengths are mixed as in self-play: half the rows have a proposer's long prompt, half a
solver's short one, and response lengths have a long tail.

The second part measures the peak memory of log-probability + backward over `--memory-tokens` x `--memory-vocab`, ours
against full logits, each in a process of its own.

    python benchmarks/versus.py [--model random-50m|FOLDER] [--rows 16] [--repeats 3]     # last line: one JSON object

Reported are wall seconds and, on CPU, processor seconds: the latter do not suffer when other programs run.
"""

import argparse
import copy
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.journal import held_bytes
from policy.logprobs import token_logprobs
from policy.optimizer import MasterAdamW
from trr import Sample, update

LR, GRAD_CLIP = 1e-6, 1.0


def load(model: str, device: str, dtype: torch.dtype):
    if model != "random-50m":
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    torch.manual_seed(0)
    shape = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8)
    shape |= dict(num_key_value_heads=2, vocab_size=32768, max_position_embeddings=4096, tie_word_embeddings=True)
    return LlamaForCausalLM(LlamaConfig(**shape)).to(device, dtype)


def mixed_batch(rows: int, vocabulary: int, longest: int, seed: int = 0) -> list[Sample]:
    """Rows whose prompts and responses have at most `longest` tokens each; no advantage is zero."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for row in range(rows):
        low, high = (longest // 2, longest) if row % 2 else (longest // 10, longest // 4)
        prompt = int(torch.randint(low, high + 1, (1,), generator=draw))
        response = longest / 5 * math.exp(0.9 * float(torch.randn(1, generator=draw)))
        response = int(min(max(response, 8), longest))
        ids = torch.randint(vocabulary, (prompt + response,), generator=draw).tolist()
        samples.append(Sample(ids[:prompt], ids[prompt:], 1.0 if row % 3 else -1.5))
    return samples


def ours(policy, samples: list[Sample], options):
    optimizer = MasterAdamW(policy)
    return lambda: update(policy, optimizer, samples, lr=LR, token_budget=options.token_budget).grad_norm


def plain(policy, samples: list[Sample], options):
    """The loop of a first tutorial: rows in order, padded to the longest of their batch, logits of every position."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.01, fused=True)
    device = policy.device
    rows = max(1, options.token_budget // max(map(len, samples)))
    total = sum(len(s.response_ids) for s in samples)

    def step() -> float:
        for start in range(0, len(samples), rows):
            batch = samples[start : start + rows]
            width = max(map(len, batch))
            ids, mask, response = (torch.zeros(len(batch), width, dtype=torch.long) for _ in range(3))
            for row, sample in enumerate(batch):
                ids[row, : len(sample)] = torch.tensor(sample.prompt_ids + sample.response_ids)
                mask[row, : len(sample)] = 1
                response[row, len(sample.prompt_ids) : len(sample)] = 1
            ids, mask, response = ids.to(device), mask.to(device), response.to(device)
            advantage = torch.tensor([[s.advantage] for s in batch], device=device)
            with autocast(options):
                logits = policy(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            logprob = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            ratio = torch.exp(logprob - logprob.detach())
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            (-(gain * response[:, 1:]).sum() / total).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return step


def trl_grpo(policy, samples: list[Sample], options):
    """GRPOTrainer.train() for one optimizer step; `_generate_and_score_completions` hands over the ready rollouts."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    def padded(lists: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:  # as TRL pads
        width = max(map(len, lists))
        ids, mask = torch.zeros(len(lists), width, dtype=torch.long), torch.zeros(len(lists), width, dtype=torch.long)
        for row, each in enumerate(lists):
            span = slice(width - len(each), width) if left else slice(0, len(each))
            ids[row, span], mask[row, span] = torch.tensor(each), 1
        return ids, mask

    class Ready(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            prompt_ids, prompt_mask = padded([s.prompt_ids for s in samples], left=True)
            completion_ids, completion_mask = padded([s.response_ids for s in samples], left=False)
            batch = dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask, completion_ids=completion_ids)
            batch |= dict(completion_mask=completion_mask, advantages=torch.tensor([s.advantage for s in samples]))
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            return batch | {"num_items_in_batch": completion_mask.sum().to(self.accelerator.device)}

    class Clock(TrainerCallback):
        began = ended = (0.0, 0.0)
        norm = math.nan

        def on_step_begin(self, *_, **__):
            self.began = now(options)

        def on_step_end(self, *_, **__):
            self.ended = now(options)

        def on_log(self, args, state, control, logs=None, **_):
            self.norm = logs.get("grad_norm", self.norm)

    width = max(len(s.prompt_ids) for s in samples) + max(len(s.response_ids) for s in samples)
    rows = max(
        r for r in range(1, len(samples) + 1) if len(samples) % r == 0 and (r == 1 or r * width <= options.token_budget)
    )
    words = {f"t{i}": i for i in range(policy.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    clock = Clock()
    config = GRPOConfig(
        output_dir=options.scratch,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(samples) // rows,
        num_generations=2,
        max_steps=1,
        learning_rate=LR,
        weight_decay=0.01,
        max_grad_norm=GRAD_CLIP,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        loss_type="dapo",  # token mean over the whole batch, as ours
        beta=0.0,
        epsilon=0.2,
        temperature=1.0,
        gradient_checkpointing=False,
        bf16=options.dtype == "bfloat16",
        use_cpu=options.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Ready(
        model=policy,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["t1"] * len(samples)}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t0"),
        callbacks=[clock],
    )

    def step() -> float:
        trainer.train()
        return clock.norm

    step.clock = clock
    return step


def autocast(options):
    return torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16")


def now(options) -> tuple[float, float]:
    """Wall and processor seconds, after the card has finished."""
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def memory_of(way: str, options) -> int:
    """Bytes at the peak of log-probability + backward above what inputs and weights take; run in a fresh process."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.memory_tokens, options.memory_width).to(options.device, dtype).requires_grad_()
    weight = torch.randn(options.memory_vocab, options.memory_width).mul_(0.02).to(options.device, dtype)
    weight.requires_grad_()
    targets = torch.randint(options.memory_vocab, (options.memory_tokens,)).to(options.device)
    cuda = options.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else held_bytes("cpu")
    if way == "ours":
        logprob, _ = token_logprobs(hidden, weight, targets)
    else:  # nothing kept alive by name, no entropy: the leanest full-logits form
        logprob = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None])
    logprob.mean().backward()
    return (torch.cuda.max_memory_allocated() if cuda else held_bytes("cpu")) - before


def compare_memory(options) -> dict:
    peaks = {}
    for way in ("ours", "full_logits"):
        command = [sys.executable, __file__, *options.arguments, "--memory-child", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[f"{way}_peak_gb"] = int(done.stdout.split()[-1]) / 1e9
    peaks["full_over_ours"] = peaks["full_logits_peak_gb"] / peaks["ours_peak_gb"]
    return {name: round(value, 3) for name, value in peaks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-50m", help="random-50m or a Hugging Face folder")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument(
        "--longest", type=int, default=512, help="tokens of the longest prompt and of the longest response"
    )
    parser.add_argument("--token-budget", type=int, default=2048, help="tokens of a micro-batch, pads included")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--ways", default="ours,trl,plain")
    parser.add_argument("--memory-tokens", type=int, default=4096, help="0 leaves the memory part out")
    parser.add_argument("--memory-vocab", type=int, default=151936)
    parser.add_argument("--memory-width", type=int, default=896)
    parser.add_argument("--memory-child", choices=["ours", "full_logits"], help=argparse.SUPPRESS)
    parser.add_argument("--scratch", default="/tmp/versus", help="folder that TRL wants")
    options = parser.parse_args()
    options.arguments = sys.argv[1:]
    if options.memory_child:
        print(memory_of(options.memory_child, options))
        return
    makers = {"ours": ours, "trl": trl_grpo, "plain": plain}
    if importlib.util.find_spec("trl") is None:
        makers.pop("trl")
        print("trl is not installed: that way is left out.")
    fp32 = load(options.model, options.device, torch.float32)
    samples = mixed_batch(options.rows, fp32.config.vocab_size, options.longest)
    tokens = sum(map(len, samples))
    print(
        f"{len(samples)} rows, {tokens} tokens, {sum(len(s.response_ids) for s in samples)} of them responses",
        flush=True,
    )
    steps = {}
    for name in [name for name in options.ways.split(",") if name in makers]:
        policy = copy.deepcopy(
            fp32
        )  # bf16: ours computes in bf16 beside fp32 masters, the others by autocast over fp32
        if name == "ours":
            policy = policy.to(getattr(torch, options.dtype))
        steps[name] = makers[name](policy.train(), samples, options)
    del fp32
    wall, cpu, norms = ({name: [] for name in steps} for _ in range(3))
    for repeat in range(-1, options.repeats):  # repeat -1 warms up
        for name, step in steps.items():
            began = now(options)
            norm = step()
            ended = now(options)
            if hasattr(step, "clock"):  # TRL's train() also builds loaders and optimizers: not counted
                began, ended = step.clock.began, step.clock.ended
            seconds = [b - a for a, b in zip(began, ended, strict=True)]
            print(
                f"{name:6} {seconds[0]:8.2f} s wall {seconds[1]:8.2f} s processor  gradient norm {norm:.5f}", flush=True
            )
            if repeat >= 0:
                wall[name].append(seconds[0])
                cpu[name].append(seconds[1])
                norms[name].append(norm)
    clock = cpu if options.device == "cpu" else wall
    record = {
        "tokens": tokens,
        "wall_s": {name: round(statistics.median(s), 3) for name, s in wall.items()},
        "processor_s": {name: round(statistics.median(s), 3) for name, s in cpu.items()},
        "tokens_per_s": {name: round(tokens / statistics.median(s), 1) for name, s in clock.items()},
        "ours_over": {
            name: round(statistics.median(a / b for a, b in zip(clock[name], clock["ours"], strict=True)), 2)
            for name in steps
            if name != "ours"
        },
        "first_gradient_norm": {name: round(n[0], 5) for name, n in norms.items()},
    }
    if options.memory_tokens:
        record["memory"] = compare_memory(options)
    settings = {k: v for k, v in vars(options).items() if k not in ("arguments", "memory_child", "scratch")}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if "trl" in steps:
        versions["trl"] = sys.modules["trl"].__version__
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(
        json.dumps(
            record | {"settings": settings, "versions": versions, "threads": torch.get_num_threads(), "on": name}
        )
    )


if __name__ == "__main__":
    main()
