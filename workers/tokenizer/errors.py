"""The one error of the text side, raised to whoever loads a model's text files or asks for text.

It stands alone so that every module here can raise it without importing another.
"""

from __future__ import annotations


class TextModelError(ValueError):
    """A tokenizer or chat template cannot be loaded or used; the message is for the user.

    param: the field of the request that is to blame, where one is.  code: as in protocol.Error.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_request"
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
