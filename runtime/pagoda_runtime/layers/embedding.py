"""Token embedding and the projection back to the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import embedding

from pagoda_kernels.cpu.int8_argmax import Int8Argmax, has_int8_argmax
from pagoda_runtime.layers.module import Module
from pagoda_runtime.quantization.base import LinearMethod, Placement
from pagoda_runtime.quantization.parameter import INPUT, OUTPUT, Axis, Layout, Part
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
        wide = rows.float()
        return wide if self.scale == 1.0 else wide.mul_(self.scale)


class LanguageModelHead(Module):
    """Logits over the vocabulary: hidden @ weight.T. Ranks divide it; all get all logits.

    A tied head multiplies by the embedding's table. A packed layout cannot serve as a table, so
    packing keeps a second copy of a tied weight. Where there is one there is a third, in int8, for
    greedy rows: see `Int8Argmax`. It needs the table, so a head that is not tied has none.

    Args:
        is_stored: whether the checkpoint has a tied head too, in another format than the table.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tied_to: Embedding | None,
        is_stored: bool = False,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.method: LinearMethod = UnquantizedLinear(placement)
        self.parallel, self.vocab_size = placement.parallel, vocab_size
        self._tied = tied_to.parameters["weight"] if tied_to else None
        self.copies: dict[str, int] = {}
        """In what forms the table is held beside the embedding's, with the bytes of each."""
        self.argmax: Callable[[torch.Tensor], torch.Tensor] | None = None
        """Like `Model.argmax`, of normalized hidden states."""
        if is_stored or tied_to is None:
            layout = vocabulary_layout(vocab_size, hidden_size)
            self.method = placement.method(placement, None)
            self.parameters = self.method.create_weights(layout, has_bias=False)

    def use_parameters(self) -> None:
        tied, self._tied = self._tied, None
        if self.parameters:
            self.method.after_loading(self.parameters)
            self.weight_bytes = self.method.num_bytes or self.weight_bytes
            if tied is not None:
                self.copies["quantized"] = self.weight_bytes
                self._find_argmax(tied.data)
            return
        assert tied is not None
        assert isinstance(self.method, UnquantizedLinear)
        self.method.after_loading({"weight": tied})
        self.weight_bytes = tied.num_bytes
        if self.method.is_packed:
            self.copies["packed"] = tied.num_bytes
            self._find_argmax(tied.data)

    def _find_argmax(self, table: torch.Tensor) -> None:
        # Padding has logits of its own; so the ranks' shares must be equal without.
        is_whole = self.vocab_size % self.parallel.size == 0
        is_deterministic = self.method.placement.is_deterministic
        if not is_deterministic and is_whole and has_int8_argmax(table):
            self.copies["in int8"] = table.numel()
            self.argmax = Int8Argmax(table, self.method.apply)
            if self.parallel.size > 1:
                self.argmax = partial(self._argmax_of_ranks, self.argmax)

    def _argmax_of_ranks(self, own: Int8Argmax, hidden: torch.Tensor) -> torch.Tensor:
        """The best of the tokens that each rank finds best in its share, by logits in fp32."""
        tokens = own(hidden)
        logits = (hidden.float() * own.table[tokens].float()).sum(dim=-1)
        first = self.parallel.rank * len(own.table)
        # In fp64, which has room for either.
        pairs = torch.stack([logits.double(), (tokens + first).double()])
        all_logits, all_tokens = torch.stack(self.parallel.all_gather(pairs), dim=1)
        return all_tokens.gather(0, all_logits.argmax(dim=0, keepdim=True))[0].long()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.method.apply(hidden)
        if self.parallel.size == 1:
            return logits
        joined = torch.cat(self.parallel.all_gather(logits), dim=1)
        return joined[:, : self.vocab_size].contiguous()


def vocabulary_layout(vocab_size: int, hidden_size: int) -> Layout:
    """Of a matrix with an output for each token."""
    return Layout([Part("", vocab_size)], hidden_size, Axis.OUTPUT, is_padded=True)
