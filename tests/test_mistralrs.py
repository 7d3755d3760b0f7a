"""mistral.rs' Python API: scripts written for it, its names and numbers, and what it says about what is not here."""

import base64
import dataclasses
import inspect
import itertools
import json
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from phi4mm_jax import demo, mistralrs
from phi4mm_jax.config import ConfigError
from phi4mm_jax.mistralrs import (
    Architecture,
    ChatCompletionRequest,
    CompletionRequest,
    ModelDType,
    MultimodalArchitecture,
    Runner,
    ToolChoice,
    VisionArchitecture,
    Which,
)
from phi4mm_jax.mistralrs.asking import conversation, how_to_draw
from phi4mm_jax.processing.prompt import ChatError, MediaError
from phi4mm_jax.runtime.limits import RequestError
from phi4mm_jax.runtime.sampling import SamplingError

DEMO = Path(demo.__file__).parent / "assets" / "demo"
QUESTION = "What is 21 plus 84?"
NANO = Which.MultimodalPlain(model_id="nano", arch=MultimodalArchitecture.Phi4MM, dtype=ModelDType.F32)

# The stub of mistralrs 0.9.5: what stands here is what is called and how, with the defaults. The usage has
# prompt_tokens_details as it really has it, which the stub leaves out.
STUB = """
ChatCompletionRequest: messages model logprobs=False n_choices=1 logit_bias=None top_logprobs=None max_tokens=None
    presence_penalty=None frequency_penalty=None repetition_penalty=None stop_seqs=None temperature=None top_p=None
    top_k=None stream=False grammar=None grammar_type=None min_p=None tool_schemas=None tool_choice=None
    dry_multiplier=None dry_base=None dry_allowed_length=None dry_sequence_breakers=None web_search_options=None
    enable_thinking=None truncate_sequence=False reasoning_effort=None max_tool_rounds=None tool_dispatch_url=None
    enable_code_execution=False enable_shell=False shell_skills=None agent_permission=None
    agent_approval_callback=None code_execution_permission=None session_id=None files=None input_files=None
    ignore_eos=False * adapter=None
CompletionRequest: prompt model best_of=1 echo_prompt=False presence_penalty=None frequency_penalty=None
    repetition_penalty=None logit_bias=None max_tokens=None n_choices=1 stop_seqs=None temperature=None top_p=None
    suffix=None top_k=None grammar=None grammar_type=None min_p=None tool_schemas=None tool_choice=None
    dry_multiplier=None dry_base=None dry_allowed_length=None dry_sequence_breakers=None truncate_sequence=False
    ignore_eos=False * adapter=None
Which.Plain: model_id arch=None tokenizer_json=None topology=None organization=None write_uqff=None from_uqff=None
    dtype=ModelDType.Auto imatrix=None calibration_file=None hf_cache_path=None matformer_config_path=None
    matformer_slice_name=None
Which.MultimodalPlain: model_id arch=None tokenizer_json=None topology=None write_uqff=None from_uqff=None
    dtype=ModelDType.Auto max_edge=None calibration_file=None imatrix=None hf_cache_path=None
    matformer_config_path=None matformer_slice_name=None organization=None encoder_cache_memory_bytes=None
Runner: which max_seqs=32 no_kv_cache=False prefix_cache_n=16 token_source='cache' mtp_model=None mtp_n_predict=None
    chat_template=None jinja_explicit=None num_device_layers=None in_situ_quant=None anymoe_config=None
    memory_goal=None pa_blk_size=None pa_cache_type=None no_paged_attn=False paged_attn=False seed=None
    enable_search=False search_embedding_model=None search_callback=None tool_callbacks=None mcp_client_config=None
    code_execution_config=None shell_config=None
Runner.send_chat_completion_request: self request model_id=None
Runner.send_completion_request: self request model_id=None
Runner.send_embedding_request: self request model_id=None
Runner.generate_image: self prompt response_format height=720 width=1280 model_id=None save_file=None
Runner.generate_audio: self prompt model_id=None
Runner.send_re_isq: self dtype model_id=None
Runner.begin_calibration: self model_id=None
Runner.calibration_status: self model_id=None
Runner.apply_calibration: self save_cimatrix=None model_id=None
Runner.tokenize_text: self text add_special_tokens enable_thinking model_id=None
Runner.detokenize_text: self tokens skip_special_tokens model_id=None
Runner.max_sequence_length: self model_id=None
Runner.list_models: self
Runner.get_default_model_id: self
Runner.set_default_model_id: self model_id
Runner.is_model_loaded: self model_id
Runner.unload_model: self model_id
Runner.reload_model: self model_id
Runner.load_lora_adapter: self alias adapter_dir model_id=None load_inplace=False expected_generation=None
Runner.unload_lora_adapter: self alias model_id=None expected_generation=None
Runner.list_lora_adapters: self model_id=None
Runner.lora_adapter_status: self model_id=None
Runner.list_models_with_status: self
Runner.list_unloaded_models: self
Runner.get_model_status: self model_id
Runner.remove_model: self model_id
Runner.send_chat_completion_request_to_model: self request model_id
Runner.send_completion_request_to_model: self request model_id
Runner.export_session: self session_id model_id=None
Runner.import_session: self session_id session_json model_id=None
Runner.delete_session: self session_id model_id=None
Runner.list_session_ids: self model_id=None
Runner.find_file: self file_id
Usage: completion_tokens prompt_tokens total_tokens prompt_tokens_details avg_tok_per_sec avg_prompt_tok_per_sec
    avg_compl_tok_per_sec total_time_sec total_prompt_time_sec total_completion_time_sec
CalledFunction: name arguments
ToolCallResponse: index id tp function
ResponseMessage: content role tool_calls reasoning_content=None
TopLogprob: token logprob bytes
ResponseLogprob: token logprob bytes top_logprobs
Logprobs: content
Choice: finish_reason index message logprobs=None
ChatCompletionResponse: id choices created model system_fingerprint object usage adapter_generation=None
    agentic_tool_calls=None files=None session_id=None
Delta: content role tool_calls=None reasoning_content=None
ChunkChoice: finish_reason index delta logprobs
ChatCompletionChunkResponse: id choices created model system_fingerprint object usage=None adapter_generation=None
    session_id=None
CompletionChoice: finish_reason index text logprobs=None
CompletionResponse: id choices created model system_fingerprint object usage adapter_generation=None
"""
OTHER_NAMES = """
AgentPermission AgentToolApproval AgentToolApprovalDecision AgentToolApprovalDecisionKind AgentToolKind
AgentToolMetadata AgentToolSource AgenticToolCallRecord AnyMoeConfig AnyMoeExpertType ApproximateUserLocation
Architecture CalibrationStatus CodeExecutionConfig CodeExecutionPermission DiffusionArchitecture
EmbeddingArchitecture EmbeddingRequest File FileSource ImageChoice ImageGenerationResponse
ImageGenerationResponseFormat InputFile IsqOrganization LoraAdapter LoraAdapterError LoraAdapterGeneration
LoraAdapterInfo LoraResidentGenerationInfo LoraRuntimeStatus McpClientConfigPy McpServerConfigPy McpServerSourcePy
ModelDType MultimodalArchitecture NetworkMode PagedCacheType RequestedFile SandboxPolicy SearchContextSize ShellConfig
ShellSkillMount SpeechGenerationResponse SpeechLoaderType ToolCallType ToolChoice WebSearchOptions
WebSearchUserLocation
"""
ABSENT_WHICH = "Embedding XLora Lora GGUF XLoraGGUF LoraGGUF GGML XLoraGGML LoraGGML DiffusionPlain Speech".split()


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(which=NANO)


