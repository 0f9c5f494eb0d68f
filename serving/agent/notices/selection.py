"""From what an operator writes to the sources that an agent watches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from serving.agent.notices import aws, azure, gcp
from serving.agent.notices.aws import Aws
from serving.agent.notices.azure import Azure
from serving.agent.notices.base import Source
from serving.agent.notices.file import NoticeFile
from serving.agent.notices.gcp import Gcp
from serving.errors import InvalidInput

_WORD = re.compile(r"(\w+)(?:[:=](.+))?")


def select(names: str, *, grace_s: float) -> list[Source]:
    """The sources of a comma-separated list: `aws`, `gcp`, `azure`, `ray` and `file:PATH`.

    `=` after a name gives another endpoint: `aws=http://127.0.0.1:8080`, `ray=HOST:PORT/NODE`. `grace_s`
    is the time left when a source cannot say it. Raises `InvalidInput`.
    """
    return [_source(name.strip(), grace_s) for name in names.split(",") if name.strip()]


def _source(text: str, grace_s: float) -> Source:
    match = _WORD.fullmatch(text)
    name, detail = (match[1], match[2] or "") if match else (text, "")
    makers: Mapping[str, Callable[[], Source]] = {
        "aws": lambda: Aws(_endpoint(text, detail) or aws.URL),
        "gcp": lambda: Gcp(_endpoint(text, detail) or gcp.URL, grace_s=grace_s),
        "azure": lambda: Azure(_endpoint(text, detail) or azure.URL),
        "file": lambda: _file(text, detail),
        "ray": lambda: _ray(text, detail, grace_s),
    }
    if name not in makers:
        raise InvalidInput(f"{text!r} is no source of notices; there are {', '.join(makers)}")
    return makers[name]()


def _endpoint(text: str, url: str) -> str:
    if url and not re.fullmatch(r"http://[^/\s]+/?", url):
        raise InvalidInput(f"{text!r} does not name an endpoint; write {text.partition('=')[0]}=http://HOST:PORT")
    return url.rstrip("/")


def _file(text: str, path: str) -> Source:
    if not path:
        raise InvalidInput(f"{text!r} does not name a file; write file:PATH")
    return NoticeFile(path)


def _ray(text: str, detail: str, grace_s: float) -> Source:
    from serving.agent.notices.ray import Ray  # brings gRPC along, which an agent does not need otherwise

    match = re.fullmatch(r"(?:([^/\s]+:\d+)(?:/((?:[0-9a-f]{2})+))?)?", detail)
    if match is None:
        raise InvalidInput(f"{text!r} does not name a Ray cluster; write ray=HOST:PORT or ray=HOST:PORT/NODE")
    return Ray(match[1] or "", match[2] or "", grace_s=grace_s)
