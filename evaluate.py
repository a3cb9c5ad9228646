"""The paper's benchmarks for any model folder: generate, score, compare before and after.

What it does: runs the suites of one table (SUITES in `suites.py`: data, question, answer, judge). Responses are written
to a file first and scored second, so scoring can be repeated (`--score-only`) and an interrupted run goes on at the
first missing item. Results carry n, standard error, the shares of truncated and answerless responses, the template and
a digest of the data, because those explain most differences between reports.
What it leaves out: benchmark data (nothing is bundled) and several GPUs. The judges are in `scoring.py` and
`scoring_code.py`, statistics and tables in `comparison.py`: one concern each, so that each can be read on its own.
Paper: section 4.1 (protocol: greedy, one sample) and Table 1 (groups and averages).

    python evaluate.py --model MODEL --suites humaneval+,mbpp+,math500 --data DIR --out OUT
    python evaluate.py --suites all --data DIR --out OUT --score-only --baseline BEFORE/results.json
    python evaluate.py --suites humaneval+ --data DIR --out OUT --samples-file samples.jsonl

Within training, `azr.py --eval-every N --eval-suites cruxeval-o:100,tasks:FILE` calls `run_suites`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prompts import split_response
from suites import scoring
from suites.compare import compare, pass_at_k, standard_error, summary
from suites.table import GROUPS, SUITES, Suite, evalplus_prompt, expand, load_items, math_prompt

# ---------------------------------------------------------------------------------------------------------------------
# Generation, resumable


def read_responses(path: Path | None, header: dict) -> dict[str, list[dict]]:
    """Responses already in `path`, by item. A half-written last line (a kill) is dropped from the file.

    Raises ValueError where the file was made with other settings or weights, or is damaged.
    """
    if path is None or not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    whole = lines[:-1]  # what follows the last newline is a line that was cut
    if not whole:
        return {}
    old = read_row(path, 1, whole[0], "samples")
    wrong = [key for key in header if key != "data" and header[key] is not None and old.get(key) != header[key]]
    if wrong:
        what = ", ".join(f"{key} {old.get(key)!r} instead of {header[key]!r}" for key in wrong)
        raise ValueError(f"{path} was made with {what}: choose another --out or delete the file.")
    if lines[-1]:
        path.write_text("\n".join(whole) + "\n", encoding="utf-8")
    found: dict[str, list[dict]] = {}
    for number, line in enumerate(whole[1:], 2):
        row = read_row(path, number, line, "id", "response", "tokens", "truncated", "prefix")
        found.setdefault(row["id"], []).append(row)
    return found


def read_row(path: Path, number: int, line: str, *keys: str) -> dict:
    """One line of a file of ours. Raises ValueError naming it where it is not an object with these keys."""
    try:
        row = dict(json.loads(line))
        return {**row, **{key: row[key] for key in keys}}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}, line {number}: damaged ({error!r}); delete the file.") from None


def read_results(path: Path) -> dict[str, dict]:
    """Records by suite, as `main` writes them. Raises ValueError where the file holds something else."""
    try:
        records = dict(json.loads(path.read_text(encoding="utf-8")))
        for record in records.values():
            sum(record["scores"].values())
        return records
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no results.json of an evaluation ({error!r}): move or restore it.") from None


def fingerprint(model: str) -> str | None:
    """A digest of the ends of a folder's weight files, which change with any training; None for a hub name."""
    digest = hashlib.sha256()
    for path in sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16] if Path(model).is_dir() else None