def ask(runner, content=QUESTION, **settings):
    """One answer to a user's message."""
    settings = {"temperature": 0.0, "max_tokens": 24, "model": "default"} | settings
    request = ChatCompletionRequest(messages=[{"role": "user", "content": content}], **settings)
    return runner.send_chat_completion_request(request)


def said(response):
    return response.choices[0].message.content


def image(url):
    return {"type": "image_url", "image_url": {"url": str(url)}}


def audio(url):
    return {"type": "audio_url", "audio_url": {"url": str(url)}}


def text(text):
    return {"type": "text", "text": text}


# --- names and signatures ------------------------------------------------------------------------------------


def read_stub() -> dict[str, str]:
    lines = STUB.strip().replace("\n    ", " ").splitlines()
    return {name: signature.strip() for name, _, signature in (line.partition(":") for line in lines)}


@pytest.mark.parametrize(("name", "expected"), read_stub().items(), ids=read_stub())
def test_signature(name: str, expected: str) -> None:
    thing = mistralrs
    for part in name.split("."):
        thing = getattr(thing, part)
    words = []
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        default = parameter.default
        shown = str(default) if isinstance(default, ModelDType) else repr(default)
        words.append(parameter.name if default is parameter.empty else f"{parameter.name}={shown}")
    assert " ".join(words) == expected


