"""numba's machine code, cached on disk for as long as it is current.

numba's own cache looks at the file of the cached function alone, and would run
old code after a change in a file that it calls into.  Here code is valid for
one state of all source files of the function's folder, across which the
kernels of this project are written, and of the constants that they take from
elsewhere.  Used by kernels/cpu and sampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.core import caching as _caching
from numba.core.ccallback import CFunc

from ..ipc import plan
from .parallel import slabs

caching: Any = _caching

FROZEN_IN = (plan, slabs)
"""Modules whose int and float constants kernels in other folders are compiled with."""


class FolderCache(caching.FunctionCache):  # type: ignore[misc]
    """numba's cache of a function; a digest stands for its file's date."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = caching.IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=_digest(Path(function.__code__.co_filename).parent),
        )


def native(signature: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function that Python calls; it runs without the GIL.

    Compiled, or loaded, at once for `signature`; without one, at its first call.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True)(function)
        dispatcher._cache = FolderCache(function)
        if signature is not None:
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        return dispatcher

    return compiled


def part(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function inside another one that native code calls: `name` tells it from others
    of the same place.

    Machine code from disk is linked by functions' names, and numba makes those of one place
    different by a number that is counted in each process.  Of two that were compiled in two
    processes a third one would run the same for both.
    """

    def named(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"_{name}"
        return njit(nogil=True)(function)

    return named


class ItemFunction:
    """Machine code `void(params, item, scratch)`, compiled (or loaded) when first needed.

    Native code calls it by its address.  Without fast-math: numba would pass
    its flags on to everything called, and exp2 rounds by adding and
    subtracting a constant.
    """

    def __init__(self, function: Callable[[int, int, int], None]) -> None:
        self._function = function

    @cached_property
    def address(self) -> int:
        """Where the code is; valid while this object lives."""
        signature = types.void(types.int64, types.int64, types.int64)
        code: Any = CFunc(self._function, (signature.args, signature.return_type), {}, {})
        code._cache = FolderCache(self._function)
        code.compile()
        self._code = code
        return int(code.address)


@cache
def _digest(folder: Path) -> str:
    """Of the source files in a folder, and of the constants that are frozen in their code."""
    digest = hashlib.sha256()
    for module in FROZEN_IN:
        constants = [item for item in vars(module).items() if isinstance(item[1], int | float)]
        digest.update(repr(constants).encode())
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
