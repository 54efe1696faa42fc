"""The report of a tiny profile: its files, and what a browser makes of them."""

import base64
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
from matplotlib.figure import Figure
from nbformat import v4

from benchmarks import browser
from cloud_lib import cli, explore, preparation, report, site

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ["index", "tables", "figures", "explore", "notebooks/01_data_curation", "code/cloud_lib.io"]
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
STATES = {"01_data_curation": "tiny/{}.ipynb", "02_pretraining": "tiny/{}.failed.ipynb",
          "03_matbench": "restored/tiny/{}.ipynb", "04_discovery": None}  # name -> what is below build/
LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


def _notebook(name: str, picture: bytes) -> nbformat.NotebookNode:
    """With a caption, an import, a progress bar, a table wider than a phone, and a picture."""
    wide = pd.DataFrame([range(60)]).to_html()
    outputs = [v4.new_output("display_data", {site.WIDGET: {"model_id": "1"}, "text/plain": "0% of a bar"}),
               v4.new_output("display_data", {"text/html": wide}),
               v4.new_output("display_data", {"image/png": base64.b64encode(picture).decode()})]
    code = 'from cloud_lib import io, report\nreport.write_table(df, "table1", profile, "", {})'
    cells = [v4.new_markdown_cell(f"# {name[1]} · Wyckoff positions of {name}\n\n**Figure 1.** A line."),
             v4.new_code_cell(code, outputs=outputs),
             v4.new_markdown_cell("**Figure S1.** Another one. **Figure 2.** No such figure.")]
    return v4.new_notebook(cells=cells, metadata={"widgets": {"state": {}}, "language_info": {
        "name": "python", "pygments_lexer": "ipython3"}})


def _write_profile(root: Path) -> None:
    """All that `site.build` reads of the profile `tiny`; `root` has to be io.root()."""
    (root / "README.md").write_text("# Title\n\nA summary.\n\nMore.\n")
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([1, 2])
    for name in ("figure1", "figure_s1"):
        png = report.write_figure(figure, name, "tiny", pd.DataFrame({"x": [1, 2]}), {"config": {"synthetic": True}})
    lines = pd.DataFrame({"result": ["dielectric MAE"], "paper": [0.3], "ours": [0.2], "rows": [5],
                          "notebook": ["03_matbench"], "make": ["matbench"]})
    report.write_table(lines, "summary_03", "tiny", "README.", {"config": {"synthetic": True}})
    wide = pd.DataFrame({"task": ["a"]} | {f"column {n}": [n / 7] for n in range(30)})
    report.write_table(wide, "table1", "tiny", "**Table 1.** MatBench, test MAE: on the rows that are here.", {})
    report.write_table(wide, "table_s10", "tiny", "**Table S10.** All runs.", {})
    report.write_table(wide, "table_s2", "tiny", "**Table S2.** Some runs.", {})
    statistics = pd.DataFrame({"statistic": ["elements", "elements", "space_groups"], "element": ["O", "D", None],
                               "space_group": [None, None, 62], "n": [7, 1, 8]})
    (root / "results" / "tiny").mkdir(parents=True)
    statistics.to_csv(root / "results" / "tiny" / "corpus_statistics.csv", index=False)
    for name, executed in STATES.items():
        for path in filter(None, (f"notebooks/{name}.ipynb", executed and f"build/{executed.format(name)}")):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(_notebook(name, png.read_bytes()), root / path)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The folder of the site."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_ROOT", str(root))
        _write_profile(root)
        patch.setattr(site, "PACKAGE", _package(root, "__init__.py", "io.py", "report.py"))
        patch.setattr(preparation, "EXAMPLES", dict([*preparation.EXAMPLES.items()][:1]))  # a browser without a GPU is slow
        assert site.build("tiny") == root / "build" / "report" / "tiny" / "html" / "index.html"
    return root / "build" / "report" / "tiny" / "html"


