"What a person reads who gives bad data: each message must name the file, the row and the remedy, and nothing is written."

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import made_data
import pytest
from PIL import Image

from cmi_mtl.core import (
    InputError,
    Problem,
    atomic_path,
    cache_home,
    data_home,
    read_jsonl,
    value_of,
)
from cmi_mtl.datasets import LOADERS, load_dataset, loader
from cmi_mtl.rows import Entry, check

HEAD = "image,question,answer,answer_type,split\n"
GOOD = "ok.jpg,Is it well?,yes,CLOSED,train\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    "A folder with one whole image and a cache that must stay empty."
    monkeypatch.setenv("CMI_MTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CMI_MTL_DATA", str(tmp_path / "nowhere"))
    return made_data.write({"ok.jpg": made_data.picture()}, tmp_path)


def refused(root, name, *args, **options):
    "The problems of a data set that must be refused, as one text each; asserts that nothing was written."
    before = made_data.listing(root)
    with pytest.raises(InputError) as e:
        load_dataset(name, *args, **options)
    assert made_data.listing(root) == before
    assert all(p.where and p.what and p.remedy for p in e.value.problems)
    return [str(p) for p in e.value.problems]


def table(root, text, name="mine.csv"):
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def says(problems, *parts):
    "One problem only, which has all these parts."
    assert len(problems) == 1, problems
    for part in parts:
        assert part in problems[0], problems[0]


# kind of fault -> the table, and what the message must say; row 3 is the bad one
CSV = {
    "missing image": (
        "gone.jpg,Is it?,yes,CLOSED,train\n",
        "row 3",
        "gone.jpg is missing",
        "Put a whole image there",
    ),
    "undecodable image": (
        "text.jpg,Is it?,yes,CLOSED,train\n",
        "row 3",
        "text.jpg cannot be read",
        "Put a whole image",
    ),
    "truncated JPEG": (
        "cut.jpg,Is it?,yes,CLOSED,train\n",
        "row 3",
        "cut.jpg cannot be read",
        "truncated",
        "Put a",
    ),
    "broken DICOM": (
        "bad.dcm,Is it?,yes,CLOSED,train\n",
        "row 3",
        "bad.dcm cannot be read as an image",
        "Put a whole",
    ),
    "image is a folder": (
        "folder,Is it?,yes,CLOSED,train\n",
        "row 3",
        "folder is a folder, not an image",
        "Name one of its files",
    ),
    "no image named": (",Is it?,yes,CLOSED,train\n", "row 3", "no image is named", "Name a file"),
    "empty question": (
        "ok.jpg, ,yes,CLOSED,train\n",
        "row 3",
        "the question is empty",
        "Write the question or delete",
    ),
    "empty answer": (
        "ok.jpg,Is it?,,CLOSED,train\n",
        "row 3",
        "the answer is empty",
        "Write the answer or delete the row",
    ),
    "unknown answer type": (
        "ok.jpg,Is it?,yes,MAYBE,train\n",
        "row 3",
        "answer type 'MAYBE'",
        "Write OPEN or CLOSED",
    ),
    "unknown split": (
        "ok.jpg,Is it?,yes,CLOSED,dev\n",
        "row 3",
        "unknown split 'dev'",
        "Write train, validation or test",
    ),
    "too many fields": (
        "ok.jpg,Is it big, or small?,big,OPEN,train\n",
        "row 3",
        "another number of fields",
        "Quote fields",
    ),
    "too few fields": ("ok.jpg,Is it?\n", "row 3", "another number of fields", "Quote fields"),
    "open quote": (
        'ok.jpg,"Is it?,yes,CLOSED,train\n',
        "after row 2",
        "not a CSV table",
        "Quote fields",
    ),
    "columns swapped": (
        "Is it long? " * 30 + ",ok.jpg,yes,CLOSED,train\n",
        "row 3",
        "is missing",
        "correct the name",
    ),
}


@pytest.mark.parametrize("head", ["\n", "\r\n\r\n"])
def test_a_table_that_begins_with_an_empty_line(root, head):
    problems = refused(root, "table", table(root, head + HEAD + GOOD))
    says(
        problems,
        "mine.csv, heading: ",
        "the first line is empty",
        "Begin with the names of the columns",
    )


