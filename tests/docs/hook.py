"""What `mkdocs build` does beside its plugins: pages and navigation, from the notebooks alone.

The notebooks are copied to a temporary folder, without their directives. A new one needs no entry:
its name says where it stands, its first heading what it is called. An exported module gets a page
made from its docstrings, and its notebook links to it."""

import importlib.util
import itertools
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbformat.v4 import new_markdown_cell

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from readme import DIRECTIVE, LINK, shown

FLOORS = ("Ground", "Data", "Model", "Training", "Looking and tables")
PAGES = tempfile.TemporaryDirectory(prefix="cmi_mtl_docs_")
TEXT_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
WIDGET = "application/vnd.jupyter.widget-view+json"


# ------------------------------------------------------------ the navigation


def room(path):
    "The number of a room, '13' or '13a'; None for a notebook that is none."
    number = re.match(r"(\d+[a-z]?)_", path.name)
    return number and number[1]


def in_order(nbs):
    "The notebooks in reading order: the index, the rooms, the rest, the experiments."

    def place(path):
        if path.name == "index.ipynb":
            return 0, path.name
        if room(path):
            return 1, path.name
        return 2 + (path.parent.name == "experiments"), path.name

    return sorted(nbs.rglob("[!.]*.ipynb"), key=place)


def entry(path, nbs):
    "A line of the navigation, {title: page}, from the notebook's name and first heading."
    heading = nbformat.read(path, as_version=4).cells[0].source.split("\n")[0].lstrip("# ")
    return {f"{room(path) or ''} {heading}".strip(): path.relative_to(nbs).as_posix()}


def navigation(nbs):
    "Floor by floor; rooms of the appendix stand in one section with their front door."
    sections = {floor: [] for floor in ("", *FLOORS, "Experiments")}
    for number, paths in itertools.groupby(in_order(nbs), lambda p: (room(p) or p.stem)[:2]):
        paths = list(paths)
        pages = [entry(p, nbs) for p in paths]
        if paths[0].parent.name == "experiments":
            sections["Experiments"] += pages
        elif number == "00" or not room(paths[0]):
            sections[""] += pages
        elif len(pages) > 1:
            sections[FLOORS[int(number[0])]].append({next(iter(pages[0])): pages})
        else:
            sections[FLOORS[int(number[0])]] += pages
    return [*sections.pop(""), *({name: pages} for name, pages in sections.items() if pages)]


# ------------------------------------------------------------ the pages


def linked(cell, here):
    "A cell's Markdown, with links that lead to pages; of a link to a folder the text remains."

    def text_alone(m):
        return m[1] if (here / m[2]).is_dir() else m[0]

    def to_page(m):  # figures/ lies beside nbs/, in the site below it
        return m[1] + re.sub(r"\.(ipynb|md)$", ".html", m[2].replace("../figures/", "figures/"))

    return LINK.sub(to_page, TEXT_LINK.sub(text_alone, cell.source))


def prepared(nb, here):
    "The notebook as the site shows it. What a directive says becomes a tag of its cell."
    nb.cells = [c for c in nb.cells if shown(c)]
    for c in nb.cells:
        if c.cell_type == "markdown":
            c.source = linked(c, here)
            continue
        said = DIRECTIVE.findall(c.source)
        tags = {"fold": "code-fold: true", "no-input": "echo: false"}
        c.metadata = nbformat.from_dict({"tags": [t for t, words in tags.items() if words in said]})
        c.source = DIRECTIVE.sub("", c.source).strip()
        c.outputs = [o for o in c.outputs if o.get("name") != "stderr"]
        for o in c.outputs:
            o.get("data", {}).pop(WIDGET, None)
    nb.cells = [c for c in nb.cells if c.source]
    return nb


def write_notebook(path, page, nbs):
    "A notebook's page, and one of its module's docstrings where it exports one."
    nb = nbformat.read(path, as_version=4)
    module = re.search(r"#\| default_exp (\w+)", "\n".join(c.source for c in nb.cells))
    nb = prepared(nb, path.parent)
    page.parent.mkdir(parents=True, exist_ok=True)
    if module:
        up = "../" * len(path.relative_to(nbs).parent.parts)
        to_module = f"*Module: [cmi_mtl.{module[1]}]({up}api/{module[1]}.html)*"
        nb.cells.insert(1, new_markdown_cell(to_module))
        chapter = f"../{path.relative_to(nbs).with_suffix('.html').as_posix()}"
        text = f"# cmi_mtl.{module[1]}\n\n[The chapter]({chapter})\n\n::: cmi_mtl.{module[1]}\n"
        (page.parent / up / "api").mkdir(exist_ok=True)
        (page.parent / up / f"api/{module[1]}.md").write_text(text, encoding="utf-8")
    nbformat.write(nb, page)
    return module and {f"cmi_mtl.{module[1]}": f"api/{module[1]}.md"}


def on_config(config):
    "Write the pages' sources, and say in which order they stand."
    top, pages = Path(config.config_file_path).parent, Path(PAGES.name)
    nbs = top / "nbs"
    modules = [write_notebook(p, pages / p.relative_to(nbs), nbs) for p in in_order(nbs)]
    for path in (top / "figures").iterdir():
        page = pages / "figures" / path.name
        if path.suffix == ".ipynb":
            write_notebook(path, page, top / "figures")
        elif path.suffix in (".md", ".png", ".svg"):
            page.parent.mkdir(exist_ok=True)
            shutil.copy(path, page)
    mathjax = Path(importlib.util.find_spec("mathjax").origin).parent / "static/mathjax/es5"
    here = Path(__file__).parent
    for path in (here / "site.css", here / "mathjax.js", mathjax / "tex-svg-full.js"):
        shutil.copy(path, pages)
    config.docs_dir = str(pages)
    config.nav = [*navigation(nbs), {"Modules": [m for m in modules if m]}]
    return config


def on_page_content(html, page, config, files):
    "Of mkdocs-jupyter's page the cells alone, in the theme's clothes; answers are folded."
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    soup = BeautifulSoup(html, "html.parser")
    # JupyterLab's styles (0.6 MB a page), a copy button beside the theme's, Mermaid from elsewhere
    for tag in soup(["style", "script"]) + soup.select(
        ".zeroclipboard-container, .clipboard-copy-txt, .celltoolbar, .jp-InputPrompt"
    ):
        tag.decompose()
    for block in soup.select(".highlight-ipynb"):
        block["class"] = "highlight"
        code = soup.new_tag("code")
        code.extend(list(block.pre.contents))
        block.pre.append(code)
    for anchor in soup.select("a.anchor-link"):
        anchor["class"], anchor.string = "headerlink", "¶"
    for cell in soup.select(".celltag_fold"):
        details = cell.wrap(soup.new_tag("details", attrs={"class": "example"}))
        summary = soup.new_tag("summary")
        summary.string = "An answer"
        details.insert(0, summary)
    return str(soup)
