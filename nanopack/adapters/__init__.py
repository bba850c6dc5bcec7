"""`Loader` for existing training scripts: one file per framework, each a thin layer."""
