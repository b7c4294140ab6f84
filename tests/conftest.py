"""What every test needs: no network, no traces in the user's cache, no chatter from tokenizers."""

import os
import tempfile

import pytest

CLOSED = "http://127.0.0.1:9"  # nothing listens there: whoever asks the hub is refused at once
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "IN_TEST"):
    os.environ.pop(name, None)
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_ENDPOINT=CLOSED, MPLBACKEND="Agg")


@pytest.fixture(scope="session", autouse=True)
def cache():
    "The cache folder of this test session; the data sets at hand stay where CMI_MTL_DATA says."
    with tempfile.TemporaryDirectory(prefix="cmi_mtl_tests_", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("CMI_MTL_CACHE")
        os.environ["CMI_MTL_CACHE"] = folder
        yield folder
        if before is None:
            del os.environ["CMI_MTL_CACHE"]
        else:
            os.environ["CMI_MTL_CACHE"] = before
