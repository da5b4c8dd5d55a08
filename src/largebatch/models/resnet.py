"""ResNet-18, -34 and -50 of He et al. 2015 (arXiv 1512.03385), module for module as in torchvision.

They are defined here because ``import torchvision`` takes 1.2 to 1.6 s, nearly all of it for operators of object
detection, which load ``torch._dynamo``. Names of modules and parameters, initial weights under a seed and outputs are
equal bit for bit, as a test checks. State dicts are therefore compatible both ways.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, inputs, H, W] to [B, width, H / stride, W / stride]."""

    widening = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += shortcut
        return cast(Tensor, self.relu(y))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [B, inputs, H, W] to [B, 4 width, H / stride, W / stride].

    The 3x3 convolution has the stride ("ResNet v1.5"); in the paper the first convolution has it.
    """

    widening = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, self.widening * width, 1)
        self.bn3 = nn.BatchNorm2d(self.widening * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += shortcut
        return cast(Tensor, self.relu(y))


Block = type[BasicBlock] | type[Bottleneck]

RESNETS: dict[str, tuple[Block, tuple[int, int, int, int]]] = {  # the block, and its number in each of four stages
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """A network from float images [B, 3, H, W] to logits [B, num_classes].

    Convolutions are drawn from He's normal distribution by fan-out. Norm layers start as the identity, and the last
    layer as ``nn.Linear``.
    """

    def __init__(self, block: Block, blocks: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = _convolution(3, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        widening = block.widening
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, 64 * widening, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 128 * widening, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 256 * widening, 512, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * widening, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(Tensor, self.fc(self.avgpool(x).flatten(1)))


def resnet(name: str, num_classes: int, *, zero_init_residual: bool = False) -> ResNet:
    """Build the network ``name`` of ``RESNETS``; draw its weights from torch's default generator.

    Args:
        zero_init_residual: set the last norm's weights of each block to 0, so that the block starts as the identity.
    """
    network = ResNet(*RESNETS[name], num_classes)
    for module in network.modules() if zero_init_residual else ():
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
            nn.init.zeros_(last.weight)
    return network


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _stage(block: Block, inputs: int, width: int, blocks: int, *, stride: int) -> nn.Sequential:
    """Build a sequence of blocks; the first block and its shortcut change size and width."""
    outputs = width * block.widening
    downsample = None
    if stride > 1 or inputs != outputs:  # built before the block: the order of the draws is torchvision's
        downsample = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    first = block(inputs, width, stride, downsample)
    return nn.Sequential(first, *(block(outputs, width, 1, None) for _ in range(1, blocks)))
