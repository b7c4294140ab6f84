"The repository in step with itself: package, README, notebooks, package lists; and no benchmark data in it."

import ast
import base64
import collections
import configparser
import fnmatch
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import made_data
import nbformat
import pytest
import readme
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

from cmi_mtl.core import data_home

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def tree():
    "The files that git holds or would hold, as paths below the top. Works where there is no git."
    ignored = [
        ".git",
        *(line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()),
    ]
    out = []
    for folder, folders, files in os.walk(ROOT):

        def keep(names):
            return sorted(n for n in names if not any(fnmatch.fnmatch(n, i) for i in ignored))

        folders[:] = keep(folders)
        out += [(Path(folder) / f).relative_to(ROOT) for f in keep(files)]
    return out


NOTEBOOKS = [p for p in tree() if p.suffix == ".ipynb"]
CHAPTERS = [p for p in NOTEBOOKS if p.parent.name in ("nbs", "appendix") and p.name[0].isdigit()]
each_notebook = pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.parts[0] == "nbs"], ids=str
)


@functools.cache
def cells(path):
    return nbformat.read(ROOT / path, as_version=4).cells


def code_of(path):
    return [c for c in cells(path) if c.cell_type == "code"]


def output_texts(path):
    "Every text that the outputs of a notebook show."
    for c in code_of(path):
        for o in c.outputs:
            yield from (o[k] for k in ("text", "evalue") if k in o)
            yield from (
                v
                for k, v in o.get("data", {}).items()
                if isinstance(v, str) and not k.startswith("image/")
            )


# ---------------------------------------------------------------- package, README and notebooks in step


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the tree, in which tools may write."
    top = tmp_path_factory.mktemp("copy")
    made_data.write({str(p): (ROOT / p).read_bytes() for p in tree()}, top)
    return top


@pytest.mark.parametrize("tool", ["nbdev_export", "nbdev_clean"])
def test_tool_changes_nothing(copy, tool):
    before = made_data.listing(copy)
    assert {"cmi_mtl/core.py", "nbs/01_core.ipynb"} <= set(before)
    env = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [Path(sys.executable).with_name(tool)],
        cwd=copy,
        env=env,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    after = made_data.listing(copy)
    changed = [
        p for p in before | after if before.get(p) != after.get(p) and "__pycache__" not in p
    ]
    assert not changed, f"run {tool}: it changes {', '.join(changed)}"


def test_readme_is_as_its_notebook_says():
    changed = readme.differing(ROOT, readme.render(ROOT))
    assert not changed, f"run `make readme`: it changes {', '.join(changed)}"


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [
        m[2] for m in readme.LINK.finditer(text) if not (ROOT / m[2].split("#")[0]).exists()
    ] == []


def picture_output():
    out = io.BytesIO()
    Image.new("L", (4, 4)).save(out, "PNG")
    return new_output(
        "display_data",
        {"image/png": base64.b64encode(out.getvalue()).decode(), "text/plain": "<Figure>"},
    )


