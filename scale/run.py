"""The command: azr.py's options, on as many GPUs as the launcher names (docs/scale.md).

What it does: puts a run together from the pieces of harness/start.py, with policy, optimizer and vLLM from TRL, and
refuses what this bridge cannot honour. What it leaves out: the memory plan (it knows one card), the rehearsal of a
model (`azr.py --dry-run --verbose`), saving on Ctrl-C: a stop loses what was done since the last checkpoint.

    torchrun --nproc-per-node 2 -m scale.run --smoke
"""

import argparse
import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace

import torch.distributed as dist
from trl import GRPOConfig

import azr
from harness import journal
from harness.check import inspect_config, inspect_tokenizer
from harness.config import Config, parse
from harness.start import find_folder, place, restore, settle, write_config
from policy.engine import SyncError, first_line
from policy.load import choose_engine, load_config, load_policy, load_tokenizer
from policy.logprobs import ran_out_of_memory
from policy.memory import ENOUGH_TOKENS
from policy.transformers_engine import TransformersEngine
from scale.spread import Ranks, SpreadExecutor, spread_engine
from scale.trainer import SharedAdam, Trainer, TrlEngine
from suites.table import SUITES, expand

SHARDED, DEEPSPEED = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
GENERATED, SEQUENCES = 32768, 256  # tokens in the cache of a transformers engine; rows that a vLLM samples at a time


def read(argv: list[str] | None, ranks: int) -> tuple[argparse.Namespace, Config, str | None]:
    """This command's own options, the configuration, the run to resume; ValueError for what cannot be honoured."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tensor-parallel", type=int, default=1)  # GPUs that hold one vLLM together
    parser.add_argument("--vllm-memory", type=float, default=0.4)  # its share of each GPU, beside what is trained
    own, rest = parser.parse_known_args(argv)
    config, extra = parse(rest)
    suites = expand(config.eval_suites.split(",")) if config.eval_every else []
    judged = [name for _, name, _ in suites if name in SUITES and SUITES[name].group != "reasoning"]
    refused = {
        "--minibatches above 1": (config.minibatches > 1, "transformers takes one optimizer step per batch"),
        "--lora": (config.lora, "adapters are not merged over ranks; train them on one GPU with azr.py"),
        "--memory": (config.memory, "nothing plans the memory of many cards; lower --token-budget or --vllm-memory"),
        "--dry-run": (extra.dry_run, "it plans for one card; ask azr.py"),
        "DeepSpeed": (DEEPSPEED, "it would take steps with gradients that are not finite; use scale/fsdp2.yaml"),
        "--tensor-parallel": (own.tensor_parallel < 1 or ranks % own.tensor_parallel, f"it must divide {ranks} ranks"),
        "--eval-suites": (judged, f"each rank would judge {judged} for itself; score checkpoints with evaluate.py"),
    }
    for name, (asked, why) in refused.items():
        if asked:
            raise ValueError(f"scale/ does not take {name}: {why}")
    return own, config, extra.resume


def start(own: argparse.Namespace, config: Config, resume: str | None, ranks: Ranks, executor) -> Trainer:
    """A trainer with its run: everything loaded, after --resume every state as it was. Raises as azr.py's start."""
    (device, dtype), length = place(config), config.max_prompt + config.max_response
    vllm = device == "cuda" and choose_engine(config.engine) == "vllm"
    if config.engine == "vllm" and not vllm:
        raise ValueError("scale/ has vLLM on GPUs only; use --engine transformers")
    tokenizer = load_tokenizer(config.model, hf_config := load_config(config.model))
    used = replace(settle(config, tokenizer), token_budget=config.token_budget or ENOUGH_TOKENS[device])
    inspect_config(used, hf_config)
    inspect_tokenizer(used, tokenizer, fresh=not resume)
    arguments = GRPOConfig(  # from here on the processes know each other
        max_steps=config.steps, max_grad_norm=config.grad_clip, seed=config.seed, beta=0.0,
        use_cpu=device == "cpu", bf16=dtype == "bfloat16", gradient_checkpointing=False, disable_tqdm=True,
        report_to="none", save_strategy="no", logging_strategy="no", num_generations=2, log_level="error",
        ddp_find_unused_parameters=False,
        per_device_train_batch_size=SEQUENCES,  # TRL hands it to vLLM; the micro-batches are our own
        use_vllm=vllm, vllm_mode="colocate", vllm_enable_sleep_mode=vllm, vllm_gpu_memory_utilization=own.vllm_memory,
        vllm_tensor_parallel_size=own.tensor_parallel, vllm_max_model_length=length,
    )  # fmt: skip
    folder, saved = ranks.gather(lambda: None if ranks.rank else find_folder(config, resume))[0]
    arguments.output_dir = str(folder)
    # The float32 weights are the masters: on GPUs autocast or FSDP computes in bfloat16. Shards are cut in host memory.
    policy, _ = load_policy(str(saved or config.model), "cpu" if SHARDED else device, "float32")
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    trainer, optimizer = Trainer(policy, tokenizer, arguments), SharedAdam(policy, dtype)
    engine = TrlEngine(trainer, tokenizer, length) if vllm else TransformersEngine(policy, tokenizer, length, GENERATED)
    spread_engine(engine, ranks, own.tensor_parallel if vllm else ranks.size if SHARDED else 1)  # shards: all together
    step, buffers, watch = ranks.together(restore, folder, saved, config, optimizer)
    if ranks.rank == 0:
        write_config(folder, config, used, engine.name, executor.layers)
    run = azr.Run(used, folder, policy, tokenizer, engine, optimizer, executor, None, buffers, watch, step)
    run.saved, run.writes = step if saved else -1, ranks.rank == 0
    trainer.attach(run, ranks)
    return trainer


def main(argv: list[str] | None = None) -> int:
    """The command line, on every rank. Returns 2 after one sentence on what to change; our faults are raised."""
    ranks = Ranks()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if ranks.rank else sys.stdout):
        try:
            own, config, resume = read(argv, ranks.size)
            with SpreadExecutor(ranks) as executor:  # first: its servers must start before this process touches a GPU
                trainer = start(own, config, resume, ranks, executor)
                if trainer.run.step < config.steps:
                    trainer.train()
                journal.finish(trainer.run)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and ran_out_of_memory(error):
                lower = "lower --token-budget, --vllm-memory or --max-response, or shard with scale/fsdp2.yaml"
                error = ValueError(f"out of memory on rank {ranks.rank} ({first_line(error)}); {lower}")
            if not isinstance(error, OSError | ValueError | SyncError):
                raise
            print(f"scale: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
