"""What only a GPU can show: collected where torch finds one."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
