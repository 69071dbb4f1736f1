"""Pages of the documentation site that are made from other files; mkdocs calls the functions `on_...`.

API reference: one page a package, from the names under `if TYPE_CHECKING:` in its `__init__.py`. Tutorials: the
notebooks with their stored outputs. Results: LOG.md's entries, one page a question (`docs/results/questions.json`).
Words: CONTRIBUTING's tables.
Nothing is imported from saelab and nothing runs.
"""

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "saelab"
MADE = ROOT / "build" / "docs-pages"
NO_REFERENCE = ("cli", "visualization/assets")
WORDS = "<!-- the words of CONTRIBUTING.md -->"
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET, WIDGETS = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
logger = logging.getLogger("mkdocs.hooks.docs_pages")


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's files, with those that are made here."""
    made = {**make_reference(), **make_tutorials(), **make_results()}
    for uri, content in made.items():
        path = MADE / uri  # mkdocs-jupyter reads files alone
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        files.append(File(uri, str(MADE), config.site_dir, config.use_directory_urls))
    fill_navigation(config.nav or [], [uri for uri in made if uri.endswith((".md", ".ipynb"))])
    return files


def on_page_markdown(markdown: str, *, page: Page, **kwargs: Any) -> str:
    """The page, with CONTRIBUTING's list of words where it is asked for."""
    if WORDS not in markdown:
        return markdown
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Words\n")[1].split("\n## ")[0]
    return markdown.replace(WORDS, section.partition("\n\n")[2].partition("\n\n")[2])


def fill_navigation(nav: list[Any], pages: list[str]) -> None:
    """Put the pages of a folder where the navigation says `{Title: folder/*}`, after what is listed there already."""
    for section in nav:
        for title, content in section.items() if isinstance(section, dict) else ():
            if isinstance(content, list) and content and str(content[-1]).endswith("/*"):
                folder = str(content.pop())[:-1]
                section[title] = content + [page for page in pages if page.startswith(folder)]


# API reference


def list_public_names(init: Path) -> list[tuple[str, str]]:
    """The public names of a package and the modules that they are imported from, in the file's order."""
    names = []
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom) and line.module:
                    names += [(alias.asname or alias.name, line.module) for alias in line.names]
    return names


def make_reference() -> dict[str, str]:
    """A page for each package that lists public names, and one for the names at the top."""
    packages = [path for path in sorted(PACKAGE.rglob("__init__.py")) if list_public_names(path)]
    homes: dict[str, str] = {}
    pages = {}
    for init in packages:
        folder = init.parent.relative_to(ROOT)
        package = ".".join(folder.parts)
        if package == "saelab" or str(folder.relative_to("saelab")) in NO_REFERENCE:
            continue
        names = [name for name, home in list_public_names(init) if home != package]  # not its own subpackages
        homes |= dict.fromkeys(names, package)
        pages[f"api/{package.removeprefix('saelab.')}.md"] = write_package(package, names)
    return {"api/index.md": write_top(homes, list(pages)), **pages}


def write_package(package: str, names: list[str]) -> str:
    head = f"---\ntitle: {package}\n---\n\n# `{package}`\n\n::: {package}\n    options:\n"
    head += "      members: false\n      show_root_heading: false\n      show_root_toc_entry: false\n\n"
    return head + "\n".join(f"::: {package}.{name}\n" for name in names)