@pytest.mark.parametrize("text", ["{[1]: 2}", "9" * 5000, "[" * 99999])
def test_a_value_that_is_nothing_else_is_a_text(text):
    assert value_of(text) == text


@pytest.mark.parametrize("fault", CSV)
def test_bad_row_of_a_table(root, fault):
    row, *parts = CSV[fault]
    whole = made_data.picture(size=(300, 300))
    made_data.write(
        {
            "text.jpg": b"no picture at all",
            "cut.jpg": whole[: len(whole) // 2],
            "folder/x": b"",
            "bad.dcm": bytes(128) + b"DICM" + b"x" * 9,
        },
        root,
    )
    says(refused(root, "table", table(root, HEAD + GOOD + row)), "mine.csv", *parts)


HEADINGS = {
    "missing column": (
        "image,question\nok.jpg,Is it?\n",
        "mine.csv, heading",
        "no field answer",
        "It has image, question",
    ),
    "unknown column": (
        "image,question,answer,planet\nok.jpg,Is it?,yes,Mars\nok.jpg,Is it?,yes,Mars\n",
        "unknown column planet",
        "known are answer, answer_type",
    ),
    "column of patients": (
        "image,question,answer,patient_id\nok.jpg,Is it?,yes,7\n",
        "unknown column patient_id",
        "A patient's number goes into image_id",
    ),
    "column twice": (
        "image,question,answer,answer\nok.jpg,Is it?,yes,no\n",
        "heading",
        "two columns answer",
        "Rename",
    ),
    "semicolons": (
        "image;question;answer\nok.jpg;Is it, or not?;yes\n",
        "mine.csv, heading",
        "semicolons separate its columns",
        "Save it with commas",
    ),
    "bars": ("image|question|answer\nok.jpg|Is it?|yes\n", "heading", "bars separate"),
    "tabs": ("image\tquestion\tanswer\nok.jpg\tIs it?\tyes\n", "heading", "tabs separate"),
    "index of pandas": (
        ",image,question,answer\n0,ok.jpg,Is it?,yes\n",
        "mine.csv, heading",
        "a column has no name",
        "index=False",
    ),
    "open quote": (
        'image,question,"answer\nok.jpg,Is it?,yes\n',
        "mine.csv, heading",
        "not a CSV table (unexpected end of data)",
        "Quote fields",
    ),
    "empty file": ("", "mine.csv", "the file is empty", "Fetch it again or write it anew"),
    "heading only": ("image,question,answer\n", "mine.csv", "the table has no row", "write some"),
    "Latin-1": (
        "image,question,answer\nok.jpg,Gef\xe4\xdfe?,ja\n".encode("latin-1"),
        "mine.csv",
        "not UTF-8 (byte 32 is 0xe4)",
        "Save it as UTF-8",
    ),
    "UTF-16": (
        "image,question,answer\n".encode("utf-16"),
        "mine.csv",
        "not UTF-8",
        "Save it as UTF-8",
    ),
}


@pytest.mark.parametrize("fault", HEADINGS)
def test_bad_table(root, fault):
    text, *parts = HEADINGS[fault]
    says(refused(root, "table", table(root, text)), *parts)


def test_duplicate_ids(root):
    path = table(root, "qid,image,question,answer\n7,ok.jpg,Is it?,yes\n7,ok.jpg,Was it?,no\n")
    says(
        refused(root, "table", path),
        "mine.csv, row 3",
        "id '7' stands already in",
        "mine.csv, row 2",
        "Give each its own",
    )


def jsonl(root, *rows):
    return table(
        root,
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows),
        "mine.jsonl",
    )


