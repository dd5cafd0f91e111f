"""Runs that survive: a folder with a journal, from which a killed training script continues.

`ServiceClient.open_run` opens a run folder; `read_run` reads one, even while a process writes to
it.  See docs/runs.md.
"""

from tinkex.runs.records import (
    CheckpointRecord as CheckpointRecord,
    RunRecord as RunRecord,
    SamplerRecord as SamplerRecord,
    ServerRecord as ServerRecord,
    StepRecord as StepRecord,
    read_run as read_run,
)
from tinkex.runs.run import Run as Run
from tinkex.runs.step import RunStep as RunStep
