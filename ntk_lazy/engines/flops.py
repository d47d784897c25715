"""Operations of a computation, counted while it runs."""

from __future__ import annotations

from typing import Any, final

from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from ntk_lazy.engines.watch import Watch

_FUSED = ("rnn", "lstm", "gru")  # as in mkldnn_rnn_layer, _cudnn_rnn and _thnn_fused_lstm_cell


@final
class FlopCount(Watch):
    """Add up what torch's own formulas say of each operator; one without a formula counts as nothing.

    ``torch.utils.flop_counter.FlopCounterMode`` does the same, at the price that ``Watch`` avoids.

    Attributes:
        total: Operations so far, a multiplication and an addition being two.
        is_complete: Whether no fused recurrent layer was among them: torch has no formula for these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.is_complete = True

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        elif any(word in str(func) for word in _FUSED):
            self.is_complete = False
        return result
