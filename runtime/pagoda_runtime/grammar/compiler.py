"""Grammars as llguidance compiles and follows them: each text once, on threads of their own.

A grammar is a text of a stranger. What it may cost is bounded: the text's length and nesting here,
all else by llguidance, which gives up on a grammar, a mask or a sequence that becomes too complex.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pagoda_runtime.errors import PagodaError, RequestError
from pagoda_runtime.grammar.vocabulary import MakeVocabulary, whole_vocabulary
from pagoda_runtime.ipc.messages import Masks
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pagoda_runtime.grammar.masks import MaskFiller

# Of a grammar, from its coming; what takes longer goes on in its thread, for nobody. For the first
# one the tokens of the model are sorted, which takes seconds on a busy machine.
COMPILE_SECONDS = 30.0
# llguidance descends into brackets and rules by recursion, and a full stack ends the process.
_MAX_DEPTH = 256
_STACK_BYTES = 512 << 20
_NUM_THREADS = 2
_MAX_KEPT = 32
# A state of the lexer takes some 2 kB, and those of all that is kept must fit.
_MAX_LEXER_STATES = 32_768
# Ways in which a text may go on; of 1,000 a token takes some 50 ms.
_MAX_ITEMS = 1_000
_MAX_MESSAGE_CHARACTERS = 500
# A sequence is given up whose tokens take longer than this, and as much for each.
_SLOW_SECONDS = 0.25
_SLOW_TOKEN_SECONDS = 0.001


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, inner: LLMatcher, *, ignore_eos: bool) -> None:
        self.inner = inner
        self.ignore_eos = ignore_eos
        self._num_tokens, self._seconds = 0, 0.0

    def fork(self) -> Matcher:
        """Another one at the same place."""
        other = Matcher(self.inner.deep_copy(), ignore_eos=self.ignore_eos)
        other._num_tokens, other._seconds = self._num_tokens, self._seconds
        return other

    def take(self, token_id: int) -> None:
        """Go on by a token that the mask allows."""
        begun = time.perf_counter()
        self.inner.consume_token(token_id)
        self._seconds += time.perf_counter() - begun
        self._num_tokens += 1

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow."""
        return bool(self.inner.is_stopped())

    @property
    def error(self) -> str | None:
        """Why nobody can tell what may follow."""
        why = _cut(self.inner.get_error()) if self.inner.is_error() else ""
        # Mostly a token takes some microseconds, but in an ambiguous grammar each takes longer than
        # the one before, and all others wait.
        if self._seconds > _SLOW_SECONDS + _SLOW_TOKEN_SECONDS * self._num_tokens:
            why = "its tokens take too long; make the grammar less ambiguous"
        return f"The answer cannot follow its grammar any further: {why}" if why else None


class Grammar:
    """A compiled grammar."""

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    def begin(self, *, ignore_eos: bool = False) -> Matcher:
        """ignore_eos: an end token may come only where nothing else may."""
        return Matcher(self._inner.deep_copy(), ignore_eos=ignore_eos)


class Grammars:
    """Compiles grammars for one tokenizer, and computes masks. All methods are of one thread.

    Args:
        load_tokenizer: called for the first grammar.
        vocab_size: tokens of the model, which may be more than the tokenizer's.
        end_token_ids: the model's; they may come wherever a grammar may end.
        make_vocabulary: the light one compiles, and has no masks.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Tokenizer],
        *,
        vocab_size: int,
        end_token_ids: Sequence[int],
        make_vocabulary: MakeVocabulary = whole_vocabulary,
        compile_seconds: float = COMPILE_SECONDS,
    ) -> None:
        self.compile_seconds = compile_seconds
        self._load_tokenizer, self._make_vocabulary = load_tokenizer, make_vocabulary
        self._vocab_size = vocab_size
        self._end_token_ids = tuple(end_token_ids)
        self._compiled: OrderedDict[str, Future[Grammar]] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._mask_thread = ThreadPoolExecutor(1, "pagoda-mask")

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return _make_threads(_NUM_THREADS, "pagoda-grammar")

    @cached_property
    def _filler(self) -> MaskFiller:
        # Here and not above: processes that only compile do without numpy.
        from pagoda_runtime.grammar.masks import MaskFiller

        return MaskFiller(self._find_tokenizer(), self._vocab_size, self._end_token_ids)

    def compile(self, text: str) -> Future[Grammar]:
        """The grammar, once it is compiled; its result raises RequestError for what is none."""
        future = self._compiled.get(text)
        if future is None:
            future = self._compiled[text] = self._threads.submit(self._compile, text)
            if len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(text)
        return future

    def verify(self, text: str) -> None:
        """Wait for the grammar. Raises RequestError for what is none, and what takes too long."""
        try:
            self.compile(text).result(self.compile_seconds)
        except TimeoutError:
            raise self.too_slow() from None

    def too_slow(self) -> RequestError:
        """What to answer when a grammar is not there after compile_seconds."""
        return RequestError(
            f"The grammar is not compiled after {self.compile_seconds:g} seconds. Make it simpler, "
            "with fewer alternatives and smaller bounds of repetitions.",
            param="grammar",
        )

    def start_masks(self, matchers: Sequence[Matcher]) -> Masks:
        """Begin to compute what may follow, `ScheduledRow.mask`, for each matcher.

        Until the masks are there, nobody else may use the matchers.
        """
        return self._mask_thread.submit(self._filler.fill, list(matchers)).result

    def _compile(self, text: str) -> Grammar:
        _verify_depth(text)
        limits = LLParserLimits(
            max_items_in_row=_MAX_ITEMS, max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False
        )
        inner = LLMatcher(self._find_tokenizer(), text, log_level=0, limits=limits)
        if not inner.is_error():
            # Whether there is anything that it allows shows now.
            first = inner.deep_copy()
            first.compute_bitmask()
            if not first.is_error():
                return Grammar(inner)
            inner = first
        raise RequestError(f"The grammar is not valid: {_cut(inner.get_error())}", param="grammar")

    def _find_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            return self._tokenizer

    def _make_tokenizer(self) -> LLTokenizer:
        end = self._end_token_ids[0] if self._end_token_ids else None
        try:
            vocabulary = self._make_vocabulary(self._load_tokenizer(), self._vocab_size, end)
        except (PagodaError, ValueError) as error:
            raise RequestError(
                f"Grammars need a tokenizer whose tokens are bytes, and this model's is none: "
                f"{_cut(str(error))}",
                param="grammar",
            ) from error
        tokenizer = LLTokenizer(vocabulary)
        # It has them in a form of its own.
        vocabulary.tokens = []
        return tokenizer


def _verify_depth(text: str) -> None:
    """Raise RequestError for more brackets within each other than a grammar has any use for.

    Those within strings count too.
    """
    depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            if depth > _MAX_DEPTH:
                raise RequestError(
                    f"The grammar has more than {_MAX_DEPTH} brackets within each other.",
                    param="grammar",
                )
        elif character in ")]}":
            depth -= 1


def _make_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads with deep stacks; of the memory only what is used counts."""
    threads = ThreadPoolExecutor(count, name)
    before = threading.stack_size(_STACK_BYTES)
    try:
        # A pool begins a thread for each task while none is idle.
        barrier = threading.Barrier(count)
        for future in [threads.submit(barrier.wait) for _ in range(count)]:
            future.result()
    finally:
        threading.stack_size(before)
    return threads


def _cut(message: str) -> str:
    first = " ".join(message.split())
    most = _MAX_MESSAGE_CHARACTERS
    return first if len(first) <= most else f"{first[:most]}…"
