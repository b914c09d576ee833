from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, processors
from tokenizers.models import BPE

from pagoda_runtime.errors import FatalError, RequestError
from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.tokenizer.tokenizer import Tokenizer, load_tokenizer, tokenize_bad_words

MESSAGES = [{"role": "user", "content": "Hi <b> ünï"}, {"role": "assistant", "content": "Hello"}]
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
    {% if message.role == "tool" %}
        {{ raise_exception("no tools here") }}
    {% endif %}
    {% if loop.index > 5 %}{% break %}{% endif %}
{{ message.role }}: {{ message.content | tojson }}
    {% generation %}{{ message.content }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}assistant ({{ mood }}):{% endif %}"""


@pytest.fixture
def folder(tmp_path):
    write_tiny_tokenizer(tmp_path, chat_template=TEMPLATE)
    return tmp_path


def test_text_survives_the_way_to_ids_and_back(folder):
    tokenizer = load_tokenizer(folder)
    text = "Hello, wörld 日本 \n\t"
    token_ids = tokenizer.encode(text)
    assert token_ids[0] == 1
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.encode(text, add_special_tokens=False) == token_ids[1:]
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<s>" + text


def test_a_token_has_the_bytes_that_it_stands_for(folder):
    tokenizer = load_tokenizer(folder)
    token_ids = tokenizer.encode("a €", add_special_tokens=False)
    assert [tokenizer.token_text(i) for i in token_ids] == ["a", " ", "\ufffd", "\ufffd", "\ufffd"]
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == "a €".encode()
    of_all = tokenizer.tokens_in_bytes()
    assert of_all == [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert len(set(of_all)) == 259
    assert tokenizer.token_bytes(1) == b"<s>"


def test_a_sentencepiece_token_has_its_space_and_its_byte():
    vocabulary = {"<unk>": 0, "▁the": 1, "<0xE2>": 2, "x": 3}
    fast = FastTokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = Tokenizer(fast, special_tokens={})
    assert [tokenizer.token_text(i) for i in (1, 2, 3)] == [" the", "\ufffd", "x"]
    assert [tokenizer.token_bytes(i) for i in (1, 2, 3)] == [b" the", b"\xe2", b"x"]
    assert [tokenizer.piece(i) for i in (1, 2, 3)] == [" the", None, "x"]
    assert tokenizer.tokens_in_bytes() == [b"<unk>", b" the", b"\xe2", b"x"]


@pytest.mark.parametrize(
    ("text", "offsets"),
    [
        ("a €b", [0, 0, 1, 2, 2, 2, 3]),
        ("", [0]),
        # The second <s> and </s> stand in the text, and the first does not.
        ("<s>a</s>b", [0, 0, 3, 4, 8]),
    ],
)
def test_tokens_begin_where_their_text_stands_in_the_given_text(folder, text, offsets):
    assert load_tokenizer(folder).text_offsets(text) == offsets


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_token_begins_with_its_space_and_an_added_one_where_the_text_goes_on(folder, adds_bos):
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    single = "<s> $A </s>" if adds_bos else "$A </s>"
    ids = [("<s>", 1), ("</s>", 2)]
    template = processors.TemplateProcessing(single=single, special_tokens=ids)
    # It leaves spaces out of the tokens' spans.
    fast.post_processor = processors.Sequence([processors.ByteLevel(), template])
    tokenizer = Tokenizer(fast, special_tokens={"bos_token": "<s>"})
    token_ids, offsets = tokenizer.encode("a  b"), tokenizer.text_offsets("a  b")
    assert offsets == [0] * adds_bos + [0, 1, 2, 3, 4]
    assert len(token_ids) == len(offsets)


def test_a_decoder_that_looks_at_neighbours_has_no_pieces():
    fast = FastTokenizer(BPE(vocab={"the": 0}, merges=[]))
    for decoder in (None, decoders.WordPiece(), decoders.BPEDecoder(), decoders.CTC()):
        if decoder is not None:
            fast.decoder = decoder
        tokenizer = Tokenizer(fast, special_tokens={})
        assert tokenizer.piece(0) is None
        with pytest.raises(ValueError, match="its decoder is"):
            tokenizer.tokens_in_bytes()


def test_special_tokens_are_known(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.all_special_ids == {0, 1, 2}
    assert tokenizer.longest_token == len("<pad>")
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("a</s>")[-1] == 2


def test_ids_and_rendered_chats_equal_those_of_transformers(folder):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("", "plain", "<s> ünï </s> x", "  spaces  "):
        assert ours.encode(text) == theirs(text)["input_ids"]
    for add_generation_prompt in (True, False):
        expected = theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt, mood="calm"
        )
        assert expected == ours.apply_chat_template(
            MESSAGES, add_generation_prompt=add_generation_prompt, mood="calm"
        )


def test_the_file_chat_template_jinja_comes_first(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert load_tokenizer(folder).apply_chat_template(MESSAGES) == "Hi <b> ünï!"


def test_a_template_can_be_replaced(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.apply_chat_template(MESSAGES, template="{{ eos_token }}") == "</s>"


def test_what_the_template_refuses_is_the_requests_fault(folder):
    with pytest.raises(RequestError, match="no tools here") as caught:
        load_tokenizer(folder).apply_chat_template([{"role": "tool", "content": ""}])
    assert caught.value.param == "messages"


def test_templates_cannot_reach_into_python(folder):
    escape = "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"
    with pytest.raises(RequestError):
        load_tokenizer(folder).apply_chat_template(MESSAGES, template=escape)


def test_without_a_template_the_message_names_the_flag(tmp_path):
    write_tiny_tokenizer(tmp_path)
    with pytest.raises(RequestError, match="--chat-template"):
        load_tokenizer(tmp_path).apply_chat_template(MESSAGES)


def test_a_stored_truncation_does_not_cut_prompts(folder):
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert len(load_tokenizer(folder).encode("x" * 50)) == 51


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(FatalError, match=r"tokenizer\.json does not exist") as missing:
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FatalError, match=r"tokenizer\.json is not a tokenizer") as broken:
        load_tokenizer(tmp_path)
    assert (missing.value.reason, broken.value.reason) == ("ModelNotFound", "InvalidModelConfig")


def test_a_broken_template_of_the_model_is_found_at_the_start(folder):
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(FatalError, match="not valid Jinja"):
        load_tokenizer(folder)


def test_importing_it_imports_neither_torch_nor_transformers():
    code = (
        "import sys, pagoda_runtime.tokenizer.tokenizer, pagoda_runtime.models.source;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class WordPieces:
    """Each text is one token; a space before it makes another, or is a token of its own."""

    def __init__(self, has_space_token):
        self.has_space_token = has_space_token

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        number = sum(map(ord, text.strip()))
        if not text.startswith(" "):
            return [number]
        return [1, number] if self.has_space_token else [number + 1]


@pytest.mark.parametrize(
    ("has_space_token", "expected"), [(False, ((97,), (98,))), (True, ((97,),))]
)
def test_a_bad_word_is_forbidden_with_and_without_a_space_before_it(has_space_token, expected):
    assert tokenize_bad_words(WordPieces(has_space_token), ["a", " a", "a"]) == expected


def test_a_bad_word_of_white_space_alone_is_refused():
    with pytest.raises(RequestError, match="bad_words has ' '"):
        tokenize_bad_words(WordPieces(False), ["a", " "])


@pytest.mark.parametrize("types", ["0", "1"])
@pytest.mark.parametrize("max_tokens", [None, 8, 9, 12, 2])
@pytest.mark.parametrize("texts", [("abc",), ("a longer text",), ("ab", "cdefgh"), ("abcdef", "g")])
def test_texts_and_pairs_are_encoded_and_cut_as_transformers_does(
    texts, max_tokens, types, tmp_path
):
    from transformers import AutoTokenizer

    write_tiny_tokenizer(tmp_path, for_pairs=types)
    if max_tokens == 2 and len(texts) == 2:
        max_tokens = 3
    expected = AutoTokenizer.from_pretrained(tmp_path)(
        *texts, truncation=max_tokens is not None, max_length=max_tokens
    )
    ids, second = load_tokenizer(tmp_path).encode_texts(*texts, max_tokens=max_tokens)
    assert ids == expected["input_ids"]
    of_types = expected.get("token_type_ids", [])
    assert second == (of_types.index(1) if 1 in of_types else 0)
