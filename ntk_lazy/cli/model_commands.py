"""``ntk-lazy spectrum``, ``explain`` and ``doctor``: one model and one file of data of the user's."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ntk_lazy import errors
from ntk_lazy.cli.inputs import fit_data, load_array, load_model
from ntk_lazy.columns import holds_labels
from ntk_lazy.doctor import doctor
from ntk_lazy.eigen import LOBPCG, Dense, Lanczos, Solver
from ntk_lazy.errors import ArgumentError, NTKLazyError, ShapeError
from ntk_lazy.kernel import ntk
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.outputs import OutputMode
from ntk_lazy.records import SpectrumRecord
from ntk_lazy.solves import Solve
from ntk_lazy.study.config import check_seed
from ntk_lazy.tracker import SpectrumTracker

_DEFAULT_PAIRS = 100
_SOLVERS: dict[str, Literal["auto"] | Solver] = {
    "auto": "auto",
    "lanczos": Lanczos(),
    "lobpcg": LOBPCG(),
    "dense": Dense(),
}
_MODEL_NOTE = """
mynet.py in the working directory holds a function build() that returns a torch.nn.Module; x.npy holds one example in
each row. The model is put into eval mode. Weights are a state dict in safetensors, or a torch file, read without
running what is pickled in it.
"""
_SPECTRUM_EXAMPLE = f"""\
example:
  ntk-lazy spectrum --model mynet:build --weights w.safetensors --data x.npy --target y.npy -k 200 --out mine
      writes spectrum.jsonl (values, residuals, energies) and vectors/step-00000000.safetensors

exit code:
  0 if all pairs converged; 1 if the solve failed, with nothing written, or only some converged, with what was found
  written; 2 if the input was wrong, with nothing written
{_MODEL_NOTE}"""
_EXPLAIN_EXAMPLE = f"""\
example:
  ntk-lazy explain --model mynet:build --data x.npy -k 200
      engine, chunks, predicted bytes and flops of a product with 200 columns; nothing is multiplied
  ntk-lazy explain --model mynet:build --data x.npy --pairs 200
      the same for all products of a search for 200 eigenpairs
  ntk-lazy explain --model mynet:build --data x.npy --noise 0.1
      the same for a solve with K + 0.1 I by conjugate gradients, whose iterations are predicted from some rows of K
{_MODEL_NOTE}"""
_DOCTOR_EXAMPLE = f"""\
example:
  ntk-lazy doctor --model mynet:build --weights w.safetensors --data x.npy
      whether the model has a kernel, how it would be computed, and the cure where it has none
{_MODEL_NOTE}"""


def add_to(commands: Any) -> None:
    """Add the commands to the parser's."""
    spectrum = _add(commands, "spectrum", "find the leading eigenpairs of a model of yours", _SPECTRUM_EXAMPLE)
    spectrum.add_argument("-k", type=int, metavar="K", help="eigenpairs (default: 100, or all if there are fewer rows)")
    spectrum.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the results")
    spectrum.add_argument("--target", type=Path, metavar="FILE", help=".npy of shape (N,) or (N, C): measure alignment")
    spectrum.add_argument("--lr", type=float, metavar="DELTA", help="learning rate, for the edge of stability")
    spectrum.add_argument("--rtol", type=float, default=1e-3, help="residual relative to each value (default: 1e-3)")
    spectrum.add_argument("--seed", type=int, default=0, help="seed of the solver (default: 0)")
    spectrum.add_argument("--solver", choices=sorted(_SOLVERS), default="auto", help="default: auto")
    _add_kernel_options(spectrum)
    spectrum.set_defaults(run=_spectrum)
    explain = _add(commands, "explain", "say how a product would be computed", _EXPLAIN_EXAMPLE)
    explain.add_argument("-k", type=int, default=1, metavar="K", help="columns of the product (default: 1)")
    explain.add_argument("--pairs", type=int, metavar="K", help="plan for the search for K eigenpairs instead")
    explain.add_argument("--noise", type=float, metavar="S", help="plan for (K + S I) X = B with -k right-hand sides")
    explain.add_argument("--rtol", type=float, help="residual of that solve, relative to B (default: 0.01)")
    explain.add_argument("--rank", type=int, help="of a Nyström preconditioner of that solve (default: 0, none)")
    _add_kernel_options(explain)
    explain.set_defaults(run=_explain)
    _add(commands, "doctor", "say whether a model has a kernel", _DOCTOR_EXAMPLE).set_defaults(run=_doctor)


