"""Tests of models of many families, tiny and random, in folders as users have them: each trains, or is refused in one
sentence before anything is seeded."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

import azr
import evaluate
from buffers import save_tasks
from harness.config import TINY_MODEL
from policy.load import load_policy
from policy.optimizer import MasterAdamW
from policy.transformers_engine import TransformersEngine
from prompts import KINDS
from trr import Sample, update

disable_progress_bar()
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
LENGTHS = ["--max-prompt", "1000", "--max-response", "8"]
SMALL = ["--batch", "2", "--rollouts", "2", "--seed-factor", "1", "--inputs", "4", "--engine", "transformers"]
SMALL += ["--device", "cpu", "--steps", "2", "--lr", "1e-3", *LENGTHS]
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2)
LINEAR |= dict(head_dim=8, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
MAMBA = dict(mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
DROPOUT = dict(resid_pdrop=0.3, embd_pdrop=0.3, attention_dropout=0.3)

TRAINED = {  # name -> (model type, what its config has beside SIZES)
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": False}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "phi3": ("phi3", {"pad_token_id": 0, "resid_pdrop": 0.1}),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"hidden_dropout": 0.1}),
    "granite": ("granite", {"logits_scaling": 8.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "qwen3.5": ("qwen3_5_text", LINEAR),
}
CHECKED = {  # these pass the check, which contains an update
    "phi": ("phi", DROPOUT),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": None, "n_positions": 2048}),
    "opt": ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.3}),
    "bloom": ("bloom", {"max_position_embeddings": None}),
    "falcon_h1": ("falcon_h1", MAMBA | {"lm_head_multiplier": 0.5}),
    "lfm2": ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
}
REFUSED = {
    "gemma2": ("gemma2", GEMMA, "caps its logits"),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.5}, "does not know how this model makes its logits"),
    "mamba": ("mamba", {}, "no attention that masks pads"),
    "bert": ("bert", {"is_decoder": True}, "this model makes its logits"),
}


def tokenizer_of(**more):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    for name, value in more.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_bos():
    """A tokenizer that puts BOS before any text by itself, as Llama's does."""
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    start = [("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=start)
    return tokenizer


def build(folder: Path, kind: str, more: dict, tokenizer=None, vocabulary: int = 455) -> str:
    """A model folder of the given type, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": vocabulary, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 1}
    sizes |= {"pad_token_id": 0, "initializer_range": 0.1} | more
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(folder)
    (tokenizer or tokenizer_of()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("seeds") / "seeds.jsonl"
    save_tasks(path, [kind.zero() for kind in KINDS.values()])
    return str(path)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measured(monkeypatch):
    """The engine's log-probabilities go into every update, as with vLLM."""
    monkeypatch.setattr(TransformersEngine, "is_policy", False)


def sentence(capsys) -> str:
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1 and "Traceback" not in message[0]
    return message[0]


# ---------------------------------------------------------------------------------------------------------------------
# Families


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_of_this_family_trains_two_steps(name, tmp_path, seeds, measured, capsys):
    kind, more = TRAINED[name]
    model = build(tmp_path / "m", kind, more, with_bos() if name == "llama" else None, vocabulary=480)
    out = tmp_path / "run"
    assert azr.main(["--model", model, "--seeds", seeds, "--out", str(out), *SMALL]) == 0
    assert re.search(
        r"checked: lengths, dialogue, update, saving \(.* differ by \d\.\de-0[78] nats", capsys.readouterr().out
    )
    before, after = (load_file(Path(folder, "model.safetensors")) for folder in (model, out / "checkpoint"))
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in after)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2 and all(record["update/mismatch"] < 1e-6 for record in records[1:])


@pytest.mark.parametrize("name", CHECKED)
def test_a_model_of_this_family_passes_the_check(name, tmp_path, capsys):
    kind, more = CHECKED[name]
    model = build(tmp_path / "m", kind, more)
    assert azr.main(["--dry-run", "--verbose", "--model", model, "--gradient-checkpointing", *SMALL]) == 0
    table = re.findall(r"^  (lengths|dialogue|update|saving) +(\S.*)", capsys.readouterr().out, re.MULTILINE)
    assert [row for row, _ in table] == ["lengths", "dialogue", "update", "saving"]
    assert re.search(r"differ by \d\.\de-0[789] nats", dict(table)["update"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_this_family_is_refused_in_one_sentence(name, tmp_path, seeds, capsys):
    kind, more, words = REFUSED[name]
    model = build(tmp_path / "m", kind, more)
    for arguments in (["--seeds", seeds, "--out", str(tmp_path / "run")], ["--dry-run", "--verbose"]):
        assert azr.main([*arguments, "--model", model, *SMALL]) == 2
        assert words in sentence(capsys) and not (tmp_path / "run").exists()


def whole(folder: Path, kind: str, text: dict, vision: dict) -> str:
    """A folder of a model of text and images, whose config.json has the text part nested."""
    text = SIZES | {"vocab_size": 455, "eos_token_id": 1, "pad_token_id": 0} | text
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=True)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return str(folder)


def test_the_text_part_of_a_whole_model_trains_where_it_can_be_had(tmp_path, seeds, capsys):
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    model = whole(tmp_path / "m", "qwen3_5", LINEAR | {"tie_word_embeddings": True}, vision)
    assert azr.main(["--model", model, "--seeds", seeds, "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert json.loads((tmp_path / "run/checkpoint/config.json").read_text())["model_type"] == "qwen3_5_text"
    assert azr.main(["--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    suite = ["--suites", "tasks:tiny/test.jsonl:2", "--max-tokens", "4", "--engine", "transformers"]
    assert evaluate.main([*suite, "--model", model, "--out", str(tmp_path / "eval")]) == 0


@pytest.mark.parametrize("kind", ["gemma3", "t5"])
def test_what_is_no_model_of_text_alone_is_refused_everywhere(kind, tmp_path, capsys):
    if kind == "t5":
        AutoConfig.for_model("t5").save_pretrained(model := tmp_path / "m")
    else:
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        model = whole(tmp_path / "m", kind, GEMMA, sizes | dict(image_size=28, patch_size=14))
    for arguments in (["--dry-run"], ["--out", str(tmp_path / "run")], ["--dry-run", "--card", "24"]):
        assert azr.main(["--model", str(model), *LENGTHS, *arguments]) == 2
        assert f"({kind}) is no model of text alone" in sentence(capsys)
    assert evaluate.main(["--suites", "tasks:tiny/test.jsonl:2", "--model", str(model), "--out", str(tmp_path)]) == 2
    assert f"({kind}) is no model of text alone" in sentence(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# What the update computes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["phi", "gpt2", "opt"])
def test_dropout_is_off_in_the_update(name, checkpointing, tmp_path):
    """The layers of OPT call dropout themselves, which is why gradient checkpointing is the harder case."""
    policy, tokenizer = load_policy(build(tmp_path / "m", *CHECKED[name]), "cpu", "float32")
    if checkpointing:
        policy.gradient_checkpointing_enable()
    engine = TransformersEngine(policy, tokenizer, 256, 4096)
    [answers] = engine.generate([list(range(5, 60))], max_new_tokens=16, n=3, seed=0, logprobs=True)
    samples = [Sample(list(range(5, 60)), answer.token_ids, 1.0, answer.logprobs) for answer in answers]
    state = torch.get_rng_state()
    assert update(policy, MasterAdamW(policy), samples, lr=0.0).mismatch < 1e-6
    assert torch.equal(state, torch.get_rng_state()) and not policy.training
    policy.train()
    update(policy, MasterAdamW(policy), samples, lr=0.0)
    ids = torch.arange(5, 60)[None]
    assert policy.training and not torch.equal(policy(ids).logits, policy(ids).logits)  # dropout is back


@pytest.mark.parametrize(("kind", "more"), [("granite", {"logits_scaling": 0.25}), ("qwen2", {}), ("gpt_neox", {})])
def test_logprob_entropy_and_gradient_are_the_wrappers_own(kind, more, tmp_path):
    """Against plain autograd over the model's own logits, cut to the ids that the tokenizer has."""
    policy, tokenizer = load_policy(build(tmp_path / "m", kind, more, vocabulary=480), "cpu", "float32")
    engine, prompt = TransformersEngine(policy, tokenizer, 256, 4096), list(range(5, 60))
    known = engine.vocab_size
    assert known < 460
    [[answer]] = engine.generate([prompt], max_new_tokens=16, seed=0, logprobs=True)
    ids = torch.tensor([prompt + answer.token_ids])
    logp = policy(ids).logits[0, len(prompt) - 1 : -1, :known].log_softmax(-1)
    expected = logp.gather(-1, torch.tensor(answer.token_ids)[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp).sum(-1)
    (-(expected.mean()) - 0.1 * entropy.mean()).backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()

    class Watching:
        def step(self, lr, grad_clip):
            for name, p in policy.named_parameters():
                torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-4, msg=name)
            return 1.0

    samples = [Sample(prompt, answer.token_ids, 1.0, answer.logprobs)]
    result = update(policy, Watching(), samples, lr=0.0, entropy_coef=0.1, vocab_size=known)
    assert result.mismatch < 1e-6 and result.entropy == pytest.approx(entropy.mean().item(), rel=1e-5)


@pytest.mark.parametrize("when", ["resume", "update"])
def test_an_engine_that_drifts_away_stops_the_run(when, tmp_path, seeds, measured, monkeypatch, capsys):
    model, out = build(tmp_path / "m", "llama", {}), tmp_path / "run"
    run, decode, drift = TransformersEngine._run, azr.learn, [0.0]

    def drifted(self, *arguments):
        groups = run(self, *arguments)
        for completion in (c for group in groups for c in group if c.logprobs):
            completion.logprobs = [value - drift[0] for value in completion.logprobs]
        return groups

    def learn(*arguments):
        found = decode(*arguments)
        drift[0] = 1.0 if when == "update" else 0.0
        return found

    monkeypatch.setattr(TransformersEngine, "_run", drifted)
    monkeypatch.setattr(azr, "learn", learn)
    first = azr.main(["--model", model, "--seeds", seeds, "--out", str(out), *SMALL, "--steps", "2"])
    if when == "resume":
        assert first == 0
        drift[0] = 1.0
        capsys.readouterr()
        first = azr.main(["--resume", str(out), "--steps", "3"])
    assert first == 2 and (out / "checkpoint").resolve().name == f"checkpoint-{1 + (when == 'resume'):06d}"
    assert "does not sample from the policy that is trained (logprobs differ by 1 nats" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"do_sample": False}),
        ({"temperature": 0.6, "do_sample": True}, {"do_sample": True, "temperature": 0.6}),
        ({"top_k": 20, "min_p": 0.1, "typical_p": 0.9}, {}),
        ({"length_penalty": 2.0, "early_stopping": True, "output_scores": True}, {}),
        ({"pad_token_id": -1, "do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
    ],
)
def test_what_forbids_to_save_a_generation_config_is_dropped(settings, kept, tmp_path, seeds):
    model = Path(build(tmp_path / "m", "llama", {}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]} | settings))
    out = tmp_path / "run"
    assert azr.main(["--model", str(model), "--seeds", seeds, "--out", str(out), *SMALL, "--steps", "1"]) == 0
    saved = json.loads((out / "checkpoint/generation_config.json").read_text())
    assert {key: saved[key] for key in saved if key in {*settings, "eos_token_id"}} == kept | {"eos_token_id": [1, 5]}
    assert azr.main(["--resume", str(out), "--steps", "2"]) == 0


def test_what_cannot_be_saved_is_found_before_seeding(tmp_path, seeds, monkeypatch, capsys):
    model = build(tmp_path / "m", "llama", {})
    monkeypatch.setattr(PretrainedConfig, "to_json_file", lambda self, path, **_: Path(path).write_text("{}"))
    assert azr.main(["--model", model, "--seeds", seeds, "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert "cannot be saved" in sentence(capsys) and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Config and tokenizer


def test_lengths_beyond_the_positions_get_numbers_that_fit(tmp_path, capsys):
    model = build(tmp_path / "m", "llama", {"max_position_embeddings": 2048})
    for arguments in (["--dry-run"], ["--out", str(tmp_path / "run")], ["--dry-run", "--card", "24"]):
        assert azr.main(["--model", model, *arguments]) == 2
        message = sentence(capsys)
        assert "--max-prompt 6144 and --max-response 8096 need 14240 positions" in message and "has 2048" in message
    numbers = re.search(r"use (--max-prompt \d+ --max-response \d+)", message)[1].split()
    assert int(numbers[1]) + int(numbers[3]) == 2048
    assert azr.main(["--model", model, "--dry-run", *numbers]) == 0
    assert azr.main(["--model", build(tmp_path / "b", *CHECKED["bloom"]), "--dry-run"]) == 0  # has no positions


def test_a_tokenizer_with_more_ids_than_the_model_is_called_so(tmp_path, capsys):
    model = build(tmp_path / "m", "llama", {}, with_bos(), vocabulary=455)
    for arguments in (["--dry-run"], ["--out", str(tmp_path / "run")]):
        assert azr.main(["--model", model, *LENGTHS, *arguments]) == 2
        assert re.search(r"writes the id 455, but the model has only 455 ids: resize its embeddings", sentence(capsys))
    assert evaluate.main(["--suites", "tasks:tiny/test.jsonl:2", "--model", model, "--out", str(tmp_path / "e")]) == 2
    assert "has only 455 ids" in sentence(capsys)
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<image>"])  # as Gemma 3 1B has: no prompt contains it
    assert azr.main(["--dry-run", "--model", build(tmp_path / "n", "llama", {}, tokenizer), *LENGTHS]) == 0


RAISES = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system prompt comes first') }}{% endif %}"


def test_a_chat_template_that_raises_is_one_sentence_before_the_weights_are_loaded(tmp_path, capsys):
    model = build(tmp_path / "m", "llama", {}, tokenizer_of(chat_template=RAISES))
    Path(model, "model.safetensors").unlink()
    suite = [
        "--suites",
        "tasks:tiny/test.jsonl:2",
        "--model",
        model,
        "--out",
        str(tmp_path / "e"),
        "--template",
        "chat",
    ]
    assert evaluate.main(suite) == 2
    assert "fails for tasks:tiny/test.jsonl (a system prompt comes first): use --template plain" in sentence(capsys)
    for arguments in (["--dry-run"], ["--out", str(tmp_path / "run")]):
        assert azr.main(["--model", model, *LENGTHS, "--template", "chat", *arguments]) == 2
        assert "fails (a system prompt comes first); use --template plain" in sentence(capsys)


def test_verbose_is_for_a_dry_run(capsys):
    assert azr.main(["--verbose"]) == 2 and "--verbose is for --dry-run" in sentence(capsys)
    assert azr.main(["--verbose", "--dry-run", "--card", "24"]) == 2 and "without --card" in sentence(capsys)
