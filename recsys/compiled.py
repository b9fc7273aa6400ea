"""A compiled program (AOTInductor), called through its C interface.

torch's own binding of a package keeps the interpreter's lock while the program runs, and while it waits for a free
copy of it: nothing else of the process moves meanwhile, and a second caller waits for ever for the first. Here the
shared library of the package is called directly, as its interface is meant to be called (``aoti_runtime/interface.h``
of torch: plain C, kept compatible), and :mod:`ctypes` gives the lock away for the length of the call. So several
threads run the program side by side, each on a copy of its own of what changes, all on the same weights.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import weakref
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MODEL = "/data/aotinductor/model/"
_INTERFACE: dict[str, list[Any]] = {
    "AOTInductorModelContainerCreateWithDevice": [
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_size_t,
        ctypes.c_char_p,
        ctypes.c_char_p,
    ],
    "AOTInductorModelContainerDelete": [ctypes.c_void_p],
    "AOTInductorModelContainerGetNumInputs": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)],
    "AOTInductorModelContainerGetNumOutputs": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)],
    "AOTInductorModelContainerRun": [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ],
    "AOTInductorGetLastError": [ctypes.POINTER(ctypes.c_char_p)],
}

# Tensors cross as handles in capsules without a name; these look into one and make one.
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule_of = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class CompiledProgram:
    """Flat inputs -> logits ``(N, T)``, without the interpreter's lock. Safe to call from several threads.

    Args:
        package: file that ``torch._inductor.aoti_compile_and_package`` wrote, for the CPU, of one output.
        max_callers: threads that may run it side by side; more wait for one of these to be done.

    Raises:
        OSError: the package cannot be unpacked, or its library not be loaded: the temporary folder may be full, or may
            not allow execution.
        RuntimeError: the package is of another form, or the program cannot be set up.
    """

    def __init__(self, package: str | Path, *, max_callers: int | None = None) -> None:
        places = max_callers or max(2, os.cpu_count() or 1)
        self._library, self._program = _load(Path(package), places)
        # The library would queue callers too, but forgets to wake one after an error.
        self._free = threading.BoundedSemaphore(places)
        self._close = weakref.finalize(self, self._library.AOTInductorModelContainerDelete, self._program)
        self._num_inputs = self._count("AOTInductorModelContainerGetNumInputs")
        if (num_outputs := self._count("AOTInductorModelContainerGetNumOutputs")) != 1:
            raise RuntimeError(f"a program must have 1 output, got {num_outputs}")

    def _count(self, function: str) -> int:
        number = ctypes.c_size_t()
        _check(self._library, getattr(self._library, function)(self._program, ctypes.byref(number)))
        return number.value

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        """Runs the program.

        Raises:
            RuntimeError: the inputs are not what it was compiled for.
        """
        if len(inputs) != self._num_inputs:
            raise RuntimeError(f"the program must have {self._num_inputs} inputs, got {len(inputs)}")
        got = (ctypes.c_void_p * 1)()
        run = self._library.AOTInductorModelContainerRun
        with self._free:
            capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(inputs)
            # The program takes the handles over, whether or not it succeeds.
            given = (ctypes.c_void_p * len(inputs))(*[_pointer_of(c, None) for c in capsules])
            _check(self._library, run(self._program, given, len(inputs), got, 1, None, None))
        logits: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule_of(got[0], None, None))
        return logits


def _load(package: Path, max_callers: int) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """The package's library, and a program of it with room for some callers."""
    with tempfile.TemporaryDirectory(prefix="recsys-program-", ignore_cleanup_errors=True) as scratch:
        path = Path(scratch) / "program.so"
        try:
            with zipfile.ZipFile(package) as file:
                path.write_bytes(file.read(_library_in(file.namelist())))
        except zipfile.BadZipFile as err:
            raise RuntimeError("it is not a package of a compiled program") from err
        library = ctypes.CDLL(str(path))
        for function, arguments in _INTERFACE.items():
            try:
                pointer = getattr(library, function)
            except AttributeError as err:
                raise RuntimeError(f"its library lacks {function}") from err
            pointer.argtypes, pointer.restype = arguments, ctypes.c_int32
        program = ctypes.c_void_p()
        # Large weights are read from the library's file here, after which nothing needs the file any more.
        create = library.AOTInductorModelContainerCreateWithDevice
        _check(library, create(ctypes.byref(program), max_callers, b"cpu", None))
        return library, program


def _library_in(names: list[str]) -> str:
    """The package's shared library, by name.

    Raises:
        RuntimeError: there is none, or more than one; or it is not whole by itself.
    """
    parts = [name for name in names if _MODEL in name]
    libraries = [name for name in parts if name.endswith(".so")]
    if len(libraries) != 1:
        raise RuntimeError(f"a package must hold one library, got {len(libraries)}")
    # Kernels that have no C interface are listed beside it, and are reached through the interpreter.
    others = [n for n in parts if n.endswith((".json", ".blob", ".pt")) and not n.endswith("_metadata.json")]
    if others:
        raise RuntimeError(f"a library must be whole by itself, got {others[0].rsplit('/', 1)[1]} beside it")
    return libraries[0]


def _check(library: ctypes.CDLL, status: int) -> None:
    if status == 0:
        return
    said = ctypes.c_char_p()
    library.AOTInductorGetLastError(ctypes.byref(said))
    raise RuntimeError((said.value or b"it says not why").decode(errors="replace"))
