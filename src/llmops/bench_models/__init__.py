"""`llmops bench models`: anybody's checkpoints in anybody's runtime, by the protocol of `llmops tune`.

    arms        what is compared: NAME=RUNTIME:MODEL
    runtimes/   one file a runtime, all asked for the same
    pair        one cell: an arm beside the reference
    matrix      all cells, resumable
    tables      JSON, CSV, Parquet, text
"""
