"""Functions compiled to machine code, and their cache on disk.

`native` makes a function that Python calls without the GIL; ItemFunction one
that native code calls by its address.  Compiled code is kept where numba
keeps it (NUMBA_CACHE_DIR) and is used again only while every source file of
this package is the same: numba itself would look at the function's own file
only, and run old code after a change in one of the others.
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

caching: Any = _caching


@cache
def _sources() -> str:
    """A digest of this package's source files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class _PackageCache(caching.FunctionCache):  # type: ignore[misc]
    """numba's cache of a function, valid for one state of the whole package."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = caching.IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=_sources(),
        )


def native(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function that Python calls: compiled or loaded at once, runs without the GIL."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True)(function)
        dispatcher._cache = _PackageCache(function)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return compiled


class ItemFunction:
    """Machine code `void(params, item, scratch)`, compiled (or loaded) when first needed.

    Without fast-math: numba would pass its flags on to everything called, and
    exp2 rounds by adding and subtracting a constant.
    """

    def __init__(self, function: Callable[[int, int, int], None]) -> None:
        self._function = function

    @cached_property
    def address(self) -> int:
        """Where the code is; valid while this object lives."""
        signature = types.void(types.int64, types.int64, types.int64)
        code: Any = CFunc(self._function, (signature.args, signature.return_type), {}, {})
        code._cache = _PackageCache(self._function)
        code.compile()
        self._code = code
        return int(code.address)
