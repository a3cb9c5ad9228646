"""The language model: loading it, sampling from it, the log-probabilities and the optimizer of its update, its memory.

It never imports the loop, the task types, the executor or the harness: here a task is a list of token ids.
"""
