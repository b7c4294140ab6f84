"""Stored outputs in step with their code: what changed is executed, CI compares digests.

nbs/outputs.json holds digests for each notebook: of its code cells, of each module of the package
that they import, of each file of the repository that they name, and of its stored outputs. Of code
the syntax tree counts: comments, layout and prose do not.

`python tests/notebooks.py` executes the notebooks whose digests differ, stores their outputs and
the new digests; --all executes every one; --check writes nothing, says which are stale and why, and
exits with 1. What nbdev_test does not execute (`#| eval: false`, the flags of settings.ini,
`skip_exec`) keeps the outputs it has."""

import argparse
import ast
import concurrent.futures
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor, extract_directives

from cmi_mtl.core import write_text

SIDECAR = "nbs/outputs.json"
LAST = "index.ipynb"  # reads what the others may have written
RUNS = "runs"  # what notebooks write there is no part of the repository
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
UNWANTED = ("MPLBACKEND", "CMI_MTL_MODEL")  # would take the pictures away, show the user's model


def digest(obj):
    "The first 16 hex digits of the SHA-256 of bytes, or of anything JSON can hold."
    data = obj if isinstance(obj, bytes) else json.dumps(obj, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


# ---------------------------------------------------------------- what outputs depend on


def tree_of(cell):
    "A code cell's syntax tree, magics as IPython's calls; None where it is no Python."
    try:
        return ast.parse(TransformerManager().transform_cell(cell.source))
    except SyntaxError:
        return None


def has_content(cell):
    "False for a code cell of comments only."
    tree = tree_of(cell)
    return bool(cell.outputs or tree is None or tree.body)


def code_cells(nb):
    return [c for c in nb.cells if c.cell_type == "code" and has_content(c)]


def directives(cell):
    return extract_directives(cell, remove=False)


def is_executed(cell, flags):
    "Whether nbdev_test executes the code cell."
    found = directives(cell)
    by_tag = "skip-execution" in cell.metadata.get("tags", [])
    return not by_tag and found.get("eval:") != ["false"] and not flags & set(found)


def normal(cell, flags):
    "What counts of a code cell. A semicolon at its end does: it hides the value."
    tree = tree_of(cell)
    code = cell.source if tree is None else ast.dump(tree)
    return [code, cell.source.rstrip().endswith(";"), is_executed(cell, flags)]


def imported(tree):
    "Names of the package's modules that a syntax tree imports, by any kind of import."
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            package = "cmi_mtl" if node.level else ""
            origin = ".".join(filter(None, [package, node.module]))
            names = [f"{origin}.{n}" for n in names]
        for n in names:
            if n.split(".")[0] == "cmi_mtl":
                yield (n + ".__init__").split(".")[1]


def strings(tree):
    constants = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    return [v for v in constants if isinstance(v, str)]


class Absolute(ast.NodeTransformer):
    "`from .core import x` as `from cmi_mtl.core import x`: nbdev writes now one, now the other."

    def visit_ImportFrom(self, node):
        if node.level:
            node.module = ".".join(filter(None, ["cmi_mtl", node.module]))
            node.level = 0
        return node


def modules_of(root):
    "Of each module of the package: its digest, without its docstring (prose), and what it imports."
    out = {}
    for path in sorted((root / "cmi_mtl").glob("*.py")):
        tree = Absolute().visit(ast.parse(path.read_text(encoding="utf-8")))
        if ast.get_docstring(tree):
            del tree.body[0]
        out[path.stem] = digest(ast.dump(tree)), set(imported(tree))
    return out


def needed(trees, own, modules):
    "Modules that code imports, itself, through others, or in a program held as text; not `own`."
    todo = {m for t in trees for m in imported(t)}
    program = re.compile(r"\bcmi_mtl(?:\.| import )(\w+)")
    todo |= {m for t in trees for s in strings(t) for m in program.findall(s)}
    found = set()
    while todo := todo & (set(modules) - found):
        found |= todo
        todo = {i for m in todo for i in modules[m][1]}
    return sorted((found | {"__init__"}) - {own}) if found else []


def files_named(trees, folder, root):
    "Files and folders of the repository that a string of the code leads to, below the top."
    relative = [s for t in trees for s in strings(t) if s.startswith("../") and "\n" not in s]
    named = {(folder / s).resolve() for s in relative}
    inside = {p.relative_to(root) for p in named if root in p.parents and p.exists()}
    return sorted(p.as_posix() for p in inside if p.parts[0] != RUNS)


def content(path):
    "Digest of a file, or of all files in a folder and in those below it."
    if path.is_file():
        return digest(path.read_bytes())
    files = [p for p in path.rglob("*") if p.is_file() and p.name[0] != "."]
    return digest({p.relative_to(path).as_posix(): digest(p.read_bytes()) for p in files})


def outputs_of(nb):
    "What the code cells show: texts and pictures, without counts and metadata."

    def shown(o):
        return {k: v for k, v in o.items() if k not in ("execution_count", "metadata")}

    return [[shown(o) for o in c.outputs] for c in code_cells(nb)]


def entry_of(nb, path, root, modules, flags):
    "The digests of a notebook, by what they are of."
    code = code_cells(nb)
    trees = [t for c in code if (t := tree_of(c))]
    exports = (directives(c).get("default_exp") for c in nb.cells)
    own = next((name[0] for name in exports if name), None)
    return {
        "code": digest([normal(c, flags) for c in code]),
        "modules": {m: modules[m][0] for m in needed(trees, own, modules)},
        "files": {f: content(root / f) for f in files_named(trees, path.parent, root)},
        "outputs": digest(outputs_of(nb)),
    }


def reasons(old, new):
    "Why a notebook's stored outputs are stale; empty where they are not."
    if not old:
        return ["it has no entry"]
    out = ["its code changed"] if old["code"] != new["code"] else []
    for kind, name in (("modules", "cmi_mtl/{}.py"), ("files", "{}")):
        both = {**old[kind], **new[kind]}
        changed = [k for k in sorted(both) if old[kind].get(k) != new[kind].get(k)]
        out += [f"{name.format(k)} changed" for k in changed]
    by_hand = ["its stored outputs changed by hand"] if old["outputs"] != new["outputs"] else []
    return out + by_hand


# ---------------------------------------------------------------- execution


def kernel_environment(root, cache):
    "This process's environment, the checkout's package first, and a cache without older results."
    kept = {k: v for k, v in os.environ.items() if k not in UNWANTED}
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return {**kept, **THREADS, "PYTHONPATH": path, "CMI_MTL_CACHE": cache}


def start_client(nb):
    """The kernel of this interpreter, whatever JUPYTER_PATH calls python3.

    It is encrypted, since without that every kernel warns on the terminal that it is not."""
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=specs, transport_encryption="auto"
    )
    return NotebookClient(nb, km=kernel, coalesce_streams=True, record_timing=False)


