"""The VAE's decoder, channels last from end to end, its norms and activations in one kernel each.

diffusers' group norm changes the memory layout of a channels-last image and back at each norm: most
of a decode's time.
"""

from typing import Any

import torch
from torch import Tensor

from klein.inference.acceleration import ops


class ChannelNorm(torch.nn.Module):
    """A GroupNorm over channels-last images, and the SiLU after it."""

    def __init__(self, norm: torch.nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """The normed and activated (batch, channels, height, width)."""
        norm = self.norm
        return ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, True)


def unfuse(vae: Any) -> None:
    """Undo `fuse`, if it was done: the decoder is diffusers' again."""
    decoder = vae.decoder
    if not isinstance(decoder.conv_norm_out, ChannelNorm):
        return
    for block in (decoder.mid_block, *decoder.up_blocks):
        for resnet in block.resnets:
            resnet.norm1, resnet.norm2 = resnet.norm1.norm, resnet.norm2.norm
            resnet.nonlinearity = torch.nn.SiLU()
    decoder.conv_norm_out = decoder.conv_norm_out.norm
    decoder.conv_act = torch.nn.SiLU()
    for part in (decoder, vae.post_quant_conv):
        part.to(memory_format=torch.contiguous_format)


def fuse(vae: Any) -> None:
    """Change the decoder of an AutoencoderKLFlux2 in place, once; what it computes stays."""
    decoder = vae.decoder
    if isinstance(decoder.conv_norm_out, ChannelNorm):
        return
    for block in (decoder.mid_block, *decoder.up_blocks):
        for resnet in block.resnets:
            resnet.norm1, resnet.norm2 = ChannelNorm(resnet.norm1), ChannelNorm(resnet.norm2)
            resnet.nonlinearity = torch.nn.Identity()
    decoder.conv_norm_out = ChannelNorm(decoder.conv_norm_out)
    decoder.conv_act = torch.nn.Identity()
    for part in (decoder, vae.post_quant_conv):
        part.to(memory_format=torch.channels_last)
