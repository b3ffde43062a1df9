"""Write figures of a finished run as SVG files: `python scripts/make_figures.py RUN NAME... --out docs/images`.

The names are those of `tastemaker.report.figure`: `over-optimisation` (or `over-optimisation-sweep`,
`over-optimisation-course`), `training-POLICY`, `wins` (or `wins-OPPONENT`). A file is called after its recipe and its
figure, such as `tiny-wins.svg`. Every number in it comes from the run's own files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tastemaker.errors import TastemakerError
from tastemaker.files import atomic_write
from tastemaker.report.figure import figure, standalone
from tastemaker.report.reading import read_run


def main() -> None:
    """Write the figures that the command line names."""
    parser = argparse.ArgumentParser(description="Write figures of a finished run as SVG files.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("names", nargs="+", metavar="NAME", help="over-optimisation, training-POLICY, wins")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the files")
    options = parser.parse_args()
    try:
        write(options.run, options.names, options.out)
    except TastemakerError as error:
        sys.exit(f"make_figures: {error}")


def write(folder: Path, names: list[str], out: Path) -> None:
    """Write the figures `names` of the run in `folder`."""
    run = read_run(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = out / f"{run.results.recipe or folder.name}-{name}.svg"
        text = standalone(figure(run, name))
        with atomic_write(target) as file:
            file.write(text)
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
