"""Cellpose's ``_seg.npy`` without unpickling: the file is a pickled dictionary, and a pickle can run any code.

The pickle's opcodes are interpreted by a machine that only builds tuples, lists, dictionaries and descriptions of
calls; it imports nothing and calls nothing. Out of the result the array under ``"masks"`` is decoded by hand.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nucseg.annotations.errors import AnnotationError

HOW = (
    "export the masks yourself: in Cellpose File > Save masks as PNG/TIF, or "
    "np.save('masks.npy', np.load('..._seg.npy', allow_pickle=True).item()['masks']) where you trust the file"
)


class _Call(NamedTuple):
    """What a pickle would have called: only described."""

    function: str
    args: Any
    state: list  # at most one item, set by BUILD


class _Mark:
    pass


def read_masks(path: str | Path) -> np.ndarray:
    """Return the integer array under ``"masks"`` of a Cellpose ``_seg.npy``, (H, W).

    Raises
    ------
    AnnotationError
        When there is no such array or it is written in a way that this reader does not know.
    """
    path = Path(path)
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            read_header(file)
            outer = _interpret(file)
            content = outer.state[0][4][0]
            masks = content["masks"]
            return _decode(masks)
        except AnnotationError:
            raise
        except Exception as error:
            raise AnnotationError(
                f"{path}: holds pickled Python objects, which are never unpickled here, and no plain mask array was "
                f"found in it ({type(error).__name__}: {error}); {HOW}"
            ) from error


def _interpret(file) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = max(i for i, item in enumerate(stack) if isinstance(item, _Mark))
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, arg, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            stack.append(_Mark())
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "NONE":
            stack.append(None)
        elif name in ("NEWTRUE", "NEWFALSE"):
            stack.append(name == "NEWTRUE")
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "GLOBAL":
            stack.append(arg.replace(" ", "."))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(f"{module}.{attribute}")
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            stack.append(_Call(str(function), args, []))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state.append(state)
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(stack[-count:])
            stack[-count:] = [items]
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "APPENDS":
            items = since_mark()
            stack[-1].extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], key, value)
        elif name == "SETITEMS":
            items = since_mark()
            for key, value in zip(items[0::2], items[1::2], strict=True):
                _set(stack[-1], key, value)
        elif name == "POP":
            stack.pop()
        elif arg is not None:  # numbers, strings and bytes
            stack.append(arg)
        else:
            raise ValueError(f"unknown pickle opcode {name}")
    raise ValueError("the pickle has no end")


def _set(target: dict, key: Any, value: Any) -> None:
    if isinstance(key, str):  # other keys are of no interest, and might not be hashable
        target[key] = value


def _decode(call: Any) -> np.ndarray:
    """Turn the description of ``numpy._reconstruct`` with its state into an array of integers."""
    if not isinstance(call, _Call) or not call.function.endswith("multiarray._reconstruct"):
        raise ValueError("the masks are not a plain numpy array")
    _, shape, dtype_call, fortran, data = call.state[0]
    kind = np.dtype(dtype_call.args[0])
    byte_order = dtype_call.state[0][1] if dtype_call.state else "="
    if kind.kind not in "iub" or not isinstance(data, bytes):
        raise ValueError(f"the masks are of type {kind}")
    kind = kind.newbyteorder(byte_order) if byte_order in "<>" else kind
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C").astype(np.int64)
