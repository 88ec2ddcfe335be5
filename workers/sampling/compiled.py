"""Machine code of the row kernel, and its cache on disk.

numba's own cache looks at the file of the cached function only, and would run
old code after a change in a file that it calls into.  Here it is valid for one
state of this package's source files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile


class _PackageCache(FunctionCache):
    """numba's cache of a function, where the digest of the package stands for the file's date."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._cache_file = IndexDataCacheFile(  # type: ignore[no-untyped-call]
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=_source_digest(),
        )


def kernel(function: Callable[..., Any]) -> Any:
    """Decorates a function that Python calls: compiled or loaded at its first call, without GIL."""
    dispatcher: Any = njit(nogil=True)(function)
    dispatcher._cache = _PackageCache(function)
    return dispatcher


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
