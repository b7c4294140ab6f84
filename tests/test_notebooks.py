"Stored outputs made by the code they stand under: here, and in a made-up tree for spoiling."

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import made_data
import nbformat
import notebooks
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
ONE, TWO, INDEX = "nbs/01_one.ipynb", "nbs/experiments/two.ipynb", "nbs/index.ipynb"
MACHINE = re.compile(r"(?<![\w.…:/])/(?:tmp|home|root|work|usr|opt|var|private|Users)/\w")


# ---------------------------------------------------------------- this repository


def test_stored_outputs_were_made_by_the_code_as_it_is(capfd):
    stale = notebooks.main(["--check"], ROOT)
    assert stale == 0, capfd.readouterr().err


@pytest.mark.parametrize("name", notebooks.notebooks_of(ROOT))
def test_stored_outputs_hold_no_path_of_a_machine_and_no_chatter(name):
    for i, cell in enumerate(nbformat.read(ROOT / name, as_version=4).cells, 1):
        for o in cell.get("outputs", ()):
            assert o.get("name") != "stderr", f"cell {i} shows stderr: run `make notebooks`"
            data = o.get("data", {})
            texts = [o.get("text", ""), *(str(data[k]) for k in data if k.startswith("text/"))]
            assert not any(map(MACHINE.search, texts)), f"cell {i} shows a path of the machine"


# ---------------------------------------------------------------- a made-up one

OWN = "from cmi_mtl.one import X"
PROGRAM = "import sys\nfrom cmi_mtl.other import SIGN\nprint(SIGN)"
ONE_CODE = [
    """
#| default_exp one
import sys, warnings
import matplotlib.pyplot as plt
from cmi_mtl.twice import twice""",
    """
print('twice', twice(), flush=True)
print('to stderr', file=sys.stderr, flush=True)
print('more')""",
    f"""
OWN = {OWN!r}
print(sys.executable == {sys.executable!r})""",
    """
%precision 3
plt.plot([1, 2])""",
    """
#| eval: false
1 / 0""",
    """
#| cuda
1 / 0""",
    """
import pathlib
pathlib.Path('..', 'figures', 'note.txt').write_text('new', encoding='utf-8');""",
]
TWO_CODE = [
    """
import os, cmi_mtl.value
print(os.path.basename(os.getcwd()), cmi_mtl.value.VALUE)""",
    f"""
PROGRAM = {PROGRAM!r}
print(os.path.isdir(os.environ['CMI_MTL_CACHE']), os.environ['OMP_NUM_THREADS'])""",
]
INDEX_CODE = [
    """
#| hide
import json, pathlib
MODEL = '../runs/model.json'""",
    """
for p in sorted(pathlib.Path('../figures/records').glob('*.json')):
    print(p.name, json.loads(p.read_text(encoding='utf-8')))""",
    """
print(pathlib.Path('../figures/note.txt').read_text(encoding='utf-8'))""",
]
CODE = {ONE: ONE_CODE, TWO: TWO_CODE, INDEX: INDEX_CODE}
FILES = {
    "cmi_mtl/__init__.py": "",
    "cmi_mtl/value.py": '"Prose."\nVALUE = 21\n',
    "cmi_mtl/twice.py": "from .value import VALUE\n\ndef twice(): return 2 * VALUE\n",
    "cmi_mtl/other.py": "SIGN = 1\n",
    "cmi_mtl/one.py": "X = 1\n",
    "cmi_mtl/unused.py": "Y = 1\n",
    "figures/records/a.json": '{"score": 70}',
    "figures/records/deep/b.json": "{}",
    "figures/note.txt": "old",
    "runs/model.json": "1",
    "runs/kernels/python3/kernel.json": '{"argv": ["false"], "display_name": "x", "language": "x"}',
}


def made_notebook(codes):
    cells = [new_code_cell(c.strip()) for c in codes]
    kept = new_output("stream", text="stored by hand\n")
    for c in cells:
        if "1 / 0" in c.source:
            c.outputs = [kept]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    title = new_markdown_cell("# Made up\n\n> For a test.\n")
    return new_notebook(cells=[title, *cells], metadata=kernel)


def read(top, name):
    return nbformat.read(top / name, as_version=4)


def edit(top, name, old, new):
    "Replace a part of a file."
    text = (top / name).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
    (top / name).write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    "The made-up repository after `make notebooks`, where another kernel claims to be python3."
    top = tmp_path_factory.mktemp("a b é")
    made_data.write({name: text.encode() for name, text in FILES.items()}, top)
    shutil.copy(ROOT / "settings.ini", top)
    for name, codes in CODE.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(made_notebook(codes), top / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(top / "runs"))
        patch.setenv("CMI_MTL_CACHE", "/nonexistent")
        patch.setenv("OMP_NUM_THREADS", "3")
        assert notebooks.main([], top) == 0
    return top


@pytest.fixture
def top(executed, tmp_path):
    return Path(shutil.copytree(executed, tmp_path / "top"))


