"""What a compiled program for a TPU moves between its memory (HBM) and the chip, read from the scheduled program."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32}
_BITS |= {"f8e4m3fn": 8, "bf16": 16, "f16": 16, "f32": 32}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*?)\)(?:, (.*))?$")
_NO_TRAFFIC = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "opt-barrier"}
_PARTS = {"gather", "dynamic-slice", "slice"}


class Array(NamedTuple):
    """One of an instruction's results."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        """In bytes of HBM: none if it lies on the chip."""
        return 0 if self.on_chip else math.prod(self.shape) * _BITS[self.dtype] // 8


class Instruction(NamedTuple):
    """A line of a computation."""

    is_root: bool
    name: str
    results: list[Array]
    operation: str
    operands: list[str]
    attributes: str

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return re.findall(r"(?:calls|body|to_apply)=%([\w.-]+)", self.attributes)


class Program:
    """A compiled program."""

    def __init__(self, text: str):
        """Reads what `jax.stages.Compiled.as_text` returns."""
        self._computations: dict[str, list[Instruction]] = {}
        for part in text.split("\n\n"):
            head, *lines = part.strip("\n").split("\n")
            name = re.match(r"(ENTRY )?%([\w.-]+) \(", head)
            if name:
                self._computations[name[2]] = [_instruction(*m.groups()) for m in map(_INSTRUCTION.match, lines) if m]
                if name[1]:
                    self._entry = name[2]

    def loop(self) -> list[Instruction]:
        """The body of the program's loop."""
        (loop,) = (i for i in self._computations[self._entry] if i.operation == "while")
        return self._computations[loop.called[0]]

    def traffic(self, instructions: list[Instruction]) -> int:
        """Bytes that the instructions read from HBM and write to it, the operands of a kernel once and whole."""
        results = {i.name: i.results for i in instructions}
        total = 0
        for i in instructions:
            if i.operation in _NO_TRAFFIC or i.operation.endswith("-done"):
                continue
            if i.operation.endswith("-start"):  # of a copy: the source, perhaps a part of it, and the target
                total += min(a.size or b.size for a in i.results[:1] for b in i.results[1:2])
            elif i.operation == "dynamic-update-slice":
                total += 2 * sum(a.size for a in results[i.operands[1]])
            else:
                total += sum(a.size for a in i.results)
                for index, name in enumerate(i.operands):
                    size = sum(a.size for a in results.get(name, ()))
                    total += min(size, self._read(i, index)) if size else 0
        return total

    def _read(self, user: Instruction, index: int) -> float:
        """Bytes of an operand that an instruction reads."""
        if index == 0 and user.operation in _PARTS:
            return sum(math.prod(a.shape) * _BITS[a.dtype] // 8 for a in user.results)
        if user.operation != "fusion":
            return math.inf
        inside = self._computations[user.called[0]]
        return self._read_of(
            inside, next(i for i in inside if i.operation == "parameter" and i.operands == [str(index)])
        )

    def _read_of(self, inside: list[Instruction], array: Instruction) -> float:
        """Bytes of a value of a fusion that the rest of it reads."""
        total = 0.0
        for user in inside:
            if array.name in user.operands:
                again = user.operation == "bitcast"
                total += self._read_of(inside, user) if again else self._read(user, user.operands.index(array.name))
        return total


def _instruction(root: str | None, name: str, results: str, operation: str, operands: str, attributes: str | None):
    arrays = [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" in (layout or ""))
        for dtype, shape, layout in _ARRAY.findall(results)
        if dtype in _BITS
    ]
    names = re.findall(r"%([\w.-]+)", operands) or [operands]
    return Instruction(bool(root), name, arrays, operation, names, attributes or "")


def wide_copies(instructions: list[Instruction], weights: list[tuple[int, ...]]) -> Iterator[Instruction]:
    """The instructions whose result has the shape of a weight, either way round, in bfloat16 or float32."""
    shapes = {tuple(sorted(shape)) for shape in weights}
    for i in instructions:
        if any(a.dtype in ("bf16", "f32") and tuple(sorted(a.shape)) in shapes for a in i.results):
            yield i
