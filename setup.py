"""Build nanopack: its packages, of which `nanopack.kernels` lies in `kernels/`, and its requirements."""

from setuptools import find_packages, setup

# The range that tests/tokenizers/test_splintr.py compares with tiktoken: widen it only with that test passing.
FAST = ["splintr-rs>=0.22,<0.23"]
PLOT = ["matplotlib>=3.8"]
TRANSFORMERS = ["transformers>=5"]
HF = [*TRANSFORMERS, "accelerate>=1.1", "trl>=1"]
LIGHTNING = ["lightning>=2.4"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.7",
    "pytest-benchmark>=5",
    "hypothesis>=6.100",
    "setuptools>=77",
    "pyarrow>=15",
    "datasets>=3",
    "pandas>=2",
    "safetensors>=0.4",
    "zstandard>=0.22",
    *FAST,
    # trl's chat templates, and what it trains, are what the data are compared with
    *HF,
]
LINT = ["ruff>=0.6", "mypy>=1.11", "codespell>=2.4"]

setup(
    packages=[*find_packages(include=["nanopack", "nanopack.*"]), "nanopack.kernels"],
    package_dir={"nanopack.kernels": "kernels"},
    package_data={"nanopack": ["py.typed", "data/*"]},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "tiktoken>=0.11",
        "numpy>=1.26",
        # the command line
        "rich>=13.7",
    ],
    extras_require={
        "parquet": ["pyarrow>=15"],
        "zstd": ["zstandard>=0.22"],
        "safetensors": ["safetensors>=0.4"],
        "plot": PLOT,
        "fast": FAST,
        "hf": HF,
        "lightning": LIGHTNING,
        "ray": ["ray>=2.40", "fsspec>=2024.2"],
        "torchtitan": ["torchtitan>=0.3"],
        "test": TEST,
        "dev": TEST + PLOT + LINT,
        "trainers": HF + LIGHTNING,
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1"],
        "gpu": ["pytest>=8", "hypothesis>=6.100"],
    },
)