def test_readme_generator(tmp_path, capsys):
    nb = new_notebook(
        cells=[
            new_raw_cell("---\ntitle: x\n---"),
            new_markdown_cell(
                "# Title\n\n[a](01_core.ipynb) [b](../figures/b.png) [c](https://c.org) [d](#d)"
            ),
            new_code_cell("#| hide\nimport hidden"),
            new_code_cell(
                "#| echo: false\nsilent()",
                outputs=[new_output("stream", name="stderr", text="progress"), picture_output()],
            ),
            new_code_cell(
                "#| eval: false\nspoken()",
                outputs=[new_output("stream", text="said\n"), picture_output()],
            ),
        ]
    )
    (tmp_path / "nbs").mkdir()
    nbformat.write(nb, tmp_path / "nbs/index.ipynb")
    made_data.write({"figures/index_7.png": b"old", "figures/other.png": b"stays"}, tmp_path)
    assert readme.main(["--check"], tmp_path) == 1 and not (tmp_path / "README.md").exists()
    err = capsys.readouterr().err
    assert (
        err
        == "`make readme` would change README.md, figures/index_1.png, figures/index_2.png, figures/index_7.png\n"
    )
    assert readme.main([], tmp_path) == 0 == readme.main(["--check"], tmp_path)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [
        "index_1.png",
        "index_2.png",
        "other.png",
    ]
    text, first = (tmp_path / "README.md").read_text(encoding="utf-8"), made_data.listing(tmp_path)
    assert text.startswith(readme.NOTE + "# Title\n")
    assert "[a](nbs/01_core.ipynb) [b](figures/b.png) [c](https://c.org) [d](#d)" in text
    assert (
        text.index("(figures/index_1.png)")
        < text.index("spoken()")
        < text.index("said")
        < text.index("(figures/index_2")
    )
    for absent in ("title: x", "hidden", "silent", "progress", "eval", "#|", "<Figure>", "\n\n\n"):
        assert absent not in text
    (tmp_path / "README.md").unlink()
    readme.main([], tmp_path)
    assert made_data.listing(tmp_path) == first


# ---------------------------------------------------------------- notebooks


@each_notebook
def test_notebook_is_a_chapter_without_errors(path):
    first = next(c for c in cells(path) if c.cell_type != "raw")
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n\n> \S.*(\n\n|$)", first.source), (
        "begin with '# Title', an empty line, '> One line that says what it is about'"
    )
    assert not [o.ename for c in code_of(path) for o in c.outputs if o.output_type == "error"]
    extra = set(nbformat.read(ROOT / path, as_version=4).metadata) - {"kernelspec"}
    assert not extra, f"metadata {', '.join(extra)}: delete it, it only makes the file large"


