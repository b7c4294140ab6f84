"""What `mkdocs build` does beside its plugins: pages and navigation, from the notebooks alone.

nbconvert writes the notebooks as Markdown into a temporary folder. A new one needs no entry:
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
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from readme import DIRECTIVE, LINK, shown

FLOORS = ("Ground", "Data", "Model", "Training", "Looking and tables")
PAGES = tempfile.TemporaryDirectory(prefix="cmi_mtl_docs_")
TEXT_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
FOLDED = '<details class="example" markdown="1"><summary>An answer</summary>', "</details>"
EXPORTER = MarkdownExporter()


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
    return {
        f"{room(path) or ''} {heading}".strip(): path.relative_to(nbs).with_suffix(".md").as_posix()
    }


def navigation(nbs):
    "Floor by floor; rooms of the appendix stand in one section with their front door."
    sections = {floor: [] for floor in ("", *FLOORS, "Experiments")}
    for number, paths in itertools.groupby(in_order(nbs), lambda p: (room(p) or p.stem)[:2]):
        paths = list(paths)
        pages = [entry(p, nbs) for p in paths]
        if paths[0].parent.name == "experiments":
            sections["Experiments"] += pages
        elif number in ("in", "00"):
            sections[""] += pages
        elif not room(paths[0]):
            sections[FLOORS[-1]] += pages
        elif len(pages) > 1:
            sections[FLOORS[int(number[0])]].append({next(iter(pages[0])): pages})
        else:
            sections[FLOORS[int(number[0])]] += pages
    return [*sections.pop(""), *({name: pages} for name, pages in sections.items() if pages)]


# ------------------------------------------------------------ the pages


def linked(source, here):
    "Markdown with links that lead to pages; of a link to a folder the text remains."

    def text_alone(m):
        return m[1] if (here / m[2]).is_dir() else m[0]

    def to_page(m):  # figures/ lies beside nbs/, in the site below it
        below = m[2].replace("../figures/", "figures/").replace("../nbs/", "../")
        return m[1] + below.replace(".ipynb", ".md")

    return LINK.sub(to_page, TEXT_LINK.sub(text_alone, source))


def prepared(nb, here):
    "The notebook's cells as the site shows them: what the directives say is done, and they go."
    for cell in filter(shown, nb.cells):
        if cell.cell_type == "markdown":
            yield new_markdown_cell(linked(cell.source, here))
            continue
        said = DIRECTIVE.findall(cell.source)
        cell.source = DIRECTIVE.sub("", cell.source).strip()
        hidden = {"remove_source": "echo: false" in said}
        cell.metadata = nbformat.from_dict({"transient": hidden})
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        around = FOLDED if "code-fold: true" in said else ()
        if cell.source:
            yield from map(new_markdown_cell, around[:1])
            yield cell
            yield from map(new_markdown_cell, around[1:])


def write_notebook(path, nbs, pages):
    "A notebook's page with its pictures, and one of its module's docstrings; that one's entry."
    nb, name = nbformat.read(path, as_version=4), path.relative_to(nbs).with_suffix(".md")
    module = re.search(r"#\| default_exp (\w+)", "\n".join(c.source for c in nb.cells))
    nb.cells = list(prepared(nb, path.parent))
    nb.metadata.language_info = nbformat.from_dict({"name": "python"})
    written = {}
    if module:
        api, up = f"api/{module[1]}.md", "../" * len(name.parent.parts)
        nb.cells.insert(1, new_markdown_cell(f"*Module: [cmi_mtl.{module[1]}]({up}{api})*"))
        title = f"cmi_mtl.{module[1]}"
        written[api] = f"# {title}\n\n[The chapter](../{name})\n\n::: {title}\n".encode()
    resources = {"output_files_dir": f"{path.stem}_files"}
    text, found = EXPORTER.from_notebook_node(nb, resources)
    # a table that is not of a class gets the theme's clothes, and scrolls on a phone
    written[name] = text.replace('<table border="1" class="dataframe">', "<table>").encode()
    written |= {name.parent / picture: data for picture, data in found["outputs"].items()}
    for page, data in written.items():
        (pages / page).parent.mkdir(parents=True, exist_ok=True)
        (pages / page).write_bytes(data)
    return {title: api} if module else None


def on_config(config):
    "Write the pages' sources, and say in which order they stand."
    top, pages = Path(config.config_file_path).parent, Path(PAGES.name)
    nbs, figures = top / "nbs", top / "figures"
    modules = [write_notebook(path, nbs, pages) for path in in_order(nbs)]
    (pages / "figures").mkdir(exist_ok=True)
    for path in figures.iterdir():
        if path.suffix == ".ipynb":
            write_notebook(path, figures, pages / "figures")
        elif path.suffix == ".md":
            text = linked(path.read_text(encoding="utf-8"), figures)
            (pages / "figures" / path.name).write_text(text, encoding="utf-8")
        elif path.suffix in (".png", ".svg"):
            shutil.copy(path, pages / "figures")
    mathjax = Path(importlib.util.find_spec("mathjax").origin).parent / "static/mathjax/es5"
    here = Path(__file__).parent
    for path in (here / "site.css", here / "mathjax.js", mathjax / "tex-svg-full.js"):
        shutil.copy(path, pages)
    config.docs_dir = str(pages)
    config.nav = [*navigation(nbs), {"Modules": [m for m in modules if m]}]
    return config
