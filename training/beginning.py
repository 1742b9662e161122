"""Weights that a training begins with: those that an earlier training of such a network published."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from data.errors import UserError

log = logging.getLogger("darkroom.train")

FOLDERS = {"prior": "prior", "denoiser": "unet"}
"""Trainable -> where its artifact has the network's weights; others always begin anew."""
LEAST_SHARE = 0.9
"""Of a network's weights that must be taken over, or it is another network."""


def begin_with(model: nn.Module, folder: Path) -> None:
    """Copies the weights of the safetensors files in `folder` into `model`.

    Frozen ones, which are statistics of the data, and those of another shape stay as they are; the latter are named. Raises
    UserError where too few fit, or there are none.
    """
    earlier = {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    fitting = [n for n, weight in trained.items() if n in earlier and earlier[n].shape == weight.shape]
    taken, whole = (sum(trained[n].numel() for n in names) for names in (fitting, trained))
    if taken < LEAST_SHARE * whole:
        raise UserError(
            f"{folder} holds the weights of another network: {taken / whole:.0%} of those that are trained here fit; train anew, "
            "or with the settings that made it"
        )
    if other := sorted(trained.keys() - set(fitting)):
        log.warning("%s begins anew: %s has another shape of it", ", ".join(other), folder)
    with torch.no_grad():
        for name in fitting:
            trained[name].copy_(earlier[name])