def check(top, capsys):
    "What the check says of each notebook, without the last line."
    capsys.readouterr()
    before = made_data.listing(top)
    code, err = notebooks.main(["--check"], top), capsys.readouterr().err.splitlines()
    assert made_data.listing(top) == before, "a check writes nothing"
    assert code == bool(err)
    assert err[-1:] == ["run `make notebooks` and commit what it stores"][:code]
    return dict(line.split(": ", 1) for line in err[:-1])


def texts(top, name):
    "Of each code cell, the texts of its outputs."
    code = [c for c in read(top, name).cells if c.cell_type == "code"]
    return [[o.get("text") for o in c.outputs] for c in code]


def test_outputs_are_stored(executed):
    one = texts(executed, ONE)
    assert one[:3] == [[], ["twice 42\nmore\n"], ["True\n"]], "no stderr, this interpreter"
    assert one[4:6] == [["stored by hand\n"]] * 2, "what is not executed keeps its outputs"
    assert any("image/png" in o.get("data", {}) for o in read(executed, ONE).cells[4].outputs)
    assert texts(executed, TWO) == [["experiments 21\n"], ["True 1\n"]], "in its folder, one thread"
    assert texts(executed, INDEX)[1:] == [["a.json {'score': 70}\n"], ["new\n"]], "after the others"


def test_sidecar_is_one_line_a_notebook(executed):
    lines = (executed / notebooks.SIDECAR).read_text(encoding="utf-8").splitlines()
    entries = json.loads("\n".join(lines))
    assert len(lines) == 5 and list(entries) == sorted(CODE)
    assert {n: [*e["modules"], *e["files"]] for n, e in entries.items()} == {
        ONE: ["__init__", "twice", "value"],
        TWO: ["__init__", "other", "value"],
        INDEX: ["figures/note.txt", "figures/records"],
    }


def test_nbdev_clean_changes_nothing_of_what_is_stored(top):
    before = made_data.listing(top / "nbs")
    subprocess.run([Path(sys.executable).with_name("nbdev_clean")], cwd=top, check=True)
    assert made_data.listing(top / "nbs") == before


def test_all_is_up_to_date_after_execution(top, capsys):
    assert check(top, capsys) == {}
    before = made_data.listing(top)
    assert notebooks.main([], top) == 0
    assert capsys.readouterr().out.splitlines() == [f"{n}: up to date" for n in sorted(CODE)]
    assert made_data.listing(top) == before


CODE_CHANGED, BY_HAND = "its code changed", "its stored outputs changed by hand"
GONE = "no notebook of that name is executed"
TWICE, VALUE, UNUSED = (f"cmi_mtl/{m}.py changed" for m in ("twice", "value", "unused"))
BOTH = ONE, TWO
SPOILT = [
    (ONE, "twice 42", "twice 43", {ONE: BY_HAND}),
    (ONE, "iVBORw0KGgo", "iVBORw0KGgp", {ONE: BY_HAND}),
    (ONE, "print('more')", "print('less')", {ONE: CODE_CHANGED}),
    (ONE, "#| cuda", "#| hide", {ONE: CODE_CHANGED}),
    (ONE, "plt.plot([1, 2])", "plt.plot([1, 2]);", {ONE: CODE_CHANGED}),
    (ONE, "%precision 3", "%precision 4", {ONE: CODE_CHANGED}),
    (ONE, "%precision 3", "!true", {ONE: CODE_CHANGED}),
    ("cmi_mtl/twice.py", "2 * VALUE", "3 * VALUE", {ONE: TWICE}),
    ("cmi_mtl/twice.py", "from .value import VALUE", "VALUE = 21", {ONE: f"{TWICE}, {VALUE}"}),
    ("cmi_mtl/value.py", "21", "22", dict.fromkeys(BOTH, VALUE)),
    (
        "cmi_mtl/value.py",
        "VALUE",
        "from . import unused\nVALUE",
        dict.fromkeys(BOTH, f"{UNUSED}, {VALUE}"),
    ),
    ("cmi_mtl/other.py", "1", "-1", {TWO: "cmi_mtl/other.py changed"}),
    ("figures/records/a.json", "70", "71", {INDEX: "figures/records changed"}),
    ("figures/records/deep/b.json", "{}", "[]", {INDEX: "figures/records changed"}),
    ("figures/note.txt", "new", "newer", {INDEX: "figures/note.txt changed"}),
    (notebooks.SIDECAR, ONE, "nbs/gone.ipynb", {ONE: "it has no entry", "nbs/gone.ipynb": GONE}),
]


@pytest.mark.parametrize("name, old, new, expected", SPOILT)
def test_check_names_what_is_stale_and_why(top, capsys, name, old, new, expected):
    edit(top, name, old, new)
    assert check(top, capsys) == expected


def test_added_record_makes_the_index_stale(top, capsys):
    made_data.write({"figures/records/c.json": b"1"}, top)
    assert check(top, capsys) == {INDEX: "figures/records changed"}


