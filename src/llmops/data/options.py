"""Options of a data source: where rows come from, and which of them are used."""

from __future__ import annotations

from pydantic import Field

from llmops.options import Options

__all__ = ["BUILTIN", "DataSource", "Limits"]

BUILTIN = ("builtin:facts", "builtin:choices", "builtin:world")


class Limits(Options):
    """How much of a source may be lost before the run fails, as fractions of its rows."""

    dropped: float = Field(0.0, ge=0, le=1, description="rows that may be left out (empty, nothing to train on)")
    truncated: float = Field(0.01, ge=0, le=1, description="rows that may be cut to max_length")


class DataSource(Options):
    """A named source. `source` is a file (jsonl, csv, parquet, txt), a folder, a hub data set id or builtin:NAME;
    `from` takes the rows of another named source instead."""

    source: str | None = Field(None, description="file, folder, hub data set id, or builtin:NAME")
    from_: str | None = Field(None, alias="from", description="another named source whose rows are used")
    split: str | None = Field(None, description='split by name, and a slice of it: "test", "train[:90%]", "[90%:]"')
    subset: str | None = Field(None, description="configuration name of a hub data set")
    revision: str | None = Field(None, description="commit of a hub data set")
    columns: dict[str, str] = Field({}, description="standard column: column of the file, as {prompt: question}")
    samples: int | None = Field(None, ge=1, description="how many rows to use")
    shuffle: bool = Field(False, description="draw the rows in a seeded random order before they are counted off")
    limits: Limits = Field(Limits(), description="how many rows may be dropped or cut")
