"""Questions about pictures that are answered in a few words: documents, charts, and text in photographs."""

from __future__ import annotations

from phi4mm_jax.evaluation.tasks.task import REPORT, Columns, HubDataset, Published, Task

SHORTLY = "{question}\nAnswer the question using a single word or phrase."
"""A question as both public harnesses ask for a short answer."""

_SERVER = f"{REPORT}, on the test split, which a server scores"

DOCVQA = Task(
    name="docvqa",
    title="DocVQA",
    source=HubDataset(repo="lmms-lab/DocVQA", config="DocVQA", split="validation"),
    columns=Columns(name=("questionId",), images=("image",)),
    prompt=SHORTLY,
    max_tokens=32,
    metric="anls",
    published=Published(score=93.2, source=_SERVER),
)
INFOVQA = Task(
    name="infovqa",
    title="InfographicVQA",
    source=HubDataset(repo="lmms-lab/DocVQA", config="InfographicVQA", split="validation"),
    columns=Columns(name=("questionId",), images=("image",)),
    prompt=SHORTLY,
    max_tokens=32,
    metric="anls",
    published=Published(score=72.7, source=_SERVER),
)
CHARTQA = Task(
    name="chartqa",
    title="ChartQA",
    source=HubDataset(repo="lmms-lab/ChartQA"),
    columns=Columns(images=("image",), references=("answer",), subset=("type",)),
    prompt="{question}\nAnswer the question with a single word.",
    max_tokens=16,
    metric="relaxed_accuracy",
    published=Published(score=81.4, source=REPORT),
)
TEXTVQA = Task(
    name="textvqa",
    title="TextVQA",
    source=HubDataset(repo="lmms-lab/textvqa", split="validation"),
    columns=Columns(name=("question_id",), images=("image",)),
    prompt=SHORTLY,
    max_tokens=16,
    metric="vqa",
    published=Published(score=75.6, source=REPORT),
)
OCRBENCH = Task(
    name="ocrbench",
    title="OCRBench",
    source=HubDataset(repo="echo840/OCRBench"),
    columns=Columns(images=("image",), references=("answer",), subset=("question_type",), facts=("dataset",)),
    metric="ocrbench",
    published=Published(score=84.4, source=f"{REPORT}: 844 of 1000"),
)

PICTURES = (DOCVQA, INFOVQA, CHARTQA, TEXTVQA, OCRBENCH)
"""All of them."""