ROW = dict(image="ok.jpg", question="Is it?", answer="yes")
REGIONS = {
    "unknown field": (
        [dict(name="Liver", box=[1, 2, 3, 4], colour="red")],
        "region 'Liver' has the unknown field colour",
    ),
    "box of 3 numbers": (
        [dict(name="Liver", box=[1, 2, 3])],
        "the box of region 'Liver' is [1, 2, 3]",
    ),
    "box of words": (
        [dict(name="Liver", box=["a", 2, 3, 4])],
        "the box of region 'Liver' is ['a', 2, 3, 4]",
    ),
    "box without width": (
        [dict(name="Liver", box=[1, 2, 0, 4])],
        "the box of region 'Liver' is [1, 2, 0, 4]",
    ),
    "mask file missing": (
        [dict(name="Liver", mask="gone.png", value=3)],
        "the mask of region 'Liver', gone.png, is missing",
    ),
    "mask without level": (
        [dict(name="Liver", mask="ok.jpg")],
        "region 'Liver' has a mask but no level as value",
    ),
    "mask's name too long": (
        [dict(name="Liver", mask="m" * 300, value=3)],
        "the mask of region 'Liver', mmm",
    ),
    "half a character": (
        [dict(name="Liver \ud83d", box=[1, 2, 3, 4])],
        "the name of a region holds half a character",
    ),
    "no place": ([dict(name="Liver")], "region 'Liver' has neither box nor mask"),
    "no name": ([dict(box=[1, 2, 3, 4])], "a region has no name"),
    "unknown kind": (
        [dict(name="Liver", box=[1, 2, 3, 4], kind="planet")],
        "region 'Liver' is of kind 'planet'",
    ),
    "an object": (dict(name="Liver", box=[1, 2, 3, 4]), "regions is not a list of objects"),
    "a list of names": (["Liver"], "regions is not a list of objects"),
}


@pytest.mark.parametrize("fault", REGIONS)
def test_bad_regions(root, fault):
    regions, part = REGIONS[fault]
    problems = refused(root, "table", jsonl(root, ROW, ROW | {"regions": regions}))
    says(problems, "mine.jsonl, row 2", part, "Write name, and box [left")


@pytest.mark.parametrize(
    "row, parts",
    [
        ('{"image": "ok.jpg", "question"', ("row 2", "not JSON", "Write one object a line")),
        ("[1, 2]", ("row 2", "list instead of an object", "Write one object a row")),
        (
            dict(image="ok.jpg", question="Is it?"),
            ("row 2", "no field answer", "It has image, question"),
        ),
        (ROW | {"answer": None}, ("row 2", "the answer is empty", "Write the answer")),
        (ROW | {"question": ["Is it?"]}, ("row 2", "the question is a list", "Write a text")),
        ("[" * 100_000, ("row 2", "not JSON (nested too deeply)", "Write one object a line")),
    ],
)
def test_bad_json_line(root, row, parts):
    says(refused(root, "table", jsonl(root, ROW, row)), "mine.jsonl", *parts)


@pytest.mark.parametrize(
    "text, parts",
    [
        (
            '[{"qid": 1,\n "image_name" "x"}]',
            ("trainset.json, line 2", "not JSON", "column 15", "Correct it or fetch it again"),
        ),
        (
            '{"qid": 1}',
            ("trainset.json", "dict instead of a list of objects", "Write [{...}, {...}]"),
        ),
        ("3", ("trainset.json", "int instead of a list", "Write [{...}, {...}]")),
        ("", ("trainset.json", "the file is empty", "Fetch it again")),
        ("[]", ("trainset.json", "the table has no row", "Fetch it again")),
        ("[1]", ("trainset.json, row 1", "int instead of an object", "Write one object a row")),
        (
            '[{"qid": 1}]',
            ("trainset.json, row 1", "no field image_name, image_organ", "It has qid"),
        ),
        ("[\xe4]".encode("latin-1"), ("trainset.json", "not UTF-8", "Save it as UTF-8")),
        ("[" * 100_000, ("trainset.json", "not JSON (nested too deeply)", "Correct it")),
        ("[" + "1" * 5000 + "]", ("trainset.json", "not JSON (Exceeds the limit", "Correct it")),
    ],
)
def test_bad_json_file(root, text, parts):
    made_data.write(made_data.rad_files(), root / "rad")
    table(root / "rad", text, "trainset.json")
    says(refused(root, "vqa_rad", root / "rad"), *parts)


