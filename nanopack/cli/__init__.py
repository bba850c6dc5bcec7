"""The command line: `nanopack pack`, `verify`, `inspect`, `bench`, `demo-train`. No stage depends on it.

main.py, options.py, commands.py   argv -> options -> what a command does; tokenizer.py finds --tokenizer
summary.py, lengths.py, text.py    numbers, lengths and rows as text
plots.py, html.py, progress.py     PNG, an HTML page, and progress on stderr
bench/                             `nanopack bench`
"""

from nanopack.cli.main import main

__all__ = ["main"]
