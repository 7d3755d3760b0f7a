"""Talking to the model in a terminal: messages from what was typed, answers as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi4mm_jax.api import Phi4MM

Message = dict[str, Any]
Part = dict[str, Any]

HELP = """\
/image PATH    attach a picture (path or URL) to the next message; may be repeated
/audio PATH    attach a sound clip to the next message; may be repeated
/video PATH    attach a video to the next message, seen as a few of its frames; may be repeated
/system TEXT   set the system message; without TEXT, remove it
/clear         forget the conversation and the attachments
/help          show this
/quit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


def is_input_error(error: ValueError) -> bool:
    """Whether an error is one of this package's own, whose message tells the user what to change."""
    return type(error).__module__.partition(".")[0] == __package__


@dataclasses.dataclass(frozen=True)
class Attachment:
    """A picture, sound clip or video of a message."""

    name: str
    """What the user calls it, such as `--image photo.jpg`."""
    part: Part
    """The part of the message."""


def attach(flag: str, source: str) -> Attachment:
    """Opens what a flag or command (`--image`, `/audio`, ...) names, decoded once and for all.

    Raises:
      MediaError: it cannot be read, or is no picture, sound or video.
    """
    from phi4mm_jax.processing.audio import load_audio
    from phi4mm_jax.processing.images import load_image
    from phi4mm_jax.processing.media import MediaLimits, describe
    from phi4mm_jax.processing.prompt import MediaError
    from phi4mm_jax.processing.video import load_video

    kind = flag.strip("-/")
    try:
        medium = {"image": load_image, "audio": load_audio, "video": load_video}[kind](source, MediaLimits())
    except MediaError as error:
        raise MediaError(f"{flag} {error}") from error
    return Attachment(f"{flag} {describe(source)}", {"type": kind, kind: medium})


def user_message(text: str, attachments: Sequence[Attachment] = ()) -> Message:
    """Returns a message with the media first; the text may place them elsewhere by tags such as <|image_1|>."""
    return {"role": "user", "content": [*(a.part for a in attachments), {"type": "text", "text": text}]}


@contextlib.contextmanager
def users_names(index: int, text_name: str, attachments: Sequence[Attachment]) -> Iterator[None]:
    """Makes this package's errors call the parts of a `user_message` what the user calls them.

    Args:
      index: of the message in its conversation.
      text_name: what the user calls the text.
      attachments: those of the message.
    """
    where = f"messages[{index}]"
    names = {f"{where}.content[{i}].{a.part['type']}": a.name for i, a in enumerate(attachments)}
    names |= {f"{where}.content[{len(attachments)}].text": text_name, where: text_name}  # the longer ones first
    try:
        yield
    except ValueError as error:
        if is_input_error(error):
            text = str(error)
            for path, name in names.items():
                text = text.replace(path, name)
            error.args = (text,)
        raise


def conversation(system: str | None, *messages: Message) -> list[Message]:
    """Returns the messages, after the system message if there is one."""
    return [{"role": "system", "content": system}, *messages] if system else list(messages)


class TerminalChat:
    """A conversation typed line by line; lines that begin with a slash are commands.

    Args:
      model: answers, through its `stream`.
      system: the system message, if any.
      sampling: keyword arguments of every `stream` call.
    """

    def __init__(self, model: Phi4MM, system: str | None = None, sampling: Mapping[str, Any] | None = None):
        self._model = model
        self._system = system
        self._sampling = dict(sampling or {})
        self._messages: list[Message] = []
        self._attachments: list[Attachment] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": lambda source: self._attach("/image", source),
            "/audio": lambda source: self._attach("/audio", source),
            "/video": lambda source: self._attach("/video", source),
            "/system": self._set_system,
            "/clear": lambda _: self._clear(),
            "/help": lambda _: print(HELP),
        }

    def run(self) -> None:
        """Reads and answers until /quit or the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` line editing and history)
        print("Type a message. /help lists the commands.")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D leaves.")
                continue
            if line and not self.handle(line):
                return

    def handle(self, line: str) -> bool:
        """Obeys a command or answers a message; an input error is shown and the conversation stays as it was.

        Args:
          line: what was typed, not blank.

        Returns:
          False if it was /quit.
        """
        word, rest = [*line.split(maxsplit=1), ""][:2]
        command = word.lower()
        if command == "/quit":
            return False
        try:
            if command in self._commands:
                self._commands[command](rest.strip())
            elif re.fullmatch("/[a-z]+", command):
                print(f"unknown command {word}; /help lists the commands")
            else:
                self._answer(line)
        except ValueError as error:
            if not is_input_error(error):
                raise
            print(f"error: {error}", file=sys.stderr)
        return True

    def _attach(self, command: str, source: str) -> None:
        if source := source.strip("'\""):
            self._attachments.append(attach(command, source))
            print("Attached to the next message.")
        else:
            print(f"usage: {command} PATH")

    def _set_system(self, text: str) -> None:
        self._system = text or None

    def _clear(self) -> None:
        self._messages, self._attachments = [], []

    def _answer(self, text: str) -> None:
        # dropped even on an error: a picture that does not fit must not fail every later message
        attachments, self._attachments = self._attachments, []
        messages, answer = [*self._messages, user_message(text, attachments)], ""
        with (
            users_names(len(conversation(self._system, *messages)) - 1, "your message", attachments),
            _interrupt_flag() as interrupted,
            contextlib.closing(self._model.stream(conversation(self._system, *messages), **self._sampling)) as pieces,
        ):
            for piece in pieces:
                print(piece.text, end="", flush=True)
                answer += piece.text
                if interrupted.is_set():
                    print(" [stopped]", end="")
                    break
        print()
        self._messages = [*messages, {"role": "assistant", "content": answer}]


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Makes Ctrl-C set a flag, so that the step under way ends cleanly; a second Ctrl-C interrupts for good."""
    flag = threading.Event()

    def on_interrupt(_signum: int, _frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
