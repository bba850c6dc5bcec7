"""Let nanochat train on batches from nanopack: `python examples/nanochat_patch.py scripts/chat_sft.py`.

This writes a few lines into nanochat's scripts/chat_sft.py, or scripts/mid_train.py of its older versions: after its
`build_val_loader` two loaders that replace its own, and after each `next(train_loader)` the progress that its generator
wrote into the script. Batches, losses and progress stay what they were.
"""

import re
import sys
from pathlib import Path

LOADERS = """
from nanopack.adapters.nanochat import Progress, {name}_loader
batch_size = args.device_batch_size if "args" in globals() else device_batch_size
row_tokens = args.max_seq_len if "args" in globals() else max_seq_len
where = {{"device": device, "rank": ddp_rank, "world_size": ddp_world_size}}
state = Progress(args.num_iterations if "args" in globals() else globals().get("num_iterations", -1))
train_loader = {name}_loader(train_dataset, tokenizer, batch_size, row_tokens, progress=state, **where)
build_val_loader = lambda: {name}_loader(val_dataset, tokenizer, batch_size, row_tokens, **where)
"""
PROGRESS = "last_step, approx_progress, current_epoch = state.last_step, state.approx_progress, state.current_epoch"


def patched(script: str) -> str:
    """Return the script with nanopack's loaders. ValueError where it is not one of nanochat's."""
    name = "sft" if "best" in script and "sft" in script else "mid"
    script, places = re.subn(
        r"(?m)^(build_val_loader = .*\n)", lambda found: found[1] + LOADERS.format(name=name), script
    )
    script, taken = re.subn(r"(?m)^( *)(x, y = next\(train_loader\).*\n)", rf"\1\2\1{PROGRESS}\n", script)
    if (places, taken) != (1, 2):
        raise ValueError("this script does not build and take its batches as nanochat's do")
    return script


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(patched(path.read_text(encoding="utf-8")), encoding="utf-8")
