"""The interactive page of a ledger, in one file."""

from pyrogaps.report.page import page_of, write_report

__all__ = ["page_of", "write_report"]
