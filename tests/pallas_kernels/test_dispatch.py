"""How an operator picks a backend."""

import jax
import pytest

from pallas_kernels import dispatch


def refuse(x):
    raise NotImplementedError("rows must be a multiple of 8")


BACKENDS = {"cpu": refuse, "gpu": lambda x: x + 1, "xla": lambda x: x}


def test_default_falls_back_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert dispatch.run("f", BACKENDS, None, 1) == 1


def test_default_prefers_the_platform(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.run("f", BACKENDS, None, 1) == 2


def test_preference_replaces_the_platform(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with dispatch.prefer("xla"):
        assert dispatch.run("f", BACKENDS, None, 1) == 1
        assert dispatch.run("f", BACKENDS, "gpu", 1) == 2
        with dispatch.prefer("tpu", "cpu", "gpu"):  # not there, refuses, does it
            assert dispatch.run("f", BACKENDS, None, 1) == 2
        assert dispatch.run("f", BACKENDS, None, 1) == 1
    assert dispatch.run("f", BACKENDS, None, 1) == 2


def test_reason_reaches_the_user_who_asked_by_name():
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        dispatch.run("f", BACKENDS, "cpu", 1)


def test_names_are_tried_in_order():
    assert dispatch.run("f", BACKENDS, ("cpu", "gpu", "xla"), 1) == 2
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        dispatch.run("f", BACKENDS, ["cpu"], 1)


@pytest.mark.parametrize("implementation", ["tpu", ("xla", "tpu")])
def test_unknown_name(implementation):
    with pytest.raises(ValueError, match="f has no implementation 'tpu'; available: cpu, gpu, xla"):
        dispatch.run("f", BACKENDS, implementation, 1)
