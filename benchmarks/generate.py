"""Sampling speed of a tiny policy: this project's decoding loop against `transformers.generate`, in turn, in one run.

The model is random (128 wide, 4 layers, 400 ids); 10 of the ids end a response, so that lengths vary as in training.
All ways get the same prompts, the same batches sorted by length, and sample at temperature 1. `generate` keeps a
finished row in the batch until the last one ends; the own loop drops it and shares the prefill of equal prompts.

    python benchmarks/generate.py [--rows 300] [--samples 1] [--repeats 5]       # one JSON object on the last line
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from policy.transformers_engine import TransformersEngine

VOCABULARY, ENDS = 400, list(range(10))


def tiny_policy() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True, **shape)
    policy = LlamaForCausalLM(config)
    policy.generation_config.eos_token_id = ENDS
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    return policy.eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t0")


def hugging_face(policy, prompts: list[list[int]], new_tokens: int, batch_rows: int, seed: int, cache: str) -> int:
    """Tokens that `generate` sampled, up to each row's end; everything it computed after that is waste."""
    torch.manual_seed(seed)
    prompts, tokens = sorted(prompts, key=len), 0
    for start in range(0, len(prompts), batch_rows):
        batch = prompts[start : start + batch_rows]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        sampling = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
        with torch.no_grad():
            out = policy.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                cache_implementation=cache,
                **sampling,
            )
        ends = torch.isin(out[:, width:], torch.tensor(ENDS)).int()
        tokens += int(torch.where(ends.any(1), ends.argmax(1) + 1, ends.shape[1]).sum())
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--samples", type=int, default=1, help="samples of each prompt; rows / samples prompts")
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    policy, tokenizer = tiny_policy()
    draw = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(
            len(ENDS), VOCABULARY, (int(torch.randint(30, 81, (1,), generator=draw)),), generator=draw
        ).tolist()
        for _ in range(options.rows // options.samples)
    ]
    engine = TransformersEngine(policy, tokenizer, max_model_len=512, token_budget=32768)
    batch_rows = engine.token_budget // (80 + options.new_tokens)
    repeated = [prompt for prompt in prompts for _ in range(options.samples)]

    def own(seed: int) -> int:
        answers = engine.generate(prompts, max_new_tokens=options.new_tokens, n=options.samples, seed=seed)
        return sum(len(answer.token_ids) for group in answers for answer in group)

    ways = {
        "own_loop": own,
        "generate_dynamic": lambda seed: hugging_face(
            policy, repeated, options.new_tokens, batch_rows, seed, "dynamic"
        ),
        "generate_static": lambda seed: hugging_face(policy, repeated, options.new_tokens, batch_rows, seed, "static"),
    }
    rates = {name: [] for name in ways}
    for repeat in range(-1, options.repeats):  # repeat -1 warms up
        for name, way in ways.items():
            began = time.process_time()
            tokens = way(repeat + 1)
            if repeat >= 0:
                rates[name].append(tokens / (time.process_time() - began))
            print(
                f"{name:17} {tokens:6} tokens {tokens / (time.process_time() - began):8.0f} per CPU second", flush=True
            )
    median = {name: round(statistics.median(values)) for name, values in rates.items()}
    ratios = {
        f"own_over_{name}": round(
            statistics.median(a / b for a, b in zip(rates["own_loop"], rates[name], strict=True)), 2
        )
        for name in list(ways)[1:]
    }
    record = {"tokens_per_cpu_s": median, **ratios, **vars(options), "threads": torch.get_num_threads()}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(record | versions | {"processor": platform.machine()}))


if __name__ == "__main__":
    main()
