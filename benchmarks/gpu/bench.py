"""How fast a GPU engine is, beside the card's limits and transformers.

    python -m gpu.bench [--out FILE] [--seconds 520] [--rehearse]

Each part has a process of its own; what fails or does not end is told, and the others go on. The
model has random weights and the shape of Llama 3.1 8B. --rehearse runs all parts on the CPU with a
tiny model; its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import Bar, Result, format_table

from gpu.attention_speed import measure_attention
from gpu.engine_speed import measure_batching, measure_engine, measure_generate
from gpu.machine import REHEARSAL, describe_run, report_path
from gpu.product_speed import measure_products
from gpu.random_model import write_random_model
from gpu.scale import FULL, TINY, Scale

PARTS = (
    "attention",
    "products",
    "checkpoint",
    "engine",
    "engine_fp8",
    "engine_eager",
    "engine_int4_weights",
    "engine_fp8_weights",
    "generate",
    "batching",
)
READY_SECONDS = 20.0
_LAST_LINES = 15


def run_part(name: str, scale: Scale, folder: Path) -> dict[str, Any]:
    """The figures of one part."""
    device = torch.device("cuda" if scale is FULL else "cpu")
    match name:
        case "attention":
            return measure_attention(scale, device)
        case "products":
            return measure_products(scale, device)
        case "checkpoint":
            return {"weight_bytes": write_random_model(folder, scale.model, device)}
        case "engine":
            return measure_engine(folder, scale, ("depths", "requests"))
        case "engine_fp8":
            return measure_engine(folder, scale, ("depths",), kv_cache_dtype="fp8_e4m3")
        case "engine_eager":
            return measure_engine(folder, scale, (), enforce_eager=True)
        case "engine_int4_weights":
            return measure_engine(folder, scale, (), quantization="int4")
        case "engine_fp8_weights":
            return measure_engine(folder, scale, (), quantization="fp8")
        case "generate":
            return measure_generate(folder, scale, device)
        case "batching":
            return measure_batching(folder, scale, device)
    raise ValueError(f"There is no part {name}.")


def run_parts(
    *, rehearses: bool, seconds: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The figures of each part, and why others have none."""
    deadline = time.monotonic() + seconds
    figures: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in PARTS:
            command = [sys.executable, "-m", "gpu.bench", "--part", name, "--scratch", scratch]
            started = time.monotonic()
            try:
                done = subprocess.run(
                    command + ["--rehearse"] * rehearses,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=max(1.0, deadline - started),
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                failures[name] = f"did not end in {error.timeout:.0f} s"
                continue
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            written = Path(scratch, f"{name}.json")
            if done.returncode == 0 and written.exists():
                figures[name] = json.loads(written.read_text())
            else:
                last = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
                failures[name] = f"status {done.returncode}: {last}"
    return figures, failures


def make_results(figures: Mapping[str, Mapping[str, Any]], scale: Scale) -> list[Result]:
    """What the figures that are there say, each beside its limit."""
    engine = figures.get("engine", {})
    return [
        *_attention_results(figures.get("attention", {})),
        *_product_results(figures.get("products", {})),
        *_decode_results(figures),
        *_serving_results(engine, figures),
        *_slope_results(engine, figures.get("engine_fp8", {}), scale),
        *_graph_results(engine, figures.get("engine_eager", {})),
        *_weight_results(engine, figures),
    ]


def _attention_results(found: Mapping[str, Any]) -> list[Result]:
    results = []
    for kv_dtype in ("bf16", "fp8_e4m3", "int8") if found else ():
        metric, gbps = f"decode_attention_{kv_dtype}", found[f"decode_attention_{kv_dtype}_gbps"]
        bars = (Bar(at_least=0.85), Bar(at_least=0.95)) if kv_dtype == "bf16" else (None, None)
        if "card_gbps" in found:
            results.append(
                Result(metric, gbps, "GB/s", "the card's memory", found["card_gbps"], bars[0])
            )
        results.append(
            Result(metric, gbps, "GB/s", "a sum in the same run", found["read_gbps"], bars[1])
        )
    if found:
        ours, theirs = found["prefill_attention_tflops"], found["sdpa_tflops"]
        bar = Bar(at_least=0.6)
        results.append(Result("prefill_attention", ours, "TFLOP/s", "SDPA's flash", theirs, bar))
    return results


def _product_results(found: Mapping[str, Any]) -> list[Result]:
    bars = {"int4_1": Bar(at_least=2.5), "fp8_2048": Bar(at_least=1.6)}
    results = []
    for name, speed in found.items():
        kind, _, num_rows = name.rpartition("_")
        if kind != "plain":
            plain, bar = found[f"plain_{num_rows}"], bars.get(name)
            results.append(Result(f"product_{name}", speed, "products/s", "bf16's", plain, bar))
    return results


def _decode_results(figures: Mapping[str, Mapping[str, Any]]) -> list[Result]:
    if not {"engine", "attention", "checkpoint"} <= figures.keys():
        return []
    attention, engine = figures["attention"], figures["engine"]
    limit = attention["read_gbps"] * 1e9 / figures["checkpoint"]["weight_bytes"]
    bar = Bar(at_least=0.75)
    return [Result("decode_1", engine["decode_1"], "tokens/s", "reading the weights", limit, bar)]


def _serving_results(
    engine: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]
) -> list[Result]:
    if not engine:
        return []
    speed, unit = engine["output_tokens_per_second"], "output tokens/s"
    ready = engine["ready_seconds"]
    results = [Result("ready", ready, "s", "seconds allowed", READY_SECONDS, Bar(at_most=1.0))]
    for peer, least in (("generate", 6.0), ("batching", 1.5)):
        if peer in figures:
            theirs, name = figures[peer]["tokens_per_second"], f"transformers {peer}"
            bar = Bar(at_least=least)
            results.append(Result(f"requests_{peer}", speed, unit, name, theirs, bar))
    return results


