"""Import of Ray, which is optional."""

from __future__ import annotations

from typing import Any


class RayUnavailable(ImportError):
    """Ray, or a package that it needs, cannot be imported."""


def import_ray() -> Any:
    """Return the module ``ray``, with ``ray.data`` imported.

    Raises:
        RayUnavailable: It cannot be imported; the message names the command that installs it.
    """
    try:
        import fsspec  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise RayUnavailable(
            f"clusters need Ray, which cannot be imported ({error}); pip install 'savl[cluster]' brings it"
        ) from error
    return ray
