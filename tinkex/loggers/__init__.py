"""Outputs for the metrics of a training run: files in its folder, plots, and trackers.

`open_loggers` opens them, and `read_metrics` reads the file that is always written.  The formats
are described in docs/metrics.md.
"""

from tinkex.loggers.files import read_metrics as read_metrics
from tinkex.loggers.loggers import (
    NAMES as NAMES,
    Logger as Logger,
    Loggers as Loggers,
    open_loggers as open_loggers,
)
