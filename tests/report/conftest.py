"""A real browser and the page of a recorded run, for the tests of a file."""

import pytest
from report.chromium import Chromium
from report.recorded_run import record

from megatron_pz.report.page import write_page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page(record(tmp_path_factory.mktemp("runs") / "recorded", 20))
