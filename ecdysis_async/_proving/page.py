"""Page."""


def write(verdict: object) -> str:
    return ""
