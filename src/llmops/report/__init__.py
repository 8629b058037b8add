"""What a run came to, shown four ways: a table, a comparison, a page, a model card. From ledger rows alone.

A row is a plain dict as the ledger returns it, and any group of it may be missing: a variant that failed has no
scores, one that was not measured has no energy. So nothing here reads a row by hand: `reading` does, and returns a
`Quantity` that is null with a reason where there is nothing; `figures` turns quantities into text, with `~` before an
estimate and `-` for a null. The table and the page are made from the same `columns`, so they cannot disagree.

    reading   what a row holds, and the tree of rows          figures   a Quantity as text
    columns   the columns of the table and of the page        pareto    which variants no other beats
    table     rich table, JSON                                compare   chosen variants against one of them
    html      report.html (markup, charts, sections,          card      README.md of a variant
              building, details, assets)                      verdict   who meets the goals, who wins
"""
