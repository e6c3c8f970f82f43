"""Notice when another distribution has taken the place of a package that belongs to this project.

The names of our packages are short, and others use them: PyPI has a distribution `rollouts`. Installed
after ours it overwrites `rollouts/__init__.py` without a word, and removes the file when it goes.
"""

from importlib.util import find_spec
from pathlib import Path

MARK = '__distribution__ = "apportion"'
"""A line of the `__init__.py` of every package that is checked."""


def check_ours(package: str, member: str) -> None:
    """Refuse a package that is not ours. Its source is read, and nothing is imported.

    A package that is not there at all is no error here: `samplers` works without the others.

    Args:
        package: a top-level name.
        member: a file of our package, by which its folder is known if `__init__.py` is gone.

    Raises:
        ImportError: saying which distribution the package is from, and what to do.
    """
    try:
        spec = find_spec(package)
    except ValueError:  # a module made by hand, without a spec
        return
    if spec is None:
        return
    if spec.origin is None:  # a folder without __init__.py
        if any(
            (Path(folder) / member).is_file() for folder in spec.submodule_search_locations or ()
        ):
            raise ImportError(
                f"{package}/__init__.py is missing: removed, it seems, with another distribution "
                f"that has a package of this name. {_repair()}"
            )
        return
    read = getattr(spec.loader, "get_data", None)
    if read is None or MARK.encode() in read(spec.origin):
        return
    other = _distribution_of(spec.origin)
    if other is None:
        raise ImportError(
            f"import {package} finds {spec.origin}, which is not apportion's: rename that file or "
            "folder, or start Python elsewhere"
        )
    raise ImportError(
        f"import {package} finds {spec.origin}, which belongs to the distribution {other!r} and not "
        f"to apportion. The two cannot share an environment: pip uninstall {other}. {_repair()}"
    )


def _repair() -> str:
    return "To restore the file: pip install --force-reinstall --no-deps apportion"


def _distribution_of(file: str) -> str | None:
    """The name of the distribution, not ours, that installed this file."""
    from importlib.metadata import distributions  # slow to import, and only an error needs it

    path = Path(file).resolve()
    for found in distributions():
        if found.name == "apportion":
            continue
        for each in found.files or ():
            if each.name == path.name and Path(str(each.locate())).resolve() == path:
                return found.name
    return None
