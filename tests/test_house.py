"The measure of the house: short lines, short cells, modules one can take in, no statement beside another."

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p.relative_to(ROOT)
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not p.parent.name.startswith(".")
)
PYTHON = TransformerManager()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=str)


def code_of(path):
    "The code cells of a notebook, directives included."
    cells = nbformat.read(ROOT / path, as_version=4).cells
    return [c.source for c in cells if c.cell_type == "code"]


def holds_c(source):
    "Whether a cell holds a piece of C, whose length counts as one line."
    return 'r"""' in source and re.search(r"^\s*/\*|^#define|^#include", source, re.M) is not None


@each_notebook
def test_lines_and_cells_are_short(path):
    for source in code_of(path):
        lines = source.splitlines()
        assert not [x for x in lines if len(x) > 100], "a line has at most 100 columns"
        assert len(lines) <= 40 or holds_c(source), f"a cell has at most 40 lines: {lines[0]}"


def semicolons(source):
    "Lines on which a statement begins beside another."
    tree = ast.parse(PYTHON.transform_cell(source))
    beside = []
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if not isinstance(statements, list):
                continue
            ends = [s.end_lineno for s in statements]
            beside += [s.lineno for s, end in zip(statements[1:], ends) if s.lineno == end]
    return beside


@each_notebook
def test_no_statement_stands_beside_another(path):
    assert not [s for s in code_of(path) if semicolons(s)]


SWITCHES = re.compile(r"^torch\.(set_grad_enabled|set_default_dtype|inference_mode)\(", re.M)


@each_notebook
def test_a_notebook_leaves_torch_as_it_was(path):
    "`nbdev_test` runs one notebook after another in a process: a switch would stay as it was put."
    assert not [s for s in code_of(path) if SWITCHES.search(s)]


def test_a_semicolon_is_found():
    assert semicolons("x = 1; y = 2") == [1] and not semicolons("x = 'a; b'\ny = 2")


@pytest.mark.parametrize("path", sorted((ROOT / "cmi_mtl").glob("*.py")), ids=lambda p: p.name)
def test_a_module_can_be_taken_in(path):
    if path.name != "_modidx.py":  # nbdev's index
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_a_line_has_few_syntax_nodes():
    nodes = lines = 0
    for path in NOTEBOOKS:
        for source in code_of(path):
            nodes += sum(1 for _ in ast.walk(ast.parse(PYTHON.transform_cell(source))))
            lines += sum(
                bool(x.strip()) and not x.strip().startswith("#") for x in source.splitlines()
            )
    assert nodes / lines <= 12


@pytest.mark.parametrize("what", [("format", "--check"), ("check",)], ids=" ".join)
def test_ruff_has_nothing_to_say(what):
    "`make lint`."
    command = [sys.executable, "-m", "ruff", *what, "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_modules_import_nothing_that_they_do_not_use():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F401", "cmi_mtl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
