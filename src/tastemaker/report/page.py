"""Puts a run's story into the templates and writes OUT/report.html.

The page depends on nothing but the run folder: no clock, no randomness, so the same folder gives the same bytes. Every
text of the run is escaped by the templates; a content security policy forbids scripts and the network besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tastemaker import __version__
from tastemaker.files import atomic_write
from tastemaker.report import curves, sections, winners
from tastemaker.report.distance import distance
from tastemaker.report.families import Inks
from tastemaker.report.learned import learned
from tastemaker.report.reading import read_run
from tastemaker.report.run import Run
from tastemaker.report.svg import style_sheet
from tastemaker.report.words import capitalised, duration, memory, percent, percent_range, plain

REPORT = "report.html"
# The sections that a run has, by the names of their stories, and what they are made of.
WANTED = (
    ("who won", "winners", "comparisons in results.json"),
    ("claims", "claims", "claims in results.json"),
    ("models in numbers", "models", "models in results.json"),
    ("results by category", "categories", "by_category of the models in results.json"),
    ("agreement and reward model", "learned", "agreement in results.json and 5-reward/VARIANT/results.json"),
    ("training curves", "courses", "metrics.jsonl of the stages"),
    (
        "distance from the reference",
        "distance",
        "over_optimization, or kl and proxy_score of two models, in results.json",
    ),
    ("samples", "examples", "7-evaluation/samples.jsonl"),
    ("cost", "cost", "stages in results.json, or the manifests"),
    ("lineage", "origins", "manifest.json of the stages"),
)
# Those of an evaluation alone.
ALONE = (
    ("who won", "winners", "comparisons in results.json"),
    ("models in numbers", "models", "models in results.json"),
    ("samples", "examples", "responses.jsonl"),
)


def write_report(out: Path) -> Path:
    """Read the run folder `out`, write its report beside its results, and return where it is."""
    html = render(read_run(out))
    target = out / REPORT
    with atomic_write(target) as file:
        file.write(html)
    return target


def render(run: Run) -> str:
    """The whole page."""
    inks = Inks.for_models((model.name, model.kind) for model in run.results.models)
    story: dict[str, object] = {
        "headline": winners.headline(run, inks),
        "flow": None if run.results.judge else sections.flow(run),
        "winners": winners.winners(run, inks),
        "claims": sections.claim_rows(run.results.claims),
        "models": sections.model_table(run, inks),
        "categories": winners.category_panels(run.results.models, inks, baseline=run.setting.baseline),
        "learned": learned(run, inks),
        "courses": curves.courses(run, inks),
        "distance": distance(run, inks),
        "examples": sections.examples(run.samples, inks),
        "cost": sections.cost(run),
        "origins": sections.origins(run),
    }
    return (
        _environment()
        .get_template("report.html")
        .render(
            story,
            title=capitalised(plain(run.results.recipe)) or run.name,
            facts=_facts(run),
            judge=run.results.judge,
            versions=dict(run.results.versions) or _manifest_versions(run),
            missing=_missing(story, ALONE if run.results.judge else WANTED),
            tastemaker=__version__,
            style=_style(),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tastemaker.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "percent": percent, "percent_range": percent_range}
    return environment


@cache
def _style() -> Markup:
    """The style sheets, which are our own text and not the run's, so they are not escaped."""
    return Markup("\n").join(style_sheet(name) for name in ("chart.css", "style.css"))


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the run was, for the line above the headline."""
    results = run.results
    facts = [
        ("recipe", results.recipe),
        ("seed", "" if results.seed is None else str(results.seed)),
        ("started", _minute(results.started)),
        ("finished", "" if results.started else _minute(results.finished)),
        ("took", "" if results.seconds is None else duration(results.seconds)),
        ("peak memory", "" if results.peak_memory_mb is None else memory(results.peak_memory_mb)),
    ]
    return [(name, value) for name, value in facts if value]


def _minute(moment: str) -> str:
    return moment.replace("T", " ")[:16]


def _manifest_versions(run: Run) -> dict[str, str]:
    return next((dict(folder.manifest.libraries) for folder in reversed(run.folders) if folder.manifest), {})


def _missing(story: Mapping[str, object], wanted: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """What the run lacks, and where it would have come from."""
    return [(name, source) for name, key, source in wanted if not story[key]]
