"""Options of a data source: where rows come from, and which of them are used."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from llmops.data.splits import parse_split
from llmops.errors import nearest
from llmops.options import Options

__all__ = ["BUILTIN", "COLUMNS", "OPTIONAL", "DataSource", "Limits", "Synthesize"]

BUILTIN = ("builtin:facts", "builtin:choices", "builtin:study", "builtin:world",
           "builtin:preferences", "builtin:prompts")
#: The columns that each kind of rows must have. `columns` maps these names to the names a file uses.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",), "prompt_completion": ("prompt", "completion"), "text": ("text",),
    "choices": ("question", "choices", "answer"), "preference": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",)}
#: Columns that a kind may have: the tools that a conversation can call.
OPTIONAL: dict[str, tuple[str, ...]] = {"messages": ("tools",), "preference": ("tools",), "prompts": ("tools",)}


class Limits(Options):
    """How much of a source may be lost before the run fails, as fractions of its rows."""

    dropped: float = Field(0.0, ge=0, le=1, description="rows that may be left out (empty, nothing to train on)")
    truncated: float = Field(0.01, ge=0, le=1, description="rows that may be cut to max_length")


class Synthesize(Options):
    """Data that a variant writes: it answers the prompts of other data, and what is empty, unfinished, too long or too
    short, repetitive or a duplicate is left out and counted."""

    teacher: str = Field(min_length=1, description="name of the variant that writes (base: the model itself)")
    prompts: str = Field(min_length=1, description="name of the data whose prompts it answers; their own answers are "
                                                   "not used")
    answers: int = Field(1, ge=1, le=64, description="answers to each prompt; more than one need a temperature")
    temperature: float = Field(0.0, ge=0, le=10, description="of the draw; 0: the likeliest token each time")
    max_new_tokens: int = Field(64, ge=1, le=100_000, description="answers that have not ended by then are unfinished")
    min_tokens: int = Field(1, ge=1, description="shorter answers are left out")
    max_repetition: float = Field(0.3, ge=0, le=1, description="answers more of whose runs of four words have been "
                                                               "said before in the same answer are left out")
    max_similarity: float = Field(0.9, gt=0, le=1, description="rows that share more of their runs of three words with "
                                                               "an earlier row are left out (Jaccard, Broder 1997); 1: "
                                                               "only equal ones")

    @model_validator(mode="after")
    def _answers_differ(self) -> Synthesize:
        if self.answers > 1 and self.temperature == 0:
            raise ValueError(f"given {self.answers} answers to each prompt at temperature 0, which are all the same; "
                             "expected a temperature above 0, as 0.8, or answers: 1")
        if self.min_tokens > self.max_new_tokens:
            raise ValueError(f"given min_tokens {self.min_tokens} above max_new_tokens {self.max_new_tokens}; expected "
                             "at most that many")
        return self


class DataSource(Options):
    """A named source. `source` is a file (jsonl, csv, parquet, txt), a folder, a hub data set id or builtin:NAME;
    `from` takes the rows of another named source instead, `synthesize` lets a variant write them. Rows are used in this
    order: all rows, shuffled if asked, the part that `split` names, the first `samples` of it."""

    source: str | None = Field(None, description="file, folder, hub data set id, or builtin:NAME")
    from_: str | None = Field(None, alias="from", description="another named source whose rows are used")
    synthesize: Synthesize | None = Field(None, description="rows that a variant writes, as {teacher: tuned, prompts: "
                                                            "asked}")
    split: str | None = Field(None, description='split by name, and a slice of it: "test", "train[:90%]", "[90%:]"')
    subset: str | None = Field(None, description="configuration name of a hub data set")
    revision: str | None = Field(None, description="commit of a hub data set")
    columns: dict[str, str] = Field({}, description="standard column: column of the file, as {prompt: question}")
    samples: int | None = Field(None, ge=1, description="how many rows to use")
    shuffle: bool = Field(False, description="draw the rows in a seeded random order before they are counted off")
    limits: Limits = Field(Limits(), description="how many rows may be dropped or cut")

    @field_validator("split")
    @classmethod
    def _split_is_readable(cls, value: str | None) -> str | None:
        parse_split(value)
        return value

    @field_validator("columns")
    @classmethod
    def _columns_are_known(cls, value: dict[str, str]) -> dict[str, str]:
        known = list(dict.fromkeys(column for columns in (*COLUMNS.values(), *OPTIONAL.values()) for column in columns))
        for standard in value:
            if standard not in known:
                raise ValueError(f'unknown standard column "{standard}"; expected {{standard: column of the file}} '
                                 f"with standard one of {', '.join(known)}{nearest(standard, known)}")
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> DataSource:
        origins = [bool(self.source), bool(self.from_), self.synthesize is not None]
        if sum(origins) != 1:
            raise ValueError('give either "source" (a file, folder, hub id or builtin:NAME) or "from" (another named '
                             'source) or "synthesize" (written by a variant), '
                             + ("not both" if sum(origins) == 2 else "one of them alone" if sum(origins) == 3 else
                                "one of them is needed"))
        given = [key for key in ("subset", "revision", "columns") if getattr(self, key)]
        if self.synthesize is not None and (given or parse_split(self.split).name):
            raise ValueError(f'"{[*given, "split"][0]}" does not fit rows that a variant writes, which have no other '
                             "columns, subsets or named splits; expected a range alone, as \"[:90%]\"")
        if self.from_ and given:
            raise ValueError(f'"{given[0]}" belongs to the source that "from" names; move it to "{self.from_}"')
        if self.from_ and parse_split(self.split).name:
            raise ValueError(f'the split of a "from" source can only be a range, as "[:90%]"; name the split on '
                             f'"{self.from_}"')
        return self