def failure(cell, error):
    "The first line of a cell, and what went wrong in it."
    lines = [x.strip() for x in cell.source.splitlines()]
    first = next((x for x in lines if x and x[0] != "#"), "")
    if isinstance(error, CellExecutionError):
        return f"({first!r}): {error.ename}: {error.evalue}"
    return f"({first!r}): {type(error).__name__}: {error}"


def execute(nb, folder, env, flags):
    """Execute the cells in a fresh kernel that stands in `folder`; new outputs replace old ones.

    What went to stderr is left out: progress bars and warnings tell of this run, not of the code.
    Raises RuntimeError that names the cell that failed."""
    client = start_client(nb)
    with client.setup_kernel(env=env, cwd=str(folder), cleanup_kc=True):
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != "code" or not is_executed(cell, flags):
                continue
            try:
                client.execute_cell(cell, i)
            except Exception as e:
                raise RuntimeError(f"cell {i + 1} of {len(nb.cells)} {failure(cell, e)}") from e
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]


def cleaned(nb, config):
    "The notebook's text as nbdev_clean leaves it."
    plain = json.loads(nbformat.writes(nb))
    clean_nb(
        plain,
        config.clear_all,
        config.allowed_metadata_keys.split(),
        config.allowed_cell_metadata_keys.split(),
        config.clean_ids,
    )
    return nb2str(plain)


def renew(name, root, cache):
    """Execute a notebook and store its outputs. Returns its new entry and the seconds it took.

    Raises RuntimeError that says what failed; then nothing is written."""
    start, path, config = time.perf_counter(), root / name, get_config(path=root)
    flags, before = set(config.tst_flags.split()), path.read_text(encoding="utf-8")
    nb = nbformat.reads(before, as_version=4)
    entry = entry_of(nb, path, root, modules_of(root), flags)
    execute(nb, path.parent, kernel_environment(root, cache), flags)
    if path.read_text(encoding="utf-8") != before:
        raise RuntimeError("was edited while it was executed")
    after = cleaned(nb, config)
    write_text(path, after)
    entry["outputs"] = digest(outputs_of(nbformat.reads(after, as_version=4)))
    return entry, time.perf_counter() - start


