"""Pagoda's operator: turns LLMService objects into running engines."""
