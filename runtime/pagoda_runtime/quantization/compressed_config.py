"""The quantization_config of compressed-tensors: groups of modules, each with its numbers."""

from __future__ import annotations

import re
from operator import itemgetter
from typing import Literal

from pagoda_runtime.quantization.description import (
    Quantization,
    QuantizationFile,
    Rule,
    everything,
)
from pagoda_runtime.quantization.schemes import (
    FP8_BLOCK_SIZE,
    WHOLE_ROW,
    PackedIntegers,
    ScaledNumbers,
    Scheme,
)

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_MIXED = "mixed-precision"


def read_compressed(file: QuantizationFile) -> Quantization:
    """Raises: FatalError: QuantizationMismatch."""
    groups = file.part("config_groups")
    if not groups.values:
        raise file.invalid("config_groups", {}, "an object with a group at least")
    for key in ("sparsity_config", "transform_config"):
        what = file.mapping(key)
        if what and what.get("format") != "dense":
            raise file.invalid(key, dict(what), "absent: this engine does not support it")
    common = file.one_of("format", _FORMATS[0], (*_FORMATS, _MIXED))
    ignored = [_rule(file, "ignore", name, None) for name in file.names("ignore")]
    rules: list[tuple[int, Rule]] = []
    for name in groups.values:
        group = groups.part(name)
        own = group.one_of("format", common, _FORMATS)
        scheme = _scheme(group, own)
        rules += [
            (_precedence(target), _rule(group, "targets", target, scheme))
            for target in group.names("targets")
        ]
    rules.sort(key=itemgetter(0))
    of_targets = (rule for _, rule in rules)
    return Quantization("compressed-tensors", (*ignored, *of_targets), _kv_cache_dtype(file))


def _precedence(target: str) -> int:
    """Over all groups names come first, then regular expressions, then classes."""
    return 2 if target == "Linear" else int(target.startswith("re:"))


def _rule(file: QuantizationFile, key: str, target: str, scheme: Scheme | None) -> Rule:
    """Of modules by name, by regular expression, or by class, of which there is one."""
    if target == "Linear":
        return everything(scheme)
    if target.startswith("re:"):
        return Rule(file.compile(key, target.removeprefix("re:")), scheme)
    return Rule(re.compile(rf"{re.escape(target)}$"), scheme)


def _scheme(group: QuantizationFile, format_name: str) -> Scheme:
    weights = group.part("weights")
    bits = weights.one_of("num_bits", None, (4, 8))
    kind = weights.one_of("type", "int", ("int", "float"))
    is_symmetric = weights.boolean("symmetric", True)
    if group.values.get("output_activations"):
        value = group.values["output_activations"]
        raise group.invalid("output_activations", value, "absent: this engine does not support it")
    if format_name == "pack-quantized":
        weights.one_of("type", "int", ("int",))
        if group.values.get("input_activations"):
            value = group.values["input_activations"]
            raise group.invalid("input_activations", value, "absent with pack-quantized")
        by_default = "group" if weights.values.get("group_size") else "tensor"
        strategy = weights.one_of("strategy", by_default, ("tensor", "channel", "group"))
        group_size = weights.group_size() if strategy == "group" else WHOLE_ROW
        is_ordered = weights.values.get("actorder") in ("group", True)
        return PackedIntegers(bits, group_size, is_symmetric, is_ordered)
    weights.one_of("num_bits", None, (8,))
    if not is_symmetric:
        raise weights.invalid("symmetric", False, f"true with {format_name}")
    strategies = ("tensor", "channel", "block") if kind == "float" else ("tensor", "channel")
    block_size = 0
    if weights.one_of("strategy", "tensor", strategies) == "block":
        block_size, structure = FP8_BLOCK_SIZE, weights.values.get("block_structure")
        if structure not in ([block_size] * 2, f"{block_size}x{block_size}"):
            raise weights.invalid("block_structure", structure, f"{[block_size] * 2}")
    return ScaledNumbers(
        "e4m3" if kind == "float" else "int8", block_size, _activations(group, kind)
    )


def _activations(group: QuantizationFile, kind: str) -> Literal["none", "static", "dynamic"]:
    """none, static or dynamic. With zeros of their own they stay what they are, which is closer."""
    inputs = group.part("input_activations")
    if not inputs.values:
        return "none"
    inputs.one_of("num_bits", 8, (8,))
    inputs.one_of("type", kind, (kind,))
    if not inputs.boolean("symmetric", True):
        return "none"
    return "dynamic" if inputs.boolean("dynamic", False) else "static"


def _kv_cache_dtype(file: QuantizationFile) -> str | None:
    scheme = file.part("kv_cache_scheme")
    if not scheme.values:
        return None
    scheme.one_of("num_bits", None, (8,))
    return "fp8_e4m3" if scheme.one_of("type", "float", ("float", "int")) == "float" else "int8"
