"""What is published: tables and pictures rebuilt from the records alone, byte for byte, and every
number traced to the run that gave it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmi_mtl import run, tables
from cmi_mtl.core import InputError, write_json

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
DATASETS = ("phantom", "vqa_rad", "slake")
PAGES = sorted(p for p in FIGURES.glob("*.md") if "## Made of" in p.read_text(encoding="utf-8"))


def git(*args):
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, encoding="utf-8")


def test_each_data_set_has_its_pages():
    names = {p.stem for p in PAGES}
    assert {f"comparison_{d}" for d in DATASETS} | {"ablation_phantom"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_names_its_records(page):
    "They are there, with the commit that the page gives; and the command says more of each."
    said = tables.trace(page)
    for record in tables.made_of(page):
        r = json.loads(record.read_text(encoding="utf-8"))
        assert r["settings"]["dataset"] in page.stem
        assert f"{record.name}, commit {r['commit'][:7]}" in page.read_text(encoding="utf-8")
        assert f'{record}\n  commit: "{r["commit"]}"' in said


def test_pages_without_records_are_refused(tmp_path):
    (tmp_path / "bare.md").write_text("no list of records", encoding="utf-8")
    for page, why in (
        (tmp_path / "bare.md", "names no records"),
        (tmp_path / "no.md", "no such page"),
    ):
        with pytest.raises(InputError, match=why):
            tables.made_of(page)


def test_records_say_where_they_come_from():
    "Each names its run completely, and its commit is one of this history."
    whole = git("rev-parse", "--is-shallow-repository").stdout.strip() == "false"
    for path in sorted((FIGURES / "records").glob("**/*.json")):
        if "earlier" in path.parts:
            continue
        r = json.loads(path.read_text(encoding="utf-8"))
        for key in ("commit", "settings", "versions", "device", "data", "time", "schema"):
            assert r.get(key), (path, key)
        for key in ("sha256_questions", "sha256_images"):
            assert re.fullmatch("[0-9a-f]{64}", r["data"][key])
        if whole:
            assert git("cat-file", "-e", f"{r['commit']}^{{commit}}").returncode == 0, path


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    "figures/ as `make tables` makes them in a folder of records and one file of measurements."
    top = tmp_path_factory.mktemp("rebuilt")
    shutil.copytree(ROOT / "nbs/experiments", top / "nbs/experiments")
    shutil.copytree(FIGURES / "records", top / "figures/records")
    shutil.copy(FIGURES / "efficiency.csv", top / "figures")  # measured, not made of records
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CMI_MTL_DATA": str(top / "none"),
        "HF_HUB_OFFLINE": "1",
        "CMI_MTL_WEIGHTS": str(top / "none"),
    }
    command = [sys.executable, "-m", "cmi_mtl.study", *DATASETS, "--tables", "-j", "2"]
    done = subprocess.run(
        command,
        cwd=top,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    return top / "figures"


def test_tables_are_rebuilt_byte_for_byte(rebuilt):
    made = {p.name for p in rebuilt.iterdir() if p.is_file()}
    wanted = {f"{p.stem}{kind}" for p in PAGES for kind in (".md", ".csv", ".tex")}
    shown = [p.stem for p in PAGES if f"({p.stem}.svg)" in p.read_text(encoding="utf-8")]
    assert wanted | {f"{name}{kind}" for name in shown for kind in (".svg", ".png")} <= made
    assert {p.stem for p in FIGURES.glob("*_*.svg")} & {p.stem for p in PAGES} == set(shown)
    for name in sorted(made):
        if name.endswith(".png"):
            continue
        assert (rebuilt / name).read_bytes() == (FIGURES / name).read_bytes(), (
            f"{name}: make tables"
        )


def test_pictures_are_rebuilt(rebuilt):
    for path in sorted(rebuilt.glob("*.png")):
        ours, theirs = (
            np.asarray(Image.open(p).convert("L"), dtype=float) for p in (path, FIGURES / path.name)
        )
        assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 1, path.name


def test_a_comparison_without_a_row_is_refused(tmp_path, capsys):
    "Records there are, but of a variant that the page has no row for."
    name = "train-phantom-no_cifr-seed0.json"
    write_json(
        tmp_path / "records" / name,
        json.loads((FIGURES / "records" / name).read_text(encoding="utf-8")),
    )
    argv = [str(ROOT / "nbs/experiments/comparison.ipynb"), "--out", str(tmp_path / "page")]
    argv += ["-p", "dataset", "phantom", "-p", "records", str(tmp_path / "records")]
    assert run.main(argv) == 1
    assert "no row of this page has a record. Make and publish one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, part",
    [
        ({"dataset": "table", "publish_to": "records"}, "names of your own pictures"),
        ({"methods": '["occlusion"]'}, "grad_cam, the method of the checks, is not among them"),
    ],
)
def test_maps_that_cannot_be_kept_are_refused_before_they_are_made(given, part, tmp_path, capsys):
    argv = [str(ROOT / "nbs/experiments/interpretability.ipynb"), "--out", str(tmp_path / "maps")]
    given = {"checkpoint": str(tmp_path / "no model"), **given}
    assert run.main(argv + [x for k, v in given.items() for x in ("-p", k, v)]) == 1
    assert part in capsys.readouterr().err


def test_a_page_of_two_recipes_is_refused(tmp_path):
    "Before it is written: what differs is then not the models' own."
    for name in ("cmi_mtl", "pooled"):
        path = FIGURES / f"records/train-phantom-{name}-seed0.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        if name == "pooled":
            record["settings"] |= {"epochs": 1, "batch_size": 2}
        write_json(tmp_path / "records" / path.name, record)
    notebook = ROOT / "nbs/experiments/comparison.ipynb"
    given = {"dataset": "phantom", "records": str(tmp_path / "records")}
    argv = [str(notebook), "--out", str(tmp_path / "page")]
    assert run.main(argv + [x for k, v in given.items() for x in ("-p", k, v)]) == 1
    page = (tmp_path / "page/comparison.partial.ipynb").read_text(encoding="utf-8")
    assert "trained in another way" in page and "settings.epochs" in page
    assert not list((tmp_path / "page").glob("*.md"))
