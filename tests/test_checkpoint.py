"""Models and states on disk: what the library makes of our folders, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from tests.models import (
    ARCHITECTURES,
    VOCABULARY,
    make_library,
    make_policy,
    make_tokenizer,
    random_sequences,
    save_model,
)
from tests.test_tokenizer import train_bpe
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tastemaker import parallel
from tastemaker.checkpoint import (
    _set_dropouts,
    has_residual_dropout,
    load_policy,
    load_reward_model,
    load_state,
    new_reward_model,
    save_policy,
    save_reward_model,
    save_state,
    written_whole,
)
from tastemaker.errors import ModelError
from tastemaker.model_places import resolve_source
from tastemaker.packing import pack

SEQUENCES = random_sequences([5, 2, 9])
every_architecture = pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))


def logits(library: Any, ids: list[int]) -> Tensor:
    found: Tensor = library(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found.detach()


# --- policies --------------------------------------------------------------------------------------------------------


@every_architecture
def test_a_saved_policy_is_an_ordinary_model(architecture: str, tmp_path: Path) -> None:
    policy = load_policy(str(save_model(tmp_path / "base", architecture)))
    assert policy.trunk.padded is False
    save_policy(tmp_path / "saved", policy)
    library = AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"))
    assert library.dtype == torch.float32
    torch.testing.assert_close(logits(library, SEQUENCES[2]), logits(policy.library, SEQUENCES[2]), rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert tokenizer.chat_template == policy.tokenizer.library.chat_template
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_half_precision_weights_are_trained_in_fp32(tmp_path: Path) -> None:
    library = make_library("llama").to(torch.bfloat16)
    library.save_pretrained(str(tmp_path))
    make_tokenizer().save_pretrained(str(tmp_path))
    policy = load_policy(str(tmp_path))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_other_weights_can_be_saved_in_their_place(tmp_path: Path) -> None:
    policy = load_policy(str(save_model(tmp_path / "base")))
    before = {name: tensor.clone() for name, tensor in policy.library.state_dict().items()}
    other = {name: p.detach() + 0.25 for name, p in policy.library.named_parameters() if "q_proj" in name}
    save_policy(tmp_path / "average", policy, weights=other)
    saved = load_policy(str(tmp_path / "average")).library.state_dict()
    for name, tensor in policy.library.state_dict().items():
        assert torch.equal(tensor, before[name]), "the policy itself was changed"
        assert torch.equal(saved[name], other.get(name, before[name])), name


@pytest.mark.parametrize(("residual", "expected"), [(0.0, 0.0), (0.2, 0.2)])
def test_only_residual_dropout_is_ever_on(residual: float, expected: float, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    policy = load_policy(str(folder), residual_dropout=residual)
    assert not policy.training
    found = {name: part.p for name, part in policy.library.named_modules() if isinstance(part, torch.nn.Dropout)}
    assert found
    for name, share in found.items():
        assert share == (expected if "resid" in name or "mlp" in name else 0.0), name


def test_rates_of_a_config_within_the_config_and_of_routers_are_off_too() -> None:
    config = AutoConfig.for_model("mpt", attn_config={"attn_pdrop": 1})
    config.router_jitter_noise = 0.3
    _set_dropouts(config, 0.0)
    assert (config.attn_config.attn_pdrop, config.router_jitter_noise, config.n_layers) == (0, 0.0, 24)


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    """The head is the embedding: one of them is written, and the model comes back tied."""
    policy = make_policy(tie_word_embeddings=True)
    save_policy(tmp_path, policy)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    library = load_policy(str(tmp_path)).library
    assert library.lm_head.weight is library.model.embed_tokens.weight
    assert torch.equal(library.lm_head.weight, policy.library.lm_head.weight)


def test_who_has_a_residual_dropout(tmp_path: Path) -> None:
    assert has_residual_dropout(str(save_model(tmp_path / "with", "gpt2")))
    assert not has_residual_dropout(str(save_model(tmp_path / "without", "llama")))
    load_policy(str(tmp_path / "without"), residual_dropout=0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "does not exist; give a model folder"),
        (lambda folder: _written(folder / "notes.txt"), "is a file; give a model folder"),
        (lambda folder: folder, "not a model folder: it has no config.json"),
        (lambda folder: folder / "missing.gguf", "does not exist; give the path of a GGUF file"),
    ],
)
def test_what_is_no_model_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_policy(str(make(tmp_path)))


def _written(path: Path) -> Path:
    path.write_text("notes")
    return path


def test_weights_the_library_would_invent_are_refused(tmp_path: Path) -> None:
    reward = new_reward_model(str(save_model(tmp_path / "base", tie_word_embeddings=False)), seed=0)
    save_reward_model(tmp_path / "reward", reward)
    for name in ("reward", "base"):  # neither says what it was saved as
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"architectures": None}
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # what num_labels = 1 looks like
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not a causal language model: it has no weights for lm_head"):
        load_policy(str(tmp_path / "reward"))
    with pytest.raises(ModelError, match="not a reward model: it has no weights for score"):
        load_reward_model(str(tmp_path / "base"))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, vocabulary=VOCABULARY - 1)
    with pytest.raises(ModelError, match="97 tokens, but the model's embedding has only 96 rows"):
        load_policy(str(tmp_path))


# --- sources ---------------------------------------------------------------------------------------------------------


def test_package_sources() -> None:
    assert resolve_source("org/name") == "org/name"
    path = Path(resolve_source("package:tastemaker.store/schema.py"))
    assert path.name == "schema.py"
    assert path.is_file()
    with pytest.raises(ModelError, match="'tastemaker_nothing', which is not installed"):
        resolve_source("package:tastemaker_nothing/model")
    with pytest.raises(ModelError, match="does not bring"):
        resolve_source("package:tastemaker/no-such-model")


def write_gguf(path: Path, library: Any, tokenizer: Any) -> None:
    """A Qwen2 model and a byte-level tokenizer as a GGUF file in fp32."""
    config, vocabulary = library.config, sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in library.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")) or name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_reward_model_starts_from_a_gguf_file_as_from_a_folder(tmp_path: Path) -> None:
    tokenizer = train_bpe()
    library = make_library("qwen2", vocabulary=len(tokenizer), tie_word_embeddings=False)
    write_gguf(tmp_path / "model.gguf", library, tokenizer)
    policy = load_policy(str(tmp_path / "model.gguf"), stop_texts=["<|endoftext|>"])
    save_policy(tmp_path / "folder", policy)
    found, expected = (new_reward_model(str(tmp_path / name), seed=3) for name in ("model.gguf", "folder"))
    packed = pack(random_sequences([5, 3, 7]))
    with torch.no_grad():
        torch.testing.assert_close(found.scores(packed), expected.scores(packed), rtol=0, atol=1e-6)
    save_reward_model(tmp_path / "saved", found)
    with torch.no_grad():
        again = load_reward_model(str(tmp_path / "saved")).scores(packed)
    torch.testing.assert_close(again, found.scores(packed), rtol=0, atol=1e-6)


def test_how_much_of_a_prompt_a_reward_model_reads_is_saved_with_it(tmp_path: Path) -> None:
    base = str(save_model(tmp_path / "base"))
    for limit in (None, 3):
        model = new_reward_model(base, seed=0, max_prompt_tokens=limit)
        save_reward_model(tmp_path / f"rm-{limit}", model)
        again = load_reward_model(str(tmp_path / f"rm-{limit}"))
        assert again.prompt_limit == (model.context if limit is None else 3)
    old = json.loads((tmp_path / "rm-3/config.json").read_text()) | {"reward_max_tokens": 256}
    (tmp_path / "rm-3/config.json").write_text(json.dumps(old))
    with pytest.raises(ModelError, match="trained with max_tokens, which is max_prompt_tokens now"):
        load_reward_model(str(tmp_path / "rm-3"))


def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path) -> None:
    tokenizer = train_bpe()
    library = make_library("qwen2", vocabulary=len(tokenizer), tie_word_embeddings=False)
    write_gguf(tmp_path / "model.gguf", library, tokenizer)
    policy = load_policy(str(tmp_path / "model.gguf"), stop_texts=["<|endoftext|>"])
    torch.testing.assert_close(logits(policy.library, [5, 60, 70]), logits(library, [5, 60, 70]), rtol=0, atol=1e-6)
    assert policy.tokenizer.stop_ids == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert policy.tokenizer.response_ids("the cat", finished=True) == [*tokenizer.encode("the cat"), 1]
    save_policy(tmp_path / "saved", policy)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = load_policy(str(tmp_path / "saved"))
    assert torch.equal(logits(again.library, [5, 60, 70]), logits(policy.library, [5, 60, 70]))


# --- reward models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "pad_is_eos"),
    [("llama", False), *((architecture, place % 2 == 1) for place, architecture in enumerate(sorted(ARCHITECTURES)))],
)
@torch.no_grad()
def test_the_library_reads_a_saved_reward_model_as_we_do(architecture: str, pad_is_eos: bool, tmp_path: Path) -> None:
    """Its logits, on a batch padded with the id its config names, are our scores before the offset."""
    base = save_model(tmp_path / "base", architecture, pad_is_eos=pad_is_eos)
    reward = new_reward_model(str(base), seed=3)
    reward.offset += 1.75
    save_reward_model(tmp_path / "saved", reward)
    library = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "saved"))
    pad = library.config.pad_token_id
    assert library.config.num_labels == 1
    assert (pad == VOCABULARY) is pad_is_eos  # a row of its own where the tokenizer's pad occurs in text
    # sequences that end in <eos>, are cut off, and hold <eos> inside
    sequences = [[5, 6, 7, 2], [8, 9], [5, 2, 2, 11, 12, 2]]
    longest = max(map(len, sequences))
    padded = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences])
    found = library(input_ids=padded, attention_mask=(padded != pad).long()).logits[:, 0]
    again = load_reward_model(str(tmp_path / "saved"))
    assert float(again.offset) == 1.75
    torch.testing.assert_close(found - 1.75, reward.scores(pack(sequences)), rtol=0, atol=1e-5)
    torch.testing.assert_close(again.scores(pack(sequences)), reward.scores(pack(sequences)), rtol=0, atol=1e-6)


def test_a_new_head_is_drawn_from_the_seed(tmp_path: Path) -> None:
    base = str(save_model(tmp_path, hidden_size=960, head_dim=8, pad_is_eos=True))
    torch.manual_seed(1)
    reward = new_reward_model(base, seed=5)
    weight = reward.library.score.weight.detach()
    # standard deviation 1 / sqrt(961); of 960 draws it is known to 2.3 %, and a tenth is four times that
    assert float(weight.std()) == pytest.approx(1 / 31, rel=0.1)
    assert abs(float(weight.mean())) < 4 / 31 / 960**0.5
    assert float(reward.offset) == 0
    torch.manual_seed(2)
    drawn = torch.random.get_rng_state()
    again = new_reward_model(base, seed=5)
    assert torch.equal(torch.random.get_rng_state(), drawn), "the caller's random numbers were used"
    for (name, one), two in zip(reward.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(new_reward_model(base, seed=6).library.score.weight, weight)


@every_architecture
def test_the_trunk_is_the_language_models(architecture: str, tmp_path: Path) -> None:
    base = str(save_model(tmp_path, architecture))
    reward, policy = new_reward_model(base, seed=0), load_policy(base)
    with torch.no_grad():
        found, expected = reward.trunk.hidden(pack(SEQUENCES)), policy.hidden(pack(SEQUENCES))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("architecture", "has_head"), [("bloom", True), ("bert", False)])
def test_models_without_a_scalar_head_are_refused(architecture: str, has_head: bool, tmp_path: Path) -> None:
    if has_head:
        base = save_model(tmp_path, architecture)
        assert new_reward_model(str(base), seed=0).trunk.padded
        return
    config = {"model_type": architecture, "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 6, "intermediate_size": 80}
    make_tokenizer().save_pretrained(str(tmp_path))
    classifier = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config, num_labels=1))
    classifier.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="no linear head `score`"):
        load_reward_model(str(tmp_path))


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a language model \(LlamaForCausalLM\), not a reward model"):
        load_reward_model(str(save_model(tmp_path)))


def test_a_reward_model_has_one_label(tmp_path: Path) -> None:
    config = json.loads((save_model(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ModelError, match="has 2 labels; a reward model has one"):
        load_reward_model(str(tmp_path))


# --- states and folders ----------------------------------------------------------------------------------------------


def test_a_state_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint" / "state.pt"
    assert load_state(path) is None
    save_state(path, {"step": 3, "weights": {"w": torch.arange(5.0)}})

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, killed)
            with pytest.raises(KeyboardInterrupt):
                save_state(path, {"step": 4})
        state = load_state(path)
        assert state is not None
        assert state["step"] == 3
        assert state["weights"]["w"].tolist() == [0, 1, 2, 3, 4]
    save_state(path, {"step": 4})
    assert load_state(path) == {"step": 4}
    assert [entry.name for entry in path.parent.iterdir()] == ["state.pt"]


def test_every_process_goes_on_from_the_state_that_the_first_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two, which still sees a file where the first saw none; or sees none where the first saw one."""
    path = tmp_path / "state.pt"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "from_first", lambda _: None)
    torch.save({"step": 3}, path)
    assert load_state(path) is None
    monkeypatch.setattr(parallel, "from_first", lambda _: tmp_path / "state-00000004")
    monkeypatch.setattr(parallel, "load_parts", lambda folder: {"folder": folder.name})
    assert load_state(path) == {"folder": "state-00000004"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what a handle is of")
def test_a_state_in_parts_is_on_the_disk_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its name, which the folder around it holds: after a power cut neither might be there."""
    path, fsync, old_stands = tmp_path / "state.pt", os.fsync, dict[str, bool]()
    save_state(path, {"step": 3})

    def noting(handle: int) -> None:
        old_stands[Path(f"/proc/self/fd/{handle}").readlink().name] = path.exists()
        fsync(handle)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "save_parts", lambda folder, _: folder.mkdir())
    monkeypatch.setattr(os, "fsync", noting)
    save_state(path, {"step": 4})
    assert old_stands == {"state-00000004": True, tmp_path.name: True}
    assert not path.exists()


def test_a_kill_while_an_old_state_is_deleted_leaves_nothing_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state-00000003").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / "state-00000003" / name).touch()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_state(tmp_path / "state.pt", {"step": 2})
    assert load_state(tmp_path / "state.pt") == {"step": 2}


def test_what_a_full_disk_left_of_a_state_in_parts_makes_room(tmp_path: Path) -> None:
    """A folder without its last file, and one put together of parts that was not read to the end."""
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})
    (tmp_path / "state-00000003").mkdir()
    (tmp_path / "state-00000003" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / f"state-00000002{parallel.WHOLE}").write_bytes(b"half")
    assert load_state(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_was_put_together_stays_until_the_next_state_is_written(tmp_path: Path) -> None:
    """Other machines have it mapped: for them what is deleted is gone."""
    path, folder = tmp_path / "state.pt", tmp_path / "state-00000003"
    parallel.save_parts(folder, {"step": 3, "weights": torch.arange(5.0)})
    state = load_state(path)
    assert state is not None
    assert state["weights"].tolist() == [0, 1, 2, 3, 4]
    assert {entry.name for entry in tmp_path.iterdir()} == {folder.name, folder.name + parallel.WHOLE}
    save_state(path, {"step": 4})
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 20 kB; the signal is what a full disk would not send."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_in_parts_that_finds_no_room_to_be_put_together_leaves_none_behind(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "state-00000003"
    parallel.save_parts(folder, {f"{number}": torch.ones(4000) for number in range(2)})
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match=f"^{folder} cannot be put together, for want of space perhaps"):
        load_state(tmp_path / "state.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def write(text: str, *, then: type[BaseException] | None = None) -> None:
        with written_whole(folder) as aside:
            (aside / "a").write_text(text)
            assert not (tmp_path / "model" / "new").exists()
            if then is not None:
                raise then

    write("first")
    with pytest.raises(KeyboardInterrupt):
        write("second", then=KeyboardInterrupt)
    assert (folder / "a").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    write("third")
    assert (folder / "a").read_text() == "third"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
