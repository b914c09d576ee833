"""Token embedding and the projection back to the vocabulary."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding

from pagoda_runtime.layers.linear import LinearMethod, PlainLinear, fix_rows, make_linear_method
from pagoda_runtime.layers.screen import Screen, can_screen


class Embedding:
    """Rows of a table by token id, times a scale, in fp32.

    Args:
        scale: rounded to the table's dtype first, as transformers does.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self.scale = torch.tensor(scale, dtype=dtype).item()

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows = embedding(token_ids, self.weight)
        return rows.float().mul_(self.scale)


class LanguageModelHead:
    """Logits over the vocabulary: hidden @ weight.T.

    A tied head multiplies by the embedding's table. A packed layout cannot serve as a table, so
    packing keeps a second copy of a tied weight. Where it is packed there is a third, in int8, for
    greedy rows: see `Screen`. It needs the table, so a head that is not tied has none.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tied_to: Embedding | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.is_tied = tied_to is not None
        self.weight = (
            torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
            if tied_to is None
            else tied_to.weight
        )
        self.method: LinearMethod = PlainLinear(self.weight)
        self.table: torch.Tensor | None = None
        self.screen: Screen | None = None

    def after_loading(self) -> None:
        self.method = make_linear_method(self.weight)
        if self.is_tied and self.method.copies_weight:
            self.table = self.weight
        del self.weight

    def add_screen(self) -> None:
        """Find the likeliest tokens faster, where that is possible; not together with fix_rows."""
        if self.table is not None and can_screen(self.table):
            self.screen = Screen(self.table, self.method)

    def fix_rows(self) -> None:
        self.method = fix_rows(self.method)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.method(hidden)
