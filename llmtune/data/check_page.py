"""The page of `data check`: the verdict, every count, what was found, and the first rows."""

from __future__ import annotations

import html
from string import Template

from llmtune.data.check import CheckReport
from llmtune.data.findings import Finding, ShownRow
from llmtune.data.problems import shorten
from llmtune.data.report import DataReport

SHOWN_PLACES = 50
SHOWN_CHARACTERS = 600


def render_check_page(report: CheckReport) -> str:
    """Return the page: verdict, findings with their rows, and every count."""
    state = "ok" if report.is_ok else "bad"
    findings = "\n".join(_finding_html(finding) for finding in report.findings)
    splits = "\n".join(_split_html(split) for split in report.reports)
    counts = "".join(
        f"<tr><th>{name}</th><td>{html.escape(_join(values))}</td></tr>"
        for name, values in (
            ("roles", report.roles),
            ("messages in a row", report.turns),
            ("scripts", report.scripts),
        )
    )
    if report.system is not None:
        said = html.escape(report.system)
        counts += f"<tr><th>system prompt of chats without one</th><td>{said}</td></tr>"
    return Template(PAGE).substitute(
        state=state,
        verdict=html.escape(report.verdict),
        splits=splits,
        counts=counts,
        findings=findings or "<p>Nothing found.</p>",
        labels=_labels_html(report),
        rows="\n".join(_rows_html(split, rows) for split, rows in report.first_rows.items()),
    )


def _labels_html(report: CheckReport) -> str:
    """Return a table of the labels with their rows in each split; empty if there are none."""
    if not report.labels:
        return ""
    splits = list(report.labels)
    names = {name: None for counts in report.labels.values() for name in counts}
    largest = max(count for counts in report.labels.values() for count in counts.values())
    head = "".join(f"<th>{split}</th>" for split in splits)
    lines = []
    for name in names:
        counts = [report.labels[split].get(name, 0) for split in splits]
        cells = "".join(
            f'<td class="count"><i style="width: {6 * count / largest:.2f}rem"></i> {count:,}</td>'
            for count in counts
        )
        lines.append(f"<tr><th>{html.escape(shorten(name, 80))}</th>{cells}</tr>")
    return (
        f"<h2>Labels ({len(names):,})</h2>\n<table><tr><th></th>{head}</tr>\n"
        + "\n".join(lines)
        + "</table>"
    )


def _rows_html(split: str, rows: tuple[ShownRow, ...]) -> str:
    """Return the first rows of a split as a table; empty if it has none."""
    if not rows:
        return ""
    lines = "\n".join(
        f"<tr><td><code>{html.escape(f'{row.source}:{row.line}')}</code><br>"
        f"{row.num_tokens:,} tokens</td><td>{_turns_html(row)}</td></tr>"
        for row in rows
    )
    return (
        f"<h2>{split}: the first {len(rows):,} usable rows</h2>\n"
        f'<table class="rows">{lines}</table>'
    )


def _turns_html(row: ShownRow) -> str:
    return "".join(
        f"<p><b>{html.escape(role)}</b> {html.escape(_cut(said))}</p>" for role, said in row.turns
    )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def _finding_html(finding: Finding) -> str:
    places = "".join(
        f"<li><code>{html.escape(f'{place.source}:{place.line}')}</code> "
        f"{html.escape(place.detail)}</li>"
        for place in finding.places[:SHOWN_PLACES]
    )
    more = finding.count - min(len(finding.places), SHOWN_PLACES)
    places += f"<li>... and {more:,} more</li>" if more > 0 and finding.places else ""
    return (
        f'<details class="{finding.severity}" open><summary>{finding.severity}: '
        f"<b>{html.escape(finding.kind)}</b>: {html.escape(finding.message)}: {finding.count:,}"
        f"</summary><ul>{places}</ul></details>"
    )


def _split_html(report: DataReport) -> str:
    lines = "\n".join(html.escape(line) for line in report.lines())
    return f"<pre>{lines}</pre>"


def _join(counts: dict[str, int] | dict[int, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Data check</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --quiet: #6b6b6b;
  --error: #b3261e; --warning: #8a6100; --ok: #1e7a36; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eaeaea; --paper: #161616; --quiet: #9a9a9a; --error: #ff8a80;
    --warning: #f2c14e; --ok: #7bd88f; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } .ok { color: var(--ok) } .bad { color: var(--error) }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
th { text-align: left; padding-right: 1rem; font-weight: 600; vertical-align: top }
details { border-left: 4px solid var(--warning); padding: .2rem .8rem; margin: .6rem 0 }
details.error { border-color: var(--error) } li { overflow-wrap: anywhere }
h2 { font-size: 1.1rem } .rows td { vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-top: 1px solid var(--quiet) } .rows p { white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0 0 .3rem } .rows b { color: var(--quiet); font-weight: 600 }
.count i { display: inline-block; height: .7rem; background: var(--ok) }
</style></head><body>
<h1>Data check: <span class="$state">$verdict</span></h1>
$splits
<table>$counts</table>
$findings
$labels
$rows
</body></html>
"""
