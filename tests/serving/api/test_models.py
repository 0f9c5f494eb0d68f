"""Requests name the model that they want, where a service has several."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from serving.errors import InvalidInput, NotFound
from serving.requests import Limits
from tests.flows.books import MODEL
from tests.serving.api.conftest import Served, served
from tests.serving.api.token_source import TokenSource


@pytest.fixture
async def two() -> AsyncIterator[Served]:
    source = TokenSource()
    source.specs = {"wide": replace(MODEL, name="wide"), "org/short": replace(MODEL, name="org/short", max_positions=8)}
    async with served(source) as running:
        yield running


async def test_a_request_is_admitted_for_the_model_that_it_names(two: Served) -> None:
    for name in ("wide", "org/short"):
        await two.client.generate([1, 2], model=name, request_id=name.replace("/", "-"), limits=Limits(max_tokens=2))
    assert [record.request.model for record in two.source.journal.values()] == ["wide", "org/short"]


async def test_its_limits_are_those_of_its_model(two: Served) -> None:
    with pytest.raises(InvalidInput, match="the context of 8 leaves no room"):
        await two.client.generate(list(range(8)), model="org/short")
    await two.client.generate([1, 2, 3], model="org/short", request_id="r", limits=Limits(max_tokens=100))
    assert two.source.journal["r"].request.limits.max_tokens == 5


async def test_other_names_are_refused_and_so_is_none(two: Served) -> None:
    with pytest.raises(NotFound, match="'other' is not served here; this server has 'wide', 'org/short'"):
        await two.client.generate([1], model="other")
    with pytest.raises(InvalidInput, match="names no model; this server has 'wide', 'org/short'"):
        await two.client.generate([1])


async def test_where_there_is_one_model_its_name_may_be_left_out(service: Served) -> None:
    for name in ("", MODEL.name):
        await service.client.generate([1], model=name, limits=Limits(max_tokens=1))
    assert {record.request.model for record in service.source.journal.values()} == {""}
