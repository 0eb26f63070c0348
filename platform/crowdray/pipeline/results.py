"""Files of a finished run for people and other programs: the history as a table, and the weights alone."""

import csv
import io
from collections.abc import Mapping, Sequence

import torch

RESULTS, WEIGHTS = "results.csv", "weights.pt"


def results_csv(history: Sequence[Mapping[str, float | int | str]]) -> str:
    """Return a table with a row for each epoch and a column for each metric, empty where an epoch lacks it."""
    columns = dict.fromkeys(name for row in history for name in row)
    text = io.StringIO()
    table = csv.DictWriter(text, list(columns), lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    return text.getvalue()


def weights_file(weights: Mapping[str, torch.Tensor]) -> bytes:
    """Return a plain state dict as `torch.load(path, weights_only=True)` reads it."""
    content = io.BytesIO()
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, content)
    return content.getvalue()
