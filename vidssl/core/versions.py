"""Versions of installed packages."""

import importlib.metadata


def version_of(package: str) -> str | None:
    """Version of an installed package; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
