"""Tests of prompts and replies on tokenizers as published models have them: BOS, tags that are tokens, templates that
open a think tag or drop reasoning; and one reader of tags and fences for training, evaluation and samples files."""

import ast
import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import azr
import evaluate
from buffers import save_tasks
from harness.config import parse
from harness.start import start
from policy import vllm_engine
from policy.dialogue import (
    ASSISTANT,
    PREAMBLE,
    STOP,
    TAGS,
    USER,
    Tags,
    arguments,
    choose_tags,
    encode,
    fenced_blocks,
    input_key,
    inspect_dialogue,
    response_text,
    split_response,
    wrap,
)
from policy.engine import Completion
from policy.load import load_policy, make_engine
from prompts import KINDS
from sandbox.literals import BadLiteral, parse_literal
from suites.extract import extract_assert, extract_code, extract_math
from suites.table import SUITES

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPS = CHATML.replace(
    "m['content']",
    "(m['content'].split('</think>')[-1].lstrip('\n') if m['role'] == 'assistant' else m['content'])",
)
GENERATION = "'<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "chatml": CHATML,
    "bos": "{{ bos_token }}" + CHATML,
    "strips": STRIPS,
    "opens": STRIPS.replace(GENERATION, "'<|im_start|>assistant\n<think>\n' }}{% endif %}"),
    "opens without a line": CHATML.replace(GENERATION, "'<|im_start|>assistant<think>' }}{% endif %}"),
    "closes": STRIPS.replace(GENERATION, "'<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"),
}
TAG_TOKENS = ["<think>", "</think>", "<answer>", "</answer>"]


