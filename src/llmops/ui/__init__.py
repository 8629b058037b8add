"""`llmops ui`: the runs of a store in a browser, by the code that writes report.html.

    pages       every page as text: the list of runs with its filters, a run's report, two or more runs side by side
    server      a small HTTP server that hands them out, to this machine alone, and writes nothing
"""
