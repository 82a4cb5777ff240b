"""Do pathways that share work run faster? The three transforms of one connection, each on its own and as grouped operations.

    python tools/bench_grouped.py

Grouped: both 1×1 convolutions of the plain feature as one, BatchNorm once over the channels of all three, both 3×3
convolutions as one grouped convolution, and one difference to the teacher's feature for all three. Forward and backward pass,
bfloat16, channels_last, batch 128, the stages of ResNet-20 → ResNet-56. The losses of both forms are compared first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmark import measure, medians, parser, save
from torch import Tensor, nn

from pathways.distances import HCL
from pathways.transforms import TRANSFORMS

STAGES = [(16, 32), (32, 16), (64, 8)]  # channels, side
NAMES = ["conv1x1", "conv3x3", "attention"]


def normalised(x: Tensor, norms: list[nn.BatchNorm2d]) -> Tensor:
    """One BatchNorm over the channels of several."""
    weight, bias = (torch.cat([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
    return F.batch_norm(x, None, None, weight, bias, True, 0.1, norms[0].eps)


def grouped(transforms: list[nn.Module], x: Tensor, target: Tensor) -> Tensor:
    """The three HCL losses of one connection, (3,)."""
    plain, refined, attended = transforms
    x = plain._align(x) if plain.resize_first else x
    focused = x * torch.sigmoid(attended.attention(x))
    both = torch.cat([plain.project[0].weight, refined.project[0].weight])
    y = torch.cat([F.conv2d(x, both), attended.project[0](focused)], 1)
    y = plain._align(normalised(y, [t.project[1] for t in transforms]))
    channels = target.shape[1]
    kernels = torch.cat([t.refine[0].weight for t in (refined, attended)])
    deep = F.conv2d(y[:, channels:], kernels, padding=1, groups=2)
    deep = normalised(deep, [t.refine[1] for t in (refined, attended)])
    difference = torch.cat([y[:, :channels], deep], 1) - target.repeat(1, 3, 1, 1)
    levels, weights = [difference], [1.0]
    for size in (4, 2, 1):
        if size < target.shape[2]:
            levels.append(F.adaptive_avg_pool2d(difference, size))
            weights.append(weights[-1] / 2)
    squares = (
        w * d.float().square().unflatten(1, (3, -1)).mean((0, 2, 3, 4)) for w, d in zip(weights, levels, strict=True)
    )
    return sum(squares) / sum(weights)  # type: ignore[return-value]


def main() -> None:
    options = parser(__doc__, "bench_grouped").parse_args()
    torch.set_num_threads(options.threads)
    device, hcl = torch.device(options.device), HCL()
    runs: dict[str, Callable[[], None]] = {}
    for student in STAGES:
        for teacher in STAGES:
            torch.manual_seed(0)
            shapes = [(c, side, side) for c, side in (student, teacher)]
            transforms = [
                TRANSFORMS.build(name, *shapes).to(device, memory_format=torch.channels_last) for name in NAMES
            ]
            x, target = (
                torch.randn(128, *s, device=device).contiguous(memory_format=torch.channels_last) for s in shapes
            )
            torch.testing.assert_close(
                grouped(transforms, x, target),
                torch.stack([hcl(t(x), target) for t in transforms]),
                rtol=1e-4,
                atol=1e-5,
            )
            x, target = x.bfloat16().requires_grad_(), target.bfloat16()

            def separately(transforms: list[nn.Module] = transforms, x: Tensor = x, target: Tensor = target) -> None:
                with torch.autocast(device.type, torch.bfloat16):
                    torch.stack([hcl(t(x), target) for t in transforms]).sum().backward()

            def together(transforms: list[nn.Module] = transforms, x: Tensor = x, target: Tensor = target) -> None:
                with torch.autocast(device.type, torch.bfloat16):
                    grouped(transforms, x, target).sum().backward()

            where = f"{student[0]} x {student[1]}² -> {teacher[0]} x {teacher[1]}²"
            runs |= {f"{where}: separate": separately, f"{where}: grouped": together}
    seconds = measure(runs, options.rounds, device)
    median = medians(seconds)
    ratios = {
        name.removesuffix(": grouped"): median[name.replace("grouped", "separate")] / median[name]
        for name in median
        if "grouped" in name
    }
    print("\n  separate / grouped")
    for name, ratio in ratios.items():
        print(f"  {ratio:6.2f}   {name}")
    parts = [sum(v for k, v in median.items() if k.endswith(kind)) for kind in ("separate", "grouped")]
    ratios["all nine connections"] = parts[0] / parts[1]
    print(
        f"  {ratios['all nine connections']:6.2f}   all nine connections: {1000 * parts[0]:.0f} ms, {1000 * parts[1]:.0f} ms"
    )
    save(options, seconds, ratios)


if __name__ == "__main__":
    main()
