"""The one training loop, and what it is made of: rows, schedule, checkpoints, stopping, ranks.

    rows.py         what is trained on, which rows make a step, and how a step is cut into forward passes
    passes.py       a forward pass: its precision, the loss of rows only looked at, memory that runs out
    schedule.py     how long, how fast: the learning-rate curve and the optimizers
    checkpoint.py   a state that a killed run goes on from, bit for bit
    stop.py         when going on is no longer worth it
    ranks.py        several processes, one gradient
    finder.py       a learning rate from a range test
    loop.py         `fit`, which joins them
"""

from llmops.train.checkpoint import Checkpoints
from llmops.train.loop import Fit, Hooks, Loss, Progress, fit
from llmops.train.rows import IGNORED, TrainingSet, token_rows
from llmops.train.schedule import Schedule
from llmops.train.stop import Stopping

__all__ = ["IGNORED", "Checkpoints", "Fit", "Hooks", "Loss", "Progress", "Schedule", "Stopping", "TrainingSet", "fit",
           "token_rows"]