# ---------------------------------------------------------------- the command


def front_matter(root, name):
    try:
        return NBProcessor(root / name, procs=FrontmatterProc, process=True).nb.frontmatter_
    except ValueError:
        sys.exit(f"error: {name} is no notebook. Mend its JSON, or take it from git")


def notebooks_of(root):
    "The notebooks below nbs/ that nbdev_test executes, as paths below the top."
    paths = sorted(p.relative_to(root) for p in (root / "nbs").rglob("*.ipynb"))
    seen = [p.as_posix() for p in paths if not any(part[0] in "._" for part in p.parts)]

    def skipped(name):
        return str(front_matter(root, name).get("skip_exec", False)).lower() == "true"

    return [name for name in seen if not skipped(name)]


def read_sidecar(root):
    if not (root / SIDECAR).exists():
        return {}
    try:
        return json.loads((root / SIDECAR).read_text(encoding="utf-8"))
    except ValueError:
        sys.exit(f"error: {SIDECAR} is not JSON. Delete it and run `make notebooks`")


def write_sidecar(root, entries):
    "One line a notebook, so that two branches' changes merge."
    lines = [f"{json.dumps(k)}: {json.dumps(entries[k], sort_keys=True)}" for k in sorted(entries)]
    write_text(root / SIDECAR, "{\n" + ",\n".join(lines) + "\n}\n")


def stale(root):
    "Which notebooks' outputs are not known to be made by the code as it is: path -> reasons."
    entries, modules = read_sidecar(root), modules_of(root)
    flags = set(get_config(path=root).tst_flags.split())
    out = {name: ["no notebook of that name is executed"] for name in entries}
    for name in notebooks_of(root):
        nb = nbformat.read(root / name, as_version=4)
        out[name] = reasons(entries.get(name), entry_of(nb, root / name, root, modules, flags))
    return {name: why for name, why in sorted(out.items()) if why}


def store(name, done, root):
    "Put what `renew` found into the sidecar. Returns whether it succeeded."
    try:
        entry, seconds = done.result()
    except RuntimeError as e:
        print(f"error: {name}, {e}", file=sys.stderr, flush=True)
        return False
    write_sidecar(root, {**read_sidecar(root), name: entry})
    print(f"{name}: executed, {seconds:.0f} s", flush=True)
    return True


def renew_all(names, root):
    "Execute the notebooks, two at a time; store each that succeeds. Returns how many failed."

    def is_last(name):
        return Path(name).name == LAST

    failed, pool = 0, concurrent.futures.ProcessPoolExecutor(2)
    with tempfile.TemporaryDirectory() as cache, pool:
        for part in ([n for n in names if not is_last(n)], [n for n in names if is_last(n)]):
            begun = {pool.submit(renew, n, root, cache): n for n in part}
            try:
                for done in concurrent.futures.as_completed(begun):
                    failed += not store(begun[done], done, root)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # an interrupt begins nothing more
                raise
    return failed


def check(found):
    "Say which notebooks are stale, and why. Returns 1 where there are any."
    for name, why in found.items():
        print(f"{name}: {', '.join(why)}", file=sys.stderr)
    if found:
        print("run `make notebooks` and commit what it stores", file=sys.stderr)
    return int(bool(found))


def renew_stale(found, names, root, every):
    "Execute the stale notebooks, or every one. Returns 1 where one failed."
    kept = {k: v for k, v in read_sidecar(root).items() if k in names}
    if kept != read_sidecar(root):
        write_sidecar(root, kept)
    for name in names:
        if name in found:
            print(f"{name}: {', '.join(found[name])}", flush=True)
        elif not every:
            print(f"{name}: up to date", flush=True)
    failed = renew_all([n for n in names if every or n in found], root)
    if failed:
        print(f"{failed} failed; they and their entries stay as they were", file=sys.stderr)
    return int(bool(failed))


def main(argv, root):
    parser = argparse.ArgumentParser(
        prog="python tests/notebooks.py",
        description="Execute and store the notebooks that changed.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="execute every notebook")
    which.add_argument("--check", action="store_true", help="write nothing; name the stale ones")
    args = parser.parse_args(argv)
    found = stale(root)
    return check(found) if args.check else renew_stale(found, notebooks_of(root), root, args.all)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parent.parent))
