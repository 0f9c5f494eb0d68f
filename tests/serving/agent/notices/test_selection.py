from __future__ import annotations

import pytest

from serving.agent.notices.selection import select
from serving.errors import InvalidInput


def test_sources_by_name_with_and_without_details() -> None:
    names = (
        "aws,gcp=http://127.0.0.1:81, azure=http://127.0.0.1:82/ ,file:/run/perennial/notice,file=x=y,ray,ray=h:6379/0a"
    )
    assert [source.name for source in select(names, grace_s=30.0)] == [
        "aws",
        "gcp",
        "azure",
        "file",
        "file",
        "ray",
        "ray",
    ]
    assert select("", grace_s=30.0) == []


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("aws,oracle", "'oracle' is no source of notices; there are aws, gcp, azure, file, ray"),
        ("aws http", "is no source"),
        ("aws=127.0.0.1:80", "write aws=http://HOST:PORT"),
        ("gcp=https://metadata", "write gcp=http://HOST:PORT"),
        ("azure:http://h/path", "does not name an endpoint"),
        ("file", "write file:PATH"),
        ("file:", "write file:PATH|is no source"),
        ("ray=head", "write ray=HOST:PORT"),
        ("ray=head:6379/xyz", "write ray=HOST:PORT"),
    ],
)
def test_what_names_no_source_is_refused(names: str, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        select(names, grace_s=30.0)