def generate(engine, tokenizer, items, prompts, suite, path, header, *, prefix, top_p, bar) -> dict[str, list[dict]]:
    """`header["samples"]` responses per item, appended to `path` slice by slice. Which items share a slice does not
    depend on what is already there, so that a resumed run repeats the seeds of an uninterrupted one."""
    done = read_responses(path, header)
    if path is not None and not done:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
    samples, stop, size = header["samples"], list(suite.stop), 256 if engine.device == "cuda" else 64
    for start in range(0, len(items), size):
        chunk = [i for i in range(start, min(start + size, len(items))) if len(done.get(items[i].id, ())) < samples]
        rows = {items[i].id: [] for i in chunk}
        encoded = {i: tokenizer.encode(prompts[i], add_special_tokens=False) for i in chunk}
        fits = [i for i in chunk if len(encoded[i]) < engine.max_model_len]
        answers = engine.generate(
            [encoded[i] for i in fits],
            max_new_tokens=header["max_tokens"],
            n=samples,
            temperature=header["temperature"],
            top_p=top_p,
            seed=header["seed"] + start,
            stop=stop,
        )
        for i, completions in zip(fits, answers, strict=True):
            for completion in completions:
                text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                text = text[: min([p for p in map(text.find, stop) if p >= 0], default=len(text))]
                rows[items[i].id].append({"response": text, "tokens": len(completion.token_ids),
                                          "truncated": not completion.stopped, "prefix": prefix(items[i])})  # fmt: skip
        for i in set(chunk) - set(fits):  # a prompt that fills the model's context gets no answer
            rows[items[i].id] = [{"response": "", "tokens": 0, "truncated": True, "prefix": ""}] * samples
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                for id, found in rows.items():
                    file.write("".join(json.dumps({"id": id, **row}) + "\n" for row in found))
        done |= rows
        bar.update(len(chunk))
    return done


# ---------------------------------------------------------------------------------------------------------------------
# Suites, one after the other


def choose_template(suite: Suite, template: str, tokenizer) -> str:
    """The template a suite really uses; says so where a tokenizer without chat template forces another one."""
    fixed = suite.prompt is evalplus_prompt
    if template == "boxed" and suite.prompt is not math_prompt:
        template = "chat"
    if not (fixed or template in ("chat", "boxed")) or tokenizer.chat_template:
        return "evalplus" if fixed else template
    instead = "raw" if fixed else "plain"
    print(f"note: the tokenizer has no chat template; {suite.file} is asked with template {instead}", file=sys.stderr)
    return instead


def run_suites(
    specs: Sequence[str],
    engine,
    tokenizer,
    executor=None,
    *,
    data_dir: str | Path,
    out_dir: str | Path | None = None,
    files: dict[str, Path] | None = None,
    limit: int | None = None,
    template: str = "plain",
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    model: str | None = None,
    progress: bool = False,
) -> dict[str, dict]:
    """Generate and score suites; returns a record per spec as it was given (see `make_record`).

    `engine` None scores the responses that `out_dir` already has. `executor` is the judge of the reasoning suites (one
    is made where None); benchmark code always runs in an executor of its own limits. `limit` takes the first items;
    `max_tokens` lowers a suite's own. Raises ValueError for unknown suites, FileNotFoundError for missing data, both in
    one sentence.
    """
    records = {}
    for spec, name, own_limit in expand(specs):
        suite, items, about = load_items(name, Path(data_dir), files or {})
        items = items[: own_limit or limit]
        stem = Path(suite.file).stem if suite.group == "code" else stem_of(name)
        path = Path(out_dir, "responses", f"{stem}.jsonl") if out_dir else None
        header = {"model": model, "template": None, "max_tokens": min(suite.max_tokens, max_tokens or suite.max_tokens),
                  "temperature": temperature, "top_p": top_p, "samples": samples, "seed": seed, **about}  # fmt: skip
        if engine is not None and model:
            header |= {"weights": fingerprint(model), "engine": engine.name, "dtype": engine.dtype,
                       "max_model_len": engine.max_model_len}  # fmt: skip
        if engine is None:
            header = score_only_header(path, name)
            done = read_responses(path, about)
            items = [item for item in items if len(done.get(item.id, ())) == header["samples"]]
            if not items:
                raise ValueError(f"{path} has no response to any item of {name}: generate first.")
        else:
            header["template"] = choose_template(suite, template, tokenizer)
            prompts = [suite.prompt(item.text, tokenizer, header["template"]) for item in items]
            header["prompts"] = hashlib.sha256(prompts[0].encode()).hexdigest()[:16]
            raw = header["template"] == "raw"
            with tqdm(total=len(items), desc=f"{name} generate", disable=not progress) as bar:
                done = generate(engine, tokenizer, items, prompts, suite, path, header,
                                prefix=(lambda item: item.gold["prompt"]) if raw else (lambda item: ""),
                                top_p=top_p, bar=bar)  # fmt: skip
        rows = [(item, row) for item in items for row in done[item.id][: header["samples"]]]
        answers = [suite.extract(item, row["prefix"] + row["response"]) for item, row in rows]
        records[spec] = score(suite, name, rows, answers, header, executor, progress)
        if out_dir and suite.prompt is evalplus_prompt:
            write_samples(Path(out_dir, f"{name}.samples.jsonl"), rows, answers)
    return records


