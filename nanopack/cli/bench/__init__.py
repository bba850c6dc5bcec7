"""Measure nanopack against what it replaces, in one run, on one data set: `nanopack bench`.

    data.py         the conversations, as every contender gets them
    turns.py        contenders take turns; medians, spread, ratios
    nanochat.py     what it replaces: nanochat's renderer and two of its generators
    tokenizer.py    the bound: tiktoken alone
    peers.py        packers of others, where they are installed

    a  end_to_end.py    b  ready_tokens.py    c  waiting.py    d  quality.py    e  growth.py    f  gpu.py

    run.py          the sections in turn   ->   report.py   tables, a plot, JSON

Each section's docstring is the question it answers. Nothing else in nanopack imports any of this.
"""