def folder_of(path, bos=False, template=None, tags=(), special=True, **more):
    """A model folder: a random Llama, a byte-level tokenizer with what the arguments say."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    texts = [PREAMBLE, USER, ASSISTANT, *(turn for kind in KINDS.values() for turn in kind.solve(kind.zero()))]
    names = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
        )
    inner.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in tags])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", **more
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def tokenizer_of(path, **more):
    return AutoTokenizer.from_pretrained(folder_of(path, **more))


ROW = {"task_id": "HumanEval/0", "entry_point": "f", "prompt": "def f(x):\n", "canonical_solution": "    return x\n"}


@pytest.fixture
def zero_tasks(tmp_path):
    tasks = [kind.zero() for kind in KINDS.values()]
    save_tasks(tmp_path / "zero.jsonl", tasks)
    (tmp_path / "HumanEvalPlus.jsonl").write_text(json.dumps(ROW | {"base_input": [], "plus_input": [], "atol": 0}))
    return f"tasks:{tmp_path / 'zero.jsonl'}"


def run_of(model, tmp_path, *more):
    arguments = ["--model", str(model), "--out", str(tmp_path / "run"), "--device", "cpu", "--engine", "transformers"]
    config, _ = parse([*arguments, "--max-prompt", "2000", "--max-response", "8", *more])
    return azr.Run(**start(config, None))


def asked(run, spec, tmp_path, monkeypatch, template):
    """The ids of all prompts that training and evaluation ask."""
    seen, real = [], run.engine._run
    monkeypatch.setattr(run.engine, "_run", lambda requests, *rest: seen.extend(requests) or real(requests, *rest))
    rollouts = [azr.solve_rollout(run, kind.zero(), 0) for kind in KINDS.values()]
    azr.generate(run, "solve", rollouts, 0)
    options = {"template": template, "tags": run.config.tag_names, "max_tokens": 4}
    suites = evaluate.load_suites([spec, "humaneval"], tmp_path)
    plans = evaluate.plan_suites(suites, run.engine, run.tokenizer, **options)
    evaluate.run_suites(plans, run.engine, run.tokenizer)
    return [request.ids for request in seen]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("name", [None, "chatml", "bos"])
def test_bos_begins_every_prompt_once_in_both_programs(tmp_path, zero_tasks, monkeypatch, template, name):
    """Plain, chat and raw HumanEval prompts of a tokenizer that adds BOS by itself; without that, none is put there."""
    if template == "chat" and not name:
        return
    model = folder_of(tmp_path / "model", bos=True, template=TEMPLATES.get(name))
    with (run := run_of(model, tmp_path, "--template", template)).executor:
        prompts = asked(run, zero_tasks, tmp_path, monkeypatch, template)
        assert len(prompts) == 7
        assert all(ids[0] == 0 and ids.count(0) == 1 for ids in prompts)
    without = tokenizer_of(tmp_path / "without", template=TEMPLATES.get(name))
    assert encode(wrap("One?", without), without)[0] != 0


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tags", [TAGS, Tags("thought", "result")])
def test_a_chat_prompt_has_one_open_think_tag_and_demonstrations_with_their_reasoning(tmp_path, name, tags):
    tokenizer = tokenizer_of(tmp_path, template=TEMPLATES[name])
    for kind in KINDS.values():
        for turns in (kind.solve(kind.zero()), kind.propose([KINDS["deduction"].zero()], 4)):
            text = wrap(turns, tokenizer, "chat", tags=tags)
            head, opening, tail = text.rpartition(f"<{tags.think}>")
            assert opening and tail == "\n"
            assert not head.rstrip().endswith((f"<{tags.think}>", "<think>", "</think>"))
            assert all(tags.spell(turn) in head for turn in turns[1::2])
            assert turns[-1].strip() in head and head.count(tags.spell(PREAMBLE)) == 1
            without = wrap(turns, tokenizer, "chat", prefill_think=False, tags=tags)
            assert text == f"{without}<{tags.think}>\n"
    inspect_dialogue(tokenizer, "chat", tags)


def test_plain_prompts_are_as_they_were():
    turns = ["One?", "<think>\nx\n</think>\n<answer>\n1\n</answer>", "Two?"]
    text = f"{PREAMBLE}\nUser: One?\nAssistant: {turns[1]}\nUser: Two?\nAssistant: <think>\n"
    assert wrap(turns, None) == text
    other = text.replace("think>", "thought>").replace("answer>", "result>")
    assert wrap(turns, None, tags=Tags("thought", "result")) == other
    assert wrap(["Is <think> a tag?"], None, tags=Tags("a", "b")).count("<think>") == 1  # what a user asks stays


@pytest.mark.parametrize("special", [True, False])
def test_tags_that_are_tokens_survive_and_the_end_token_goes(tmp_path, special):
    tokenizer = tokenizer_of(tmp_path, tags=TAG_TOKENS, special=special)
    reply = "a thought</think>\n<answer>\n```output\n[1 , 2] != 'a .'\n```\n</answer>"
    ids = tokenizer.encode(reply, add_special_tokens=False)
    assert response_text([*ids, 1], tokenizer, [1]) == response_text(ids, tokenizer, [1]) == reply
    assert split_response(reply) == split_response(response_text([*ids, 1], tokenizer, [1]))
    more = f"{reply}<|im_end|>\n<|im_start|>user"
    assert response_text(tokenizer.encode(more, add_special_tokens=False), tokenizer, [1]) == reply
    inspect_dialogue(tokenizer, "plain")


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_a_stop_string_that_is_a_special_token_ends_a_response_in_both_engines(tmp_path, name):
    if name == "vllm":
        try:
            vllm_engine.import_vllm()
        except RuntimeError as error:
            pytest.skip(str(error))
    policy, tokenizer = load_policy(str(folder_of(tmp_path, tags=TAG_TOKENS)), "cpu", "float32")
    engine, end = make_engine(name, str(tmp_path), policy, tokenizer, max_model_len=256), "<|im_end|>"
    prompt = encode("One?", tokenizer)
    [found] = engine.generate([prompt], max_new_tokens=200, n=64, seed=0, stop=STOP)
    whole = [tokenizer.decode(one.token_ids) for one in found]
    ended = [text for text, one in zip(whole, found, strict=True) if one.stopped and text.endswith(end)]
    assert ended and all(text.count(end) == (text in ended) for text in whole)
    texts = [response_text(one.token_ids, tokenizer, engine.eos) for one in found]
    assert not any(end in text for text in texts) and any("<think>" in text for text in texts)


def test_text_is_not_tidied(tmp_path):
    tokenizer = tokenizer_of(tmp_path, clean_up_tokenization_spaces=True)
    text = "x != y and a == b ? 'a' , 'b' . n't 's 're ! , ."
    assert response_text(tokenizer.encode(text, add_special_tokens=False), tokenizer, []) == text


@pytest.mark.parametrize(
    "tokens, template, spec, chosen",
    [
        ((), "plain", "auto", "think,answer"),
        (TAG_TOKENS[:2], "plain", "auto", "thought,answer"),
        (TAG_TOKENS, "plain", "auto", "thought,result"),
        ([*TAG_TOKENS, "<thought>"], "plain", "auto", "reasoning,result"),
        (TAG_TOKENS, "chat", "auto", "think,answer"),
        (TAG_TOKENS, "plain", "think,answer", "think,answer"),
        ((), "plain", "a,b", "a,b"),
    ],
)
def test_a_base_model_gets_other_tags_where_its_own_are_tokens(tmp_path, capsys, tokens, template, spec, chosen):
    tokenizer = tokenizer_of(tmp_path, tags=tokens, template=CHATML)
    tags = choose_tags(spec, tokenizer, template)
    said = capsys.readouterr().out
    assert ",".join(tags) == chosen and ("a token of its own" in said) == bool(tokens)
    for name in tags if tokens else ():
        assert f"<{name}>" in said
    inspect_dialogue(tokenizer, template, tags)


def test_a_run_with_other_tags_reads_its_own_and_is_evaluated_with_them(tmp_path, zero_tasks, capsys):
    model = folder_of(tmp_path / "model", tags=TAG_TOKENS, template=CHATML)
    with (run := run_of(model, tmp_path)).executor:
        assert json.loads((tmp_path / "run/config.json").read_text())["tags"] == "thought,result"
        assert (
            "a token of its own for <think> and <answer>; the tags are <thought> and <result>"
            in capsys.readouterr().out
        )
        assert azr.solve_rollout(run, KINDS["deduction"].zero(), 0).prompt.endswith("<thought>\n")
    command = ["--suites", zero_tasks, "--model", str(model), "--out", str(tmp_path / "out"), "--max-tokens", "4"]
    assert evaluate.main([*command, "--engine", "transformers"]) == 0
    path = tmp_path / "out/responses/zero.jsonl"
    header, *rows = map(json.loads, path.read_text().splitlines())
    assert header["tags"] == "thought,result"
    for row, kind in zip(rows, KINDS.values(), strict=True):
        row["response"] = f"x</thought>\n<result>\n{kind.gold(kind.zero())}\n</result>"
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    assert evaluate.main([*command, "--score-only"]) == 0
    record = json.loads((tmp_path / "out/results.json").read_text())[zero_tasks]
    assert record["accuracy"] == record["formatted"] == record["reasons_first"] == 1.0
    for program, more in ((azr, []), (evaluate, ["--suites", zero_tasks])):
        for spec in ("think", "a,a", "a,b,c", "<a>,b", ""):
            assert program.main(["--model", str(model), "--tags", spec, *more]) == 2
            assert "--tags" in capsys.readouterr().err


def test_a_dialogue_that_cannot_work_is_one_sentence(tmp_path):
    double = tokenizer_of(tmp_path / "double", bos=True, template="{{ bos_token }}{{ bos_token }}" + CHATML)
    lossy = tokenizer_of(tmp_path / "lossy")
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    shouts = tokenizer_of(tmp_path / "shouts", template=CHATML.replace("m['content']", "m['content'].upper()"))
    for tokenizer, template, words in (
        (double, "chat", "two BOS"),
        (lossy, "plain", "give back"),
        (shouts, "chat", "demonstrations"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            inspect_dialogue(tokenizer, template)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The reader: one table of forms, read by training, evaluation and samples files


def answer(text: str) -> str:
    return f"Thinking.\n</think>\n<answer>\n{text}\n</answer>"


OUTPUT = "```output\n{}\n```"
READ = {  # responses to a deduction task whose output is [1, 'b']
    "as asked": answer(OUTPUT.format("[1, 'b']")),
    "bare": answer("[1, 'b']"),
    "an invented turn": answer(OUTPUT.format("[1, 'b']")) + "\nUser: more\nAssistant: <think>\n" + answer("2"),
    "an invented turn without a mark": answer("[1, 'b']") + "\nNext:\n<think>\n" + answer(OUTPUT.format("2")),
    "an invented pair": answer("[1, 'b']") + "\n</think>\n<answer>\n2\n</answer>",
    "a mention afterwards": answer("[1, 'b']") + "\nI put it between <answer> and </answer>. An <answer> it is.",
    "a mention before": "I will use <answer> and </answer>, after </think> of course.\n" + answer("[1, 'b']"),
    "no format": "</think> So: <answer>[1, 'b']</answer> and <answer> tags",
    "no format, invented": "</think> So: <answer>[1, 'b']</answer>\n<think>\n" + answer("2"),
    "draft in the thought": "<answer>2</answer>?\n" + answer("[1, 'b']"),
    "cut off": "</think>\n<answer>\n[1, 'b']",
    "one line": "x</think><answer>[1, 'b']</answer>",
    "CRLF": answer(OUTPUT.format("[1, 'b']")).replace("\n", "\r\n"),
    "tildes": answer("~~~output\n[1, 'b']\n~~~"),
    "four backticks": answer("````output\n[1, 'b']\n````"),
    "label case": answer("```Output\n[1, 'b']\n```"),
    "label with a colon": answer("```output:\n[1, 'b']\n```"),
    "another label": answer("```python\n[1, 'b']\n```"),
    "no label": answer("```\n[1, 'b']\n```"),
    "one-line fence": answer("```[1, 'b']```"),
    "labelled one-line fence": answer("```output [1, 'b']```"),
    "one-line fence in prose": answer("It returns ```[1, 'b']```."),
    "backticks": answer("`[1, 'b']`"),
    "a label before": answer("Output: [1, 'b']"),
    "a bold label": answer("**Output:** `[1, 'b']`"),
    "prose before the fence": answer("It returns: ```output\n[1, 'b']\n```"),
    "fence open": answer("```output\n[1, 'b']"),
    "fence closed on the line": answer("```output\n[1, 'b']```"),
    "indented fence": answer("  ```output\n  [1, 'b']\n  ```"),
    "earlier blocks": answer("```input\n2\n```\n```output\n2\n```\n" + OUTPUT.format("[1, 'b']")),
    "a later block": answer(OUTPUT.format("[1, 'b']") + "\n```text\ndone\n```"),
    "byte-order mark": answer("\ufeff[1, 'b']"),
    "zero-width space": answer("```output\n\u200b[1,\u200b 'b']\n```"),
    "no-break space": answer("```output\n[1,\u00a0'b']\n```"),
    "numpy": answer("[np.int64(1), np.str_('b')]"),
    "comment": answer(OUTPUT.format("[1, 'b']  # a list")),
}
REFUSED = {
    "two values": "[1, 'b']\n[1, 'b']",
    "prose": "It is [1, 'b'].",
    "assignment": "x = [1, 'b']",
    "equation": "f(2) == [1, 'b']",
    "text on the fence's line": "```output [1, 'b']\n```",
    "typographic quotes": "[1, \u2018b\u2019]",
    "unquoted": "[1, b]",
    "arrays": "np.array([1, 'b'])",
    "call": "list((1, 'b'))[:]",
}


class Scripted:
    """An engine that answers every prompt with the next of the given texts."""

    device, max_model_len, eos, is_policy, name, dtype = "cpu", 1 << 20, [1], True, "scripted", "float32"

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.stops = tokenizer, iter(texts), []

    def generate(self, prompts, *, stop=(), **more):
        self.stops.append(tuple(stop))
        texts = [next(self.texts) for _ in prompts]
        return [[Completion([*self.tokenizer.encode(text, add_special_tokens=False), 1], None, True)] for text in texts]


def test_training_evaluation_and_samples_files_read_the_same_and_stop_at_the_same(tmp_path, monkeypatch):
    """Every form through `azr.generate` and `verify`, `evaluate.run_suites` and `evaluate.score_samples`."""
    forms = READ | {name: answer(text) for name, text in REFUSED.items()}
    task = KINDS["deduction"].zero()
    task.outputs = ["[1, 'b']"]
    tasks = [task.__class__(**{**task.__dict__, "id": name}) for name in forms]
    save_tasks(tmp_path / "forms.jsonl", tasks)
    with (run := run_of(folder_of(tmp_path / "model"), tmp_path)).executor:
        run.engine = Scripted(run.tokenizer, [*forms.values(), *forms.values()])
        attempts = azr.generate(run, "solve", [azr.solve_rollout(run, item, 0) for item in tasks], 0)
        azr.verify(run, attempts)
        spec = f"tasks:{tmp_path / 'forms.jsonl'}"
        plans = evaluate.plan_suites(evaluate.load_suites([spec], tmp_path), run.engine, run.tokenizer)
        record = evaluate.run_suites(plans, run.engine, run.tokenizer, run.executor)[spec]
        samples = [json.dumps({"task_id": name, "completion": text}) + "\n" for name, text in forms.items()]
        (tmp_path / "samples.jsonl").write_text("".join(samples))
        scored = evaluate.score_samples(spec, tmp_path / "samples.jsonl", tmp_path, {}, KINDS)["scores"]
    trained = {item.task.id: float(item.correct) for item in attempts}
    assert trained == dict.fromkeys(READ, 1.0) | dict.fromkeys(REFUSED, 0.0)
    assert record["scores"] == trained == scored
    assert record["formatted"] == sum(item.parts.formatted for item in attempts) / len(attempts)
    assert run.engine.stops == [STOP, STOP]
    unformatted = {item.task.id for item in attempts if not item.parts.formatted}
    assert unformatted == {"no format", "no format, invented", "cut off"}


@pytest.mark.parametrize(
    "value",
    [
        "'<answer>x</answer>'",
        "'</answer>'",
        '"it\'s </think><answer>"',
        "['<think>', '</answer>']",
        "{'a': '<answer>'}",
    ],
)
def test_a_tag_within_quotes_is_text(value):
    for text in (value, OUTPUT.format(value)):
        for rest in ("", "\nUser: <think>\n" + answer("2")):
            parts = split_response(answer(text) + rest)
            assert parts.formatted and KINDS["deduction"].parse_answer(parts.answer) == value
            assert parts.think == "Thinking."


def test_a_repeated_opening_tag_is_no_thought():
    parts = split_response("<think>\n\n</think>\n\n<answer>5</answer>")
    assert parts.formatted and (parts.think, parts.answer) == ("", "5")
    assert split_response("it ends with '</think>', so.</think>\n<answer>5</answer>").think.endswith(", so.")


def test_a_missing_closing_tag_is_not_closed_by_an_invented_turn():
    parts = split_response("x</think>\n<answer>\n1\n\nNext:\n<think>\ny\n</think>\n<answer>\n2\n</answer>")
    assert KINDS["deduction"].parse_answer(parts.answer) != "1\n\nNext:" and parts.answer == "2"


@pytest.mark.parametrize(
    "text",
    [
        "f([1, 5], 3)", "f([1, 5], 3)  # keeps 5", " f ( [1, 5], 3 ) ", "# a call\nf([1, 5], 3)", "f([1, 5], 3);",
        "f([1, 5], 3) -> [5]", "f([1, 5], 3) returns [5]", "f([1, 5], 3) == [5]", "assert f([1, 5], 3) == [5]",
        "f([1, 5], 3) = [5]", "f([1, 5], 3)\n# keeps 5", "f([1, 5], 3) (keeps 5)", "f([1, 5], 3).", "[1, 5], 3",
        "\ufefff([1, 5], 3)", "f([1, 5],\u200b 3)", "f([1, 5], 3) => [5]", "f([1, 5], 3): keeps 5",
    ],
)  # fmt: skip
def test_an_input_is_read_as_python(text):
    assert arguments(text) == "[1, 5], 3"
    assert arguments(text.replace("[1, 5]", "[')', '# f(1)']")) == "[')', '# f(1)'], 3"


@pytest.mark.parametrize(
    "text", ["#" * 400 + "\n[1]", "# " * 400 + "\n[1]", "# a  \n" * 400 + "[1]", "#\n" * 400 + "f"]
)
def test_no_comment_keeps_the_parser_busy(text):
    """A rule of `#` used up hours: the time doubled with each. No limit of the executor covers what is only read."""
    assert arguments(text) == text.strip() and arguments(f"{'#' * 400}\nf(1)") == "1"
    assert fenced_blocks(f"x ```a b{' ' * 20_000}c") == []
    assert fenced_blocks("x ```python  a = 1  ``` y") == [("python", "a = 1")]


def test_a_multi_line_call_keeps_its_comments_and_comments_make_no_second_input(tmp_path):
    assert input_key(arguments("f([1,  # one\n   5], 3)")) == input_key("[1, 5], 3") == input_key("[1, 5], 3  # c")
    assert input_key("1, b='a'") == input_key("+1, b=u'a'") == input_key("0x1, b='a'  # c") != input_key("1.0, b='a'")
    assert input_key("x=1") != input_key("y=1") and input_key("b=1, a=2") == input_key("a=2, b=1")
    assert input_key("1e999j") != input_key("[1e999j]")  # values that no output can be
    assert input_key("x + 1") == input_key("x  +  1") != input_key("x + 2")


def test_a_long_call_with_many_brackets_is_parsed_once(monkeypatch):
    seen, parse = [], ast.parse
    monkeypatch.setattr(ast, "parse", lambda *arguments: seen.append(1) or parse(*arguments))
    assert arguments("f(" + "[]," * 8000 + "$" + ")" * 40).startswith("f([]") and len(seen) == 3
    long = f"[{'11111, ' * 400}]"
    assert arguments(f"f({long}) -> 5") == long
    blocks = "".join(f"```input {n}\n{text}\n```\n" for n, text in enumerate(("f(1)", "f(1)  # again", "1 # bare")))
    draft = KINDS["induction"].parse_proposal(blocks + "```message\nm\n```", [KINDS["deduction"].zero()], 2)
    assert draft == (None, "too_few_inputs")


CODE = "def f(x):\n    return x"


@pytest.mark.parametrize(
    "text",
    [
        f"```{label}\n{CODE}\n```"
        for label in ("python", "Python", "PYTHON", "py", "python3", "python3.11", "Python 3", "{python}", "py3",
                      "python:main.py", " python", "{.python .numberLines}", "python title=x", "")
    ] + [
        f"```text\nplan\n```\n```python\n{CODE}\n```", f"```python\n{CODE}\n```\n```text\nout\n```",
        f"```python\n{CODE}\n```\nIt prints:\n```\n1\n```",
        f"```python\nprint(1)\n```\nbetter:\n```python\n{CODE}\n```", f"~~~python\n{CODE}\n~~~",
        f"```python\n{CODE}", f"```python\n{CODE}```", f"Here: ```python\n{CODE}\n```",
        f"```python\n```python\n{CODE}\n```", "1. So\n   ```python\n   def f(x):\n       return x\n   ```",
        f"````python\n{CODE}\n````", f"\ufeff```python\n{CODE}\n```", f"```python\n\ufeff{CODE}\n```",
        f"```json\n{{}}\n```\n```cpp\nint f;\n```\n```Python\n{CODE}\n```",
    ],
)  # fmt: skip
def test_code_is_that_of_the_last_python_fence(text):
    after = "" if text.count("```") == 1 else "\n\nok"
    for one in (text, text.replace("\n", "\r\n"), answer(text), f"<answer>{text}</answer>", f"why\n\n{text}{after}"):
        assert extract_code(one) == CODE, one
    assert KINDS["induction"].parse_answer(split_response(answer(text)).answer).startswith(CODE)


def test_a_longer_fence_holds_a_shorter_one():
    assert fenced_blocks("````markdown\n```python\nx\n```\n````\n```\ny\n```") == [
        ("markdown", "```python\nx\n```"),
        ("", "y"),
    ]
    assert fenced_blocks("```input1\n1\n```\n```input_2\n2\n```\n``` Input 3\n3\n```") == [
        ("input", text) for text in "123"
    ]


def test_a_whole_program_without_a_fence_is_read():
    assert KINDS["induction"].parse_answer(CODE) == CODE == extract_code(CODE)


def test_numpy_scalars_are_the_plain_values_they_print():
    texts = (
        "np.int64(3) np.float64(0.5) numpy.uint8(2) np.True_ np.bool_(False) np.str_('a') np.float64(nan) -np.int32(1)"
    )
    assert repr([parse_literal(text) for text in texts.split()]) == "[3, 0.5, 2, True, False, 'a', nan, -1]"
    for text in (
        "np.int64('3')",
        "np.array([1])",
        "np.int64(1, 2)",
        "os.int64(3)",
        "np.int64(x=1)",
        "np.int64",
        "np.pi",
    ):
        with pytest.raises(BadLiteral):
            parse_literal(text)


@pytest.mark.parametrize(
    "text",
    [
        "assert f([1], 'a == b') == 'x == y'", "[ANSWER]\nassert f([1], 'a == b') == 'x == y'\n[/ANSWER]",
        "[THOUGHT]\nf is f(2) == 3.\nassert f(2) == 3\n[/THOUGHT]\n"
        "[ANSWER]\nassert f([1], 'a == b') == 'x == y'\n[/ANSWER]",
        "It doubles.\nSo: assert f([1], 'a == b') == 'x == y'",
        "assert f([1], 'a == b') == 'x == y'\n[/ANSWER]\n\n[PYTHON]\n[ANSWER]\nassert f(3) == 4\n[/ANSWER]",
        "f([1], 'a == b') == 'x == y'", "```python\nassert f([1], 'a == b') == 'x == y'\n```",
        "assert f([1], 'a == b') == 'x == y'  # so", "assert f([1], 'a == b') == f([2]) == 'x == y'",
        "[ANSWER]assert f([1], 'a == b') == 'x == y'", "assert f([1], 'a == b') == 'x == y'\n\nassert f(3) == 4",
    ],
)  # fmt: skip
def test_a_cruxeval_sample_is_the_value_around_the_last_equals_sign(text):
    assert extract_assert(text, "output") == "'x == y'"
    assert extract_assert(text, "input") == "[1], 'a == b'"


@pytest.mark.parametrize(
    "text, side, value",
    [
        ("[ANSWER]\n'x'\n[/ANSWER]", "output", "'x'"),
        ("[THOUGHT]\nabc\n[/THOUGHT]\n\n[ANSWER]\n[1, 2]\n[/ANSWER]", "output", "[1, 2]"),
        (" 'x'\n\n[PYTHON]\nmore", "output", "'x'"),
        ("58", "output", "58"),
        ("It is a long thought.\n\n'x'", "output", "'x'"),
        ("```\n'x'\n```", "output", "'x'"),
        ("f([1], 2)", "input", "[1], 2"),
        ("[ANSWER]\n[1], 2\n[/ANSWER]", "input", "[1], 2"),
        ("the answer is 3", "output", None),
        ("", "output", None),
    ],
)
def test_a_cruxeval_sample_may_be_the_bare_value(text, side, value):
    assert (extract_assert(text, side) or None) == value
    suite = SUITES[f"cruxeval-{side[0]}"]
    row = {"code": "def f(*x):\n    return x", "input": "0", "output": "0", "id": "a"}
    assert suite.completion(suite.item(row, 0), text) == value


def test_mathematics_and_code_are_read_from_the_same_pair():
    text = "x</think>\n<answer>{}</answer>\nNext: <think>y</think>\n<answer>2</answer>"
    assert extract_math(text.format("\\boxed{5}")) == "5" and extract_code(text.format("print(5)")) == "print(5)"
    other = text.replace("think>", "thought>").replace("answer>", "result>")
    assert extract_math(other.format("5"), Tags("thought", "result")) == "5"
