"""One thread for torch: the models are tiny, and on a busy machine threads wait for each other, 30 times as long."""

import torch

torch.set_num_threads(1)
