"""Writes the figures of docs/performance.md from the results: `python -m benchmarks.bench.table [RESULTS]`.

Everything between the two marks of the page is made here, from benchmarks/results alone, and the picture beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench.cases import CASES, MEMORY_TARGET, MODELS, ROWS, START_TARGET, VLLM, Row
from benchmarks.bench.driver import FOREIGN, ROOT, tokens
from benchmarks.bench.results import Measured, Results, load, share_of_peak
from benchmarks.pages import put

RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/performance.md"
BEGIN, END = "<!-- made by benchmarks/bench/table.py from benchmarks/results -->", "<!-- end -->"
NONE = ""
APART = "†"  # marks a ratio of engines that did not take turns


def write(results: Results, page: Path) -> None:
    """Put the tables between the marks of a page."""
    put(page, BEGIN, END, render(results))


def render(results: Results) -> str:
    """All tables, as Markdown."""
    parts = [_machine(results)]
    for model in reversed(MODELS):
        if any(name == model for name, _ in results.cases):
            parts += [f"### {model}: {MODELS[model].about}", _speeds(results, model)]
            parts += [part for part in (_memory(results, model), _start(results, model), _vllm(results, model)) if part]
            parts += [_phases(results, model), _picture(results, model), _counts(results, model)]
    parts.append(_quiet(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def ratio(ours: Measured | None, other: Measured | None) -> float | None:
    """How many times faster ours is."""
    return None if ours is None or other is None else other.seconds / ours.seconds


def _machine(results: Results) -> str:
    """When and where each run was measured; of more runs than one, which cases are of which."""
    runs = [(about, places) for about, places in results.runs() if about]
    lines = []
    for place, (about, cases) in enumerate(runs):
        what = "" if place == 0 else f"{', '.join(f'{case} on {model}' for model, case in cases)}: "
        lines.append(
            f"{what}measured on {about['date']}, commit {about['commit']}: {about['processor']}, "
            f"{about['cores']} cores, {about['memory_gib']} GiB, {about['threads']} threads; "
            f"{_versions(results, cases)}.{_peaks(results, cases)}"
        )
    return "\n\n".join(line[0].upper() + line[1:] for line in lines)


def _versions(results: Results, cases: Sequence[tuple[str, str]]) -> str:
    """The versions of each side; of the peer those that differ by case are all named."""
    names = {"ours": "ours", "peer": "TRL", "vllm": "vLLM"}
    found: dict[str, dict[str, set[str]]] = {}
    for place in cases:
        for record in results.cases[place]["engines"].values():
            for package, version in record.get("versions", {}).items():
                found.setdefault(names[record["side"]], {}).setdefault(package, set()).add(version)
    sides = {
        side: ", ".join(f"{package} {' and '.join(sorted(versions))}" for package, versions in packages.items())
        for side, packages in found.items()
    }
    return "; ".join(f"{side}: {packages}" for side, packages in sides.items())


def _peaks(results: Results, cases: Sequence[tuple[str, str]]) -> str:
    """The GEMM peaks before the cases, from the least to the largest."""
    found: dict[str, list[float]] = {}
    for place in cases:
        for name, peak in results.cases[place]["about"].get("gemm", {}).items():
            found.setdefault(name, []).append(peak)
    if not found:
        return ""
    titles = {"fp32": "in fp32 as PyTorch comes", "fp32-onednn": "in fp32 through oneDNN", "bf16": "in bf16"}
    peaks = [
        f"{_range(min(found[name]), max(found[name]))} GFLOP/s {title}"
        for name, title in titles.items()
        if name in found
    ]
    return f" Matrix products of 2048 x 2048: {', '.join(peaks)}."


def _range(low: float, high: float) -> str:
    return f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"


def _speeds(results: Results, model: str) -> str:
    header = ["work", "ours, s", "tokens/s", "of GEMM peak", "TRL, s", "tokens/s", "ratio", "TRL switched, s", "ratio"]
    aims = model == "M"
    rows = []
    for row in ROWS:
        ours, peer = (results.engine(model, row.case, name) for name in (row.ours, row.peer))
        if CASES[row.case].task == "start" or ours is None:
            continue
        switched = None if row.switched is None else results.engine(model, row.case, row.switched)
        share = share_of_peak(results, model, row.case, ours)
        cells = [row.title, _seconds(ours), _rate(ours, ours), NONE if share is None else f"{share:.0%}"]
        cells += [_seconds(peer), _rate(peer, ours), _ratio(row, ours, row.peer, peer)]
        cells += [_seconds(switched), _ratio(row, ours, row.switched, switched)]
        rows.append(cells + ([_aim(row, ours, peer)] if aims else []))
    note = f"{APART} of engines that did not take turns with one another but followed one another, minutes apart."
    text = table([*header, "aim"] if aims else header, rows)
    return f"{text}\n\n{note}" if f"x{APART} |" in text else text


def _ratio(row: Row, ours: Measured, name: str | None, other: Measured | None) -> str:
    """The ratio of the medians, and the least and the largest ratio of a round's turns."""
    share = ratio(ours, other)
    if name is None or other is None or share is None:
        return NONE
    if not CASES[row.case].together(row.ours, name):
        return _times(share) + APART
    low, high = _of_rounds(ours, other)
    return _times(share) if _times(low) == _times(high) else f"{_times(share)} ({low:.1f} to {high:.1f})"


