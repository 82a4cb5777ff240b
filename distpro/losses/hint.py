"""FitNet hints (Romero et al., ICLR 2015), Eq. 3.

    loss = mean over all elements of (r(s) - t)^2,   r = ReLU(BN(conv(s)))

``s`` (N, C_s, H_s, W_s) and ``t`` (N, C_t, H_t, W_t), features after the ReLU; any number of levels. The regressor's
convolution has a bias and depends on the sizes, as in RepDistiller: 3x3 stride 2 where the map halves, transposed 4x4
stride 2 where it doubles, else a kernel of 1 + H_s - H_t, so 1x1 for equal sizes. With a mask the mean is over the
positions that count; to the regressor the others are zero, as beyond the map's border.

Departures: the paper trains in two stages, the hint first; here, as in RepDistiller, the hint is one term of the loss
(weight 100 there). RepDistiller refuses a student map that is smaller than the teacher's by another factor than two;
here a 3x3 convolution is used and the teacher's map is average-pooled (as in SemCKD's repository).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distpro.losses._maps import BatchNorm2d
from distpro.losses._masks import MaskedLevels, mean_square, same_size_counted
from distpro.losses.base import LOSSES, Shape


class ConvRegressor(nn.Module):
    """Convolution, BatchNorm and, if ``relu``, ReLU: from the student's shape (C, H, W) to the teacher's."""

    def __init__(self, student: Shape, teacher: Shape, relu: bool = True):
        super().__init__()
        self.conv = _convolution(student, teacher)
        self.bn = BatchNorm2d(teacher[0])
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x.relu() if self.relu else x


def _convolution(student: Shape, teacher: Shape) -> nn.Module:
    sides = list(zip(student[1:], teacher[1:], strict=True))
    if all(s == 2 * t for s, t in sides):
        return nn.Conv2d(student[0], teacher[0], 3, stride=2, padding=1)
    if all(2 * s == t for s, t in sides):
        return nn.ConvTranspose2d(student[0], teacher[0], 4, stride=2, padding=1)
    if all(s >= t for s, t in sides):
        height, width = (1 + s - t for s, t in sides)
        return nn.Conv2d(student[0], teacher[0], (height, width))
    return nn.Conv2d(student[0], teacher[0], 3, padding=1)


@LOSSES.register("hint")
class Hint(MaskedLevels):
    """Mean squared error between the regressed student maps and the teacher's, one regressor per level."""

    title = "FitNets: Hints for Thin Deep Nets"
    paper = "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015"
    year = 2015
    family = "feature"
    reads = "features of one or more stages"
    taps = ("stages",)
    formula = "mean (ReLU(BN(conv(s))) - t)^2"

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__(student_shapes, teacher_shapes)
        self.regressors = nn.ModuleList(ConvRegressor(s, t) for s, t in self.shapes)

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return mean_square(*same_size_counted(self.regressors[i](student), teacher, mask))
