"""The paper's benchmarks for any model folder: generate, score, compare before and after.

What it does: runs the suites of one table (`SUITES` in suites/table.py: data, question, answer, judge). Responses are
written to a file first and scored second, so scoring can be repeated (`--score-only`) and an interrupted run goes on at
the first missing item. Results carry n, standard error, the shares of truncated and answerless responses, the template
and a digest of the data, because those explain most differences between reports.
What it leaves out: benchmark data (nothing is bundled) and several GPUs. Judges and statistics are in suites/.
Paper: section 4.1 (protocol: greedy, one sample) and Table 1 (groups and averages).

    python evaluate.py --model MODEL --suites humaneval+,mbpp+,math500 --data DIR --out OUT
    python evaluate.py --suites all --data DIR --out OUT --score-only --baseline BEFORE/results.json
    python evaluate.py --suites humaneval+ --data DIR --out OUT --samples-file samples.jsonl
    python evaluate.py --model MODEL --suites tasks:held.jsonl --tasks deduction,examples/fault.py

Within training, `azr.py --eval-every N --eval-suites cruxeval-o:100,tasks:FILE` calls `during_training`.
"""

import argparse
import errno
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean

from tqdm import tqdm

from policy import dialogue
from policy.dialogue import TAGS, Tags, read_tags, split_response
from prompts import KINDS, Kind, load_kinds
from suites.compare import compare, pass_at_k, standard_error, summary
from suites.files import fingerprint, read_responses, read_results, write_results
from suites.table import GROUPS, SUITES, EvalPlus, Item, Suite, expand, load_items, read_samples

# ---------------------------------------------------------------------------------------------------------------------
# Generation, resumable


def generate(engine, tokenizer, suite: Suite, items: list[Item], header: dict, path: Path | None, bar: tqdm) -> dict:
    """`header["samples"]` responses by item, appended to `path` slice by slice. Which items share a slice does not
    depend on what is already there, so that a resumed run repeats the seeds of an uninterrupted one. A prompt that
    fills the model's context gets no answer."""
    prompts = [suite.prompt(item.text, tokenizer, header["template"]) for item in items]
    _, done = read_responses(path, header)
    if path and not done:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
    asked = {item.id: dialogue.encode(prompt, tokenizer) for item, prompt in zip(items, prompts, strict=True)}
    samples, stop, size = header["samples"], list(suite.stop), 256 if engine.device == "cuda" else 64
    sampling = {"temperature": header["temperature"], "top_p": header["top_p"], "max_new_tokens": header["max_tokens"]}
    for start in range(0, len(items), size):
        chunk = [item.id for item in items[start : start + size] if len(done.get(item.id, ())) < samples]
        fits = [id for id in chunk if len(asked[id]) < engine.max_model_len]
        wanted = [asked[id] for id in fits]
        found = engine.generate(wanted, n=samples, seed=header["seed"] + start, stop=stop, **sampling)
        done |= dict.fromkeys(chunk, [{"response": "", "tokens": 0, "truncated": True}] * samples)
        for id, completions in zip(fits, found, strict=True):
            texts = [dialogue.response_text(one.token_ids, tokenizer, engine.eos, stop) for one in completions]
            done[id] = [{"response": text, "tokens": len(one.token_ids), "truncated": not one.stopped}
                        for text, one in zip(texts, completions, strict=True)]  # fmt: skip
        if path:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": id, **row}) + "\n" for id in chunk for row in done[id])
        bar.update(len(chunk))
    return done


# ---------------------------------------------------------------------------------------------------------------------
# Suites, one after the other


def load_suites(
    specs: Sequence[str], data_dir: Path, kinds: Mapping[str, Kind] = KINDS, files: Mapping | None = None, limit=None
) -> list[tuple[str, str, Suite, list[Item], dict]]:
    """(spec as it was given, name, suite, items, about their data) of each suite: what is missing shows here, before a
    model is loaded. `kinds` are the task types of "tasks:FILE"; `files` as in `load_items`; `limit` takes the first
    items. Raises ValueError for unknown suites and packages that are not installed, FileNotFoundError for missing data,
    in one sentence."""
    stem, times = Counter(stem_of(name) for _, name, _ in expand(specs)).most_common(1)[0]
    if times > 1:
        raise ValueError(f"Two suites have the name {stem}, which their results get: name each once, or rename a file.")
    found = []
    for spec, name, own_limit in expand(specs):
        suite, items, about = load_items(name, data_dir, files or {}, kinds)
        items = items[: own_limit or limit]
        suite.require(items)
        if "note" in about:
            print(f"note: {about['note']}", file=sys.stderr)
        found.append((spec, name, suite, items, about))
    return found


