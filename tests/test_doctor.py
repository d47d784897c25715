"""The doctor reports what ``ntk`` would raise, and says how a kernel would be computed."""

from __future__ import annotations

import pytest
import torch
from case import Case
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zoo import REFUSED, RIGHT

import ntk_lazy as nl
from ntk_lazy.engines.contract import Preflight
from ntk_lazy.engines.preflight import check

FALLBACKS = {
    "checkpoint": "Checkpointed",
    "checkpoint first": "Checkpointed",
    "bfloat16 checkpoint": "Checkpointed",
    "gradient reversal": "Headed",
    "wrong forward rule": "Headed",
    "embedding, padding_idx": "'0' (Embedding)",
    "token positions": "'positions' (Embedding)",
    "lstm, float32": "LSTM",
}
BY_ROWS = {"differentiable once": "Headed", "embedding bag": "'0' (EmbeddingBag)"}
LOOPED = {
    "writes in place",
    "branch on data",
    "mixture of experts",
    "prelu",
    "prelu, one slope",
    "instance norms, train",
    "lstm",
    "gru, two ways, two layers",
    *FALLBACKS,
    *BY_ROWS,
}


def diagnose(case: Case, n: int = 5) -> nl.Diagnosis:
    """Ask the doctor about a case."""
    params = None if case.params is None else list(case.params)
    return nl.doctor(case.module(), case.inputs(n), params=params, output_fn=case.output_fn)


def examine(case: Case, n: int = 4) -> Preflight:
    """Check a case as ``ntk`` does."""
    params = None if case.params is None else list(case.params)
    model = nl.FunctionalModel.from_module(case.module(), params=params, output_fn=case.output_fn)
    return check(model, case.inputs(n))


def named(name: str) -> Case:
    """Find a case."""
    (case,) = [case for case in (*RIGHT, *REFUSED) if case.name == name]
    return case


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_the_doctor_reports_the_error_that_the_kernel_raises(case: Case):
    diagnosis = diagnose(case)
    params = None if case.params is None else list(case.params)
    with pytest.raises(case.error) as refusal:
        nl.ntk(case.module(), case.inputs(5), params=params, output_fn=case.output_fn)
    assert not diagnosis.is_supported
    assert diagnosis.plan is None
    assert diagnosis.problem == str(refusal.value)
    assert diagnosis.problem in str(diagnosis)


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_the_way_of_multiplying_is_the_expected_one_and_a_fallback_names_its_module(case: Case):
    diagnosis = diagnose(case)
    assert diagnosis.is_supported
    assert diagnosis.plan is not None
    modes = dict.fromkeys(FALLBACKS, "double-reverse") | dict.fromkeys(BY_ROWS, "reverse by rows")
    assert diagnosis.plan.preflight.derivatives.mode == modes.get(case.name, "forward-over-reverse")
    assert (FALLBACKS | BY_ROWS).get(case.name, "") in str(diagnosis)
    assert diagnosis.plan.preflight.derivatives.vectorises == (case.name not in LOOPED)


def test_frozen_tied_and_half_precision_parameters_are_remarked_on():
    assert "2 of 4 parameters are frozen" in str(diagnose(named("frozen layer")))
    assert "tied" in str(diagnose(named("tied weights")))
    assert "float32" in str(diagnose(named("bfloat16")).remarks)
    assert diagnose(named("tanh")).remarks == ()


def test_a_plain_function_is_examined_like_a_module():
    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["weight"]).tanh()

    def coupled(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return model(params, x - x.mean(0))

    x, params = torch.randn(5, 3), {"weight": torch.randn(3, 2)}
    assert nl.doctor(model, x, params=params).is_supported
    assert "batch" in (nl.doctor(coupled, x, params=params).problem or "")


def test_unknown_parameters_end_in_a_report_with_their_neighbours():
    diagnosis = nl.doctor(named("tanh").module(), named("tanh").inputs(3), params=["0.wieght"])
    assert "0.weight" in (diagnosis.problem or "")


def test_an_exception_of_the_model_is_not_dressed_up():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        nl.doctor(nn.Linear(4, 3), torch.ones(5, 2))


@pytest.mark.parametrize(("width", "num_layers"), [(8, 1), (32, 3)])
def test_activation_bytes_are_those_that_a_backward_pass_needs(width: int, num_layers: int):
    layers = [layer for _ in range(num_layers) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nl.FunctionalModel.from_module(nn.Sequential(*layers, nn.Linear(width, 2)))
    found = check(model, torch.ones(4, width) * torch.arange(1, 5)[:, None] / 4)
    # Each tanh keeps its output, which is also what the next layer keeps; the input is the user's.
    assert found.activation_bytes == 4 * width * num_layers


def test_buffers_are_written_to_and_numbers_are_drawn_where_the_check_says_so():
    assert examine(named("counts its calls")).writes_buffers
    assert examine(named("draws unused numbers")).draws_numbers
    quiet = examine(named("batch norm, eval"))
    assert not quiet.writes_buffers
    assert not quiet.draws_numbers


def test_padding_of_a_functional_embedding_is_noticed_without_a_padded_example():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 3))

        def forward(self, tokens: Tensor) -> Tensor:
            return F.embedding(tokens, self.table, padding_idx=0).flatten(1)

    found = check(nl.FunctionalModel.from_module(Padded()), torch.randint(1, 7, (4, 5)))
    assert found.derivatives.mode == "double-reverse"
    assert "padding_idx" in found.derivatives.note


def test_compiled_scripts_are_refused_even_inside_a_module():
    scripted = torch.jit.script(nn.Linear(4, 3))
    for model, name in ((scripted, "the model"), (nn.Sequential(nn.Tanh(), scripted), "1")):
        assert f"{name} is a ScriptModule" in (nl.doctor(model, torch.ones(2, 4)).problem or "")


def test_the_module_at_fault_is_found_inside_a_larger_one():
    model = nn.Sequential(nn.Linear(4, 4), named("checkpoint").build(), nn.Tanh())
    note = check(nl.FunctionalModel.from_module(model), torch.randn(4, 4)).derivatives.note
    assert note.startswith("'1' (Checkpointed)")


def test_a_squeezed_batch_of_one_is_refused_with_the_cure():
    class Squeezed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    with pytest.raises(nl.UnsupportedModuleError, match=r"squeeze\(-1\)"):
        nl.ntk(Squeezed(4, 1), torch.randn(5, 4))
    with pytest.raises(nl.ShapeError, match="first dimension"):
        nl.ntk(Squeezed(4, 1), torch.randn(1, 4))
