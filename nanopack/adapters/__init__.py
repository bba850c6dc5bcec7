"""`Loader` for existing training scripts: one file per framework, each a thin layer.

nanochat.py     generators of (inputs, targets), as nanochat's scripts take them
hf.py           models, accelerate, Trainer and SFTTrainer; hf_trainer.py is its callback
lightning.py    a data module;  torchtitan.py  a data loader for its config
"""
