"""Texts a second that become vectors, against sentence-transformers on the same machine and texts.

BERT-base's shape with random weights, 64 texts of mixed lengths. sentence-transformers runs in an
environment of its own in the cache folder, with the versions that it wants; both sides take turns
round by round, and have the same texts, threads and dtype. Starting up does not count. Before that
both get vectors and scores of tiny random checkpoints of every kind. `make bench-embed` runs it.

    python benchmarks/embed.py --out FILE [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from checkpoints import cache_folder
from environments import make_environment
from report import Bar, Result, publish
from turns import take_turns

from pagoda_runtime import LLM
from pagoda_runtime.models.testing import make_tiny_pooled_checkpoint
from pagoda_runtime.platforms import machine

REQUIREMENTS = ("sentence-transformers==6.2.0", "torch==2.15.0", "transformers==5.24.0")
WORKER = Path(__file__).with_name("embed_worker.py")
NUM_TEXTS, LONGEST = 64, 510
EMBEDDERS = {
    "bert": ("bert", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "modernbert": ("modernbert", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"use_bidirectional_attention": True}),
}
CROSS_ENCODERS = ("bert", "xlm-roberta", "modernbert")
WORDS = tuple(f"{letter}{number}" for letter in "abcdefghij" for number in range(30))


def bert_base(cache: Path) -> Path:
    """The folder in the cache, made at the first call (440 MB)."""
    from transformers import AutoConfig, AutoModel

    folder = cache / "random" / "bert-base"
    if (folder / "modules.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert")
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(folder)
    _write_tokenizer(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    pooling = {"word_embedding_dimension": 768, "pooling_mode_mean_tokens": True}
    for name in ("1_Pooling", "2_Normalize"):
        (folder / name).mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def _write_tokenizer(folder: Path) -> None:
    """One of words, as fast as one can be: what is measured is the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    ).save_pretrained(folder)


def make_texts(number: int) -> list[str]:
    """Lengths are spread evenly over the powers of two from 8 to 510 words, as texts' are."""
    rng = random.Random(number)
    return [
        " ".join(rng.choices(WORDS, k=round(8 * (LONGEST / 8) ** rng.random())))
        for _ in range(NUM_TEXTS)
    ]


class Peer:
    """sentence-transformers in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, model: Path, dtype: str, **inputs: object) -> tuple[float, torch.Tensor]:
        """Seconds that it took, as it measured them, and vectors or scores."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"model": str(model), "dtype": dtype, **inputs}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"sentence-transformers ended with {self._process.wait()}.")
        answer = json.loads(line)
        return answer["seconds"], torch.tensor(answer["found"])


@contextmanager
def running_peer(num_threads: int) -> Iterator[Peer]:
    command = [
        make_environment("sentence-transformers", REQUIREMENTS) / "python",
        WORKER,
        str(num_threads),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Peer(process)
        assert process.stdin is not None
        process.stdin.close()


def compare(peer: Peer, scratch: Path) -> list[Result]:
    """Vectors and scores of tiny random checkpoints of every kind."""
    texts = ["a text", "é", "another one, " * 4, "x" * 200]
    results = []
    for name, (family, settings) in EMBEDDERS.items():
        folder = make_tiny_pooled_checkpoint(scratch / name, family, modules=True, **settings)
        _, theirs = peer.ask(folder, "float32", texts=texts)
        with LLM(str(folder), device="cpu") as llm:
            ours = torch.tensor([list(vector) for vector in llm.embed(texts, truncate=True)])
        results.append(_likeness(f"cosine_{name}", _least_cosine(ours, theirs)))
    for family in CROSS_ENCODERS:
        folder = make_tiny_pooled_checkpoint(scratch / f"{family}-scores", family, num_labels=1)
        pairs = [("a query", text) for text in texts]
        _, theirs = peer.ask(folder, "float32", pairs=pairs)
        with LLM(str(folder), device="cpu") as llm:
            ours = torch.tensor(llm.score("a query", texts))
        apart = float((ours - theirs.flatten()).abs().max())
        results.append(_likeness(f"score_{family}", 1.0 - apart))
    return results


def _likeness(metric: str, value: float) -> Result:
    bar = Bar(at_least=0.9999)
    return Result(metric, value, "1 is equal", "sentence-transformers", 1.0, bar)


def measure(peer: Peer, folder: Path, dtype: str, num_threads: int, rounds: int) -> Result:
    last: dict[str, torch.Tensor] = {}
    with LLM(str(folder), device="cpu", dtype=dtype, num_threads=num_threads) as llm:

        def ours(number: int) -> float:
            texts, started = make_texts(number), time.perf_counter()
            vectors = llm.embed(texts)
            seconds = time.perf_counter() - started
            last["ours"] = torch.tensor([list(vector) for vector in vectors])
            return NUM_TEXTS / seconds

        def theirs(number: int) -> float:
            seconds, last["theirs"] = peer.ask(folder, dtype, texts=make_texts(number))
            return NUM_TEXTS / seconds

        sides = {"pagoda": ours, "sentence-transformers": theirs}
        speeds = take_turns(f"{dtype}, {NUM_TEXTS} texts", sides, rounds)
    return Result(
        metric=f"embed_{NUM_TEXTS}_{dtype}",
        value=speeds["pagoda"],
        unit="texts/s",
        peer="sentence-transformers",
        peer_value=speeds["sentence-transformers"],
        bar=Bar(at_least=1.5),
        details={"least_cosine": _least_cosine(last["ours"], last["theirs"])},
    )


def _least_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one, other).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    num_threads = machine.allowed_cores()
    folder = bert_base(cache_folder())
    with running_peer(num_threads) as peer, tempfile.TemporaryDirectory() as scratch:
        results = compare(peer, Path(scratch))
        for dtype in ("float32", "bfloat16"):
            results.append(measure(peer, folder, dtype, num_threads, arguments.rounds))
    publish(
        "embed",
        results,
        arguments.out,
        rounds=arguments.rounds,
        peer=" ".join(REQUIREMENTS),
        texts=f"{NUM_TEXTS} of 8 to {LONGEST} words, evenly in the logarithm",
    )


if __name__ == "__main__":
    main()
