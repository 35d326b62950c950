"""The report of a run: one self-contained HTML file."""

from magicid.report.build import build_report

__all__ = ["build_report"]
