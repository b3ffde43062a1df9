"""What a command that trains says besides its progress: warnings before it begins, and at its end what came out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tastemaker.artefacts import read_json
from tastemaker.console import say
from tastemaker.errors import ModelError
from tastemaker.halves import Part, in_part
from tastemaker.metrics import read_metrics
from tastemaker.records import Demonstration, Prompt, Ranking, Text

Record = Prompt | Demonstration | Ranking | Text

UNKNOWN_SHARE = 0.01  # of the tokens; less is a rare sign here and there
SAMPLE = 1000  # records, evenly spaced, tell the share well enough


def warn_of_unknown_tokens(model: str, given: Mapping[str, Sequence[Record]]) -> None:
    """Say which of the files (records by name) the model's tokenizer cannot represent: it would learn `<unk>`."""
    from tastemaker.checkpoint import load_reader

    try:
        tokenizer = load_reader(model).tokenizer
    except ModelError:  # whoever loads the whole model says it better
        return
    unknown = tokenizer.library.unk_token_id
    for name, records in given.items() if unknown is not None else ():
        texts = [text for record in records[:: 1 + len(records) // SAMPLE] for text in _texts(record)]
        ids = [token for text in texts for token in tokenizer.response_ids(text, finished=False)]
        share = ids.count(unknown) / max(1, len(ids))
        if share > UNKNOWN_SHARE:
            say(f"warning: {100 * share:.0f} % of the tokens of {name} are unknown to this tokenizer.")


def _texts(record: Record) -> list[str]:
    if isinstance(record, Text):
        return [record.text]
    prompt = record if isinstance(record, Prompt) else record.prompt
    texts = [message.content for message in prompt.messages]
    if isinstance(record, Demonstration):
        texts.append(record.response)
    if isinstance(record, Ranking):
        texts += [response.text for response in record.responses]
    return texts


def warn_of_leaks(
    rows: Sequence[Demonstration | Ranking], held_out: Sequence[Demonstration | Ranking], part: Part = "all"
) -> None:
    """Say where what is measured would be memory: prompts that are trained on too, rows that are marked as held out.

    What a conversation that is trained on begins with is trained on too, as it is in a recipe.
    """
    from tastemaker.stages.prompts import overlap

    trained = [row.prompt for row in rows if in_part(row.prompt, part)]
    both = overlap([row.prompt for row in held_out], trained)
    if both:
        say(
            f"warning: {len(both)} of {len(held_out)} held-out rows have a prompt that is trained on too. What is "
            "measured on them is memory; leave them out of one of the files."
        )
    warn_of_marked(trained)


def warn_of_marked(prompts: Sequence[Prompt]) -> None:
    """Say how many of the prompts that are trained on were set aside for something else."""
    marked = sum(prompt.about.split in ("validation", "test") for prompt in prompts)
    if marked:
        say(
            f"warning: of {len(prompts)} training rows {marked} have a 'split' of validation or test, and train all "
            "the same."
        )


def warn_of_dropout(model: str, arguments: Sequence[str], value: float) -> None:
    """Say that residual dropout has no effect, to somebody who has asked for it."""
    from tastemaker.checkpoint import has_residual_dropout

    asked = any(word.partition("=")[0].replace("_", "-") == "--residual-dropout" for word in arguments)
    with contextlib.suppress(ModelError):
        if asked and value and not has_residual_dropout(model):
            say(f"warning: {model} has no residual dropout; --residual-dropout {value:g} has no effect.")


def sft_result(out: Path) -> str:
    """Its loss after the first epoch and after the last; without held-out data that of the first and the last step."""
    rows = read_metrics(out / "metrics.jsonl")
    measured = [row["validation_loss"] for row in rows if "validation_loss" in row]
    what, losses = ("validation loss", measured) if measured else ("training loss", [row["loss"] for row in rows])
    return f"{what} {_course(losses)}; {out / 'model'}"


def reward_result(out: Path) -> str:
    """Its accuracy, with the interval."""
    results = read_json(out / "results.json")
    kind = "training pairs" if "on" in results else "held-out pairs"
    return f"{_accuracy(results)} {kind}; {out / 'model'}"


def dpo_result(out: Path) -> str:
    """The implicit reward's accuracy on held-out pairs; without any, its loss."""
    if (out / "results.json").exists():
        return f"{_accuracy(read_json(out / 'results.json'))} held-out pairs; {out / 'model'}"
    losses = [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
    return f"training loss {_course(losses)}; {out / 'model'}"


def ppo_result(out: Path) -> str:
    """The scores of the first and the last iteration, and what the last one's responses are like."""
    rows = read_metrics(out / "metrics.jsonl")
    last = rows[-1]
    return (
        f"score {_course([row['score'] for row in rows])}, KL {last['kl']:.1f} nats, "
        f"{100 * (1 - last['truncated_rate']):.0f} % of responses end; {out / 'model'}"
    )


def _course(values: Sequence[float]) -> str:
    return f"{values[0]:.2f} -> {values[-1]:.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _accuracy(results: Mapping[str, Any]) -> str:
    low, high = (f"{100 * bound:.0f}" for bound in results["ci95"])
    return f"accuracy {100 * results['accuracy']:.0f} % [{low}, {high}] on {results['n']}"
