"""How an operator picks one of its backends.

An operator has a table from backend name to function, with "xla" always in it. A backend that cannot do a case
raises NotImplementedError with the reason, when it is traced.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

from pallas_kernels import partition

Implementation = str | Sequence[str] | None
"""A backend's name, several names in order of preference, or None: the platform's own backend, then "xla"."""

_preferred: ContextVar[tuple[str, ...] | None] = ContextVar("preferred", default=None)


class UnknownBackendError(NotImplementedError, ValueError):
    """An operator has no backend of the name that was asked for."""


@contextmanager
def prefer(*names: str) -> Iterator[None]:
    """Within it, an implementation of None means the backends of these names that the operator has, then "xla".

    Backends are chosen when a program is traced, so it belongs inside the function that is traced.
    """
    token = _preferred.set(names)
    try:
        yield
    finally:
        _preferred.reset(token)


def run(
    operator: str,
    backends: Mapping[str, Callable],
    implementation: Implementation,
    *args: Any,
    spread: Callable | None = None,
    **kwargs: Any,
):
    """Calls the first of the chosen backends that can do the case.

    The platform is that of JAX's default backend at trace time. A program that is lowered for another platform
    should therefore name its backends.

    Args:
      operator: name of the operator, for messages.
      backends: its table, from name ("xla", "tpu", "gpu", "cpu") to function.
      implementation: which of them, see `Implementation`.
      *args: passed on.
      spread: calls a backend on each device of a program over several, see `partition`: `spread(layout, backend,
        *args, **kwargs)`. Without it only "xla" serves such a program.
      **kwargs: passed on.

    Raises:
      UnknownBackendError: a name that the operator does not have.
      NotImplementedError: the last of the chosen backends cannot do the case.
    """
    if implementation is None:
        preferred = _preferred.get()
        preferred = (jax.default_backend(),) if preferred is None else preferred
        names = [name for name in dict.fromkeys((*preferred, "xla")) if name in backends]
    else:
        names = [implementation] if isinstance(implementation, str) else list(implementation)
    for name in names:
        if name not in backends:
            available = ", ".join(backends)
            raise UnknownBackendError(f"{operator} has no implementation {name!r}; available: {available}")
    layout = partition.current()

    def call(name: str) -> Any:
        if layout is None or name == "xla":
            return backends[name](*args, **kwargs)
        if spread is None:
            raise NotImplementedError(f"{operator}: over several devices {name!r} must know how the operands lie")
        return spread(layout, backends[name], *args, **kwargs)

    for name in names[:-1]:
        try:
            return call(name)
        except NotImplementedError:
            continue
    return call(names[-1])