def plan_suites(
    suites: Sequence[tuple[str, str, Suite, list[Item], dict]],
    engine,
    tokenizer,
    *,
    out_dir: str | Path | None = None,
    template: str = "plain",
    tags: Tags = TAGS,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    model: str | None = None,
) -> list[tuple[str, str, Suite, list[Item], dict, Path | None]]:
    """(spec, name, suite, items, settings, file of responses) for each suite that `load_suites` gave. Raises ValueError
    where that file in `out_dir` is damaged or of other settings, or, with `engine` None (its responses are scored), has
    none. `max_tokens` lowers a suite's own."""
    plans = []
    for spec, name, suite, items, about in suites:
        suite, header = replace(suite, tags=tags), dict(about)
        stem = Path(suite.file).stem if suite.group == "code" else stem_of(name)  # humaneval and humaneval+ share one
        path = Path(out_dir, "responses", f"{stem}.jsonl") if out_dir else None
        if engine is None:
            header, done = read_responses(path, header)
            if not header:
                raise ValueError(f"There are no responses of {name} at {path}: generate them first, or check --out.")
            suite = replace(suite, tags=read_tags(header.get("tags", "auto")))
            items = [item for item in items if item.id in done]
            if not items:
                raise ValueError(f"{path} has no response to any item of {name}: generate first.")
        else:
            longest = min(suite.max_tokens, max_tokens or suite.max_tokens)
            header |= {"model": model, "template": suite.template(template, tokenizer), "max_tokens": longest,
                       "tags": ",".join(tags), "samples": samples, "temperature": temperature, "top_p": top_p,
                       "seed": seed, "weights": model and fingerprint(model), "engine": engine.name,
                       "dtype": engine.dtype, "max_model_len": engine.max_model_len}  # fmt: skip
            kinds = {f"prompts {item.gold.kind}": item for item in reversed(items) if suite.group == "reasoning"}
            for key, item in ({"prompts": items[0]} | kinds).items():  # the first of all, and of each kind of task
                first = suite.prompt(item.text, tokenizer, header["template"])
                asked = f"{dialogue.first_ids(tokenizer) or ''}{first}".encode()  # with BOS
                header[key] = hashlib.sha256(asked).hexdigest()[:16]
            read_responses(path, header)
        plans.append((spec, name, suite, items, header, path))
    return plans


def run_suites(
    plans: Sequence[tuple], engine, tokenizer, executor=None, out_dir=None, progress=False
) -> dict[str, dict]:
    """Generate (unless `engine` is None) and score what `plan_suites` gave; returns a record per spec (`make_record`).
    With `out_dir`, all that docs/evaluation.md lists is written there, suite by suite, so that nothing that was scored
    is lost. `executor`: the judge of the reasoning suites; benchmark code runs in an executor of its own limits."""
    records = {}
    for spec, name, suite, items, header, path in plans:
        if engine is None:
            _, done = read_responses(path, header)
        else:
            with tqdm(total=len(items), desc=f"{name} generate", disable=None if progress else True) as bar:
                done = generate(engine, tokenizer, suite, items, header, path, bar)
        rows = []
        for item in items:
            begun = item.gold["prompt"] if header["template"] == "raw" else ""  # EvalPlus without a chat template
            for row in done[item.id][: header["samples"]]:
                rows.append((item, row, suite.extract(item, begun + row["response"])))
        records[spec] = make_record(suite, name, rows, header, executor, progress)
        if out_dir and isinstance(suite, EvalPlus):  # what `evalplus.evaluate --samples FILE` reads
            lines = [json.dumps({"task_id": item.id, "solution": answer or ""}) + "\n" for item, _, answer in rows]
            Path(out_dir, f"{name}.samples.jsonl").write_text("".join(lines), encoding="utf-8")
        if out_dir:
            write_results(Path(out_dir, "results.json"), records)
    return records


def score_samples(name: str, path: Path, data_dir: Path, files: Mapping, kinds: Mapping, tags: Tags = TAGS) -> dict:
    """Score somebody else's samples of one suite (`read_samples`). Tasks that the file misses are left out of the
    average, and their number is printed and recorded."""
    suite, items, about = load_items(name, data_dir, files, kinds)
    suite.require(items)
    suite = replace(suite, tags=tags)
    rows = read_samples(path, name, suite, items)
    counts = Counter(item.id for item, _, _ in rows)
    fewest, most = min(counts.values()), max(counts.values())
    if missing := len(items) - len(counts):
        print(f"note: {path} has {len(counts)} of the {len(items)} tasks of {name}; the other {missing} do not count")
    if fewest < most:
        print(f"note: {path} has {fewest} to {most} samples of a task: each task counts alike, pass@k ends at {fewest}")
    header = {"samples": fewest, "template": f"samples of {path.name}", "missing": missing}
    return make_record(suite, name, rows, header | about, None, True)


