"""The update on many ranks: TRL's GRPOTrainer holds policy and optimizer, the project's functions fill the step.

A training step is one of `azr.train`, on every rank; the micro-batches of `trr.update` are dealt to the ranks, and
accelerate averages gradients, clips and shards. The checkpoint is azr.py's, whole on any number of ranks.
What it leaves out: TRL's rewards, advantages, loss, sampling, logs and checkpoints. Paper: sections 3.1 to 3.3.5.

    trainer = Trainer(policy, tokenizer, arguments); trainer.attach(run, ranks); trainer.train()
"""

import math
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from types import MethodType

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

import azr
import trr
from policy.packing import training
from policy.vllm_engine import VllmEngine
from scale.spread import Ranks


class Trainer(GRPOTrainer, TrainerCallback):
    """See the module. After `attach`, `train()` goes on from the run's last finished step."""

    def __init__(self, policy, tokenizer, arguments) -> None:
        rows = Dataset.from_dict({"prompt": [""]})  # never read: `get_train_dataloader`
        super().__init__(policy, lambda **_: [], arguments, rows, processing_class=tokenizer)
        self.remove_callback(PrinterCallback)
        self.add_callback(self)

    def attach(self, run: azr.Run, ranks: Ranks) -> None:
        """Play this run. Its policy must be the trainer's, its optimizer a `SharedAdam`."""
        self.run, self.ranks, plain = run, ranks, self.model.forward

        def forward(policy, *arguments, batch: trr.MicroBatch | None = None, **more):
            if batch is None:
                return plain(*arguments, **more)
            return trr.response_logprobs(policy, batch, 512, run.config.entropy_coef != 0, run.engine.vocab_size)

        # Inside forward, because there weights that FSDP sharded are whole, and DDP sees what is used.
        self.model.forward = MethodType(forward, self.model)

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.run.config.steps), collate_fn=list)  # a row per step, and nothing in it

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Decay on all weights, as in the official code: transformers would exempt norms and biases."""
        decay = self.run.config.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=decay, fused=True)
        return self.optimizer

    def on_train_begin(self, *_, **__) -> None:
        """Only now policy and optimizer are what they will be, sharded for instance."""
        self.run.optimizer.join(self.optimizer.optimizer, self.run.writes)
        self.run.engine.sync(self.run.policy)
        if not self.run.watch.history:
            self.ranks.together(azr.begin, self.run)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """A step as in `azr.train`. It leaves no gradient, so the step that transformers takes next changes nothing."""
        run, ranks = self.run, self.ranks
        step, run.status.seconds, began = run.step + 1, Counter(), time.perf_counter()
        ranks.must_agree("the buffers", (task for buffer in run.buffers.values() for task in buffer))
        proposals, attempts = ranks.together(azr.play, run, step)
        rollouts = [*proposals, *attempts]
        update = azr.learn(run, rollouts, step, self.update)
        ranks.must_agree("the rollouts", [update, *((row.response, row.verdict, row.advantage) for row in rollouts)])
        self.control.should_training_stop = ranks.together(azr.close_step, run, proposals, attempts, update, began)
        return torch.zeros((), device=self.args.device)

    def update(self, policy, _, samples, *, lr, token_budget, loss_mean, grad_clip, progress, **__) -> trr.UpdateResult:
        """`trr.update` over all ranks, for one optimizer step. The micro-batches are the same, dealt in turn, so that
        the gradient does not depend on the number of ranks. All compute equally many, since with FSDP each is work of
        all: a rank that has none left repeats the last with weight 0."""
        ranks, device, packed, options = self.ranks, self.args.device, trr.can_pack(policy), self.run.config.objective
        sizes = [len(sample.response_ids) for sample in samples]
        total = sum(sizes)  # of the whole batch, as is the number of rows
        weights = [1 / (total if loss_mean == "token" else len(sizes) * size) for size in sizes]
        weight, advantage = torch.tensor([weights, [sample.advantage for sample in samples]], device=device)
        trained = [i for i, sample in enumerate(samples) if sample.advantage != 0.0 or options["entropy_coef"]]
        groups = trr.micro_batches([len(samples[i]) for i in trained], token_budget, packed)
        entropies, reports = torch.zeros(len(samples), device=device), {}
        turns = range(ranks.rank, len(groups) + -len(groups) % ranks.size, ranks.size)
        with training(policy, packed):
            for number in turns:
                idle = number >= len(groups)
                batch = trr.collate(samples, [trained[k] for k in groups[-1 if idle else number]], packed, device)
                with nullcontext() if number == turns[-1] else self.accelerator.no_sync(self.model_wrapped):
                    logprob, entropy = self.model_wrapped(batch=batch)
                    tokens = (logprob, entropy, logprob.detach(), batch.engine, advantage[batch.row], weight[batch.row])
                    loss, report = trr.objective(*tokens, **options)
                    self.accelerator.backward(loss * (0 if idle else ranks.size))  # gradients are averaged over ranks
                if not idle:
                    reports[number] = {name: value.cpu() for name, value in report.items()}
                    entropies.index_add_(0, batch.row, entropy.detach())
                    progress(batch.tokens)
        norm = whole(self.accelerator.clip_grad_norm_(self.model_wrapped.parameters(), grad_clip)).item()
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        found = ranks.exchange((reports, entropies.cpu()))
        every = {number: report for own, _ in found for number, report in own.items()}
        reports, entropies = [every[number] for number in sorted(every)], sum(entropies for _, entropies in found)
        norms = [norm] if trained else []
        return trr.summarise(samples, trained, reports, entropies, norms, tis_cap=options["tis_cap"])


class SharedAdam:
    """torch's AdamW in the words of policy/optimizer.py: its state whole, under the names of the parameters, so that a
    checkpoint can go on with azr.py, and here on any number of ranks. `state_dict` is work for all of them together.
    `dtype`: of the weights in a checkpoint. Here they are float32; azr.py has bfloat16 ones beside masters."""

    def __init__(self, policy: torch.nn.Module, dtype: str) -> None:
        self.policy, self.dtype, self.loaded = policy, getattr(torch, dtype), None

    def load_state_dict(self, state: dict) -> None:
        """Keep a state for `join`."""
        self.loaded = {key: state[key] for key in ("steps", "master", "exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def join(self, adam: torch.optim.AdamW, writes: bool) -> None:
        """Take over the optimizer that steps, with the state that was loaded, and let the policy save whole weights."""
        self.adam, self.writes, loaded = adam, writes, self.loaded
        kept = partial(self.kept, dtype=self.dtype)
        self.policy.register_state_dict_post_hook(lambda _, held, *__: held.update({k: kept(held[k]) for k in held}))
        for name, weight in self.policy.named_parameters() if loaded else ():
            if name in loaded["master"]:
                weight.copy_(placed(loaded["master"][name], weight))
            moments = {key: placed(loaded[key][name], weight).clone() for key in ("exp_avg", "exp_avg_sq")}
            adam.state[weight] = {"step": torch.tensor(float(loaded["steps"]), device=weight.device), **moments}
        self.loaded = None

    def kept(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor whole, in host memory, on the rank that writes; nothing on the others, which only helped."""
        return whole(tensor).to("cpu", dtype) if self.writes else whole(tensor).new_empty(0)

    def state_dict(self) -> dict:
        named, state = dict(self.policy.named_parameters()), {"steps": 0, "master": {}}
        if self.dtype != torch.float32:
            state["master"] = {name: self.kept(weight.detach()) for name, weight in named.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            held = {n: self.adam.state.get(w, {}).get(key, torch.zeros_like(w)) for n, w in named.items()}
            state[key] = {name: self.kept(moment) for name, moment in held.items()}
        return state | {"steps": max((int(found["step"]) for found in self.adam.state.values()), default=0)}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """The same values, on the device and in the shards of `like`."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


class TrlEngine(VllmEngine):
    """The vLLM that TRL built beside the policy, asked row by row, each with its seed, as policy/vllm_engine.py does:
    TRL's `generate` has one seed for all rows. TRL pushes the weights, from shards too."""

    def __init__(self, trainer: Trainer, tokenizer, max_model_len: int) -> None:
        import vllm

        super(VllmEngine, self).__init__(trainer.model, tokenizer, "cuda", max_model_len)
        self.dtype, self.generation, self.llm = "bfloat16", trainer.vllm_generation, trainer.vllm_generation.llm
        self.can_sleep = self.asleep = trainer.args.vllm_enable_sleep_mode  # TRL builds it asleep
        self.fresh, self.output_kind = False, vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        known = None if self.vocab_size == trainer.model.config.vocab_size else list(range(self.vocab_size))
        self.sampling_params = partial(vllm.SamplingParams, allowed_token_ids=known)  # no ids beyond the tokenizer's

    def sync(self, policy) -> None:
        self.generation.sync_weights()
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep, self.fresh = False, True
