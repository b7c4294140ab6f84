"""The two commands as a person uses them: runs from end to end on made files, and what is said when something is wrong.

Starting a notebook takes seconds, so what happens before a notebook starts, or does not depend on one, is called directly."""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import made_data
import made_run
import nbformat
import pytest
from made_run import assert_alike

from cmi_mtl.build import build_model, check_options
from cmi_mtl.config import COMPACT, PAPER, TINY
from cmi_mtl.core import InputError, read_jsonl, value_of
from cmi_mtl.datasets import load_dataset
from cmi_mtl.departures import AUDIT
from cmi_mtl.run import main, parameters_of, run_folder
from cmi_mtl.settings import VARIANTS, make_settings, variant_options
from cmi_mtl.train import train

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "nbs/experiments/train.ipynb"
PYTHON = shlex.quote(sys.executable)  # as a shell reads it: the path may hold a blank


def environment(**changes):
    "For a command: this clone's package, no network, and no data but what the test names."
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **changes}


def command(folder, *args, **env):
    "`python -m cmi_mtl.run` in `folder`; returns (exit code, what it said)."
    done = subprocess.run(
        [sys.executable, "-m", "cmi_mtl.run", *map(str, args)],
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return done.returncode, done.stdout


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def table(folder, bad_row=False):
    "A user's CSV table with its pictures: 24 questions in three splits, the 5th of them without an answer on request."
    made_data.write({f"{i}.png": made_data.picture(i, kind="PNG") for i in range(6)}, folder)
    with open(folder / "mine.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["image", "question", "answer", "answer_type", "split"])
        for i in range(24):
            answer = "" if bad_row and i == 4 else ("left side", "yes", "right side", "no")[i % 4]
            split = ("train", "train", "validation", "test")[i // 4 % 4]
            out.writerow(
                [
                    f"{i % 6}.png",
                    f"Invented question {i}?",
                    answer,
                    "CLOSED" if i % 2 else "OPEN",
                    split,
                ]
            )
    return folder / "mine.csv"


# ---------------------------------------------------------------- from end to end


def test_own_table_twice(tmp_path):
    path, out = table(tmp_path), tmp_path / "out"
    args = (
        TRAIN,
        "-p",
        "dataset",
        "table",
        "-p",
        "data_root",
        path,
        "-p",
        "preset",
        "tiny",
        "-p",
        "epochs",
        1,
        "-p",
        "data_options",
        "{}",
        "-p",
        "device",
        "cpu",
        "--out",
        out,
    )
    code, said = command(tmp_path, *args)
    assert code == 0, said
    assert {
        "train.ipynb",
        "record.json",
        "history.jsonl",
        "predictions.jsonl",
        "model/config.json",
        "model/model.safetensors",
    } <= set(files(out))
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert (
        record["settings"]["dataset"] == "table"
        and record["settings"]["preset"] == "tiny"
        and record["test_scorings"] == 1
    )
    assert record["data"]["questions"] == {"train": 16, "validation": 4, "test": 4}
    assert {k: record["test"][k]["questions"] for k in ("open", "closed", "overall")} == {
        "open": 2,
        "closed": 2,
        "overall": 4,
    }
    assert all(record["baselines"][b]["overall"]["questions"] == 4 for b in record["baselines"])
    assert len(read_jsonl(out / "predictions.jsonl")) == 4
    for line in (
        "cmi_mtl, classifier",
        "cmi_mtl, generator",
        "question only",
        "majority",
        "n = 2)",
        "n = 4)",
        f"executed notebook: {out / 'train.ipynb'}",
        f"run record:        {out / 'record.json'}",
    ):
        assert line in said
    cells = nbformat.read(out / "train.ipynb", as_version=4).cells
    assert any(
        "injected-parameters" in c.metadata.get("tags", []) and str(path) in c.source for c in cells
    )
    assert main([str(a) for a in args]) == 0
    again = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert again["test_scorings"] == 2
    assert_alike(again["test"], record["test"])


def test_ovqa_found_under_the_data_folder(tmp_path):
    made_data.write(made_data.ovqa_files(), tmp_path / "data/ovqa")
    code, said = command(
        tmp_path,
        TRAIN,
        "-p",
        "dataset",
        "ovqa",
        "-p",
        "preset",
        "tiny",
        "-p",
        "epochs",
        1,
        "-p",
        "data_options",
        "null",
        "-p",
        "variant",
        "pooled",
        "-p",
        "seed",
        3,
        "-p",
        "train_options",
        '{"train_on": "train+validation"}',
        CMI_MTL_DATA=str(tmp_path / "data"),
    )
    assert code == 0, said
    record = json.loads(
        (tmp_path / "runs/train/ovqa/pooled/seed3/record.json").read_text(encoding="utf-8")
    )
    assert (
        record["data"]["questions"] == {"train": 12, "validation": 0, "test": 6}
        and record["settings"]["seed"] == 3
    )
    modules = [record["model"][k] for k in ("global_path", "fvta", "cifr", "ffae")]
    assert modules == [True, False, False, False] and "test_generated" not in record
    assert record["validation"] is None and record["temperature"] == 1
    assert set(record["baselines"]) == {"majority", "question_only", "usual_answer"}
    assert "n = 6)" in said and "runs/train/ovqa/pooled/seed3/train.ipynb" in said


# ---------------------------------------------------------------- commands that fail


def test_bad_row_in_a_table(tmp_path):
    path = table(tmp_path, bad_row=True)
    before = files(tmp_path)
    code, said = command(
        tmp_path,
        TRAIN,
        "-p",
        "dataset",
        "table",
        "-p",
        "data_root",
        "mine.csv",
        "-p",
        "data_options",
        "{}",
        CMI_MTL_CACHE=str(tmp_path / "cache"),
    )
    assert code == 1
    given = {"dataset": "table", "data_root": tmp_path / "mine.csv"}
    notebook = f"{run_folder(TRAIN, given).as_posix()}/train.partial.ipynb"
    end = said[said.rindex("error: ") :]
    for part in (
        str(TRAIN),
        "load_dataset",
        "mine.csv, row 6",
        "the answer is empty",
        "Write the answer or delete the row",
        notebook,
    ):
        assert part in end
    assert set(files(tmp_path)) - set(before) == {notebook}
    cells = nbformat.read(tmp_path / notebook, as_version=4).cells
    assert [
        o.ename
        for c in cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.output_type == "error"
    ] == ["InputError"]
    assert path.exists()


def test_the_folder_is_given_by_out(tmp_path):
    code, said = command(tmp_path, TRAIN, "-p", "folder", "elsewhere")
    assert code == 2 and "Give --out instead" in said and not (tmp_path / "runs").exists()


def test_two_tables_have_two_folders():
    names = [
        run_folder(TRAIN, {"dataset": "table", "data_root": root}).parts[2]
        for root in ("a/mine.csv", "b/mine.csv", "mine.jsonl", "b/my other.csv", "a/../a/mine.csv")
    ]
    assert len(set(names)) == 4 and names[0] == names[-1]
    assert all(re.fullmatch("table-mine-[0-9a-f]{6}", n) for n in names[:3])
    assert names[3].startswith("table-my_other-")


@pytest.fixture
def copy(tmp_path):
    "What make needs, with an environment that is ready: its python is the one of these tests."
    for name in ("Makefile", "pyproject.toml", ".ci", "nbs/experiments/train.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    script(tmp_path / ".venv/bin/python", f'exec {PYTHON} "$@"')
    (tmp_path / ".venv/ready").touch()
    return tmp_path


def script(path, line):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def make(folder, *args, **env):
    "(exit code, stdout, stderr) of make in `folder`."
    if shutil.which("make") is None:
        pytest.skip("there is no make on this machine")
    clean = {
        k: v
        for k, v in environment(**env).items()
        if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "DATASET", "ARGS")
    }
    done = subprocess.run(
        ["make", *args], cwd=folder, env=clean, capture_output=True, encoding="utf-8"
    )
    return done.returncode, done.stdout, done.stderr


def test_make_run_with_an_unknown_data_set(copy):
    code, out, err = make(copy, "run", "DATASET=nonsense")
    assert code == 2  # make's own code when a command of it fails
    end = err[err.rindex("error: ") :]
    for part in (
        "dataset='nonsense'",
        "unknown data set",
        "phantom, slake, table, vqa_rad",
        "nonsense/cmi_mtl/seed0/train.partial.ipynb",
    ):
        assert part in end
    assert files(copy / "runs") == ["train/nonsense/cmi_mtl/seed0/train.partial.ipynb"]


def test_make_alone_says_what_it_can_do(copy):
    code, out, err = make(copy)
    assert (
        code == 0
        and "make run DATASET=vqa_rad" in out
        and "make test" in out
        and len(out.splitlines()) < 15
        and not err
    )


@pytest.mark.parametrize(
    "args, odd, nearest",
    [
        (["run", "VARIENT=pooled"], "VARIENT", "VARIANT"),
        (["run", "SEEDS="], "SEEDS", "SEED"),
        (["paper", "DATASETS=slake", "STUDIES=smoke"], "STUDIES", "STUDY"),
        (["tables", "DATASET=ovqa"], "DATASET", "DATASETS"),
        (["test", "ARGS=-k x"], "ARGS", None),
    ],
)
def test_make_refuses_a_variable_that_its_target_does_not_read(copy, args, odd, nearest):
    code, out, err = make(copy, *args)
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert f"make {args[0]} does not read {odd}." in err and "PYTHON" in err
    assert (f"Is {nearest} meant?" in err) if nearest else ("meant" not in err)
    assert not (copy / "runs").exists()


def test_make_takes_the_variables_that_its_target_reads(copy):
    "A value with blanks and = is one value; what the environment holds is nobody's slip."
    args = ("DATASET=table", "SEED=1", "VARIANT=alpha=0.1", "ARGS=-p data_root my.csv -p a b=1")
    code, out, err = make(copy, "-n", "run", *args, "CMI_MTL_CACHE=/c", SEEDS="3", DATASETS="slake")
    assert code == 0 and not err and "-p variant alpha=0.1" in out and "a b=1" in out
    code, out, err = make(copy, "-n", "publish", "RUN=runs/a", "ARGS=--replace")
    assert code == 0 and not err and '"runs/a" --replace' in out


def test_make_with_another_python(copy):
    (copy / ".venv/ready").unlink()
    old = script(
        copy / "old", f'shift; exec {PYTHON} -c "import sys; sys.version_info = (3, 10, 2); $1"'
    )
    for python, parts in (
        (str(old), ("Python 3.11 is needed", "is 3.10", "make PYTHON=/path/to/python3.11")),
        (
            "/no/python",
            ("there is no /no/python", "Install Python 3.11", "make PYTHON=/path/to/python3.11"),
        ),
    ):
        code, out, err = make(copy, "run", f"PYTHON={python}")
        assert code == 2 and not (copy / ".venv/ready").exists() and not (copy / "runs").exists()
        for part in parts:
            assert part in err


def test_make_finds_the_right_python(copy, tmp_path_factory):
    "python3.11 on PATH that is none (a pyenv shim), python3 that is one; and an environment that is half made."
    (copy / ".venv/ready").unlink()
    (copy / ".venv/bin/python").unlink()  # half made
    bin, log = tmp_path_factory.mktemp("bin"), copy / "log"
    script(bin / "python3.11", "exit 127")
    script(
        bin / "python3",
        f'''echo "$@" >> {shlex.quote(str(log))}
if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit; fi
if [ "$1 $2" = "-m pip" ]; then exit; fi
exec {PYTHON} "$@"''',
    )
    code, out, err = make(copy, ".venv/ready", PATH=f"{bin}:{os.environ['PATH']}")
    assert code == 0, err
    said, done = out.splitlines(), log.read_text(encoding="utf-8")
    assert [line for line in said if line.startswith(("making", "installing"))] == [
        "making the environment in .venv",
        "installing the pinned packages, 1 of 2: torch",
        "installing the pinned packages, 2 of 2: the others",
    ]
    assert (
        "-m venv --clear .venv" in done and "install -c .ci/constraints.txt torch==2.13.0" in done
    )
    log.unlink()
    assert (
        make(copy, ".venv/ready", PATH=f"{bin}:{os.environ['PATH']}")[1]
        == "make: '.venv/ready' is up to date.\n"
    )
    os.utime(copy / "pyproject.toml", (time.time() + 5, time.time() + 5))
    make(copy, ".venv/ready", PATH=f"{bin}:{os.environ['PATH']}")
    assert "venv --clear" not in log.read_text(encoding="utf-8") and "install" in log.read_text(
        encoding="utf-8"
    )  # what is whole is kept


@pytest.mark.parametrize(
    "given, shared, seen",
    [
        ({}, True, "{up}/shared/datasets"),
        ({"CMI_MTL_DATA": ""}, True, "{up}/shared/datasets"),
        ({"CMI_MTL_DATA": "/d"}, True, "/d"),
        ({}, False, ""),
        ({"CMI_MTL_DATA": ""}, False, ""),
    ],
)
@pytest.mark.parametrize("folder", ["clone", "a b é"])
def test_make_names_the_data_folder(tmp_path, folder, given, shared, seen):
    tmp_path = tmp_path / folder
    here = tmp_path / "clone"
    here.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", here)
    if shared:
        (tmp_path / "shared/datasets").mkdir(parents=True)
    (here / "more.mk").write_text(
        'include Makefile\nshow:\n\t@echo "$$CMI_MTL_DATA"\n', encoding="utf-8"
    )
    env = {"CMI_MTL_DATA": given["CMI_MTL_DATA"]} if given else {}
    without = {k: v for k, v in os.environ.items() if k != "CMI_MTL_DATA"}
    done = subprocess.run(
        ["make", "-s", "-f", "more.mk", "show"],
        cwd=here,
        env={**without, **env},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.stdout.strip() == seen.format(up=tmp_path), done.stderr


@pytest.mark.parametrize("name", ["CMI_MTL_DATA", "CMI_MTL_WEIGHTS", "CMI_MTL_CACHE"])
def test_an_empty_variable_counts_as_unset(monkeypatch, name):
    from cmi_mtl import core

    monkeypatch.delenv(name, raising=False)

    def look():
        return (core.cache_home(), core.data_home(), core.find_weights("a/b"))

    unset = look()
    monkeypatch.setenv(name, "")
    assert look() == unset


def notebook(path, *bodies, tag="parameters"):
    "A notebook whose first cell holds parameters, with more cells of these sources."
    cells = [
        nbformat.v4.new_code_cell("x = 1\nname = 'a'", metadata={"tags": [tag]}),
        *map(nbformat.v4.new_code_cell, bodies),
    ]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def shell(capsys, *args):
    "(exit code, what was said on stderr) of the command, in this process."
    code = main([str(a) for a in args])
    return code, capsys.readouterr().err


# kind of fault -> arguments after the notebook, parts of the message
ARGUMENTS = {
    "misspelt parameter": (
        ["-p", "nam", "b"],
        ("parameter 'nam'", "has none of that name", "Did you mean 'name'"),
    ),
    "unknown parameter": (
        ["-p", "quite_other", 1],
        ("parameter 'quite_other'", "good.ipynb has none", "It takes name, x"),
    ),
    "two unknown parameters": (
        ["-p", "nam", 1, "-p", "xx", 1],
        ("2 problems found", "parameter 'nam'", "parameter 'xx'"),
    ),
    "output folder is a file": (
        ["--out", "{tmp}/file"],
        ("{tmp}/file: is a file, a folder is needed", "Name another output folder"),
    ),
    "output folder below a file": (
        ["--out", "{tmp}/file/a/b"],
        ("{tmp}/file: is a file, a folder is needed",),
    ),
}


@pytest.mark.parametrize("fault", ARGUMENTS)
def test_bad_arguments(tmp_path, capsys, fault):
    args, parts = ARGUMENTS[fault]
    notebook(tmp_path / "good.ipynb", "open('never', 'wb')")
    (tmp_path / "file").write_text("", encoding="utf-8")
    args = [str(a).format(tmp=tmp_path) for a in args] + (
        [] if "--out" in args else ["--out", tmp_path / "out"]
    )
    code, err = shell(capsys, tmp_path / "good.ipynb", *args)
    assert code == 2 and err.startswith("error: ") and files(tmp_path) == ["file", "good.ipynb"]
    for part in parts:
        assert part.format(tmp=tmp_path) in err


@pytest.mark.parametrize(
    "name, parts",
    [
        ("absent.ipynb", ("no such notebook", "Give the path of an .ipynb file")),
        ("folder", ("no such notebook",)),
        ("text.ipynb", ("not a notebook", "Give the path of an .ipynb file")),
        ("bare.ipynb", ("no cell is tagged 'parameters'", "Tag the cell that sets the defaults")),
    ],
)
def test_bad_notebook(tmp_path, capsys, name, parts):
    notebook(tmp_path / "bare.ipynb", tag="other")
    (tmp_path / "text.ipynb").write_text("no notebook", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    code, err = shell(capsys, tmp_path / name, "--out", tmp_path / "out")
    assert (
        code == 2
        and err.startswith(f"error: {tmp_path / name}: ")
        and not (tmp_path / "out").exists()
    )
    for part in parts:
        assert part in err


def test_run_whose_name_leads_out_of_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path / "good.ipynb")
    for p in ("variant", "dataset"):
        code, err = shell(capsys, "good.ipynb", "-p", p, "../../../up")
        assert (
            code == 2
            and "'../../../up'" in err
            and "name of a run's folder" in err
            and files(tmp_path) == ["good.ipynb"]
        )


def test_failing_cell(tmp_path, capsys):
    path = notebook(
        tmp_path / "bad.ipynb",
        "print('so far so good')",
        "# the next line fails\ny = x / 0",
        "print('never')",
    )
    code, err = shell(capsys, path, "-p", "x", 5, "--out", tmp_path / "out")
    assert code == 1
    for part in (
        f"error: {path}, cell [4] ('y = x / 0') failed: ZeroDivisionError: division by zero",
        f"The partial notebook: {tmp_path / 'out/bad.partial.ipynb'}",
    ):
        assert part in err
    assert files(tmp_path / "out") == ["bad.partial.ipynb"]
    cells = nbformat.read(tmp_path / "out/bad.partial.ipynb", as_version=4).cells
    outputs = [
        [o.output_type for o in c.outputs] for c in cells if c.source.startswith(("print", "#"))
    ]
    assert ["stream"] in outputs and ["error"] in outputs and [] in outputs


def test_kernel_that_dies(tmp_path, capsys):
    path = notebook(tmp_path / "dies.ipynb", "print('so far so good')", "import os; os._exit(9)")
    code, err = shell(capsys, path, "--out", tmp_path / "out")
    assert (
        code == 1
        and "error: " in err
        and "its kernel died" in err
        and "memory" in err
        and str(tmp_path / "out/dies.partial.ipynb") in err
    )
    assert "Traceback" not in err[err.rindex("error: ") :] and "so far so good" in (
        tmp_path / "out/dies.partial.ipynb"
    ).read_text(encoding="utf-8")


def test_interrupted(tmp_path):
    path = notebook(tmp_path / "long.ipynb", "open('begun', 'wb')\nimport time; time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-m", "cmi_mtl.run", path, "--out", tmp_path / "out"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        encoding="utf-8",  # a shell's background job would ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert (
        process.returncode == 130
        and "interrupted" in err
        and str(tmp_path / "out/long.partial.ipynb") in err
    )
    assert (tmp_path / "out/long.partial.ipynb").exists() and "Traceback" not in err[
        err.rindex("error: ") :
    ]


# ---------------------------------------------------------------- settings

# what is given -> parts of the message
SETTINGS = [
    (dict(preset="huge"), ("preset='huge'", "unknown preset", "tiny, compact, paper")),
    (dict(preset=["tiny"]), ("preset=['tiny']", "unknown preset", "tiny, compact, paper")),
    (dict(preset=0), ("preset=0", "unknown preset")),
    (dict(preset=""), ("preset=''", "unknown preset")),
    (dict(dataset=["slake"]), ("dataset=['slake']", "a list, no name", "such as slake")),
    (dict(variant=["pooled"]), ("variant=['pooled']", "one of cmi_mtl")),
    (dict(seed=99999999999999999999), ("seed=9999", "at least 0, below 2**63")),
    (dict(batch_size=2**31), ("batch_size=2147", "below 2**31")),
    (dict(epochs=2**63), ("epochs=9223", "below 2**63")),
    (dict(learning_rate=10**400), ("learning_rate=1000", "a number above 0")),
    (dict(learning_rat=0.1), ("setting 'learning_rat'", "unknown", "learning_rate")),
    (dict(epochs=0), ("epochs=0", "a whole number of at least 1")),
    (dict(epochs=2.5), ("epochs=2.5", "whole number")),
    (dict(epochs="many"), ("epochs='many'", "whole number")),
    (dict(epochs=True), ("epochs=True", "whole number")),
    (dict(batch_size=1), ("batch_size=1", "at least 2")),
    (dict(batch_size="8"), ("batch_size='8'", "at least 2")),
    (dict(learning_rate=-1), ("learning_rate=-1", "a number above 0")),
    (dict(learning_rate="fast"), ("learning_rate='fast'",)),
    (dict(learning_rate=float("inf")), ("learning_rate=inf", "a number above 0")),
    (dict(learning_rate=float("nan")), ("learning_rate=nan", "a number above 0")),
    (dict(multimodal_factor="x"), ("multimodal_factor='x'",)),
    (dict(fvta_factor=0), ("fvta_factor=0", "a number above 0")),
    (dict(cifr_factor=-1), ("cifr_factor=-1",)),
    (dict(anneal="step"), ("anneal='step'", "'cos' or 'linear'")),
    (dict(train_on="test"), ("train_on='test'", "'train' or 'train+validation'")),
    (dict(variant="no_such"), ("variant='no_such'", "one of cmi_mtl, no_fvta", "cmi_mtl_paper")),
    (dict(refit=True), ("setting 'refit'", "unknown")),
    (dict(weight_decay=-1), ("weight_decay=-1",)),
    (dict(warmup=3), ("warmup=3",)),
    (dict(clip=0), ("clip=0", "a number above 0")),
    (dict(num_beams=2), ("setting 'num_beams'", "unknown")),
    (dict(seed="x"), ("seed='x'", "whole number")),
    (dict(seed=-1), ("seed=-1", "at least 0")),
    (dict(layer_decay=0.5), ("setting 'layer_decay'", "unknown")),
    (dict(validation_fraction=2), ("validation_fraction=2", "between 0 and 1")),
    (dict(carve_by="patient"), ("carve_by='patient'", "one of question, image, single")),
    (dict(mixed_precision="fp8"), ("mixed_precision='fp8'",)),
    (dict(augment=2), ("augment=2",)),
    (dict(freeze_encoders=True, augment=0.1), ("augment=0.1", "encoders are frozen")),
    (dict(freeze_encoders="no"), ("freeze_encoders='no'", "true or false")),
    (dict(model_options=3), ("model_options=3",)),
    (dict(data_options=[1]), ("data_options=[1]",)),
    (dict(data_root=5), ("data_root=5", "a path")),
    (dict(data_root="\udcff.csv"), ("data_root=", "a path in UTF-8 (rename the file")),
    (dict(data_options={"image": Path("a")}), ("data_options=", "that JSON can hold")),
    (dict(model_options={"fusion": "\ud83d"}), ("model_options=", "that JSON can hold")),
    (
        dict(epochs=0, batch_size=0, seed="x"),
        ("3 problems found", "epochs=0", "batch_size=0", "seed='x'"),
    ),
]


@pytest.mark.parametrize(
    "given, parts", SETTINGS, ids=lambda x: ",".join(x) if isinstance(x, dict) else ""
)
def test_bad_setting(given, parts):
    with pytest.raises(InputError) as e:
        make_settings(**{"dataset": "table", "preset": "tiny", **given})
    for part in parts:
        assert part in str(e.value)


# options of the model, as text and otherwise wrong -> parts of the message
OPTIONS = [
    *(
        (dict([(name, text)]), (f"model option {name}={text!r}", "true or false"))
        for name in "global_path fvta mend_negatives cifr ffae image_positions".split()
        for text in ("false", "no", 0, None)
    ),
    (dict(cifr="false", global_path="no"), ("2 problems", "cifr='false'", "global_path='no'")),
    (dict(alpha="0.2"), ("alpha='0.2'", "a number of at least 0")),
    (dict(alpha=float("nan")), ("alpha=nan", "a number of at least 0")),
    (dict(beta=True), ("beta=True", "a number of at least 0")),
    (dict(dropout=False), ("dropout=False", "a share below 1")),
    (dict(classifier_dropout="0.3"), ("classifier_dropout='0.3'", "or null")),
    (dict(confidence_temperature=2), ("'confidence_temperature'", "unknown")),  # a run fits it
    (dict(num_queries="16"), ("num_queries='16'", "a whole number of at least 1")),
    (dict(num_queries=2**64), ("num_queries=1844", "below 2**31")),
    (dict(question_attention="4"), ("question_attention='4'", "of at least 0")),
    (dict(image_mean="0.5"), ("image_mean='0.5'", "three numbers")),
    (dict(image_std=[1, 1, 0]), ("image_std=[1, 1, 0]", "three numbers above 0")),
    (dict(fusion=["san"]), ("fusion=['san']", "a name")),
    (dict(query_start=True), ("query_start=True", "a name")),
    (dict(generator="t5"), ("generator='t5'", "names with values")),
    (dict(image_encoder=None), ("image_encoder=None", "names with values")),
    (dict(fusion_options=[1]), ("fusion_options=[1]", "names with values, or null")),
    (
        dict(fusion_options={"bidirectional": "false"}),
        ("fusion option bidirectional='false'", "true or false"),
    ),
    (dict(fusion_options={"d_state": "16"}), ("fusion option d_state='16'", "a number")),
    (dict(fusion="ban", fusion_options={"glimpses": True}), ("glimpses=True", "a number")),
]


@pytest.mark.parametrize("given, parts", OPTIONS, ids=lambda x: str(x)[:50])
def test_bad_model_option(given, parts):
    with pytest.raises(InputError) as e:
        check_options(given)
    for part in parts:
        assert part in str(e.value)


def test_right_model_options_are_taken():
    for variant in (*VARIANTS, *AUDIT):
        check_options(variant_options(variant))
    for preset in (PAPER, COMPACT, TINY):
        check_options(preset)
    check_options(dict(alpha=1, beta=0, dropout=0, classifier_dropout=None, question_attention=0))
    check_options(dict(fusion_options=None))
    check_options(dict(fusion="co_attention", fusion_options={"heads": 4}))
    check_options(dict(fusion_options={"bidirectional": True, "expand": 1, "d_state": 4}))
    check_options(dict(fusion="film", fusion_options={"of_my_own": "text"}))  # registered later
    check_options(json.loads(json.dumps(dict(image_mean=[0, 0, 0], image_std=[1, 1, 1]))))


def test_a_variant_of_ones_own_is_checked(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "mine", {"cifr": "false"})
    s = made_run.settings(tmp_path, variant="mine")
    with pytest.raises(InputError, match="cifr='false'.* true or false"):
        build_model(s, load_dataset("table", s.data_root))


# what is given -> parts of the message of a training that must not begin
TRAININGS = {
    "unknown data set": (
        dict(dataset="radpath"),
        ("dataset='radpath'", "unknown data set", "Use one of", "table, vqa_rad"),
    ),
    "no table given": (
        dict(data_root=None),
        ("no file given", "Give the path of your CSV or JSONL file"),
    ),
    "missing table": (
        dict(data_root="{tmp}/none.csv"),
        ("none.csv", "no such file", "correct the path"),
    ),
    "folder without files": (
        dict(dataset="slake", data_root="{tmp}"),
        ("{tmp}/imgs", "no such folder of images", "Put the images there"),
    ),
    "unknown loader option": (
        dict(data_options={"colour": 1}),
        ("option colour", "unknown for table"),
    ),
    "unknown model option": (
        dict(model_options={"fvtaa": False}),
        ("model option 'fvtaa'", "unknown", "fvta,"),
    ),
    "unknown fusion": (
        dict(model_options={"fusion": "magic"}),
        ("fusion='magic'", "unknown fusion", "cross_mamba"),
    ),
    "unknown classifier loss": (
        dict(model_options={"classifier_loss": "mse"}),
        ("classifier_loss='mse'", "'bce' or 'ce'"),
    ),
    "unknown device": (
        dict(device="quantum"),
        ("device='quantum'", "Use 'cpu', 'cuda' or 'cuda:N'"),
    ),
    "device that is no name": (
        dict(device=["cpu"]),
        ("device=['cpu']", "Use 'cpu', 'cuda' or 'cuda:N'"),
    ),
    "device that is not there": (
        dict(device="cuda:77"),
        ("device='cuda:77'", "Use 'cpu', 'cuda' or 'cuda:N'"),
    ),
    "device that computes nothing": (
        dict(device="meta"),
        ("device='meta'", "Use 'cpu', 'cuda' or 'cuda:N'"),
    ),
    "fp16 on a CPU": (
        dict(mixed_precision="fp16"),
        ("mixed_precision='fp16'", "needs a GPU", "'no' or 'bf16'"),
    ),
    "weights not at hand": (dict(preset="compact"), ("all-MiniLM-L6-v2", "CMI_MTL_WEIGHTS")),
}


@pytest.mark.parametrize("fault", TRAININGS)
def test_training_that_does_not_begin(tmp_path, monkeypatch, fault):
    given, parts = TRAININGS[fault]
    path, fill = table(tmp_path), lambda x: x.format(tmp=tmp_path) if isinstance(x, str) else x
    for name in ("CMI_MTL_DATA", "CMI_MTL_WEIGHTS"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    given = {
        "dataset": "table",
        "preset": "tiny",
        "data_root": str(path),
        "epochs": 1,
        "device": "cpu",
        **given,
    }
    before = made_data.listing(tmp_path)
    with pytest.raises(InputError) as e:
        train(make_settings(**{k: fill(v) for k, v in given.items()}), tmp_path / "out")
    for part in parts:
        assert fill(part) in str(e.value)
    assert made_data.listing(tmp_path) == before


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_without_a_question(tmp_path, split):
    path = table(tmp_path)
    path.write_text(
        "\n".join(
            x for x in path.read_text(encoding="utf-8").splitlines() if not x.endswith(split)
        ),
        encoding="utf-8",
    )
    with pytest.raises(
        InputError, match=f"no question in split {split}. Give each split some questions"
    ):
        train(make_settings("table", "tiny", data_root=str(path), device="cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what a shell makes of it


def test_an_output_folder_with_braces(tmp_path, capsys):
    path = notebook(tmp_path / "good.ipynb")
    code, err = shell(capsys, path, "--out", tmp_path / "a {x} b}")
    assert code == 0, err
    assert files(tmp_path / "a {x} b}") == ["good.ipynb"]


def test_the_notebook_itself_is_never_the_output(tmp_path, capsys):
    path = notebook(tmp_path / "good.ipynb", "open('never', 'wb')")
    before = path.read_bytes()
    code, err = shell(capsys, path, "--out", tmp_path)
    assert code == 2 and "is the notebook itself. Name another output folder" in err
    assert path.read_bytes() == before and files(tmp_path) == ["good.ipynb"]


@pytest.mark.parametrize(
    "source, given",
    [
        ("a, (b, c) = 1, (2, [3])\nd = e = 4", {"a": 1, "b": 2, "c": [3], "d": 4, "e": 4}),
        ("a, *b = 1, 2\nc = {}\nc['k'] = 5", {"a": 1, "b": None, "c": {}}),
        ("%matplotlib inline\nseed: int = 0\nfolder: str", {"seed": 0}),
    ],
)
def test_a_parameters_cell_may_hold_what_a_notebook_may(tmp_path, source, given):
    path = notebook(tmp_path / "a.ipynb", "")
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].source = source
    nbformat.write(nb, path)
    assert parameters_of(path) == given


def test_a_parameters_cell_that_is_no_python_is_named(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "")
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].source = "seed = ="
    nbformat.write(nb, path)
    with pytest.raises(InputError, match="a.ipynb, its cell of parameters: not Python"):
        parameters_of(path)


def test_interrupted_before_a_cell_has_run(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cmi_mtl.run.parameters_of", interrupted)
    assert main(["a.ipynb"]) == 130 and capsys.readouterr().err == "error: a.ipynb, interrupted\n"


def test_defaults_of_any_kind(tmp_path, capsys):
    path = notebook(tmp_path / "good.ipynb", "print(url, table)")
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].source = 'url = "a=b"  # c=d\ntable = {"k": [1, None]}\nfolder = str(1)'
    nbformat.write(nb, path)
    assert parameters_of(path) == {"url": "a=b", "table": {"k": [1, None]}, "folder": None}
    code, err = shell(capsys, path, "-p", "table", "{'seed': 1}", "--out", tmp_path / "out")
    assert code == 0, err
    executed = (tmp_path / "out/good.ipynb").read_text(encoding="utf-8")
    assert "a=b {'seed': 1}" in executed


def test_the_documented_command_needs_no_more_than_a_data_set():
    given = parameters_of(TRAIN)
    assert given["dataset"] == "miniature"
    # what is for the miniature alone must not go into a run of another data set
    assert given["data_options"] is given["epochs"] is None


# ---------------------------------------------------------------- the commands that are printed


def commands_of(text):
    "Commands in a text: lines of its blocks, and what stands between single backquotes."
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    shell_blocks = [block for kind, block in fence.findall(text) if kind in ("", "sh", "bash")]
    prose = fence.sub("", text)
    lines = [line for block in shell_blocks for line in block.splitlines()]
    lines += [line.strip() for line in re.findall(r"^    \S.*$", prose, re.M)]
    lines += re.findall(r"`([^`]+)`", prose)
    known = ("make ", "python -m cmi_mtl.")
    found = (line.replace("\n", " ").split("  ")[0].strip() for line in lines)
    return [c for c in found if c.startswith(known) and "…" not in c]


def documented():
    "All commands of README, CONTRIBUTING, `make help` and the notebooks' prose, each once."
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    said = re.findall(r"@echo '(make .*)'$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    texts += [f"```\n{line}\n```\n" for line in said if "=folder" not in line]
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        texts += [c.source for c in cells if c.cell_type == "markdown"]
    found = {c for text in texts for c in commands_of(text)}
    return sorted(found - {"make publish"})  # that one is the name of a target


def understood(argv):
    "Hold the arguments of `python -m cmi_mtl.x` against its real parser; notebooks against theirs."
    module = importlib.import_module(argv[1])
    args = module._arguments(argv[2:])
    given = {k: value_of(v) for k, v in getattr(args, "p", [])}
    if argv[1] == "cmi_mtl.run":
        known = parameters_of(ROOT / args.notebook)
        assert not set(given) - set(known), f"{args.notebook} has no {set(given) - set(known)}"
    of_ones_own = {"fusion_film", "discs"} & {given.get("variant"), given.get("dataset")}
    if of_ones_own:
        return  # chapters 23 and 12 make them first
    if argv[1] == "cmi_mtl.train" or str(getattr(args, "notebook", "")).endswith("train.ipynb"):
        make_settings(**given)


DOCUMENTED = documented()


def test_documented_commands_are_found():
    assert len(DOCUMENTED) > 25
    for part in ("make run DATASET=vqa_rad", "make test", "-p data_root", "cmi_mtl.study vqa_rad"):
        assert any(part in c for c in DOCUMENTED), part


@pytest.mark.parametrize("line", DOCUMENTED)
def test_documented_command(copy, line):
    "It runs as it stands, with a python that writes down what it is asked."
    asked = copy / "asked.txt"
    note = f'printf "%s\\0" "$@" >> {shlex.quote(str(asked))}; printf "\\n" >> {shlex.quote(str(asked))}'
    names = set(re.findall(r"\$\(BIN\)/([\w-]+)", (copy / "Makefile").read_text(encoding="utf-8")))
    for name in names:
        script(copy / ".venv/bin" / name, note)
    script(copy / "bin/python", note)
    path = f"{copy / 'bin'}{os.pathsep}{os.environ['PATH']}"
    clean = {
        k: v for k, v in environment(PATH=path).items() if not k.startswith(("MAKE", "MFLAGS"))
    }
    done = subprocess.run(
        line, shell=True, cwd=copy, env=clean, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    told = asked.read_text(encoding="utf-8").split("\n") if asked.exists() else []
    for argv in (row.split("\0")[:-1] for row in told):
        if argv[:1] == ["-m"] and argv[1].startswith("cmi_mtl."):
            understood(argv)
