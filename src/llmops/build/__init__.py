"""Building variants: one file for what a step is given, two for the steps, one for a whole build from disk to disk."""

from llmops.build.job import Job, Work
from llmops.build.variant import STEPS, apply_step, assist, build, source_of, versions

__all__ = ["STEPS", "Job", "Work", "apply_step", "assist", "build", "source_of", "versions"]
