"""Recognises passwords and tokens in text and hides them. No message, log, file or parameter of a run holds one.

Settings are recorded (config.yaml, MLflow's parameters, the command in environment.json, the jobs of a sweep), so a
setting that contains a secret is refused (caco/config/validation.py). Secrets in environment variables reach libraries
directly; the messages of these libraries are shown through `redacted`. Imports nothing of caco.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote

HIDDEN = "***"
OF_SECRETS = (
    "holds a password or a token, and settings are written into files. Put it into the environment instead:"
    " MLFLOW_TRACKING_URI=ADDRESS, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
)
_WORDS = r"password|passwd|pwd|secret|token|api_?key|access_?key|account_?key|private_?key|authorization|credentials?"
# postgresql://user:PASSWORD@host. The password may itself contain @ (it ends at the last one before the path) and what
# SQLAlchemy allows in one: /, blanks, quotes inside. A port is not a password. In a folder's name, an address has one
# slash instead of two.
_IN_ADDRESS = re.compile(
    r"(?P<before>[a-zA-Z][\w+.-]*:/{1,2}(?!/)[^\s/:@'\"]*:)(?!\d{1,5}(?:[/?#\s'\",;)\]}]|$))"
    r"(?P<secret>[^\s/'\"]+|[^\s@'\"](?:[^\n@'\"]|(?<=[\w\\'\"])['\"](?=[\w\\'\"]))*)(?=@)"
)
# ?password=..., MLFLOW_TRACKING_TOKEN=..., "api_key: ..."
_ASSIGNED = re.compile(
    rf"(?P<before>\b\w*(?:{_WORDS})[\"']?\s*[=:]\s*[\"']?(?:(?:bearer|basic)\s+)?)(?P<secret>[^\s&;,'\"}}]+)",
    re.IGNORECASE,
)
_NAME = re.compile(rf"(?:(?:^|[_.\-])(?:{_WORDS})|password)$", re.IGNORECASE)  # libpq reads PGPASSWORD
_SHORTEST = 6  # values of variables that are shorter are not searched for, because they occur as ordinary words


def redacted(text: str) -> str:
    """The text with *** in place of each password and token: in addresses, in assignments, and values of secret
    environment variables.
    """
    for value in _of_the_environment(os.environ):
        text = text.replace(value, HIDDEN)
    for pattern in (_IN_ADDRESS, _ASSIGNED):
        text = pattern.sub(lambda found: found["before"] + HIDDEN, text)
    return text


def shortened(value: object, length: int) -> str:
    """`repr` of a value, cut to `length`. Secrets are hidden first, because half an address is not recognised as
    one.
    """
    return redacted(repr(value))[:length]


def holds_secret(text: str) -> bool:
    """Whether a setting's text contains a secret; text from `redacted` does not."""
    return any(found["secret"] != HIDDEN for pattern in (_IN_ADDRESS, _ASSIGNED) for found in pattern.finditer(text))


def names_secret(key: str) -> bool:
    """Whether the name of a setting says that it is a secret, such as `tracking.password`."""
    return _NAME.search(key) is not None and key not in ("PWD", "OLDPWD")  # the shell's folders


def completed(address: str, known: str | None) -> str | None:
    """An address that was recorded without its password, completed with that of `known` if both name the same place,
    else None.

    An address without a hidden password is returned as it is.
    """
    if HIDDEN not in address:
        return address
    return known if known and redacted(known) == address else None


def _of_the_environment(variables: Mapping[str, str]) -> list[str]:
    """The values of variables whose names say that they are secret, and the passwords in addresses; longest first."""
    values = [value for name, value in variables.items() if names_secret(name)]
    for value in variables.values():
        values += [
            form for found in _IN_ADDRESS.finditer(value) for form in {found["secret"], unquote(found["secret"])}
        ]
    hidden = {value for value in values if len(value) >= _SHORTEST and value != HIDDEN}
    return sorted((value for value in hidden if not _is_file(value)), key=len, reverse=True)


def _is_file(value: str) -> bool:
    """Whether the value is the path of a file, not a secret itself (GOOGLE_APPLICATION_CREDENTIALS)."""
    try:
        return value.startswith("/") and os.path.exists(value)
    except ValueError:
        return False
