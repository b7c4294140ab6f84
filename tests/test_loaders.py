"The loaders on made files in the layouts of the real data sets."

import hashlib
import json
from pathlib import Path

import made_data
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from cmi_mtl.core import InputError
from cmi_mtl.datasets import load_dataset
from cmi_mtl.images import read_label_map


@pytest.mark.parametrize("below", ["", "OVQA_publish"])
def test_ovqa(tmp_path, monkeypatch, below):
    root = made_data.write(made_data.ovqa_files(), tmp_path / "ovqa")
    monkeypatch.setenv("CMI_MTL_DATA", str(tmp_path))
    samples = load_dataset("ovqa", *[root / below] if below else [])
    assert [s.split for s in samples] == ["train"] * 6 + ["validation"] * 6 + ["test"] * 6
    assert len({s.qid for s in samples}) == 18 and len({s.image_id for s in samples}) == 3
    s = samples[7]
    assert (s.question, s.answer, s.answer_type, s.organ) == (
        "Invented valset question number 1?",
        "Yes",
        "CLOSED",
        "CHEST",
    )
    assert s.question_type == "PRES" and s.image == str(
        tmp_path / "ovqa/OVQA_publish/img/made0.jpg"
    )


def test_vqa_rad_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("CMI_MTL_CACHE", str(tmp_path / "cache"))
    root = made_data.write(made_data.flavia_files(), tmp_path / "hub")
    before = made_data.listing(root)
    samples = load_dataset("vqa_rad_hub", root)
    assert made_data.listing(root) == before  # the data folder may be read-only
    assert [s.split for s in samples] == ["train"] * 6 + ["test"] * 6 and len(
        {s.qid for s in samples}
    ) == 12
    assert len({s.image_id for s in samples}) == 3  # told apart by their bytes
    assert samples[0].image_id == samples[6].image_id
    assert [s.answer_type for s in samples[:2]] == ["OPEN", "CLOSED"]  # inferred
    with open(samples[2].image, "rb") as f:
        assert f.read() == made_data.picture(1)
    assert load_dataset("vqa_rad_hub", root) == samples


def as_dictionary(data, folder):
    return {"bytes": data, "path": None}


def as_path(data, folder):
    name = f"{hashlib.sha256(data).hexdigest()}.jpg"
    made_data.write({name: data}, folder)
    return name


@pytest.mark.parametrize(
    "form",
    [as_dictionary, as_path, lambda data, _: data, lambda data, _: list(data)],
    ids=["dictionary", "path", "bytes", "list"],
)
@pytest.mark.parametrize("below", ["data", "."])
def test_vqa_rad_hub_in_other_layouts(tmp_path, monkeypatch, form, below):
    monkeypatch.setenv("CMI_MTL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub" / below
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(("train-00000-of-00001", "validation-0", "test")):
        image = form(made_data.picture(k), folder)
        row = {"image": image, "question": f"Is it {k}?", "answer": "yes"}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / f"{name}.parquet")
    samples = load_dataset("vqa_rad_hub", tmp_path / "hub")
    assert [s.split for s in samples] == ["train", "validation", "test"]
    for k, s in enumerate(samples):
        assert Path(s.image).read_bytes() == made_data.picture(k)


@pytest.fixture
def slake(tmp_path):
    "A function: the training samples of a SLAKE whose one training image is asked these questions, all answered 'No'."

    def make(*questions, mode="RGBA"):
        rows = [r | {"answer": "No"} for r in made_data.slake_rows(500, [0], questions)]
        files = {
            "train.json": json.dumps(rows).encode(),
            "imgs/xmlab0/mask.png": made_data.label_map(mode, (225, 215)),
        }
        root = made_data.write(made_data.slake_files() | files, tmp_path / "slake")
        return [s for s in load_dataset("slake", root) if s.split == "train"]

    return make


@pytest.mark.parametrize(
    "question, names",
    [
        ("Is the right lung healthy?", ["Right Lung"]),
        ("Is the left lung healthy?", ["Left Lung"]),
        ("Is the lung healthy?", ["Left Lung", "Right Lung"]),
        ("Do the lungs look normal?", ["Left Lung", "Right Lung"]),
        ("Is the left lung bigger than the right lung?", ["Left Lung", "Right Lung"]),
        ("Is the RIGHT Lung brighter?", ["Right Lung"]),
        ("Which organ is the leftmost, the lung?", ["Left Lung", "Right Lung"]),
        (
            "Where is the heart?",
            ["Heart", "Heart"],
        ),  # two boxes; and an ear is not a part of a heart
        ("Can it deliver oxygen?", []),
        ("Is there a liver?", []),
        ("Does it appear in the left ear?", []),
    ],
)
def test_slake_regions_of_a_question(slake, question, names):
    assert [r.name for r in slake(question)[0].regions] == names


