"""Runs PyTorch on all cores: networks of timm, and variants of `config.model` implemented here."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import nn


class SeparableConv(nn.Sequential):
    """A spatial convolution on channel segments, then a pointwise convolution."""

    def __init__(self, channels: int, features: int, segments: int):
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, groups=segments, bias=False),
            nn.Conv2d(channels, features, 1, bias=False),
        )


class InceptionModule(nn.Module):
    """Figure 1, like `xception_jax.models.modules.InceptionModule`."""

    def __init__(self, channels: int, features: int):
        super().__init__()
        width = features // 4

        def conv(channels, side):
            return nn.Conv2d(channels, width, side, padding=side // 2, bias=False)

        def norm():
            return nn.Sequential(nn.BatchNorm2d(width, 1e-3, 0.1), nn.ReLU())

        self.tower_1x1 = conv(channels, 1)
        self.tower_3x3 = nn.Sequential(conv(channels, 1), norm(), conv(width, 3))
        self.tower_double = nn.Sequential(conv(channels, 1), norm(), conv(width, 3), norm(), conv(width, 3))
        self.tower_pool = nn.Sequential(
            nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
            nn.Conv2d(channels, features - 3 * width, 1, bias=False),
        )

    def forward(self, x):
        """Returns the four towers, concatenated."""
        return torch.cat([self.tower_1x1(x), self.tower_3x3(x), self.tower_double(x), self.tower_pool(x)], 1)


class Xception(nn.Module):
    """Figure 5 with the fields of `config.model` that the cases vary. Equal fields give the same parameters."""

    def __init__(
        self, num_classes=10, width_multiplier=0.25, middle_blocks=2, segments="depthwise", module="separable"
    ):
        super().__init__()
        divisor = 1 if segments == "depthwise" else segments

        def width(channels):
            return max(1, round(channels * width_multiplier / divisor)) * divisor

        def norm(features):
            return nn.BatchNorm2d(features, 1e-3, 0.1)

        def sepconv(channels, features):
            if module == "inception":
                return nn.Sequential(InceptionModule(channels, features), norm(features))
            groups = channels if segments == "depthwise" else segments
            return nn.Sequential(SeparableConv(channels, features, groups), norm(features))

        first, second = width(32), width(64)
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, first, 3, 2, bias=False), norm(first), nn.ReLU()),
            *(nn.Conv2d(first, second, 3, bias=False), norm(second), nn.ReLU()),
        )
        self.blocks = nn.ModuleList()
        self.shortcuts = nn.ModuleList()
        channels = second
        strided = [(width(n), width(n)) for n in (128, 256, 728)]
        middle = [(width(728),) * 3] * middle_blocks
        for block in (*strided, *middle, (width(728), width(1024))):
            layers: list[nn.Module] = []
            before = channels
            for features in block:
                layers += [nn.ReLU(), sepconv(channels, features)]
                channels = features
            if len(self.blocks) == 0:
                layers.pop(0)
            if len(block) == 2:
                layers.append(nn.MaxPool2d(3, 2, padding=1))
                shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, 2, bias=False), norm(channels))
            self.blocks.append(nn.Sequential(*layers))
            self.shortcuts.append(shortcut if len(block) == 2 else nn.Identity())
        last = width(1536), width(2048)
        self.exit = nn.Sequential(sepconv(channels, last[0]), nn.ReLU(), sepconv(*last), nn.ReLU())
        self.predictions = nn.Linear(last[1], num_classes)

    def forward(self, x):
        """Returns logits for images [b, 3, h, w]."""
        x = self.stem(x)
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = block(x) + shortcut(x)
        return self.predictions(self.exit(x).mean((2, 3)))


def prepare(work: dict, options: dict):
    """Returns (step, parameters). The options are compile and channels_last."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    layout = torch.channels_last if options.get("channels_last", True) else torch.contiguous_format
    model = _network(work).to(memory_format=layout)
    images = (2 * torch.rand(work["batch"], 3, work["size"], work["size"]) - 1).to(memory_format=layout)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    run = _train if work["kind"] == "train" else _infer
    return run(model, images, options.get("compile", False)), parameters


def _network(work: dict) -> nn.Module:
    if work["network"] == "small":
        return Xception(**work.get("model", {}))
    import timm

    if work["network"] == "xception":
        return timm.create_model("legacy_xception")
    model = timm.create_model(work["network"])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)  # Inception V3 of Keras, like ours, has no scale
    return model


def _infer(model, images, compiled: bool):
    model.eval()
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True  # folds BatchNorm and packs the weights
        model = torch.compile(model)
    else:
        from torch.fx.experimental import optimization

        model = optimization.fuse(model)
    no_gradients = torch.no_grad if compiled else torch.inference_mode

    def step():
        with no_gradients():
            model(images)

    return step


def _train(model, images, compiled: bool):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    labels = torch.randint(10, (len(images),))
    forward = torch.compile(model) if compiled else model

    def step():
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()

    return step
