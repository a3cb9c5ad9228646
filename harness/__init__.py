"""Around the loop: configuration, start and resume, checkpoints, metrics and alarms, the status line and the report.

It never imports `azr`: the loop calls the harness, not the other way round.
"""
