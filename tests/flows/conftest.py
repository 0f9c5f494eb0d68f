from __future__ import annotations

from collections.abc import Iterator

import pytest

from flows.prefect_api import prefect_api


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all flow tests of the run: the one that users without a server get."""
    with prefect_api(tmp_path_factory.mktemp("prefect")) as url:
        yield url
