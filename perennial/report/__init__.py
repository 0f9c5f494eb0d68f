"""From a recording to its numbers (`summary`) and to the one-file report (`render`)."""

from perennial.report.page import render
from perennial.report.summary import summary

__all__ = ["render", "summary"]
