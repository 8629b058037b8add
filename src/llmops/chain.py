"""A chain of hashes over records: changing, removing or inserting one shows, and the record is named.

    hash_k = SHA-256(JSON of [k, utc, who, kind, subject, digest, hash_{k-1}])

`digest` is the SHA-256 of what was recorded (a row and its items, a promotion), so the chain is small and the records
stay where they are. What it proves: whoever has kept one hash from outside can tell that nothing before it was touched.
What it does not: someone who may write the file can compute a whole new chain; and links cut off at the end leave a
shorter chain that is sound. So keep the newest hash elsewhere (a commit, a CI log; `llmops gate` and `llmops promote`
print it) and give it to `llmops audit --expect`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["GENESIS", "Link", "broken", "digest", "forged", "link_of"]

GENESIS = "0" * 64  # what the first link follows


@dataclass(frozen=True)
class Link:
    """One record in the chain. kind: "row" or "promotion"; subject: its id."""

    number: int
    utc: str
    who: str
    kind: str
    subject: int
    digest: str
    previous: str
    hash: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def digest(*texts: str) -> str:
    """SHA-256 (hex) over texts, whose bounds count."""
    found = hashlib.sha256()
    for text in texts:
        body = text.encode()
        found.update(len(body).to_bytes(8, "little"))
        found.update(body)
    return found.hexdigest()


def forged(number: int, utc: str, who: str, kind: str, subject: int, content: str, previous: str) -> str:
    """The hash that a link of these fields must have."""
    fields = [number, utc, who, kind, subject, content, previous]
    return hashlib.sha256(json.dumps(fields, ensure_ascii=True).encode()).hexdigest()


def link_of(before: Link | None, utc: str, who: str, kind: str, subject: int, content: str) -> Link:
    """The link that follows `before` (None: the first)."""
    number, previous = (before.number + 1, before.hash) if before is not None else (1, GENESIS)
    return Link(number, utc, who, kind, subject, content, previous,
                forged(number, utc, who, kind, subject, content, previous))


def broken(links: Iterable[Link], contents: Mapping[tuple[str, int], str | None]) -> list[str]:
    """What is wrong, in words, each naming its record; empty for a sound chain over what is recorded.

    links: in the order of their numbers. contents: the digest of every record that is there now, by (kind, id).
    """
    found, seen = [], set[tuple[str, int]]()
    before: Link | None = None
    for link in links:
        number, previous = (before.number + 1, before.hash) if before is not None else (1, GENESIS)
        name = f"link {link.number} ({link.kind} {link.subject}, {link.utc})"
        if link.number != number:
            found.append(f"links {number} to {link.number - 1} are missing: what they recorded was removed")
        if link.previous != previous and link.number == number:
            found.append(f"{name}: does not follow the link before it, which was changed or replaced")
        if link.hash != forged(link.number, link.utc, link.who, link.kind, link.subject, link.digest, link.previous):
            found.append(f"{name}: was changed: its hash is not that of its fields")
        record = (link.kind, link.subject)
        if record in seen:
            found.append(f"{name}: records {link.kind} {link.subject} a second time")
        elif record not in contents:
            found.append(f"{link.kind} {link.subject}: was removed (recorded {link.utc} by {link.who})")
        elif contents[record] != link.digest:
            found.append(f"{link.kind} {link.subject}: was changed after it was written ({link.utc} by {link.who})")
        seen.add(record)
        before = link
    found += [f"{kind} {subject}: was written past the chain, which does not record it"
              for kind, subject in contents if (kind, subject) not in seen]
    return found