def make_record(suite: Suite, name: str, rows, header: dict, executor, progress: bool) -> dict:
    """Score rows of (item, response, answer). Returns what is known about a suite: accuracy (mean over items of the
    mean over samples) with its standard error, pass@k, shares of truncated and answerless responses, settings, data
    digest, score per item. Reasoning suites also have accuracy per kind and depth, the share in the right format and
    the share that reasons before it answers."""
    pairs = [(item.gold, answer) for item, _, answer in rows]
    with tqdm(desc=f"{name} score", unit="job", disable=None if progress else True) as bar:
        scores = suite.score(pairs, executor if suite.group == "reasoning" else None, bar.update)
    by_item, groups = defaultdict(list), defaultdict(list)
    for (item, _, _), value in zip(rows, scores, strict=True):
        by_item[item.id].append(value)
        if suite.group == "reasoning":
            task, depth = item.gold, f"depth{item.gold.depth}"
            for group in [task.kind] + [depth, f"{task.kind}/{depth}"] * (task.depth is not None):
                groups[group].append(value)
    means = {id: mean(values) for id, values in by_item.items()}
    record = {
        "suite": name,
        "accuracy": mean(means.values()),
        "n": len(means),
        "se": standard_error(list(means.values())),
        "truncated": mean(row["truncated"] for _, row, _ in rows),
        "no_answer": mean(answer is None or not answer.strip() for _, _, answer in rows),
        "tokens": mean(row["tokens"] for _, row, _ in rows),
        **{key: value for key, value in header.items() if not key.startswith("prompts")},
    }
    ks = [k for k in (2, 4, 8, 16, 32, 64) if k <= min(map(len, by_item.values()))]
    record["pass_at"] = {str(k): mean(pass_at_k(len(v), int(sum(v)), k) for v in by_item.values()) for k in ks}
    if suite.group == "reasoning":
        parts = [split_response(row["response"], tags=suite.tags) for _, row, _ in rows]
        record["formatted"] = mean(part.formatted for part in parts)
        record["reasons_first"] = mean(bool(part.think) for part in parts)
        record["groups"] = {g: {"accuracy": mean(v), "n": len(v)} for g, v in sorted(groups.items())}
    return record | {"scores": means}


def during_training(run) -> dict[str, float]:
    """The suites of --eval-suites with the engine of a run (azr.Run), greedily; before and after training also at
    T = 1. Returns what metrics.jsonl gets: "eval/SUITE/accuracy", "eval/SUITE/KIND/accuracy", "eval/SUITE/all/se", ...,
    at T = 1 under "eval-t1", and "score", the mean accuracy, which --keep-best compares."""
    config, found = run.config, {}
    suites = load_suites(config.eval_suites.split(","), Path(config.eval_data), config.kinds)
    for temperature in (0.0, 1.0) if run.step in (0, config.steps) else (0.0,):
        longest = config.eval_max_tokens or config.max_response
        plans = plan_suites(
            suites, run.engine, run.tokenizer, template=config.template, tags=config.tag_names,
            temperature=temperature, seed=config.seed, max_tokens=longest,
        )  # fmt: skip
        records = run_suites(plans, run.engine, run.tokenizer, run.executor)
        for suite, record in records.items():
            name = f"{'eval-t1' if temperature else 'eval'}/{Path(suite).stem}"
            found |= {f"{name}/{key}": value for key, value in flatten(record).items()}
    greedy = [value for name, value in found.items() if name.startswith("eval/") and name.count("/") == 2]
    return found | {"score": sum(greedy) / len(greedy)}


def flatten(record: dict) -> dict[str, float]:
    """The numbers of a record under flat names, for metrics.jsonl: `accuracy`, `deduction/accuracy`, `all/se`, ..."""
    flat = {"accuracy": record["accuracy"]}
    flat |= {f"{group}/accuracy": value["accuracy"] for group, value in record.get("groups", {}).items()}
    flat |= {f"{group}/n": value["n"] for group, value in record.get("groups", {}).items() if "/" not in group}
    keys = ("n", "se", "truncated", "no_answer", "tokens", "formatted", "reasons_first")
    return flat | {f"all/{key}": record[key] for key in keys if key in record}


