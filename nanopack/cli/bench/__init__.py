"""Measure nanopack and what it replaces, in one run, on one data set: `nanopack bench`.

    corpus.py            the conversations, as each contender wants them
    rounds.py            contenders alternate; medians, spread, ratios
    nanochat.py          what nanopack replaces: nanochat's renderer and two of its generators
    tokenizer_bound.py   the bound: tiktoken alone
    other_packers.py     other projects' packers, where they are installed

    throughput.py   files.py   pretokenized.py   stalls.py   padding.py   scaling.py   gpu.py

    run.py               these sections in order   ->   report.py   tables, a plot, JSON

Each section's docstring is the question it answers. Nothing else in nanopack imports any of this.
"""
