"""Models and training state on disk: ordinary model folders, GGUF files, and states that survive a kill.

A policy's folder loads with `AutoModelForCausalLM`, a reward model's with `AutoModelForSequenceClassification`. Weights
are kept in fp32 while training and saved so. Everything is written aside, synced and renamed.

A reward model's config names a pad id that never occurs in text (one more row of the embedding, where the tokenizer has
no such token), because the library looks for the last token that is not the pad id; so the library reads the score at
the same token as we do.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tastemaker import parallel, processes
from tastemaker.errors import ModelError
from tastemaker.files import atomic_write, sync_folder
from tastemaker.lora import merged_state
from tastemaker.memory import Shape, shape_of
from tastemaker.model import LanguageModel, RewardModel, context_length, prompt_limit
from tastemaker.model_places import check_folder, check_gguf, resolve_source
from tastemaker.tokenizer import Tokenizer, load_tokenizer, wrap_tokenizer

# Config fields that hold the dropout of a residual stream, by the library's families of models.
RESIDUAL_DROPOUT_FIELDS = ("resid_pdrop", "residual_dropout", "hidden_dropout", "dropout", "resid_dropout")
# How the library calls the classes of a model that writes, and of one that scores.
LANGUAGE_MODELS, CLASSIFIERS = ("ForCausalLM", "LMHeadModel"), ("ForSequenceClassification",)
GGUF_MODEL = "a GGUF file of a causal language model"


@dataclass(frozen=True, slots=True)
class Reader:
    """How a model reads text: enough to tell what fits into it, without its weights."""

    tokenizer: Tokenizer
    context: int
    prompt_limit: int
    """The longest prompt that it was trained to read, if it is a reward model; else its context."""


def load_reader(source: str) -> Reader:
    """Load the tokenizer and the limits of a model that `load_policy` or `load_reward_model` loads."""
    from transformers import AutoTokenizer

    place = resolve_source(source)
    if not place.endswith(".gguf"):
        check_folder(place)
        config = _load_config(place, 0.0)
        return Reader(load_tokenizer(place), context_length(config), prompt_limit(config))
    path = Path(place)
    check_gguf(path)
    config = _load_gguf_config(path)
    with _quiet_library(), _as_model_error(place, GGUF_MODEL):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return Reader(wrap_tokenizer(tokenizer, source=place), context_length(config), prompt_limit(config))


def load_shape(source: str, *, scores: bool = False) -> Shape:
    """What a model's memory depends on; `scores`: of a reward model on its trunk. No weights are read or made."""
    from transformers import AutoModelForCausalLM

    place = resolve_source(source)
    if place.endswith(".gguf"):
        check_gguf(Path(place))
        config = _load_gguf_config(Path(place))
    else:
        check_folder(place)
        config = _load_config(place, 0.0)
    with _quiet_library(), _as_model_error(place, "a language model"), torch.device("meta"):
        library = AutoModelForCausalLM.from_config(config)
    return shape_of(library, scores=scores)


def has_residual_dropout(source: str) -> bool:
    """Whether a model that `load_policy` loads has a residual dropout to set."""
    place = resolve_source(source)
    if not place.endswith(".gguf"):
        check_folder(place)
        return bool(_residual_dropouts(_load_config(place, 0.0)))
    check_gguf(Path(place))
    return bool(_residual_dropouts(_load_gguf_config(Path(place))))


def load_policy(source: str, *, stop_texts: Sequence[str] = (), residual_dropout: float = 0.0) -> LanguageModel:
    """Load a causal language model and its tokenizer in fp32 from a folder, a `.gguf` file, `package:...` or the hub.

    `residual_dropout` is applied where the architecture has it; all other dropout is off. The model is in evaluation
    mode.

    Raises:
        ModelError: the source is not a causal language model, or its tokenizer lacks what training needs.
    """
    from transformers import AutoModelForCausalLM

    place = resolve_source(source)
    if place.endswith(".gguf"):
        return _load_gguf(Path(place), stop_texts, residual_dropout)
    check_folder(place)
    tokenizer = load_tokenizer(place, stop_texts=stop_texts)
    config = _load_config(place, residual_dropout)
    classifier = _architecture(config, CLASSIFIERS)
    if classifier:
        raise ModelError(f"{place} is a reward model ({classifier}), not a language model.")
    library = _load_whole(AutoModelForCausalLM, place, config, "a causal language model")
    _check_vocabulary(library, tokenizer, place)
    return LanguageModel(library.eval(), tokenizer)