def stem_of(name: str) -> str:
    """The name under which a suite's results are kept: its own, or that of the file of tasks."""
    return Path(name.partition(":")[2] or name).stem


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def open_engine(args, suites: Sequence[tuple] = ()):
    """Model, tokenizer and engine of the command line; under vLLM the weights wait on the CPU until they are pushed.
    Raises ValueError for a chat template that fails and a dialogue that is not whole, before the weights are loaded."""
    import torch
    from jinja2 import TemplateError  # torch requires it; transformers renders templates with it

    from policy.load import choose_engine, load_config, load_policy, load_tokenizer, make_engine, positions

    tokenizer = load_tokenizer(args.model, load_config(args.model))
    args.tags = dialogue.choose_tags(args.tags_given, tokenizer, args.template)
    for _, name, suite, items, _ in suites if tokenizer.chat_template else ():
        try:
            suite.prompt(items[0].text, tokenizer, suite.template(args.template, tokenizer))
        except (TemplateError, TypeError, ValueError) as error:
            other = "use --template plain, or mend the chat template" if args.template != "plain" else "mend it"
            raise ValueError(f"The chat template of {args.model} fails for {name} ({error}): {other}.") from None
    if any(suite.group == "reasoning" for _, _, suite, _, _ in suites):  # with demonstrations
        chat = tokenizer.chat_template and args.template != "plain"
        dialogue.inspect_dialogue(tokenizer, "chat" if chat else "plain", args.tags)
    kind, on_gpu = choose_engine(args.engine), torch.cuda.is_available()
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    policy, tokenizer = load_policy(args.model, "cuda" if on_gpu and kind != "vllm" else "cpu", dtype)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    cache = int(0.9 * torch.cuda.mem_get_info()[0] - 1.3 * weights - (6 << 30)) if on_gpu else 2 << 30
    length = min(args.max_model_len, positions(policy.config) or args.max_model_len)
    size = {"max_num_seqs": 256 if on_gpu else 64, "kv_cache_bytes": max(cache, 1 << 28)}
    engine = make_engine(kind, args.model, policy, tokenizer, max_model_len=length, **size)
    print(f"engine {engine.name} on {engine.device}, {engine.dtype}, at most {length} tokens per prompt and response")
    return engine, tokenizer


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError, in one sentence, for what cannot be meant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--suites", required=True, help=f"from {', '.join([*SUITES, *GROUPS])}, tasks:FILE; NAME:N takes the first N")
    add("--tasks", default=",".join(KINDS), help="task types of tasks:FILE, by name or from a Python FILE")
    add("--model", default="", help="Hugging Face folder or hub name")
    add("--data", type=Path, default=Path("data"), help="folder with the benchmark files, .jsonl or .jsonl.gz")
    add("--out", type=Path, default=Path("runs/eval"), help="where responses, samples and results.json go")
    add("--file", action="append", default=[], metavar="SUITE=PATH", help="another file or folder for one suite")
    add("--engine", default="auto", choices=("auto", "vllm", "transformers"))
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    add("--template", default="plain", choices=("plain", "chat", "boxed"), help="tags as text (paper), in a chat turn; "
        "boxed: mathematics in a bare chat turn")  # fmt: skip
    add("--tags", default="auto", help="names of the think and answer tag, as azr.py --tags")
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
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"{args.samples} greedy samples are {args.samples} times the same: give a --temperature.")
    if not (args.model or args.score_only or args.samples_file):
        raise ValueError("Give --model, or --score-only, or --samples-file.")
    args.specs, args.kinds = args.suites.split(","), load_kinds(args.tasks)
    args.tags, args.tags_given = read_tags(args.tags), args.tags
    if args.samples_file and len(expand(args.specs)) != 1:
        raise ValueError("--samples-file holds samples of one suite: name exactly one in --suites.")
    args.files = {name: Path(path) for name, _, path in (given.partition("=") for given in args.file)}
    for name, path in args.files.items():
        if name not in SUITES or path == Path() or not path.exists():
            raise ValueError(f"--file {name}={path}: give SUITE=PATH, a suite of {', '.join(SUITES)} and its data.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    begun = False  # from there on what goes wrong is no fault of what was typed
    try:
        args = parse_arguments(argv)
        target = args.out / "results.json"
        before = read_results(args.baseline) if args.baseline else None  # all that may be wrong shows before the work
        if target.is_file():
            read_results(target)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.samples_file:
            [(_, name, _)] = expand(args.specs)
            records = {name: score_samples(name, args.samples_file, args.data, args.files, args.kinds, args.tags)}
            write_results(target, records)
        else:
            suites = load_suites(args.specs, args.data, args.kinds, args.files, args.limit)
            engine, tokenizer = (None, None) if args.score_only else open_engine(args, suites)
            plans = plan_suites(
                suites, engine, tokenizer, out_dir=args.out, template=args.template, tags=args.tags, seed=args.seed,
                samples=args.samples, temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens,
                model=args.model,
            )  # fmt: skip
            begun = True
            records = run_suites(plans, engine, tokenizer, out_dir=args.out, progress=True)
        print("\n".join(summary(records)))
        if before:
            print("\n".join(compare(before, records)))
        print(f"results: {target}")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the responses that were written", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if begun and not isinstance(error, OSError):
            from policy.logprobs import ran_out_of_memory

            if not ran_out_of_memory(error):
                raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; free some disk space, then the same command goes on" if full else ""
        print("evaluate:", *f"{error}{advice}".split(), file=sys.stderr)  # on one line, also what libraries say
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
