"""The page: its frame, and what stands on it from top to bottom."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from expertdiff.files import write_text
from expertdiff.report import sections
from expertdiff.report.markup import Markup, joined, tag
from expertdiff.report.study import Study, read_study
from expertdiff.report.verdict import verdict


def write_report(study: Path) -> Path:
    """Writes ``<study>/report.html``: what a study compared, what came out, and what it cost.

    One file that needs no network: a verdict in words, the chain and its experts, distances and
    training costs, losses by interval, sample grids, and how every number was made. A study that is
    still running gets a report that says what is missing; run it again later.

    Args:
        study: the folder of a study, where ``study.json`` lies.

    Returns:
        The file.

    Raises:
        ValueError: `study` holds no study, or one of its files is damaged.
    """
    path = study / "report.html"
    write_text(path, _page(read_study(study)))
    return path


def _page(study: Study) -> str:
    return page(
        study.facts["name"],
        tag("p", verdict(study), class_="verdict"),
        sections.missing(study),
        sections.chain(study),
        sections.distances(study),
        sections.costs(study),
        sections.losses(study),
        sections.experts(study),
        sections.mixing(study),
        sections.grids(study),
        sections.measurements(study),
        sections.jobs(study),
    )


def page(title: str, *body: str) -> str:
    """A whole page that needs no network: its heading, `body`, and the versions that made it."""
    content = joined([tag("h1", title), *body, _versions()])
    name = tag("title", f"{title}: expertdiff report")
    return PAGE.format(title=name, style=STYLE, body=content)


def _versions() -> Markup:
    names = ("expertdiff", "torch", "lightning")
    text = ", ".join(f"{name} {_version(name)}" for name in names)
    return tag("footer", f"Written by {text}, Python {platform.python_version()}.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{title}
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --soft: #59636e;
  --line: #d1d9e0; --shade: #f6f8fa; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117;
  --soft: #9198a1; --line: #3d444d; --shade: #161b22; --warn: #3a2d0a; } }
* { box-sizing: border-box; }
body { max-width: 1180px; margin: 0 auto; padding: 24px; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 28px; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; }
.verdict { font-size: 18px; padding: 14px 18px; margin: 0; background: var(--shade);
  border-left: 4px solid var(--soft); }
.verdict p { margin: 0; }
.verdict p:not(:first-child) { font-size: 15px; margin-top: 14px; }
.verdict ul { font-size: 14px; margin: 4px 0 0; padding-left: 22px; }
.missing { margin-top: 16px; padding: 10px 18px; background: var(--warn);
  border: 1px solid var(--line); }
.missing p, .missing ul { margin: 0; }
.note, footer { color: var(--soft); font-size: 13.5px; max-width: 90ch; }
footer { margin-top: 40px; }
figure { margin: 0 0 12px; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; }
img { image-rendering: pixelated; max-width: 100%; height: auto; display: block; }
img.smooth { image-rendering: auto; }
.grids { display: flex; flex-wrap: wrap; gap: 16px; }
.table { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0;
  border-bottom: 1px solid var(--line); }
td { max-width: 52ch; overflow-wrap: break-word; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; white-space: nowrap; }
tr { break-inside: avoid; }
tr:has(.floor) { background: var(--shade); }
.scores table { font-size: 12.5px; }
.scores th, .scores td { padding: 4px; vertical-align: baseline; }
.scores td, .scores thead th + th { text-align: right; }
.scores small { display: block; font-size: 11px; color: var(--soft); white-space: nowrap; }
th i { display: inline-block; width: 10px; height: 10px; margin-right: 7px; border-radius: 2px;
  print-color-adjust: exact; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #444; --line: #bbb;
    --shade: #fff; --warn: #fff; }
  @page { size: A4; margin: 14mm; }
  body { padding: 0; font-size: 11px; }
  h1 { font-size: 20px; }
  h2 { font-size: 15px; margin-top: 22px; break-after: avoid; }
  .verdict { font-size: 13px; }
  .note, footer, table { font-size: 9.5px; }
  .table { overflow: visible; }
  th, td { padding-right: 8px; overflow-wrap: anywhere; }
  .grids { flex-wrap: nowrap; }
}
"""
