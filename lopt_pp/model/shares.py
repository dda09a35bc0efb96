"""Parameters of which a process holds a share only, from the moment that they are loaded."""

import torch
from torch import nn


class ShareOf(nn.Parameter):
    """In place of a parameter until its module is sharded: on the meta device, with this process's share of it.

    Attributes:
        share: the values of the share, on the device that trains them.
    """

    share: torch.Tensor

    @classmethod
    def make(cls, parameter: nn.Parameter, share: torch.Tensor) -> "ShareOf":
        """In place of `parameter`, of which `share` is all that is kept."""
        made = cls(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        made.share = share
        return made
