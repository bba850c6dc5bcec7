"""Fine-tune with TRL's SFTTrainer on packed batches; started again with --resume, it has the losses of one run.

    python examples/trl_sft.py Qwen/Qwen3-0.6B chats.jsonl

The tokenizer's chat template is taken, with the version of it that TRL trains by where the stock one cannot be trained.
"""

import argparse

import datasets
import torch
import transformers
import trl

import nanopack
from nanopack.adapters.hf import Batches

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a folder, or a name on the hub")
parser.add_argument("files", nargs="+")
parser.add_argument("--out", default="sft")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
model = transformers.AutoModelForCausalLM.from_pretrained(args.model)
config = trl.SFTConfig(
    args.out,
    max_steps=args.steps,
    save_steps=10,
    logging_steps=1,
    report_to="none",
    gradient_accumulation_steps=2,
    bf16=torch.cuda.is_available(),
    dataset_kwargs={"skip_prepare_dataset": True},
)
# the trainer wants a data set to begin with; nothing of it is trained
nothing = datasets.Dataset.from_list([{"input_ids": [0], "labels": [0]}])
with nanopack.Loader(
    args.files, tokenizer, batch_size=4, seq_len=512, template="hf", seed=1, extras=("positions",), device=model.device
) as loader:
    trainer = trl.SFTTrainer(model, config, train_dataset=nothing, processing_class=tokenizer)
    Batches(loader).attach(trainer)
    trainer.train(resume_from_checkpoint=args.resume)
    print("loss", trainer.state.log_history[-2]["loss"], "tokens", loader.ledger()["tokens"]["emitted"])