def _package(root: Path, *modules: str) -> Path:
    """Some modules of cloud_lib, as the pages of all of them take seconds."""
    (root / "cloud_lib").mkdir()
    for module in modules:
        (root / "cloud_lib" / module).write_text((REPOSITORY / "cloud_lib" / module).read_text())
    return root / "cloud_lib"


class Page(HTMLParser):
    """What a page offers (ids), links to (links), loads by itself (loaded), and says (text)."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids, self.links, self.loaded, self.text = set(), [], [], ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if key in attrs}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if LOADING.get(tag) in attrs and attrs.get("rel") not in ("next", "prev", "index", "search", "canonical"):
            self.loaded.append(attrs[LOADING[tag]])

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pages(html):
    return {file: Page(file) for file in html.rglob("*.html")}


def _words(html: Path, page: str) -> str:
    return " ".join(Page(html / f"{page}.html").text.split())


# ------------------------------------------------------------------------------------------------ files
def test_no_link_is_broken(html, pages):
    broken, n = [], 0
    for file, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            known = pages[target].ids | {""} if target in pages else {parts.fragment}
            n += 1
            if not target.is_file() or parts.fragment not in known:
                broken.append(f"{file.relative_to(html)}: {link}")
    assert broken == [] and n > 200


def test_nothing_is_loaded_from_elsewhere(html, pages):
    loaded = {address for page in pages.values() for address in page.loaded}
    assert {address for address in loaded if urlsplit(address).scheme != "data" and "//" in address} == set()
    assert "_static/plotly.min.js" in loaded
    assert "wyckoff" in (html / "searchindex.js").read_text(encoding="utf-8").lower()


def test_the_first_page_says_what_has_run_and_stands_beside_the_paper(html):
    text = _words(html, "index")
    assert "Title" in text and "A summary." in text and "The data are synthetic" in text
    assert "result paper ours rows notebook dielectric MAE 0.3 0.2 5 03_matbench" in text
    for name, state in {"01_data_curation": "executed", "02_pretraining": "failed: make 02 PROFILE=tiny",
                        "03_matbench": "products made again from results/tiny/",
                        "04_discovery": "not run: make 04 PROFILE=tiny"}.items():
        assert f"{name[1]} · Wyckoff positions of {name} {state}" in text
    assert {file.stem for file in (html / "notebooks").glob("*.html")} == {"01_data_curation", "03_matbench"}


def test_a_notebook_keeps_its_outputs_but_no_progress_bar(html):
    page = Page(html / "notebooks" / "01_data_curation.html")
    assert {"../code/cloud_lib.io.html", "../code/cloud_lib.report.html"} <= set(page.links)
    assert any(address.endswith(".png") for address in page.loaded)
    assert "Profile tiny: executed." in " ".join(page.text.split()) and "0% of a bar" not in page.text


def test_tables_and_figures_have_captions_and_files(html):
    text = _words(html, "tables")
    assert text.index("Table 1 · MatBench, test MAE") < text.index("Table S2 ·") < text.index("Table S10 · All runs")
    assert "On the rows that are here." in text and "1 · Wyckoff positions of 01_data_curation" in text
    assert "Figure 1# A line." in _words(html, "figures")
    files = {Path(link).name for page in ("tables", "figures") for link in Page(html / f"{page}.html").links}
    assert {"table1.csv", "table1.json", "figure_s1.pdf", "figure_s1.csv", "figure_s1.json"} <= files


def test_only_numbers_are_aligned_to_the_right():
    rows = "| x \\| y | 1.2e-05 | 0.1 ± 0.2 |\n| – | – | 1 of 2 |"
    aligned = site._aligned(f"| a | b | c |\n| --- | --- | --- |\n{rows}")
    assert aligned == f"| a | b | c |\n|:---|---:|---:|\n{rows}"
    assert site._aligned("| a |\n| --- |") == "| a |\n|:---|"


def test_periodic_table_and_space_groups():
    table = explore.periodic_table(pd.Series({"O": 7, "Og": 0, "D": 3}))
    text = table.data[1].text
    assert text[0][0] == "<b>H</b>" and text[1][15] == "<b>O</b><br>7" and text[6][17] == "<b>Og</b>"
    assert pd.notna(table.data[1].z).sum() == 1 and pd.notna(table.data[0].z).sum() == 118
    groups = explore.space_groups(pd.Series({62.0: 2, 225.0: 5, 194.0: 1}))
    assert dict(zip(groups.data[0].labels, groups.data[0]["values"])) == {
        "Pnma (62)": 2, "Fm-3m (225)": 5, "P6<sub>3</sub>/mmc (194)": 1,
        "orthorhombic": 2, "cubic": 5, "hexagonal": 1}


# ----------------------------------------------------------------------------------------------- errors
def test_without_an_executed_notebook_the_error_says_what_to_run(empty_root, capsys):
    assert cli.main(["report", "--profile", "tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected executed notebooks in build/tiny or build/restored/tiny, found none; ")
    assert list(empty_root.iterdir()) == []


def test_a_fault_is_an_error_and_leaves_the_old_site(empty_root, monkeypatch):
    _write_profile(empty_root)
    (empty_root / "README.md").write_text("# Title\n\nA [link](nowhere.md).\n\nMore.\n")
    monkeypatch.setattr(site, "PACKAGE", _package(empty_root))
    (empty_root / "out" / "html").mkdir(parents=True)
    (empty_root / "out" / "html" / "index.html").write_text("old")
    with pytest.raises(ValueError, match="without faults in .*out/source, Sphinx found:(.|\n)*nowhere.md"):
        site.build("tiny", empty_root / "out")
    assert (empty_root / "out" / "html" / "index.html").read_text() == "old"


def test_an_empty_profile_says_what_is_missing(empty_root):
    (empty_root / "tables").mkdir()
    assert "None yet." in site._tables(empty_root / "tables", []) and "None yet." in site._figures(empty_root, [])
    assert "None yet: notebooks 3 to 6 make them, `make all PROFILE=tiny`." in site._results("tiny", [])
    assert "`results/tiny/corpus_statistics.csv` is not there: run notebook 1" in explore.page("tiny")


def test_make_report_trains_nothing():
    shown = subprocess.run(["make", "--dry-run", "report"], cwd=REPOSITORY, capture_output=True, text=True)
    assert shown.stdout.splitlines()[-1].endswith("-m cloud_lib report --profile demo")
    assert "notebook" not in shown.stdout


# ---------------------------------------------------------------------------------------------- browser
@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with browser.Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_in_a_browser(html, chromium, page, size):
    chromium.open((html / f"{page}.html").as_uri(), *SIZES[size])
    assert chromium.ask("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)") == []
    assert chromium.ask("document.documentElement.scrollWidth") <= SIZES[size][0]  # wide tables scroll in their boxes
    if page == "explore":
        drawn = "document.querySelectorAll('.plotly-graph-div .main-svg')"
        names = set(chromium.ask(f"[...{drawn}].map(picture => picture.closest('div[id]').id)"))
        assert names == {"elements", "space-groups", "crystal-0"}
        assert "Og" in chromium.ask("document.querySelector('#elements').textContent")
        width = "document.querySelector('{}').getBoundingClientRect().width"
        chromium.wait_for(f"{width.format('#elements .main-svg')} <= {width.format('#elements')}")
    assert chromium.complaints == []


def test_search_finds_a_page(html, chromium):
    chromium.open(f"{(html / 'search.html').as_uri()}?q=wyckoff")
    chromium.wait_for("document.querySelector('#search-results .search-summary')?.textContent.includes('found')")
    found = chromium.ask("[...document.querySelectorAll('#search-results li a')].map(link => link.href)")
    assert any("01_data_curation.html" in link for link in found) and chromium.complaints == []
