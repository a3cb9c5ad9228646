"""Around the loop: configuration, start and resume, checkpoints, metrics and alarms, the journal (status line, logs).

It never imports `azr`: the loop calls the harness, not the other way round.
"""
