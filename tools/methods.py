"""Write docs/methods.md: what is there, what it computes, where its numbers agree, and what others call it.

    python tools/methods.py            # writes the page; measures against the golden files in $DISTPRO_GOLDEN
    python tools/methods.py --check    # exits with 1 if the page is stale; the measured errors are not compared

Names, papers, formulas, options and defaults come from the losses themselves, configs from retrain_configs/methods, and
errors from the cases of tests/losses.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distpro.losses import LOSSES, available_losses  # noqa: E402
from tests.losses import golden, golden_feature_dense, golden_response_relation  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
CONFIGS = ROOT / "retrain_configs" / "methods"
CASES: dict[str, golden.Case] = {**golden_feature_dense.CASES, **golden_response_relation.CASES}

HEAD = """\
# Methods

*Made by `python tools/methods.py` from the losses, their configs and the golden files. Do not edit; a test compares.*

{count} losses (`distpro.available_losses()`), one file each in [distpro/losses](../distpro/losses), whose docstring
has the shapes and what departs from the paper. Each has a config in
[retrain_configs/methods](../retrain_configs/methods) with the constants that its source states for ResNet-56 → ResNet-20
on CIFAR-100, or the nearest setting that it states: `distpro retrain retrain_configs/methods/kd.yaml`. All of these are
trained for some steps in the tests, where each loss has to fall. Losses of tokens have theirs among the
[configs of texts](tasks/text.md). How to add one: [extending.md](extending.md).
"""

AGREEMENT = """\
**reads**: the taps that a config need not name. **stages**: trainings of the published recipe; with 2, the first one is
`pretrain: true`. **agreement**: golden files hold inputs, values and gradients of the reference implementations, run
unmodified; stated are the number of files, and of the largest relative errors in float32 the loss's and the gradients'
(largest difference over the largest entry: of each input's gradient; of all parameters' gradients together). In float64
the values agree to 1e-7. Where no reference could be run, the independent check that the tests have instead. All losses
pass the conformance tests: gradients against finite differences in float64, none for the teacher, half precision.
"""

# Where there is no golden file.
INDEPENDENT = {
    "afd": "attention and errors written out again, float64",
    "ctkd": "`kd` at its temperature; the reversed gradient against its formula",
    "cwd": "formula written out again, float64",
    "deit": "both forms by hand, float64",
    "dist_plus": "correlations by hand, float64",
    "dkd_nontarget": "with `dkd_target`, `dkd` (which has golden files)",
    "dkd_target": "with `dkd_nontarget`, `dkd` (which has golden files)",
    "ghnd": "sum over depths of `hnd`, by hand",
    "hnd": "sum of squares, by hand",
    "l1": "PyTorch's l1_loss, float64",
    "l2": "squared error after its projection, float64",
    "logit_std": "`kd` and `dkd` of standardised logits; invariant to the teacher's scale",
    "ls": "`kd` from a uniform teacher, up to a constant",
    "mgd": "without mask the generation error; the masks' statistics",
    "minilm": "relations head by head and row by row, float64",
    "mlkd": "three levels summed over temperatures by hand, float64",
    "semckd": "attention and errors written out again, float64",
    "simkd": "error and prediction by hand, float64",
    "skd": "both parts by explicit matrices, float64",
    "srd": "formula written out again, float64",
    "srrl": "both parts by hand, float64",
    "structured": "explicit pairs of positions, float64",
    "tinybert": "the authors' lines once more, float64",
    "tinybert_attention": "scores by an explicit loop, float64",
}

# In other toolkits: their name, ours. A word in backticks is a loss, `option: value` is an option of the loss before it.
TOOLKITS: dict[str, Sequence[tuple[str, str]]] = {
    "torchdistill": (
        ("KDLoss", "`kd` `ce_weight: alpha`; alpha 0 or None: `kd` with weight 1/T²; beta other than 1 − alpha: `kd` "
                   "beside a task weight"),
        ("FSPLoss", "`fsp` `form: norm`"),
        ("ATLoss", "`at` `form: code` or `form: paper`"),
        ("PKTLoss", "`pkt`"),
        ("FTLoss", "`ft` `form: flat`, `p: p`; its first stage: `pretrain: true`"),
        ("AltActTransferLoss", "`dab`"),
        ("RKDLoss", "`rkd` `w_d: dist_factor`, `w_a: angle_factor`"),
        ("VIDLoss", "`vid`"),
        ("CCKDLoss", "`cc` `form: gaussian` or `form: bilinear`"),
        ("SPKDLoss", "`sp`"),
        ("CRDLoss", "`crd`"),
        ("AuxSSKDLoss", "`sskd` `pretrain: true`"),
        ("SSKDLoss", "`sskd`"),
        ("PADL2Loss", "`pad_l2`; its first stage: `pretrain: true`"),
        ("HierarchicalContextLoss", "`review`; alone: `hcl`"),
        ("RegularizationLoss", "`ktaad` `code_weight: factor`"),
        ("KTALoss", "`ktaad` `p: p`, `adaptation_weight: factor`"),
        ("AffinityLoss", "`ktaad` `affinity_weight: factor`"),
        ("ChSimLoss", "`ickd`"),
        ("DISTLoss", "`dist`"),
        ("DISTPlusLoss", "`dist_plus` `form: torchdistill`"),
        ("SRDLoss", "`srd`"),
        ("LogitStdKDLoss", "`logit_std`, its cross-entropy as the task loss"),
        ("SKDInstanceLoss", "`skd` `direction_weight: 0`, `form: code`"),
        ("SKDDirectionLoss", "`skd` `instance_weight: 0`, `form: code`"),
        ("SimpleLossWrapper, DictLossWrapper", "the task loss; of MSELoss: `l2` (mean), `ghnd` or `hnd` (sum); of other "
                                               "torch.nn losses: distances of pathways"),
        ("WeightedSumLoss", "distpro.Objective"),
    ),
    "RepDistiller": (
        ("DistillKL", "`kd`"),
        ("HintLoss", "`hint`"),
        ("Attention", "`at`"),
        ("NSTLoss", "`nst`"),
        ("Similarity", "`sp`"),
        ("RKDLoss", "`rkd`"),
        ("PKT", "`pkt`"),
        ("KDSVD", "`kdsvd`"),
        ("Correlation", "`cc` `form: neighbour`"),
        ("VIDLoss", "`vid`"),
        ("ABLoss", "`ab`"),
        ("FactorTransfer", "`ft` `form: attention`"),
        ("FSP", "`fsp` `form: mse`"),
        ("CRDLoss", "`crd`"),
    ),
    "mdistiller": (
        ("NONE", "distpro train"),
        ("KD", "`kd`"),
        ("AT", "`at`"),
        ("OFD", "`ofd`"),
        ("RKD", "`rkd`"),
        ("FITNET", "`hint`, of one tap"),
        ("KDSVD", "`kdsvd`"),
        ("CRD", "`crd`"),
        ("NST", "`nst`"),
        ("PKT", "`pkt`"),
        ("SP", "`sp`"),
        ("VID", "`vid`"),
        ("REVIEWKD", "`review`"),
        ("DKD", "`dkd`"),
        ("with logit standardisation", "`logit_std` `of: kd` or `of: dkd`; `mlkd` `standardize: true`"),
    ),
    "SuperGradients": (
        ("KDLogitsLoss", "`kd_logits`"),
        ("KDklDivLoss", "the distillation part of `kd_logits`"),
    ),
}  # fmt: skip


def files_of(loss: str) -> list[str]:
    """Names of the golden files that the loss is compared with."""
    return [file for file, case in CASES.items() if case.loss == loss]


def measured(loss: str) -> tuple[float, float]:
    """Largest relative errors of the loss and of its gradients, in float32, over the golden files."""
    errors = {"loss": 0.0, "gradients": 0.0}

    def note(what: str, value: Any, reference: Any, tolerance: float, noise: float = 0.0) -> None:
        if what.startswith("after."):
            return
        value, reference = value.detach().double().reshape(reference.shape), reference.detach().double()
        scale = noise / golden.ROUNDING if what.startswith("pgrad.") else reference.abs().max().item()
        kind = "loss" if what.startswith("loss") else "gradients"
        errors[kind] = max(errors[kind], (value - reference).abs().max().item() / scale)

    with mock.patch.object(golden, "_assert_close", note):
        for file in files_of(loss):
            golden.check(file, CASES[file])
    return errors["loss"], errors["gradients"]


def agreement(loss: str, errors: Mapping[str, tuple[float, float]]) -> str:
    """The cell that says how the loss's numbers were checked."""
    count = len(files_of(loss))
    if not count:
        return INDEPENDENT.get(loss, "the conformance tests alone")
    found = (
        "; loss {}, gradients {}".format(*(f"{e:.0e}" if e else "0" for e in errors[loss])) if loss in errors else ""
    )
    return f"{count} golden file{'s' if count > 1 else ''}{found}"


