"""The language model: loading it, sampling from it, the log-probabilities and the optimizer of its update, its memory.

Here a task is a list of token ids. load.py: load_config, load_policy, make_engine; engine.py: Engine, Completion;
transformers_engine.py and vllm_engine.py: the two engines; logprobs.py: token_logprobs; optimizer.py:
MasterAdamW; memory.py: plan; speed.py: estimate_seconds.
It never imports the loop, the rewards, the task types, the executor or the harness.
"""

import os

# Before torch is imported: threads that wait for each other must sleep, not spin. On a machine whose cores are shared
# with other programs spinning makes a step several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