@pytest.mark.parametrize(
    "name, old, new",
    [
        (ONE, "# Made up", "# Another title"),
        (ONE, "print('more')", "print( 'more' )   # and a comment"),
        (ONE, "plt.plot([1, 2])", "plt.plot([1,2])"),
        (ONE, "print('twice', ", 'print(\\n    \\"twice\\",\\n    '),
        (ONE, "#| default_exp one", "#| default_exp one\\n# a comment"),
        ("cmi_mtl/twice.py", "def", "# a comment\ndef"),
        ("cmi_mtl/value.py", "VALUE = 21", "VALUE  =  21"),
        ("cmi_mtl/value.py", "Prose.", "Other prose."),  # comes from the title of a notebook
        ("cmi_mtl/unused.py", "1", "2"),
        ("cmi_mtl/one.py", "1", "2"),
        ("runs/model.json", "1", "2"),
    ],
)
def test_comments_layout_prose_and_what_is_not_used_do_not_count(top, capsys, name, old, new):
    edit(top, name, old, new)
    assert check(top, capsys) == {}


def test_cells_of_comments_only_do_not_count(top, capsys):
    nb = read(top, ONE)
    nb.cells.insert(1, new_code_cell("# nothing but a comment"))
    nbformat.write(nb, top / ONE)
    assert check(top, capsys) == {}


def test_execution_counts_and_metadata_do_not_count(top, capsys):
    nb = read(top, ONE)
    for c in nb.cells[1:]:
        c.execution_count = 7
    nb.cells[4].outputs[-1].metadata["needs_background"] = "light"
    nbformat.write(nb, top / ONE)
    assert check(top, capsys) == {}


def test_moving_an_output_to_another_cell_counts(top, capsys):
    nb = read(top, ONE)
    nb.cells[2].outputs, nb.cells[3].outputs = [], nb.cells[2].outputs + nb.cells[3].outputs
    nbformat.write(nb, top / ONE)
    assert check(top, capsys) == {ONE: "its stored outputs changed by hand"}


def test_only_what_is_stale_is_executed_and_an_error_leaves_its_notebook_as_it_was(top, capfd):
    edit(top, ONE, "twice(), ", "twice(), 1 / 0, ")
    edit(top, "figures/records/a.json", "70", "71")
    before = made_data.listing(top)
    assert notebooks.main([], top) == 1
    out, err = capfd.readouterr()
    assert err.splitlines() == [
        f"error: {ONE}, cell 3 of 8 (\"print('twice', twice(), 1 / 0, flush=True)\"): "
        "ZeroDivisionError: division by zero",
        "1 failed; they and their entries stay as they were",
    ]
    assert f"{TWO}: up to date" in out and f"{INDEX}: executed" in out
    after = made_data.listing(top)
    assert {p for p in after if before.get(p) != after[p]} == {INDEX, notebooks.SIDECAR}
    assert list(before) == list(after)
    assert texts(top, INDEX)[1] == ["a.json {'score': 71}\n"]
    assert check(top, capfd) == {ONE: "its code changed"}


def test_edits_during_execution_and_a_dead_kernel_are_named(top, capsys):
    edits_itself = "open('two.ipynb', 'a', encoding='utf-8').write(' ')"
    for name, code in ((TWO, edits_itself), (ONE, "import os\nos._exit(1)")):
        nb = read(top, name)
        nb.cells.append(new_code_cell(code))
        nbformat.write(nb, top / name)
    sidecar = (top / notebooks.SIDECAR).read_bytes()
    assert notebooks.main([], top) == 1
    errors = sorted(capsys.readouterr().err.splitlines())
    assert errors[1:] == [
        f"error: {ONE}, cell 9 of 9 ('import os'): DeadKernelError: Kernel died",
        f"error: {TWO}, was edited while it was executed",
    ]
    assert (top / TWO).read_text(encoding="utf-8")[-1] == " "
    assert (top / notebooks.SIDECAR).read_bytes() == sidecar


def test_all_executes_what_is_up_to_date_and_a_hand_made_output_goes(top, capsys):
    for name in (TWO, ONE):
        (top / name).unlink()
    edit(top, INDEX, "a.json {'score': 70}", "a.json {'score': 99}")
    assert notebooks.main([], top) == 0
    assert texts(top, INDEX)[1] == ["a.json {'score': 70}\n"] and check(top, capsys) == {}
    assert list(json.loads((top / notebooks.SIDECAR).read_text(encoding="utf-8"))) == [INDEX]
    assert notebooks.main(["--all"], top) == 0
    assert f"{INDEX}: executed" in capsys.readouterr().out


def test_skip_exec_is_left_alone(top, capsys):
    edit(top, TWO, "# Made up", "# Made up\\n\\n- skip_exec: true")
    assert check(top, capsys) == {TWO: GONE}


@pytest.mark.parametrize(
    "name, message",
    [
        (TWO, f"{TWO} is no notebook. Mend its JSON"),
        (notebooks.SIDECAR, "nbs/outputs.json is not JSON. Delete it and run"),
    ],
)
def test_what_cannot_be_read_is_named(top, name, message):
    (top / name).write_text("<<<<<<< HEAD", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        notebooks.main(["--check"], top)