def _slope_results(engine: Mapping[str, Any], fp8: Mapping[str, Any], scale: Scale) -> list[Result]:
    if not engine or not fp8:
        return []
    short, long = scale.itl_contexts
    ours, bf16 = (
        1e6 * (found["itl_long_ms"] - found["itl_short_ms"]) / (scale.itl_seqs * (long - short))
        for found in (fp8, engine)
    )
    bar = Bar(at_most=0.6)
    return [Result("itl_slope_fp8", ours, "ns a token of context", "bf16's", bf16, bar)]


def _graph_results(engine: Mapping[str, Any], eager: Mapping[str, Any]) -> list[Result]:
    if not engine or not eager:
        return []
    pairs = list(zip(engine["tokens"], eager["tokens"], strict=True))
    equal = float(sum(ours == others for ours, others in pairs))
    same = Result("graphs_tokens", equal, "equal", "requests", len(pairs), Bar(at_least=1.0))
    speed, without = engine["decode_1"], eager["decode_1"]
    return [same, Result("graphs_decode_1", speed, "tokens/s", "without graphs", without)]


def _weight_results(
    engine: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]
) -> list[Result]:
    """How much faster a token comes when an engine rounds its weights."""
    return [
        Result(f"decode_1_{name}", found["decode_1"], "tokens/s", "bf16's", engine["decode_1"])
        for name in ("int4", "fp8")
        if engine and (found := figures.get(f"engine_{name}_weights"))
    ]


def main() -> int:
    arguments = parse_arguments()
    rehearses: bool = arguments.rehearse
    scale = TINY if rehearses else FULL
    if arguments.part:
        found = run_part(arguments.part, scale, arguments.scratch / "model")
        (arguments.scratch / f"{arguments.part}.json").write_text(json.dumps(found))
        return 0
    if not rehearses and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here. Give --rehearse to rehearse on the CPU.")
    path = report_path("gpu-bench", arguments.out, rehearses=rehearses)
    report = describe_run("gpu-bench", rehearses=rehearses, commit=arguments.commit)
    figures, failures = run_parts(rehearses=rehearses, seconds=arguments.seconds)
    results = make_results(figures, scale)
    if rehearses:
        results = [replace(result, bar=None) for result in results]
    for part in figures.values():
        part.pop("tokens", None)
    report |= {"results": [result.to_dict() for result in results], "figures": figures}
    report["failures"] = failures
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if rehearses:
        print(REHEARSAL)
    print(format_table(results))
    print("\n".join(f"FAILED {name}: {why}" for name, why in failures.items()))
    print(f"Wrote {path}.")
    return 1 if failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-bench.json")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all parts together")
    parser.add_argument("--commit", help="of a copy that is no git checkout")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
