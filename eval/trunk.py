"""TF-Inception's network: torch-fidelity's blocks, one pass for any set of layers, and the same with batch norms folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

# Features by layer. "spatial" is the sFID's: 7 channels of mixed_6/conv, 17 x 17 (Nash et al. 2021); "logits_unbiased" are
# those without the bias, on which TensorFlow's graph and every Inception score since build.
LAYERS = {"64": 64, "192": 192, "768": 768, "spatial": 2023, "2048": 2048, "logits_unbiased": 1008, "logits": 1008}
# Activations that layers are computed from, and how many of the network's parts come before.
_STAGES = {"64": 4, "192": 7, "spatial": 14, "768": 15, "2048": 18}


class Trunk(nn.Module):
    """From normalised images to activations, with torch-fidelity's modules under their names: state dicts are the same."""

    def __init__(self) -> None:
        super().__init__()
        conv = fidelity.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = fidelity.InceptionA(192, pool_features=32)
        self.Mixed_5c = fidelity.InceptionA(256, pool_features=64)
        self.Mixed_5d = fidelity.InceptionA(288, pool_features=64)
        self.Mixed_6a = fidelity.InceptionB(288)
        self.Mixed_6b = fidelity.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = fidelity.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = fidelity.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = fidelity.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = fidelity.InceptionD(768)
        self.Mixed_7b = fidelity.InceptionE_1(1280)
        self.Mixed_7c = fidelity.InceptionE_2(2048)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor, stages: Sequence[str] = ("2048",)) -> tuple[Tensor, ...]:
        """Returns activations (B, C, h, w), before pooling, in the order asked for; stops after the last one.

        Args:
            x: normalised images (B, 3, 299, 299).
            stages: of "64", "192", "spatial", "768" and "2048".
        """
        found, parts = {}, list(self.children())[:-1]
        for number, part in enumerate(parts[: max(_STAGES[stage] for stage in stages)], 1):
            x = part(x)
            found.update({stage: x for stage in stages if _STAGES[stage] == number})
        return tuple(found[stage] for stage in stages)


def stages(layers: Sequence[str]) -> tuple[str, ...]:
    """Returns the activations that layers are computed from, each once, in the network's order."""
    needed = {_stage(layer) for layer in layers}
    return tuple(stage for stage in _STAGES if stage in needed)


def _stage(layer: str) -> str:
    return layer if layer in _STAGES else "2048"


def heads(activations: Mapping[str, Tensor], layers: Sequence[str], fc: nn.Linear) -> dict[str, Tensor]:
    """Returns features (B, d) by layer.

    Args:
        activations: by stage, see `stages`.
        layers: of `LAYERS`.
        fc: the network's last layer.
    """
    found = {}
    for layer in layers:
        x = activations[_stage(layer)]
        if layer == "spatial":
            # A block's output begins with its first branch, the "conv"; TensorFlow's order of axes is (h, w, channel).
            found[layer] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            continue
        pooled = F.adaptive_avg_pool2d(x, output_size=(1, 1)).flatten(1)
        if layer.startswith("logits"):
            pooled = pooled.mm(fc.weight.T) if layer == "logits_unbiased" else F.linear(pooled, fc.weight, fc.bias)
        found[layer] = pooled
    return found


class _Folded(nn.Module):
    """Convolution and ReLU, with the batch norm in the convolution's weights."""

    def __init__(self, block: fidelity.BasicConv2d) -> None:
        super().__init__()
        dtype = block.conv.weight.dtype
        self.conv = fuse_conv_bn_eval(block.conv.double(), block.bn.double()).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.conv(x))


def fold(trunk: Trunk) -> Trunk:
    """Folds batch norms into the convolutions, in float64, and stores the weights channels last; in place.

    Args:
        trunk: in inference mode; it is changed.

    Returns:
        The same object. Its activations agree to float32's rounding.
    """
    _fold(trunk)
    return trunk.to(memory_format=torch.channels_last)


def _fold(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, fidelity.BasicConv2d):
            setattr(module, name, _Folded(child))
        else:
            _fold(child)
