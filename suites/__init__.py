"""Benchmarks: their table, the extraction of answers, the judges of code and mathematics, statistics, files.

A suite is data, a prompt, an answer and a judge: `SUITES` and `load_items` of `table.py`, `Suite.score`.
It never imports `evaluate`, the loop or the harness.
"""
