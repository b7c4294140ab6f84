"""The real huggingface_hub client against a small hub of our own on 127.0.0.1, which can break off, lie and vanish."""

import hashlib
import http.server
import io
import json
import stat
import threading
import zipfile
from urllib.parse import unquote, urlsplit

import made_data
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, logging

from cmi_mtl import fetch
from cmi_mtl.core import InputError, NotWritable, Problem
from cmi_mtl.datasets import load_dataset
from cmi_mtl.fetch import HUB, download
from cmi_mtl.slake import load_slake

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def zip_of(files):
    "Bytes of a zip file; a value may be a pair (bytes, file mode)."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            content, mode = (
                content if isinstance(content, tuple) else (content, stat.S_IFREG | 0o644)
            )
            info.external_attr = mode << 16
            z.writestr(info, content)
    return out.getvalue()


def slake_hub_files(**changed):
    files = made_data.slake_files()
    hub = {
        "README.md": b"made",
        "mask.txt": files["mask.txt"],
        "train.json": files["train.json"],
        "validation.json": files["validate.json"],
        "test.json": files["test.json"],
    }
    for name in ("imgs", "KG"):
        hub[f"{name}.zip"] = zip_of({k: v for k, v in files.items() if k.startswith(f"{name}/")})
    return hub | changed


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        if hub.down:
            return self.connection.close()
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            repo = "/".join(parts[2:4])
            hub.revisions.append(parts[-1])
            return self.send(hub.info(repo)) if repo in hub.repos else self.missing("RepoNotFound")
        repo, name = "/".join(parts[1:3]), "/".join(parts[5:])
        if name not in hub.repos.get(repo, {}):
            return self.missing("EntryNotFound")
        content = hub.repos[repo][name]
        sent = bytes(len(content)) if name in hub.wrong else content
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if body:
            hub.gets.append((name, start))
        head = {
            "ETag": f'"{hub.sum(name, content)}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{hub.sum(name, content)}"',
            "Accept-Ranges": "bytes",
        }
        if start:
            head["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = body and hub.cut.pop(name, None)
        if cut:
            hub.down = hub.down_after_cut
        self.send(sent[start:], head, 206 if start else 200, body, cut)

    def send(self, content, headers={}, status=200, body=True, cut=None):
        self.send_response(status)
        for k, v in (
            {"Content-Length": str(len(content)), "Content-Type": "application/json"} | headers
        ).items():
            self.send_header(k, v)
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])

    def missing(self, code):
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, 404)


class Hub:
    """`repos`: name -> files. `wrong`: files whose bytes come out as zeros. `cut`: file -> bytes after which the connection
    breaks, once; with `down_after_cut` nothing answers from then on. `gets`: the files fetched and from which byte.
    `revisions`: those that were asked for."""

    def __init__(self):
        self.repos, self.wrong, self.cut, self.gets, self.down, self.down_after_cut = (
            {},
            set(),
            {},
            [],
            False,
            False,
        )
        self.revisions = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def is_lfs(self, name):
        return name.endswith((".zip", ".parquet"))

    def sum(self, name, content):
        if self.is_lfs(name):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def info(self, repo):
        siblings = []
        for name, content in self.repos[repo].items():
            lfs = {"sha256": self.sum(name, content), "size": len(content), "pointerSize": 134}
            siblings.append(
                {"rfilename": name, "size": len(content)}
                | (
                    {"lfs": lfs, "blobId": "0" * 40}
                    if self.is_lfs(name)
                    else {"blobId": self.sum(name, content)}
                )
            )
        return json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    hub.repos = {
        "OctoMed/VQA-RAD": made_data.octomed_files(),
        "flaviagiammarino/vqa-rad": made_data.flavia_files(),
        "BoKelvin/SLAKE": slake_hub_files(),
    }
    monkeypatch.setenv("CMI_MTL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CMI_MTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)  # these two are what HF_ENDPOINT sets
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 256
    )  # 10 MB: what a broken connection may lose
    disable_progress_bars()
    logging.set_verbosity_error()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def failure(f, *args, **kw):
    with pytest.raises(InputError) as e:
        f(*args, **kw)
    return str(e.value)