def write_top(homes: dict[str, str], pages: list[str]) -> str:
    """The page of the names that `import saelab as sl` offers, and the list of packages."""
    lines = ["# API reference", "", "`import saelab as sl` offers the names that most programs need:", ""]
    lines += ["| name | documented under |", "|---|---|"]
    for name, home in list_public_names(PACKAGE / "__init__.py"):
        if home != "saelab":
            lines.append(f"| [`sl.{name}`][{homes[name]}.{name}] | `{homes[name]}` |")
    lines += [
        "",
        "Everything else is a name of a package, loaded when it is first used; `dir(sl.analysis)` lists them.",
        "",
    ]
    lines += ["| package | holds |", "|---|---|"]
    for page in pages:
        path = PACKAGE.joinpath(*page.removeprefix("api/").removesuffix(".md").split(".")) / "__init__.py"
        about = " ".join(
            (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split()
        )
        lines.append(f"| [`{page[4:-3]}`]({page[4:]}) | {about} |")
    return "\n".join(lines) + "\n"


# Tutorials


def make_tutorials() -> dict[str, str | bytes]:
    """The notebooks, their plotly figures and widgets as HTML, and the scripts that draw those."""
    pages: dict[str, str | bytes] = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        outputs = []
        widgets = notebook["metadata"].pop("widgets", {}).get(WIDGETS, {}).get("state", {})
        for cell in notebook["cells"]:
            if "outputs" in cell:  # without the warnings of the machine that ran it
                cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
                outputs += cell["outputs"]
        for n, output in enumerate(outputs):
            if PLOTLY in output.get("data", {}):
                output["data"] = {"text/html": draw_figure(output["data"][PLOTLY], f"figure-{n}")}
            elif WIDGET in output.get("data", {}):
                state = widgets[output["data"][WIDGET]["model_id"]]["state"]
                output["data"] = {"text/html": draw_widget(state, f"widget-{n}")}
                pages["assets/widget.js"] = state["_esm"]
            elif "text/html" in output.get("data", {}):  # its own styles alone, as in Jupyter, where it stands on white
                inside = "".join(output["data"]["text/html"])
                output["data"]["text/html"] = (
                    '<div style="background: white; color: black; overflow-x: auto">'
                    f'<template shadowrootmode="open">{inside}</template></div>'
                )
        pages[f"tutorials/{path.name}"] = json.dumps(notebook)
    from plotly.offline import get_plotlyjs

    return {**pages, "assets/plotly.min.js": get_plotlyjs()}


def draw_figure(figure: dict[str, Any], name: str) -> str:
    """A figure as plotly.py stores it in a notebook, for a page one folder below `assets/plotly.min.js`."""
    shown = json.dumps([figure["data"], figure["layout"] | {"autosize": True}]).replace("</", "<\\/")
    return (
        f'<div id="{name}" style="background: white"></div>\n'
        "<script>window.Plotly || document.write('<script src=\"../../assets/plotly.min.js\"><\\/script>')</script>\n"
        f'<script>Plotly.newPlot("{name}", ...{shown}, {{responsive: true}})</script>'
    )


SAVED = """<div id="NAME"></div>
<script type="module">
import widget from "../../assets/widget.js";
const state = STATE, heard = [], el = document.getElementById("NAME");
const refuse = id => heard.forEach(hear => hear({ id, error: "This is a saved notebook: run it to ask for more." }));
widget.render({ el, model: {
  get: name => state[name], set: (name, value) => { state[name] = value; }, save_changes: () => {},
  on: (_, hear) => heard.push(hear), off: () => {}, send: ({ id }) => setTimeout(refuse, 0, id),
} });
const follow = () => {
  el.firstChild.dataset.theme = document.body.dataset.mdColorScheme === "slate" ? "dark" : "light";
};
new MutationObserver(follow).observe(document.body, { attributes: true });
follow();
</script>"""


def draw_widget(state: dict[str, Any], name: str) -> str:
    """A widget with the answers that its notebook was saved with, for a page one folder below `assets/widget.js`."""
    shown = {key: state[key] for key in ("view", "query", "held", "style")}
    return SAVED.replace("NAME", name).replace("STATE", json.dumps(shown).replace("</", "<\\/"))


# Results


def read_entries(log: str) -> dict[str, str]:
    """The dated entries of LOG.md by their headings (`2026-11-21 Two seeds of ...`), in the file's order."""
    parts = re.split(r"^## (?=\d{4}-\d\d-\d\d )", log, flags=re.MULTILINE)[1:]
    entries = {}
    for part in parts:
        heading, _, text = part.partition("\n")
        entries[heading.strip()] = re.split(r"^## ", text, flags=re.MULTILINE)[0].strip()
    return entries


def make_results() -> dict[str, str | bytes]:
    """A page for each question that LOG.md's entries answer; an entry that no question names is a page of its own."""
    entries = read_entries((ROOT / "LOG.md").read_text(encoding="utf-8"))
    questions = json.loads((ROOT / "docs" / "results" / "questions.json").read_text(encoding="utf-8"))
    asked = set()
    for question in questions:
        question["entries"] = [find_heading(entries, start) for start in question["entries"]]
        asked |= set(question["entries"])
    questions += [
        {"page": make_slug(heading), "title": heading[11:], "entries": [heading]}
        for heading in entries
        if heading not in asked
    ]
    pages: dict[str, str | bytes] = {
        f"results/{question['page']}.md": write_question(question, entries) for question in questions
    }
    figures = {f"results/figures/{path.name}": path.read_bytes() for path in (ROOT / "notebooks/figures").glob("*.png")}
    return {**pages, **figures}


def find_heading(entries: dict[str, str], start: str) -> str:
    """The one heading that begins so; without one, a warning, which `--strict` turns into an error."""
    found = [heading for heading in entries if heading.startswith(start)]
    if len(found) != 1:
        logger.warning(
            "docs/results/questions.json: one heading of LOG.md must begin with %r, got %d.", start, len(found)
        )
    return found[0] if found else start


def make_slug(heading: str) -> str:
    """A page's name from an entry's heading, without its date and what stands in brackets."""
    title = re.sub(r"\(.*?\)", "", heading[11:]).lower()
    return "-".join(re.findall(r"[a-z0-9]+", title)[:8])


def write_question(question: dict[str, Any], entries: dict[str, str]) -> str:
    text = f"---\ntitle: {json.dumps(question['title'])}\n---\n\n# {question['title']}\n\n"
    for heading in question["entries"]:
        entry = entries.get(heading, "").replace("](notebooks/figures/", "](figures/")
        text += f"## {heading[:10]}: {heading[11:]}\n\n{entry}\n\n"
    return text + "[All results](index.md)\n"
