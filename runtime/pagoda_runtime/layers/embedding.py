"""Token embedding and the projection back to the vocabulary."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding

from pagoda_kernels.cpu.int8_argmax import Int8Argmax, has_int8_argmax
from pagoda_runtime.layers.module import Module
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import INPUT, OUTPUT, Axis, Layout, Parameter, Part
from pagoda_runtime.quantization.unquantized import UnquantizedLinear


class Embedding(Module):
    """Rows of a table by token id, times a scale, in fp32. Ranks divide the table by tokens.

    Args:
        scale: rounded to the table's dtype first, as transformers does.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, *, scale: float, placement: Placement
    ) -> None:
        super().__init__()
        layout = vocabulary_layout(vocab_size, hidden_size)
        self.parameters["weight"] = placement.parameter(layout, OUTPUT, INPUT)
        self.parallel = placement.parallel
        self.own = layout.own(Axis.OUTPUT, layout.parts[0], self.parallel)
        self.scale = torch.tensor(scale, dtype=placement.dtype).item()

    def use_parameters(self) -> None:
        self.table = self.parameters["weight"].data

    @property
    def bytes_per_step(self) -> int:
        """A few rows."""
        return 0

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.parallel.size == 1:
            rows = embedding(token_ids, self.table)
        else:
            # The rank that has a token's row adds it to zeros, which leaves its bits as they are.
            places = token_ids - self.own.start
            is_own = (places >= 0) & (places < len(self.own))
            rows = embedding(places * is_own, self.table) * is_own[:, None]
            rows = self.parallel.all_reduce(rows)
        return rows.float().mul_(self.scale)


class LanguageModelHead(Module):
    """Logits over the vocabulary: hidden @ weight.T. Ranks divide it; all get all logits.

    A tied head multiplies by the embedding's table. A packed layout cannot serve as a table, so
    packing keeps a second copy of a tied weight. Where it is packed there is a third, in int8, for
    greedy rows: see `Int8Argmax`. It needs the table, so a head that is not tied has none.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tied_to: Embedding | None,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.method = UnquantizedLinear(placement)
        self.parallel, self.vocab_size = placement.parallel, vocab_size
        self._tied: Parameter | None = None
        self.copies: dict[str, int] = {}
        """In what forms the table is held beside the embedding's, with the bytes of each."""
        self.int8_argmax: Int8Argmax | None = None
        if tied_to is not None:
            self._tied = tied_to.parameters["weight"]
        else:
            layout = vocabulary_layout(vocab_size, hidden_size)
            self.parameters = self.method.create_weights(layout, has_bias=False)

    def use_parameters(self) -> None:
        self.method.after_loading({"weight": self._tied} if self._tied else self.parameters)
        if self._tied is None:
            return
        table, self.weight_bytes, self._tied = self._tied.data, self._tied.num_bytes, None
        if self.method.is_packed:
            self.copies["packed"] = table.nbytes
            if not self.method.placement.is_deterministic and has_int8_argmax(table):
                self.copies["in int8"] = table.numel()
                self.int8_argmax = Int8Argmax(table, self.method.apply)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.method.apply(hidden)
        if self.parallel.size == 1:
            return logits
        joined = torch.cat(self.parallel.all_gather(logits), dim=1)
        return joined[:, : self.vocab_size].contiguous()


def vocabulary_layout(vocab_size: int, hidden_size: int) -> Layout:
    """Of a matrix with an output for each token."""
    return Layout([Part("", vocab_size)], hidden_size, Axis.OUTPUT, is_padded=True)
