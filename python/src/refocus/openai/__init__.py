"""The service behind an HTTP port shaped like OpenAI's: python3 -m refocus.openai. Evaluation harnesses and other clients
of that interface run unmodified, with or without adaptation to each text.
"""
