"""The `phi4mm` command. It parses, calls the library and prints; JAX is imported only by the commands that need it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4mm_jax.config import ConfigError, ModelConfig, models, parse_settings
from phi4mm_jax.terminal import TerminalChat, attach, conversation, is_input_error, user_message, users_names

if TYPE_CHECKING:
    from phi4mm_jax.api import Phi4MM

DEFAULT_MODEL = "microsoft/Phi-4-multimodal-instruct"
_MODEL_HELP = "hub id, directory, or nano, which comes with the package (%(default)s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; those of the process if None.

    Returns:
      The exit code: 0, 2 for bad input (argparse exits with it too), 130 after Ctrl-C, 141 when the reader went away.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if "logprobs" in args and not args.json:
        parser.error("--logprobs needs --json: a stream has no place for them")
    logging.basicConfig(format="%(name)s: %(message)s")
    if args.verbose:
        logging.getLogger(__package__).setLevel(logging.INFO)
    if argv is None and args.command is not _info:
        _restart_with_large_pages()
    try:
        args.command(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush fails again
        return 141
    except ValueError as error:
        if not is_input_error(error):
            raise
        print(f"phi4mm: {error}", file=sys.stderr)
        return 2
    return 0


def _restart_with_large_pages() -> None:
    """Restarts the process with a malloc that asks for large pages.

    XLA:CPU allocates big temporaries again and again, and their page faults cost more than some of its products. glibc
    reads the setting only when a process starts. A GLIBC_TUNABLES of the user's own is left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# --- arguments -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phi4mm", description="Phi-4-multimodal-instruct in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="answer one prompt, streaming to the terminal")
    generate.add_argument("prompt", metavar="PROMPT", help="the user's message; - reads it from standard input")
    generate.add_argument("--image", action="append", default=[], metavar="X", help="picture: path, URL or data: URL")
    generate.add_argument("--audio", action="append", default=[], metavar="X", help="sound clip: the same")
    generate.add_argument(
        "--video", action="append", default=[], metavar="X", help="video, seen as a few of its frames"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object when done, instead of streaming")
    generate.add_argument(
        "--logprobs", type=int, default=argparse.SUPPRESS, metavar="N", help="with --json: the N likeliest per token"
    )
    generate.set_defaults(command=_generate)

    chat = commands.add_parser("chat", help="talk with the model, with /image, /audio and /video")
    chat.set_defaults(command=_chat)

    quantize = commands.add_parser("quantize", help="save a model in few bits, to be loaded in seconds")
    quantize.add_argument("model", metavar="SRC", help=_MODEL_HELP.partition(" (")[0])
    quantize.add_argument("out", type=Path, metavar="DST", help="directory to write, which must not exist")
    quantize.add_argument(
        "--storage", default="orbax", choices=("orbax", "safetensors"), help="how arrays are written (%(default)s)"
    )
    quantize.add_argument("--calibration", metavar="FILE", help="JSONL of conversations from which to round better")
    quantize.set_defaults(command=_quantize)

    serve = commands.add_parser("serve", help="answer over HTTP, as OpenAI's API does")
    _add_serving(serve)
    serve.set_defaults(command=_serve)

    evaluate = commands.add_parser("eval", help="measure a model on datasets; goes on where an earlier run ended")
    _add_evaluation(evaluate)
    evaluate.set_defaults(command=_evaluate)

    merge = commands.add_parser("eval-merge", help="score what shards of `eval` have answered, together")
    merge.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="what --out of each shard was")
    merge.set_defaults(command=_merge)
    for command in (evaluate, merge):
        command.add_argument(
            "--out", type=Path, default=Path("evaluation"), metavar="DIR", help="to write (%(default)s)"
        )
        command.add_argument(
            "--data",
            metavar="X",
            help="where the rows are: a directory or file, or owner/name[:config[:split]] on the hub",
        )

    demo = commands.add_parser("demo", help="let the small bundled model hear, read and answer; downloads nothing")
    demo.set_defaults(command=_demo, revision=None)

    info = commands.add_parser("info", help="show architecture, parameters and memory plan; reads no weights")
    info.add_argument("model", metavar="M", help="directory, hub id, description (.toml); phi4mm and nano are shipped")
    info.set_defaults(command=_info)

    for command in (generate, chat, serve, evaluate):
        command.add_argument("--model", default=DEFAULT_MODEL, metavar="M", help=_MODEL_HELP)
    for command in (generate, chat):
        command.add_argument("--system", metavar="S", help="system message")
        _add_sampling(command)
    for command in (generate, chat, serve, evaluate, quantize, demo):
        command.add_argument("--dtype", metavar="D", help="of the weights: bfloat16, float16 or float32")
        command.add_argument("--quantize", metavar="Q", help="weights in few bits: int8, w8a8, fp8 or int4")
        command.add_argument("--quiet", action="store_true", help="show no progress of loading on standard error")
    quantize.set_defaults(quantize="int8")
    for command in (generate, chat, serve, evaluate, quantize, info):
        command.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    for command in (generate, chat, serve, evaluate, quantize, demo, info):
        command.add_argument("--config", default="auto", metavar="P", help="preset name or TOML file (%(default)s)")
        command.add_argument(
            "--set", action="append", default=[], metavar="K=V", help="change a setting, such as engine.max_batch=8"
        )
    for command in (generate, chat, serve, evaluate, merge, quantize, demo, info):
        command.add_argument("--verbose", action="store_true", help="log what is chosen, loaded and compiled")
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `SamplingParams`; one that is not given leaves its default to the library."""
    group = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    group.add_argument("--temperature", type=float, metavar="F", help="0 takes the likeliest token (the default)")
    group.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="F", help="sample among the likeliest that sum to F")
    group.add_argument("--min-p", type=float, metavar="F", help="drop tokens below F times the likeliest")
    group.add_argument("--presence-penalty", type=float, metavar="F", help="lower every token already written")
    group.add_argument("--frequency-penalty", type=float, metavar="F", help="the same, for each time it was written")
    group.add_argument("--repetition-penalty", type=float, metavar="F", help="divide the logits of seen tokens by F")
    group.add_argument(
        "--logit-bias", type=_token_bias, action="append", metavar="ID=V", help="add V to the logit of a token id"
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible")
    group.add_argument("--stop", action="append", metavar="S", help="end before this text; may be repeated")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of the answer")
    group.add_argument("--min-tokens", type=int, metavar="N", help="fewest tokens of the answer")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-answer token")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ServerSettings`, likewise."""
    group = parser.add_argument_group("server", argument_default=argparse.SUPPRESS)
    group.add_argument("--host", metavar="H", help="address to listen on (127.0.0.1); 0.0.0.0 for all")
    group.add_argument("--port", type=int, metavar="N", help="port (8000); 0 takes a free one")
    group.add_argument("--rows", type=int, metavar="N", help="requests that are answered together (engine.max_batch)")
    group.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer (what memory holds)")
    group.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait for a row (256)")
    group.add_argument("--request-timeout", type=float, metavar="S", dest="request_timeout_s", help="seconds (600)")
    group.add_argument("--drain-timeout", type=float, metavar="S", dest="drain_timeout_s", help="at the end (30)")
    group.add_argument("--max-body-bytes", type=int, metavar="N", help="largest request, media included (100 MB)")
    group.add_argument("--max-held-bytes", type=int, metavar="N", help="largest requests together (1 GB)")
    group.add_argument("--model-name", action="append", metavar="X", dest="model_names", help="what requests call it")
    group.add_argument("--any-model-name", action="store_true", help="let requests call the model anything")
    group.add_argument("--api-key", metavar="K", help="ask for it in every request; default: $PHI4MM_API_KEY")
    group.add_argument(
        "--cors-origin",
        action="append",
        metavar="O",
        dest="cors_origins",
        help="let pages of this origin call; * for all",
    )
    group.add_argument(
        "--media-directory", type=Path, metavar="DIR", dest="directory", help="let requests name files under it"
    )
    group.add_argument(
        "--private-hosts", action="store_true", help="let requests name URLs of this machine and its networks"
    )
    group.add_argument("--no-warm-up", action="store_false", dest="warm_up", help="compile when requests come")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="name, or a JSONL, CSV or folder of your own")
    parser.add_argument("--list", action="store_true", help="show all tasks with their datasets and published scores")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each dataset")
    parser.add_argument(
        "--batch", type=_batch, default="auto", metavar="N", help="rows answered together; auto: what memory holds"
    )
    parser.add_argument("--shard", metavar="I/N", help="only the I-th of N equal parts; see eval-merge")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode media (one per processor)")
    group = parser.add_argument_group("of your own rows")
    group.add_argument("--metric", metavar="NAME", help="such as exact, wer, anls; wer for recordings with texts")
    group.add_argument("--prompt", metavar="TEXT", help="asked of each row, with its columns in braces")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer (128)")


