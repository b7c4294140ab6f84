"Invented pictures and questions in the layouts of the real data sets. Not one of them comes from a real one."

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

LEVELS = {"Liver": 70, "Heart": 180, "Left Ear": 120, "Left Lung": 215, "Right Lung": 225}


def picture(seed=0, size=(48, 40), kind="JPEG"):
    "Bytes of a noise picture, another for each seed."
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0]), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def label_map(mode="RGBA", levels=(215, 225)):
    "Bytes of a PNG whose left half has the first level and whose right half has the second."
    a = np.zeros((40, 48), np.uint8)
    a[5:35, 2:24], a[5:35, 24:46] = levels
    out = io.BytesIO()
    image = Image.fromarray(a).convert(mode)
    if mode == "P":  # a level's colour says nothing: its index is the level
        image.putpalette([x for i in range(256) for x in (255 - i, i // 2, 7)])
    image.save(out, "PNG")
    return out.getvalue()


def rad_rows(split, n=6):
    "Rows with the fields of VQA-RAD's trainset.json; two of them on each picture."
    return [
        dict(
            qid=i,
            image_name=f"made{i // 2}.jpg",
            image_organ="CHEST",
            answer="Yes" if i % 2 else "left side",
            answer_type="CLOSED " if i % 2 else "OPEN",
            question_type="PRES, POS",
            question=f"Invented {split} question number {i}?",
            phrase_type="freeform",
        )
        for i in range(n)
    ]


def parquet(rows, pictures):
    "Bytes of a parquet table of rows with an image column as the datasets library writes it."
    rows = [r | {"image": {"bytes": p, "path": None}} for r, p in zip(rows, pictures)]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def octomed_files():
    "The files of a hub repository like OctoMed/VQA-RAD."

    def rows(split):
        return [r | {"image_hash": "0"} for r in rad_rows(split)]

    pictures = [picture(i // 2) for i in range(6)]
    return {"README.md": b"made"} | {
        f"data/{split}-00000-of-00001.parquet": parquet(rows(split), pictures)
        for split in ("train", "test")
    }


def flavia_files():
    "The files of a hub repository like flaviagiammarino/vqa-rad."

    def rows(split):
        return [{k: r[k] for k in ("question", "answer")} for r in rad_rows(split)]

    return {
        f"data/{split}-00000-of-00001-abc.parquet": parquet(
            rows(split), [picture(i // 2) for i in range(6)]
        )
        for split in ("train", "test")
    }


def slake_rows(first, images, questions=("Is the right lung healthy?", "Where is the heart?")):
    return [
        dict(
            img_id=i,
            img_name=f"xmlab{i}/source.jpg",
            question=q,
            answer="No" if "right" in q else "Left",
            q_lang="en",
            location="Chest",
            modality="CT",
            answer_type="CLOSED" if "right" in q else "OPEN",
            base_type="vqa",
            content_type="Abnormality",
            triple=["vhead", "_", "_"],
            qid=first + 10 * i + k,
        )
        for i in images
        for k, q in enumerate(questions)
    ]


def slake_files():
    "Unpacked SLAKE: name -> bytes. Image 0 has a label map and boxes, 1 a mask.png that is a picture, 2 has neither."
    files = {f"imgs/xmlab{i}/source.jpg": picture(i) for i in range(3)}
    boxes = [
        {"Right Lung": [2.0, 5.0, 22.0, 30.0]},
        {"Heart": [10.0, 10.0, 8.0, 9.0]},
        {"Heart": [30, 10, 8, 9]},
    ]
    files |= {
        "imgs/xmlab0/detection.json": json.dumps(boxes).encode(),
        "imgs/xmlab0/mask.png": label_map(levels=(225, 215)),
        "imgs/xmlab1/mask.png": picture(9, kind="PNG"),
        "imgs/xmlab2/detection.json": b"[]",
        "KG/en_organ.csv": b"made\n",
        "mask.txt": "\n".join(f"{v}:{k}" for k, v in LEVELS.items()).encode(),
    }
    return files | {
        f"{name}.json": json.dumps(slake_rows(1000 * i, [i])).encode()
        for i, name in enumerate(("train", "validate", "test"))
    }


def ovqa_files():
    "OVQA in its published layout."
    files = {f"OVQA_publish/img/made{i}.jpg": picture(i) for i in range(3)}
    return files | {
        f"OVQA_publish/{f}.json": json.dumps(rad_rows(f)).encode()
        for f in ("trainset", "valset", "testset")
    }


def rad_files():
    "VQA-RAD as the field uses it."
    files = {f"images/made{i}.jpg": picture(i) for i in range(3)}
    return files | {
        f"{split}set.json": json.dumps(rad_rows(split)).encode() for split in ("train", "test")
    }


def write(files, root):
    "Write name -> bytes under `root`; return root."
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def listing(root):
    "Every file under `root` with its bytes: two listings are equal when nothing was written."
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }
