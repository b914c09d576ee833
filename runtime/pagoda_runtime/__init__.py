"""Pagoda's paged inference engine and its OpenAI-compatible server."""