def _batch(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected auto or a number") from None


def _token_bias(text: str) -> tuple[int, float]:
    token, equals, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ID=V, such as 200020=-1.5") from None


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the sampling keywords that were given, checked before anything slow begins."""
    from phi4mm_jax import SamplingParams

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(SamplingParams) if f.name in args}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    SamplingParams(**given)
    return given


def _load(args: argparse.Namespace) -> Phi4MM:
    from phi4mm_jax import Phi4MM

    return Phi4MM.from_pretrained(args.model, **_loading(args))


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    given = {name: getattr(args, name) for name in ("revision", "config", "dtype", "quantize")}
    return {**given, "progress": not args.quiet, **parse_settings(args.set)}


# --- commands ------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    sampling = _sampling(args)
    attachments = [attach(f"--{kind}", x) for kind in ("image", "video", "audio") for x in getattr(args, kind)]
    messages = conversation(args.system, user_message(_prompt(args, bool(attachments)), attachments))
    model = _load(args)
    with users_names(len(messages) - 1, "PROMPT", attachments):
        if args.json:
            output = dataclasses.asdict(model.generate(messages, **sampling))
            print(json.dumps(output, ensure_ascii=False), flush=True)
            return
        for piece in model.stream(messages, **sampling):
            print(piece.text, end="", flush=True)
    print()


def _prompt(args: argparse.Namespace, may_be_empty: bool) -> str:
    """Returns the text of PROMPT or of standard input."""
    from phi4mm_jax.processing.prompt import ChatError

    try:
        prompt = sys.stdin.read().strip() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError:
        raise ChatError("PROMPT: standard input is not UTF-8 text") from None
    if not prompt.strip() and not may_be_empty:
        raise ChatError("PROMPT: is empty; without --image, --audio or --video there is nothing to answer")
    return prompt


def _chat(args: argparse.Namespace) -> None:
    sampling = _sampling(args)
    TerminalChat(_load(args), args.system, sampling).run()


def _serve(args: argparse.Namespace) -> None:
    from phi4mm_jax.processing.media import MediaLimits
    from phi4mm_jax.serving.settings import ServerSettings

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(ServerSettings) if f.name in args}
    allowed = {f.name: getattr(args, f.name) for f in dataclasses.fields(MediaLimits) if f.name in args}
    media = dataclasses.replace(ServerSettings().media, **allowed, local_files="directory" in args)
    settings = ServerSettings(**{"api_key": os.environ.get("PHI4MM_API_KEY", ""), **given}, media=media)
    with _extra("serve"):
        from phi4mm_jax.serving.process import bind, serve
    with bind(settings) as listener:
        serve(_load(args), settings, listener, args.verbose)


def _evaluate(args: argparse.Namespace) -> None:
    with _extra("eval"):
        from phi4mm_jax.evaluation.run import evaluate
        from phi4mm_jax.evaluation.tables import markdown
        from phi4mm_jax.evaluation.tasks.catalogue import find
        from phi4mm_jax.evaluation.tasks.listing import listing
    if args.list:
        print(listing())
        return
    if not args.tasks:
        raise ConfigError("TASK: name at least one; --list shows them all")
    own = {"metric": args.metric, "prompt": args.prompt, "max_tokens": args.max_tokens}
    results = evaluate(
        [find(name, **own) for name in args.tasks],
        args.model,
        limit=args.limit,
        data=args.data,
        out=args.out,
        batch=args.batch,
        shard=args.shard,
        workers=args.workers,
        **_loading(args),
    )
    print(markdown(results), end="")


def _merge(args: argparse.Namespace) -> None:
    with _extra("eval"):
        from phi4mm_jax.evaluation.gathering import merge
        from phi4mm_jax.evaluation.tables import markdown
    print(markdown(merge(args.directories, args.out, args.data)), end="")


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Within it, a package that is missing is an error of the user's that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; pip install 'phi4mm-jax[{name}]'") from None


def _quantize(args: argparse.Namespace) -> None:
    from phi4mm_jax.processing.conversations import read_conversations
    from phi4mm_jax.weights.saved import check_new

    check_new(args.out)
    if args.calibration is None:
        model = _load(args)
    else:
        conversations, form, args.quantize = read_conversations(args.calibration), args.quantize, None
        model = _load(args)
        model.quantize(conversations, form)
    model.save_pretrained(args.out, storage=args.storage)


def _demo(args: argparse.Namespace) -> None:
    from phi4mm_jax.demo import DemoError, run_demo
    from phi4mm_jax.weights.hub import BUNDLED

    args.model = BUNDLED["nano"]
    args.set = ["engine.prefix_cache=false", "engine.media_cache_mib=0", *args.set]  # or asking twice would be cheap
    if not run_demo(_load(args), lambda line: print(line, flush=True)):
        raise DemoError("some answers are not as expected: this machine or its set-up computes something else")


def _info(args: argparse.Namespace) -> None:
    from phi4mm_jax.api import runtime_config
    from phi4mm_jax.info import describe
    from phi4mm_jax.weights.hub import resolve

    runtime = runtime_config(args.config, None, **parse_settings(args.set))
    described = args.model in models() or args.model.endswith(".toml")
    source = args.model if described else resolve(args.model, revision=args.revision, weights=False)
    print(describe(ModelConfig.load(source), runtime))


if __name__ == "__main__":
    sys.exit(main())
