"""A compiled program that waits in C until it is let go: what shows whether others may run meanwhile."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from recsys.compiled import CompiledProgram

SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <time.h>
static int inside, released, is_failing;
int entered(void) { return __atomic_load_n(&inside, __ATOMIC_SEQ_CST); }
void release(void) { __atomic_store_n(&released, 1, __ATOMIC_SEQ_CST); }
void fail(void) { is_failing = 1; }
int32_t AOTInductorModelContainerCreateWithDevice(void **p, size_t n, const char *d, const char *c) {
  *p = &inside;
  return 0;
}
int32_t AOTInductorModelContainerDelete(void *p) { return 0; }
int32_t AOTInductorModelContainerGetNumInputs(void *p, size_t *n) { *n = 1; return 0; }
int32_t AOTInductorModelContainerGetNumOutputs(void *p, size_t *n) { *n = 1; return 0; }
int32_t AOTInductorGetLastError(const char **said) { *said = "nobody let it go"; return 0; }
int32_t AOTInductorModelContainerRun(void *p, void **in, size_t n, void **out, size_t m, void *s, void *e) {
  struct timespec pause = {0, 1000000};
  __atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST);
  for (int waited = 0; waited < 10000 && !is_failing; waited++) {
    if (__atomic_load_n(&released, __ATOMIC_SEQ_CST)) {
      out[0] = in[0];
      return 0;
    }
    nanosleep(&pause, NULL);
  }
  return 1;
}
"""


class BlockingProgram:
    """Gives its one input back once it is let go; an error if that takes ten seconds.

    Attributes:
        program: to be called.
    """

    def __init__(self, folder: Path, *, max_callers: int = 2) -> None:
        compiler = shutil.which(os.environ.get("CC", "gcc"))
        if compiler is None:
            pytest.skip("there is no C compiler here")
        library, package = folder / "program.so", folder / "package.pt2"
        (folder / "program.c").write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "program.c"], check=True)
        with zipfile.ZipFile(package, "w") as file:
            file.write(library, "package/data/aotinductor/model/program.so")
        self.program = CompiledProgram(package, max_callers=max_callers)
        self._library: ctypes.CDLL = self.program._library

    @property
    def num_entered(self) -> int:
        """Calls that have begun to run."""
        return int(self._library.entered())

    def release(self) -> None:
        """Lets every caller go."""
        self._library.release()

    def fail(self) -> None:
        """Makes every call an error."""
        self._library.fail()