def test_files_and_folders_that_are_not_there(root):
    says(
        refused(root, "vqa_rad", root / "none"),
        "none/images",
        "no such folder of images",
        "Put the images there",
    )
    (root / "rad").mkdir()
    (root / "rad/images").write_bytes(b"")
    says(
        refused(root, "vqa_rad", root / "rad"),
        "rad/images",
        "is a file, a folder of images is needed",
        "Unpack it there",
    )
    (root / "rad/images").unlink()
    (root / "rad/images").mkdir()
    says(
        refused(root, "vqa_rad", root / "rad"), "rad/trainset.json", "no such file", "Put it there"
    )
    says(refused(root, "table", root / "none.csv"), "none.csv", "no such file", "correct the path")
    says(refused(root, "table", root / "ok.jpg"), "ok.jpg", ".csv or .jsonl", "Convert it")


def test_names_and_options(root):
    says(
        refused(root, "radpath"),
        "dataset='radpath'",
        "unknown data set",
        "ovqa, ",
        "slake, table, vqa_rad, vqa_rad_hub",
    )
    says(
        refused(root, "table"),
        "dataset='table'",
        "no file given",
        "Give the path of your CSV or JSONL file",
    )
    says(
        refused(root, "slake", root, colour="red"),
        "option colour",
        "unknown for slake",
        "It takes language",
    )
    says(
        refused(root, "slake", root, language="fr"),
        "language='fr'",
        "SLAKE has no such language",
        "'en' or 'zh'",
    )
    says(
        refused(root, "vqa_rad", root, version="new"),
        "version='new'",
        "unknown version",
        "'field' or 'public'",
    )


def squares(root):
    "The entries of a person's own loader, forty of them."
    values = dict(image=str(root / "ok.jpg"), image_id="ok", question="Is it?", answer="yes")
    values |= dict(answer_type="CLOSED", split="train")
    return [Entry(f"square {i}", values | dict(qid=i)) for i in range(40)]


def test_the_place_of_a_loader_of_your_own(root, monkeypatch):
    seen = []
    monkeypatch.setitem(LOADERS, "squares", lambda root: seen.append(Path(root)) or check([]))
    place = data_home() / "squares"
    says(refused(root, "squares"), f"{place}: ", "no data_root is given", "as data_root")
    says(refused(root, "squares", root / "gone"), "gone: no such file", "correct the path")
    assert not seen
    place.mkdir(parents=True)
    says(refused(root, "squares"), f"{place}: the loader of squares finds no question", "data_root")
    says(refused(root, "squares", root), f"{root}: the loader of squares finds no question")
    assert seen == [place, root]
    monkeypatch.setitem(LOADERS, "made", lambda root=None: check(squares(seen[1])))
    assert len(load_dataset("made")) == 40  # it needs no place
    with pytest.raises(InputError, match="loader 'none': it takes no folder. Give it the param"):
        loader("none")(lambda: [])


@pytest.mark.parametrize(
    "returned, found",
    [
        (lambda root: None, "returns NoneType."),
        (lambda root: squares(root)[0].values, "returns dict."),
        (lambda root: squares(root), "returns a list of Entry."),
        (lambda root: [*check(squares(root)), {}, None], "returns a list of NoneType, dict."),
        (lambda root: (s for s in check(squares(root))), "returns generator."),
    ],
)
def test_what_a_loader_of_your_own_returns(root, monkeypatch, returned, found):
    monkeypatch.setitem(LOADERS, "squares", returned)
    says(refused(root, "squares", root), "dataset='squares': its loader", found, "VQASample")


@pytest.mark.parametrize(
    "change, parts",
    [
        (dict(patient=7), ("square 0: unknown field patient", "known are answer, answer_type")),
        (dict(image=None), ("square 0: no image is named", "Name a file")),
    ],
)
def test_fields_of_a_loader_of_your_own(root, monkeypatch, change, parts):
    entries = squares(root)
    entries[0].values.update(change)
    monkeypatch.setitem(LOADERS, "squares", lambda root: check(entries))
    says(refused(root, "squares", root), *parts)
    entries[0].values.pop("image")
    assert any("no image is named" in p for p in refused(root, "squares", root))
    entries[0] = entries[0].values
    says(refused(root, "squares", root), "entries: they hold dict, not Entry", "Entry(where, val")


