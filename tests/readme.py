"""README.md from nbs/index.ipynb, by nbconvert (nbdev_readme needs Quarto, which no package registry carries).

`python tests/readme.py` writes README.md and its pictures, figures/index_<n>.png; with --check it writes nothing, names the
files that would change and exits with 1. A cell that begins with `#| hide` is left out, one with `#| echo: false` shows its
outputs only. Paths in the notebook are relative to nbs/, in README.md to the top."""

import os
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit it there. -->\n\n"
LINK = re.compile(r"""(\]\(|(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)""")
DIRECTIVE = re.compile(r"^#\|\s*(.*)$", re.M)


def shown(cell):
    "Whether a reader of the README sees the cell."
    return (
        cell.cell_type != "raw"
        and "hide" not in DIRECTIVE.findall(cell.source)
        and cell.source.strip()
    )


def prepared(nb):
    "The notebook without what is not to be seen: hidden cells, directives, progress bars and warnings."
    nb.cells = [c for c in nb.cells if shown(c)]
    for c in nb.cells:
        if c.cell_type == "markdown":
            c.source = LINK.sub(
                lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), c.source
            )
            continue
        c.metadata = nbformat.from_dict(
            {"transient": {"remove_source": "echo: false" in DIRECTIVE.findall(c.source)}}
        )
        c.source = DIRECTIVE.sub("", c.source).strip()
        c.outputs = [o for o in c.outputs if o.get("name") != "stderr"]
    return nb


def render(root):
    "README.md and its pictures as they should be: path below `root` -> bytes."
    nb = prepared(nbformat.read(root / "nbs" / "index.ipynb", as_version=4))
    text, found = MarkdownExporter().from_notebook_node(nb)
    files = {}
    for name in sorted(found["outputs"], key=text.find):
        path = f"figures/index_{len(files) + 1}{Path(name).suffix}"
        text = text.replace(f"![{Path(name).suffix[1:]}]({name})", f"![]({path})").replace(
            f"({name})", f"({path})"
        )
        files[path] = found["outputs"][name]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()
    return {"README.md": f"{NOTE}{text}\n".encode(), **files}


def differing(root, files):
    "Names of files that are missing, other than they should be, or no longer wanted."
    old = {p.relative_to(root).as_posix() for p in root.glob("figures/index_*")} - set(files)
    return sorted(
        old
        | {
            f
            for f, data in files.items()
            if not (root / f).is_file() or (root / f).read_bytes() != data
        }
    )


def main(argv, root):
    files = render(root)
    changed = differing(root, files)
    if "--check" in argv:
        if changed:
            print(f"`make readme` would change {', '.join(changed)}", file=sys.stderr)
        return int(bool(changed))
    for name in changed:
        if name not in files:
            os.remove(root / name)
        else:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(files[name])
    print(f"written: {', '.join(changed)}" if changed else "README.md is as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parent.parent))