def save_policy(folder: Path, policy: LanguageModel, *, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a policy (LoRA merged in) and its tokenizer; `weights` replaces some parameters by name, as EMA's do."""
    _name_ends(policy)
    _save_library(folder, policy.library, policy.tokenizer, weights or {})


def _name_ends(policy: LanguageModel) -> None:
    """Have other software end responses at our end token too, where that is the template's and not the tokenizer's."""
    tokenizer, generation = policy.tokenizer, policy.library.generation_config
    if tokenizer.end_id != tokenizer.library.eos_token_id:
        named = generation.eos_token_id
        known = named if isinstance(named, list) else [tokenizer.library.eos_token_id if named is None else named]
        generation.eos_token_id = list(dict.fromkeys([*known, tokenizer.end_id]))


def new_reward_model(source: str, *, seed: int, max_prompt_tokens: int | None = None) -> RewardModel:
    """A reward model started from a language model: its trunk, and a head with weights ~ N(0, 1/(d+1)), offset 0.

    The head's standard deviation 1/sqrt(d+1) is that of the code of Stiennon et al. 2020. `max_prompt_tokens`
    limits what it reads of a prompt and is kept in the config, so that it is queried as it was trained.
    """
    place = resolve_source(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the library draws what the language model has not: the head, a row for the pad id
        library, tokenizer = _with_scalar_head(place)
        _check_head(library, place)
        _check_vocabulary(library, tokenizer, place)
        _set_pad_outside_text(library, tokenizer)
    weight = library.score.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5)
    library.config.reward_offset = 0.0
    library.config.reward_max_prompt_tokens = max_prompt_tokens
    return RewardModel(library.eval(), tokenizer)


def _with_scalar_head(place: str) -> tuple[Any, Tokenizer]:
    """A language model's trunk in the library's class for scores, whose head is drawn at random."""
    from transformers import AutoModelForSequenceClassification

    if place.endswith(".gguf"):
        policy = _load_gguf(Path(place), (), 0.0)
        policy.library.config.num_labels = 1
        with _as_model_error(place, "a model that can carry a scalar head"):
            library = AutoModelForSequenceClassification.from_config(policy.library.config)
        library.base_model.load_state_dict(policy.library.base_model.state_dict())
        return library.to(torch.float32), policy.tokenizer
    check_folder(place)
    tokenizer = load_tokenizer(place)
    config = _load_config(place, 0.0)
    config.num_labels = 1
    what = "a model that can carry a scalar head"
    return _load_whole(AutoModelForSequenceClassification, place, config, what, new=("score.weight",)), tokenizer


def load_reward_model(source: str) -> RewardModel:
    """Load a reward model that `save_reward_model` wrote, or any sequence classifier with one label."""
    from transformers import AutoModelForSequenceClassification

    place = resolve_source(source)
    check_folder(place)
    config = _load_config(place, 0.0)
    language_model = _architecture(config, LANGUAGE_MODELS)
    if language_model:
        raise ModelError(
            f"{place} is a language model ({language_model}), not a reward model; are two options swapped, such as "
            "--init and --reward?"
        )
    if getattr(config, "reward_max_tokens", None) is not None:
        raise ModelError(
            f"{place} was trained with max_tokens, which is max_prompt_tokens now and cuts otherwise; train it again."
        )
    if config.num_labels != 1:
        raise ModelError(f"{place} has {config.num_labels} labels; a reward model has one (num_labels=1).")
    library = _load_whole(AutoModelForSequenceClassification, place, config, "a reward model")
    _check_head(library, place)
    tokenizer = load_tokenizer(place)
    _check_vocabulary(library, tokenizer, place)
    return RewardModel(library.eval(), tokenizer)


def save_reward_model(folder: Path, model: RewardModel) -> None:
    """Write a reward model with its offset in the config."""
    model.library.config.reward_offset = float(model.offset)
    _save_library(folder, model.library, model.tokenizer, {})


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state so that a kill at any moment leaves the old one or the new one, whole.

    Several processes write a folder beside `path`, named after the step, each its parts of the state.
    """
    _forget(list(path.parent.glob(f"{path.stem}-*{parallel.WHOLE}")))  # all have taken a step since they read it
    if processes.several():
        folder = path.with_name(f"{path.stem}-{state['step']:08d}")
        parallel.save_parts(folder, state)
        sync_folder(folder)
        sync_folder(folder.parent)  # before the state goes that this one replaces
        _forget(_replaced(path, folder))
        return
    with atomic_write(path, binary=True) as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # what a full disk is to torch, which covers the error of the system
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    _forget(_replaced(path, path))


def load_state(path: Path) -> dict[str, Any] | None:
    """The state written last by `save_state`, by however many processes, or None if there is none."""
    _forget(_torn(path))
    newest = parallel.from_first(_newest_state(path) if processes.is_first() else None)  # all go on from the same one
    if newest is None:
        return None
    if newest != path:
        return parallel.load_parts(newest)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=processes.several())
    assert isinstance(state, dict)
    return state


def _newest_state(path: Path) -> Path | None:
    """What was written last: `path`, or a folder beside it of several processes."""
    parts = _states_in_parts(path)
    if not parts or not path.exists():
        return parts[-1] if parts else path if path.exists() else None
    step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    return parts[-1] if step < _step_of(parts[-1]) else path


def _states_in_parts(path: Path) -> list[Path]:
    """The folders that several processes have written, oldest first; what a kill left of one has no `.metadata`."""
    return sorted(folder for folder in path.parent.glob(f"{path.stem}-*") if (folder / ".metadata").exists())


def _step_of(parts: Path) -> int:
    return int(parts.name.rpartition("-")[2])


def _torn(path: Path) -> list[Path]:
    """What a kill or a full disk has left of folders being written, and what was put together to be read."""
    return [entry for entry in path.parent.glob(f"{path.stem}-*") if not (entry / ".metadata").exists()]


def _replaced(path: Path, by: Path) -> list[Path]:
    """The states that one just written replaces."""
    return [entry for entry in (path, *path.parent.glob(f"{path.stem}-*")) if entry != by]


def _forget(states: Sequence[Path]) -> None:
    """Delete states; the first process does."""
    if not processes.is_first():
        return
    for old in states:
        if old.is_dir():
            (old / ".metadata").unlink(missing_ok=True)  # so that a kill in the middle leaves nothing to go on from
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` when the block ends well, and vanishes when it does not."""
    aside = folder.with_name(folder.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path in aside.rglob("*"):
        if path.is_file():
            _sync_file(path)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    sync_folder(folder.parent)


def _save_library(folder: Path, library: Any, tokenizer: Tokenizer, weights: Mapping[str, Tensor]) -> None:
    state = dict[str, Tensor]()
    for name, tensor in merged_state(library, weights).items():
        whole = parallel.whole(tensor)  # one at a time on every device, and all of them in the first process's memory
        if processes.is_first():
            state[name] = whole.cpu()
    if not processes.is_first():
        return
    with written_whole(folder) as aside, _quiet_library():
        try:
            library.save_pretrained(str(aside), state_dict=state)
        except SafetensorError as error:  # what a full disk is to the library
            raise OSError(f"{folder} cannot be written: {error}") from error
        tokenizer.save(aside)


def _load_gguf(path: Path, stop_texts: Sequence[str], residual_dropout: float) -> LanguageModel:
    """Load a GGUF file, dequantised, as an ordinary model (the library refuses to save one that it loaded so)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_gguf(path)
    options = {"gguf_file": path.name}
    with _quiet_library(), _as_model_error(str(path), GGUF_MODEL):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
        loaded = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **options)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _set_dropouts(config, residual_dropout)
    library = AutoModelForCausalLM.from_config(config).to(torch.float32)
    library.load_state_dict(loaded.state_dict())
    library.generation_config = loaded.generation_config
    wrapped = wrap_tokenizer(tokenizer, source=str(path), stop_texts=stop_texts)
    _check_vocabulary(library, wrapped, str(path))
    return LanguageModel(library.eval(), wrapped)


def _load_gguf_config(path: Path) -> Any:
    from transformers import AutoConfig

    with _quiet_library(), _as_model_error(str(path), GGUF_MODEL):
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def _load_whole(auto_class: Any, place: str, config: Any, what: str, *, new: Sequence[str] = ()) -> Any:
    """A library model whose weights, but for the `new` ones, are in the folder; the library would draw others."""
    with _quiet_library(), _as_model_error(place, what):
        library, report = auto_class.from_pretrained(
            place, config=config, dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(set(report["missing_keys"]) - set(new))
    if missing:
        raise ModelError(
            f"{place} is not {what}: it has no weights for {', '.join(missing[:3])}. "
            "Give the folder of a model that was trained as one."
        )
    return library


def _load_config(place: str, residual_dropout: float) -> Any:
    from transformers import AutoConfig

    with _quiet_library(), _as_model_error(place, "a model"):
        config = AutoConfig.from_pretrained(place)
    _set_dropouts(config, residual_dropout)
    return config


def _set_dropouts(config: Any, residual: float) -> None:
    """All other dropouts, whatever they are called, are off: in RL any breaks "ratio 1 at the first minibatch".

    So is the noise of a mixture's router (but PhiMoE's, which is a threshold in evaluation too), and what stands in a
    config within the config.
    """
    text = config.get_text_config()
    for part in (text, *(one for one in vars(text).values() if hasattr(one, "to_dict"))):
        for name, value in vars(part).items():
            is_rate = isinstance(value, float) or (type(value) is int and name.endswith(("drop", "dropout")))
            is_noise = "jitter" in name and getattr(config, "model_type", "") != "phimoe"
            if ("drop" in name or is_noise) and is_rate:
                setattr(part, name, type(value)(0))
    for name in _residual_dropouts(config):
        setattr(text, name, residual)


def _residual_dropouts(config: Any) -> list[str]:
    text = config.get_text_config()
    return [name for name in RESIDUAL_DROPOUT_FIELDS if hasattr(text, name)]


def _architecture(config: Any, endings: tuple[str, ...]) -> str | None:
    """The class that the model was saved as, if its name ends so."""
    return next((name for name in config.architectures or () if name.endswith(endings)), None)


def _check_vocabulary(library: Any, tokenizer: Tokenizer, place: str) -> None:
    rows = library.get_input_embeddings().weight.shape[0]
    if tokenizer.vocabulary > rows:
        raise ModelError(
            f"the tokenizer of {place} has {tokenizer.vocabulary} tokens, but the model's embedding has only {rows} "
            "rows; they do not belong together."
        )


def _check_head(library: Any, place: str) -> None:
    head = getattr(library, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(
            f"{type(library).__name__}, the library's classifier for {place}, has no linear head `score` without bias; "
            "reward models need one (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX and OPT have it)."
        )


def _set_pad_outside_text(library: Any, tokenizer: Tokenizer) -> None:
    text = tokenizer.library
    pad, occurring = text.pad_token_id, {*tokenizer.stop_ids, text.bos_token_id, text.unk_token_id}
    if pad is None or pad in occurring:
        pad = library.get_input_embeddings().weight.shape[0]
        library.resize_token_embeddings(pad + 1, mean_resizing=False)
    library.config.pad_token_id = pad
    library.config.get_text_config().pad_token_id = pad


@contextmanager
def _as_model_error(place: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, struct.error) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{place} cannot be loaded as {what}: {reason}") from error


@contextmanager
def _quiet_library() -> Iterator[None]:
    """The library reports a new head and prints bars; both are expected here."""
    from transformers.utils import logging as library_logging

    level, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if bars:
            library_logging.enable_progress_bar()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