def test_image_over_the_limit_of_pil(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    path = table(root, HEAD + GOOD)
    says(
        refused(root, "table", path),
        "row 2",
        "ok.jpg has more than 1,800 pixels",
        "Put a whole image there",
    )


def test_bad_parquet(root):
    files = made_data.flavia_files()
    test = "data/test-00000-of-00001-abc.parquet"
    made_data.write(files | {test: b"PAR1 no"}, root / "hub")
    says(refused(root, "vqa_rad_hub", root / "hub"), test, "not a parquet table", "Fetch it again")
    rows = made_data.rad_rows("test")
    made_data.write(
        {test: made_data.parquet([{"question": "Is it?"}], [made_data.picture()])}, root / "hub"
    )
    says(
        refused(root, "vqa_rad_hub", root / "hub"),
        f"{test}, heading",
        "no field answer",
        "It has question, image",
    )
    made_data.write({test: made_data.parquet(rows[:2], [b"no picture", None])}, root / "hub")
    problems = refused(root, "vqa_rad_hub", root / "hub")
    assert (
        len(problems) == 2
        and all("cannot be read" in p for p in problems)
        and f"{test}, row 2" in problems[1]
    )
    (root / "hub" / test).unlink()
    says(
        refused(root, "vqa_rad_hub", root / "hub"),
        "hub/data",
        "no test-*.parquet",
        "Put flaviagiammarino/vqa-rad there",
    )


def test_bad_slake_files(root):
    whole = made_data.slake_files()
    for name, content, parts in (
        ("imgs/xmlab0/detection.json", b"[{", ("xmlab0/detection.json, line 1", "not JSON")),
        (
            "imgs/xmlab0/detection.json",
            b'[{"Liver": [1, 2, 3]}]',
            ("detection.json, row 1", "the box of 'Liver' is [1, 2, 3]"),
        ),
        (
            "imgs/xmlab0/mask.png",
            whole["imgs/xmlab0/mask.png"][:60],
            ("xmlab0/mask.png", "cannot be read as a label map"),
        ),
        ("imgs/xmlab0/source.jpg", b"", ("train.json, row", "xmlab0/source.jpg cannot be")),
        ("mask.txt", b"\xff\xfe", ("mask.txt", "not UTF-8")),
    ):
        problems = refused(root, "slake", made_data.write(whole | {name: content}, root / "slake"))
        for part in parts:
            assert part in problems[0]


def test_all_problems_are_listed_at_once(root):
    rows = [
        "gone.jpg,Is it?,yes,CLOSED,train",
        "ok.jpg,,,PERHAPS,dev",
        GOOD.strip(),
        "gone.jpg,Is it?,no,CLOSED,test",
    ]
    problems = refused(root, "table", table(root, HEAD + "\n".join(rows) + "\n"))
    assert [p.split(": ")[0].rsplit(", ", 1)[1] for p in problems] == [
        "row 2",
        "row 3",
        "row 3",
        "row 3",
        "row 3",
        "row 5",
    ]
    with pytest.raises(InputError, match="^6 problems found:\n"):
        load_dataset("table", root / "mine.csv")
    for broken in (["1"] * 3, ["{"] * 3):
        assert len(refused(root, "table", jsonl(root, *broken))) == 3


def test_the_same_fault_in_many_rows_is_one_line(root, monkeypatch):
    entries = squares(root)
    for e in entries[2:]:
        e.values.pop("split")
    entries[0].values["answer"] = ""
    monkeypatch.setitem(LOADERS, "squares", lambda root: check(entries))
    empty, split = refused(root, "squares", root)
    assert empty.startswith("square 0: the answer is empty")
    says([split], "square 2 and 37 more: unknown split ''. Write train, validation or test.")
    for path in (
        table(root, HEAD + "a,b\n" * 60),
        jsonl(root, *["{"] * 60),
        jsonl(root, *[dict(image="ok.jpg", question="Is it?")] * 60),
    ):
        says(refused(root, "table", path), " and 59 more: ")
    rows = "".join(f'ok.jpg,Is it {i}?,yes,"[]"\n' for i in range(9))
    path = table(root, "image,question,answer,regions\n" + rows)
    says(refused(root, "table", path), "row 2 and 8 more: regions is not a list", "use JSONL")


def test_what_is_harmless_is_accepted(root):
    rows = 'ok.jpg,Is it?, Yes ,CLOSED ,train\r\nok.jpg,"Where, then?",left,open,test\n'
    path = table(root, "\ufeff" + HEAD + rows)
    samples = load_dataset("table", path)
    assert [s.answer_type for s in samples] == ["CLOSED", "OPEN"] and samples[0].answer == "Yes"
    rows = jsonl(
        root, ROW | {"answer": 2, "qid": 5, "organ": None}, "", ROW | {"question": "one\u2028line"}
    )
    assert [s.answer for s in load_dataset("table", rows)] == ["2", "yes"]
    out = io.BytesIO()
    Image.open(root / "ok.jpg").save(out, "TIFF")
    upper = table(
        made_data.write({"x.TIF": out.getvalue()}, root),
        "image,question,answer\nx.TIF,Is it?,no\n",
        "MINE.CSV",
    )
    assert load_dataset("table", upper)[0].image_id == "x.TIF"


NAN = float("nan")


@pytest.mark.parametrize(
    "field, value, parts",
    [
        ("question", NAN, ("the question is empty", "Write the question")),
        ("answer", NAN, ("the answer is empty", "Write the answer")),
        ("answer", [], ("the answer is a list", "Write a text")),
        ("answer", ["yes"], ("the answer is a list", "Write a text")),
        ("question", {}, ("the question is a dict", "Write a text")),
        ("organ", ["Lung", "Heart"], ("the organ is a list", "Write a text")),
        ("linked_id", {"a": 1}, ("the linked_id is a dict", "Write a text")),
        ("answer", True, ("the answer is a bool", "Write a text")),
        ("organ", False, ("the organ is a bool", "Write a text")),
        ("image_id", ["a"], ("the image_id is a list", "Write a text")),
    ],
)
def test_values_that_are_no_text(root, field, value, parts):
    problems = refused(root, "table", jsonl(root, ROW, ROW | {field: value}))
    says(problems, "mine.jsonl, row 2", *parts)


FIELDS = {  # of VQA-RAD and OVQA -> what stands there, how the error calls the field
    "qid": ([None, "", " ", [1], True], "qid"),
    "image_name": ([None, "", ["made0.jpg"]], "image_name"),
    "question_type": ([None, "", ["PRES"], False], "question_type"),
    "image_organ": ([["CHEST"]], "organ"),
    "question": ([None, True], "question"),
    "answer": ([None, True, {"a": 1}], "answer"),
    "phrase_type": ([["para"], True], "phrase_type"),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name, folder", [("vqa_rad", "images"), ("ovqa", "img")])
def test_values_that_are_no_text_in_fields_of_vqa_rad(root, name, folder, field):
    values, called = FIELDS[field]
    files = {f"{folder}/made{i}.jpg": made_data.picture(i) for i in range(3)}
    for split in ("train", "val", "test"):
        files[f"{split}set.json"] = json.dumps(made_data.rad_rows(split)).encode()
    for value in values:
        rows = made_data.rad_rows("train")
        rows[1][field] = value
        made_data.write(files | {"trainset.json": json.dumps(rows).encode()}, root / name)
        kind = f"a {type(value).__name__}" if value and value != " " or value is False else "empty"
        problems = refused(root, name, root / name)
        says(problems, f"trainset.json, row 2: the {called} is {kind}. Write ")


@pytest.mark.parametrize("field", ["phrase_type", "qid_linked_id", "qid"])
def test_null_in_the_public_file_of_vqa_rad(root, field):
    rows = [r | {"qid_linked_id": "g"} for r in made_data.rad_rows("train")]
    rows[1][field] = None
    public = "VQA_RAD Dataset Public.json"
    made_data.write(made_data.rad_files() | {public: json.dumps(rows).encode()}, root / "rad")
    for version in ("field", "public"):
        problems = refused(root, "vqa_rad", root / "rad", version=version)
        says(problems, f"{public}, row 2: the {field} is empty. Write the {field}")


def test_frames_that_are_null_tie_no_questions_together(root):
    rows = made_data.rad_rows("train")
    public = [r | {"qid_linked_id": i, "question_frame": None} for i, r in enumerate(rows)]
    name = "VQA_RAD Dataset Public.json"
    made_data.write(made_data.rad_files() | {name: json.dumps(public).encode()}, root / "rad")
    linked = [s.linked_id for s in load_dataset("vqa_rad", root / "rad") if s.split == "train"]
    assert linked == [str(i) for i in range(len(rows))]


def test_labels_of_any_kind_become_texts_or_none(root):
    rows = [
        ROW | {"organ": NAN, "linked_id": 7, "split": NAN, "answer_type": NAN},
        ROW | {"organ": " ", "linked_id": "7", "modality": 3},
    ]
    first, second = load_dataset("table", jsonl(root, *rows))
    assert (first.organ, second.organ, second.modality) == (None, None, "3")
    assert first.linked_id == second.linked_id == "7" and first.answer_type == "CLOSED"


# what a row holds -> what is said of it: JSON can write half of a character, files cannot
HALVES = {
    "question": ("the question holds half a character", "Write it whole"),
    "answer": ("the answer holds half a character", "Write it whole"),
    "qid": ("the qid holds half a character", "Write it whole"),
    "organ": ("the organ holds half a character", "Write it whole"),
    "image_id": ("the image_id holds half a character", "Write it whole"),
    "split": (r"unknown split 'x\ud83d'", "Write train, validation or test"),
    "planet": ("unknown column planet", "Rename or delete it"),
}


@pytest.mark.parametrize("field", HALVES)
@pytest.mark.parametrize("row", [ROW, ROW | {"split": "test"}], ids=["hashed", "given"])
def test_half_a_character(root, row, field):
    problems = refused(root, "table", jsonl(root, row | {field: "x\ud83d"}))
    says(problems, "mine.jsonl, row 1", *HALVES[field])


def test_half_a_character_in_an_image_name(root):
    problems = refused(root, "table", jsonl(root, ROW, ROW | {"image": "x\ud83d.jpg"}))
    assert all("mine.jsonl, row 2" in p for p in problems)
    assert r"x\ud83d.jpg is missing" in problems[-1]


def test_each_message_can_be_printed():
    message = str(InputError([Problem("a\ud83d", "b", "c")] * 2))
    assert message.encode() and r"a\ud83d: b. c." in message


@pytest.mark.parametrize(
    "end, row",
    [(b'{"answer": "ye', 2), (b'{"answer": "gef\xc3', 2), (b'\n\n{"answer"', 4)],
)
def test_rows_that_were_cut_off(tmp_path, end, row):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b'{"answer": "yes"}\n' + end)
    with pytest.raises(InputError) as e:
        read_jsonl(path)
    says([str(p) for p in e.value.problems], f"predictions.jsonl, row {row}", "not whole", "Run")
    path.write_bytes(b'{"answer": "yes"}\r\n\n{"answer": "gef\xc3\xa4\xe2\x80\xa8"}')
    assert read_jsonl(path) == [{"answer": "yes"}, {"answer": "gef\xe4\u2028"}]


@pytest.mark.parametrize("name", ["vqa_rad", "vqa_rad_hub", "slake", "ovqa", "table"])
def test_a_path_that_is_too_long(root, name):
    path = "x" * 300 + (".csv" if name == "table" else "")
    (problem,) = refused(root, name, root / path)
    assert path in problem


def test_images_named_too_long(root):
    for name, files, file, field in (
        ("vqa_rad", made_data.rad_files(), "trainset.json", "image_name"),
        ("slake", made_data.slake_files(), "train.json", "img_name"),
    ):
        rows = json.loads(files[file])
        rows[0][field] = "i" * 300 + "/source.jpg"
        made_data.write(files | {file: json.dumps(rows).encode()}, root / name)
        problems = refused(root, name, root / name)
        assert all("row 1" in p and "is missing" in p for p in problems)


# ---------------------------------------------------------------- what may not be read or written


@contextlib.contextmanager
def as_stranger():
    "As a user whom permissions bind; they bind everyone but root."
    if os.getuid():
        yield
        return
    if not hasattr(os, "setresuid"):
        pytest.skip("root cannot become another user here")
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def open_root(monkeypatch):
    "As `root`, where a stranger may look: pytest's own folders are shut."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        made_data.write({f"{name}.jpg": made_data.picture() for name in ("ok", "shut")}, folder)
        (folder / "shut.jpg").chmod(0)
        monkeypatch.delenv("CMI_MTL_DATA", raising=False)
        yield folder


def test_a_picture_that_may_not_be_read(open_root):
    text = "image,question,answer\nok.jpg,Is it?,yes\nshut.jpg,Is it?,yes\n"
    path = table(open_root, text)
    with as_stranger():
        problems = refused_quietly("table", path)
    says(problems, "mine.csv, row 3", "shut.jpg cannot be read", "Allow reading it")


def test_a_mask_that_may_not_be_read(open_root):
    region = dict(name="Liver", mask="shut.jpg", value=3)
    path = jsonl(open_root, ROW, ROW | {"regions": [region]})
    with as_stranger():
        problems = refused_quietly("table", path)
    says(problems, "mine.jsonl, row 2", "the mask of region 'Liver', shut.jpg, may not be read")


def refused_quietly(*args):
    with pytest.raises(InputError) as e:
        load_dataset(*args)
    return [str(p) for p in e.value.problems]


def test_a_cache_that_is_a_file(root, monkeypatch):
    for place in (root / "ok.jpg", root / "ok.jpg/below"):
        monkeypatch.setenv("CMI_MTL_CACHE", str(place))
        with pytest.raises(InputError, match="CMI_MTL_CACHE='.*ok.jpg is a file.* Set CMI_MTL_CA"):
            cache_home()
        with pytest.raises(OSError):  # of both kinds: a compiled scan is done without
            cache_home()


@pytest.fixture
def shut_folders(open_root):
    "Two folders that may be read, not written: one is empty, one is not."
    folders = [open_root / name for name in ("empty", "full")]
    made_data.write({"full/kept": b""}, open_root)
    folders[0].mkdir()
    for folder in folders:
        folder.chmod(0o555)
    yield open_root
    for folder in folders:
        folder.chmod(0o755)


@pytest.mark.parametrize("place", ["empty", "empty/new", "full/new"])
def test_a_cache_that_cannot_be_written(shut_folders, monkeypatch, place):
    monkeypatch.setenv("CMI_MTL_CACHE", str(shut_folders / place))
    with as_stranger():
        with pytest.raises(InputError, match="CMI_MTL_CACHE=.*nothing can be written in .*Set"):
            cache_home()
        assert data_home() == shut_folders / place / "data"  # who only reads is not held up


def test_a_full_cache_that_may_only_be_read(shut_folders, monkeypatch):
    monkeypatch.setenv("CMI_MTL_CACHE", str(shut_folders / "full"))
    with as_stranger():
        assert cache_home() == shut_folders / "full"
        with pytest.raises(InputError, match="full/new: cannot be written.*Allow writing there"):
            with atomic_path(cache_home() / "new"):
                pass


def test_no_home_folder_is_known(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    for name in ("CMI_MTL_CACHE", "CMI_MTL_DATA"):
        monkeypatch.delenv(name, raising=False)
    for look in (cache_home, data_home):
        with pytest.raises(InputError, match="CMI_MTL_CACHE: is not set, .* Set CMI_MTL_CACHE to"):
            look()
    monkeypatch.setenv("CMI_MTL_DATA", "/d")
    assert data_home() == Path("/d")