def _add(commands: Any, name: str, help_text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text.capitalize() + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="MODULE:FACTORY", help="where the model comes from")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="state dict; default: what the factory made")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=".npy, examples first")
    parser.add_argument("--params", nargs="+", metavar="PATTERN", help="names or globs of the parameters of J")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    return parser


def _add_kernel_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--outputs", default="full", help="full, trace, sum or the index of one output (default: full)")
    parser.add_argument("--memory-budget", metavar="BYTES", help="such as 4GB; default: a quarter of what is free")
    parser.add_argument("--scratch", metavar="DIR", help="folder for factors that do not fit the memory budget")


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    data = load_array(arguments.data, name="--data")
    model = load_model(arguments.model, arguments.weights, device=arguments.device)
    return model, fit_data(model, data)


def _spectrum(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    _check_out(out)
    _check_numbers(arguments)
    target = None if arguments.target is None else _load_target(arguments.target)
    model, data = _load(arguments)
    if target is not None and target.shape[0] != data.shape[0]:
        raise ShapeError(f"--target has shape {tuple(target.shape)}, but --data holds {data.shape[0]} examples.")
    num_rows = _kernel(arguments, model, data).shape[0]
    if arguments.k is None:
        arguments.k = min(_DEFAULT_PAIRS, num_rows)
    if arguments.k > num_rows:
        raise ArgumentError(f"-k is {arguments.k}, but the kernel has {num_rows} rows and no more pairs than that.")
    record, cause = _record_into(out, arguments, model, data, target)
    if record.status != "converged":
        kept = f"'converged' in {out / 'spectrum.jsonl'} says which" if cause is None else "it could not be written"
        sys.stderr.write(
            f"ntk-lazy: partial result: {sum(record.converged)} of {arguments.k} pairs converged; {kept}\n"
        )
    _print_record(record)
    if cause is not None:
        raise NTKLazyError(f"nothing could be written to {out} ({cause}); what is printed is all there is.")
    sys.stdout.write(f"written to {out}\n")
    return 0 if record.status == "converged" else 1


def _check_out(out: Path) -> None:
    """Refuse a folder that nothing can be written to, before anything is solved."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ArgumentError(f"--out {out} exists and is not an empty folder; choose another.")
    except OSError as error:
        raise ArgumentError(f"cannot write to {out}: {error.strerror}.") from error


def _load_target(path: Path) -> Tensor:
    """Read a target; the labels of classes have a cure of their own here."""
    target = load_array(path, name="--target")
    if holds_labels(target):
        raise ArgumentError(
            f"--target: {path} holds integers, which may be the labels of classes. For labels of C classes write "
            "numpy.eye(C)[labels], for numbers target.astype(float)."
        )
    return target


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers that no solve can be made with, before anything is loaded."""
    if arguments.k is not None and arguments.k < 1:
        raise ArgumentError(f"-k must be at least 1, not {arguments.k}.")
    for name, value in (("--lr", arguments.lr), ("--rtol", arguments.rtol)):
        if value is not None and not 0 < value < math.inf:
            raise ArgumentError(f"{name} must be positive and finite, not {value}.")
    check_seed(arguments.seed)


def _kernel(arguments: argparse.Namespace, model: nn.Module, data: Tensor) -> NTKLinearOperator:
    return ntk(
        model,
        data,
        params=arguments.params,
        outputs=_outputs(arguments.outputs),
        memory_budget=arguments.memory_budget,
        scratch=arguments.scratch,
    )


def _record_into(
    out: Path, arguments: argparse.Namespace, model: nn.Module, data: Tensor, target: Tensor | None
) -> tuple[SpectrumRecord, str | None]:
    """Solve into a folder beside the one asked for, and rename it: that one is whole or not there.

    Returns:
        The record, and why nothing is written, if so.
    """
    partial = out.with_name(f".ntk-lazy.{os.getpid()}.partial")
    tracker: SpectrumTracker | None = None
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise ArgumentError(f"cannot write to {out}: {error.strerror}.") from error
        tracker = SpectrumTracker(
            data,
            arguments.k,
            folder=partial,
            keep_vectors=True,
            params=arguments.params,
            outputs=_outputs(arguments.outputs),
            memory_budget=arguments.memory_budget,
            scratch=arguments.scratch,
            solver=_SOLVERS[arguments.solver],
            rtol=arguments.rtol,
            seed=arguments.seed,
            progress=sys.stderr.isatty(),
        )
        record = tracker.record(model, 0, lr=arguments.lr, target=target)
        if not record.is_usable:
            raise _failure(record.message)
        if tracker.unsaved or "vectors" in record.failures:
            return record, record.failures.get("vectors", "no room for the record")
        tracker.close()  # and with it the file of its lock
        try:
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except OSError as error:
            return record, str(error.strerror)
        return record, None
    finally:
        if tracker is not None:
            tracker.close()
        shutil.rmtree(partial, ignore_errors=True)


def _failure(message: str) -> NTKLazyError:
    """Make the error of a solve again from a record, which keeps its class in words."""
    name, _, words = message.partition(": ")
    kind = getattr(errors, name, None)
    is_input = isinstance(kind, type) and issubclass(kind, ArgumentError)
    return ArgumentError(words) if is_input else NTKLazyError(f"the solve failed: {words or message}")


def _print_record(record: SpectrumRecord) -> None:
    values = record.values
    write = sys.stdout.write
    write(f"{len(values)} eigenpairs of {record.num_rows:,} rows: {record.status} ({record.message})\n")
    write("    i        value      residual / value\n")
    for i in sorted({1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, len(values)}):
        if i <= len(values):
            value, residual = values[i - 1], record.residual_norms[i - 1]
            share = f"{residual / value:>9.1e}" if value > 0 else f"{'-':>9}"
            # Written so that a floor that is not known marks nothing.
            mark = "  rounding" if value <= record.noise_floor * values[0] else ""
            write(f"{i:>5}  {value:>13.6e}  {share}{mark}\n")
    write(f"noise floor {record.noise_floor:.1e} of the first; {record.num_trusted} pairs certified above it\n")
    for name, value in record.scalars.items():
        error = record.errors.get(name)
        write(f"{name.replace('_', ' '):<26} {value:.6g}" + (f" ± {error:.1g}\n" if error else "\n"))
    for name, curve in record.energies.items():
        write(f"energy of the {name:<12} {curve[-1]:.4f} in the top {len(curve)}\n")
    if record.failures:
        write(f"not measured: {record.failures_in_words}\n")


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.k < 1:
        raise ArgumentError(f"-k must be at least 1, not {arguments.k}.")
    solve = _solve(arguments)
    model, data = _load(arguments)
    kernel = _kernel(arguments, model, data)
    sys.stdout.write(f"{kernel.explain(arguments.k, eigenpairs=arguments.pairs, solve=solve)}\n")
    return 0


def _solve(arguments: argparse.Namespace) -> Solve | None:
    options = {name: value for name in ("rtol", "rank") if (value := getattr(arguments, name)) is not None}
    if arguments.noise is not None:
        return Solve(noise=arguments.noise, right_hand_sides=arguments.k, **options)
    if options:
        raise ArgumentError(f"--{next(iter(options))} is an option of a solve: give --noise too.")
    return None


def _doctor(arguments: argparse.Namespace) -> int:
    model, data = _load(arguments)
    diagnosis = doctor(model, data, params=arguments.params)
    sys.stdout.write(f"{diagnosis}\n")
    return 0 if diagnosis.is_supported else 1


def _outputs(text: str) -> OutputMode:
    if text in ("full", "trace", "sum"):
        return text  # type: ignore[return-value]
    try:
        return int(text)
    except ValueError as error:
        raise ArgumentError(f"--outputs must be full, trace, sum or an index, not {text!r}.") from error
