"""Finds the file of a config or a study: a shipped one by its name, any other by its path."""

from __future__ import annotations

from pathlib import Path

from xception_jax.errors import InputMissingError

_FOLDERS = {"config": "", "study": "studies/"}  # in configs/, and at the beginning of names


def find_config(spec: str, kind: str = "config") -> tuple[Path, str]:
    """Returns the file of a config or study, and what follows the colon in its spec: the variant.

    Args:
      spec: 'NAME', 'studies/NAME' or 'PATH.py', with ':VARIANT' if it has variants.
      kind: 'config' or 'study'.

    Raises:
      InputMissingError: there is no such file.
    """
    name, _, variant = spec.partition(":")
    is_path = name.endswith(".py")
    names = shipped_names(kind)
    if Path(name).is_file() if is_path else name in names:
        return (Path(name) if is_path else _directory() / f"{name}.py"), variant
    fix = f"choose one of {', '.join(names)}, or give the path of your own .py file"
    raise InputMissingError(f"there is no {kind} {name}", name, fix)


def shipped_names(kind: str = "config") -> list[str]:
    """Returns the names of all shipped configs or studies."""
    folder = _FOLDERS[kind]
    paths = (_directory() / folder).glob("*.py")
    return sorted(f"{folder}{path.stem}" for path in paths if path.stem != "__init__")


def _directory() -> Path:
    """Returns configs/: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
