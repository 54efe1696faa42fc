"""The report: one site with a profile's executed notebooks, tables and figures, ours beside the paper's.

Pages are written as Markdown to build/report/<profile>/source, and Sphinx turns them and the notebooks into HTML that
needs neither a server nor a network. Nothing is executed: what has not run is named on the first page.
"""

import ast
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pandas as pd

from cloud_lib import explore, io, report

CONF = {  # Sphinx's conf.py
    "project": "CLOUD", "html_title": "CLOUD", "extensions": ["myst_nb"], "exclude_patterns": ["tables/*"],
    "nb_execution_mode": "off", "nb_ipywidgets_js": {},  # the script would be loaded from the network
    "suppress_warnings": ["myst.header"],  # a notebook may skip a level of headings
    "html_theme": "sphinx_book_theme", "html_static_path": ["_static"], "html_css_files": ["site.css"],
    "html_theme_options": {"home_page_in_toc": True, "use_fullscreen_button": False, "show_toc_level": 2,
                           "max_navbar_depth": 1, "footer_content_items": [],
                           "secondary_sidebar_items": {"**": ["page-toc"], "index": []}},
    "html_context": {"default_mode": "auto"},
    "html_show_search_summary": False,  # it is fetched, which browsers refuse to a page in a folder
}
CSS = """
:root { --pst-header-height: 0px; }
.bd-header { display: none !important; }  /* it repeats the search field of the sidebar */
.bd-main .bd-content .bd-article-container { max-width: 75em; }
h1, h2, h3, .prev-next-title { overflow-wrap: anywhere; }
table { font-size: 0.9em; font-variant-numeric: tabular-nums; }
table.table :is(th, td), table.dataframe :is(th, td) { padding: 0.2rem 0.6rem; }
table.dataframe :is(th, td) { text-align: right; white-space: nowrap; }
td.text-right { white-space: nowrap; }
td.text-left { min-width: 7em; }
thead:has(p):not(:has(p:not(:empty))) { display: none; }  /* a header without words */
@media (max-width: 600px) { table { font-size: 0.78em; } table.table :is(th, td) { padding: 0.15rem 0.3rem; } }
div.plot { margin-bottom: 1rem; overflow-x: auto; background: white; }
div.plot > .wide { min-width: 42rem; }
div.plot > .square { max-width: 34rem; margin: auto; }
"""
WIDGET = "application/vnd.jupyter.widget-view+json"  # progress bars, dead without their kernel
PRODUCT = re.compile(r"(table|figure)_?(s?)(\d+)\w*")  # its name: table1, table4_finetuning, figure_s1
LABEL = re.compile(r"\*\*(?:Table|Figure) S?\d+\.\*\*")  # begins a caption
NUMBER = re.compile(r"[\d.,±–+ -]*(e[+-]?\d+)?( (of|to) [\d.,e+-]+)?")  # what a cell of numbers looks like
PACKAGE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Notebook:
    """A notebook of the repository: its executed copy, or itself where there is none, and a word on that."""

    name: str
    content: nbformat.NotebookNode
    has_run: bool
    note: str

    def text(self, cell_type: str) -> str:
        """All of its "code" or "markdown"."""
        return "\n\n".join(cell.source for cell in self.content.cells if cell.cell_type == cell_type)

    def link(self, text: str) -> str:
        """`text`, in a link to the notebook's page if it has one."""
        return f"[{text}](notebooks/{self.name}.ipynb)" if self.has_run else text

    @property
    def title(self) -> str:
        return self.text("markdown").partition("\n")[0].lstrip("# ")


def build(profile: str, out: Path | None = None) -> Path:
    """Make the site of a profile; returns its first page, `out`/html/index.html.

    Args:
        out: default build/report/<profile>; its folders `source` and `html` are replaced.
    Raises:
        FileNotFoundError: no notebook of the profile has run.
        ValueError: Sphinx found a fault, such as a link to nowhere.
    """
    out = out or io.root() / "build" / "report" / profile
    notebooks = read_notebooks(profile)
    with io.atomic_path(out / "source") as source:
        _write_source(source, profile, notebooks)
    with tempfile.TemporaryDirectory() as scratch, io.atomic_path(out / "html") as html:
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", out / "source", f"{scratch}/html"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"expected pages without faults in {out}/source, Sphinx found:\n{done.stderr.strip()}")
        shutil.copytree(f"{scratch}/html", html, ignore=shutil.ignore_patterns(".*", "*webpack-macros.html"))
    return out / "html" / "index.html"


