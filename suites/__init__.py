"""Benchmarks: their table, the extraction of answers, the judges of code and mathematics, statistics.

It never imports `evaluate`, the loop or the harness: a suite is data, a prompt, an answer and a judge.
"""
