"""Thin faces of `Loader` for training scripts that exist: one file each, named for whose scripts they are."""
