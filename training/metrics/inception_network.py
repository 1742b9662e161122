"""The FID variant of Inception v3.

torchvision's own Inception differs in its pooling and its weights, and gives another metric. Here average pools inside
the blocks leave the padding out of their counts, and the last block pools by maximum.

Legend: B pictures, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import inception

from training.metrics.inception import WIDTH


class FidInceptionA(inception.InceptionA):
    """Mixed_5b to 5d, average pool without padding."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_mean_inside(x)),
        ]


class FidInceptionC(inception.InceptionC):
    """Mixed_6b to 6e, average pool without padding."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_mean_inside(x)),
        ]


class FidInceptionE(inception.InceptionE):
    """Mixed_7b, average pool without padding."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], dim=1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], dim=1),
            self.branch_pool(self._pool(x)),
        ]

    def _pool(self, x: Tensor) -> Tensor:
        return _mean_inside(x)


class FidInceptionELast(FidInceptionE):
    """Mixed_7c, which pools by maximum."""

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def build_inception() -> inception.Inception3:
    """The network with its 1008-way head, as the weights file has it; valid on the meta device."""
    blocks = [
        inception.BasicConv2d,
        FidInceptionA,
        inception.InceptionB,
        FidInceptionC,
        inception.InceptionD,
        FidInceptionE,
        inception.InceptionAux,
    ]
    model = inception.Inception3(
        num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=blocks
    )
    model.Mixed_7c = FidInceptionELast(WIDTH)
    return model


def _mean_inside(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