def test_slake_boxes_and_label_map(slake):
    right, heart = (s.regions for s in slake("Is the right lung healthy?", "Where is the heart?"))
    assert (
        right[0].box == (2.0, 5.0, 22.0, 30.0)
        and right[0].value == 225
        and right[0].kind == "organ"
    )
    assert [r.box for r in heart] == [(10.0, 10.0, 8.0, 9.0), (30.0, 10.0, 8.0, 9.0)]
    assert all(r.mask is None and r.value is None for r in heart)
    left = slake("Is the left lung healthy?")[0].regions[0]
    assert left.box is None and left.value == 215  # on the label map alone
    assert (read_label_map(left.mask) == 215).sum() == 30 * 22 and (
        read_label_map(left.mask)[:, :24] != 215
    ).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA"])
def test_slake_label_maps_of_any_mode(slake, mode):
    region = slake("Is the left lung healthy?", mode=mode)[0].regions[0]
    assert (read_label_map(region.mask) == region.value).sum() == 30 * 22


def test_slake_mask_that_is_a_picture_gives_no_region(tmp_path):
    root = made_data.write(made_data.slake_files(), tmp_path)
    by_split = {s.split: s for s in load_dataset("slake", root) if "lung" in s.question}
    assert [len(by_split[x].regions) for x in ("train", "validation", "test")] == [1, 0, 0]
    (root / "mask.txt").unlink()  # without names of levels, boxes only
    assert [s.regions[0].mask for s in load_dataset("slake", root) if s.regions][0] is None


def test_slake_language_and_the_row_without_answer(tmp_path):
    rows = made_data.slake_rows(0, [0])
    rows = [rows[0] | {"q_lang": "zh", "qid": 3}, rows[0] | {"qid": 1622, "answer": ""}, rows[1]]
    root = made_data.write(
        made_data.slake_files() | {"train.json": json.dumps(rows).encode()}, tmp_path
    )
    assert [s.qid for s in load_dataset("slake", root, language="zh")] == ["3"]
    assert [s.qid for s in load_dataset("slake", root) if s.split == "train"] == ["1"]
    (root / "train.json").write_text(json.dumps([rows[2] | {"answer": ""}]), encoding="utf-8")
    with pytest.raises(InputError, match="row 1: the answer is empty"):
        load_dataset("slake", root)  # another qid


def test_label_map_of_a_palette_and_of_colours(tmp_path):
    a = np.array([[0, 7], [3, 7]], np.uint8)
    palette = Image.fromarray(a, "P")
    palette.putpalette([9, 9, 9] * 256)
    palette.save(tmp_path / "p.png")
    assert (read_label_map(tmp_path / "p.png") == a).all()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    with pytest.raises(
        InputError, match="colour picture, not a label map. Give each region one grey level"
    ):
        read_label_map(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match="broken.png: cannot be read as a label map"):
        read_label_map(tmp_path / "broken.png")


def test_table_with_regions(tmp_path):
    made_data.write({"a.jpg": made_data.picture(), "m/a.png": made_data.label_map("L")}, tmp_path)
    row = dict(
        image="a.jpg",
        question="Where?",
        answer="left",
        regions=[
            dict(name="Left Lung", mask="m/a.png", value=215),
            dict(name="nodule", box=[1, 2, 3, 4], kind="finding", mask=None, value=None),
        ],
    )
    (tmp_path / "t.jsonl").write_text(json.dumps(row), encoding="utf-8")
    lung, nodule = load_dataset("table", tmp_path / "t.jsonl")[0].regions
    assert lung.mask == str(tmp_path / "m/a.png") and lung.kind == "organ"
    assert (read_label_map(lung.mask) == lung.value).any()
    assert nodule.box == (1, 2, 3, 4) and nodule.mask is None and nodule.kind == "finding"


def test_public_vqa_rad(tmp_path):
    rows = made_data.rad_rows("public", 4)
    for i, (r, kind) in enumerate(zip(rows, ("freeform", "para", "test_freeform", "test_para"))):
        r |= dict(phrase_type=kind, qid_linked_id=f"g{i}", question_frame="NULL")
    files = made_data.rad_files() | {"VQA_RAD Dataset Public.json": json.dumps(rows).encode()}
    root = made_data.write(files, tmp_path)
    assert [s.split for s in load_dataset("vqa_rad", root, version="public")] == [
        "train",
        "train",
        "test",
        "test",
    ]
    assert len(load_dataset("vqa_rad", root)) == 12
    del rows[0]["phrase_type"]
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(InputError, match="row 1: no field phrase_type"):
        load_dataset("vqa_rad", root, version="public")