@pytest.mark.parametrize("name, questions", [("vqa_rad", 12), ("vqa_rad_hub", 12), ("slake", 6)])
def test_downloads_and_loads(hub, tmp_path, capsys, name, questions):
    samples = load_dataset(name)
    assert len(samples) == questions and {s.split for s in samples} >= {"train", "test"}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and HUB[name][0] in said and str(tmp_path / "data" / name) in said
    source = json.loads((tmp_path / "data" / name / "source.json").read_text(encoding="utf-8"))
    assert (
        source["repository"] == HUB[name][0]
        and source["commit"] == COMMIT
        and "README.md" not in source["sums"]
    )
    assert {f: hub.sum(f, hub.repos[HUB[name][0]][f]) for f in source["sums"]} == source["sums"]
    assert [p.name for p in (tmp_path / "data").iterdir()] == [name]  # no staging folder is left
    assert hub.revisions == [HUB[name][1]]  # pinned
    hub.down = True
    assert (
        load_dataset(name) == samples and download(name) == tmp_path / "data" / name
    )  # not fetched again


def test_vqa_rad_comes_in_the_layout_of_the_field(hub, tmp_path):
    root = download("vqa_rad", tmp_path / "elsewhere")
    assert sorted(p.name for p in root.iterdir()) == [
        "images",
        "source.json",
        "testset.json",
        "trainset.json",
    ]
    rows = json.loads((root / "trainset.json").read_text(encoding="utf-8"))
    assert [{k: x for k, x in r.items() if k != "image_hash"} for r in rows] == made_data.rad_rows(
        "train"
    )
    assert (root / "images/made2.jpg").read_bytes() == made_data.picture(2)


def test_slake_keeps_regions_and_graph(hub, tmp_path):
    root = download("slake", tmp_path / "slake")
    assert (
        (root / "KG/en_organ.csv").exists()
        and (root / "mask.txt").exists()
        and (root / "validate.json").exists()
    )
    assert not list(root.glob("*.zip")) and load_slake(root)[0].regions[0].name == "Right Lung"


def test_empty_folder_counts_as_absent(hub, tmp_path):
    (tmp_path / "slake").mkdir()
    assert len(load_slake(download("slake", tmp_path / "slake", revision="main"))) == 6
    assert hub.revisions == ["main"]


def test_broken_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.cut = {"imgs.zip": 700}
    download("slake")
    assert [start for name, start in hub.gets if name == "imgs.zip"] == [0, 512]


def test_interrupted_download_goes_on(hub, tmp_path):
    hub.cut, hub.down_after_cut = {"test.json": 100}, True
    message = failure(load_dataset, "slake")
    assert (
        "BoKelvin/SLAKE" in message and "cannot be fetched" in message and "CMI_MTL_DATA" in message
    )
    assert not (tmp_path / "data/slake").exists() and (tmp_path / "data/.slake.download").is_dir()
    whole = {name for name, _ in hub.gets} - {"test.json"}
    assert whole
    hub.down, hub.gets = False, []
    assert len(load_dataset("slake")) == 6
    assert not whole & {name for name, _ in hub.gets} and ("test.json", 0) in hub.gets
    assert not (tmp_path / "data/.slake.download").exists()


@pytest.mark.parametrize("name", ["imgs.zip", "train.json"])
def test_wrong_sum(hub, tmp_path, name):
    hub.wrong = {name}
    message = failure(download, "slake")
    assert f"BoKelvin/SLAKE, {name}" in message and "checksum" in message and "removed" in message
    assert not (tmp_path / "data/slake").exists() and not list(tmp_path.rglob(name))
    hub.wrong, hub.gets = set(), []
    assert len(load_slake(download("slake"))) == 6
    assert hub.gets == [(name, 0)]


def test_archive_that_leads_out_of_its_folder(hub, tmp_path):
    hub.repos["BoKelvin/SLAKE"]["imgs.zip"] = zip_of(
        {"imgs/xmlab0/source.jpg": b"x", "imgs/../../../evil.txt": b"evil"}
    )
    message = failure(download, "slake")
    assert (
        "imgs.zip" in message and "'imgs/../../../evil.txt'" in message and "leads out" in message
    )
    assert not list(tmp_path.rglob("evil.txt")) and not (tmp_path / "data/slake").exists()


