"""The language model: loading it, sampling from it, the log-probabilities and the optimizer of its update, its memory.

Here a task is a list of token ids. load.py: load_config, load_policy, make_engine; engine.py: Engine, Completion;
transformers_engine.py and vllm_engine.py: the two engines; logprobs.py: token_logprobs; packing.py: can_pack, training;
optimizer.py: MasterAdamW; lora.py: add_adapters; memory.py: plan; speed.py: estimate_seconds; dialogue.py: wrap,
split_response.
It never imports the loop, the rewards, the task types, the executor or the harness.
"""

import os

# Before torch is imported: a thread that waits for another spins for a moment only, then sleeps. Spinning for longer
# makes a step several times slower where another program uses a core, sleeping at once makes it slower where none does
# (benchmarks/contention.py). The user's own setting stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