def test_every_name_can_be_imported() -> None:
    names = {*OTHER_NAMES.split(), *(name.partition(".")[0] for name in read_stub())}
    for name in names:
        assert inspect.isclass(getattr(mistralrs, name)), name
    assert not hasattr(mistralrs, "Llama")
    with pytest.raises(ImportError):
        exec("from phi4mm_jax.mistralrs import Llama")


def test_import_needs_no_server() -> None:
    code = "import phi4mm_jax.mistralrs, sys; sys.exit(bool({'fastapi', 'pydantic', 'llguidance'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0


# --- scripts -------------------------------------------------------------------------------------------------


def test_a_picture(runner: Runner) -> None:
    response = runner.send_chat_completion_request(
        ChatCompletionRequest(
            model="default",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": str(DEMO / "003-0.png")}},
                        {"type": "text", "text": "Describe the figure."},
                    ],
                }
            ],
            max_tokens=256,
            presence_penalty=1.0,
            top_p=0.1,
            temperature=0.1,
        )
    )
    assert response.choices[0].message.content == "orange cross"
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].message.tool_calls is None
    assert response.choices[0].finish_reason == "stop"
    assert (response.object, response.model) == ("chat.completion", "nano")
    assert str(response.usage).startswith("Usage(completion_tokens=3, prompt_tokens=48, total_tokens=51,")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_picture_and_a_recording_in_any_order(runner: Runner, order: tuple[int, ...]) -> None:
    parts = [audio(DEMO / "004.ogg"), image(DEMO / "004-0.png"), text("")]
    assert said(ask(runner, [parts[i] for i in order])) == "orange"


def test_text_in_few_bits() -> None:
    runner = Runner(which=Which.Plain(model_id="nano"), in_situ_quant="Q4K")
    assert runner._model.steps.runtime.quantization.decoder == "int4"
    assert said(ask(runner, "Repeat after me: the red apple")) == "the red apple"
    with pytest.raises(ConfigError, match="Q7"):
        runner.send_re_isq("Q7")
    assert runner.is_model_loaded("nano")
    runner.send_re_isq("8")
    assert runner._model.steps.runtime.quantization.decoder == "int8"


def test_the_names_of_older_versions() -> None:
    assert Which.VisionPlain("nano", VisionArchitecture.Phi4MM, dtype=ModelDType.F32) == NANO


# --- messages ------------------------------------------------------------------------------------------------


def test_a_string_is_a_message(runner: Runner) -> None:
    request = ChatCompletionRequest(messages=QUESTION, model="", temperature=0, max_tokens=8)
    assert said(runner.send_chat_completion_request(request)) == "105"


def test_tags_choose_the_places() -> None:
    parts = [text("What is in <|image_1|> and <|image_2|>?"), image("a"), audio("b"), image("c")]
    (message,) = conversation([{"role": "user", "content": parts}])
    assert message["content"] == [text("<|audio_1|>What is in <|image_1|> and <|image_2|>?"), *parts[1:]]


def test_media_without_tags_stand_before_the_text() -> None:
    parts = [audio("a"), image("b"), text("What?"), image("c"), text("And why?")]
    (message,) = conversation([{"role": "user", "content": parts}])
    expected = "<|image_1|><|image_2|><|audio_1|>What?"
    assert [part.get("text") for part in message["content"]] == [None, None, expected, None, "And why?"]
    (message,) = conversation([{"role": "user", "content": [image("b")]}])
    assert message["content"] == [image("b"), text("<|image_1|>")]


