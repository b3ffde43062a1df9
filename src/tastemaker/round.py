"""One round of the pipeline: which stage runs in which folder, on which inputs, and what it hands on.

    OUT/round-1/ 1-prompts  2-demonstrations  3-sft/VARIANT  4-comparisons  5-reward/VARIANT  6-policy/VARIANT
                 7-evaluation

A stage reads files of earlier folders and writes its own; nothing else passes between them. Each method below first
declares what its stage reads (`inputs`), which goes into the stage's manifest; its `work` loads that and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tastemaker import parallel
from tastemaker.artefacts import StageOutcome, claimed, library_versions, read_json, read_manifest, run_stage
from tastemaker.checkpoint import load_policy
from tastemaker.config import to_json
from tastemaker.console import say
from tastemaker.corpus import check_held_out
from tastemaker.errors import DataError
from tastemaker.files import read_demonstrations, read_prompts, write_json, write_records
from tastemaker.forecast import (
    Config,
    Forecast,
    Place,
    dpo_forecast,
    fitted,
    ppo_forecast,
    reward_forecast,
    sft_forecast,
    watched,
)
from tastemaker.inputs import Inputs
from tastemaker.kept import digest
from tastemaker.model import LanguageModel
from tastemaker.recipe import Recipe
from tastemaker.records import Demonstration, Prompt
from tastemaker.responses import DecodingConfig, leaving_room, sample_responses
from tastemaker.settings import DpoConfig, PpoConfig, RewardConfig, SftConfig
from tastemaker.stages import demonstrations, dpo, ppo, prompts, reward, sft
from tastemaker.store import LabelService, Store

Work = Callable[[Path], Mapping[str, Any] | None]


class Round:
    """A round in progress. Use as a context manager: it holds the label store open."""

    def __init__(self, recipe: Recipe, out: Path, *, number: int = 1, max_memory: int | None = None) -> None:
        self.recipe, self.out, self.max_memory = recipe, out, max_memory
        self.folder = out / f"round-{number}"
        self.number = number
        self.device = parallel.prepare(recipe.threads, tight=max_memory is not None)
        self.outcomes: dict[str, StageOutcome] = {}

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
        """Intake, filters and splits. Prompts that leave no room for a response are left out here, for all stages."""
        self._check_text()
        config, inputs = self.recipe.prompts, self.inputs()
        given = inputs.source("source", config.source, read_prompts, Prompt)
        new_tokens = max((decoding.max_new_tokens for decoding in self._decodings()), default=0)
        inputs.setting("new tokens", new_tokens)
        reader = inputs.reader() if new_tokens else None
        further = None
        if config.test_source is not None:
            further = inputs.source("test_source", config.test_source, read_prompts, Prompt)

        def work(folder: Path) -> None:
            raw = prompts.gathered(given.load(), None if further is None else further.load(), config)
            if reader is not None:
                raw = leaving_room(raw, reader.load(), new_tokens=new_tokens)
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

        self.run("1-prompts", config, inputs, work)
        self._check_validation()

    def _check_text(self) -> None:
        """Text that is trained on is no held-out text; said before anything is done, and not when PPO begins.

        In every run, since the recipe's text may have been changed after the intake, which does not read it.
        """
        recipe = self.recipe
        trained_on = any(one.pretraining_mix for one in recipe.sft.values())
        trained_on |= any(isinstance(one, PpoConfig) and one.ptx_coef > 0 for one in recipe.policy.values())
        if recipe.text is not None and trained_on:
            inputs = self.inputs()
            check_held_out(inputs.texts().load(), inputs.held_out_texts().load())

    def _check_validation(self) -> None:
        """What chooses among models or prefixes by validation prompts needs some, and may have been added since."""
        contestants = {} if self.recipe.evaluation is None else self.recipe.evaluation.contestants
        needy = [f"selection: {name}" for name in self.recipe.selection]
        needy += [f"evaluation.contestants.{name}: few_shot" for name, one in contestants.items() if one.few_shot]
        if needy and not self.inputs().prompts("validation").load():
            raise DataError(
                f"there are no validation prompts, and {', '.join(needy)} chooses by them; raise "
                "prompts.validation_share, or give prompts with split 'validation'."
            )

    def demonstrations(self) -> None:
        """Collect demonstrations for training and validation prompts, or read them."""
        config, inputs = self.recipe.demonstrations, self.inputs()
        work = self._collect_demonstrations(inputs) if config.source is None else self._read_demonstrations(inputs)
        self.run("2-demonstrations", config, inputs, work)

    def sft(self, variant: str) -> None:
        """Fine-tune the base on the demonstrations."""
        config, inputs = self.recipe.sft[variant], self.inputs()
        base, seed = inputs.model("base"), inputs.seed()
        train, validation = inputs.demonstrations("train"), inputs.demonstrations("validation")
        text = inputs.texts() if config.pretraining_mix else None

        @cache
        def forecast() -> Forecast[SftConfig]:
            return sft_forecast(base.load(), train.load(), [] if text is None else text.load(), Place.here())

        config = self.fitted(config, forecast)

        def work(folder: Path) -> None:
            sft.train_sft(
                folder,
                config=config,
                base=base.load(),
                demonstrations=train.load(),
                validation=validation.load(),
                pretraining=() if text is None else text.load(),
                device=self.device,
                seed=seed,
            )

        self.train(f"3-sft/{variant}", config, inputs, work, forecast)

    def comparisons(self) -> None:
        """Sample responses and have them ranked: for training, and on validation prompts by both groups of raters."""
        from tastemaker.round_comparisons import compare

        compare(self)

    def reward(self, variant: str) -> None:
        """Train a reward model on the rankings."""
        config, inputs = self.recipe.reward[variant], self.inputs()
        init, seed = inputs.start(config.init, selected=False), inputs.seed()
        train, validation = inputs.rankings("train"), inputs.rankings("validation")
        held_out, written = inputs.rankings("held-out"), inputs.demonstrations("train")
        # Of rankings that exist already, those of test prompts measure the accuracy.
        exist_already = self.recipe.comparisons is not None and self.recipe.comparisons.source is not None
        test = inputs.rankings("test") if exist_already else None

        @cache
        def forecast() -> Forecast[RewardConfig]:
            return reward_forecast(init.load(), train.load(), Place.here())

        config = self.fitted(config, forecast)

        def work(folder: Path) -> None:
            tested = [] if test is None else test.load()
            reward.train_reward_model(
                folder,
                config=config,
                init=init.load(),
                rankings=train.load(),
                validation=tested or validation.load(),
                held_out_raters=held_out.load(),
                demonstrations=written.load(),
                device=self.device,
                seed=seed,
            )

        self.train(f"5-reward/{variant}", config, inputs, work, forecast)

    def select(self, variant: str) -> None:
        """Choose an SFT variant's epoch by score on validation prompts."""
        judge, inputs = self.recipe.selection[variant], self.inputs()
        epochs, scorer = inputs.epochs(variant), inputs.scorer(judge)
        held_out, seed = inputs.prompts("validation"), inputs.seed()
        decoding = self._short_decoding()

        def work(folder: Path) -> None:
            asked, score, scores = held_out.load(), scorer.load(), {}
            for place in sorted(path for path in epochs.load().iterdir() if path.is_dir()):
                policy = self.load_model(str(place))
                groups = sample_responses(policy, asked, n=1, decoding=decoding, seed=seed, purpose="selection")
                marks = score(asked, [group[0] for group in groups])
                scores[place.name] = sum(marks) / len(marks)
            sft.select_epoch(folder, scores=scores, epochs=epochs.load())

        self.run(f"3-sft/{variant}-selected", {"by": judge, "decoding": to_json(decoding)}, inputs, work)

    def policy(self, variant: str) -> None:
        """Optimise a policy for the reward model, or directly on the rankings."""
        config, name = self.recipe.policy[variant], f"6-policy/{variant}"
        if isinstance(config, DpoConfig):
            self._dpo(name, config)
        else:
            self._ppo(name, config)

    def evaluation(self) -> None:
        """Blind evaluation of everybody against everybody asked for."""
        from tastemaker.round_evaluation import evaluate

        evaluate(self)

    def results(self) -> dict[str, Any]:
        """What `results.json` holds: the evaluation, the stages and their cost, the raters' agreement."""
        found: dict[str, Any] = {"comparisons": [], "models": {}, "claims": []}
        if "7-evaluation" in self.outcomes:
            found = read_json(self.folder / "7-evaluation" / "results.json")
        return {
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **self._cost(),
            "versions": library_versions(),
            **found,
            "agreement": self._agreement(found.get("agreement")),
            "stages": [
                {"name": name, "seconds": round(outcome.seconds, 1), "skipped": outcome.skipped}
                for name, outcome in self.outcomes.items()
            ],
        }

    def _agreement(self, of_judges: dict[str, Any] | None) -> dict[str, Any]:
        """Of raters on the rankings of this round, and on the comparisons of its evaluation."""
        raters = self.folder / "4-comparisons" / "raters.json"
        on_rankings: dict[str, Any] = {}
        if "4-comparisons" in self.outcomes and raters.exists():
            on_rankings = read_json(raters)
        return on_rankings | ({"evaluation": of_judges} if of_judges else {})

    def _cost(self) -> dict[str, float]:
        """Of all stages together; one that was up to date counts with what it took when it ran."""
        manifests = [manifest for one in self.outcomes.values() if (manifest := read_manifest(one.folder)) is not None]
        return {
            "seconds": round(sum(float(manifest["seconds"]) for manifest in manifests), 1),
            "peak_memory_mb": max((float(manifest["peak_memory_mb"]) for manifest in manifests), default=0.0),
        }

    # What the stages share.

    def inputs(self) -> Inputs:
        """The inputs of a stage, to be declared."""
        return Inputs(self.recipe, self.folder, self.device)

    def run(self, name: str, config: Any, inputs: Inputs, work: Work, *, keep: str | None = None) -> None:
        say(f"{name}")
        folder = self.folder / name
        with claimed(folder, keep=keep):
            outcome = run_stage(folder, stage=name, config=config, inputs=inputs.known, work=work, keep=keep)
        say(f"  up to date ({outcome.seconds:.0f} s then)" if outcome.skipped else f"  done in {outcome.seconds:.0f} s")
        self.outcomes[name] = outcome
        parallel.give_back_memory()

    def fitted(self, config: Config, forecast: Callable[[], Forecast[Config]]) -> Config:
        """With micro-batches that keep within the limit of memory, where there is one."""
        return config if self.max_memory is None else fitted(config, forecast(), self.max_memory)

    def train(
        self, name: str, config: Config, inputs: Inputs, work: Work, forecast: Callable[[], Forecast[Config]]
    ) -> None:
        """Run a stage that trains, and watch its memory."""
        self.run(name, config, inputs, lambda folder: watched(partial(work, folder), forecast, config))

    def study(self, name: str, shape: Mapping[str, object]) -> str:
        """A study's name holds a fingerprint of what shapes its questions, so that other questions are another study.

        How many are asked is no part of it: more of the same join those that were answered.
        """
        return f"round-{self.number}/{name}/{digest(dict(shape), size=4)}"

    def load_model(self, source: str, stop_texts: tuple[str, ...] = ()) -> LanguageModel:
        return load_policy(source, stop_texts=stop_texts).to(self.device)

    def refuse_test_prompts(self, used: list[Prompt], test: list[Prompt], what: str) -> None:
        """Nor may a conversation be trained on that begins with one."""
        leaked = prompts.overlap(test, used)
        if leaked:
            raise DataError(f"{len(leaked)} test prompts also occur in the {what}, such as {leaked[0]}; remove them.")

    def _decodings(self) -> list[DecodingConfig]:
        """All ways in which this recipe's stages sample from descendants of its base."""
        recipe = self.recipe
        found = [policy.decoding for policy in recipe.policy.values() if isinstance(policy, PpoConfig)]
        if recipe.selection or (recipe.comparisons is not None and recipe.comparisons.source is None):
            found.append(self._short_decoding())
        return found + list(recipe.evaluation.decodings if recipe.evaluation is not None else ())

    def _short_decoding(self) -> DecodingConfig:
        """How responses are sampled where a stage has no setting of its own: as for comparisons."""
        return DecodingConfig() if self.recipe.comparisons is None else self.recipe.comparisons.decoding

    # Stages that go one of two ways.

    def _read_demonstrations(self, inputs: Inputs) -> Work:
        config = self.recipe.demonstrations
        assert config.source is not None
        given = inputs.source("source", config.source, read_demonstrations, Demonstration)
        personal_data = inputs.personal_data_filter()
        test, validation = inputs.prompts("test"), inputs.prompts("validation")

        def work(folder: Path) -> None:
            rows, count = given.load(), config.validation or 0
            held_out = rows[:count]
            reserved = [*(row.prompt for row in held_out), *validation.load()]
            train = personal_data.kept(prompts.apart(rows[count:], reserved))[: config.train]
            self.refuse_test_prompts([row.prompt for row in train], test.load(), "demonstrations")
            write_records(folder / "train.jsonl", train)
            write_records(folder / "validation.jsonl", held_out)

        return work

    def _collect_demonstrations(self, inputs: Inputs) -> Work:
        config, raters, guideline = self.recipe.demonstrations, inputs.raters(), inputs.guideline("training")
        splits = [
            ("train", config.train, inputs.prompts("train")),
            ("validation", config.validation, inputs.prompts("validation")),
        ]

        def work(folder: Path) -> None:
            collected = {}
            for split, count, asked in splits:
                shape = {"prompts": asked.fingerprint, "people": raters.fingerprint}
                shape["guideline"] = guideline.version
                study, panel = self.study(f"demonstrations/{split}", shape), raters.panel("training")
                prompts.say_shortfall(asked.load(), count, f"{split} prompts")
                collected[split] = demonstrations.collect_demonstrations(
                    self.service, asked.load()[:count], panel, study=study, guideline=guideline
                )
            for split, rows in collected.items():
                write_records(folder / f"{split}.jsonl", rows)

        return work

    def _ppo(self, name: str, config: PpoConfig) -> None:
        inputs = self.inputs()
        init, seed = inputs.start(config.init, selected=True), inputs.seed()
        asked, held_out = inputs.prompts("train"), inputs.held_out_texts()
        reward_model = inputs.model(f"reward/{config.reward}") if config.reward in self.recipe.reward else None
        text = inputs.texts() if config.ptx_coef else None

        @cache
        def forecast() -> Forecast[PpoConfig]:
            judge = None if reward_model is None else reward_model.load()
            return ppo_forecast(init.load(), judge, asked.load(), [] if text is None else text.load(), Place.here())

        config = self.fitted(config, forecast)
        scorer = inputs.scorer(config.reward, budget=config.microbatch_tokens)

        def work(folder: Path) -> None:
            ppo.train_ppo(
                folder,
                config=config,
                init=init.load(),
                reward=None if reward_model is None else reward_model.load(),
                scorer=scorer.load(),
                prompts=asked.load(),
                pretraining=() if text is None else text.load(),
                heldout_text=held_out.load(),
                device=self.device,
                seed=seed,
            )

        self.train(name, config, inputs, work, forecast)

    def _dpo(self, name: str, config: DpoConfig) -> None:
        inputs = self.inputs()
        init, seed = inputs.start(config.init, selected=True), inputs.seed()
        train, validation = inputs.rankings("train"), inputs.rankings("validation")

        @cache
        def forecast() -> Forecast[DpoConfig]:
            return dpo_forecast(init.load(), train.load(), Place.here())

        config = self.fitted(config, forecast)

        def work(folder: Path) -> None:
            dpo.train_dpo(
                folder,
                config=config,
                init=init.load(),
                rankings=train.load(),
                validation=validation.load(),
                device=self.device,
                seed=seed,
            )

        self.train(name, config, inputs, work, forecast)
