"""report.html: one self-contained page that shows where two policies part. `write_report` is all a caller needs."""

from rl_onoff.report.data import ReportInput, ReportResponse
from rl_onoff.report.write import write_report

__all__ = ["ReportInput", "ReportResponse", "write_report"]
