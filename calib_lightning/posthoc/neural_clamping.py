"""Neural Clamping (Tang et al., 2024): an input perturbation and a temperature, trained on a frozen network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from calib_lightning.posthoc.base import ANY_CLASSES, Calibrator
from calib_lightning.posthoc.clamping_descent import Clamped, ClampFit, PenaltyWeight, RelativeWeight
from calib_lightning.posthoc.clamping_objective import Penalty
from calib_lightning.posthoc.clamping_optimum import ClampOptimum
from calib_lightning.posthoc.clamping_report import ClampCandidate, ClampReport, as_plain, from_plain, measured
from calib_lightning.posthoc.clamping_rows import WHERE, ClampRows, check_like_fit, reduced, several_processes
from calib_lightning.posthoc.clamping_search import candidate, check_arguments, notes_of, objectives, trained
from calib_lightning.posthoc.clamping_start import ClampStart, RandomStart
from calib_lightning.posthoc.evidence import PROBS_HINT, Evidence, Images, Network, asked, frozen, image_batches
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.utils.described import build

_WEIGHTS: tuple[PenaltyWeight, ...] = (RelativeWeight(),)
_START = RandomStart()
_DESCENT = ClampOptimum()
_GAMMAS = tuple(round(0.05 * step, 2) for step in range(21))


class NeuralClamping(Calibrator):
    """Input perturbation and temperature, trained jointly on a frozen network (Tang et al., TMLR 2024).

    ``z = f(x + delta) / T``, with one delta for all images that is added after normalisation, minimises
    ``mean_i focal_gamma(z_i, y_i) + lambda R(delta)`` over the calibration rows. There is a run for each pair of a
    gamma and a lambda; that with the lowest calibration error (15 bins) on the same rows is kept. The fit uses the
    network in evaluation mode, and changes neither its parameters nor its buffers.

    By default T is exact for the final delta. Recipes of the literature: with ``descent=ClampDescent(reduction="sum")``
    and one gamma it is what the paper prints; its authors' code is ``NeuralClamping((1.0,), FixedWeight(0.01),
    RandomStart(0.001), ClampDescent(lr=0.01, momentum=0.9), "l2", 1000)``.

    With ``descent=None`` delta keeps its starting value and only T is fitted, exactly. With a `DataDrivenStart` this is
    the cheap variant of the paper and costs one backward pass. There is no penalty then.

    In a group of several processes each process passes its own rows, and all end with the same delta and T.

    Args:
        gammas: Focusing parameters of the loss, each at least 0; 0 is cross-entropy. The default is 0, 0.05, ..., 1.
        weights: One or more rules for lambda.
        start: Initial delta.
        descent: How delta and T are trained, a `ClampOptimum` or `ClampDescent`; ``None`` fits T alone.
        penalty: R, ``"l2sq"`` for the squared Euclidean norm of delta or ``"l2"`` for the norm.
        batch_size: Batch size of each process if images are a tensor.
        keep: What is kept of the joint fit: ``"input"`` only delta (T = 1), ``"output"`` only T, the paper's ablations.

    Attributes:
        delta: Perturbation ``(C, H, W)`` in units of the normalised image.
        log_temperature: log T, 0-d float64, so that T is always above 0.
        report: How the last fit went; ``None`` before.
        search: The runs of the last fit; ``None`` before.

    Raises:
        ValueError: An argument out of range.

    Deviations:
        The paper's objective (equation 9) is the sum over rows; the mean here, as in the authors' code, has the same
        optimum, since lambda is relative to the loss, but not the same step. The authors' code penalises the norm
        instead of its square, uses T itself as the parameter, clips probabilities to ``[1e-7, 1 - 1e-7]``, and by
        default crops and flips the calibration images. As there, ``x + delta`` may leave the range of images.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> images, labels = torch.randn(64, 1, 2, 2), torch.arange(64) % 3
        >>> clamping = NeuralClamping(gammas=(0.0, 1.0))
        >>> clamping = clamping.fit(network=network, images=images, labels=labels, progress=False)
        >>> clamping(network=network, images=images).shape
        torch.Size([64, 3])
    """

    needs = ("network",)
    preserves_argmax = False

    delta: Tensor
    log_temperature: Tensor

    def __init__(
        self,
        gammas: Sequence[float] = _GAMMAS,
        weights: PenaltyWeight | Sequence[PenaltyWeight] = _WEIGHTS,
        start: ClampStart = _START,
        descent: ClampFit | None = _DESCENT,
        penalty: Penalty = "l2sq",
        batch_size: int = 512,
        keep: Literal["both", "input", "output"] = "both",
    ) -> None:
        super().__init__()
        self.gammas = tuple(map(float, gammas))  # numbers of numpy could not be read back from a file
        self.weights = (weights,) if isinstance(weights, PenaltyWeight) else tuple(weights)
        self.start, self.descent, self.penalty, self.batch_size = start, descent, penalty, batch_size
        self.keep = keep
        check_arguments(self.gammas, self.weights, penalty, batch_size, keep)
        self.search: ClampReport | None = None
        self.register_state("delta", "log_temperature")

    @property
    def fitted(self) -> bool:
        """Whether it has been fitted."""
        return self.delta.numel() > 0

    @property
    def temperature(self) -> float:
        """The fitted T; above 1 it lowers confidence. An error before the fit."""
        self.check_fitted()
        return math.exp(float(self.log_temperature))

    # --- use ---------------------------------------------------------------------------------------------------------

    def perturb(self, image: Tensor) -> Tensor:
        """Add delta to images.

        Args:
            image: ``(N, C, H, W)``, floating point, normalised as in the fit.

        Returns:
            The same shape and dtype.

        Raises:
            RuntimeError: It is not fitted.
            TypeError: Images that are not floating point; delta belongs to normalised images.
            ValueError: Another shape than in the fit.
        """
        self.check_fitted()
        check_like_fit(image, self.delta)
        return image + self.delta.to(image.dtype)

    def logits_of(self, evidence: Evidence) -> Tensor:
        """Compute ``f(x + delta)``, one batch at a time; the network must be in evaluation mode."""
        network, images = evidence.network, evidence.images
        assert network is not None
        assert images is not None
        if isinstance(images, Tensor):
            whole = torch.compiler.is_compiling() or len(images) <= self.batch_size
            batches = iter([images] if whole else torch.split(images, self.batch_size))
        else:
            batches = image_batches(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and isinstance(images, Tensor)):  # a loader may be long
            logits = torch.cat([asked(network, self.perturb(image.to(self.delta.device))) for image in batches])
        if self.num_classes == ANY_CLASSES:
            self.num_classes = logits.shape[1]
        return logits

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Divide the logits of perturbed images by T; see `Calibrator.transform`."""
        # Subtracting the largest logit first prevents an overflow for small T.
        shifted = logits - logits.amax(dim=-1, keepdim=True)
        return torch.log_softmax(shifted * torch.exp(-self.log_temperature).to(logits.dtype), dim=-1)

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Raise: logits alone do not show how images change them."""
        raise TypeError("NeuralClamping needs the network and its images. Call fit(network=..., images=...).")

    def input_only(self) -> NeuralClamping:
        """Keep only the perturbation, ``f(x + delta)``: one of the paper's ablations.

        Returns:
            A copy with T = 1, without a report.
        """
        return self._with(self.delta, torch.zeros_like(self.log_temperature))

    def output_only(self) -> NeuralClamping:
        """Keep only the temperature, ``f(x) / T``: the other ablation.

        Returns:
            A copy with delta = 0, without a report.
        """
        return self._with(torch.zeros_like(self.delta), self.log_temperature)

    def _with(self, delta: Tensor, log_temperature: Tensor) -> NeuralClamping:
        self.check_fitted()
        copy = build(self.spec, NeuralClamping)
        copy.delta, copy.log_temperature, copy.num_classes = delta.clone(), log_temperature.clone(), self.num_classes
        return copy

    # --- fit ---------------------------------------------------------------------------------------------------------

    def fit(
        self,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        network: Network | None = None,
        images: Images | None = None,
        progress: bool = True,
    ) -> Self:
        """Train on the calibration split: held-out rows without augmentation, used for neither training nor testing.

        Args:
            logits: Not used.
            labels: ``(N,)`` integer; may be ``None`` with batches, which bring their own, and is else compared to them.
            features: Not used.
            network: A module, or a differentiable function of images that is in evaluation mode.
            images: ``(N, C, H, W)``, floating point, normalised as the network expects; or batches that can be read
                repeatedly (a ``DataLoader``), whose first two entries are images and labels. Batches are used as they
                come, so a loader that shuffles should have its own generator.
            progress: Whether the first process shows a progress bar if its output is a terminal.

        Returns:
            The calibrator itself. `report` and `search` say how the fit went, and warnings name its problems.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: A wrong shape, an invalid value, no rows, a missing argument, or a network without gradients.
            FloatingPointError: The descent diverged.
        """
        evidence = self._needed(Evidence(network=network, images=images), WHERE)
        assert evidence.network is not None
        assert evidence.images is not None
        rows = ClampRows(evidence.network, evidence.images, labels, self.batch_size)
        # After a failed fit the calibrator counts as not fitted.
        self.delta, self.report, self.search, self.num_classes = self.delta.new_empty(0), None, None, 0
        with torch.inference_mode(False), torch.no_grad(), frozen(network):
            before = measured(rows, None, 0.0, ())
            if rows.look_like_probs:
                warnings.warn(f"{WHERE}: {PROBS_HINT}", stacklevel=2)
            start = self.start.delta(rows, rows.like())
            losses = measured(rows, start, 0.0, self.gammas).losses
            runs: list[ClampCandidate] = []
            end: Clamped | None = None
            weights = None if self.descent is None else self.weights
            with self._bar(progress) as bar:
                for objective, loss in objectives(rows, start, losses, self.gammas, weights, self.penalty):
                    end = trained(objective, start, self.descent, bar.update, end)
                    after = measured(rows, end.delta, end.log_temperature, (objective.gamma,))
                    runs.append(candidate(objective, loss, start, end, before, after))
                    if runs[-1].ece < min((run.ece for run in runs[:-1]), default=math.inf):
                        best, chosen = end, runs[-1]
            self.delta = best.delta if self.keep != "output" else torch.zeros_like(best.delta)
            log_t = best.log_temperature if self.keep != "input" else 0.0
            self.log_temperature = torch.tensor(log_t, dtype=torch.float64, device=best.delta.device)
            kept = measured(rows, self.delta, log_t, ())
            self.num_classes = int(reduced(torch.tensor([rows.classes], device=rows.device), "MAX"))
        self.search = ClampReport(
            rows=before.rows,
            chosen=chosen,
            candidates=tuple(runs),
            nll_before=before.nll,
            ece_before=before.ece,
            start_moved=float((start != 0).double().mean()),
            notes=tuple(notes_of(best, chosen, before)),
        )
        self.report = self.search.summary(self.name, self._epochs, best, before, kept)
        for note in self.search.notes:
            warnings.warn(f"{WHERE}: {note}", stacklevel=2)
        return self

    def _bar(self, progress: bool) -> Any:
        first = not several_processes() or dist.get_rank() == 0
        return tqdm(total=self._epochs, desc="Neural Clamping", disable=None if progress and first else True)

    @property
    def _epochs(self) -> int:
        gammas, weights = len(self.gammas), len(self.weights)
        return gammas if self.descent is None else self.descent.length(gammas * weights)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def details(self) -> dict[str, Any]:
        """The runs of the search as plain data."""
        if self.search is None:
            return {}
        runs = [run._asdict() for run in self.search.candidates]
        return {"chosen": self.search.chosen._asdict(), "candidates": runs, "start_moved": self.search.start_moved}

    def get_extra_state(self) -> dict[str, Any]:
        """Return K, the report and the search as plain data."""
        return {**super().get_extra_state(), "search": as_plain(self.search)}

    def set_extra_state(self, state: Any) -> None:
        """Restore them from a checkpoint.

        Raises:
            ValueError: The state is damaged.
        """
        try:
            if "search" in state:
                super().set_extra_state(state)
                self.search = from_plain(state["search"])
            else:  # version 0.1 saved only the search, under another name, and not K
                self.search, self.num_classes, self.report = from_plain(state["report"]), ANY_CLASSES, None
        except (KeyError, TypeError) as error:
            raise ValueError(f"The state of NeuralClamping is damaged: {error!r}.") from None
