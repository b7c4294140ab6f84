"The scan where something is missing or does not fit: the compiler, a path, the lengths of the rows."

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from cmi_mtl import scan
from cmi_mtl.core import InputError

LENGTHS = torch.tensor([4, 1, 8])
PATHS = ["compiled", "chunked"] if scan.scan_path(torch.zeros(1)) == "compiled" else ["chunked"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    "Every path that rows can take on this machine."
    monkeypatch.setattr(scan, "scan_path", lambda u, path=None: path or request.param)
    return request.param


def rows(T=13, d=6, n=4, **changes):
    x = dict(u=(T, d), delta=(T, d), A=(d, n), B=(T, n), C=(T, n), D=(d,), delta_bias=(d,))
    x = {k: torch.randn(size, generator=torch.Generator().manual_seed(0)) for k, size in x.items()}
    return x | dict(A=-x["A"].abs()) | changes


# ---------------------------------------------------------------- rows and their lengths


@pytest.mark.parametrize("lengths", [[4, 1, 9], [4, 1, 7], [-1, 5, 9]], ids=str)
def test_lengths_that_do_not_fit_the_rows_are_named(path, lengths):
    "In C they would be addresses outside the tensor."
    lengths = torch.tensor(lengths)
    with pytest.raises(InputError, match=r"scan_rows, lengths: .*There are 13 rows"):
        scan.scan_rows(**rows(), lengths=lengths)
    with pytest.raises(InputError, match=r"conv_rows, lengths: .*There are 13 rows"):
        scan.conv_rows(torch.randn(13, 6), torch.randn(6, 4), None, lengths)


@pytest.mark.parametrize(
    "name, size", [("delta", (12, 6)), ("B", (13, 5)), ("C", (12, 4)), ("D", (5,)), ("A", (7, 4))]
)
def test_rows_that_do_not_fit_each_other_are_named(path, name, size):
    with pytest.raises(InputError, match=f"scan_rows, {name}: "):
        scan.scan_rows(**rows(**{name: torch.zeros(size)}), lengths=LENGTHS)


@pytest.mark.parametrize("weight, bias", [((5, 4), None), ((6, 4), (5,)), ((6, 4), (6, 1))])
def test_weights_that_do_not_fit_are_named(path, weight, bias):
    bias = None if bias is None else torch.zeros(bias)
    with pytest.raises(InputError, match="conv_rows: weight and bias"):
        scan.conv_rows(torch.randn(13, 6), torch.randn(weight), bias, LENGTHS)
    with pytest.raises(InputError, match="causal_conv1d: weight and bias"):
        scan.causal_conv1d(torch.randn(2, 6, 9), torch.randn(weight), bias)


def test_a_sequence_may_be_empty(path):
    x, lengths = rows(), torch.tensor([4, 0, 9])
    y = scan.scan_rows(**x, lengths=lengths)
    parts = {k: v.split([4, 9]) if len(v) == 13 else (v, v) for k, v in x.items()}
    for i, part in enumerate(y.split([4, 9])):
        alone = {k: v[i] for k, v in parts.items()}
        expected = scan.scan_rows(**alone, lengths=torch.tensor([len(part)]))
        torch.testing.assert_close(part, expected)


# ---------------------------------------------------------------- without a compiler

SCRIPT = """
    import logging, torch
    logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
    from cmi_mtl.scan import scan_path, selective_scan
    for dtype in (torch.float32, torch.float64, torch.float32):
        sizes = (1, 2, 5), (1, 2, 5), (2, 3), (1, 3, 5), (1, 3, 5)
        x = [torch.ones(s, dtype=dtype) for s in sizes]
        y = selective_scan(*x)
    print(scan_path(x[0]), y.sum().item())
    try: selective_scan(*x, path="compiled")
    except ValueError as e: print("forced:", e)
"""
INSIDE = """
    inside = torch.compile(lambda *x: selective_scan(*x).cos(), backend="eager")
    print("inside torch.compile:", torch.allclose(inside(*x), y.cos()))
"""


def fresh_process(script, **env):
    "A Python that has imported nothing yet."
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **env},
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_without_a_compiler_the_scan_says_so_once_and_gives_the_same(tmp_path):
    without = fresh_process(SCRIPT + INSIDE, PATH=str(tmp_path), CMI_MTL_CACHE=str(tmp_path))
    said = without.communicate(timeout=120)[0]
    assert said.count("WARNING") == 1
    for part in ("no C compiler", "\nchunked ", "forced: path='compiled'", "torch.compile: True"):
        assert part in said
    y = scan.selective_scan(
        *(torch.ones(s) for s in ((1, 2, 5), (1, 2, 5), (2, 3))), *[torch.ones(1, 3, 5)] * 2
    )
    assert abs(float(said.split("\nchunked ")[1].split()[0]) - y.sum().item()) < 1e-4


@pytest.mark.skipif(PATHS[0] != "compiled", reason="no C compiler here")
def test_two_processes_build_at_once(tmp_path):
    "From one empty cache: one whole library lies there, nothing half-written."
    script = SCRIPT.replace("torch.float64, torch.float32", "")
    both = [fresh_process(script, CMI_MTL_CACHE=str(tmp_path)) for _ in range(2)]
    said = [p.communicate(timeout=120)[0] for p in both]
    assert said[0] == said[1] and said[0].startswith("compiled ")
    assert "WARNING" not in said[0]
    assert [p.suffix for p in tmp_path.glob("scan/*")] == [".so"]


def test_a_missing_library_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(scan, "why_not_compiled", lambda dtype: "out of order")
    monkeypatch.setattr(scan, "_told", set())
    assert [scan.scan_path(torch.zeros(1)) for _ in range(3)] == ["chunked"] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "selective scan: path 'compiled' is not available (out of order); taking 'chunked'"
    ]
