"""The version of LiteRT that is installed."""


def litert_version() -> str:
    """Such as "2.3.0". `importlib.metadata` knows it too, but imports much to say so."""
    import ai_edge_litert

    return str(ai_edge_litert.__version__)
