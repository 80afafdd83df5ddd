"""A table's frame as text for readers: Markdown, LaTeX and HTML, from the same cells."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from nucseg.outcomes import signed

STYLE = """
table.nucseg { border-collapse: collapse; font: 14px/1.4 sans-serif; font-variant-numeric: tabular-nums; }
table.nucseg caption { text-align: left; font-weight: bold; padding: 0.5em 0; }
table.nucseg th, table.nucseg td { padding: 0.2em 0.7em; text-align: right; white-space: nowrap; }
table.nucseg th:first-child, table.nucseg td:first-child { text-align: left; }
table.nucseg thead th { border-top: 2px solid; border-bottom: 1px solid; vertical-align: bottom; white-space: normal; }
table.nucseg tbody tr:last-child td { border-bottom: 2px solid; }
table.nucseg td.not-run { font-style: italic; opacity: 0.7; }
p.nucseg { font: 13px/1.4 sans-serif; max-width: 75em; margin: 0.3em 0; }
"""
# For machines: in the CSV, not on the page, or there in another column's cells.
HIDDEN = {"status", "id", "compared with", "CI low", "CI high", "seeds CI low", "seeds CI high"}


class Cell(NamedTuple):
    """One cell: its text, and ``"best"``, ``"second"``, ``"not-run"`` or nothing."""

    text: str
    mark: str = ""


def cells(frame: pd.DataFrame) -> tuple[list[str], list[list[Cell]]]:
    """Return the heading and the cells of a table, numbers rounded, mean and spread in one cell."""
    frame = frame.dropna(axis="columns", how="all") if len(frame) else frame
    columns = [name for name in frame if not _joined(name, frame)]
    first = _first_of_ours(columns, "ours ")
    owners = {name: _first_of_ours(columns, f"ours {name[:-7]} ") for name in frame if name.endswith(" status")}
    header = [_heading(name) for name in columns]
    silent = first is None and "status" in frame  # nothing was run: say so all the same
    if silent:
        header.insert(1, "ours")
    body = []
    for _, line in frame.iterrows():
        made = [_cell(name, line) for name in columns]
        if silent:
            made.insert(1, Cell(_why(line["status"]), "not-run"))
        for status, column in (owners or ({"status": first} if first else {})).items():
            why = _why(line[status])
            if why and column is not None:
                at = columns.index(column)
                text = f"{made[at].text} ({why})" if made[at].text else why
                made[at] = Cell(text, made[at].mark or "not-run")
        body.append(made)
    return header, body


def _first_of_ours(columns: Sequence[str], beginning: str) -> str | None:
    """Return the first column of ours that is known by a run alone: there it is said why there was none."""
    settings = ("label share", "label nuclei", "K1", "K2")
    return next((name for name in columns if name.startswith(beginning) and not name.endswith(settings)), None)


def _why(status: object) -> str:
    return "" if status == "run" else str(status)


def _joined(name: str, frame: pd.DataFrame) -> bool:
    """Say whether a column is shown inside another one, or not at all."""
    if name in HIDDEN or name.endswith(" status"):
        return True
    ending = name.rsplit(" ", 1)
    return len(ending) == 2 and ending[1] in ("sd", "rank", "Holm") and ending[0] in frame.columns


def _heading(name: str) -> str:
    if name.endswith("Wilcoxon p"):
        return f"{name} (Holm)"
    return {
        "row": "",
        "mean difference": "AJI − reference [95 % CI]",
        "t p": "paired t p (Holm)",
        "seeds p": "over seeds: 95 % CI, p (Holm)",
        "effect size": "effect size d",
    }.get(name, name)


def _cell(name: str, line: pd.Series) -> Cell:
    value = line[name]
    if isinstance(value, str):
        return Cell(value)
    if pd.isna(value):
        return Cell("")
    if name == "mean difference":
        return Cell(f"{signed(value, 4)} {_interval(line.get('CI low'), line.get('CI high'))}")
    if name == "seeds p":
        interval = _interval(line.get("seeds CI low"), line.get("seeds CI high"))
        return Cell(f"{interval} {value:.2g} ({line['seeds p Holm']:.2g})")
    if name in ("paired t", "Wilcoxon"):
        return Cell(f"{value:.2g}")
    if name.endswith(("t p", "Wilcoxon p")):
        return Cell(f"{value:.2g} ({line[f'{name} Holm']:.2g})")
    if name.endswith(" P"):
        return Cell(f"{value:.2e}")
    if name.endswith(("images", "seeds", "ours K1", "ours K2")):
        return Cell(f"{int(value)}")
    if name.endswith("label nuclei"):
        return Cell(f"{value:,.0f}")
    if name.endswith("label share"):
        return Cell(f"~{value:.0%}" if name.startswith("paper") else f"{value:.2%}")
    if name == "effect size":
        return Cell(signed(value, 2))
    if name.endswith("ours - paper"):
        return Cell(signed(value, 4))
    spread = line.get(f"{name} sd")
    text = f"{value:.4f}" + ("" if spread is None or pd.isna(spread) else f" ± {spread:.4f}")
    return Cell(text, {1: "best", 2: "second"}.get(line.get(f"{name} rank"), ""))


def _interval(low: float, high: float) -> str:
    return f"[{signed(low, 4, 'n/a')}, {signed(high, 4, 'n/a')}]"


def markdown(caption: str, header: Sequence[str], body: Sequence[Sequence[Cell]], notes: Sequence[str]) -> str:
    """Return a Markdown table with its caption and notes; best bold, second best in italics."""
    wrap = {"best": "**{}**", "second": "*{}*", "not-run": "{}", "": "{}"}

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    def text(cell: Cell) -> str:
        return wrap[cell.mark].format(re.sub(r"([|*_\\])", r"\\\1", cell.text)) if cell.text else ""

    lines = [f"**{caption}**", "", line([name.replace("|", "\\|") for name in header])]
    lines.append(line(["---"] + ["---:"] * (len(header) - 1)))
    lines += [line([text(cell) for cell in row]) for row in body]
    for note in _with_legend(body, notes, "bold", "in italics"):
        lines += ["", note.replace("|", "\\|").replace("*", "\\*")]
    return "\n".join(lines) + "\n"


def latex(caption: str, header: Sequence[str], body: Sequence[Sequence[Cell]], notes: Sequence[str]) -> str:
    """Return a LaTeX table (booktabs, graphicx) with its caption and notes; best bold, second best underlined."""
    wrap = {"best": r"\textbf{%s}", "second": r"\underline{%s}", "not-run": r"\emph{%s}", "": "%s"}

    def text(cell: Cell) -> str:
        return wrap[cell.mark] % _tex(cell.text) if cell.text else ""

    lines = [
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        rf"\caption{{{_tex(caption)}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(map(_tex, header)) + r" \\",
        r"\midrule",
        *(" & ".join(text(cell) for cell in row) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\footnotesize {_tex(note)}" for note in _with_legend(body, notes, "bold", "underlined")),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def html_fragment(caption: str, header: Sequence[str], body: Sequence[Sequence[Cell]], notes: Sequence[str]) -> str:
    """Return an HTML table with its notes, to stand inside a page or a notebook; best bold, second best underlined."""
    wrap = {"best": "<b>{}</b>", "second": "<u>{}</u>", "not-run": "{}", "": "{}"}

    def cell(one: Cell) -> str:
        kind = ' class="not-run"' if one.mark == "not-run" else ""
        return f"<td{kind}>{wrap[one.mark].format(html.escape(one.text)) if one.text else ''}</td>"

    lines = [f"<style>{STYLE}</style>", '<table class="nucseg">', f"<caption>{html.escape(caption)}</caption>"]
    lines.append("<thead><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr></thead>")
    lines.append("<tbody>")
    lines += ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in body]
    lines += ["</tbody>", "</table>"]
    lines += [f'<p class="nucseg">{html.escape(note)}</p>' for note in _with_legend(body, notes, "bold", "underlined")]
    return "\n".join(lines) + "\n"


def html_page(caption: str, header: Sequence[str], body: Sequence[Sequence[Cell]], notes: Sequence[str]) -> str:
    """Return the fragment as a page of its own."""
    title = (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(caption)}</title></head>'
    )
    return f"{title}\n<body>\n{html_fragment(caption, header, body, notes)}</body>\n</html>\n"


def _with_legend(body: Sequence[Sequence[Cell]], notes: Sequence[str], best: str, second: str) -> list[str]:
    marked = any(cell.mark == "best" for row in body for cell in row)
    return [*notes, *([f"Ours: best {best}, second best {second}."] if marked else [])]


def _tex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "/"))
    for sign, command in (("±", r"$\pm$"), ("−", "$-$"), ("~", r"$\sim$"), ("|", r"$|$"), ("<", "$<$"), (">", "$>$")):
        text = text.replace(sign, command)
    return text
