"""Loading a policy, its tokenizer, and the engine that samples from it.

What it does: turns the name of a model into its config, policy and tokenizer, and says in one sentence what is wrong
with a folder; builds the engine that fits the machine.
What it leaves out: several GPUs, quantised weights.

    policy, tokenizer = load_policy("Qwen/Qwen2.5-Coder-0.5B-Instruct", "cpu", "float32")
    engine = make_engine("auto", path, policy, tokenizer, max_model_len=2048)
"""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from policy.dialogue import PREAMBLE
from policy.engine import Engine, eos_ids, first_line
from policy.logprobs import ran_out_of_memory
from policy.transformers_engine import TransformersEngine
from policy.vllm_engine import VllmEngine, import_vllm, vllm_build

# Names under which the paper and its readers speak of the models, and the names under which the hub serves them.
MODEL_ALIASES = {
    f"Qwen/Qwen2.5-{size}-Coder{kind}": f"Qwen/Qwen2.5-Coder-{size}{kind}"
    for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")
    for kind in ("", "-Instruct")
}
# What transformers raises for damaged folders: its own checks, those of the libraries below it, or none at all.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, EOFError, UnpicklingError)
LOAD_ERRORS += (SafetensorError, StrictDataclassError)


def resolve_model(name: str) -> str:
    """The folder or hub name that `name` means; raises ValueError where it can be neither."""
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise ValueError(f"The folder {name} has no config.json: give a model folder in Hugging Face format.")
        return name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith("."):
        raise ValueError(f"There is no model {name}: give a folder or a hub name such as Qwen/Qwen2.5-Coder-3B.")
    return MODEL_ALIASES.get(name, name)


def load_config(name: str):
    """The config of a model, of its text part where it has several, so that what cannot work is found before anything
    large is loaded. Raises ValueError for a wrong name, and for a model whose text part cannot be had alone."""
    path = resolve_model(name)
    try:
        whole = AutoConfig.from_pretrained(path)
        config = whole.get_text_config()
    except LOAD_ERRORS as error:
        known = Path(path).is_dir()
        what = f"The config.json of {path} cannot be used" if known else f"There is no model {path} to be had here"
        raise ValueError(f"{what}: {first_line(error)}") from error
    model, part = (MODEL_FOR_CAUSAL_LM_MAPPING.get(type(each), None) for each in (whole, config))
    if model is None or model is not part:  # that of Qwen 3.5 takes the text part from a folder of the whole
        raise ValueError(f"{path} ({whole.model_type}) is no model of text alone: use another --model.")
    if part._is_stateful and not {"full_attention", "hybrid"} & set(getattr(config, "layer_types", None) or ()):
        raise ValueError(f"{path} ({whole.model_type}) has no attention that masks pads: use another --model.")
    return config


def positions(config) -> int | None:
    """The longest sequence a model can read, in tokens; None where it has no limit."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def load_tokenizer(name: str, config) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises ValueError, in one sentence, where there is none or it has other ids."""
    path = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except LOAD_ERRORS as error:
        reason = first_line(error)
        raise ValueError(f"{path} has no usable tokenizer ({reason}): put one beside config.json.") from error
    if (last := max([*tokenizer.encode(PREAMBLE), tokenizer.eos_token_id or 0])) >= config.vocab_size:
        raise ValueError(
            f"The tokenizer of {path} writes the id {last}, but the model has only {config.vocab_size} ids: "
            "resize its embeddings, or put the tokenizer beside it that it was trained with."
        )
    return tokenizer


def load_policy(name: str, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder or the hub; `dtype` is that of the parameters ("float32", "bfloat16").

    Raises ValueError, in one sentence, for a name that is no model, a folder without tokenizer, incomplete weights and
    a model without end-of-sequence id.
    """
    path, config = resolve_model(name), load_config(name)
    tokenizer = load_tokenizer(name, config)
    try:
        policy, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True
        )
    except LOAD_ERRORS as error:
        if ran_out_of_memory(error):
            raise
        raise ValueError(f"{path} could not be loaded: {first_line(error)}") from error
    if other := [key for key, *_ in report["mismatched_keys"]]:
        raise ValueError(f"The weights of {path} have other sizes than its config.json says, first {min(other)}.")
    if report["missing_keys"]:  # transformers would leave them random
        raise ValueError(f"The weights of {path} are incomplete: {min(report['missing_keys'])} is missing.")
    if more := [key for key in report["unexpected_keys"] if ".layers." in key]:  # transformers would drop them
        raise ValueError(f"The weights of {path} hold {min(more)}, which its config.json does not have: restore it.")
    policy.generation_config = savable(policy.generation_config)
    if not eos_ids(policy, tokenizer):
        raise ValueError(f"{path} names no end-of-sequence token: set eos_token in its tokenizer_config.json.")
    return policy.to(device), tokenizer


def savable(settings: GenerationConfig) -> GenerationConfig:
    """A generation config without the fields that forbid to save it, such as a temperature for greedy decoding; nothing
    here reads them."""
    kept = GenerationConfig()
    for name, value in sorted(settings.to_dict().items(), key=lambda field: field[0] != "do_sample"):
        before = getattr(kept, name, None)
        setattr(kept, name, value)
        try:
            kept.validate(strict=True)
        except (ValueError, TypeError):
            setattr(kept, name, before)
    return kept


def choose_engine(kind: str) -> str:
    """What --engine auto means here: vLLM where its build fits the machine, else transformers, with a line that says so
    where vLLM is installed but unusable. Raises ValueError for an unknown name."""
    if kind not in ("auto", "vllm", "transformers"):
        raise ValueError(f"There is no engine {kind}: choose auto, vllm or transformers.")
    if kind != "auto":
        return kind
    try:
        import_vllm()
        return "vllm"
    except RuntimeError as error:
        if vllm_build() is not None:
            print(f"using the transformers engine: {error}")
        return "transformers"


def make_engine(
    kind: str, model_path: str, policy, tokenizer, *, max_model_len: int, token_budget: int = 32768, **for_vllm
) -> Engine:
    """The engine called `kind` ("auto": `choose_engine`), holding the policy's weights and computing in their dtype.

    `token_budget` is for transformers, `for_vllm` (see `VllmEngine`) for vLLM alone, which raises RuntimeError where it
    was asked for and cannot be had.
    """
    if choose_engine(kind) == "transformers":
        return TransformersEngine(policy, tokenizer, max_model_len, token_budget)
    path = resolve_model(model_path)
    if AutoConfig.from_pretrained(path).model_type != policy.config.model_type:
        raise RuntimeError(f"vLLM would load the whole of {path}, of which the policy is the text part")
    return VllmEngine(path, policy, tokenizer, max_model_len, **for_vllm)