@pytest.mark.parametrize("form", ["path", "file", "data"])
def test_sources_of_pictures(runner: Runner, form: str) -> None:
    path = DEMO / "002-0.png"
    encoded = base64.b64encode(path.read_bytes()).decode()
    url = {"path": str(path), "file": path.as_uri(), "data": f"data:image/png;base64,{encoded}"}[form]
    assert said(ask(runner, [image(url), text("What is written in the picture?")])) == "moon"


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        (7, ChatError, "messages: expected a list"),
        ([], ChatError, "messages: the list is empty"),
        ([7], ChatError, r"messages\[0\]: expected a mapping"),
        (
            [{"role": "user", "content": [text("a"), image("no.png")]}],
            MediaError,
            r"messages\[0\].content\[1\].*no\.png",
        ),
        ([{"role": "user", "content": [text("a"), {"type": "film"}]}], ChatError, r"content\[1\].type is"),
        ([{"role": "user", "content": [{"text": "a"}, 7]}], ChatError, r"content\[0\].type"),
        ([{"role": "assistant", "content": [image("a")]}], ChatError, "belong in user messages"),
    ],
)
def test_bad_messages(runner: Runner, messages, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        runner.send_chat_completion_request(ChatCompletionRequest(messages=messages, model=""))


# --- sampling ------------------------------------------------------------------------------------------------


def test_sampling_settings() -> None:
    request = ChatCompletionRequest(
        messages="a",
        model="",
        n_choices=2,
        logit_bias={3: -1.5},
        max_tokens=9,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        stop_seqs=["x", "y"],
        temperature=0.75,
        top_p=0.5,
        top_k=40,
        min_p=0.125,
        ignore_eos=True,
    )
    first, second = how_to_draw(request, 4, random.Random(1))
    assert first.seed != second.seed
    assert [p.seed for p in how_to_draw(request, 4, random.Random(1))] == [first.seed, second.seed]
    assert dataclasses.asdict(first) == {
        "temperature": 0.75,
        "top_k": 40,
        "top_p": 0.5,
        "min_p": 0.125,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "logit_bias": {3: -1.5},
        "seed": first.seed,
        "stop": ("x", "y"),
        "max_tokens": 9,
        "min_tokens": 0,
        "logprobs": 4,
        "ignore_eos": True,
    }


def test_without_a_temperature_answers_are_drawn_at_one() -> None:
    """As in mistral.rs, which was asked."""
    (params,) = how_to_draw(CompletionRequest(prompt="a", model=""), None, None)
    assert (params.temperature, params.seed, params.max_tokens, params.logprobs) == (1.0, None, None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature = -1"),
        ({"n_choices": 0}, "n_choices = 0: expected an integer of at least 1"),
        ({"n_choices": True}, "n_choices = True"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"top_logprobs": 21, "logprobs": True}, "logprobs = 21"),
        ({"logit_bias": {5000: 1}}, "token 5000"),
    ],
)
def test_bad_settings(runner: Runner, settings, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        ask(runner, **settings)


def test_choices(runner: Runner) -> None:
    response = ask(runner, n_choices=3, stop_seqs=["5"], max_tokens=4)
    assert [(c.index, c.message.content, c.finish_reason) for c in response.choices] == [
        (i, "10", "stop") for i in range(3)
    ]
    assert response.usage.completion_tokens == 9


def test_logprobs(runner: Runner) -> None:
    assert ask(runner, top_logprobs=3).choices[0].logprobs is None
    entries = ask(runner, logprobs=True).choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["1", "0", "5", "<|end|>"]
    assert [entry.bytes for entry in entries[:3]] == [[49], [48], [53]]
    for entry in entries:
        (top,) = entry.top_logprobs
        assert (top.bytes, top.logprob) == (entry.token, entry.logprob)
    entry = ask(runner, logprobs=True, top_logprobs=3).choices[0].logprobs.content[0]
    assert len(entry.top_logprobs) == 3
    assert [top.token for top in entry.top_logprobs[:1]] == runner.tokenize_text("1", True, None)
    assert -0.01 < entry.logprob < 0


# --- streams, threads, numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [False, True])
def test_streaming(runner: Runner, logprobs: bool) -> None:
    chunks = list(ask(runner, stream=True, logprobs=logprobs))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "105"
    assert {chunk.choices[0].delta.role for chunk in chunks} == {"assistant"}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == 4
    entries = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry and entry.token for entry in entries] == (
        ["1", "0", "5", "<|end|>"] if logprobs else [None] * len(chunks)
    )


def test_streaming_choices(runner: Runner) -> None:
    texts, last = {}, None
    for last in ask(runner, n_choices=2, stream=True):
        (choice,) = last.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.delta.content
    assert texts == {0: "105", 1: "105"}
    assert last.usage.completion_tokens == 8


def test_a_stream_that_is_left_ends(runner: Runner) -> None:
    stream = ask(runner, stream=True, ignore_eos=True, max_tokens=1000)
    next(stream)
    stream.close()
    runner._model.service.release()
    assert runner._model.service.load().running == 0


def test_what_is_wrong_with_a_stream_is_said_at_once(runner: Runner) -> None:
    with pytest.raises(RequestError, match="max_tokens = 5000"):
        ask(runner, stream=True, max_tokens=5000)


def test_threads_are_batched(runner: Runner) -> None:
    questions = [f"What is {i} plus {i}?" for i in range(10, 16)]
    settings = {"max_tokens": 48, "ignore_eos": True}
    alone = [said(ask(runner, question, **settings)) for question in questions]
    found, running = [""] * len(questions), []

    def run(i: int) -> None:
        for chunk in ask(runner, questions[i], stream=True, **settings):
            found[i] += chunk.choices[0].delta.content
            running.append(runner._model.service.load().running)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    assert max(running) > 1


