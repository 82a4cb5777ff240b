"""Time of a hint stage that runs only what its hint depends on, against one that runs both models to their ends.

    python tools/bench_stages.py                       # ResNet-56 → ResNet-20, hints at layer1 and layer2
    python tools/bench_stages.py --teacher wrn_40_2 --student wrn_16_2 --taps block1 block2

FitNet's first stage trains the student up to a middle layer against the teacher's middle layer. The parts behind are
found from the taps and left out (`distpro.Objective`, prune). Both forms take the same steps on the same batches; their
losses have to be identical to the last bit, or the benchmark fails. torchdistill reports 1.2-1.7 times faster stages
with models that were redesigned by hand (Matsubara 2021, Table 3).
"""

from __future__ import annotations

import copy
import sys

import torch
from benchmark import measure, medians, parser, save

from distpro.losses import build_loss
from distpro.models import build_model
from distpro.objective import Objective, Term
from pathways import probe_shapes


class HintStage:
    """A hint stage's step on one batch."""

    def __init__(self, teacher: torch.nn.Module, student: torch.nn.Module, tap: str, x: torch.Tensor, **how: object):
        shapes = [[probe_shapes(model, [tap], x)[tap]] for model in (student, teacher)]
        torch.manual_seed(1)
        term = Term(build_loss("hint", *shapes), "hint", [tap], [tap], 1.0)
        term.to(x.device)
        self.objective = Objective(teacher, copy.deepcopy(student), [term], x[:2], task_weight=0, **how)  # type: ignore[arg-type]
        params = self.objective.trainable_parameters()
        self.optimizer = torch.optim.SGD(params, 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
        self.x, self.y = x, torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.losses: list[float] = []

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss, parts = self.objective(self.x, self.y)
        loss.backward()
        self.optimizer.step()
        self.losses.append(parts["hint"].item())


def main() -> int:
    command = parser(__doc__, "bench_stages")
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--taps", nargs="+", default=["layer1", "layer2"])
    command.add_argument("--batch", type=int, default=128)
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    torch.manual_seed(0)
    models = [build_model(name, num_classes=100) for name in (options.teacher, options.student)]
    teacher, student = (m.to(device, memory_format=torch.channels_last) for m in models)
    x = torch.randn(options.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    stages: dict[str, HintStage] = {}
    for tap in options.taps:
        for name, precision in (("float32", None), ("bfloat16", torch.bfloat16)):
            for form, prune in (("whole", False), ("pruned", True)):
                stages[f"{tap}, {name}, {form}"] = HintStage(
                    teacher.eval(), student, tap, x, prune=prune, precision=precision
                )
    seconds = measure({name: stage.step for name, stage in stages.items()}, options.rounds, device)
    print(
        f"{options.teacher} -> {options.student}, batch {options.batch}, {options.device}, {options.threads} threads\n"
    )
    median = medians(seconds)
    ratios, identical = {}, True
    for name in [n.removesuffix(", whole") for n in stages if n.endswith("whole")]:
        whole, pruned = stages[f"{name}, whole"], stages[f"{name}, pruned"]
        same = whole.losses == pruned.losses
        identical &= same
        ratios[name] = median[f"{name}, whole"] / median[f"{name}, pruned"]
        said = "identical" if same else "NOT identical"
        print(f"  {ratios[name]:6.2f}   whole / pruned, hint at {name}; {len(whole.losses)} losses {said}")
    save(options, seconds, ratios, losses_identical=identical)
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