def options(loss: str) -> str:
    """Options with their defaults, as a config writes them."""
    kind: Any = LOSSES[loss]
    cells = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in ("student_shapes", "teacher_shapes"):
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            cells.append("those of the loss inside")
        elif name in kind.needs:
            cells.append(f"`{name}` (found by itself)")
        else:
            cells.append(f"`{name}: {json.dumps(parameter.default)}`")
    return ", ".join(cells) or "none"


def before_relu(kind: Any) -> str:
    """Whose stages are read before their last ReLU, if anybody's."""
    return {"neither": "", "teacher": " (teacher's before the ReLU)", "both": " (before the ReLU)"}[kind.before_relu]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def config_link(name: str) -> str:
    if name in ("minilm", "tinybert", "tinybert_attention"):  # of tokens: the text task's
        file = f"sst2_{name.partition('_')[0]}.yaml"
        return f"[{file}](../retrain_configs/{file})"
    return f"[{name}.yaml](../retrain_configs/methods/{name}.yaml)"


def summary(name: str) -> str:
    """The first sentence of a config's comment."""
    comment = " ".join(
        line[2:] for line in (CONFIGS / f"{name}.yaml").read_text("utf-8").splitlines() if line[:1] == "#"
    )
    return re.split(r"(?<=[^A-Z]\.) (?=[A-Z])", comment)[0]


