"""Text: tokenizers, conversations, chat templates, and the placeholder tokens of images and videos.

Everything here is a pure function of text and numbers. With the built-in templates turns are
tokenized one by one, and media are counted from their sizes alone, so that the length of a document
follows from metadata without tokenizing or decoding again.
"""
