"""What all parts of a model have in common: they are walked."""

from __future__ import annotations

from collections.abc import Iterator

from pagoda_runtime.quantization.parameter import Parameter, Shard


class Module:
    """A part of a model: it has parameters, or attributes and lists of parts that have.

    A parameter's name is the way to it, as `layers.0.self_attn.q_proj.weight`. A part that stacks
    several of the checkpoint's stands in their place: `q_proj`, not `qkv_proj`.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, Parameter] = {}
        """By name, from construction until they are loaded."""
        self.weight_bytes = 0
        """Of the parameters, once they are loaded."""
        self.multiplications_per_token = 0
        self.multiplications_per_earlier_token = 0
        """That a token takes for each one that it sees; of a part that sees all."""

    def children(self) -> Iterator[tuple[str, Module]]:
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, Module):
                        yield f"{name}.{index}", item

    def modules(self) -> Iterator[Module]:
        """This one and all below it."""
        yield self
        for _, child in self.children():
            yield from child.modules()

    def shards(self, path: str = "") -> Iterator[tuple[str, Shard]]:
        """What has to be loaded: each name with what it fills."""
        parent = path[: path.rfind(".") + 1]
        for name, parameter in self.parameters.items():
            for part, shard in parameter.shards():
                yield f"{parent + part if part else path}.{name}", shard
        for name, child in self.children():
            yield from child.shards(f"{path}.{name}" if path else name)

    def after_loading(self) -> None:
        """Bring all parts into the form they compute with, and drop the parameters."""
        for module in self.modules():
            module.weight_bytes = sum(p.num_bytes for p in module.parameters.values())
            module.use_parameters()
            module.parameters.clear()

    def use_parameters(self) -> None:
        """Make of this part's own parameters, now loaded, what it computes with."""

    @property
    def bytes_per_step(self) -> int:
        """Bytes of this part's own weights that a decode step reads."""
        return self.weight_bytes