def _of_rounds(ours: Measured, other: Measured) -> tuple[float, float]:
    """The least and the largest ratio of two turns of the same round."""
    shares = [other.by_round[round_] / seconds for round_, seconds in ours.by_round.items() if round_ in other.by_round]
    return min(shares), max(shares)


def _memory(results: Results, model: str) -> str:
    """Peak memory of every engine."""
    rows = []
    for row in ROWS:
        names = (row.ours, row.peer, row.switched)
        ours, peer, switched = (None if name is None else results.engine(model, row.case, name) for name in names)
        if CASES[row.case].task == "start" or ours is None:
            continue
        share, aim = None if peer is None else ours.memory / peer.memory, NONE
        if share is not None and CASES[row.case].task == "ppo" and model == "M":
            aim = f"at most {MEMORY_TARGET}x" + ("" if share <= MEMORY_TARGET else ", missed")
        cells = [row.title, *(NONE if one is None else f"{one.memory:.1f}" for one in (ours, peer, switched))]
        rows.append([*cells, NONE if share is None else f"{share:.2f}x", aim])
    return table(["peak memory, GiB", "ours", "TRL", "TRL switched", "ours / TRL", "aim"], rows) if rows else ""


def _start(results: Results, model: str) -> str:
    ours, peer = results.engine(model, "start", "ours"), results.engine(model, "start", "peer")
    if ours is None:
        return ""
    met = "" if ours.seconds <= START_TARGET else " (missed)"
    beside = "" if peer is None else f"; TRL's trainer in a script: {peer.seconds:.1f} s"
    return (
        f"From the command `tastemaker sft` to the end of the first optimizer step: {ours.seconds:.1f} s, at most "
        f"{START_TARGET:g} s aimed at{met}{beside}."
    )


def _vllm(results: Results, model: str) -> str:
    """Rollouts beside vLLM, measured by themselves."""
    ours, vllm = (results.engine(model, "rollout-vllm", name) for name in ("ours-bf16", "vllm"))
    if ours is None or vllm is None:
        return ""
    share = ratio(ours, vllm)
    aim = "not to be behind is the aim" + ("" if share is None or share >= 1 else ": missed")
    return (
        f"The same rollout in bf16 by vLLM ({VLLM}, built for processors), in turns with ours: {_seconds(vllm)} s, "
        f"{_rate(vllm, ours)} tokens/s; ours {_seconds(ours)} s, {_rate(ours, ours)} tokens/s: "
        f"{_times(share, digits=2)}; {aim}."
    )


