"""The report of a run: one self-contained HTML page that tells its story, from the prompts to who won.

    write_report(out) -> out/report.html

`reading` reads the run folder into the records of `run`; `winners`, `curves`, `distance` and `sections` make sentences,
tables and charts (`charts`, `notes`, `svg`) of them; `page` puts them into the templates, `figure` into SVG files that
stand alone. The page has no script and loads nothing. What the paper shows in sections 4.1 to 4.3 and appendix E is
here for the run at hand; what the run has not measured is named as missing rather than filled in.
"""

from __future__ import annotations

from tastemaker.report.page import write_report

__all__ = ["write_report"]
