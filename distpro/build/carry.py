"""What one training of a recipe hands to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from distpro.objective import Term
from pathways.registry import UserError


@dataclass
class Carry:
    """What a stage takes over: weights of the student (None: a fresh one), of the teacher (None: its checkpoint), and
    of terms by key."""

    student: Mapping[str, Tensor] | None = None
    teacher: Mapping[str, Tensor] | None = None
    terms: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def give(self, terms: Sequence[nn.Module]) -> None:
        """Load the weights of the terms that are known. Raises UserError where they do not fit."""
        for term in terms:
            if isinstance(term, Term) and term.key in self.terms:
                try:
                    term.loss.load_state_dict(self.terms[term.key])  # type: ignore[arg-type]
                except RuntimeError as error:
                    reason = str(error).splitlines()[-1].strip()
                    raise UserError(f"term '{term.key}' is another one in the stage before: {reason}") from None