def imported(source):
    "Names of the cmi_mtl modules that some Python source imports, by either kind of import."
    for node in ast.walk(ast.parse(source)):
        names = (
            [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        )
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cmi_mtl":
            names = (
                [f"{node.module}.{n}" for n in names] if node.module == "cmi_mtl" else [node.module]
            )
        elif isinstance(node, ast.ImportFrom):
            continue
        yield from (n.split(".")[1] for n in names if n.startswith("cmi_mtl."))


def place(path):
    "Where a room stands: 29a, of the appendix, lies under 29 and above 28."
    number, letter = re.match(r"(\d+)([a-z]?)_", path.name).groups()
    assert bool(letter) == (path.parent.name == "appendix"), f"{path}: appendix rooms have a letter"
    return int(number), letter or "~"


def exported(path):
    "The module that a chapter exports; None for one that only tells, such as 00_paper."
    named = re.search(r"#\| default_exp (\w+)", "\n".join(c.source for c in code_of(path)))
    return named and named[1]


def test_each_chapter_imports_from_lower_numbers_only():
    "A chapter without a module may import from any room, since nothing can import from it."
    module = {p: m for p in CHAPTERS if (m := exported(p))}
    assert {p.name for p in set(CHAPTERS) - set(module)} == {"00_paper.ipynb"}
    number = {m: place(p) for p, m in module.items()}
    assert len(set(map(place, CHAPTERS))) == len(CHAPTERS) >= 13
    for path in module:
        for c in code_of(path):
            source = re.sub(r"^\s*[%!].*$", "", c.source, flags=re.M)
            late = {
                m
                for m in imported(source)
                if m != module[path] and number[m] >= number[module[path]]
            }
            assert not late, f"{path} imports {late}"


def test_appendix_rooms_lie_below_the_room_of_their_number():
    rooms = ["nbs/20_x.ipynb", "nbs/appendix/21a_x.ipynb", "nbs/appendix/21b_x.ipynb"]
    rooms += ["nbs/21_x.ipynb", "nbs/appendix/22a_x.ipynb", "nbs/22_x.ipynb"]
    assert sorted(rooms[::-1], key=lambda p: place(Path(p))) == rooms
    for wrong in ("nbs/21a_x.ipynb", "nbs/appendix/21_x.ipynb"):
        with pytest.raises(AssertionError, match="have a letter"):
            place(Path(wrong))


def test_imported_finds_every_kind():
    source = "import cmi_mtl.a as x\nfrom cmi_mtl.b import y\nfrom cmi_mtl import c\nif 1:\n  import numpy, cmi_mtl.d\nfrom os import e"
    assert sorted(imported(source)) == ["a", "b", "c", "d"]


# ---------------------------------------------------------------- the same on every machine

OPENERS = {"open", "read_text", "write_text"}
PROCESSES = {"run", "Popen", "check_output"}


def without_encoding(source):
    "Lines of Python that open a text file, or read a process as text, in the encoding that the machine happens to have."
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        owner = getattr(getattr(node.func, "value", None), "id", None)
        given = {k.arg for k in node.keywords} | {
            k.value for k in node.args if isinstance(k, ast.Constant)
        }
        binary = any(isinstance(g, str) and re.fullmatch(r"[rwax]\+?b", g) for g in given)
        opens = (
            name in OPENERS
            and owner not in ("Image", "os", "webbrowser", "zipfile")
            and isinstance(node.func, (ast.Name, ast.Attribute))
        )
        if name in ("read_text", "write_text") and isinstance(node.func, ast.Name):
            continue  # the package's own, always UTF-8
        as_text = (
            name in PROCESSES and owner == "subprocess" and {"text", "universal_newlines"} & given
        )
        if (opens and not binary or as_text) and "encoding" not in given:
            yield node.lineno


@pytest.mark.parametrize(
    "path",
    [p for p in tree() if p.suffix in (".ipynb", ".py") and p.parts[0] in ("nbs", "tests")],
    ids=str,
)
def test_text_files_are_opened_with_their_encoding(path):
    sources = (
        [c.source for c in code_of(path)]
        if path.suffix == ".ipynb"
        else [(ROOT / path).read_text(encoding="utf-8")]
    )
    found = [
        s.splitlines()[n - 1].strip()
        for s in sources
        for n in without_encoding(re.sub(r"^\s*[%!].*$", "", s, flags=re.M))
    ]
    assert not found, "name the encoding"


def test_openers_without_encoding_are_found():
    source = "open(p)\nopen(p, 'rb')\nq.read_text()\nq.write_text('x', encoding='utf-8')\nImage.open(p)\nsubprocess.run(c, text=True)\nq.open('wb')"
    assert list(without_encoding(source)) == [1, 3, 6]


def test_waiting_threads_sleep_wherever_the_package_is_imported():
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {
        "PYTHONPATH": str(ROOT)
    }
    program = "import cmi_mtl, os, subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; print(os.environ[\"OMP_WAIT_POLICY\"])'])"
    for given, seen in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**env, **given},
            capture_output=True,
            encoding="utf-8",
        )
        assert done.stdout.strip() == seen, done.stderr


# ---------------------------------------------------------------- package lists


def bare(requirement):
    return re.split(r"[\s<>=!~;\[]", requirement.strip())[0].lower().replace("_", "-")


def test_three_lists_name_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"core": project["dependencies"], **project["optional-dependencies"]}
    assert set(lists) == {"core", "dev", "cuda", "dicom"}
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    for part, key in (
        ("core", "requirements"),
        ("dev", "dev_requirements"),
        ("cuda", "cuda_requirements"),
        ("dicom", "dicom_requirements"),
    ):
        named = settings["DEFAULT"][key].split()
        assert sorted(map(bare, named)) == sorted(map(bare, lists[part])), f"settings.ini, {key}"
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    by_pip = next(d["pip"] for d in conda if isinstance(d, dict))
    ours = itertools.chain(*lists.values())
    here = [r for r in by_pip if not r.startswith("-")] + [
        d for d in conda if isinstance(d, str) and bare(d) in set(map(bare, ours))
    ]
    assert sorted(map(bare, here)) == sorted(bare(r) for part in lists.values() for r in part), (
        "environment.yml"
    )
    bound = {bare(r): r[len(bare(r)) :] for part in lists.values() for r in part}
    assert not [r for r in here if r[len(bare(r)) :] not in ("", bound[bare(r)])], (
        "environment.yml has another bound"
    )
    assert project["requires-python"] == f">={settings['DEFAULT']['min_python']}"


