"""User names, passwords and queries of URIs, which no file, message or log may contain.

A job hides those of its arguments at its start. From then on the program handles URIs without them, and only what opens
a connection adds them again. They exist in the memory of the job and of its Ray workers.
"""

import re
from urllib.parse import parse_qsl, unquote

_URI = re.compile(
    r"(?<![\w/.+-])(?P<scheme>[a-z][a-z0-9+.-]{0,30})://"
    # The second form is a password with a slash, which database URLs allow; a port is none.
    r"(?:(?P<user>[^\s/?#]*|[^\s/:@]*:(?!:|\d+(?:[/?#]|$))[^\s\"'<>@]*)@)?"
    r"(?P<path>(?:(?!::)[^\s?\"'<>])*)"
    r"(?:\?(?P<query>(?:(?!,\w+=)[^\s\"'<>])*[^\s\"'<>.,;:)\]]))?",
    re.IGNORECASE,
)
_NOT_A_USER = {"abfs", "abfss", "wasb", "wasbs", "github", "git"}
"""Schemes in which a container or a repository stands before the @."""
_QUERY_SCHEMES = re.compile(r"https?|(?:postgres|mysql|mariadb|mssql|oracle|sqlite).*", re.IGNORECASE)
"""Schemes in which every ? starts a query; in object stores it may be part of a name or a pattern."""
_PAGE_QUERY = re.compile(r"workflowType=machine_learning(&viewStateShareKey=crowdray)?")
"""Query of the addresses of MLflow's web pages (registry/pages.py), which is not a secret."""
_LOCAL = {"file", "local"}
"""Schemes of paths, in which @ and ? mean nothing."""
_MASK = "***"
_MIN_PASSWORD, _MIN_TOKEN = 8, 12
"""Lengths from which a password and the value of a query are masked outside URIs too; shorter ones may be words."""

hidden: dict[str, tuple[str, str]] = {}
"""User information and query by the URI without them; workers receive a copy."""


def redacted(text: str) -> str:
    """Return a text without the user names, passwords and queries of the URIs in it."""
    if "://" in text:
        text = _URI.sub(_redacted_uri, text)
    for user, query in list(hidden.values()):
        name, _, password = user.partition(":")
        secrets = [text for text in (password, unquote(password)) if len(text) >= _MIN_PASSWORD]
        secrets += [value for _, value in parse_qsl(query) if len(value) >= _MIN_TOKEN]
        for secret in secrets:
            text = text.replace(secret, _MASK)
        if name:  # as database servers quote it
            text = re.sub(rf"\b(user|role) (['\"]){re.escape(unquote(name))}\2", rf"\1 {_MASK}", text)
    return text


def hide_credentials(text: str) -> str:
    """Return a URI, or an argument with URIs, without credentials, which `with_credentials` adds again."""
    return _URI.sub(_hide, text) if "://" in text else text


def with_credentials(uri: str) -> str:
    """Return a URI with the credentials that were hidden from it, or from a URI that it is below."""
    return "::".join(_with_credentials(part) for part in uri.split("::"))  # fsspec chains URIs like this


def _parts(match: re.Match[str]) -> tuple[str, str, str]:
    """Return user information, URI without credentials, and query."""
    scheme, user, path, query = match["scheme"], match["user"], match["path"], match["query"]
    if scheme.lower() in _LOCAL:
        return "", match[0], ""
    if user is not None and scheme.lower() in _NOT_A_USER:
        user, path = None, f"{user}@{path}"
    if query is not None and _PAGE_QUERY.fullmatch(query):
        path, query = f"{path}?{query}", None
    if query is not None and not (_QUERY_SCHEMES.fullmatch(scheme) or re.match(r"[\w.~%-]+=", query)):
        path, query = f"{path}?{query}", None
    return user or "", f"{scheme}://{path}", query or ""


def _redacted_uri(match: re.Match[str]) -> str:
    _, bare, query = _parts(match)
    return f"{bare}?{_MASK}" if query else bare


def _hide(match: re.Match[str]) -> str:
    user, bare, query = _parts(match)
    bare = bare.rstrip("/") if bare.count("/") > 3 else bare
    if not (user or query):
        return match[0]
    # Another query at the same path is another file.
    if hidden.setdefault(bare, (user, query)) != (user, query):
        return match[0]
    if user:
        hidden.setdefault("/".join(bare.split("/")[:3]), (user, ""))
    return bare


def _with_credentials(uri: str) -> str:
    match = _URI.fullmatch(uri)
    if not hidden or match is None or any(_parts(match)[::2]):
        return uri
    scheme, _, path = uri.partition("://")
    steps = path.split("/")
    for length in range(len(steps), 0, -1):
        if found := hidden.get(f"{scheme}://{'/'.join(steps[:length])}"):
            user, query = found
            return f"{scheme}://{f'{user}@' if user else ''}{path}{f'?{query}' if query else ''}"
    return uri
