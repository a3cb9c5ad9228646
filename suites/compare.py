"""How sure is a score, and did it change: standard errors, pass@k, paired differences, and the tables that show them.

What it does: statistics over the items of a suite, on the records that `evaluate.py` makes.
What it leaves out: corrections for many comparisons; a table of twelve suites has one false alarm in two runs.
Sources: pass@k of Chen et al. 2021 (equation 1), McNemar's exact test, percentile bootstrap; paper: Table 1 (averages).

    low, high = bootstrap([after - before for each item]); p = mcnemar(before, after)
"""

import math
from collections.abc import Sequence

import numpy as np

from suites.table import TABLE1


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean over items: sample deviation / sqrt(n). 0 for fewer than two items."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else 0.0


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (Chen et al. 2021): 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def bootstrap(differences: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences, items drawn with replacement."""
    values, rng = np.asarray(differences, dtype=float), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> float:
    """Exact two-sided p of McNemar's test on items that changed; a mean over samples counts as right above 1/2."""
    changes = [(a > 0.5) - (b > 0.5) for b, a in zip(before, after, strict=True)]
    gained, lost = changes.count(1), changes.count(-1)
    tail = sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def compare(before: dict, after: dict) -> list[str]:
    """Lines of a table: the paired difference of every suite that both results have, over the items of both."""
    lines = [f"{'suite':<14} {'n':>4} {'before':>7} {'after':>7} {'change':>7}   95 % interval   McNemar p"]
    for name in after:
        old, new = before.get(name, {}).get("scores", {}), after[name]["scores"]
        ids = [id for id in new if id in old]
        if not ids:
            lines.append(f"{name:<14}    0   not in the baseline")
            continue
        b, a = ([scores[id] for id in ids] for scores in (old, new))
        low, high = bootstrap([x - y for x, y in zip(a, b, strict=True)])
        mean_b, mean_a = 100 * np.mean(b), 100 * np.mean(a)
        line = f"{name:<14} {len(ids):>4} {mean_b:7.1f} {mean_a:7.1f} {mean_a - mean_b:+7.1f}"
        line += f"   [{100 * low:+.1f}, {100 * high:+.1f}]   {mcnemar(b, a):.3g}"
        for key in ("template", "max_tokens", "samples", "temperature", "data_sha256"):
            if before[name].get(key) != after[name].get(key):
                line += f"   NOT THE SAME {key}"
        lines.append(line)
    return lines


def summary(records: dict[str, dict]) -> list[str]:
    """One line per suite and the paper's averages, over the suites that are there (their number is shown)."""
    lines = [f"{'suite':<14} {'score':>6} {'s.e.':>5} {'n':>5} {'cut':>6} {'none':>6}  template, limit, data"]
    for name, r in records.items():
        line = f"{name:<14} {100 * r['accuracy']:6.1f} {100 * r['se']:5.1f} {r['n']:>5} {r['truncated']:6.1%} "
        line += f"{r['no_answer']:6.1%}  {r['template']}, {r.get('max_tokens', '-')}, {r['data_sha256'][:12]}"
        if r["samples"] > 1:
            line += f"  avg@{r['samples']}" + "".join(f", pass@{k} {100 * v:.1f}" for k, v in r["pass_at"].items())
        lines.append(line)
        for group, value in r.get("groups", {}).items() if len(r.get("groups", {})) > 1 else ():
            lines.append(f"  {group:<12} {100 * value['accuracy']:6.1f} {'':5} {value['n']:>5}")
    averages = {}
    for group, names in TABLE1.items():
        there = [100 * records[name]["accuracy"] for name in names if name in records]
        if there:
            averages[group] = float(np.mean(there))
            lines.append(f"{group + ' average':<14} {averages[group]:6.1f}       ({len(there)} of {len(names)} suites)")
    if len(averages) == 2:
        lines.append(f"{'total average':<14} {np.mean(list(averages.values())):6.1f}")
    lines.append("cut: share of responses that reached the token limit; none: share without an extractable answer")
    return lines
