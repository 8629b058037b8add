"""Data: where rows come from, how they become tokens, and on which of them the loss stands.

    options.py      what a recipe says about a source          (no torch)
    splits.py       "train[:90%]"                              (no torch)
    readers.py      files to rows, with line numbers           (no torch)
    columns.py      kinds of rows, and what is checked         (no torch)
    fingerprint.py  the bytes behind a source, hashed          (no torch)
    sources.py      the above together: `load_rows`
    hub.py          the one home of the `datasets` library
    world.py        the invented world behind `builtin:`       (no torch)
    turns.py        conversations: turns, tools, calls         (no torch)
    chat.py         chat templates to text, and the assistant's part of it
    masks.py        text to tokens and labels
    render.py       rows to training examples; prompts; streams; calibration crops
    pairs.py        preferences to pairs of training examples
    budget.py       how many rows may be lost                  (no torch)
    leak.py         training rows that stand in the test data
    show.py         what a model is going to see, on a terminal
"""
