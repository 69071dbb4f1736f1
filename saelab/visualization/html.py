"""Self-contained HTML pages (style, sections, tables, with all text escaped) and the common style of figures.

Figures have colors for light and dark backgrounds. Styles and scripts are files in the folder `assets`.
"""

import base64
import hashlib
import html
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from saelab.visualization.pictures import with_picture

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INLINE = re.compile(r"<script(?: type=\"text/javascript\")?>(.*?)</script>", re.DOTALL)
# between the light and the dark of the page's style
PLUS, MINUS, OWN, OTHER = "#e07422", "#387ddf", "#37919a", "#848e99"
SERIES = (OWN, "#c2559d", "#b58a1a", "#8066cf", "#6f9440", OTHER)
"""Colors of lines that stand for no sign."""
DASHES = ("solid", "dash", "dot", "dashdot")
CLEAR, GRID = "rgba(0,0,0,0)", "rgba(128,128,128,0.25)"
TITLE_HEIGHT, LINE_HEIGHT, LEGEND_WIDTH = 44, 22, 28


def escape(text: object) -> str:
    """Text escaped for HTML elements and for attributes in double quotes.

    >>> escape('<b title="x">')
    '&lt;b title=&quot;x&quot;&gt;'
    """
    return html.escape(str(text), quote=True)


class Scripted(str):
    """HTML with the scripts in it that are allowed to run; no others are."""

    scripts: tuple[str, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[str]) -> "Scripted":
        """Parts of a page, a line each; the scripts of those that are `Scripted` are allowed to run."""
        made = cls("\n".join(parts))
        made.scripts = tuple(script for part in parts if isinstance(part, Scripted) for script in part.scripts)
        return made


def embed(figure: "Figure", name: str, follow: str, first: bool = True) -> Scripted:
    """A plotly figure as HTML whose scripts are allowed to run on its page; equal figures give equal bytes.

    Args:
        figure: plotly figure, drawn as it is.
        name: id of its element, one figure's on a page.
        follow: JavaScript that runs once the figure is drawn, such as for colors that follow the page's.
        first: whether plotly.js is included, as in the first figure of a page.
    """
    config = {"displayModeBar": False, "responsive": True}
    drawn = figure.to_html(full_html=False, include_plotlyjs=first, config=config, post_script=follow, div_id=name)
    made = Scripted(drawn.replace("\r\n", "\n"))  # as a browser reads it, and so hashes it
    made.scripts = tuple(INLINE.findall(made))
    return made


def write_policy(scripts: Sequence[str] = (), files: str = "") -> str:
    """The Content-Security-Policy element that allows only these scripts, by their hashes, and scripts from `files`.

    Event handlers and other scripts that text may bring into the page are not run; nothing is fetched from the network,
    and nothing sent.
    """
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join([f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests] + files.split())
    rules = {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "script-src": allowed or "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    return f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'


def make_page(title: str, lead: str, sections: Sequence[str]) -> str:
    """A complete HTML page from title and lead (plain text) and sections (HTML), of which only `Scripted` ones run
    scripts.
    """
    body = Scripted.of(sections)
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            write_policy(body.scripts),
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{read_asset('page.css')}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>",
            body,
            "</main>\n</body>\n</html>\n",
        ]
    )