def score_only_header(path: Path | None, name: str) -> dict:
    if path is None or not path.is_file():
        raise ValueError(f"There are no responses of {name} to score at {path}: generate them first, or check --out.")
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return read_row(path, 1, first, "samples", "template", "max_tokens", "temperature")


def score(suite: Suite, name: str, rows, answers, header: dict, executor, progress: bool) -> dict:
    pairs = [(item.gold, answer) for (item, _), answer in zip(rows, answers, strict=True)]
    with tqdm(desc=f"{name} score", unit="job", disable=not progress) as bar:
        judge = executor if suite.group == "reasoning" else None
        scores = suite.score(pairs, executor=judge, progress=bar.update)
    return make_record(suite, name, rows, answers, scores, header)


def make_record(suite: Suite, name: str, rows, answers, scores: list[float], header: dict) -> dict:
    """What is known about one suite: accuracy (mean over items of the mean over samples) with its standard error,
    pass@k, shares of truncated and answerless responses, settings, data digest, score per item. Reasoning suites also
    have accuracy per kind and depth, the share in the right format and the share that reasons before it answers."""
    by_item: dict[str, list[float]] = {}
    for (item, _), value in zip(rows, scores, strict=True):
        by_item.setdefault(item.id, []).append(value)
    means = {id: float(np.mean(values)) for id, values in by_item.items()}
    samples = header["samples"]
    record = {
        "suite": name,
        "accuracy": float(np.mean(list(means.values()))),
        "n": len(means),
        "se": standard_error(list(means.values())),
        "truncated": float(np.mean([row["truncated"] for _, row in rows])),
        "no_answer": float(np.mean([answer is None or not answer.strip() for answer in answers])),
        "tokens": float(np.mean([row["tokens"] for _, row in rows])),
        **{key: value for key, value in header.items() if key != "prompts"},
    }
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if 1 < k <= samples]
    record["pass_at"] = {
        str(k): float(np.mean([pass_at_k(len(v), int(sum(v)), k) for v in by_item.values()])) for k in ks
    }
    if suite.group == "reasoning":
        parts = [split_response(row["response"]) for _, row in rows]
        record["formatted"] = float(np.mean([part.formatted for part in parts]))
        record["reasons_first"] = float(np.mean([bool(part.think) for part in parts]))
        groups: dict[str, list[float]] = {}
        for (item, _), value in zip(rows, scores, strict=True):
            groups.setdefault(item.gold.kind, []).append(value)
            if item.gold.depth is not None:
                groups.setdefault(f"depth{item.gold.depth}", []).append(value)
                groups.setdefault(f"{item.gold.kind}/depth{item.gold.depth}", []).append(value)
        record["groups"] = {g: {"accuracy": float(np.mean(v)), "n": len(v)} for g, v in sorted(groups.items())}
    return record | {"scores": means}


def flatten(record: dict) -> dict[str, float]:
    """The numbers of a record under flat names, for metrics.jsonl: `accuracy`, `deduction/accuracy`, `all/se`, ..."""
    flat = {"accuracy": record["accuracy"]}
    flat |= {f"{group}/accuracy": value["accuracy"] for group, value in record.get("groups", {}).items()}
    flat |= {f"{group}/n": value["n"] for group, value in record.get("groups", {}).items() if "depth" not in group}
    keys = ("n", "se", "truncated", "no_answer", "tokens", "formatted", "reasons_first")
    return flat | {f"all/{key}": record[key] for key in keys if key in record}