def render(errors: Mapping[str, tuple[float, float]]) -> str:
    """The page, with the errors of the losses that were measured."""
    names = available_losses()
    kinds: dict[str, Any] = {name: LOSSES[name] for name in names}
    methods = [
        [f"`{n}`", k.title, k.paper, k.year, k.family, k.reads, k.stages, config_link(n), agreement(n, errors)]
        for n, k in kinds.items()
    ]
    formulas = [
        [
            f"`{n}`",
            f"`{k.formula}`",
            options(n),
            ", ".join(f"`{s}`" for s in k.scalars) or "none",
            ", ".join(k.taps) + before_relu(k),
        ]
        for n, k in kinds.items()
    ]
    recipes = [p.stem for p in sorted(CONFIGS.glob("*.yaml")) if p.stem not in (*names, "base")]
    parts = [
        HEAD.format(count=len(names)),
        AGREEMENT,
        table(["name", "method", "paper", "year", "family", "reads", "stages", "config", "agreement"], methods),
        "\n## Formulas and options\n",
        "s and t are what is read of student and teacher, N is the batch. **moves**: options that may be a process\n"
        "(`temperature: {linear: {initial: 4, final: 1}}`); the weight of a term always may. **taps**: default places.\n",
        table(["name", "formula", "options and defaults", "moves", "taps"], formulas),
        "\n## More than a loss\n",
        "How such configs are written: [recipes.md](recipes.md).\n",
        table(["config", "what it is"], [[config_link(n), summary(n)] for n in recipes]),
        "\n## Names in other toolkits\n",
        "A loss, or `option: value` of the loss before it. Versions: torchdistill 1.1.5; RepDistiller, mdistiller and\n"
        "SuperGradients as of 2026.\n",
    ]
    for toolkit, rows in TOOLKITS.items():
        parts.append(f"### {toolkit}\n\n{table([toolkit, 'here'], rows)}\n")
    return "\n".join(parts)


def structure(page: str) -> str:
    """A page without its measured errors."""
    return re.sub(r"; loss \S+, gradients \S+", "", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or compare it. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/methods.md from the code.")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is stale")
    if parser.parse_args(arguments).check:
        fresh = PAGE.is_file() and structure(PAGE.read_text("utf-8")) == structure(render({}))
        if not fresh:
            print(f"{PAGE.relative_to(ROOT)} is stale: run python tools/methods.py", file=sys.stderr)
        return 0 if fresh else 1
    if not golden.GOLDEN.is_dir():
        print(f"no golden files at {golden.GOLDEN} (set $DISTPRO_GOLDEN)", file=sys.stderr)
        return 2
    PAGE.write_text(render({loss: measured(loss) for loss in available_losses() if files_of(loss)}), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
