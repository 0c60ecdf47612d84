"""What edgelm raises.

Every error is one sentence that says what is wrong and, where there is one, the fix.

    EdgelmError                      exit code 1
      InputError (ValueError)        a text, a data file or an argument cannot be used
      ConfigError (ValueError)       a recipe or a method config is not valid
      ModelError                     a model reference cannot be used as it is
      CompressionError               a compression step cannot give a correct result
      ExportError                    a graph cannot be made, or is not what was asked for
      BundleError                    a bundle is damaged, incomplete or too new
        SignatureError               no trusted key signed it as it is; exit code 3
      TargetError                    no such target, or it cannot do what was asked
      SessionError                   a runtime cannot be opened as asked
      BinaryIndexError               an index is damaged, in use, too new, full or of another encoder
      OutputExistsError (OSError)    the output is there already
      MissingExtraError (ImportError)  a part of edgelm is not installed
      OverloadError                  a queue is full: nothing was begun, try again later
      DeadlineError (TimeoutError)   no answer within the time that the caller gave
      ClosedError                    a shared model was closed
      GateError                      a check that was asked for failed; exit code 3
"""

from __future__ import annotations

import importlib
from types import ModuleType


class EdgelmError(Exception):
    """Base of all errors that edgelm raises on purpose."""

    exit_code = 1


class InputError(EdgelmError, ValueError):
    """A text, a data file or an argument cannot be used."""


class ConfigError(EdgelmError, ValueError):
    """A recipe or a method config is not valid."""


class ModelError(EdgelmError):
    """A model reference cannot be used as it is."""


class CompressionError(EdgelmError):
    """A compression step cannot give a correct result."""


class ExportError(EdgelmError):
    """A graph cannot be made, or is not what was asked for."""


class BundleError(EdgelmError):
    """A bundle is damaged, incomplete or too new."""


class SignatureError(BundleError):
    """No trusted key signed a bundle as it is."""

    exit_code = 3


class TargetError(EdgelmError):
    """No such target, or it cannot do what was asked."""


class SessionError(EdgelmError):
    """A runtime cannot be opened as asked."""


class BinaryIndexError(EdgelmError):
    """An index is damaged, in use, too new, cannot be written, or is of another encoder."""


class OutputExistsError(EdgelmError, OSError):
    """The output is there already."""


class MissingExtraError(EdgelmError, ImportError):
    """A part of edgelm is not installed."""


class OverloadError(EdgelmError):
    """A queue is full: nothing was begun, try again later."""


class DeadlineError(EdgelmError, TimeoutError):
    """No answer within the time that the caller gave."""


class ClosedError(EdgelmError):
    """A shared model was closed."""


class GateError(EdgelmError):
    """A check that was asked for failed."""

    exit_code = 3


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional extra.

    Args:
        module: Dotted module name, for example ``"onnxruntime"``.
        extra: The extra of edgelm that brings it, for example ``"ort"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"This needs {error.name}, which is not installed. "
            f"Install it with: pip install 'edgelm[{extra}]'"
        ) from error
