"""One round of the pipeline: which stage runs in which folder, on which files, and what it hands on.

    OUT/round-1/ 1-prompts  2-demonstrations  3-sft/VARIANT  4-comparisons  5-reward/VARIANT  6-policy/VARIANT
                 7-evaluation

A stage reads files of earlier folders and writes its own; nothing else passes between them. Here the files are named,
hashed into the stage's manifest, loaded, and handed to the stage's function.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tastemaker import agreement, parallel, sources
from tastemaker.artefacts import (
    StageOutcome,
    hash_path,
    library_versions,
    peak_memory_mb,
    read_json,
    run_stage,
)
from tastemaker.checkpoint import load_policy, load_reward_model, model_source
from tastemaker.config import to_json
from tastemaker.console import say
from tastemaker.errors import ConfigError, DataError
from tastemaker.files import read_demonstrations, read_prompts, read_rankings, read_texts, write_json, write_records
from tastemaker.functions import load_function
from tastemaker.intervals import Estimate
from tastemaker.model import LanguageModel
from tastemaker.panel import Panel
from tastemaker.raters import SimulatedRater, calibrate_noise, noiseless_utilities
from tastemaker.recipe import Recipe
from tastemaker.records import Demonstration, Prompt, Ranking, Text, messages_hash, with_about
from tastemaker.responses import DecodingConfig, sample_responses
from tastemaker.scoring import FunctionScorer, ModelScorer, Scorer
from tastemaker.stages import comparisons, demonstrations, dpo, ppo, prompts, reward, sft
from tastemaker.stages.comparisons import Candidates
from tastemaker.stages.demonstrations import TRAINING_GUIDELINE
from tastemaker.store import LabelService, Store

Record = TypeVar("Record")

CALIBRATION_PROMPTS = 300  # on which the simulated raters' noise is set


class Round:
    """A round in progress. Use as a context manager: it holds the label store open."""

    def __init__(self, recipe: Recipe, out: Path, *, number: int = 1) -> None:
        self.recipe, self.out = recipe, out
        self.folder = out / f"round-{number}"
        self.number = number
        self.device = parallel.prepare(recipe.threads)
        self.outcomes: dict[str, StageOutcome] = {}
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        self.out.mkdir(parents=True, exist_ok=True)
        self.store = Store.open(self.recipe.database or self.out / "labels.db")
        self.service = LabelService(self.store)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.close()

    # The seven stages.

    def prompts(self) -> None:
        """Intake, filters and splits; pretraining text is read once here too."""
        config = self.recipe.prompts

        def work(folder: Path) -> None:
            raw = self._read(config.source, read_prompts, Prompt)
            if config.test_source is not None:
                further = self._read(config.test_source, read_prompts, Prompt)
                raw += [with_about(prompt, split="test") for prompt in further]
            if config.first_turn_only:
                raw = [prompts.first_turn(prompt) for prompt in raw]
            kept, report = prompts.take_in(raw, config)
            for split in ("train", "validation", "test"):
                write_records(folder / f"{split}.jsonl", [prompt for prompt in kept if prompt.about.split == split])
            write_json(folder / "report.json", to_json(report))
            leaked = prompts.overlap(
                [prompt for prompt in kept if prompt.about.split == "test"],
                [prompt for prompt in kept if prompt.about.split != "test"],
            )
            if leaked:
                raise DataError(f"{len(leaked)} test prompts also occur in training or validation: {leaked[:3]}.")
            say(report.summary())

        inputs = {
            "source": sources.fingerprint(config.source),
            "test_source": sources.fingerprint(config.test_source),
            "seed": self.seed,
        }
        self.run("1-prompts", config, inputs, work)

    def demonstrations(self) -> None:
        """Collect demonstrations for training and validation prompts, or read them."""
        config = self.recipe.demonstrations
        inputs = {
            "train": self.file("1-prompts/train.jsonl"),
            "validation": self.file("1-prompts/validation.jsonl"),
            "source": sources.fingerprint(config.source),
            "people": self.people,
        }

        def work(folder: Path) -> None:
            if config.source is not None:
                rows = self._read(config.source, read_demonstrations, Demonstration)
                held_out = rows[: config.validation or 0]
                rows = rows[len(held_out) :][: config.train]
                self._refuse_test_prompts([row.prompt for row in rows], "demonstrations")
            else:
                rows, held_out = (
                    demonstrations.collect_demonstrations(
                        self.service,
                        self.split(split)[:count],
                        self.panel("training"),
                        study=self.study("demonstrations", split, inputs),
                    )
                    for split, count in (("train", config.train), ("validation", config.validation))
                )
            write_records(folder / "train.jsonl", rows)
            write_records(folder / "validation.jsonl", held_out)

        self.run("2-demonstrations", config, inputs, work)

    def sft(self, variant: str) -> None:
        """Fine-tune the base on the demonstrations."""
        config, base = self.recipe.sft[variant], self.recipe.base
        inputs: dict[str, Path | str] = {
            "base": model_source(base.model),
            "demonstrations": self.file("2-demonstrations/train.jsonl"),
            "seed": self.seed,
        }

        def work(folder: Path) -> None:
            sft.train_sft(
                folder,
                config=config,
                base=base.model,
                demonstrations=read_demonstrations(self.file("2-demonstrations/train.jsonl")),
                validation=_read_if_any(self.file("2-demonstrations/validation.jsonl"), read_demonstrations),
                pretraining=self._text if config.pretraining_mix else (),
                device=self.device,
                seed=self.recipe.seed,
            )

        self.run(f"3-sft/{variant}", config, inputs, work)

    def comparisons(self) -> None:
        """Sample responses and have them ranked: for training, and on validation prompts by both groups of raters."""
        config = self.recipe.comparisons
        assert config is not None
        inputs: dict[str, Path | str] = {
            "train": self.file("1-prompts/train.jsonl"),
            "validation": self.file("1-prompts/validation.jsonl"),
            "source": sources.fingerprint(config.source),
            "people": self.people,
            "seed": self.seed,
        }
        for source in config.sources:
            inputs[source] = self.model_folder(source, selected=False)

        def work(folder: Path) -> None:
            if config.source is not None:
                rows = self._read(config.source, read_rankings, Ranking)
                self._write_ready_rankings(folder, rows)
            else:
                self._collect_rankings(folder, inputs)

        self.run("4-comparisons", config, inputs, work)

    def reward(self, variant: str) -> None:
        """Train a reward model on the rankings."""
        config = self.recipe.reward[variant]
        init = self._folder(f"3-sft/{config.init}") / "model"
        comparisons_folder = self._folder("4-comparisons")
        names = ["train", "validation", "held-out"]
        if self.recipe.comparisons is not None and self.recipe.comparisons.source is not None:
            names.append("test")  # rankings that exist already: those of test prompts measure the accuracy
        inputs: dict[str, Path | str] = {name: comparisons_folder / f"{name}.jsonl" for name in names}
        inputs |= {"init": init, "demonstrations": self.file("2-demonstrations/train.jsonl"), "seed": self.seed}

        def work(folder: Path) -> None:
            rows = {name: _read_if_any(comparisons_folder / f"{name}.jsonl", read_rankings) for name in names}
            reward.train_reward_model(
                folder,
                config=config,
                init=str(init),
                rankings=rows["train"],
                validation=rows.get("test") or rows["validation"],
                held_out_raters=rows["held-out"],
                demonstrations=read_demonstrations(self.file("2-demonstrations/train.jsonl")),
                device=self.device,
                seed=self.recipe.seed,
            )

        self.run(f"5-reward/{variant}", config, inputs, work)

    def select(self, variant: str) -> None:
        """Choose an SFT variant's epoch by reward score on validation prompts."""
        judge = self.recipe.selection[variant]
        epochs = self._folder(f"3-sft/{variant}") / "epochs"
        inputs: dict[str, Path | str] = {
            "epochs": epochs,
            "reward": self.model_folder(f"reward/{judge}"),
            "prompts": self.file("1-prompts/validation.jsonl"),
            "seed": self.seed,
        }
        decoding = self._short_decoding()

        def work(folder: Path) -> None:
            scorer, held_out = self.scorer(judge), self.split("validation")
            scores = {}
            for place in sorted(path for path in epochs.iterdir() if path.is_dir()):
                policy = self.load_model(str(place))
                groups = sample_responses(
                    policy, held_out, n=1, decoding=decoding, seed=self.recipe.seed, purpose="selection"
                )
                marks = scorer(held_out, [group[0] for group in groups])
                scores[place.name] = sum(marks) / len(marks)
            sft.select_epoch(folder, scores=scores, epochs=epochs)

        self.run(f"3-sft/{variant}-selected", {"by": judge}, inputs, work)

    def policy(self, variant: str) -> None:
        """Optimise a policy for the reward model, or directly on the rankings."""
        config = self.recipe.policy[variant]
        init = self._folder(f"3-sft/{config.init}") / "model"
        inputs: dict[str, Path | str] = {"init": init, "seed": self.seed}
        if isinstance(config, dpo.DpoConfig):
            inputs["rankings"] = self.file("4-comparisons/train.jsonl")
            work = self._dpo_work(config, init)
        else:
            inputs["prompts"] = self.file("1-prompts/train.jsonl")
            inputs["reward"] = self._reward_folder(config.reward) or config.reward
            work = self._ppo_work(config, init)
        self.run(f"6-policy/{variant}", config, inputs, work)

    def evaluation(self) -> None:
        """Blind evaluation of everybody against everybody asked for."""
        from tastemaker.round_evaluation import evaluate

        evaluate(self)

    def results(self) -> dict[str, Any]:
        """What `results.json` holds: the evaluation, the stages and their cost, the raters' agreement."""
        raters = self._folder("4-comparisons") / "raters.json"
        evaluated = self._folder("7-evaluation") / "results.json"
        found = read_json(evaluated) if evaluated.exists() else {"comparisons": [], "models": {}, "claims": []}
        return {
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.began, 1),
            "peak_memory_mb": peak_memory_mb(),
            "versions": library_versions(),
            **found,
            "agreement": read_json(raters) if raters.exists() else {},
            "stages": [
                {"name": name, "seconds": round(outcome.seconds, 1), "skipped": outcome.skipped}
                for name, outcome in self.outcomes.items()
            ],
        }

    # What the stages share.

    def run(
        self, name: str, config: Any, inputs: Mapping[str, Path | str], work: Callable[[Path], None]
    ) -> StageOutcome:
        say(f"{name}")
        outcome = run_stage(self.folder / name, stage=name, config=config, inputs=inputs, work=work)
        say(f"  up to date ({outcome.seconds:.0f} s then)" if outcome.skipped else f"  done in {outcome.seconds:.0f} s")
        self.outcomes[name] = outcome
        return outcome

    @property
    def seed(self) -> str:
        return str(self.recipe.seed)

    @property
    def people(self) -> str:
        return json.dumps(to_json(self.recipe.simulation)) if self.recipe.raters == "simulated" else "people"

    def _folder(self, name: str) -> Path:
        return self.folder / name

    def file(self, name: str) -> Path:
        return self.folder / name

    def study(self, stage: str, part: str, inputs: Mapping[str, Path | str]) -> str:
        """A study's name holds a fingerprint of its inputs: changed inputs ask new questions."""
        known = {name: hash_path(value) if isinstance(value, Path) else value for name, value in inputs.items()}
        digest = hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=4).hexdigest()
        return f"round-{self.number}/{stage}/{part}/{digest}"

    def split(self, split: str) -> list[Prompt]:
        return _read_if_any(self.file(f"1-prompts/{split}.jsonl"), read_prompts)

    @cached_property
    def _text(self) -> list[Text]:
        if self.recipe.text is None:
            raise ConfigError("a pretraining mix needs text; give a [text] section with 'source' and 'held_out'.")
        rows = self._read(self.recipe.text.source, read_texts, Text)
        return rows[: self.recipe.text.documents]

    @cached_property
    def held_out_text(self) -> list[Text]:
        """Pretraining text that nothing is trained on."""
        if self.recipe.text is None:
            return []
        rows = self._read(self.recipe.text.held_out, read_texts, Text)
        return rows[: self.recipe.text.held_out_documents]

    def _short_decoding(self) -> DecodingConfig:
        """How responses are sampled where a stage has no setting of its own: as for comparisons."""
        return DecodingConfig() if self.recipe.comparisons is None else self.recipe.comparisons.decoding

    def load_model(self, source: str, stop_texts: tuple[str, ...] = ()) -> LanguageModel:
        return load_policy(source, stop_texts=stop_texts).to(self.device)

    def model_folder(self, name: str, *, selected: bool = True) -> Path:
        """The folder of a variant's model: "sft/NAME", "reward/NAME", "policy/NAME", "policy/NAME:ema".

        "policy/NAME:40" is the model kept after iteration 40 (`keep_every`).
        """
        kind, _, variant = name.partition("/")
        variant, _, which = variant.partition(":")
        places = {"sft": "3-sft", "reward": "5-reward", "policy": "6-policy"}
        if kind not in places:
            raise ConfigError(f"{name!r} names no variant; write sft/NAME, reward/NAME or policy/NAME.")
        if kind == "sft" and selected and variant in self.recipe.selection:
            variant = f"{variant}-selected"
        folder = self._folder(f"{places[kind]}/{variant}")
        if which.isdigit():
            return folder / "iterations" / f"{int(which):04d}"
        return folder / (f"model-{which}" if which else "model")

    def _reward_folder(self, name: str) -> Path | None:
        return self.model_folder(f"reward/{name}") if name in self.recipe.reward else None

    def scorer(self, name: str, *, budget: int = 16384) -> Scorer:
        folder = self._reward_folder(name)
        if folder is None:
            return FunctionScorer(load_function(name), name=name)
        precision = self.recipe.reward[name].optimizer.precision
        return ModelScorer(load_reward_model(str(folder)).to(self.device), budget=budget, precision=precision)

    def panel(self, group: str, *, noise: float = 0.0) -> Panel:
        """The raters of a group, training or held-out: people, or simulated ones with that noise."""
        simulation = self.recipe.simulation
        if self.recipe.raters == "people" or simulation is None:
            return Panel(group=group, address=self.recipe.address)
        count = simulation.training_raters if group == "training" else simulation.held_out_raters
        profiles = load_function(simulation.raters)(group, count, self.recipe.seed)
        hooks = {
            name: None if path is None else load_function(path)
            for name, path in (("write", simulation.write), ("latent_flags", simulation.flags))
        }
        features = load_function(simulation.features)
        raters = tuple(
            SimulatedRater(replace(profile, noise=noise), self.recipe.seed, features, **hooks) for profile in profiles
        )
        return Panel(group=group, address="", simulated=raters)

    def _read(self, source: str, read: Callable[..., list[Record]], kind: type[Record]) -> list[Record]:
        """Records of a source; rows of public data sets that nobody can use are left out, and said to be."""
        return sources.load_reporting(source, read, kind, seed=self.recipe.seed)

    def _refuse_test_prompts(self, used: list[Prompt], what: str) -> None:
        leaked = prompts.overlap(self.split("test"), used)
        if leaked:
            raise DataError(f"{len(leaked)} test prompts also occur in the {what}, such as {leaked[0]}; remove them.")

    def _write_ready_rankings(self, folder: Path, rows: list[Ranking]) -> None:
        """Rankings that exist already go where their first turn went: training, validation, test (measured on only).

        By the first turn, because a conversation that shares it with a test prompt must not be trained on.
        """
        opening = prompts.first_turn
        split_of = {
            messages_hash(opening(prompt).messages): split
            for split in ("train", "validation", "test")
            for prompt in self.split(split)
        }
        placed = [(split_of.get(messages_hash(opening(row.prompt).messages)), row) for row in rows]
        for split in ("train", "validation", "test"):
            write_records(folder / f"{split}.jsonl", [row for where, row in placed if where == split])
        say("  " + ", ".join(f"{sum(w == s for w, _ in placed)} {s}" for s in ("train", "validation", "test")))
        write_records(folder / "held-out.jsonl", [])

    def _collect_rankings(self, folder: Path, inputs: Mapping[str, Path | str]) -> None:
        config = self.recipe.comparisons
        assert config is not None
        policies = {
            source: self.load_model(str(self.model_folder(source, selected=False))) for source in config.sources
        }
        drawn = {
            split: comparisons.sample_candidates(policies, self.split(split)[:count], config, seed=self.recipe.seed)
            for split, count in (("train", config.train), ("validation", config.validation))
        }
        noise = self._noise(drawn["train"])
        parts = (
            ("train", "train", "training", config.overlap),
            ("validation", "validation", "training", config.validation_overlap),
            ("held-out", "validation", "held-out", config.validation_overlap),
        )
        collected = {}
        for name, split, group, overlap in parts:
            collected[name] = comparisons.collect_rankings(
                self.service,
                drawn[split],
                self.panel(group, noise=noise),
                study=self.study("comparisons", name, inputs),
                guideline=TRAINING_GUIDELINE,
                overlap=overlap,
            )
            write_records(folder / f"{name}.jsonl", collected[name])
        write_json(
            folder / "raters.json",
            {
                "noise": noise if self.recipe.raters == "simulated" else None,
                "training": _agreement(collected["validation"]),
                "held_out": _agreement(collected["held-out"]),
            },
        )

    def _noise(self, drawn: list[Candidates]) -> float:
        """The noise at which simulated training raters agree as often as the recipe says."""
        simulation = self.recipe.simulation
        if self.recipe.raters == "people" or simulation is None:
            return 0.0
        panel = self.panel("training")
        chosen = [(candidates.prompt, candidates.responses) for candidates in drawn[:CALIBRATION_PROMPTS]]
        lapse = panel.simulated[0].profile.lapse
        return calibrate_noise(noiseless_utilities(panel.simulated, chosen), target=simulation.agreement, lapse=lapse)

    def raters_noise(self) -> float:
        """The simulated raters' noise, as it was set when the comparisons were collected."""
        path = self.file("4-comparisons/raters.json")
        return float(read_json(path)["noise"] or 0.0) if path.exists() else 0.0

    def _ppo_work(self, config: ppo.PpoConfig, init: Path) -> Callable[[Path], None]:
        def work(folder: Path) -> None:
            reward_folder = self._reward_folder(config.reward)
            ppo.train_ppo(
                folder,
                config=config,
                init=str(init),
                reward=None if reward_folder is None else str(reward_folder),
                scorer=self.scorer(config.reward, budget=config.microbatch_tokens),
                prompts=self.split("train"),
                pretraining=self._text if config.ptx_coef else (),
                heldout_text=self.held_out_text,
                device=self.device,
                seed=self.recipe.seed,
            )

        return work

    def _dpo_work(self, config: dpo.DpoConfig, init: Path) -> Callable[[Path], None]:
        def work(folder: Path) -> None:
            dpo.train_dpo(
                folder,
                config=config,
                init=str(init),
                rankings=read_rankings(self.file("4-comparisons/train.jsonl")),
                validation=_read_if_any(self.file("4-comparisons/validation.jsonl"), read_rankings),
                device=self.device,
                seed=self.recipe.seed,
            )

        return work


def _read_if_any(path: Path, read: Callable[[Path], list[Any]]) -> list[Any]:
    """The records of one of our own files, which may be empty."""
    return read(path) if path.exists() and path.stat().st_size else []


def _agreement(rankings: list[Ranking]) -> dict[str, Any]:
    measured = agreement.ranking_agreement(rankings)
    return {
        name: value.to_json() if isinstance(value, Estimate) else {"undefined": value.reason}
        for name, value in (
            ("ties_excluded", measured.ties_excluded),
            ("tie_is_a_class", measured.tie_is_a_class),
            ("tie_is_half", measured.tie_is_half),
        )
    }
