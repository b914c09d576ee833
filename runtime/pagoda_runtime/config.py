"""What a user can set, as frozen values. `cli` maps flags to these one to one.

A field `max_model_len` is the flag `--max-model-len` and the keyword `LLM(max_model_len=...)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")
KV_CACHE_DTYPES: Mapping[str, str] = {
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8",
}
"""Of --kv-cache-dtype beside auto, each with torch's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the engine process needs.

    None means: the platform's default, else derived from the model and the machine.
    """

    model: str
    """A folder in Hugging Face layout, a GGUF file (converted once), `hf://org/name`, or `org/name`
    if nothing local has that name."""
    revision: str | None = None
    dtype: str = "auto"
    """auto, bfloat16, float16, float32; auto is the checkpoint's dtype."""
    device: str = "auto"
    """auto, cpu, cuda; auto is cuda where it is available."""
    quantization: str | None = None
    generation_config: str = "auto"
    """Whether the model's own sampling defaults are used: auto, or none."""
    kv_cache_dtype: str = "auto"
    """auto, or one of KV_CACHE_DTYPES; auto is the model's dtype."""
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    """Tokens of a step, over all requests."""
    long_prefill_token_threshold: int | None = None
    """Prompt tokens of a step in which other requests decode."""
    async_scheduling: bool | None = None
    """Whether the next step is planned while one runs."""
    enforce_eager: bool = False
    """Whether no step is recorded as a graph, and each kernel is launched by itself."""
    block_size: int | None = None
    """Tokens per KV block."""
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    """Bytes of KV cache; on a CPU by default a quarter of the free memory (cgroup included)."""
    num_threads: int | None = None
    """Threads of the engine's tensor operations; by default the cores that the cgroup allows."""
    max_num_waiting: int = 1024
    """Bound of the waiting queue; a request beyond it is refused with 429."""
    seed: int = 0
    deterministic: bool = False
    """Whether a request's tokens are the same, bit by bit, whatever else the engine does."""
    stall_seconds: float = 120.0
    collective_timeout_seconds: float = 60.0
    """How long ranks wait for one that does not finish a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything the API process needs beside the engine."""

    engine: EngineConfig
    host: str = "0.0.0.0"
    port: int = 8000
    uds: str | None = None
    """Path of a Unix socket to listen on in place of host and port."""
    root_path: str = ""
    """The path under which a proxy shows this server, as /llm; without a slash at its end."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    """None: the key is in ssl_certfile."""
    ssl_ca_certs: str | None = None
    """Whose certificates clients may show."""
    ssl_cert_reqs: int = 0
    """Whether clients have to show one, as Python's ssl.CERT_* count: 0 no, 1 they may, 2 yes."""
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    """None: there is no admin port."""
    served_model_name: tuple[str, ...] = ()
    """Names a request may use; the first one is shown in responses. Default: the model as given."""
    api_key: tuple[str, ...] = field(default=(), repr=False)
    """Of the flag and of PAGODA_API_KEY."""
    api_key_file: str | None = None
    """A file with one key a line, or a folder of such files; read again when it changes."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own."""
    trust_request_chat_template: bool = False
    """Whether requests may bring templates of their own."""
    tool_call_parser: str = "auto"
    """How the model calls tools: auto (by the chat template), none, or a row of parsing.formats."""
    reasoning_parser: str = "auto"
    """How the model thinks, likewise."""
    max_body_bytes: int | None = None
    """Of one request; None: what the context needs."""
    drain_delay_seconds: float = 5.0
    drain_seconds: float = 30.0
    log_level: str = "info"
    """debug, info, warning, error; of both processes."""
    disable_access_log: bool = False
    allowed_origins: tuple[str, ...] = ()
    """Origins of pages that browsers may let call this server; `*` is all of them."""
    allow_credentials: bool = False
    """Whether such a page may send cookies and certificates."""
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    playground: bool = True
    """Whether / is a page to chat on."""
    otlp_traces_endpoint: str | None = None
    """URL of an OpenTelemetry collector, as http://localhost:4318/v1/traces."""
