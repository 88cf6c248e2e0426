"""The one form of this package's error messages."""


class MissingPackageError(ValueError, ImportError):
    """An optional package is needed and not installed."""


def message(what: str, expected: object, got: object, advice: str) -> str:
    """Returns "WHAT (expected ..., got ...); ADVICE"."""
    return f"{what} (expected {expected}, got {got}); {advice}"


def missing_package(purpose: str, package: str) -> MissingPackageError:
    """The error of a missing optional package, with the command that installs it."""
    what = f"{purpose} needs the package {package}"
    return MissingPackageError(
        message(what, "it installed", "no such module", f"run: pip install {package}")
    )