@pytest.mark.parametrize(
    "files, says",
    [
        ({"../evil": b"x"}, "leads out"),
        ({"/evil": b"x"}, "leads out"),
        ({"C:/evil": b"x"}, "leads out"),
        ({"a\\..\\..\\evil": b"x"}, "leads out"),
        ({"a": (b"/etc", stat.S_IFLNK | 0o777), "a/evil": b"x"}, "is a link"),
        ({"a": bytes(3000), "b": bytes(3000)}, "more than"),
    ],
)
def test_unsafe_archives(tmp_path, files, says):
    (tmp_path / "imgs.zip").write_bytes(zip_of(files))
    assert says in failure(fetch._unzip, tmp_path / "imgs.zip", tmp_path / "in/out", limit=5000)
    assert [p.name for p in tmp_path.rglob("*")] == ["imgs.zip"]


@pytest.mark.parametrize(
    "spoil",
    [lambda b: b[:-30], lambda b: b"PK" + bytes(50), lambda b: b[:40] + b"\xff" * 20 + b[60:]],
)
def test_damaged_archive(tmp_path, spoil):
    (tmp_path / "imgs.zip").write_bytes(
        spoil(zip_of({"imgs/a.txt": b"some text to be deflated " * 9}))
    )
    assert "not a whole zip file" in failure(fetch._unzip, tmp_path / "imgs.zip", tmp_path / "out")


def test_archive_with_or_without_a_folder_of_its_own(tmp_path):
    for name in ("imgs/a.txt", "a.txt"):
        out = tmp_path / f"from {name.replace('/', ' ')}"
        (tmp_path / "imgs.zip").write_bytes(zip_of({name: b"x", "__MACOSX/a.txt": b"x"}))
        fetch._unzip(tmp_path / "imgs.zip", out)
        assert [str(p.relative_to(out)) for p in out.rglob("*.txt")] == ["imgs/a.txt"]


def test_what_the_loader_refuses_does_not_come_into_place(hub, tmp_path):
    rows = made_data.slake_rows(0, [0])
    hub.repos["BoKelvin/SLAKE"]["train.json"] = json.dumps(
        [rows[0] | {"answer": ""}, rows[1]]
    ).encode()
    assert "the answer is empty" in failure(load_dataset, "slake")
    assert not (tmp_path / "data/slake").exists()


def test_no_server(hub, tmp_path):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(InputError) as e:
        load_dataset("vqa_rad")
    message = str(e.value)
    assert (
        "OctoMed/VQA-RAD" in message and hub.endpoint in message and "set CMI_MTL_DATA" in message
    )
    assert len(message) < 500 and "\n" not in message and "urllib3" not in message
    assert e.value.__suppress_context__ and not (tmp_path / "data/vqa_rad").exists()


def test_repository_or_file_gone(hub, tmp_path):
    del hub.repos["BoKelvin/SLAKE"]["imgs.zip"]
    assert "imgs: no such folder of images" in failure(download, "slake")
    hub.repos = {}
    message = failure(download, "slake")
    assert (
        "RepositoryNotFoundError" in message and "BoKelvin/SLAKE" in message and "\n" not in message
    )


def test_place_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "data").write_text("a file", encoding="utf-8")
    message = failure(download, "slake")
    assert (
        str(tmp_path / "data/slake") in message
        and "cannot be written" in message
        and "CMI_MTL_DATA" in message
    )


def test_another_place_that_cannot_be_written_is_named_itself(hub, tmp_path, monkeypatch):
    "Such as a cache that the loader keeps: it is no fault of the data's folder."

    def write_json(path, obj):
        raise NotWritable(Problem("/elsewhere", "cannot be written (full)", "Make room there"))

    monkeypatch.setattr(fetch, "write_json", write_json)
    assert failure(download, "slake") == "/elsewhere: cannot be written (full). Make room there."


def test_ovqa_says_how_to_apply(hub, tmp_path):
    for f in (download, load_dataset):
        message = failure(f, "ovqa")
        assert (
            "data-use agreement" in message
            and "http://47.94.174.82/" in message
            and "3477495.3531724" in message
        )
        assert str(tmp_path / "data/ovqa/OVQA_publish") in message and "valset.json" in message
    assert "vqa_rad, vqa_rad_hub, slake" in failure(download, "table", tmp_path)