def section(title: str, *parts: str) -> Scripted:
    """A section with a heading (plain text) and its content (HTML)."""
    return Scripted.of([f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"])


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph with a style class."""
    return f'<p class="{escape(kind)}">{escape(text)}</p>'


def facts(rows: dict[str, str]) -> str:
    """A description list of names and values, given as plain text."""
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items()) + "</dl>"
    )


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    own: frozenset[str] = frozenset(),
    links: Mapping[str, str] | None = None,
) -> str:
    """An HTML table with plain text in its cells.

    Args:
        header: names of the columns.
        rows: cells of each row.
        own: first cells of the rows that are emphasized.
        links: what addresses begin with, by column: its cells are links, whose address ends with the cell.

    >>> '<td><a href="#/feature/7">7</a></td>' in table(["feature"], [["7"]], links={"feature": "#/feature/"})
    True
    """
    top = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for row in rows:
        kind = ' class="own"' if row[0] in own else ""
        cells = [escape(cell) for cell in row]
        for name, start in (links or {}).items():
            i = header.index(name)
            cells[i] = f'<a href="{escape(start)}{cells[i]}">{cells[i]}</a>'
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def decimal(x: float, digits: int = 2) -> str:
    """A number with a fixed number of digits; a dash for NaN."""
    return "-" if x != x else f"{x:.{digits}f}"


def escape_plotly(text: object, width: int = 60) -> str:
    """Text escaped so that plotly shows it literally, without tags or formulas, in at most four lines of `width`.

    >>> escape_plotly("<b>$x$</b>")
    '&lt;b&gt;&#36;x&#36;&lt;/b&gt;'
    """
    lines = textwrap.wrap(str(text), width, max_lines=4, placeholder=" ...")
    return "<br>".join(html.escape(line, quote=False).replace("$", "&#36;") for line in lines)


def apply_layout(figure: "Figure", title: str, note: str, height: int = 420) -> "Figure":
    """The figure with the common layout: title and note above, light grid lines, the template's background. Notebooks
    display it with a picture beside it (`with_picture`).

    Args:
        figure: plotly figure, changed in place.
        title: plain text.
        note: plain text below the title, such as the number of tokens.
        height: height of the plot area in pixels; title and note come on top.
    """
    small = escape_plotly(note, 105)
    top = TITLE_HEIGHT + LINE_HEIGHT * (small.count("<br>") + 1)
    figure.update_layout(
        title={
            "text": f'{escape_plotly(title, 80)}<br><span style="font-size:12px">{small}</span>',
            "font": {"size": 17},
            "x": 0.01,
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 24},
        },
        font={"family": "system-ui, sans-serif"},
        plot_bgcolor=CLEAR,
        height=height + top,
        margin={"l": 72, "r": 24, "t": top + 30, "b": 56},
        hoverlabel={"align": "left"},
        legend={"bgcolor": CLEAR},
    )
    figure.update_xaxes(gridcolor=GRID, linecolor=GRID, zerolinecolor=GRID, title_standoff=8)
    figure.update_yaxes(gridcolor=GRID, linecolor=GRID, zerolinecolor=GRID, title_standoff=8)
    return with_picture(figure)


def write_over(figure: "Figure", text: str) -> None:
    """Write the reason why a figure is empty into its middle."""
    figure.add_annotation(
        text=escape_plotly(text), showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5, font={"size": 15}
    )


def line_of(i: int) -> dict[str, Any]:
    """Color and dash of the i-th line of a figure with many."""
    return {"color": SERIES[i % len(SERIES)], "dash": DASHES[i // len(SERIES) % len(DASHES)]}


def count_rows(counts: Iterable[int], counted: str = "tokens") -> str:
    """Number of tokens, or documents, of one result, or the range of several, as text.

    >>> count_rows([4096]), count_rows([4096, 1024], "documents")
    ('4,096 tokens', '1,024 to 4,096 documents')
    """
    low, high = min(counts := list(counts)), max(counts)
    return f"{high:,} {counted}" if low == high else f"{low:,} to {high:,} {counted}"


@cache
def read_asset(name: str) -> str:
    """The text of a file in this folder."""
    return files("saelab.visualization").joinpath("assets", name).read_text(encoding="utf-8")


IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([^"]+)";\n', re.M)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|const|class) (\w+))", re.M)
EXPORT_LIST = re.compile(r"export\{([^}]*)\};?\s*\Z")
"""How our modules and the vendored ones, which are minified, name what they take and give"""


@cache
def bundle(name: str, packages: tuple[str, ...] = ("saelab.visualization",)) -> str:
    """JavaScript modules as one expression, a script by itself, whose value are the exports of the module named.

    That module and all that it imports are wrapped in a function each: a page from the disk can load no modules, and a
    widget has only one.

    Args:
        name: file name of the module that runs last.
        packages: packages whose folders `assets` hold the modules.
    """
    order: dict[str, str] = {}

    def add(name: str) -> None:
        text = _read_module(name, packages)
        for _, needed in IMPORT.findall(text):
            if needed not in order:
                add(needed)
        order[name] = _wrap(name, text)

    add(name)
    first, last = '(() => {\n"use strict";\nconst modules = {};', f'return modules["{name}"];\n}})();\n'
    return "\n".join([first, *order.values(), last])


def _read_module(name: str, packages: Sequence[str]) -> str:
    for package in packages:
        file = files(package).joinpath("assets", *name.split("/"))
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise FileNotFoundError(f"A module must be a file in `assets` of {' or '.join(packages)}, got '{name}'.")


def _wrap(name: str, text: str) -> str:
    """A module as a function whose result, its exports by name, is stored under the name of its file."""
    given = ", ".join(EXPORT.findall(text))
    for listed in EXPORT_LIST.findall(text):
        given = re.sub(r"([\w$]+) as ([\w$]+)", r"\2: \1", listed)
    body = EXPORT_LIST.sub("", EXPORT.sub("", IMPORT.sub(_take, text)))
    return f'modules["{name}"] = (() => {{\n{body.strip()}\nreturn {{ {given} }};\n}})();'


def _take(found: re.Match[str]) -> str:
    taken = re.sub(r"(\w+) as (\w+)", r"\1: \2", found[1].strip())
    return f'const {{ {taken} }} = modules["{found[2]}"];\n'
