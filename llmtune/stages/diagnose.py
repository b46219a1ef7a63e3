"""The diagnoses of a run as measures of its evaluation: one file each in `diagnostics/`."""

from llmtune.stages.measures import Plan

DIAGNOSES: dict[str, Plan] = {}
