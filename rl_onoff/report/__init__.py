"""report.html: one self-contained page that shows where two policies part. `write_report` is all a caller needs."""

from rl_onoff.report.pack import ReportResponse
from rl_onoff.report.write import ReportInput, write_report

__all__ = ["ReportInput", "ReportResponse", "write_report"]