def pins():
    lines = [
        line
        for line in (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").split("\n")
        if line and not line.startswith("#")
    ]
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.+-]+)", line).groups() for line in lines]
    out = {bare(name): version for name, version in pairs}
    assert len(out) == len(lines), "a package is pinned twice"
    return out


def test_pins_serve_every_python_3_11():
    "Debian 12 has 3.11.2: a pin that asks for a later patch of Python cannot be installed there."
    too_new = {}
    for name in pins():
        try:
            asks = importlib.metadata.metadata(name)["Requires-Python"]
        except importlib.metadata.PackageNotFoundError:
            continue  # another system's
        if asks and "3.11.0" not in SpecifierSet(asks):
            too_new[name] = asks
    assert not too_new, f"pin an earlier version in .ci/constraints.txt: {too_new}"


def test_everything_installed_by_make_is_pinned():
    "The direct dependencies, and what they need in turn (what torch needs beside depends on its build)."
    pinned, project = (
        pins(),
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"],
    )
    assert pinned["torch"] == "2.13.0" and pinned["nbdev"] == "2.4.14"
    wanted = [
        Requirement(r) for r in project["dependencies"] + project["optional-dependencies"]["dev"]
    ]
    for r in wanted:
        assert pinned[bare(r.name)] in r.specifier, f"the pin of {r.name} is not {r.specifier}"
    seen = set()
    while wanted:
        r = wanted.pop()
        name = bare(r.name)
        if (name, *r.extras) in seen:
            continue
        seen.add((name, *r.extras))
        assert name in pinned, f"{name} is installed but not pinned in .ci/constraints.txt"
        if name == "torch":
            continue
        for text in importlib.metadata.requires(name) or ():
            needed = Requirement(text)
            if not needed.marker or any(
                needed.marker.evaluate({"extra": e}) for e in ("", *r.extras)
            ):
                wanted.append(needed)


def test_ci_runs_the_test_command_of_the_readme():
    blocks = re.findall(
        r"^```(?:sh|bash)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    commands = [line.split("#")[0].strip() for b in blocks for line in b.split("\n")]
    assert {"make run", "make test"} <= set(commands)
    ci = [line.strip() for line in (ROOT / ".ci/run").read_text(encoding="utf-8").split("\n")]
    assert ci.count("make test") == 1 and os.access(ROOT / ".ci/run", os.X_OK)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"run", "test", "readme", "help"} <= set(targets)


# ---------------------------------------------------------------- nothing of the benchmarks in the repository


def words(text):
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


class QuestionFinder:
    "Finds questions of at least five words in a text, whatever its case, spacing and punctuation."

    def __init__(self, questions):
        self.by_start = collections.defaultdict(set)
        for q in questions:
            if len(w := words(q)) >= 5:
                self.by_start[w[:5]].add(w)

    def __call__(self, text):
        w = words(text)
        return {
            " ".join(q)
            for i in range(len(w) - 4)
            for q in self.by_start.get(w[i : i + 5], ())
            if w[i : i + len(q)] == q
        }


def benchmark_questions(folder):
    "The questions in the JSON and JSONL files right in a data set's folder."
    for path in sorted(folder.glob("*.json")):
        yield from (row["question"] for row in json.loads(path.read_text(encoding="utf-8")))


def benchmark_folders():
    return [
        data_home() / n
        for n in ("vqa_rad", "slake", "vqa_rad_hub", "ovqa")
        if (data_home() / n).is_dir()
    ]


def phantom_questions():
    "Every question that the phantom data can ask: kinds of phrasing by the subjects that occur in a sample."
    from cmi_mtl.phantom import load_phantom
    from cmi_mtl.questions import KINDS

    subjects = {s.question for s in load_phantom(n_images=60, size=48)}
    return subjects | {p for _, _, phrasings in KINDS.values() for p in phrasings}


