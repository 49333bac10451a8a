"""Entry points. Each is thin: it composes a configuration, calls the library, and speaks to a person."""
