"""What a report shows, in its order: titles, explanations and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

from matplotlib.figure import Figure

from ntk_lazy.study import figures, findings, pictures
from ntk_lazy.study.evidence import Evidence
from ntk_lazy.study.target import Target


@final
@dataclass(frozen=True)
class Image:
    """One figure: its file name without the ending, what it shows, and how it is drawn."""

    name: str
    caption: str
    draw: Callable[[], Figure]


@final
@dataclass(frozen=True)
class Section:
    """Figures that are read together."""

    title: str
    text: str
    images: tuple[Image, ...]


def sections_of(evidence: Evidence) -> Iterator[Section]:
    """List the sections that there is something to show for."""
    before, after, config = evidence.before, evidence.after, evidence.config
    if before is not None and after is not None:
        target = Target.of(config)
        yield Section(
            "What was learned",
            _text(
                f"The network sees {config.num_points:,} pixels; here it is evaluated on all "
                f"{target.picture.size:,} of them.",
                findings.learned(evidence),
            ),
            (
                Image(
                    "learning",
                    "Target and training points; output and residual at the start and at the end.",
                    lambda: pictures.learning(before, after, target),
                ),
            ),
        )
    if not evidence.usable:
        return
    yield Section(
        "Eigenvalues and the edge of stability",
        _text(
            "Gradient descent with a constant kernel is stable while λ₁ < 2N/δ.",
            findings.edge(evidence),
            findings.others_grew(evidence, figures.INDICES),
            findings.halvings(evidence),
        ),
        (Image("eigenvalues", "Eigenvalues, and δλ₁/N, at each snapshot.", lambda: figures.eigenvalues(evidence)),),
    )
    yield Section(
        "Alignment",
        _text(
            "E(φ, k) is the share of ‖φ‖² in the span of the first k eigenvectors. It is cumulative on purpose: "
            "eigenvectors of close eigenvalues turn into one another from step to step, and a single one means little.",
            findings.alignment(evidence),
        ),
        (
            Image("energies-over-time", "Energies over time.", lambda: figures.energies_over_time(evidence)),
            Image(
                "energies-over-index",
                "Energies over the number of eigenvectors; dotted beyond the pairs that are certified.",
                lambda: figures.energies_over_index(evidence),
            ),
        ),
    )
    yield from _portrait_sections(evidence)
    yield Section(
        "Numbers that sum the kernel up",
        "Bars are two standard errors where a number was estimated with random vectors. The first-order error "
        "compares the change "
        "of the output over the coming step with −(δ/N) K m.",
        (
            Image(
                "scalars", "Scalars at each snapshot; grey: the loss of every step.", lambda: figures.scalars(evidence)
            ),
        ),
    )
    yield Section(
        "How well the pairs are known",
        _text(
            "An eigenvalue is exact to about the square of its relative residual, an eigenvector to its residual over "
            "the gap.",
            findings.certainty(evidence),
        ),
        (Image("spectra", "Spectra and residuals.", lambda: figures.spectra(evidence)),),
    )


def _text(*sentences: str) -> str:
    """Join what there is to say."""
    return " ".join(s for s in sentences if s)


def _portrait_sections(evidence: Evidence) -> Iterator[Section]:
    before, after = evidence.before, evidence.after
    if before is None or after is None:
        return
    yield Section(
        "Eigenfunctions",
        _text(
            "Eigenvectors live on the training points; ψ(x) = J(x) w / √λ extends them to every pixel. Before training "
            "each is a straight line along every ray from the centre, as with biases of zero it must be.",
            findings.eigenfunctions(before, after),
        ),
        (
            Image("eigenfunctions-before", "Before training.", lambda: pictures.eigenfunctions(before)),
            Image("eigenfunctions-after", "After training.", lambda: pictures.eigenfunctions(after)),
        ),
    )
    yield Section(
        "Frequencies",
        _text("Radial power spectra on a grid of 64 × 96 points.", findings.frequencies(before, after)),
        (Image("frequencies", "Radial spectra.", lambda: pictures.frequencies(before, after)),),
    )
    yield Section(
        "The kernel itself",
        "K(x₀, ·) is what a step on the point x₀ (circle) does to all others; ‖∇f(x)‖², over the parameters, is the "
        "diagonal of K.",
        (Image("kernels", "Kernel slices and gradient norms.", lambda: pictures.kernels(before, after)),),
    )
