"""Text to token ids and back, and chat messages to text.

Built on the `tokenizers` library alone: importing transformers would cost the API process seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as FastTokenizer

from pagoda_runtime.config_file import read_text
from pagoda_runtime.errors import FatalError, RequestError
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.tokenizer.chat_template import ChatTemplate, cut_behind
from pagoda_runtime.tokenizer.files import DEFAULT_TEMPLATE, TokenizerFiles
from pagoda_runtime.tokenizer.infill import find_infill_format
from pagoda_runtime.tokenizer.pieces import decoder_kinds, is_context_free

logger = logging.getLogger(__name__)

NUM_KEPT_TEMPLATES = 32
# Of about 100 bytes each.
NUM_KEPT_PIECES = 65536
TOKENIZER_FILE = "tokenizer.json"
# How sentencepiece writes a space.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _byte_characters() -> dict[str, int]:
    """The character of each byte in a byte-level vocabulary: itself if it is printable, else one of
    those from 256 on. Source: Radford et al., GPT-2, 2019."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + number): byte for number, byte in enumerate(others)},
    }


BYTE_OF = _byte_characters()


class Tokenizer:
    """A model's tokenizer, with what its folder's other files add to tokenizer.json."""

    def __init__(
        self,
        tokenizer: FastTokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str] | None = None,
        has_types: bool = True,
    ) -> None:
        """special_tokens: bos_token, eos_token, … → their text. chat_templates: by name."""
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._has_types = has_types
        self.named_templates = dict(chat_templates or {})
        self.chat_template = self.named_templates.get(DEFAULT_TEMPLATE)
        # Requests may bring templates.
        self._compile: Callable[[str], ChatTemplate] = lru_cache(NUM_KEPT_TEMPLATES)(ChatTemplate)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.infill_format = find_infill_format(tokenizer.token_to_id)
        """How a prompt with a suffix is written; None: the model does not fill in the middle."""
        self.special_token_ids = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            # The flag is not all: what is added again as a special token becomes one.
            if token.special
            or self.decode([token_id]) != self.decode([token_id], skip_special_tokens=False)
        }
        """Of all special tokens, by text."""
        self.all_special_ids = frozenset(self.special_token_ids.values())
        self.longest_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        """Characters of the longest token: no longer text can be one."""
        self._is_context_free = is_context_free(tokenizer.decoder)
        self.piece: Callable[[int], str | None] = lru_cache(NUM_KEPT_PIECES)(self._find_piece)
        """The text of a token behind a whole character, if it depends on nothing else."""
        for template in self.named_templates.values():
            self._compile(template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in the text become their ids."""
        return list(self._encode(text, add_special_tokens).ids)

    def text_offsets(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """For each token of `encode` the character of the text at which it begins.

        Tokens that share a character begin where it begins; one that stands for nothing in the
        text, as an added special token, begins where the text goes on.
        """
        encoding = self._encode(text, add_special_tokens)
        offsets = []
        end_before = 0
        for (begin, end), is_added in zip(
            encoding.offsets, encoding.special_tokens_mask, strict=True
        ):
            # Some tokenizers leave a token's space out of its span.
            offsets.append(end_before if is_added else min(begin, end_before))
            end_before = max(end, end_before)
        return offsets

    def encode_texts(self, *texts: str, max_tokens: int | None = None) -> tuple[list[int], int]:
        """Token ids of a text or a pair with the special tokens that belong to it.

        Args:
            max_tokens: with those; of a pair the longer text is cut first, at its end.
        Returns: the ids, and the position from which they are of the second text, if the tokenizer
            says so; else 0.
        """
        pieces = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        if max_tokens is not None:
            num_special = self._tokenizer.num_special_tokens_to_add(len(texts) == 2)
            shares = _share([*map(len, pieces)], max_tokens - num_special)
            for piece, kept in zip(pieces, shares, strict=True):
                piece.truncate(kept)
        first, second = pieces[0], pieces[1] if len(pieces) == 2 else None
        encoding = self._tokenizer.post_process(first, second, add_special_tokens=True)
        types = encoding.type_ids if self._has_types else []
        return list(encoding.ids), types.index(1) if 1 in types else 0

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        # encode would hold Python's lock for the whole text; encode_batch lets it go.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary writes them; an id that it does not have is an empty text."""
        return [*map(self.token_name, token_ids)]

    def token_text(self, token_id: int) -> str:
        """The text of a token within a text; for part of a character a replacement character."""
        # At the start of a text a sentencepiece tokenizer drops a token's leading space.
        once, twice = (self.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :]

    def _find_piece(self, token_id: int) -> str | None:
        text = self.token_text(token_id) if self._is_context_free else REPLACEMENT
        return None if REPLACEMENT in text else text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of a token's text; of part of a character its true bytes, if they are known."""
        text = self.token_text(token_id)
        if REPLACEMENT in text:
            name = self.token_name(token_id)
            if found := _fallback_byte(name) or _bytes_of(name):
                return found
        return text.encode()

    def token_name(self, token_id: int) -> str:
        """What the vocabulary calls a token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def tokens_in_bytes(self) -> list[bytes]:
        """The bytes of each token within a text, by id; of special tokens the names.

        Raises ValueError: the tokens of this kind of tokenizer are not bytes.
        """
        kinds = decoder_kinds(self._tokenizer.decoder)
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(f"its decoder is {', '.join(sorted(kinds)) or 'missing'}")
        tokens = [b""] * self.vocab_size
        for name, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token_id in self.all_special_ids:
                tokens[token_id] = name.encode()
            elif "ByteLevel" in kinds:
                tokens[token_id] = _bytes_of(name) or name.encode()
            else:
                tokens[token_id] = _fallback_byte(name) or name.replace(_SPACE, " ").encode()
        return tokens

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Render messages to a prompt; it holds the special tokens already.

        Args:
            template: replaces the model's own.
            continue_final_message: the prompt ends with the words of the last message.
            kwargs: further variables of the template.
        Raises: RequestError: there is no template, it is no Jinja, or it refuses the messages.
        """
        source = template if template is not None else self.chat_template
        if source is None:
            raise RequestError(
                "This model has no chat template. Start the server with --chat-template FILE, "
                "or use /v1/completions.",
                param="messages",
            )
        variables = {
            **self._special_tokens,
            **kwargs,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._compile(source).render(messages, variables)
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                f"chat_template is not valid Jinja: {error}.", param="chat_template"
            ) from error
        return cut_behind(text, messages[-1]) if continue_final_message else text

    def _id_of(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        token_id: int | None = None if text is None else self._tokenizer.token_to_id(text)
        return token_id


def _bytes_of(name: str) -> bytes:
    """Of a token of a byte-level vocabulary; empty of others."""
    found = [BYTE_OF.get(character, -1) for character in name]
    return b"" if -1 in found else bytes(found)


def _fallback_byte(name: str) -> bytes:
    """That sentencepiece names `<0x..>`; empty of other tokens."""
    return bytes.fromhex(name[3:5]) if len(name) == 6 and name.startswith("<0x") else b""


def _share(lens: Sequence[int], room: int) -> list[int]:
    """How much of each of one or two texts fits; the longer one is cut until they are alike."""
    room = max(0, room)
    if sum(lens) <= room:
        return list(lens)
    if len(lens) == 1:
        return [room]
    shorter = min(*lens, room // 2)
    return [shorter, room - shorter] if lens[0] <= lens[1] else [room - shorter, shorter]


def tokenize_bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences that write one of the words, each once.

    A word has one sequence at the start of a text or within a word, and mostly another after a
    space. Other ways to write it, as letter by letter, are not among them.

    Raises: RequestError: a word is empty or white space alone.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word.strip():
            raise RequestError(
                f"bad_words has {word!r}; each must have a character that is not white space.",
                param="bad_words",
            )
        plain, spaced = (
            tuple(tokenizer.encode(text, add_special_tokens=False))
            for text in (word.lstrip(), " " + word.lstrip())
        )
        sequences[plain] = None
        # Where the space is a token of its own, the plain sequence is found behind it anyway.
        if spaced[-len(plain) :] != plain:
            sequences[spaced] = None
    # What the tokenizer has no tokens for cannot be written.
    return tuple(sequence for sequence in sequences if sequence)


def add_bad_words(tokenizer: Tokenizer, params: SamplingParams) -> SamplingParams:
    """The parameters with the tokens of their bad words. Raises as `tokenize_bad_words`."""
    words = tokenize_bad_words(tokenizer, params.bad_words)
    return msgspec.structs.replace(params, bad_words_token_ids=words) if words else params


def read_tokenizer_file(folder: Path) -> str:
    """The text of tokenizer.json. Raises FatalError: ModelNotFound, ModelAccessDenied."""
    path = folder / TOKENIZER_FILE
    text = read_text(path)
    if text is None:
        raise FatalError(
            "ModelNotFound",
            f"{path} does not exist. Save the model's tokenizer in the fast format "
            f"({TOKENIZER_FILE}) beside its config.json.",
        )
    return text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises: FatalError: ModelNotFound, ModelAccessDenied or InvalidModelConfig.
    """
    try:
        tokenizer = FastTokenizer.from_str(read_tokenizer_file(folder))
    except FatalError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise FatalError(
            "InvalidModelConfig",
            f"{folder / TOKENIZER_FILE} is not a tokenizer: {error}. Copy or download the file "
            "again.",
        ) from error
    # A stored truncation would silently cut prompts, a stored padding lengthen them.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    files = TokenizerFiles.read(folder)
    tokenizer.encode_special_tokens = files.splits_special_tokens
    _add_tokens(tokenizer, files, folder)
    try:
        return Tokenizer(
            tokenizer,
            special_tokens=files.special_tokens,
            chat_templates=files.chat_templates,
            has_types=files.has_types,
        )
    except jinja2.TemplateError as error:
        raise FatalError(
            "InvalidModelConfig",
            f"The chat template in {folder} is not valid Jinja: {error}. Correct it.",
        ) from error


def _add_tokens(tokenizer: FastTokenizer, files: TokenizerFiles, folder: Path) -> None:
    """Add what the files beside tokenizer.json know, in the order that transformers adds it."""
    known = tokenizer.get_added_tokens_decoder()
    added = {token_id: AddedToken(**token) for token_id, token in files.added_tokens.items()}
    named = set(files.special_tokens.values())
    if not files.has_all_added:
        # Those of tokenizer.json come first. They are there, unless they have to become special.
        changed = {i: t for i, t in known.items() if t.content in named and not t.special}
        added = {i: token for i, token in added.items() if i not in known} | changed
    for token in added.values():
        token.special = token.special or token.content in named
    texts = {token.content for token in (*known.values(), *added.values())}
    special = {token["content"]: AddedToken(**token) for token in files.special_list}
    new = [token for text, token in special.items() if text not in texts]
    tokenizer.add_tokens([*(added[token_id] for token_id in sorted(added)), *new])
    for token_id, declared in files.added_tokens.items():
        given = tokenizer.token_to_id(declared["content"])
        if given != token_id:
            message = "%s: the token %r is said to have the id %d, and has %d by its place"
            logger.warning(message, folder, declared["content"], token_id, given)