def test_usage(runner: Runner) -> None:
    ask(runner)
    usage = ask(runner).usage
    assert usage.prompt_tokens_details.cached_tokens == 12
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (13, 4, 17)
    assert 0 < usage.total_completion_time_sec < usage.total_time_sec < 60
    assert 0 < usage.total_prompt_time_sec < usage.total_time_sec
    assert usage.avg_tok_per_sec == pytest.approx(17 / usage.total_time_sec)
    assert usage.avg_prompt_tok_per_sec == pytest.approx(13 / usage.total_prompt_time_sec)
    assert usage.avg_compl_tok_per_sec == pytest.approx(4 / usage.total_completion_time_sec)


# --- raw prompts ---------------------------------------------------------------------------------------------


def complete(runner, prompt=f"<|user|>{QUESTION}<|end|><|assistant|>", **settings):
    settings = {"temperature": 0.0, "max_tokens": 8} | settings
    return runner.send_completion_request(CompletionRequest(prompt=prompt, model="default", **settings))


def test_completion(runner: Runner) -> None:
    response = complete(runner)
    assert (response.object, response.choices[0].text, response.choices[0].finish_reason) == (
        "text_completion",
        "105",
        "stop",
    )
    assert response.usage.prompt_tokens == 13
    (choice,) = complete(runner, "<|user|>Hi", max_tokens=1, echo_prompt=True, suffix=" END", ignore_eos=True).choices
    assert choice.text.startswith("<|user|>Hi")
    assert choice.text.endswith(" END")
    assert choice.finish_reason == "length"


def test_best_of(runner: Runner) -> None:
    """The likeliest come first; by default one is left, as in mistral.rs."""
    prompt = {"prompt": "<|user|>Say a word.<|end|><|assistant|>", "temperature": 4.0, "n_choices": 4}
    assert [choice.index for choice in complete(runner, best_of=None, **prompt).choices] == [0, 1, 2, 3]
    assert len(complete(runner, **prompt).choices) == 1
    indices = [choice.index for choice in complete(runner, best_of=3, **prompt).choices]
    assert len(set(indices)) == 3
    with pytest.raises(SamplingError, match="best_of = 0"):
        complete(runner, best_of=0)


def test_truncation(runner: Runner) -> None:
    long = "one two three " * 1000 + f"<|end|><|user|>{QUESTION}<|end|><|assistant|>"
    with pytest.raises(RequestError, match="leave no room"):
        complete(runner, long)
    response = complete(runner, long, truncate_sequence=True, ignore_eos=True)
    assert response.usage.prompt_tokens == 2048 - 8
    assert complete(runner, truncate_sequence=True).choices[0].text == "105"
    with pytest.raises(RequestError, match="media, which stay whole"):
        ask(runner, [image(DEMO / "002-0.png"), text("one two " * 1500)], truncate_sequence=True)


# --- grammars and tools --------------------------------------------------------------------------------------

