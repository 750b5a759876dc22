"""ecdysis_async: async services that restart without losing a connection."""
