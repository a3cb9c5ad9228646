"""Around the loop: configuration, start and resume, checkpoints, metrics and alarms, the journal (status line, logs).

And after a run, or beside it: the report (`python -m harness.report RUN`), one page to open, with its plots.

It never imports `azr`: the loop calls the harness, not the other way round.
"""