def _phases(results: Results, model: str) -> str:
    """Seconds by phase of a PPO iteration."""
    engines = {
        "ours": "ours",
        "ours, fp32": "ours-fp32",
        "ours, shared": "ours-shared",
        "TRL": "peer",
        "TRL switched": "peer-switched",
    }
    measured = [(title, results.engine(model, "ppo-uniform", name)) for title, name in engines.items()]
    shown = [(title, found) for title, found in measured if found is not None]
    names = list(dict.fromkeys(name for _, found in shown for name in found.phases))
    rows = [[name, *(_phase(found, name) for _, found in shown)] for name in names]
    return table(["a PPO iteration, uniform lengths, s", *(title for title, _ in shown)], rows) if shown else ""


def _picture(results: Results, model: str) -> str:
    """The picture that `benchmarks.bench.picture` draws, where it has something to show."""
    drawn = model == "M" and (results.engine(model, "ppo-uniform", "ours") is not None)
    return "![What a PPO iteration on M is spent on](images/performance-ppo.svg)" if drawn else ""


def _phase(measured: Measured, name: str) -> str:
    return f"{measured.phases[name]:.2f}" if name in measured.phases else NONE


def _counts(results: Results, model: str) -> str:
    """What a step of each engine did."""
    rows = []
    for case in CASES.values():
        for engine in case.engines:
            found = results.engine(model, case.name, engine.name)
            if found is None or not found.counts:
                continue
            steps = sorted({count for name, count in found.counts.items() if name.startswith("steps of")})
            shown = [found.counts.get(name) for name in ("processed", "sequences", "generated")]
            rows.append(
                [case.name, engine.name, f"{tokens(found.counts):,}"]
                + [NONE if count is None else f"{count:,}" for count in shown]
                + [" and ".join(map(str, steps))]
            )
    header = ["a step of", "by", "tokens", "as the model gets them", "sequences", "generated tokens"]
    header.append("steps of each optimizer")
    return "What was counted:\n\n" + table(header, rows) if rows else ""


def _quiet(results: Results) -> str:
    found = [
        (model, case, measured)
        for (model, case), content in results.cases.items()
        for name in content["engines"]
        if (measured := results.engine(model, case, name)) is not None
    ]
    if not found:
        return ""
    turns, disturbed = sum(one.turns for *_, one in found), sum(one.disturbed for *_, one in found)
    most, again = max(one.foreign for *_, one in found), sum(one.thrown_away for *_, one in found)
    return (
        f"Of {turns} turns {disturbed or 'none'} had more than {FOREIGN:.0%} of the processors taken by other "
        f"programs; the most that a turn had was {most:.0%}. {again or 'None'} had been thrown away because of it."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _seconds(measured: Measured | None) -> str:
    if measured is None:
        return NONE
    digits = 2 if measured.seconds < 10 else 1
    low, high = f"{measured.low:.{digits}f}", f"{measured.high:.{digits}f}"
    return f"{measured.seconds:.{digits}f}" + ("" if low == high else f" ({low} to {high})")


def _rate(measured: Measured | None, counted: Measured) -> str:
    """Tokens a second; the sequences are the same for all, and each is counted once, as ours goes through them."""
    return NONE if measured is None else f"{tokens(counted.counts) / measured.seconds:,.0f}"


def _times(value: float | None, *, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}f}x"


def _aim(row: Row, ours: Measured, peer: Measured | None) -> str:
    """The aim, and whether it is met: by the median alone where the rounds do not agree."""
    value = ratio(ours, peer)
    if row.target is None:
        return NONE
    if peer is None or value is None:
        return f"{row.target:g}x"
    low, high = _of_rounds(ours, peer) if CASES[row.case].together(row.ours, row.peer) else (value, value)
    by_median = " by the median" if low < row.target <= high else ""
    return f"{row.target:g}x, {'met' if value >= row.target else 'missed'}{by_median}"


def main() -> None:
    """Write the page and its picture."""
    from benchmarks.bench.picture import write_picture

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    results = load(folder)
    write(results, PAGE)
    write_picture(folder, results)


if __name__ == "__main__":
    main()