ADDRESS = {"type": "object", "properties": {"zip": {"enum": [7]}}, "required": ["zip"], "additionalProperties": False}
DENSE = {"x-guidance": {"whitespace_flexible": False}}
"""Otherwise a hot sampler may draw spaces until its tokens are used up."""
CALL = r"""
start: <|tool_call|> "[{\"name\": \"add\", \"arguments\": {\"a\": 21, \"b\": " /[0-9]{2}/ "}}]" <|/tool_call|>
"""
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("kind", "grammar", "expected"),
    [
        ("regex", "[a-z]{3}7", "[a-z]{3}7"),
        ("lark", 'start: "yes" | "no"', "yes|no"),
        ("json_schema", json.dumps(ADDRESS | DENSE), r'\{\s*"zip"\s*:\s*7\s*\}'),
        (
            "llguidance",
            json.dumps(
                {"grammars": [{"lark_grammar": 'start: "It is " @a'}, {"name": "a", "json_schema": {"enum": [7]}}]}
            ),
            "It is 7",
        ),
    ],
)
def test_grammars(runner: Runner, kind: str, grammar: str, expected: str) -> None:
    settings = {"grammar": grammar, "grammar_type": kind, "max_tokens": 40}
    response = ask(runner, temperature=3.0, n_choices=2, **settings)
    assert [re.fullmatch(expected, choice.message.content) is None for choice in response.choices] == [False] * 2
    assert re.fullmatch(expected, complete(runner, **settings).choices[0].text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grammar": "a"}, "grammar_type = None: expected regex, lark, json_schema, llguidance"),
        ({"grammar": "a", "grammar_type": "yacc"}, "grammar_type = 'yacc'"),
        ({"grammar_type": "regex"}, "grammar: expected a string, as there is a grammar_type"),
        ({"grammar": "(", "grammar_type": "regex"}, "grammar: "),
        ({"grammar": "a", "grammar_type": "regex", "ignore_eos": True}, "ignore_eos: does not go with a grammar"),
        ({"grammar": "{", "grammar_type": "json_schema"}, "grammar: not valid JSON"),
        ({"grammar": "[" * 100_000, "grammar_type": "json_schema"}, "grammar: not JSON that can be read"),
        ({"grammar": "{}", "grammar_type": "llguidance"}, 'grammar: expected {"grammars"'),
        ({"grammar": '{"grammars": 7}', "grammar_type": "llguidance"}, 'grammar: expected {"grammars"'),
        (
            {"grammar": '{"grammars": [{"lark_grammar": "a"}, {"name": [], "json_schema": {}}]}'}
            | {"grammar_type": "llguidance"},
            r"grammar: grammars\[1\].name: expected a string",
        ),
        ({"tool_schemas": "{}"}, "tool_schemas: expected a list"),
        ({"tool_schemas": ["{"]}, r"tool_schemas\[0\]: expected a string of JSON"),
        ({"tool_schemas": [{}]}, r"tool_schemas\[0\]: expected a string of JSON"),
        ({"tool_schemas": ["{}"]}, r"tools\[0\]\.function: expected a mapping"),
    ],
)
def test_bad_grammars_and_tools(runner: Runner, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(runner, **settings)


def test_grammars_need_an_extra(monkeypatch: pytest.MonkeyPatch, runner: Runner) -> None:
    monkeypatch.setitem(sys.modules, "phi4mm_jax.serving.grammar", None)
    monkeypatch.delitem(vars(runner), "_grammars", raising=False)
    with pytest.raises(ImportError, match=r"grammar: needs the extra serve, pip install 'phi4mm-jax\[serve\]'"):
        ask(runner, grammar="a", grammar_type="regex")


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(runner: Runner, stream: bool) -> None:
    tools = {"tool_schemas": [json.dumps(TOOL)], "tool_choice": ToolChoice.Auto}
    settings = {"grammar": CALL, "grammar_type": "lark", "max_tokens": 80, "stream": stream} | tools
    response = ask(runner, **settings)
    if stream:
        *before, last = [chunk.choices[0] for chunk in response]
        assert {(choice.delta.content, choice.delta.tool_calls) for choice in before} == {("", None)}
        message = last.delta
    else:
        (last,) = response.choices
        message = last.message
        assert message.content is None
    (call,) = message.tool_calls
    assert last.finish_reason == "tool_calls"
    assert (call.index, call.function.name, call.tp) == (0, "add", mistralrs.ToolCallType.Function)
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    assert arguments["a"] == 21


def test_a_result_goes_back_as_scripts_do_it(runner: Runner) -> None:
    call = json.dumps({"name": "add", "parameters": {"a": 21, "b": 84}})
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": call},
        {"role": "tool", "content": "105"},
    ]
    request = ChatCompletionRequest(messages, "", tool_schemas=[json.dumps(TOOL)], temperature=0, max_tokens=4)
    response = runner.send_chat_completion_request(request)
    tools = f"<|tool|>{json.dumps([TOOL['function']])}<|/tool|>"
    turns = ("system", tools), ("user", QUESTION), ("assistant", call), ("tool", "105")
    prompt = "".join(f"<|{role}|>{content}<|end|>" for role, content in turns) + "<|assistant|>"
    assert response.usage.prompt_tokens == len(runner.tokenize_text(prompt, True, None))
    assert response.choices[0].message.tool_calls is None


def test_no_tool_is_called_where_none_may_be(runner: Runner) -> None:
    tools = {"tool_schemas": [json.dumps(TOOL)], "tool_choice": ToolChoice.NoTools}
    choice = ask(runner, grammar=CALL, grammar_type="lark", max_tokens=80, **tools).choices[0]
    assert choice.message.content.startswith('<|tool_call|>[{"name": "add"')
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


def test_a_call_that_is_cut_off_says_so(runner: Runner) -> None:
    settings = {"grammar": CALL, "grammar_type": "lark", "tool_schemas": [json.dumps(TOOL)]}
    whole = ask(runner, max_tokens=80, **settings).usage.completion_tokens
    choice = ask(runner, max_tokens=whole - 5, **settings).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"a": 21')


