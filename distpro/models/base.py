"""What the models share: how a name becomes a model, the taps that a model states, and the usual initialisation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from distpro.console import pip_install
from pathways.registry import Registry, UserError, check_parameters, import_entry, is_code, nearest

MODELS = Registry("model")

LIBRARIES: dict[str, Callable[[str, str], Callable[..., nn.Module]]] = {}
"""Models of other packages, ``LIBRARY:NAME``: (the model in an error, NAME) → what builds it."""


@dataclass(frozen=True)
class StageTaps:
    """Where distillation reads a model, as tap names of `pathways.taps`, shallow to deep.

    Attributes:
        post: feature map after each stage, where students are read.
        pre: the same stages before their last ReLU, where teachers are read. Equal to `post` in models whose stages
            do not end in a ReLU.
        stem: what enters the first stage.
        embedding: what enters the classifier, shape (D,); None where there is none.
    """

    post: tuple[str, ...]
    pre: tuple[str, ...]
    stem: str
    embedding: str | None


def stage_taps(model: nn.Module) -> StageTaps | None:
    """The taps that ``model`` states (every model of this package does), or None."""
    taps = getattr(model, "stage_taps", None)
    return taps if isinstance(taps, StageTaps) else None


def init_convolutions(model: nn.Module) -> None:
    """Convolutions by He et al. (kaiming normal, fan-out; biases zero), BatchNorm to weight 1 and bias 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def build_model(name: str, num_classes: int | None = None, **params: Any) -> nn.Module:
    """A model by name, with random weights unless ``params`` say otherwise.

    Args:
        name: a name of `MODELS`; ``torchvision:NAME``; ``timm:NAME``; ``smp:NAME`` (segmentation-models-pytorch); ``hf:NAME``
            (`distpro.models.hf`); or ``package.module:callable`` for any class or function that gives a module. The last form
            imports and runs that module (the current directory can be
            imported from, after the installed packages), so it is for code that you trust.
        num_classes: passed on if given.
        params: passed on.

    >>> sum(p.numel() for p in build_model("resnet20", num_classes=10).parameters())
    272474

    Raises UserError for a name that does not exist and for parameters that the model does not take.
    """
    if num_classes is not None:
        params["num_classes"] = num_classes
    what = f"model '{name}'"
    source, colon, rest = name.partition(":")
    if not colon:
        entry = MODELS[name]
    elif source in LIBRARIES:
        entry = LIBRARIES[source](what, rest)
    else:
        entry = import_entry(what, name)
    model = _call(what, entry, params)
    if not isinstance(model, nn.Module):
        raise UserError(f"{what} gives {type(model).__name__}, not a torch.nn.Module")
    return model


def accepted(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of some facts those that a model takes: all, but of the user's own code (``package.module:callable``) what its
    parameters name."""
    if not is_code(name) or name.partition(":")[0] in LIBRARIES:
        return dict(facts)
    entry = import_entry(f"model '{name}'", name)
    if _takes_nothing(entry):
        return {}
    taken = inspect.signature(entry).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return dict(facts)
    return {fact: value for fact, value in facts.items() if fact in taken}


def _takes_nothing(entry: Callable[..., Any]) -> bool:
    """Whether it is a module without an ``__init__`` of its own: torch's names any parameters, and takes none."""
    return isinstance(entry, type) and entry.__init__ is nn.Module.__init__  # type: ignore[misc]


def _call(what: str, entry: Callable[..., Any], params: dict[str, Any]) -> Any:
    if isinstance(entry, nn.Module):
        raise UserError(f"{what} is an object of {type(entry).__name__}: name the class, or a function that gives one")
    if _takes_nothing(entry) and params:
        raise UserError(f"{what} has no parameter '{next(iter(params))}' (allowed: none)")
    check_parameters(what, entry, params)
    try:
        inspect.signature(entry).bind(**params)
    except TypeError as error:
        raise UserError(f"{what}: {error}") from None
    return entry(**params)


def _from_torchvision(what: str, name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    if name not in models.list_models():
        raise UserError(f"torchvision has no model '{name}'{nearest(name, models.list_models())}")
    unset = {"weights": None, "weights_backbone": None}  # detectors and segmenters fetch their backbone otherwise
    taken = inspect.signature(models.get_model_builder(name)).parameters
    create = _checked(what, partial(models.get_model, name, **{k: v for k, v in unset.items() if k in taken}))

    def build(weights: Any = None, num_classes: int | None = None, **params: Any) -> nn.Module:
        """With weights of other classes: all of them but the last layers, which begin anew for ``num_classes``."""
        params |= {} if num_classes is None else {"num_classes": num_classes}
        if weights is None:
            return create(**params)
        kinds = models.get_model_weights(name)
        if isinstance(weights, str) and weights.rpartition(".")[2] not in kinds.__members__:
            known = list(kinds.__members__)
            raise UserError(f"{what}: no weights '{weights}'{nearest(weights, known)} (allowed: {', '.join(known)})")
        learned = len(kinds.verify(weights).meta.get("categories", ()))
        if num_classes in (None, learned) or not learned:
            return create(weights=weights, **params)
        model = create(weights=weights, **{**params, "num_classes": learned})
        if not _renew_heads(model, learned, num_classes):
            raise UserError(f"{what}: its weights are of {learned} classes; leave num_classes, or weights, out")
        return model

    return build


def _renew_heads(model: nn.Module, learned: int, wanted: int) -> int:
    """Put new layers of ``wanted`` outputs in the place of those that give ``learned``; their number."""
    heads = [(path, m) for path, m in model.named_modules() if learned in _outputs(m)]
    for path, head in heads:
        bias = head.bias is not None
        if isinstance(head, nn.Linear):
            new: nn.Module = nn.Linear(head.in_features, wanted, bias)
        else:
            assert isinstance(head, nn.Conv2d)
            new = nn.Conv2d(head.in_channels, wanted, head.kernel_size, head.stride, head.padding, bias=bias)  # type: ignore[arg-type]
        model.set_submodule(path, new)
    return len(heads)


def _outputs(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features,)
    return (module.out_channels,) if isinstance(module, nn.Conv2d) and module.groups == 1 else ()


def _from_timm(what: str, name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError:
        raise UserError(f"{what} needs timm: {pip_install('timm')}") from None
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    return _checked(what, partial(timm.create_model, name))


def _from_smp(what: str, name: str) -> Callable[..., nn.Module]:
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise UserError(f"{what} needs segmentation-models-pytorch: {pip_install('segmentation')}") from None
    known = {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if name not in known:
        raise UserError(f"segmentation-models-pytorch has no model '{name}'{nearest(name, known)}")
    create = _checked(what, known[name])

    def build(num_classes: int = 1, encoder_weights: str | None = None, **params: Any) -> nn.Module:
        """Without weights unless asked for: the library's default fetches ImageNet's."""
        return create(encoder_weights=encoder_weights, **{"classes": num_classes, **params})

    return build


def _checked(what: str, create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Library builders take ``**kwargs`` and refuse them from deep inside."""

    def build(**params: Any) -> nn.Module:
        try:
            return create(**params)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{what}: {type(error).__name__}: {error}") from error

    return build


LIBRARIES |= {"torchvision": _from_torchvision, "timm": _from_timm, "smp": _from_smp}
