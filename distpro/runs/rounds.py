"""A search by whole trainings: each gives the gradient of its validation loss by the weights at some moments, after which they move.

Every training (a round) has a seed of its own, so the weights are learned for the pair and not for one trajectory. Their
logarithms are piecewise linear in time between K knots. After a round

    g_k = Σ_t φ_k(t) w(t) h(t)                           by log w at knot k; φ_k is 1 at knot k, 0 at the others
    log w_k ← log w_k − γ m_k / max(‖m_k‖_∞, noise_k)     m_k the moving average of g_k

so each knot moves by its own scale (one for all would starve the late ones), less where its gradient is noise: noise_k is its
spread over the rounds so far. What comes out is trained with, with two seeds, and judged by the mean; where it is worse than
the best so far, the next round starts from that again, with half of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distpro.console import note
from distpro.files import load_safely, save_atomically
from distpro.search.relative import RelativeStep
from distpro.search.signal import Signal, is_signal
from distpro.train import distributed

PATIENCE = 2
"""So many rounds one after the other that have led to nothing better end a search."""


def hats(steps: int, knots: int) -> Tensor:
    """φ, (K, T): piecewise linear, each 1 at its knot; the knots lie evenly from the first step to the last. One is constant."""
    if knots == 1 or steps == 1:
        return torch.ones(1, steps, dtype=torch.float64)
    places = torch.linspace(0, steps - 1, min(knots, steps), dtype=torch.float64)
    apart = (torch.arange(steps, dtype=torch.float64) - places[:, None]).abs() / (places[1] - places[0])
    return (1 - apart).clamp(min=0)


class Rounds:
    """The outer loop, see the module.

    Args:
        start: log w, (N,), at every step of the first round.
        steps: T.
        knots: K.
        rounds: at most.
        step: γ; the most telling weight of a knot changes by a factor e^γ in a round.
        gradient: (round, log w (T, N)) → h (T, N), the gradient by w of a training with these weights.
        judge: (round, log w (T, N)) → what is to be small, mean over trainings with seeds of their own; round 0 is the start.
        folder: where each round's outcome is kept; one that is there is not computed again.

    Attributes:
        signal: of the gradients by log w, summed over the knots.
        said: a row per round: ``judged``, ``taken``, ``step``.
    """

    def __init__(
        self,
        start: Tensor,
        steps: int,
        knots: int,
        rounds: int,
        step: float,
        gradient: Callable[[int, Tensor], Tensor],
        judge: Callable[[int, Tensor], float],
        folder: Path | None = None,
    ):
        self.hats = hats(steps, knots).to(start)
        self.rounds, self.folder = rounds, folder
        self._gradient, self._judge = gradient, judge
        self.log = start.expand(len(self.hats), -1).clone()
        self.optimizer = RelativeStep([self.log[0]], lr=step)
        for row in self.log[1:]:  # a group, with a scale, of its own
            self.optimizer.add_param_group({"params": [row]})
        self.signal = Signal(start.numel(), start.device)
        self._of_knots = Signal(self.log.numel(), start.device)
        self.said: list[dict[str, float]] = []

    def process(self) -> Tensor:
        """log w per step, (T, N)."""
        return self.hats.T @ self.log

    def run(self) -> Tensor:
        """All rounds; log w per step, (T, N), of the best."""
        best, of_best, worse = self.log.clone(), self._judge(0, self.process()), 0
        for number in range(1, self.rounds + 1):
            self._move(self._kept(number))
            if not self._signals():
                if distributed.is_main():
                    note(
                        f"round {number}: no weight's gradient is more than noise over {number} trainings; the search ends"
                    )
                self.log.copy_(best)
                break
            value = self._judge(number, self.process())
            taken = value < of_best
            self.said.append({"judged": value, "taken": float(taken), "step": self.optimizer.param_groups[0]["lr"]})
            if distributed.is_main():
                note(
                    f"round {number} of {self.rounds}: judged {value:.4g}, the best so far {of_best:.4g}: "
                    + ("taken" if taken else "left, with half of the step from here")
                )
            if taken:
                best, of_best, worse = self.log.clone(), value, 0
                continue
            self.log.copy_(best)
            worse += 1
            for group in self.optimizer.param_groups:
                group["lr"] /= 2
            if worse == PATIENCE:
                break
        return self.process()

    def _kept(self, number: int) -> Tensor:
        """g of a round, (K, N)."""
        path = None if self.folder is None else self.folder / f"{number}.pt"
        found = distributed.gather(load_safely(path)["gradient"] if path is not None and path.is_file() else None)[0]
        if found is None:
            log = self.process()
            found = self.hats @ (log.exp() * self._gradient(number, log).to(log))
            if path is not None and distributed.is_main():
                save_atomically({"gradient": found.cpu()}, path)
        return found.to(self.log)

    @torch.no_grad()
    def _move(self, gradient: Tensor) -> None:
        self.signal.add(gradient.sum(0))
        self._of_knots.add(gradient.flatten())
        spread = torch.tensor([row["spread"] for row in self._of_knots.rows()]).view_as(self.log)
        noise = spread.square().mean(1).sqrt().tolist()
        for group, row, own in zip(self.optimizer.param_groups, gradient, noise, strict=True):
            (knot,) = group["params"]
            knot.grad = row.clone()
            group["floor"] = max(self.optimizer.defaults["floor"], own)
        self.optimizer.step()

    def _signals(self) -> bool:
        """Whether any knot's gradient says anything; asked from the third round."""
        n = self._of_knots.updates
        return n < 3 or any(is_signal(row["mean"], row["spread"], n) for row in self._of_knots.rows())