# --- the model -----------------------------------------------------------------------------------------------


def test_tokens(runner: Runner) -> None:
    ids = runner.tokenize_text(f"<|user|>{QUESTION}<|end|>", True, None)
    assert ids == runner.tokenize_text(f"<|user|>{QUESTION}<|end|>", False, True)
    assert runner.detokenize_text(ids, True) == QUESTION
    assert runner.detokenize_text(ids, False, "nano") == f"<|user|>{QUESTION}<|end|>"
    assert runner.max_sequence_length() == 2048


def test_the_one_model(runner: Runner) -> None:
    assert runner.list_models() == ["nano"]
    assert runner.get_default_model_id() == "nano"
    runner.set_default_model_id("nano")
    assert runner.list_models_with_status() == [("nano", "loaded")]
    assert runner.get_model_status("nano") == "loaded"
    assert runner.get_model_status("other") is None
    assert runner.is_model_loaded("other") is False
    request = ChatCompletionRequest(messages=QUESTION, model="whatever", temperature=0, max_tokens=8)
    assert said(runner.send_chat_completion_request_to_model(request, "nano")) == "105"
    for call in (
        lambda: runner.send_chat_completion_request(request, "other"),
        lambda: runner.send_completion_request_to_model(CompletionRequest("a", ""), "other"),
        lambda: runner.set_default_model_id("other"),
        lambda: runner.unload_model("other"),
        lambda: runner.tokenize_text("a", True, None, "other"),
    ):
        with pytest.raises(ValueError, match="model_id = 'other': no such model; there is 'nano'"):
            call()
    with pytest.raises(ValueError, match="is the last model"):
        runner.remove_model("nano")
    with pytest.raises(ConfigError, match="without in_situ_quant"):
        runner.send_re_isq("Q4K")


def test_unloading(runner: Runner) -> None:
    runner.unload_model("nano")
    runner.unload_model("nano")
    assert runner.list_models_with_status() == [("nano", "unloaded")]
    assert runner.list_unloaded_models() == runner.list_models() == ["nano"]
    assert said(ask(runner)) == "105"
    assert runner.is_model_loaded("nano")
    runner.reload_model("nano")


def test_where_the_token_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("hf_c\n")
    monkeypatch.setenv("SOME_TOKEN", "hf_b")
    asked = []
    monkeypatch.setattr(Runner, "_load", lambda self: asked.append(self._token))
    for source in ("cache", "none", "literal:hf_a", "env:SOME_TOKEN", f"path:{tmp_path / 'token'}"):
        Runner(NANO, token_source=source)
    assert asked == [None, False, "hf_a", "hf_b", "hf_c"]
    for source, message in {
        "env:NO_SUCH_TOKEN": "the environment has no 'NO_SUCH_TOKEN'",
        "path:/nowhere": "/nowhere cannot be read",
        "somewhere": "expected 'literal:TOKEN'",
        "literal:": "expected 'literal:TOKEN'",
        "cache:": "expected 'literal:TOKEN'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            Runner(NANO, token_source=source)


# --- what is not here ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"no_kv_cache": True},
        {"mtp_model": "a/b"},
        {"mtp_n_predict": 2},
        {"chat_template": "a.json"},
        {"jinja_explicit": "a.jinja"},
        {"anymoe_config": object()},
        {"memory_goal": 0.9},
        {"pa_blk_size": 32},
        {"pa_cache_type": "auto"},
        {"paged_attn": True},
        {"enable_search": True},
        {"search_embedding_model": "embedding_gemma"},
        {"search_callback": print},
        {"tool_callbacks": {"a": print}},
        {"mcp_client_config": object()},
        {"code_execution_config": object()},
        {"shell_config": object()},
        {"num_device_layers": ["0:2"]},
        {"num_device_layers": ["0:16", "1:16"]},
        {"num_device_layers": ["1:500"]},
    ],
    ids=" ".join,
)
def test_absent_settings_of_the_runner(settings) -> None:
    (name,) = settings
    with pytest.raises(NotImplementedError, match=rf"^Runner\({name}=.*phi4mm_jax has not"):
        Runner(NANO, **settings)


