"""What a server allows, offers and says."""

from __future__ import annotations

import dataclasses

from phi4mm_jax.config.building import Settings, wrong
from phi4mm_jax.processing.media import MediaLimits


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings(Settings):
    """Settings of one server; a wrong one is a ConfigError that names it."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every one of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    model_names: tuple[str, ...] = ()
    """Names that requests may call the model; the first is the one that answers show. None for the model's own."""
    any_model_name: bool = False
    """Whether requests may call the model anything."""
    api_key: str = dataclasses.field(default="", repr=False)
    """What `Authorization: Bearer` must hold; "" asks for nothing."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser; "*" for all."""
    rows: int = 0
    """Requests that are answered together; 0 for `engine.max_batch`."""
    context: int = 0
    """Most tokens of a prompt and its answer; 0 for as many as memory holds for all rows, up to the model's own."""
    max_waiting: int = 256
    """Requests that may wait for a row, those being prepared included; one more is refused."""
    request_timeout_s: float = 600.0
    """Seconds after which a request is given up."""
    drain_timeout_s: float = 30.0
    """Seconds that running requests are given to finish when the server is asked to stop."""
    max_body_bytes: int = 100_000_000
    """Largest request, media in it included."""
    max_held_bytes: int = 1_000_000_000
    """Largest requests together, from their arrival until they are answered; one that would exceed it is refused."""
    media: MediaLimits = MediaLimits(
        max_bytes=50_000_000,
        timeout_s=20.0,
        max_pixels=40_000_000,
        max_audio_seconds=3600.0,
        max_media=128,
        total_s=60.0,
        local_files=False,
        private_hosts=False,
    )
    """What pictures and recordings may cost, and where they may come from. Those of a conversation have to fit the
    context, too; to be transcribed, a recording may be as long as said here."""
    segment_s: float = 30.0
    """Seconds of speech that are transcribed at once; longer recordings are cut at silences."""
    preparing_threads: int = 4
    """Threads that decode media and make prompts."""
    warm_up: bool = True
    """Whether programs are compiled before the server says that it is ready."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive(
            "max_waiting", "request_timeout_s", "max_body_bytes", "max_held_bytes", "preparing_threads"
        )
        for name in ("rows", "context", "drain_timeout_s"):
            if getattr(self, name) < 0:
                raise wrong(name, getattr(self, name), "must not be negative")
        if not 0 <= self.port < 2**16:
            raise wrong("port", self.port, "expected 0 to 65535")
        if self.segment_s < 1:
            raise wrong("segment_s", self.segment_s, "must be at least 1")
        for name in ("model_names", "cors_origins"):
            if not all(getattr(self, name)):
                raise wrong(name, list(getattr(self, name)), "expected no empty names")
        if not self.api_key.isascii():
            raise wrong("api_key", "...", "expected ASCII, which is what a header can hold")
