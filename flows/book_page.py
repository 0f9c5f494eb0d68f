"""What is published beside a plan book of either kind: tags, curves, tables, pictures, a report for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from matplotlib.figure import Figure

from data.books import Book
from data.plan import PlanBook
from data.profile import Profile
from flows import shared_summary
from flows.figures import figures, shared_figures
from flows.summary import FitError, curve_metrics, frontier_table, summary_markdown, transition_table


@dataclass(frozen=True, slots=True)
class BookPage:
    """`metrics` are `(name, value, number of instances)`; tables and pictures go by file name."""

    metrics: Sequence[tuple[str, float, int]]
    tables: Mapping[str, pa.Table]
    pictures: Mapping[str, Figure]
    report: str


def book_tags(book: Book) -> dict[str, str]:
    """The tags that follow from a book."""
    if isinstance(book, PlanBook):
        return {"policy": book.policy, "profile_sha256": book.profile_sha256}
    return shared_summary.tags(book)


def page_of(book: Book, profile: Profile | None = None, error: FitError | None = None) -> BookPage:
    """The page of a book of either kind; `profile` is that of its only model, `error` that of the cost models."""
    if isinstance(book, PlanBook):
        return BookPage(
            list(curve_metrics(book)),
            {"frontier": frontier_table(book), "transitions": transition_table(book)},
            figures(book, profile),
            summary_markdown(book, error),
        )
    return BookPage(
        list(shared_summary.metrics(book)),
        {"groups": shared_summary.group_table(book)},
        shared_figures(book),
        shared_summary.markdown(book, error),
    )
