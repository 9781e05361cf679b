"""Pieces of a self-contained HTML page: every text is escaped, nothing is loaded from elsewhere."""

from collections.abc import Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6472; --paper: #fdfdfc; --line: #d9dce1; --mark: #eef3fa;
  --accent: #2c6cb5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --soft: #a2a9b4; --paper: #15181d; --line: #343a44; --mark: #1d2836; --accent: #7db3ec; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, ul { max-width: 46rem; margin: .4rem 0 .8rem; }
nav a { margin-right: 1rem; }
a { color: var(--accent); }
.soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
th:first-child { text-align: left; padding-left: .2rem; white-space: normal; min-width: 7.5rem; max-width: 18rem;
  position: sticky; left: 0; background: var(--paper); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tr.model > * { background: var(--mark); }
td small, th small { display: block; color: var(--soft); font-size: .76rem; font-weight: 400; }
td.best { font-weight: 700; }
td.best::before { content: "\\2605  "; color: var(--accent); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2.5rem;
  align-items: start; }
.pair > * { min-width: 0; }
figure { margin: .8rem 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, sans-serif !important; }
"""
_ROW, _COLUMN = ' scope="row"', ' scope="col"'


class Cell:
    """Content of a table cell: a text, a smaller second line, and whether it is the best of its column."""

    def __init__(self, text: str, small: str = "", best: bool = False) -> None:
        self.text, self.small, self.best = text, small, best

    def html(self, tag: str = "td", scope: str = "") -> str:
        """As <td> or <th>."""
        small = f"<small>{escape(self.small)}</small>" if self.small else ""
        kind = ' class="best"' if self.best else ""
        return f"<{tag}{kind}{scope}>{escape(self.text)}{small}</{tag}>"


def table(
    header: Sequence[Cell], rows: Sequence[Sequence[Cell]], *, caption: str = "", marked: Sequence[str] = ()
) -> str:
    """A table that scrolls sideways on a narrow screen; rows whose first cell is in `marked` are tinted."""
    head = "".join(cell.html("th", _COLUMN) for cell in header)
    body = []
    for first, *rest in rows:
        kind = ' class="model"' if first.text in marked else ""
        cells = "".join(cell.html() for cell in rest)
        body.append(f"<tr{kind}>{first.html('th', _ROW)}{cells}</tr>")
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    lines = "\n".join(body)
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def paragraph(text: str, *, soft: bool = False) -> str:
    """A <p>."""
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{escape(text)}</p>"


def bullets(items: Sequence[str]) -> str:
    """A <ul>."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def heading(text: str) -> str:
    """An <h3>."""
    return f"<h3>{escape(text)}</h3>"


def columns(*parts: str) -> str:
    """Parts side by side, or below each other on a narrow screen."""
    return f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def figure(svg: str, title: str, caption: str) -> str:
    """An inline picture (trusted markup) with its title and caption."""
    return f"<figure>{svg}<figcaption><strong>{escape(title)}.</strong> {escape(caption)}</figcaption></figure>"


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole document, from (id, heading, markup) sections; empty ones are left out."""
    filled = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{escape(name)}">{escape(text)}</a>' for name, text, _ in filled)
    body = "\n".join(
        f'<section id="{escape(name)}"><h2>{escape(text)}</h2>\n{html}\n</section>' for name, text, html in filled
    )
    header = f"<header><h1>{escape(title)}</h1>{paragraph(lead, soft=True)}<nav>{links}</nav></header>"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{header}\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