def write_samples(path: Path, rows, answers) -> None:
    """EvalPlus's samples format: what `evalplus.evaluate --samples FILE` reads."""
    lines = [json.dumps({"task_id": i.id, "solution": a or ""}) for (i, _), a in zip(rows, answers, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def score_samples(name: str, path: Path, data_dir: Path, files: dict[str, Path], progress: bool) -> dict:
    """Score somebody else's samples of one suite: lines with `task_id` and `solution` (taken as it is) or `completion`
    (after EvalPlus's prompt; for CRUXEval in its own `assert f(...) == ...` form). Tasks that the file misses are left
    out of the average, and their number is printed and recorded."""
    suite, items, about = load_items(name, data_dir, files)
    known, found = {item.id: item for item in items}, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.setdefault(known[row["task_id"]].id, []).append(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a sample of a task of {name} ({error!r}).") from None
    rows, answers = [], []
    for id, samples in found.items():
        for row in samples:
            item, text = known[id], row.get("completion") or ""
            if "solution" in row:
                answers.append(row["solution"])
            elif suite.prompt is evalplus_prompt:
                answers.append(item.gold["prompt"] + text)
            else:
                side = {"abduction": "input", "deduction": "output"}.get(getattr(item.gold, "kind", ""))
                answers.append(side and scoring.extract_assert(text, side) or suite.extract(item, text))
            rows.append((item, {"response": text, "truncated": False, "tokens": 0}))
    missing = len(items) - len(found)
    if missing:
        print(f"note: {path} has {len(found)} of the {len(items)} tasks of {name}; the other {missing} do not count")
    if not rows:
        raise ValueError(f"{path} has no sample of {name}.")
    header = {"samples": max(map(len, found.values())), "template": f"samples of {path.name}", "missing": missing}
    return score(suite, name, rows, answers, header | about, None, progress)


def stem_of(name: str) -> str:
    """The name under which a suite's results are kept: its own, or that of the file of tasks."""
    return Path(name.partition(":")[2] or name).stem


def check_data(specs: Sequence[str], data_dir: Path, files: dict[str, Path]) -> None:
    """Read all data once and throw them away: what is missing shows before a model is loaded. Raises as `run_suites`
    does, also for a package that is not installed."""
    names = [name for _, name, _ in expand(specs)]
    stems = [stem_of(name) for name in names]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise ValueError(
            f"Two suites have the name {twice[0]}, under which results are kept: name each once, or rename a file."
        )
    for name in names:
        suite, _, about = load_items(name, data_dir, files)
        if suite.group == "math":
            scoring.require_math_verify()
        if "note" in about:
            print(f"note: {about['note']}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def open_engine(args, items: int):
    """Model, tokenizer and engine of the command line; under vLLM the weights wait on the CPU until they are pushed."""
    import torch

    from policy.load import choose_engine, load_policy, make_engine

    args.engine = choose_engine(args.engine)
    on_gpu = torch.cuda.is_available()
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    policy, tokenizer = load_policy(args.model, "cuda" if on_gpu and args.engine != "vllm" else "cpu", dtype)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    cache = int(0.9 * torch.cuda.mem_get_info()[0] - 1.3 * weights - (6 << 30)) if on_gpu else 2 << 30
    length = min(args.max_model_len, getattr(policy.config, "max_position_embeddings", args.max_model_len))
    engine = make_engine(
        args.engine, args.model, policy, tokenizer, max_model_len=length,
        max_num_seqs=256 if on_gpu else 64, kv_cache_bytes=max(cache, 1 << 28)
    )  # fmt: skip
    print(f"engine {engine.name} on {engine.device}, {engine.dtype}, at most {length} tokens per prompt and response")
    return engine, tokenizer


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    known = ", ".join([*SUITES, *GROUPS])
    add("--suites", required=True, help=f"comma separated: {known}, tasks:FILE; NAME:N takes the first N")
    add("--model", default="", help="Hugging Face folder or hub name")
    add("--data", type=Path, default=Path("data"), help="folder with the benchmark files, .jsonl or .jsonl.gz")
    add("--out", type=Path, default=Path("runs/eval"), help="where responses, samples and results.json go")
    add("--file", action="append", default=[], metavar="SUITE=PATH", help="another file or folder for one suite")
    add("--engine", default="auto", choices=("auto", "vllm", "transformers"))
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    add("--template", default="plain", choices=("plain", "chat", "boxed"),
        help="think/answer wrapper as text (paper) or in a chat turn; boxed: maths in a bare chat turn")  # fmt: skip
    add("--limit", type=int, help="first N items of each suite")
    add("--samples", type=int, default=1, help="responses per item (avg@N, pass@k)")
    add("--temperature", type=float, default=0.0)
    add("--top-p", type=float, default=1.0)
    add("--max-tokens", type=int, help="longest response, where shorter than the suite's own")
    add("--max-model-len", type=int, default=32768, help="longest prompt with response; lower it to save memory")
    add("--seed", type=int, default=0)
    add("--score-only", action="store_true", help="score the responses in --out again, generate nothing")
    add("--samples-file", type=Path, help="score this file (task_id, solution) of one suite instead of a model")
    add("--baseline", type=Path, help="results.json of another run to compare with, item by item")
    args = parser.parse_args(argv)
    counts = (args.samples, args.limit, args.max_tokens, args.max_model_len)
    if min(count for count in counts if count is not None) < 1:
        raise ValueError("--samples, --limit, --max-tokens and --max-model-len must be at least 1.")
    if not (0 <= args.temperature < 100 and 0 < args.top_p <= 1):
        raise ValueError("--temperature must be from 0 to 100, --top-p above 0 and at most 1.")
    args.files = {name: Path(path) for name, _, path in (given.partition("=") for given in args.file)}
    for name, path in args.files.items():
        if name not in SUITES or path == Path() or not path.exists():
            raise ValueError(f"--file {name}={path}: give SUITE=PATH, a suite of {', '.join(SUITES)} and its data.")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"{args.samples} greedy samples are {args.samples} times the same: give a --temperature.")
    if not (args.model or args.score_only or args.samples_file):
        raise ValueError("Give --model, or --score-only, or --samples-file.")
    if args.baseline and args.baseline.is_dir():
        args.baseline = args.baseline / "results.json"
    if args.baseline and not args.baseline.is_file():
        raise ValueError(f"There is no baseline {args.baseline}: give a results.json of an earlier evaluation.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        specs = args.suites.split(",")
        plan = expand(specs)
        target = args.out / "results.json"
        before = read_results(args.baseline) if args.baseline else None  # all that may be wrong shows before the work
        if target.is_file():
            read_results(target)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.samples_file:
            if len(plan) != 1:
                raise ValueError("--samples-file holds samples of one suite: name exactly one in --suites.")
            records = {plan[0][1]: score_samples(plan[0][1], args.samples_file, args.data, args.files, True)}
        else:
            check_data(specs, args.data, args.files)
            engine, tokenizer = (None, None) if args.score_only else open_engine(args, len(plan))
            records = run_suites(
                specs, engine, tokenizer, data_dir=args.data, out_dir=args.out, files=args.files, limit=args.limit,
                template=args.template, samples=args.samples, temperature=args.temperature, top_p=args.top_p,
                max_tokens=args.max_tokens, seed=args.seed, model=args.model, progress=True,
            )  # fmt: skip
        kept = read_results(target) if target.is_file() else {}  # again: another evaluation may have written meanwhile
        target.with_suffix(".tmp").write_text(json.dumps(kept | records, indent=1) + "\n", encoding="utf-8")
        target.with_suffix(".tmp").replace(target)
        print("\n".join(summary(records)))
        if before:
            print("\n".join(compare(before, records)))
        print(f"results: {target}")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the responses that were written", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