def published_texts():
    "What the repository shows to readers beside its own code: outputs, README, the files in figures/."
    for p in tree():
        if p.suffix == ".ipynb":
            yield p, "\n".join(output_texts(p))
        elif p.suffix in (".md", ".csv", ".json", ".jsonl", ".svg", ".html", ".txt", ".yml"):
            yield p, (ROOT / p).read_text(encoding="utf-8")


def equal_files(folders, paths):
    "Those of `paths` that hold the bytes of a file in `folders`."

    def digest(p):
        return hashlib.sha256(p.read_bytes()).digest()

    sizes = collections.defaultdict(list)
    for p in paths:
        if p.stat().st_size > 200:
            sizes[p.stat().st_size].append(p)
    theirs = (p for f in folders for p in f.rglob("*") if p.is_file() and p.stat().st_size in sizes)
    return {p for t in theirs for p in sizes[t.stat().st_size] if digest(p) == digest(t)}


def test_no_benchmark_data_in_the_repository():
    "On data at hand. Where there are none, the next test still shows that this check can find something."
    folders = benchmark_folders()
    assert equal_files(folders, [ROOT / p for p in tree()]) == set()
    find, ours = (
        QuestionFinder(q for f in folders for q in benchmark_questions(f)),
        {" ".join(words(q)) for q in phantom_questions()},
    )
    found = {str(p): hits for p, text in published_texts() if (hits := find(text) - ours)}
    assert not found


def test_the_check_for_benchmark_data_finds_them(tmp_path):
    folder = made_data.write(made_data.rad_files(), tmp_path / "vqa_rad")
    (tmp_path / "mine").mkdir()
    shutil.copy(folder / "images/made1.jpg", tmp_path / "mine/copied.png")
    (tmp_path / "mine/other.png").write_bytes(made_data.picture(99))
    assert equal_files([folder], sorted((tmp_path / "mine").iterdir())) == {
        tmp_path / "mine/copied.png"
    }
    find = QuestionFinder(benchmark_questions(folder))
    assert find("we ask 'INVENTED  test\nquestion number 3' of it") == {
        "invented test question number 3"
    }
    assert not find("Invented test question number") and not find("an invented question number 3")
    assert not QuestionFinder(["Is it big?"])("Is it big?")


# ---------------------------------------------------------------- the package alone

ALONE = """
    import importlib.abc, pkgutil, sys
    BLOCKED = {"nbdev", "fastcore", "papermill", "execnb", "nbformat", "mambapy", "mamba_ssm", "causal_conv1d", "IPython", "ipywidgets", "captum",
               "voila", "playwright"}

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in BLOCKED: raise ModuleNotFoundError(f"{name} is blocked", name=name)

    sys.meta_path.insert(0, Blocker())
    from cmi_mtl.datasets import load_dataset
    folder, options = sys.argv[1], {"n_images": 30, "size": 48}
    picture = load_dataset("phantom", **options)[0].image  # before all modules are imported
    import importlib, cmi_mtl
    for module in pkgutil.iter_modules(cmi_mtl.__path__): importlib.import_module(f"cmi_mtl.{module.name}")
    from cmi_mtl.model import CMIMTL
    from cmi_mtl.settings import make_settings
    from cmi_mtl.train import train
    train(make_settings("phantom", data_options=options, epochs=1, device="cpu"), folder)
    answer = CMIMTL.from_pretrained(folder + "/model").answer(picture, "Is this a chest x-ray?")
    assert answer.answer and 0 < answer.confidence <= 1 and isinstance(answer.generated, str), answer
    assert not BLOCKED & {m.split(".")[0] for m in sys.modules}
    print("answered:", answer.answer)
"""


def test_package_works_without_the_notebook_tools(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALONE), tmp_path],
        env=env,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answered:" in done.stdout and (tmp_path / "record.json").exists()