@pytest.mark.parametrize(
    ("which", "settings"),
    [
        (Which.MultimodalPlain, {"arch": MultimodalArchitecture.Gemma4}),
        (Which.MultimodalPlain, {"tokenizer_json": "a"}),
        (Which.MultimodalPlain, {"max_edge": 1024}),
        (Which.MultimodalPlain, {"from_uqff": ["a"]}),
        (Which.MultimodalPlain, {"hf_cache_path": "a"}),
        (Which.MultimodalPlain, {"encoder_cache_memory_bytes": 0}),
        (Which.MultimodalPlain, {"organization": mistralrs.IsqOrganization.MoQE}),
        (Which.Plain, {"arch": Architecture.Phi3}),
        (Which.Plain, {"topology": "a"}),
        (Which.Plain, {"imatrix": "a"}),
    ],
)
def test_absent_settings_of_the_model(which, settings) -> None:
    (name,) = settings
    with pytest.raises(NotImplementedError, match=rf"^{which.__qualname__}\({name}="):
        which(model_id="nano", **settings)
    assert which(model_id="nano", organization=mistralrs.IsqOrganization.Default)


@pytest.mark.parametrize(
    "settings",
    [
        {"dry_multiplier": 0.8},
        {"dry_base": 1.75},
        {"dry_allowed_length": 2},
        {"dry_sequence_breakers": ["\n"]},
        {"web_search_options": object()},
        {"enable_thinking": True},
        {"reasoning_effort": "high"},
        {"max_tool_rounds": 2},
        {"tool_dispatch_url": "http://localhost"},
        {"enable_code_execution": True},
        {"enable_shell": True},
        {"shell_skills": []},
        {"agent_permission": object()},
        {"agent_approval_callback": print},
        {"code_execution_permission": object()},
        {"session_id": "a"},
        {"files": []},
        {"input_files": []},
        {"adapter": "a"},
    ],
    ids=" ".join,
)
def test_absent_settings_of_a_request(settings) -> None:
    (name,) = settings
    with pytest.raises(NotImplementedError, match=rf"^ChatCompletionRequest\({name}="):
        ChatCompletionRequest(messages="a", model="", **settings)
    if name in inspect.signature(CompletionRequest).parameters:
        with pytest.raises(NotImplementedError, match=rf"^CompletionRequest\({name}="):
            CompletionRequest(prompt="a", model="", **settings)


def test_settings_that_ask_for_nothing() -> None:
    assert ChatCompletionRequest(messages="a", model="", enable_thinking=False, reasoning_effort=" Off")


@pytest.mark.parametrize("name", ABSENT_WHICH)
def test_absent_kinds_of_models(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^Which\.{name}: "):
        getattr(Which, name)("a", model_id="b")


def test_absent_classes_and_methods(runner: Runner) -> None:
    with pytest.raises(NotImplementedError, match="^McpClientConfigPy: "):
        mistralrs.McpClientConfigPy(servers=[])
    with pytest.raises(NotImplementedError, match=r"^AgentPermission\.Ask: "):
        mistralrs.AgentPermission.Ask  # noqa: B018
    assert not isinstance(1, mistralrs.File)
    arguments = {"prompt": "a", "response_format": "Url", "alias": "a", "adapter_dir": "b", "request": None}
    arguments |= {"session_id": "a", "session_json": "{}", "file_id": "a"}
    absent = [name for name in vars(mistralrs.absent.AbsentMethods) if not name.startswith("_")]
    assert len(absent) == 15
    for name in absent:
        method = getattr(runner, name)
        with pytest.raises(NotImplementedError, match=rf"^Runner\.{name}: "):
            method(**{key: arguments[key] for key in inspect.signature(method).parameters if key in arguments})


def test_a_runner_needs_a_model() -> None:
    with pytest.raises(TypeError, match="which = 'nano': expected Which"):
        Runner("nano")
    with pytest.raises(TypeError, match=r"dtype='f32'\): expected a ModelDType"):
        Which.Plain("nano", dtype="f32")
    with pytest.raises(ConfigError, match="Q7"):
        Runner(NANO, in_situ_quant="Q7")
    with pytest.raises(ValueError, match="max_seqs = 0"):
        Runner(NANO, max_seqs=0)
    with pytest.raises(ValueError, match="prefix_cache_n = -1"):
        Runner(NANO, prefix_cache_n=-1)
    with pytest.raises(TypeError, match="tool_choice = 'auto': expected a ToolChoice"):
        ChatCompletionRequest(messages="a", model="", tool_choice="auto")


def test_settings_of_the_engine() -> None:
    runner = Runner(NANO, max_seqs=2, prefix_cache_n=0, num_device_layers=["500"], no_paged_attn=True, seed=3)
    engine = runner._model.steps.runtime.engine
    assert (engine.max_batch, engine.prefix_cache) == (2, False)
    drawn = ask(runner, "Say a word.", temperature=4.0)
    assert said(ask(Runner(NANO, seed=3), "Say a word.", temperature=4.0)) == said(drawn)