# -------------------------------------------------------------------------------------------- notebooks
def read_notebooks(profile: str) -> list[Notebook]:
    """Every notebook: as build/<profile> has it, else as `make tables` has made it, else as it lies in notebooks/.

    Raises:
        FileNotFoundError: none has run.
    """
    sources = sorted((io.root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    found = [_read_notebook(source, profile) for source in sources]
    if not any(notebook.has_run for notebook in found):
        raise FileNotFoundError(f"expected executed notebooks in build/{profile} or build/restored/{profile}, found "
                                f"none; run make all PROFILE={profile}, or, with results/{profile}/ at hand, "
                                f"make tables PROFILE={profile}")
    return found


def _read_notebook(source: Path, profile: str) -> Notebook:
    run, restored = (io.root() / "build" / folder / source.name for folder in (profile, f"restored/{profile}"))
    for path, note in ((run, "executed"), (restored, f"products made again from `results/{profile}/`")):
        if path.is_file():
            return Notebook(source.stem, nbformat.read(path, as_version=4), True, note)
    failed = run.with_suffix(".failed.ipynb").is_file()
    note = f"**{'failed' if failed else 'not run'}**: `make {source.stem[:2]} PROFILE={profile}`"
    return Notebook(source.stem, nbformat.read(source, as_version=4), False, note)


def _write_notebook(notebook: Notebook, modules: list[str], profile: str, target: Path) -> None:
    """The executed notebook without its progress bars, with links to the modules that it imports below its title."""
    content = notebook.content
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    imported = _imported(notebook.text("code"), modules)
    used = [f"[{module.partition('.')[2]}](../code/{module}.md)" for module in imported]
    line = f"Profile `{profile}`: {notebook.note}. Code: {', '.join(used) or 'none'}."
    content.cells.insert(1, nbformat.v4.new_markdown_cell(line))
    nbformat.write(content, target)


def _imported(code: str, modules: list[str]) -> list[str]:
    """Those of `modules` that the code imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return [module for module in modules if module in names - {PACKAGE.name}]


# ------------------------------------------------------------------------------------------------ pages
def _write_source(source: Path, profile: str, notebooks: list[Notebook]) -> None:
    """All that Sphinx reads."""
    for folder in ("_static", "notebooks", "code"):
        (source / folder).mkdir(parents=True)
    explore.write_script(source / "_static")
    modules = _write_code(source / "code")
    for notebook in notebooks:
        if notebook.has_run:
            _write_notebook(notebook, modules, profile, source / "notebooks" / f"{notebook.name}.ipynb")
    tables, figures = source / "tables", source / "figures"
    for products, copy in ((io.tables_dir(profile), tables), (io.figures_dir(profile), figures)):
        if products.is_dir():
            shutil.copytree(products, copy)
    texts = {"conf.py": "\n".join(f"{key} = {value!r}" for key, value in CONF.items()), "_static/site.css": CSS,
             "index.md": _index(profile, notebooks), "explore.md": explore.page(profile),
             "tables.md": _tables(tables, notebooks), "figures.md": _figures(figures, notebooks)}
    for name, text in texts.items():
        (source / name).write_text(text, encoding="utf-8")


def _index(profile: str, notebooks: list[Notebook]) -> str:
    """What this is (in the README's words), ours beside the paper's, and what has run."""
    title, summary, *_ = (io.root() / "README.md").read_text(encoding="utf-8").split("\n\n")
    listed = pd.DataFrame([[notebook.link(notebook.title), notebook.note] for notebook in notebooks],
                          columns=["notebook", f"profile `{profile}`"])
    trees = [_toctree("Results", "tables", "figures", "explore"),
             _toctree("Notebooks", *(f"notebooks/{notebook.name}" for notebook in notebooks if notebook.has_run)),
             _toctree("Code", "code/index")]
    return "\n\n".join([title, summary, "## Results", _results(profile, notebooks), "## Notebooks",
                        report.as_markdown(listed), *trees])


def _toctree(caption: str, *pages: str) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def _results(profile: str, notebooks: list[Notebook]) -> str:
    """The README's table for this profile, with links to its notebooks."""
    parts = [pd.read_csv(file) for file in sorted(io.tables_dir(profile).glob("summary*.csv"))]
    if not parts:
        return f"None yet: notebooks 3 to 6 make them, `make all PROFILE={profile}`."
    table = pd.concat(parts, ignore_index=True).drop(columns="make")
    table = table.replace({"notebook": {notebook.name: notebook.link(notebook.name) for notebook in notebooks}})
    synthetic = any('"synthetic": true' in file.read_text("utf-8") for file in io.tables_dir(profile).glob("*.json"))
    warning = "```{warning}\nThe data are synthetic: these numbers say nothing about crystals.\n```\n\n"
    return warning * synthetic + _aligned(report.as_markdown(report.as_displayed(table)))


def _tables(folder: Path, notebooks: list[Notebook]) -> str:
    """All tables with their captions."""
    sections = ["# Tables"]
    for name in _in_order(folder, "table", ".md"):
        caption, _, table = (folder / f"{name}.md").read_text(encoding="utf-8").partition("\n\n")
        heading, *rest = re.split(r"[.:;]\s+", LABEL.sub("", caption).strip().removesuffix("."), maxsplit=1)
        rest = [f"{text[0].upper()}{text[1:]}." for text in rest]
        sections += [f"## {_label(name)} · {heading}", *rest, _aligned(table),
                     _origin(f"tables/{name}", {"CSV": ".csv", "provenance": ".json"}, notebooks)]
    return "\n\n".join(sections if sections[1:] else [*sections, "None yet."])


def _figures(folder: Path, notebooks: list[Notebook]) -> str:
    """All figures with their captions, which stand in the notebooks."""
    sections, texts = ["# Figures"], "\n\n".join(notebook.text("markdown") for notebook in notebooks)
    for name in _in_order(folder, "figure", ".png"):
        _, _, rest = texts.partition(f"**{_label(name)}.**")
        caption = LABEL.split(rest.partition("\n\n")[0])[0].strip()
        files = {"PDF": ".pdf", "plotted numbers": ".csv", "provenance": ".json"}
        width = int.from_bytes((folder / f"{name}.png").read_bytes()[16:20]) // 2  # half of the PNG's pixels
        image = f"```{{image}} figures/{name}.png\n:alt: {_label(name)}\n:width: {width}px\n```"
        sections += [f"## {_label(name)}", image, caption,
                     _origin(f"figures/{name}", files, notebooks)]
    return "\n\n".join(sections if sections[1:] else [*sections, "None yet."])


def _in_order(folder: Path, kind: str, suffix: str) -> list[str]:
    """Names of the products of a kind by number, the paper's own before the supplementary ones."""
    found = {file.stem: PRODUCT.fullmatch(file.stem) for file in folder.glob(f"{kind}*{suffix}")}
    return sorted(filter(found.get, found), key=lambda name: (found[name][2], int(found[name][3]), name))


def _label(name: str) -> str:
    """"Figure S1" of figure_s1."""
    kind, supplement, number = PRODUCT.fullmatch(name).groups()
    return f"{kind.title()} {supplement.upper()}{number}"


def _origin(path: str, files: dict[str, str], notebooks: list[Notebook]) -> str:
    """Links to a product's files (`files`: what -> suffix) and to the notebook whose code names it."""
    name = path.rpartition("/")[2]
    makers = [notebook.link(notebook.title) for notebook in notebooks if f'"{name}"' in notebook.text("code")]
    return " · ".join([*(f"[{what}]({path}{suffix})" for what, suffix in files.items()), *makers])


def _aligned(table: str) -> str:
    """A Markdown table with columns of numbers aligned to the right."""
    header, _, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.strip().splitlines()]
    numeric = [bool(rows) and all(NUMBER.fullmatch(row[k].strip()) for row in rows) for k in range(len(header))]
    lines = [header, ["---:" if right else ":---" for right in numeric], *rows]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def _write_code(folder: Path) -> list[str]:
    """A page with the source of every module, and one that lists them; returns their names."""
    rows = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        code = file.read_text(encoding="utf-8")
        rows[name] = (ast.get_docstring(ast.parse(code)) or "").partition("\n")[0].replace("<", "&lt;")
        page = f"# {name}\n\n`````{{code-block}} python\n:linenos:\n\n{code}`````\n"
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
    listed = pd.DataFrame([[f"[`{name}`]({name}.md)", summary] for name, summary in rows.items()],
                          columns=["module", "what it does"])
    page = "\n\n".join(["# Modules", report.as_markdown(listed), _toctree("Modules", *rows)])
    (folder / "index.md").write_text(page, encoding="utf-8")
    return list(rows)
